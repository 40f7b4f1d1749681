"""How a training script ends: by a signal, with one line for a mistake, and with an exit code that says which."""

import contextlib
import enum
import errno
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from kdflax.files import DiskFull
from kdflax.training.finite import Diverged


class ExitCode(enum.IntEnum):
  """Exit codes of a script under `main_guard`, for the shell or scheduler that started it; 0 is a run that is complete.

  Attributes:
    BAD_INPUT: 2. A setting, a file or an argument was refused; nothing is helped by trying again.
    DIVERGED: 70. The training is no longer finite (EX_SOFTWARE of sysexits.h); the checkpoints are from before.
    DISK_FULL: 74. There was no room to write (EX_IOERR); with room, the same command continues.
    PREEMPTED: 75. SIGTERM or Ctrl-C arrived and the state was saved (EX_TEMPFAIL): the same command continues.
    INTERRUPTED: 130. Ctrl-C where nothing could be saved, or a second time.
  """

  BAD_INPUT = 2
  DIVERGED = 70
  DISK_FULL = 74
  PREEMPTED = 75
  INTERRUPTED = 130


PREEMPTED = ExitCode.PREEMPTED


class Preempted(Exception):
  """SIGTERM or Ctrl-C arrived and the state was saved."""


@contextlib.contextmanager
def main_guard(*, compile_cache: str | pathlib.Path | None = "~/.cache/kdflax") -> Iterator[threading.Event]:
  """Runs a training script so that it ends as a job should: give `fit` the event that it yields.

      with training.main_guard() as stop:
        training.fit(..., stop=stop)

  SIGTERM and a first Ctrl-C set the event, a second Ctrl-C ends the process at once. `Preempted`, a full disk,
  `Diverged`, and mistakes (ValueError, OSError) end in one line and an `ExitCode`; any other exception is a bug and
  keeps its traceback. With `KDFLAX_TRACEBACK=1` in the environment all keep theirs.

  Args:
    compile_cache: folder in which JAX keeps compiled programs for the next run, unless `JAX_COMPILATION_CACHE_DIR`
      names one; None for none.
  """
  if compile_cache is not None:
    use_compile_cache(compile_cache)
  try:
    with stop_on_signals() as stop:
      yield stop
  except (Preempted, Diverged, KeyboardInterrupt, ValueError, OSError) as error:
    if os.environ.get("KDFLAX_TRACEBACK"):
      raise
    code, line = _ending(error)
    print(line, file=sys.stderr)
    sys.exit(code)


def use_compile_cache(folder: str | pathlib.Path = "~/.cache/kdflax") -> None:
  """Lets JAX keep compiled programs on disk for the next run, in the folder that the environment names or this one."""
  path = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(folder).expanduser()))
  jax.config.update("jax_compilation_cache_dir", path)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
  """Turns SIGTERM and Ctrl-C into an event that a training loop looks at between steps; Ctrl-C again ends at once."""
  stop, asked = threading.Event(), threading.Event()

  def interrupted(*_: Any) -> None:
    if asked.is_set():
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      signal.raise_signal(signal.SIGINT)  # checkpoints and files are whole at every moment
    asked.set()
    stop.set()
    os.write(2, b"stopping after the step under way; Ctrl-C again ends at once\n")  # print is not safe in a handler

  handlers = {signal.SIGTERM: lambda *_: stop.set(), signal.SIGINT: interrupted}
  before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


stop_on_sigterm = stop_on_signals  # the old name, for one release


def _ending(error: BaseException) -> tuple[ExitCode, str]:
  """The exit code and the line of what ended a script."""
  if isinstance(error, Preempted):
    return ExitCode.PREEMPTED, f"stopped: {error}"
  if isinstance(error, KeyboardInterrupt):
    return ExitCode.INTERRUPTED, "interrupted: nothing was saved since the last checkpoint"
  if isinstance(error, DiskFull) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
    return ExitCode.DISK_FULL, f"error: {error}"
  notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()) if "JAX" not in note)
  return ExitCode.DIVERGED if isinstance(error, Diverged) else ExitCode.BAD_INPUT, f"error: {error}{notes}"
