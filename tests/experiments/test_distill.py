"""The distillation experiment from end to end: its files, its refusals, and that no interruption shows in it."""

import dataclasses
import json
import os
import random
import signal

import numpy as np
import pytest

from benchmarks import kill_points
from experiments import common, distill
from kdflax import training

TINY = {
  "dataset": "digits",
  "labels": (16,),
  "methods": ("baseline", "all"),
  "seeds": 2,
  "student_hidden": (4,),
  "teacher_hidden": (8,),
  "student_steps": 4,
  "teacher_steps": 4,
  "batch_size": 16,
  "save_every": 2,
}


pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.xdist_group("distill")]  # one run, in one process


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_cache):
  run = tmp_path_factory.mktemp("runs") / "tiny"
  distill.main(distill.Config(run=str(run), **TINY))
  return run


def test_a_run_leaves_its_settings_log_tables_pictures_and_checkpoints(finished):
  files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
  assert {"config.json", "metrics.jsonl", "results.md", "results.json"} <= files
  pictures = [name for name in files if name.endswith(".png")]
  assert sorted(pictures) == ["accuracy.png", "confused_digits.png", "learning_curves.png"]
  assert all((finished / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
  phases = {"teacher", "16-labels-baseline", "16-labels-all"}
  assert {path.name for path in (finished / "checkpoints").iterdir()} == phases
  assert all((finished / "checkpoints" / phase / "4").is_dir() for phase in phases)
  assert not [name for name in files if "orbax-checkpoint-tmp" in name or "/." in name]


def test_the_settings_are_those_that_were_used(finished):
  settings = json.loads((finished / "config.json").read_text())
  assert settings["labels"] == [16] and settings["weights"] == dataclasses.asdict(distill.Weights())
  assert "accept_changes" not in settings


def test_the_results_hold_a_number_for_each_seed_and_its_difference_to_the_baseline(finished):
  results = {result["method"]: result for result in json.loads((finished / "results.json").read_text())}
  assert results.keys() == {"teacher", "baseline", "all"}
  for result in results.values():
    assert len(result["accuracy"]) == 2 and all(0 <= accuracy <= 1 for accuracy in result["accuracy"])
  pairs = zip(results["all"]["accuracy"], results["baseline"]["accuracy"], strict=True)
  assert results["all"]["difference"] == pytest.approx([a - b for a, b in pairs])
  assert results["baseline"]["difference"] is None
  assert results["baseline"]["parameters"] == 64 * 4 + 4 + 4 * 10 + 10
  table = (finished / "results.md").read_text()
  assert all(f"| {method} |" in table for method in results)


def test_the_log_has_rows_of_every_phase(finished):
  rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
  assert list(dict.fromkeys(row["phase"] for row in rows)) == ["teacher", "16 labels, baseline", "16 labels, all"]
  last = [row for row in rows if row["phase"] == "16 labels, all" and "soft" in row][-1]
  assert last["step"] == 4 and {"hard", "soft", "feature", "distance"} <= last.keys()


def test_a_finished_run_is_reported_again_without_training(finished, capsys):
  before = kill_points.fingerprint(finished)
  distill.main(distill.Config(run=str(finished), **TINY))
  assert kill_points.fingerprint(finished) == before
  assert "| resumed |" in capsys.readouterr().out


def test_the_smoke_run_keeps_to_its_own_directory():
  config = distill.Config(smoke=True).checked()
  assert config.run == "runs/distill-smoke" and config.student_steps < 100
  assert distill.Config(smoke=True, run="elsewhere").checked().run == "elsewhere"


def _command_line(monkeypatch, *arguments):
  """Runs the command in this process; returns its exit code."""
  monkeypatch.setattr("sys.argv", ["distill", *map(str, arguments)])
  with pytest.raises(SystemExit) as exit:
    common.run_command_line(distill.main, distill.Config)
  return exit.value.code


@pytest.mark.parametrize(
  ("arguments", "messages"),
  [
    (["--methods", "baseline", "hints"], ["hints", "feature", "relational"]),
    (["--dataset", "mnist"], ["mnist", "digits"]),
    (["--seeds", "many"], ["many"]),
    (["--temperature", "0"], ["error: temperature must be positive; got 0.0"]),
    (["--learning-rate", "nan"], ["error: learning_rate must be positive; got nan"]),
    (["--weights.soft", "-1"], ["error: weights must be at least 0", "'soft': -1.0"]),
    (["--weights.soft", "0", "--weights.feature", "0", "--weights.distance", "0"], ["not all 0"]),
    (["--batch-size", "128"], ["batch_size=128 is larger than the labelled data: 100 images"]),
    (["--labels"], ["labels must name a number of labelled images or more; got none"]),
    (["--labels", "8", "--batch-size", "4"], ["num_labelled=8 must be between 10 (the classes) and 1000"]),
    (["--student-hidden", "0"], ["student_hidden must be widths of at least 1; got (0,)"]),
    (["--student-hidden", "8", "-3"], ["student_hidden must be widths of at least 1; got (8, -3)"]),
    (["--teacher-hidden", "-3"], ["teacher_hidden must be widths of at least 1; got (-3,)"]),
    (["--teacher-hidden"], ["teacher_hidden must name a width or more"]),
    (
      ["--dataset", "wine"],
      ["dataset='wine' is not for this experiment, which takes glyphs, digits, mnist, cifar10, cifar100"],
    ),
    (["--dataset", "mnist", "--path", "there"], ["mnist needs a validation split: set held_out"]),
    (["--held-out", "9"], ["held_out=9 is for mnist, cifar10, cifar100; digits has a validation split of its own"]),
    (["--labels", "99999"], ["labels=99999 is more than the training images: "]),
    (["--seeds", "0"], ["seeds must be at least 1; got 0"]),
    (["--methods", "all"], ["with baseline among them"]),
    (["--shift", "1"], ["shift=1 needs pipeline=grain"]),
  ],
  ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_input_ends_at_once_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, messages):
  named = () if "--dataset" in arguments else ("--dataset", "digits")
  code = _command_line(monkeypatch, "--run", tmp_path / "run", *named, *arguments)
  captured = capsys.readouterr()
  said = " ".join((captured.out + captured.err).split())
  assert code == common.BAD_INPUT
  assert all(message in said for message in messages), said
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_images_of_bytes_are_normalised_by_their_own_data_set(tmp_path):
  """MNIST has one channel; the pixels reach the network with mean 0 and deviation 1 by its own statistics."""
  random = np.random.default_rng(0)
  for name, count in (("train", 60), ("t10k", 20)):
    images, labels = random.integers(256, size=(count, 6, 6), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
    header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4) for size in images.shape)
    (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + count.to_bytes(4) + labels.tobytes())
  files = {"dataset": "mnist", "path": str(tmp_path), "held_out": 20}
  distill.main(distill.Config(run=str(tmp_path / "run"), **TINY | files))
  assert "| all |" in (tmp_path / "run" / "results.md").read_text()


@pytest.mark.slow
def test_glyphs_are_learned_by_their_characters(tmp_path):
  distill.main(distill.Config(run=str(tmp_path / "run"), **TINY | {"dataset": "glyphs", "labels": (62,)}))
  assert "Students on glyphs" in (tmp_path / "run" / "results.md").read_text()
  assert (tmp_path / "run" / "set_right.png").stat().st_size > 0
  settings = json.loads((tmp_path / "run" / "config.json").read_text())
  assert settings["dataset"] == "glyphs" and settings["labels"] == [62]


def test_what_is_not_said_is_that_of_the_data_set():
  config = distill.Config(dataset="digits", seeds=2).checked()
  recipe = distill.RECIPES["digits"]
  assert (config.labels, config.student_hidden, config.seeds) == (recipe.labels, recipe.student_hidden, 2)
  assert distill.Config().checked().labels == distill.RECIPES["glyphs"].labels


def test_a_run_directory_that_is_a_file_or_foreign_is_left_alone(tmp_path, monkeypatch, capsys):
  (tmp_path / "file").write_text("mine")
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / "thesis.tex").write_text("mine")
  for name, message in (("file", "is a file"), ("foreign", "holds other files")):
    assert _command_line(monkeypatch, "--run", tmp_path / name) == common.BAD_INPUT
    assert message in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "foreign", "thesis.tex"]


def test_a_second_writer_is_refused(tmp_path, monkeypatch, capsys):
  with training.RunDirectory(tmp_path / "run", {}):
    assert _command_line(monkeypatch, "--run", tmp_path / "run") == common.BAD_INPUT
  assert "another process is writing" in capsys.readouterr().err


def test_changed_settings_are_refused_by_name(finished, monkeypatch, capsys):
  tiny = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", *_words(value))]
  arguments = ["--run", finished, *tiny, "--temperature", "3", "--weights.soft", "0.5"]
  assert _command_line(monkeypatch, *arguments) == common.BAD_INPUT
  said = capsys.readouterr().err
  assert "temperature: 4.0 before, 3.0 now" in said and "weights.soft: 1.0 before, 0.5 now" in said
  assert json.loads((finished / "config.json").read_text())["temperature"] == 4.0


def _words(value):
  return map(str, value) if isinstance(value, tuple) else [str(value)]


def test_sigterm_saves_and_the_same_command_continues(finished, tmp_path, monkeypatch):
  """Within this process: the signal arrives between two phases, and the first step of the next is the last."""
  run = str(tmp_path / "run")
  record = distill.teachers.record

  def signal_after_the_teacher(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return record(*arguments, **options)

  with monkeypatch.context() as patch:
    patch.setattr(distill.teachers, "record", signal_after_the_teacher)
    words = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", *_words(value))]
    assert _command_line(patch, "--run", run, *words) == training.PREEMPTED
  assert (tmp_path / "run" / "checkpoints" / "16-labels-baseline" / "1").is_dir()
  distill.main(distill.Config(run=run, **TINY))
  assert kill_points.fingerprint(tmp_path / "run") == kill_points.fingerprint(finished)


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path):
  """Three kills in one run: at a random moment, in the middle of an early save, in the middle of a late one."""
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  kill_points.finish(kill_points.start(whole))
  draw = random.Random(0)
  moments = [
    kill_points.during_save(broken, 3),
    kill_points.after(broken, 2 * draw.random()),
    kill_points.during_save(broken, 12),
  ]
  killed = [kill_points.kill_when(kill_points.start(broken), ready) for ready in moments]
  assert killed[0] and sum(killed) >= 2, "the run ended before it was killed; make it longer"
  kill_points.finish(kill_points.start(broken))
  assert kill_points.fingerprint(broken) == kill_points.fingerprint(whole)


@pytest.mark.slow
def test_a_layout_changes_where_numbers_lie_and_not_what_they_are(tmp_path):
  """All arrays of the state cut over eight devices; a run continues on another mesh than it began on."""
  sizes = TINY | {"student_hidden": (128,), "teacher_hidden": (128,)}
  ways = {"plain": {}, "cut": {"mesh": "data=4,model=2", "fsdp": "data"}, "streamed": {"fsdp": "data"}}
  rows = {}
  for name, how in ways.items():
    pipeline = {"pipeline": "grain"} if name == "streamed" else {}
    distill.main(distill.Config(run=str(tmp_path / name), **sizes, **how, **pipeline))
    rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
  for plain, cut in zip(rows["plain"], rows["cut"], strict=True):
    assert plain.keys() == cut.keys() and plain["phase"] == cut["phase"]
    for key in plain.keys() - {"phase"}:
      np.testing.assert_allclose(cut[key], plain[key], rtol=1e-4, atol=1e-6)
  assert len(rows["streamed"]) == len(rows["plain"])
  distill.main(distill.Config(run=str(tmp_path / "cut"), **sizes, mesh="data=8"))  # complete: nothing is to be done
