"""The run directory refuses what would spoil a run, and its files are whole at every moment."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from kdflax.training import MetricsLog, RunDirectory, RunDirectoryError, stop_on_sigterm, write_atomically

CONFIG = {"seeds": 2, "weights": {"soft": 1.0, "hint": 0.5}, "labels": (10, 20)}


def test_a_new_directory_holds_its_settings(tmp_path):
  with RunDirectory(tmp_path / "deep" / "run", CONFIG) as run:
    assert json.loads((run.path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))


def test_the_same_settings_continue(tmp_path):
  for _ in range(2):
    with RunDirectory(tmp_path, CONFIG):
      pass


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
  script = (
    "import sys; from kdflax.training import RunDirectory\n"
    f"with RunDirectory({str(tmp_path)!r}, {{}}):\n  print('locked', flush=True); sys.stdin.read()"
  )
  with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(RunDirectoryError, match="another process is writing"):
      RunDirectory(tmp_path, {})
    other.kill()
    other.wait()
  with RunDirectory(tmp_path, {}):  # a killed process holds no lock
    pass


def test_a_second_writer_in_one_process_is_refused(tmp_path):
  with RunDirectory(tmp_path, {}), pytest.raises(RunDirectoryError, match="another process"):
    RunDirectory(tmp_path, {})


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(RunDirectoryError, match=r"holds other files and no config.json"):
    RunDirectory(tmp_path, CONFIG)
  assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(RunDirectoryError, match="is a file; choose a directory"):
    RunDirectory(tmp_path / "run", CONFIG)


@pytest.mark.parametrize("leftover", [[], ["lock"], ["lock", ".config.json.k3xw"]])
def test_a_run_that_was_killed_before_it_wrote_its_settings_starts_anew(tmp_path, leftover):
  for name in leftover:
    (tmp_path / name).touch()
  with RunDirectory(tmp_path, CONFIG):
    assert sorted(os.listdir(tmp_path)) == ["config.json", "lock"]


def test_differing_settings_are_listed_and_may_be_accepted(tmp_path):
  with RunDirectory(tmp_path, CONFIG):
    pass
  changed = {"seeds": 3, "weights": {"soft": 1.0, "hint": 0.25}, "labels": (10, 20), "shift": 1}
  with pytest.raises(RunDirectoryError) as caught:
    RunDirectory(tmp_path, changed)
  listed = [line.strip() for line in str(caught.value).splitlines()[1:]]
  assert listed == ["seeds: 2 before, 3 now", "shift: 'absent' before, 1 now", "weights.hint: 0.5 before, 0.25 now"]
  assert json.loads((tmp_path / "config.json").read_text())["seeds"] == 2
  with RunDirectory(tmp_path, changed, accept_changes=True):
    pass
  with RunDirectory(tmp_path, changed):  # a refusal gave the lock back, and the new settings are kept
    pass


@pytest.mark.parametrize("content", [b"", b'{"seeds": 2', b"\xff\xfe"])
def test_settings_that_cannot_be_read_are_named(tmp_path, content):
  with RunDirectory(tmp_path, CONFIG):
    pass
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(RunDirectoryError, match=rf"{tmp_path}/config.json is damaged.*accept the change"):
    RunDirectory(tmp_path, CONFIG)
  with RunDirectory(tmp_path, CONFIG, accept_changes=True):
    assert json.loads((tmp_path / "config.json").read_text())["seeds"] == 2


def test_a_place_that_cannot_be_written_is_named():
  path = pathlib.Path("/proc/kdflax")  # not writable, whoever runs the tests
  with pytest.raises(RunDirectoryError, match=rf"cannot write to {path}.*choose another directory"):
    RunDirectory(path, CONFIG)


def test_a_read_only_run_directory_is_named(tmp_path, monkeypatch):
  with RunDirectory(tmp_path, CONFIG):
    pass

  def refuse(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr("builtins.open", refuse)
  with pytest.raises(RunDirectoryError, match="Read-only file system"):
    RunDirectory(tmp_path, CONFIG)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, old):
  path = tmp_path / "results.json"
  if old is not None:
    write_atomically(path, old)

  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    write_atomically(path, "new")
  assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["results.json"])
  assert old is None or path.read_text() == old


def test_files_are_written_whole_and_readable_by_others(tmp_path):
  write_atomically(tmp_path / "a.txt", "ä\n")
  write_atomically(tmp_path / "a.txt", b"\x00\x01")
  assert (tmp_path / "a.txt").read_bytes() == b"\x00\x01"
  assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def _rows(path):
  return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_log_is_rewound_to_a_checkpoint_or_to_the_last_complete_training(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricsLog(path) as log:
    for step in (1, 2):
      log.append({"phase": "a", "step": step})
    assert log.rows("a") == 2
    log.append({"phase": "a", "step": 3})
  with MetricsLog(path) as log:
    log.rewind("a", 2)
    log.append({"phase": "a", "step": 4})
    assert log.rows("a") == 3
    log.passed("a", 3)
    log.append({"phase": "a", "step": 5})
    log.rewind("a")
    log.append({"phase": "a", "step": 6})
  assert _rows(path) == [1, 2, 4, 6]


def test_rows_of_other_phases_stay_when_one_starts_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricsLog(path) as log:
    for phase, step in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
      log.append({"phase": phase, "step": step})
  with MetricsLog(path) as log:
    log.rewind("a")
    log.append({"phase": "a", "step": 5})
    log.rewind("c", 1)
  assert _rows(path) == [2, 4, 5]


def test_a_row_that_was_not_finished_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"phase": "a", "step": 1}\n{"phase": "a", "st')
  with MetricsLog(path) as log:
    assert log.rows("a") == 1
    log.append({"phase": "a", "step": 2})
  assert _rows(path) == [1, 2]


def test_a_log_that_lost_rows_is_not_made_up(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricsLog(path) as log:
    log.append({"phase": "a", "step": 1})
    with pytest.raises(ValueError, match=r"metrics.jsonl has 1 rows of 'a', a checkpoint counts on 6; rows are lost"):
      log.rewind("a", 6)
  assert _rows(path) == [1]
  path.write_bytes(b"no row\n")
  with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
    MetricsLog(path)


def _checkpoint(directory, phase, step):
  """What tells a run directory of a checkpoint."""
  folder = directory / "checkpoints" / phase / str(step)
  folder.mkdir(parents=True)
  (folder / "_CHECKPOINT_METADATA").write_text("{}")


def _change(directory, temperature, *, fail=False, checkpoint=None):
  """A run that accepts a change; it may make a checkpoint, and may fail."""
  with RunDirectory(directory, {"temperature": temperature}, accept_changes=True):
    if checkpoint is not None:
      _checkpoint(directory, "student", checkpoint)
    if fail:
      raise ArithmeticError


def test_an_accepted_change_is_kept_when_it_has_led_to_something_and_says_from_which_step(tmp_path):
  temperature = lambda: json.loads((tmp_path / "config.json").read_text())["temperature"]
  history = lambda: json.loads((tmp_path / "changes.json").read_text())
  change = lambda before, now: {"temperature": {"before": before, "now": now}}
  with RunDirectory(tmp_path, {"temperature": 4}):
    _checkpoint(tmp_path, "student", 100)
    _checkpoint(tmp_path, "teacher", 50)
  with pytest.raises(ArithmeticError):
    _change(tmp_path, 2, fail=True)
  assert temperature() == 4 and not (tmp_path / "changes.json").exists()  # it failed at once
  with pytest.raises(ArithmeticError):
    _change(tmp_path, 2, fail=True, checkpoint=200)
  assert temperature() == 2
  first = {"steps": {"checkpoints/student": 100, "checkpoints/teacher": 50}, "changed": change(4, 2)}
  assert history() == [first]
  _change(tmp_path, 1)
  last = {"steps": {"checkpoints/student": 200, "checkpoints/teacher": 50}, "changed": change(2, 1)}
  assert temperature() == 1 and history() == [first, last]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["changes.json", "checkpoints", "config.json", "lock"]


@pytest.mark.parametrize("saved", [False, True])
def test_a_killed_run_with_a_change_is_settled_by_the_next(tmp_path, saved):
  with RunDirectory(tmp_path, {"temperature": 4}):
    _checkpoint(tmp_path, "student", 100)
  run = RunDirectory(tmp_path, {"temperature": 2}, accept_changes=True)
  if saved:
    _checkpoint(tmp_path, "student", 200)
  run._locks.close()  # as the system does for a killed process
  with RunDirectory(tmp_path, {"temperature": 2 if saved else 4}):
    pass
  with pytest.raises(RunDirectoryError, match="other settings"):
    RunDirectory(tmp_path, {"temperature": 4 if saved else 2})
  assert (tmp_path / "changes.json").exists() == saved


@pytest.mark.parametrize("content", ["[1", "[" * 100_000, '{"settings": 1}', "[]"], ids=len)
def test_a_change_that_cannot_be_read_is_named(tmp_path, content):
  with RunDirectory(tmp_path, {}):
    pass
  (tmp_path / "config-next.json").write_text(content)
  with pytest.raises(
    RunDirectoryError, match=r"config-next\.json or changes\.json is damaged.*accept the change again"
  ):
    RunDirectory(tmp_path, {})


def test_not_a_number_is_the_same_setting_as_before(tmp_path):
  settings = {"clip": float("nan"), "list": [float("nan"), 1]}
  for _ in range(2):
    with RunDirectory(tmp_path, settings):
      pass
  with pytest.raises(RunDirectoryError, match=r"clip: nan before, 1\.0 now"):
    RunDirectory(tmp_path, settings | {"clip": 1.0})


@pytest.mark.parametrize("content", ["[" * 100_000, "[1, 2]", "3"], ids=len)
def test_settings_of_another_form_are_damaged(tmp_path, content):
  with RunDirectory(tmp_path, CONFIG):
    pass
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(RunDirectoryError, match=r"config\.json is damaged"):
    RunDirectory(tmp_path, CONFIG)


def test_a_lock_file_that_is_removed_by_hand_lets_nobody_in(tmp_path):
  with RunDirectory(tmp_path, {}):
    (tmp_path / "lock").unlink()
    with pytest.raises(RunDirectoryError, match="another process is writing"):
      RunDirectory(tmp_path, {})
  with RunDirectory(tmp_path, {}):
    pass


@pytest.mark.parametrize("line", ["[1, 2]", "3", '{"phase": ["a"]}', "[" * 100_000, "\udcff"], ids=len)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"phase": "a", "step": 1}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
  with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
    MetricsLog(path)


def test_sigterm_sets_the_event_and_the_handler_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with stop_on_sigterm() as stop:
    assert not stop.is_set()
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()
  assert signal.getsignal(signal.SIGTERM) is before
