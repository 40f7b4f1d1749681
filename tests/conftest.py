"""Eight CPU devices, or what JAX_PLATFORMS names, and programs compiled quickly rather than well, and each only once.

To be said before jax is imported, and before it starts its backend.
"""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Many tests lead to the same program, and so does a second run. A cache for each worker: jax does not write atomically.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax" / _WORKER)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402

from experiments.quick import compile_quickly  # noqa: E402

compile_quickly()  # most of the time of these tests is compilation: each program runs once, on a handful of numbers


def pytest_runtest_setup():
  """What a full collection of garbage has left, which is jax's caches of programs, is looked at by no later one.

  They grow to millions of objects, through which each collection went for seconds. Before the programs take all the
  mappings of memory that Linux admits to a process (65,530 by default; XLA then crashes), they are let go of: those
  that are wanted again come from the cache on disk.
  """
  global _collections, _tests
  _tests += 1
  if _tests % 50 == 0 and _mappings() > 25_000:
    jax.clear_caches()
    gc.unfreeze()
    gc.collect()
  if _collections != (_collections := gc.get_stats()[2]["collections"]):
    gc.freeze()


def _mappings():
  try:
    return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
  except OSError:  # another system, with limits of its own
    return 0


_tests = 0
_collections = 0
