"""Every example runs, fits one screen and is linked from the README; a few steps are enough to see it work."""

import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")
# Steps, and what the test accuracy must exceed (chance is 0.1, of stripes 0.5).
ENOUGH = {
  "losses_in_your_own_loop": (150, {"teacher": 0.7, "student": 0.25}),
  "distil": (60, {"labels alone": 0.15, "with the teacher": 0.3}),
  "joint": (60, {"left": 0.2, "right": 0.2}),
  "both": (60, {"left": 0.15, "right": 0.15}),
  "your_own_data": (100, 0.7),
}


@pytest.mark.parametrize("name", ENOUGH)
def test_an_example_learns(name, capsys):
  steps, least = ENOUGH[name]
  found = importlib.import_module(f"examples.{name}").main(steps=steps)
  if isinstance(least, dict):
    assert found.keys() == least.keys()
    assert all(found[key] > least[key] for key in least), found
  else:
    assert found > least
  assert "%" in capsys.readouterr().out


def test_a_run_resumes_and_its_student_leaves(tmp_path, capsys):
  from examples import resume_and_export

  found = resume_and_export.main(tmp_path / "run", steps=40)
  assert found > 0.3 and (tmp_path / "run" / "student" / "model.stablehlo").is_file()
  log = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert resume_and_export.main(tmp_path / "run", steps=40) == found
  assert (tmp_path / "run" / "metrics.jsonl").read_text() == log
  with pytest.raises(ValueError, match="steps: 40 before, 50 now"):
    resume_and_export.main(tmp_path / "run", steps=50)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fits_one_screen_and_is_linked(name):
  path = ROOT / "examples" / f"{name}.py"
  assert len(path.read_text().splitlines()) <= 60
  assert f"(examples/{name}.py)" in (ROOT / "README.md").read_text()
  assert f"python -m examples.{name}" in path.read_text()
