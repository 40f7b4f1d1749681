"""A run directory: locked against a second writer, bound to one configuration, with a log that can be rewound."""

import collections
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kdflax.files import write_atomically

PREEMPTED = 75  # exit code of a run that was told to stop and can continue: EX_TEMPFAIL of sysexits.h
_CONFIG = "config.json"


class RunDirectoryError(ValueError):
  """The directory cannot be used for this run; the message says why and what to do."""


class Preempted(Exception):
  """SIGTERM arrived and the state was saved."""


class RunDirectory:
  """Files of one run; a context manager that holds the lock."""

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
    self.path = pathlib.Path(path).absolute()
    settings = json.loads(json.dumps(config))
    if self.path.exists() and not self.path.is_dir():
      raise RunDirectoryError(f"{self.path} is a file; choose a directory for the run")
    if self.path.is_dir() and not (self.path / _CONFIG).is_file() and any(map(_is_foreign, self.path.iterdir())):
      raise RunDirectoryError(f"{self.path} holds other files and no {_CONFIG}; choose an empty or a new directory")
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.path / "lock", "w")  # noqa: SIM115 (held until the run ends)
    except OSError as error:
      raise RunDirectoryError(f"cannot write to {self.path}: {error.strerror}; choose another directory") from error
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      self._lock.close()
      raise RunDirectoryError(f"another process is writing to {self.path}; wait for it or choose another") from error
    try:
      for leftover in self.path.glob(f".{_CONFIG}.*"):
        leftover.unlink()
      self._check_config(settings, accept_changes)
      write_atomically(self.path / _CONFIG, json.dumps(settings, indent=2) + "\n")
    except BaseException:
      self._lock.close()
      raise

  def _check_config(self, config: dict[str, Any], accept_changes: bool) -> None:
    path = self.path / _CONFIG
    if not path.is_file() or accept_changes:
      return
    try:
      before, now = _flat(json.loads(path.read_text())), _flat(config)
    except ValueError as error:
      raise RunDirectoryError(
        f"{path} is damaged ({error}); restore it, or accept the change to write these settings in its place"
      ) from error
    differing = [f"{field}: {old!r} before, {new!r} now" for field, old, new in differences(before, now)]
    if differing:
      raise RunDirectoryError(
        f"{self.path} was written with other settings; use them, choose another directory, or accept the change:\n  "
        + "\n  ".join(differing)
      )

  def __enter__(self) -> "RunDirectory":
    return self

  def __exit__(self, *_: Any) -> None:
    self._lock.close()


class MetricsLog:
  """`metrics.jsonl`: one JSON object a line, on disk before a checkpoint that counts on it; a context manager.

  Rows are counted by their `phase`, so that one which starts again leaves those of the others alone.
  """

  def __init__(self, path: str | pathlib.Path):
    """Opens the file; a last line that was not finished belongs to no checkpoint, and is dropped."""
    self._path = pathlib.Path(path)
    self._complete: dict[str, int] = {}  # rows of the trainings of a phase that have come to their end
    self._keep(lambda phase: True)

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row."""
    self._file.write(json.dumps(row).encode() + b"\n")
    phase = row.get("phase", "")
    self._rows[phase] = self._rows.get(phase, 0) + 1

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
      phases = [json.loads(line).get("phase", "") for line in lines]
    except ValueError as error:
      raise ValueError(f"{self._path} is damaged ({error}); put it back, or delete it and the checkpoints") from error
    kept = [(line, phase) for line, phase in zip(lines, phases, strict=True) if wanted(phase)]
    content = b"".join(line for line, _ in kept)
    if content != before or not self._path.exists():
      write_atomically(self._path, content)
    self._rows = dict(collections.Counter(phase for _, phase in kept))
    self._file = open(self._path, "ab")  # noqa: SIM115 (closed by close)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
  """Turns SIGTERM into an event that a training loop looks at between steps."""
  stop = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
  try:
    yield stop
  finally:
    signal.signal(signal.SIGTERM, before)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
  """Returns (name, value before, value now) of what differs, by name; what is missing has the value "absent"."""
  names = sorted(before.keys() | now.keys())
  return [(n, before.get(n, "absent"), now.get(n, "absent")) for n in names if before.get(n) != now.get(n)]


def _is_foreign(path: pathlib.Path) -> bool:
  """Whether a file is none of those that a run makes before its settings are written."""
  return path.name != "lock" and not path.name.startswith(f".{_CONFIG}.")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
