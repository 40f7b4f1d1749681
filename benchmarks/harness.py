"""Timing and reporting that the benchmarks share: interleaved repeats, medians, the machine, a Markdown table.

Both sides run on jax's default device: on a GPU PyTorch does too, and the results are files of their own, named after
the card.
"""

import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

try:
  import torch
except ModuleNotFoundError:
  torch = None

RESULTS = pathlib.Path(__file__).parent / "results"


def tensor(array, **options):
  """A new tensor of PyTorch on the device that jax uses; PyTorch for CPUs has nothing to compare a GPU with."""
  return torch.tensor(array, device=_torch_device(), **options)


def _torch_device() -> str:
  return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _finish() -> None:
  """Waits for what PyTorch has queued on a GPU."""
  if torch is not None and _torch_device() == "cuda":
    torch.cuda.synchronize()


def time_interleaved(functions: Mapping[str, Callable[[], Any]], *, repeats: int = 15, warmup: int = 2):
  """Time functions in turns of random order, so that a slow moment of the machine falls on all of them.

  Short calls come in bursts as in a training loop. The first 0.1 s of a burst are not timed: threads that the library
  before left spinning take a core, and a library's own threads have to wake up.

  Args:
    functions: by name; each call of jax must block until its result is there, those of PyTorch are waited for.
    repeats: timed rounds, every function once a round, or four times if its calls are short.
    warmup: untimed calls of each first, which also compile.

  Returns:
    `{name: (median, lower quartile, upper quartile)}` in milliseconds.
  """
  short = {}
  for name, function in functions.items():
    for _ in range(warmup):
      start = time.perf_counter()
      function()
      _finish()
      short[name] = time.perf_counter() - start < 0.2
  times: dict[str, list[float]] = {name: [] for name in functions}
  gc.collect()
  gc.disable()
  try:
    order = random.Random(0)
    for _ in range(repeats):
      for name, function in order.sample(list(functions.items()), len(functions)):
        start = time.perf_counter()
        while short[name] and time.perf_counter() - start < 0.1:
          function()
        _finish()
        for _ in range(4 if short[name] else 1):
          start = time.perf_counter()
          function()
          _finish()
          times[name].append(1e3 * (time.perf_counter() - start))
  finally:
    gc.enable()
  return {name: _quartiles(values) for name, values in times.items()}


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
  if len(values) < 2:
    return values[0], values[0], values[0]
  lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
  return median, lower, upper


def extra_memory(compiled) -> float:
  """MB that a compiled program of jax needs at once beyond its arguments: temporary buffers, and results of its own."""
  memory = compiled.memory_analysis()
  return (memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**20


def peak_of_a_step(make: Callable[..., Callable[[], Any]], arguments: tuple, small: tuple) -> float:
  """MB that one call of `make(*arguments)`, of PyTorch, needs beyond what there is before it; NaN if it dies.

  On a CPU that is by how much it raises the peak of a fresh process, where `make(*small)` is called first, for what a
  library allocates once.
  """
  if _torch_device() == "cuda":
    step = make(*arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  process = context.Process(target=_peak_of_a_step, args=(make, arguments, small, queue))
  process.start()
  process.join()
  return queue.get() if process.exitcode == 0 else float("nan")


def _peak_of_a_step(make, arguments, small, queue):
  make(*small)()
  step = make(*arguments)
  ctypes.CDLL(None).malloc_trim(0)  # what is free already is not free to use
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # from here on Linux looks for the peak anew
  before = _peak()
  step()
  queue.put(_peak() - before)


def _peak() -> float:
  """MB of memory that this process has had at most; `ru_maxrss` would start with that of the process that made it."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0]) / 1024


def environment(*packages: str) -> dict[str, Any]:
  """Versions of the packages that are installed, and the machine with its load at this moment."""
  versions = {}
  for package in ("jax", "jaxlib", "numpy", *packages):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = "not installed"
  return {
    "versions": versions,
    "python": platform.python_version(),
    "processor": _processor(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "load": [round(load, 2) for load in os.getloadavg()],
  }


def _processor() -> str:
  """The card's name, or the CPU's with what tells it apart: a virtual machine's name says little."""
  if jax.default_backend() != "cpu":
    return jax.devices()[0].device_kind
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
  facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
  if "model name" not in facts:
    return platform.processor() or platform.machine()
  vectors = next((name for name in ("avx512f", "avx2", "avx") if name in facts.get("flags", "").split()), "no AVX")
  return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')}, {vectors})"


def suffix() -> str:
  """What the names of the results of this device end with: nothing on a CPU, `_H100` on an NVIDIA H100."""
  return "" if jax.default_backend() == "cpu" else f"_{jax.devices()[0].device_kind.removeprefix('NVIDIA ').split()[0]}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows of one table; the columns are the keys of the first row, floats get three significant digits."""
  columns = list(rows[0])
  show = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
  lines = [columns, ["---"] * len(columns), *([show(row.get(column, "")) for column in columns] for row in rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(
  name: str, title: str, rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], notes: str = ""
) -> None:
  """Print the table and write `results/NAME.md` and `results/NAME.json`, on a GPU `results/NAME_H100.md`."""
  versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
  where = f"{machine['processor']}, {machine['cores']} cores, load {machine['load'][0]} at the start; {versions}."
  text = "\n\n".join(part for part in (f"# {title}", notes, markdown_table(rows), where) if part) + "\n"
  print(text)
  RESULTS.mkdir(exist_ok=True)
  name = f"{name}{suffix()}"
  (RESULTS / f"{name}.md").write_text(text)
  (RESULTS / f"{name}.json").write_text(json.dumps({"rows": list(rows), "environment": dict(machine)}, indent=2) + "\n")
