"""What comes back from a checkpoint is what was saved, or an older one that is, or an error that says what to do."""

import gc
import json
import logging
import pathlib
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax.files import DiskFull
from kdflax.training import Checkpoints, digest
from kdflax.training.checkpoints import digests

# A load that fails leaves Orbax's event loop behind; Python complains when it collects it.
pytestmark = pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_what_failed_loads_leave():
  yield
  gc.collect()


def _state(scale=1.0):
  params = {"student": {"kernel": scale * jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  return {"params": params, "opt": optimizer.init(params), "key": jax.random.key(3), "step": jnp.int32(scale)}


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert digests(a) == digests(b)


def _save(directory, steps, **options):
  with Checkpoints(directory, **options) as checkpoints:
    for step in steps:
      checkpoints.save(step, _state(step), {"data": {"position": step}})


def test_typed_keys_and_optimizer_states_come_back(tmp_path):
  _save(tmp_path, [3])
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(_state())
  assert restored.step == 3 and restored.extra == {"data": {"position": 3}}
  _assert_same(restored.arrays, _state(3))
  assert jax.random.key_impl(restored.arrays["key"]) == jax.random.key_impl(_state()["key"])


def test_an_empty_directory_has_no_checkpoint(tmp_path):
  with Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.restore(_state()) is None and checkpoints.steps() == []


def test_shapes_say_as_much_as_arrays(tmp_path):
  _save(tmp_path, [3])
  with Checkpoints(tmp_path) as checkpoints:
    _assert_same(checkpoints.restore(jax.eval_shape(_state)).arrays, _state(3))


def test_the_newest_stay_and_the_best(tmp_path):
  scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4}
  score = lambda metrics: metrics["accuracy"]
  with (
    Checkpoints(tmp_path / "latest", keep_latest=2) as latest,
    Checkpoints(tmp_path / "best", keep_latest=1, best=score) as best,
  ):
    for step, accuracy in scores.items():
      latest.save(step, {"x": jnp.float32(step)})
      best.save(step, {"x": jnp.float32(step)}, metrics={"accuracy": accuracy} if step != 4 else None)
    latest.wait()
    best.wait()
    assert latest.steps() == [4, 5] and best.steps() == [2, 5]
    assert best.restore({"x": jnp.float32(0)}, step=2).arrays["x"] == 2


def test_a_score_that_is_not_a_number_neither_wins_nor_loses_the_best(tmp_path):
  score = lambda metrics: metrics["accuracy"]
  with Checkpoints(tmp_path, keep_latest=1, best=score) as checkpoints:
    assert checkpoints.best_step() is None
    for step, accuracy in enumerate([np.nan, 0.5, 0.9, np.nan, 0.9, 0.2, np.nan, 0.1], start=1):
      checkpoints.save(step, {"x": jnp.float32(step)}, metrics={"accuracy": float(accuracy)})
      checkpoints.wait()
      assert checkpoints.best_step() == [None, 2, 3, 3, 5, 5, 5, 5][step - 1]
    assert checkpoints.steps() == [5, 8]
  with Checkpoints(tmp_path, best=score) as checkpoints:  # scores are read again
    assert checkpoints.best_step() == 5
    restored = checkpoints.restore({"x": jnp.float32(0)}, step="best")
    assert restored.step == 5 and restored.arrays["x"] == 5
  with Checkpoints(tmp_path, best=lambda metrics: -metrics["accuracy"]) as checkpoints:
    assert checkpoints.best_step() == 8


def test_what_has_no_score_has_no_best(tmp_path, caplog):
  _save(tmp_path, [1])
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="have no score; open them with best="):
      checkpoints.restore(_state(), step="best")
    with pytest.raises(ValueError, match=r"step must be a number.*got 'last'"):
      checkpoints.restore(_state(), step="last")
    checkpoints.save(2, _state(2), metrics={"loss": 1.0})
  with Checkpoints(tmp_path, best=lambda metrics: metrics["accuracy"]) as checkpoints:
    assert "checkpoint 2" in caplog.text and "KeyError" in caplog.text
    with pytest.raises(ValueError, match=r"no checkpoint in .* has a score"):
      checkpoints.restore(_state(), step="best")
  with pytest.raises(ValueError, match="keep_latest must be at least 1"):
    Checkpoints(tmp_path, keep_latest=0)


def test_arrays_without_elements_come_back(tmp_path):
  state = {"none": jnp.zeros((0, 3), jnp.bfloat16), "some": jnp.ones(2), "list": [jnp.zeros((2, 0)), jnp.arange(3)]}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    _assert_same(checkpoints.restore(jax.eval_shape(lambda: state)).arrays, state)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64", "bfloat16", "int4", "uint8", "bool"])
def test_every_dtype_comes_back(tmp_path, dtype):
  state = {"x": jnp.array([0, 1, 1]).astype(dtype)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    _assert_same(checkpoints.restore(state).arrays, state)


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 3 MiB; only root can make one."""
  place = tmp_path / "disk"
  place.mkdir()
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True).returncode:
    pytest.skip("only root can mount a small disk")
  yield place
  subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_said_in_one_line_and_costs_no_checkpoint(small_disk, capfd):
  state = lambda step: {"x": jnp.asarray(np.random.default_rng(step).normal(size=300_000), jnp.float32)}
  with (
    pytest.raises(DiskFull, match=r"the disk is full.*continues from step 2") as caught,
    Checkpoints(small_disk / "run") as checkpoints,
  ):
    for step in range(1, 4):
      checkpoints.save(step, state(step))
  assert "\n" not in str(caught.value) and capfd.readouterr().err == ""
  with Checkpoints(small_disk / "run", keep_latest=1) as checkpoints:
    assert checkpoints.restore(state(0)).step == 2


def test_what_a_killed_save_left_is_removed(tmp_path):
  _save(tmp_path, [1])
  leftover = tmp_path / "2.orbax-checkpoint-tmp"
  (leftover / "state").mkdir(parents=True)
  (leftover / "state" / "half").write_bytes(b"abc")
  with Checkpoints(tmp_path) as checkpoints:
    assert not leftover.exists()
    assert checkpoints.restore(_state()).step == 1


def _largest_file(directory):
  return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _truncate(directory):
  for path in (directory / "state").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _delete_arrays(directory):
  for path in (directory / "state").rglob("*"):
    if path.is_file():
      path.unlink()


def _flip_array_bits(directory):
  """In the arrays alone: they are stored compressed, so the flipped ones are stored anew."""
  flipped = _state(9)
  with Checkpoints(directory.parent / "other") as other:
    other.save(int(directory.name), flipped)
  source = directory.parent / "other" / directory.name / "state"
  target = directory / "state"
  for path in source.rglob("*"):
    if path.is_file():
      (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
      (target / path.relative_to(source)).write_bytes(path.read_bytes())
  stale = {p.relative_to(target) for p in target.rglob("*")} - {p.relative_to(source) for p in source.rglob("*")}
  for path in sorted(stale, reverse=True):
    if (target / path).is_file():
      (target / path).unlink()


def _change_metadata(directory):
  path = directory / "_CHECKPOINT_METADATA"
  document = json.loads(path.read_text())
  document["custom_metadata"]["extra"]["data"]["position"] += 1
  path.write_text(json.dumps(document))


DAMAGE = [_truncate, _delete_arrays, _flip_array_bits, _change_metadata]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, damage):
  directory = tmp_path / "checkpoints"
  _save(directory, [1, 2])
  damage(directory / "2")
  with caplog.at_level(logging.WARNING), Checkpoints(directory) as checkpoints:
    restored = checkpoints.restore(_state())
    assert restored.step == 1 and restored.extra == {"data": {"position": 1}}
    _assert_same(restored.arrays, _state(1))
    assert "passed over, step 2" in caplog.text
    checkpoints.save(2, _state(2))  # as a run does that goes the way again
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    _assert_same(checkpoints.restore(_state()).arrays, _state(2))


def test_a_flipped_bit_in_any_file_is_passed_over_or_does_no_harm(tmp_path):
  """Orbax's own metadata too: it reads them all when it opens a directory."""
  source = tmp_path / "source"
  _save(source, [1, 2])
  passed_over = 0
  for file in sorted(path for path in (source / "2").rglob("*") if path.is_file()):
    content = file.read_bytes()
    positions = [2, len(content) // 2, len(content) - 2]
    for position in positions if file.name != "_CHECKPOINT_METADATA" else range(1, len(content), 199):
      directory = pathlib.Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
      shutil.copytree(source, directory)
      damaged = bytearray(content)
      damaged[position] ^= 1
      (directory / file.relative_to(source)).write_bytes(damaged)
      with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(_state())
        _assert_same(restored.arrays, _state(restored.step))
        if restored.step == 1:
          passed_over += 1
          checkpoints.save(2, _state(2))
          checkpoints.wait()
          assert checkpoints.steps() == [1, 2] and {p.name for p in directory.iterdir()} == {"1", "2"}
  assert passed_over > 8


def test_metadata_that_stop_orbax_are_set_aside_until_another_checkpoint_is_whole(tmp_path):
  _save(tmp_path, [1])
  path = tmp_path / "1" / "_CHECKPOINT_METADATA"
  path.write_bytes(path.read_bytes().replace(b"item_handlers", b"htem_handlers"))
  for _ in range(2):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=r"(?s)no checkpoint.*1\.damaged"):
      checkpoints.restore(_state())
  assert [p.name for p in tmp_path.iterdir()] == ["1.damaged"]


def test_a_directory_that_was_renamed_to_another_step_is_passed_over(tmp_path, caplog):
  _save(tmp_path, [1, 2])
  (tmp_path / "2").rename(tmp_path / "7")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(_state()).step == 1
  assert "it was saved as step 2; give the directory that name again" in caplog.text


def test_any_flipped_byte_is_noticed(tmp_path):
  """Wherever it is in the largest file of the arrays, what comes back is never something else."""
  directory = tmp_path / "checkpoints"
  _save(directory, [1, 2])
  path = _largest_file(directory / "2" / "state")
  content = path.read_bytes()
  with Checkpoints(directory) as checkpoints:
    for position in np.linspace(0, len(content) - 1, 7).astype(int):
      damaged = bytearray(content)
      damaged[position] ^= 0xFF
      path.write_bytes(damaged)
      try:
        restored = checkpoints.restore(_state(), step=2)
      except ValueError:
        continue
      _assert_same(restored.arrays, _state(2))


def test_without_any_whole_checkpoint_the_error_says_what_to_do(tmp_path):
  directory = tmp_path / "checkpoints"
  _save(directory, [1, 2])
  for step in ("1", "2"):
    _truncate(directory / step)
  with Checkpoints(directory) as checkpoints:
    with pytest.raises(ValueError, match=r"(?s)no checkpoint in .* is intact.*delete the directory.*step 2:.*step 1:"):
      checkpoints.restore(_state())
    assert checkpoints.steps() == [1, 2]  # nothing is deleted while nothing replaces it


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("shape", r"\['kernel'\] is float32\[2, 3\] here and float32\[2, 4\] in the program"),
    ("name", r"\['pupil'\]\['bias'\] is absent here and bfloat16\[3\] in the program"),
    ("missing", r"\['bias'\] is bfloat16\[3\] here and absent in the program"),
  ],
)
def test_a_state_of_another_program_is_no_match(tmp_path, change, message):
  _save(tmp_path, [1])
  like = _state()
  if change == "shape":
    like["params"]["student"]["kernel"] = jnp.zeros((2, 4))
  elif change == "name":
    like["params"]["pupil"] = like["params"].pop("student")
  else:
    del like["params"]["student"]["bias"]
  message = "(?s)restore the configuration that wrote it.*" + message
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
    checkpoints.restore(like)


def test_the_digest_names_content():
  assert digest(_state()) == digest(_state())
  changes = {
    "value": lambda s: s["params"]["student"].update(bias=jnp.zeros(3, jnp.bfloat16)),
    "dtype": lambda s: s["params"]["student"].update(bias=jnp.ones(3)),
    "shape": lambda s: s["params"]["student"].update(kernel=s["params"]["student"]["kernel"].reshape(3, 2)),
    "name": lambda s: s["params"].update(pupil=s["params"].pop("student")),
    "key": lambda s: s.update(key=jax.random.key(4)),
  }
  seen = {digest(_state())}
  for change in changes.values():
    state = _state()
    change(state)
    seen.add(digest(state))
  assert len(seen) == 1 + len(changes)
