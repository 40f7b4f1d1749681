"""A run directory: locked against a second writer, bound to one configuration, with a log that can be rewound."""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

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
  """`metrics.jsonl`: one JSON object a line, on disk before a checkpoint that counts on it; a context manager."""

  def __init__(self, path: str | pathlib.Path):
    self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
    self._mark = 0

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row."""
    self._file.write(json.dumps(row).encode() + b"\n")

  def offset(self) -> int:
    """Puts all rows on disk and returns the length of the file in bytes."""
    self._file.flush()
    os.fsync(self._file.fileno())
    return self._file.tell()

  def passed(self, offset: int) -> None:
    """Notes that rows up to here belong to a phase that is complete."""
    self._mark = offset

  def rewind(self, offset: int | None = None) -> None:
    """Drops the rows after an offset, or after the last complete phase: their steps will be done again.

    Raises:
      ValueError: if rows before the offset are gone.
    """
    self._file.flush()
    offset, size = self._mark if offset is None else offset, os.fstat(self._file.fileno()).st_size
    if offset > size:
      raise ValueError(
        f"{self._file.name} has {size} bytes, a checkpoint counts on {offset}; rows are lost, so put the file back or"
        " delete the checkpoints of this phase"
      )
    self._file.truncate(offset)
    self._file.seek(0, os.SEEK_END)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file so that readers see the old content or the new, never a part."""
  data = content.encode() if isinstance(content, str) else content
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


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
