"""A run directory: locked against a second writer, bound to one configuration, with a log that can be rewound."""

import collections
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdflax.files import write_atomically
from kdflax.training.trackers import Tracker

_CONFIG, _NEXT, _CHANGES = "config.json", "config-next.json", "changes.json"


class RunDirectoryError(ValueError):
  """The directory cannot be used for this run; the message says why and what to do."""


class RunDirectory:
  """Files of one run; a context manager that holds the lock.

  `config.json` says with which settings the checkpoints were made. Settings that are accepted as a change replace it
  when they have made a checkpoint, or the run ends well, and not before; `changes.json` then lists what changed, and
  the newest step of every phase until which the settings before were in force.
  """

  def __init__(self, path: str | pathlib.Path, config: Mapping[str, Any], *, accept_changes: bool = False):
    """Opens a new run, or an earlier one with the same configuration.

    Args:
      path: made if it does not exist.
      config: JSON-able settings; written to `config.json` and compared on resume.
      accept_changes: continue although the settings differ, and keep the new ones.

    Raises:
      RunDirectoryError: if another process uses the directory, it is not a run's, its settings differ (with every
        differing field) or cannot be read, or it cannot be written to.
    """
    self.path: pathlib.Path = pathlib.Path(path).absolute()
    settings = json.loads(json.dumps(config))
    if self.path.exists() and not self.path.is_dir():
      raise RunDirectoryError(f"{self.path} is a file; choose a directory for the run")
    if self.path.is_dir() and not (self.path / _CONFIG).is_file() and any(map(_is_foreign, self.path.iterdir())):
      raise RunDirectoryError(f"{self.path} holds other files and no {_CONFIG}; choose an empty or a new directory")
    self._locks = contextlib.ExitStack()
    try:
      self._lock()
      for leftover in self.path.glob(f".{_CONFIG}.*"):
        leftover.unlink()
      self._settle(clean=False)
      self._check_config(settings, accept_changes)
    except BaseException:
      self._locks.close()
      raise

  def _lock(self) -> None:
    """Locks the file `lock`, and the directory as well: a file can be removed by hand while it is locked."""
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      file = self._locks.enter_context(open(self.path / "lock", "w"))  # noqa: SIM115 (in a stack)
      directory = os.open(self.path, os.O_RDONLY)
      self._locks.callback(os.close, directory)
    except OSError as error:
      raise RunDirectoryError(f"cannot write to {self.path}: {error.strerror}; choose another directory") from error
    for handle in (file.fileno(), directory):
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise RunDirectoryError(f"another process is writing to {self.path}; wait for it or choose another") from error
      except OSError:  # a network file system that locks no directory
        if handle != directory:
          raise

  def _check_config(self, config: dict[str, Any], accept_changes: bool) -> None:
    """Writes the settings of a new run; compares those of an earlier one, and notes a change that is accepted."""
    path = self.path / _CONFIG
    try:
      before = _read_settings(path) if path.is_file() else None
    except (ValueError, RecursionError) as error:
      if not accept_changes:
        raise RunDirectoryError(
          f"{path} is damaged ({error}); restore it, or accept the change to write these settings in its place"
        ) from error
      before = None
    if before is None:
      write_atomically(path, _as_text(config))
      return
    differing = differences(_flat(before), _flat(config))
    if differing and not accept_changes:
      raise RunDirectoryError(
        f"{self.path} was written with other settings; use them, choose another directory, or accept the change:\n  "
        + "\n  ".join(f"{field}: {old!r} before, {new!r} now" for field, old, new in differing)
      )
    if differing:
      changed = {field: {"before": old, "now": new} for field, old, new in differing}
      document = {"settings": config, "change": {"steps": self._newest_steps(), "changed": changed}}
      write_atomically(self.path / _NEXT, _as_text(document))

  def _settle(self, *, clean: bool) -> None:
    """Makes an accepted change final if a checkpoint was made with it, or the run ended well; else forgets it.

    A run that was killed is settled by the next one.
    """
    pending = self.path / _NEXT
    if not pending.is_file():
      return
    try:
      document = json.loads(pending.read_text())
      settings, change = document["settings"], document["change"]
      if clean or change["steps"] != self._newest_steps():
        history = self.path / _CHANGES
        earlier = json.loads(history.read_text()) if history.is_file() else []
        if change not in earlier:  # a run may have been killed between these two writes
          write_atomically(history, _as_text([*earlier, change]))
        write_atomically(self.path / _CONFIG, _as_text(settings))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
      raise RunDirectoryError(
        f"{self.path} was being changed, and {_NEXT} or {_CHANGES} is damaged ({error}); delete both, and accept the"
        " change again"
      ) from error
    pending.unlink()

  def _newest_steps(self) -> dict[str, int]:
    """The step of the newest checkpoint of every phase, by its folder."""
    steps: dict[str, int] = {}
    for file in self.path.rglob("_CHECKPOINT_METADATA"):
      if file.parent.name.isdigit():
        phase = file.parent.parent.relative_to(self.path).as_posix()
        steps[phase] = max(steps.get(phase, 0), int(file.parent.name))
    return dict(sorted(steps.items()))

  def __enter__(self) -> "RunDirectory":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    try:
      self._settle(clean=kind is None)
    finally:
      self._locks.close()


class MetricsLog:
  """`metrics.jsonl`: one JSON object a line, on disk before a checkpoint that counts on it; a context manager.

  Rows are counted by their `phase`, so that one which starts again leaves those of the others alone.
  """

  def __init__(self, path: str | pathlib.Path, trackers: Sequence[Tracker] = ()):
    """Opens the file; a last line that was not finished belongs to no checkpoint, and is dropped.

    Args:
      path: the file.
      trackers: are given each row as well, and closed with the log.
    """
    self._path = pathlib.Path(path)
    self._trackers = tuple(trackers)
    self._complete: dict[str, int] = {}  # rows of the trainings of a phase that have come to their end
    self._keep(lambda phase: True)

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row."""
    self._file.write(json.dumps(row).encode() + b"\n")
    phase = row.get("phase", "")
    self._rows[phase] = self._rows.get(phase, 0) + 1
    for tracker in self._trackers:
      tracker(row)

  def rows(self, phase: str) -> int:
    """Puts all rows on disk and returns how many are of a phase."""
    self._file.flush()
    os.fsync(self._file.fileno())
    return self._rows.get(phase, 0)

  def passed(self, phase: str, rows: int) -> None:
    """Notes that so many rows of a phase belong to a training that is complete."""
    self._complete[phase] = rows

  def rewind(self, phase: str, rows: int | None = None) -> None:
    """Drops the rows of a phase after the first ones, or after those of complete trainings: they will be made again.

    Raises:
      ValueError: if some of the first ones are gone.
    """
    rows = self._complete.get(phase, 0) if rows is None else rows
    if rows > (found := self.rows(phase)):
      raise ValueError(
        f"{self._path} has {found} rows of {phase!r}, a checkpoint counts on {rows}; rows are lost, so put the file"
        " back or delete the checkpoints of this phase"
      )
    if rows < found:
      self._file.close()
      first = itertools.count()
      self._keep(lambda name: name != phase or next(first) < rows)

  def _keep(self, wanted: Callable[[str], bool]) -> None:
    """Writes the file again, with the rows of the phases that are wanted, and opens it."""
    before = self._path.read_bytes() if self._path.exists() else b""
    lines = [line for line in before.splitlines(keepends=True) if line.endswith(b"\n")]
    try:
      phases = [_phase_of(line) for line in lines]
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{self._path} is damaged ({error}); put it back, or delete it and the checkpoints") from error
    kept = [(line, phase) for line, phase in zip(lines, phases, strict=True) if wanted(phase)]
    content = b"".join(line for line, _ in kept)
    if content != before or not self._path.exists():
      write_atomically(self._path, content)
    self._rows = dict(collections.Counter(phase for _, phase in kept))
    self._file = open(self._path, "ab")  # noqa: SIM115 (closed by close)

  def close(self) -> None:
    """Closes the file and the trackers."""
    self._file.close()
    for tracker in self._trackers:
      tracker.close()

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
  """Returns (name, value before, value now) of what differs, by name; what is missing has the value "absent"."""
  names = sorted(before.keys() | now.keys())
  both = [(name, before.get(name, "absent"), now.get(name, "absent")) for name in names]
  return [
    (name, old, new) for name, old, new in both if old != new and json.dumps(old) != json.dumps(new)
  ]  # NaN != NaN


def _is_foreign(path: pathlib.Path) -> bool:
  """Whether a file is none of those that a run makes before its settings are written."""
  return path.name != "lock" and not path.name.startswith(f".{_CONFIG}.")


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
  settings = json.loads(path.read_text())
  if not isinstance(settings, dict):
    raise ValueError(f"it holds a {type(settings).__name__} where settings by name are expected")
  return settings


def _phase_of(line: bytes) -> str:
  """The phase of a row of the log."""
  row = json.loads(line)
  if not isinstance(row, dict) or not isinstance(row.get("phase", ""), str):
    raise ValueError(f"{line[:50]!r} is no row of numbers by name, with its phase as text")
  return row.get("phase", "")


def _as_text(document: Any) -> str:
  return json.dumps(document, indent=2) + "\n"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
