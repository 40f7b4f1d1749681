"""A run that saves a thousand times ends with the descriptors, the threads and nearly the memory that it began with."""

import gc
import pathlib
import threading
import time

import jax.numpy as jnp
import pytest

from kdflax.training import Checkpoints

_SELF = pathlib.Path("/proc/self")
pytestmark = pytest.mark.skipif(not (_SELF / "fd").is_dir(), reason="counts what Linux says of a process in /proc")


def _held():
  """Open descriptors, and threads; those of earlier tests may end at any time."""
  return len(list((_SELF / "fd").iterdir())), threading.active_count()


def _assert_no_more_than(before):
  """What is let go of may take a moment: threads of an event loop end when they are next scheduled."""
  gc.collect()
  within = lambda: all(now <= then for now, then in zip(_held(), before, strict=True))
  deadline = time.monotonic() + 20
  while not within() and time.monotonic() < deadline:
    gc.collect()
    time.sleep(0.05)
  assert within(), (_held(), before)


def _resident_pages():
  return int((_SELF / "statm").read_text().split()[1])


def _save(checkpoints, steps):
  for step in steps:
    checkpoints.save(step, {"x": jnp.full(3, step)}, {"data": step})
  checkpoints.wait()


@pytest.mark.parametrize("saves", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_saving_costs_nothing_that_stays(tmp_path, saves):
  gc.collect()
  before = _held()
  with Checkpoints(tmp_path) as checkpoints:
    _save(checkpoints, range(20))
    gc.collect()
    opened, pages = _held(), _resident_pages()
    _save(checkpoints, range(20, saves))
    _assert_no_more_than(opened)
    # TensorStore's own collect_matching_metrics, which Orbax calls at each save, keeps 18 KiB; nothing else may.
    assert _resident_pages() - pages < (16 * 2**20 + 24 * 2**10 * saves) / 4096
    assert checkpoints.steps() == [saves - 2, saves - 1]
  _assert_no_more_than(before)


def test_loading_costs_nothing_that_stays(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    _save(checkpoints, range(2))
    like = {"x": jnp.zeros(3, int)}
    checkpoints.restore(like)
    gc.collect()
    opened = _held()
    for _ in range(10):
      checkpoints.restore(like)
    _assert_no_more_than(opened)
