"""Tries a wheel as a user would: `python scripts/try_wheel.py dist/kdflax-0.1.0-py3-none-any.whl`.

It is installed with the dependencies that it declares, and no others, in a new environment; away
from this checkout, a student is distilled, saved, exported and read back, and `kdflax` looks at what was written.
"""

import pathlib
import subprocess
import sys
import tempfile
import venv
import zipfile

SMOKE = """
import jax, jax.numpy as jnp, numpy as np, optax
from kdflax import export, losses, models, training
from kdflax.objectives import Term

batch = {"image": np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32), "label": np.arange(16) % 3}
student, teacher = models.mlp((4,), 3), models.mlp((32,), 3)
frozen = {"teacher": teacher.init(jax.random.key(1), batch)}
names = {"student_logits": "student.logits", "teacher_logits": "teacher.logits"}
soft = Term(losses.kl_soft_targets, names)
learner = training.make_learner({"student": student, "teacher": teacher}, {"soft": soft}, optax.adam(0.05))
state = learner.init(jax.random.key(0), batch, frozen)
step = jax.jit(learner.step)
values = []
for _ in range(50):
  state, metrics = step(state, batch, frozen)
  values.append(training.metrics.means(metrics)["soft"])
assert values[-1] < values[0] / 2, values
with training.RunDirectory("run", {"rate": 0.05}) as run, training.Checkpoints(run.path / "checkpoints") as checkpoints:
  checkpoints.save(50, {"state": state})
variables = (state.params["student"], state.model_state["student"])
export.export_model("student", student, variables, {"image": batch["image"]}, platforms=("cpu",))
found = export.load_exported("student")({"image": batch["image"]})["logits"]
expected = student.apply(*variables, batch, train=False, key=None)[0]["logits"]
np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
"""


def main(wheel: pathlib.Path) -> None:
  """Prints what was tried; an error ends it."""
  with zipfile.ZipFile(wheel) as archive:
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
  odd = [name for name in sizes if not name.startswith(("kdflax/", "kdflax-"))]
  assert not odd and "kdflax/py.typed" in sizes and any(name.endswith("licenses/LICENSE") for name in sizes), odd
  print(f"{wheel.name}: {len(sizes)} files of {sum(sizes.values()) / 1e6:.1f} MB")
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)
    venv.create(place / "venv", with_pip=True)
    python, command = place / "venv" / "bin" / "python", place / "venv" / "bin" / "kdflax"
    run = lambda *arguments: subprocess.run([*map(str, arguments)], cwd=place, check=True)
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel.resolve())
    run(python, "-m", "pip", "check")
    run(python, "-I", "-W", "error::DeprecationWarning:kdflax", "-c", SMOKE)
    for arguments in (["--version"], ["doctor"], ["methods", "rkd_angle"], ["inspect", "run"], ["inspect", "student"]):
      print("$ kdflax", *arguments, flush=True)
      run(command, *arguments)
  print("the wheel works with what it declares")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
