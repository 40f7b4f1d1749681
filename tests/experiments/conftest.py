"""What the tests of experiments share: a compile cache, a stop in the middle of a run, and CIFAR-100 in small."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import common, phases
from kdflax.training import Preempted


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
  """One for all runs of a module, in this process and in others; the user's own is left alone."""
  folder = str(tmp_path_factory.mktemp("compile_cache"))
  settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
  before = {name: getattr(jax.config, name) for name in settings}
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    for name, value in settings.items():
      jax.config.update(name, value)
    yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture
def stop_after(monkeypatch):
  """`stop_after(calls)` stops the run as SIGTERM does after so many calls of the step; None never does."""
  stops, original = [], phases.Session

  def session(config, directory, log, stop):
    stops.append(stop)
    return original(config, directory, log, stop)

  def set_up(calls):
    left = [calls]

    def progress(*_):
      if left[0] is not None:
        left[0] -= 1
        if left[0] == 0:
          stops[-1].set()

    monkeypatch.setattr(phases, "Session", session)
    monkeypatch.setattr(common, "Progress", lambda *_: progress)

  return set_up


@pytest.fixture
def whole_and_stopped(tmp_path, stop_after):
  """`(main, config, calls, message) -> (directory, results, results)` of a run, and of one that is stopped and resumed.

  It stops with the message after so many calls of the step, and the logs must be the same to the last digit.
  """

  def run_both(main, config, calls, message):
    whole, parts = (dataclasses.replace(config, run=str(tmp_path / name)) for name in ("whole", "parts"))
    stop_after(None)
    main(whole)
    stop_after(calls)
    with pytest.raises(Preempted, match=message):
      main(parts)
    stop_after(None)
    main(parts)
    read = lambda file: [(tmp_path / name / file).read_text() for name in ("whole", "parts")]
    assert len(set(read("metrics.jsonl"))) == 1
    return tmp_path / "whole", *map(json.loads, read("results.json"))

  return run_both


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory):
  """A folder with `train.bin` and `test.bin` in the true format: coarse label, fine label, then the three planes."""
  folder = tmp_path_factory.mktemp("cifar100")
  random = np.random.default_rng(0)
  for name, count in (("train.bin", 48), ("test.bin", 16)):
    fine = np.arange(count, dtype=np.uint8) % 8
    pixels = random.integers(256, size=(count, 3 * 32 * 32), dtype=np.uint8)
    (folder / name).write_bytes(np.column_stack([fine // 2, fine, pixels]).tobytes())
  return folder
