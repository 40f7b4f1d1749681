"""Relational and memory-based losses against PyTorch, forward plus backward: `python -m benchmarks.relations`.

Float32, gradient to the student only. PyTorch is torchdistill, for `info_nce` and `crd` the formula as training scripts
usually write it. Extra memory is what a step needs at once beyond its inputs, its gradient included: of kdflax as the
compiler plans it, of PyTorch the growth of the peak resident memory of a process of its own, or on a GPU of its
allocator's. `crd` is measured with memories of several sizes, which a step changes in place. `--quick` only shows that
the script runs.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kdflax import losses

try:
  import torch
  import torch.nn.functional as F
except ModuleNotFoundError:
  torch = None
try:
  from torchdistill.losses import mid_level
except ImportError:
  mid_level = None

NOTES = " ".join(__doc__.split("\n\n")[1].split())
NAMES = ("rkd_angle", "rkd_distance", "similarity_preserving", "pkt", "correlation_congruence", "info_nce")
T = 0.07


def features(batch, width):
  x = np.random.default_rng(0).normal(size=(2, batch, width))
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def torch_loss(name):
  """PyTorch's loss as a function of (student, teacher)."""
  if name == "info_nce":
    unit = lambda x: F.normalize(x, dim=1)
    return lambda student, teacher: F.cross_entropy(
      unit(student) @ unit(teacher).T / T, torch.arange(len(student), device=student.device)
    )
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
  """(step, MB of extra memory)."""
  loss = getattr(losses, name)
  student, teacher = (jnp.asarray(x) for x in features(batch, width))
  value_and_grad = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).mean()))
  compiled = value_and_grad.lower(student, teacher).compile()
  return lambda: jax.block_until_ready(compiled(student, teacher)), harness.extra_memory(compiled)


def measure(name, batch, width, repeats, peers):
  step, extra = kdflax_step(name, batch, width)
  torch_at = (torch_step, (name, batch, width), (name, 4, 4)) if peers else None
  slow = batch > 512
  return compare(
    {"loss": name, "batch": batch, "width": width}, step, extra, torch_at, 2 if slow else repeats, 2 - slow
  )


def compare(row, step, extra, torch_at, repeats, warmup=2):
  """Adds to a row the time and memory of a step, and of PyTorch's, `(make, arguments, small arguments)`, if given."""
  functions = {"kdflax": step}
  if torch_at:
    make, arguments, _ = torch_at
    functions["torch"] = make(*arguments)
  timed = harness.time_interleaved(functions, repeats=repeats, warmup=warmup)
  times = {key: median for key, (median, _, _) in timed.items()}
  row |= {"kdflax (ms)": times["kdflax"], "kdflax extra (MB)": extra}
  if torch_at:
    peak = harness.peak_of_a_step(*torch_at)
    row |= {"torch (ms)": times["torch"], "times faster": times["torch"] / times["kdflax"]}
    row |= {"torch extra (MB)": peak, "times lighter": peak / extra}
  return row


def crd_inputs(examples, batch, negatives, width):
  indices = np.random.default_rng(0).integers(examples, size=(batch, 1 + negatives))
  return *features(batch, width), indices


def torch_crd_step(examples, batch, negatives, width):
  """CRD with two banks of PyTorch, which the step reads, and changes in place after the gradient."""
  student, teacher, indices = (harness.tensor(x) for x in crd_inputs(examples, batch, negatives, width))
  student.requires_grad_()
  banks = [F.normalize(torch.randn(examples, width, device=student.device), dim=1) for _ in range(2)]
  norms: list = [None, None]
  noise = negatives / examples

  def nce(anchors, side):
    rows = banks[1 - side].index_select(0, indices.flatten()).view(batch, 1 + negatives, width)
    scores = torch.exp(torch.bmm(rows, anchors.unsqueeze(2)).squeeze(2) / T)
    if norms[side] is None:
      norms[side] = scores.detach().mean() * examples
    scores = scores / norms[side]
    own = torch.log(scores[:, 0] / (scores[:, 0] + noise + 1e-7))
    others = torch.log(noise / (scores[:, 1:] + noise + 1e-7))
    return -(own.sum() + others.sum()) / batch

  def step():
    student.grad = None
    (nce(student, 0) + nce(teacher, 1)).backward()
    with torch.no_grad():
      for bank, embeddings in zip(banks, (student, teacher), strict=True):
        moved = 0.5 * bank.index_select(0, indices[:, 0]) + 0.5 * embeddings
        bank.index_copy_(0, indices[:, 0], F.normalize(moved, dim=1))

  return step


def measure_crd(examples, repeats, peers, batch=64, negatives=4096, width=128):
  """One step on a donated memory of `examples` rows; the memory is handed on from step to step."""
  sizes = batch, negatives, width
  student, teacher, indices = (jnp.asarray(x) for x in crd_inputs(examples, *sizes))

  def step(student, teacher, indices, memory):
    def mean(student):
      values, after = losses.crd(student, teacher, indices, memory, temperature=T)
      return values.mean(), after

    return jax.value_and_grad(mean, has_aux=True)(student)

  memory = losses.crd_memory(jax.random.key(0), examples, width)
  compiled = jax.jit(step, donate_argnums=3).lower(student, teacher, indices, memory).compile()
  carried = [memory]

  def call():
    (_, carried[0]), _ = jax.block_until_ready(compiled(student, teacher, indices, carried[0]))

  row = {"loss": f"crd, {examples:,} rows", "batch": batch, "width": width}
  torch_at = (torch_crd_step, (examples, *sizes), (100, *sizes)) if peers else None
  return compare(row, call, harness.extra_memory(compiled), torch_at, repeats)


def plot(rows, path):
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
  for axis, (varied, fixed) in zip(axes, (("batch", "width"), ("width", "batch")), strict=True):
    for label, title in (("kdflax", "kdflax"), ("torch", "torchdistill")):
      key = f"{label} (ms)"
      points = sorted((r[varied], r[key]) for r in rows if r["sweep"] == varied and key in r)
      if points:
        axis.loglog(*zip(*points, strict=True), marker="o", label=title)
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
  negatives = 64 if arguments.quick else 4096
  contrastive = [measure_crd(n, arguments.repeats, torch is not None, negatives=negatives) for n in memories]
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
