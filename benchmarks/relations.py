"""Relational and memory-based losses against PyTorch, forward plus backward: `python -m benchmarks.relations`.

Float32, gradient to the student only. Peak extra memory: for kdflax the temporary buffers that XLA plans for the
compiled step; for PyTorch the growth of the process's peak resident memory, measured in a process of its own, or on a
GPU that of its allocator. `crd` is measured with donated memories of several sizes. `--quick` only shows that the
script runs.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kdflax import losses

try:
  import torch
except ModuleNotFoundError:
  torch = None
try:
  from torchdistill.losses import mid_level
except ImportError:
  mid_level = None

NOTES = " ".join(__doc__.split("\n\n")[1].split())
NAMES = ("rkd_angle", "rkd_distance", "similarity_preserving", "pkt", "correlation_congruence")


def features(batch, width):
  x = np.random.default_rng(0).normal(size=(2, batch, width))
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def torch_loss(name):
  """torchdistill's loss as a function of (student, teacher)."""
  if name.startswith("rkd"):
    rkd = mid_level.RKDLoss("m", "m", 1.0, 1.0, "mean")
    method = rkd.compute_rkd_angle_loss if name == "rkd_angle" else rkd.compute_rkd_distance_loss
    return lambda student, teacher: method(teacher, student)
  if name == "pkt":
    module = mid_level.PKTLoss("m", "output", "m", "output")
  elif name == "similarity_preserving":
    module = mid_level.SPKDLoss("m", "m", "batchmean")
  else:
    module = mid_level.CCKDLoss("m", "m", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "batchmean")
  return lambda student, teacher: module({"m": {"output": student}}, {"m": {"output": teacher}})


def torch_step(name, batch, width):
  student, teacher = (harness.tensor(x) for x in features(batch, width))
  student.requires_grad_()
  loss = torch_loss(name)

  def step():
    student.grad = None
    loss(student, teacher).backward()

  return step


def kdflax_step(name, batch, width):
  """(step, MB of temporary buffers)."""
  loss = getattr(losses, name)
  student, teacher = (jnp.asarray(x) for x in features(batch, width))
  value_and_grad = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).mean()))
  compiled = value_and_grad.lower(student, teacher).compile()
  extra = compiled.memory_analysis().temp_size_in_bytes / 2**20
  return lambda: jax.block_until_ready(compiled(student, teacher)), extra


def measure(name, batch, width, repeats, peers):
  step, extra = kdflax_step(name, batch, width)
  functions = {"kdflax": step}
  if peers:
    functions["torchdistill"] = torch_step(name, batch, width)
  timed = harness.time_interleaved(functions, repeats=repeats if batch <= 512 else 2, warmup=1 if batch > 512 else 2)
  times = {key: median for key, (median, _, _) in timed.items()}
  row = {"loss": name, "batch": batch, "width": width, "kdflax (ms)": times["kdflax"], "kdflax extra (MB)": extra}
  if peers:
    peak = harness.peak_of_a_step(torch_step, (name, batch, width), (name, 4, 4))
    row |= {"torchdistill (ms)": times["torchdistill"], "times faster": times["torchdistill"] / times["kdflax"]}
    row |= {"torchdistill extra (MB)": peak, "times lighter": peak / extra}
  return row


def measure_crd(examples, repeats, batch=64, negatives=4096, width=128):
  """One step on a donated memory of `examples` rows; the memory is handed on from step to step."""
  rng = np.random.default_rng(0)
  student, teacher = (jnp.asarray(x) for x in features(batch, width))
  indices = jnp.asarray(rng.integers(examples, size=(batch, 1 + negatives)), jnp.int32)

  def step(student, teacher, indices, memory):
    def mean(student):
      values, after = losses.crd(student, teacher, indices, memory)
      return values.mean(), after

    return jax.value_and_grad(mean, has_aux=True)(student)

  memory = losses.crd_memory(jax.random.key(0), examples, width)
  compiled = jax.jit(step, donate_argnums=3).lower(student, teacher, indices, memory).compile()
  carried = [memory]

  def call():
    (_, carried[0]), _ = jax.block_until_ready(compiled(student, teacher, indices, carried[0]))

  time, _, _ = harness.time_interleaved({"kdflax": call}, repeats=repeats)["kdflax"]
  extra = compiled.memory_analysis().temp_size_in_bytes / 2**20
  row = {"loss": f"crd, {examples:,} rows", "batch": batch, "width": width}
  return row | {"kdflax (ms)": time, "kdflax extra (MB)": extra}


def plot(rows, path):
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
  for axis, (varied, fixed) in zip(axes, (("batch", "width"), ("width", "batch")), strict=True):
    for label in ("kdflax", "torchdistill"):
      key = f"{label} (ms)"
      points = sorted((r[varied], r[key]) for r in rows if r["sweep"] == varied and key in r)
      if points:
        axis.loglog(*zip(*points, strict=True), marker="o", label=label)
    value = next(r[fixed] for r in rows if r["sweep"] == varied)
    axis.set(xlabel=varied, title=f"rkd_angle, {fixed} {value}")
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("forward + backward (ms)")
  axes[0].legend()
  figure.tight_layout()
  figure.savefig(path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
  parser.add_argument("--largest-peer", type=int, default=512, help="largest batch at which the peer's angles fit")
  arguments = parser.parse_args()
  size, largest, memories = (16, 32, (100, 1000)) if arguments.quick else (512, 2048, (10_000, 100_000, 1_000_000))
  machine = harness.environment("torch", "torchdistill")
  peers = torch is not None and mid_level is not None

  # First, in a heap that no large batch has been in; after one, malloc gives memory back at every step.
  contrastive = [measure_crd(n, arguments.repeats, negatives=64 if arguments.quick else 4096) for n in memories]
  rows = [measure(name, size, size, arguments.repeats, peers) for name in NAMES]
  sweep = []
  for batch in (size // 4, size // 2, size, size * 2, largest):
    row = measure("rkd_angle", batch, size, arguments.repeats, peers and batch <= arguments.largest_peer)
    sweep.append(row | {"sweep": "batch"})
    print(row, flush=True)
  for width in (size // 4, size, size * 4):
    row = measure("rkd_angle", size // 2, width, arguments.repeats, peers)
    sweep.append(row | {"sweep": "width"})
  rows += [{key: value for key, value in row.items() if key != "sweep"} for row in sweep]
  rows += contrastive
  name = "relations_quick" if arguments.quick else "relations"
  harness.report(name, "Relational and contrastive losses", rows, machine, NOTES)
  plot(sweep, harness.RESULTS / f"{name}{harness.suffix()}.svg")


if __name__ == "__main__":
  main()
