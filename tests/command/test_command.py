"""The command `kdflax`: what it prints, what it exits with, and that it notices what is damaged."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kdflax
from kdflax import balancing, export, files, methods, models, teachers, training
from kdflax.command import main
from kdflax.command.doctor import Requirement, fits, requirements

ROOT = pathlib.Path(kdflax.__file__).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A run with one checkpoint, a record, an export and a file of variables."""
  root = tmp_path_factory.mktemp("written")
  params = {"student": {"w": jnp.arange(6.0).reshape(2, 3), "none": jnp.zeros((0, 2))}}
  state = training.TrainState(jnp.int32(3), params, {}, (), (), {}, jax.random.key(0))
  with (
    training.RunDirectory(root / "run", {"steps": 3, "optimizer": {"rate": 0.1}}) as run,
    training.MetricsLog(run.path / "metrics.jsonl") as log,
    training.Checkpoints(run.path / "checkpoints", best=lambda scores: scores["accuracy"]) as checkpoints,
  ):
    log.append({"step": 3, "loss": 0.25})
    log.rows("")
    checkpoints.save(3, {"state": state}, {"rows": 1}, {"accuracy": 0.5})
  teachers.record(root / "record", {"logits": np.eye(4, dtype=np.float32)}, np.arange(4), source={"model": "wide"})
  network, batch = models.mlp((2,), 3), {"image": np.ones((1, 2), np.float32)}
  variables = network.init(jax.random.key(0), batch)
  export.export_model(root / "student", network, variables, batch, platforms=("cpu",))
  files.save_variables(root / "teacher.safetensors", variables)
  return root


def _run(capsys, *arguments):
  """Exit code, output and errors."""
  code = main([str(argument) for argument in arguments])
  return code, *capsys.readouterr()


def _damage(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


def _biggest(folder, pattern="*"):
  return max((path for path in folder.rglob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
  ("name", "what", "said"),
  [
    ("run", "a run", ["steps: 3", "rate: 0.1", "rows of metrics: 1", "loss: 0.25", "checkpoints", "accuracy: 0.5"]),
    ("run/checkpoints", "the checkpoints of a run", ["accuracy: 0.5"]),
    ("run/checkpoints/3", "a checkpoint", ["step: 3", "state/params/student/w: float32[2, 3]"]),
    ("record", "a teacher record", ["examples: 4", "logits: float32[4]", "model: wide"]),
    ("student", "an exported student", ["image: float32[batch,2]", "logits: float32[batch,3]", "params/head/kernel"]),
    ("teacher.safetensors", "variables of a model", ["params/head/kernel: float32[2, 3]", "digest: "]),
  ],
)
def test_inspect_says_what_is_there(written, capsys, name, what, said):
  before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
  code, out, _ = _run(capsys, "inspect", written / name)
  assert code == 0 and f"{name}: {what}, " in out and "every digest was verified" in out
  assert [words for words in said if words not in out] == []
  assert before == {path: path.stat().st_mtime_ns for path in written.rglob("*")}, "inspect only reads"


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("run", lambda root: _biggest(root / "checkpoints/3/state")),
    ("record", lambda root: _biggest(root, "*.safetensors")),
    ("student", lambda root: root / "model.stablehlo"),
    ("student", lambda root: root / "variables.safetensors"),
    ("teacher.safetensors", lambda path: path),
  ],
)
def test_inspect_notices_a_flipped_bit(written, tmp_path, capsys, name, file):
  copy = shutil.copytree(written, tmp_path / "copy") / name
  _damage(file(copy))
  code, out, _ = _run(capsys, "inspect", copy, "--json")
  assert code == 1 and json.loads(out)["faults"]
  assert _run(capsys, "inspect", copy)[1].count("DAMAGED") >= 1


def test_a_checkpoint_is_read_without_its_program(written):
  found = training.read_checkpoint(written / "run" / "checkpoints" / "3")
  assert (found.step, found.extra, found.metrics) == (3, {"rows": 1}, {"accuracy": 0.5})
  np.testing.assert_array_equal(found.arrays["state"]["params"]["student"]["w"], [[0, 1, 2], [3, 4, 5]])
  with pytest.raises(ValueError, match="is no checkpoint; name the folder of a step"):
    training.read_checkpoint(written)


@pytest.mark.parametrize("path", ["absent", "."])
def test_what_is_not_of_kdflax_is_refused(tmp_path, capsys, path):
  code, out, errors = _run(capsys, "inspect", tmp_path / path)
  assert code == 2 and not out and errors.startswith("error: ") and str(tmp_path) in errors


def test_every_method_and_balancer_is_listed(capsys):
  code, out, _ = _run(capsys, "methods")
  first = {line.split("  ")[0] for line in out.splitlines()}
  assert code == 0 and methods.CATALOGUE.keys() | balancing.CATALOGUE.keys() <= first
  assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", [*methods.CATALOGUE, *balancing.CATALOGUE, "upgrad", "RKD_ANGLE", "fitnets"])
def test_one_method_in_full(name, capsys):
  code, out, _ = _run(capsys, "methods", name, "--json")
  found = json.loads(out)
  assert code == 0 and found["documentation"] and (found["name"] == name or name in ("upgrad", "RKD_ANGLE", "fitnets"))


def test_the_page_of_a_method(capsys):
  _, out, _ = _run(capsys, "methods", "dkd")
  for words in ("DKD", "kdflax.losses.dkd(student_logits", "1 with alpha 1, beta 8", "mdistiller", "Args:"):
    assert words in out, words


def test_a_name_that_is_none_is_answered_with_the_nearest(capsys):
  code, _, errors = _run(capsys, "methods", "rkd_angel")
  assert code == 2 and "did you mean rkd_angle" in errors


def test_doctor_finds_this_environment_in_order(capsys, monkeypatch):
  monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
  code, out, _ = _run(capsys, "doctor")
  assert code == 0 and f"jax {jax.__version__}" in out and "cpu" in out and "export OPENBLAS_NUM_THREADS=1" in out
  monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
  assert "OPENBLAS" not in _run(capsys, "doctor")[1]


def test_doctor_names_what_is_missing_and_what_brings_it(capsys, monkeypatch):
  import importlib.metadata as metadata

  real = metadata.version
  versions = {"optax": "0.1.0", "grain": None}

  def version(name):
    found = versions.get(name, "")
    if found is None:
      raise metadata.PackageNotFoundError(name)
    return found or real(name)

  monkeypatch.setattr(metadata, "version", version)
  code, out, _ = _run(capsys, "doctor")
  assert code == 1 and 'optax is 0.1.0, and kdflax needs >=0.2.8,<0.3: pip install "optax>=0.2.8,<0.3"' in out
  assert "without grain there is no extra 'data': pip install \"kdflax[data]\"" in out


def test_doctor_knows_every_extra():
  wanted = requirements()
  assert {"", "data", "experiments", "dev"} <= wanted.keys()
  assert Requirement("jax", "cuda13", "") in wanted["cuda13"]
  assert Requirement.parse('tyro>=1.0; extra == "experiments"') == Requirement("tyro", "", ">=1.0")
  assert fits("0.12.0", ">=0.12,<0.13") and not fits("0.13.0rc1", "<0.13") and fits("6.0", "")


def test_the_command_imports_late():
  """Usage and version answer at once: neither jax nor numpy is imported for them."""
  script = "import sys; from kdflax.command import main; main(['--version'])"
  ended = "try:\n  exec(%r)\nexcept SystemExit: assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
  done = subprocess.run(
    [sys.executable, "-c", "import sys\n" + ended % script], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout == f"kdflax {kdflax.__version__}\n"
