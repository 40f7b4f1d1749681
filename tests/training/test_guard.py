"""A script under the guard ends in one line and with an exit code that says what to do."""

import errno
import os
import signal
import subprocess
import sys

import jax
import pytest

from kdflax import training
from kdflax.training import ExitCode


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """Leaves JAX's own settings as they are."""
  settings = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": None}
  before = {name: getattr(jax.config, name) for name in settings}
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "from the environment"))
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


def test_codes_are_those_of_sysexits_and_say_what_they_mean():
  assert training.PREEMPTED == 75 == os.EX_TEMPFAIL
  assert ExitCode.DISK_FULL == os.EX_IOERR and ExitCode.DIVERGED == os.EX_SOFTWARE and ExitCode.BAD_INPUT == 2
  assert "the same command continues" in type(training.PREEMPTED).__doc__  # what help() shows of it


@pytest.mark.parametrize(
  ("error", "code", "line"),
  [
    (training.Preempted("a stopped at step 3 of 7"), 75, "stopped: a stopped at step 3 of 7"),
    (training.Diverged("a diverged"), 70, "error: a diverged"),
    (training.DiskFull("the disk is full"), 74, "error: the disk is full"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 74, "error: [Errno 28] No space left on device"),
    (ValueError("x must be positive; got -1"), 2, "error: x must be positive; got -1"),
    (OSError("no such file"), 2, "error: no such file"),
    (KeyboardInterrupt(), 130, "interrupted: nothing was saved since the last checkpoint"),
  ],
)
def test_every_ending_has_one_line_and_a_code(capsys, error, code, line):
  with pytest.raises(SystemExit) as caught, training.main_guard(compile_cache=None):
    raise error
  assert caught.value.code == code and capsys.readouterr().err == line + "\n"


def test_a_bug_keeps_its_traceback_and_all_do_where_asked(monkeypatch):
  with pytest.raises(TypeError), training.main_guard(compile_cache=None):
    raise TypeError("a bug")
  monkeypatch.setenv("KDFLAX_TRACEBACK", "1")
  with pytest.raises(ValueError, match="where"), training.main_guard(compile_cache=None):
    raise ValueError("where")


def test_compiled_programs_are_kept_where_the_environment_says_or_the_script(cache, monkeypatch):
  with training.main_guard():
    assert jax.config.jax_compilation_cache_dir == str(cache / "from the environment")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  with training.main_guard(compile_cache=cache / "own"):
    assert jax.config.jax_compilation_cache_dir == str(cache / "own")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_event_and_the_handler_comes_back(number, capfd):
  before = signal.getsignal(number)
  with training.main_guard(compile_cache=None) as stop:
    assert not stop.is_set()
    signal.raise_signal(number)
    assert stop.is_set()
  assert signal.getsignal(number) is before
  assert capfd.readouterr().err.count("Ctrl-C again ends at once") == (number == signal.SIGINT)


def test_a_second_interrupt_ends_at_once():
  script = (
    "import signal; from kdflax.training.guard import stop_on_signals\n"
    "with stop_on_signals():\n"
    "  signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGTERM); print('one', flush=True)\n"
    "  signal.raise_signal(signal.SIGINT); print('two', flush=True); signal.raise_signal(signal.SIGINT); print('three')"
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert done.returncode == -signal.SIGINT and done.stdout == "one\ntwo\n"
