"""Weighting solves and per-task gradients against TorchJD, on one thread.

    python -m benchmarks.balancing              writes benchmarks/results/balancing_*.md
    python -m benchmarks.balancing --smoke      one repeat of the small sizes, for a look

TorchJD's solvers are optional (quadprog and qpsolvers, cvxpy with Clarabel and ECOS). Where one is not installed,
only the time of kdflax is shown.
"""

import os

# One thread for both; before the backends start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import environment, extra_memory, peak_of_a_step, report, tensor, time_interleaved
from kdflax import balancing

jax.config.update("jax_cpu_enable_async_dispatch", False)  # else a call of microseconds waits for a second thread
WIDTHS = (256, 512, 512, 1)
BATCH = 128


def gradients(num_tasks: int) -> np.ndarray:
  """Random gradients of which half conflict with the other half."""
  generator = np.random.default_rng(num_tasks)
  rows = generator.normal(size=(num_tasks, 2 * num_tasks + 10))
  return rows + np.where(np.arange(num_tasks) % 2, 0.3, -0.3)[:, None] * generator.normal(size=rows.shape[1])


def torch_weighting(name: str) -> Callable[..., Any] | None:
  """The peer's weighting of a Gramian, None where its solver is not installed."""
  from torchjd import aggregation

  make = {
    "upgrad": aggregation.UPGradWeighting,
    "dual_projection": aggregation.DualProjWeighting,
    "mgda": aggregation.MGDAWeighting,
    "cagrad": lambda: aggregation.CAGradWeighting(c=0.5),
    "imtl_g": aggregation.IMTLGWeighting,
    "aligned_mtl": aggregation.AlignedMTLWeighting,
    "pcgrad": aggregation.PCGradWeighting,
    "fair_grad": lambda: aggregation.FairGradWeighting(alpha=2.0),
  }
  import torch

  try:
    weighting = make[name]()
    weighting(torch.eye(3))
  except (ImportError, NameError):  # it finds out at its first call that what it needs was not imported
    return None
  return weighting


def torch_nash(rows):
  """Nash-MTL has no weighting of a Gramian there: it takes the matrix, whose product with the weights is negligible."""
  from torchjd import aggregation

  try:
    aggregator = aggregation.NashMTL(n_tasks=len(rows))
    aggregator(rows)
  except Exception:  # the solver is missing, or fails on a missing back end
    return None
  return lambda: (aggregator.reset(), aggregator(rows))


def weighting_rows(sizes, repeats):
  import torch

  torch.set_num_threads(1)
  ours = {
    "upgrad": balancing.upgrad,
    "dual_projection": balancing.dual_projection,
    "mgda": balancing.mgda,
    "cagrad": balancing.cagrad,
    "nash_mtl": balancing.nash_mtl,
    "fair_grad": functools.partial(balancing.fair_grad, alpha=2.0),
    "imtl_g": balancing.imtl_g,
    "aligned_mtl": balancing.aligned_mtl,
    "pcgrad": balancing.pcgrad,
  }
  rows = []
  for name, weighting in ours.items():
    for tasks in sizes:
      matrix = gradients(tasks).astype(np.float32)
      products = jnp.asarray(matrix @ matrix.T)
      extra = (balancing.random_order(jax.random.key(0), tasks),) if name == "pcgrad" else ()
      solve = jax.jit(weighting)
      functions = {
        "kdflax": lambda solve=solve, products=products, extra=extra: solve(products, *extra).block_until_ready()
      }
      if name == "nash_mtl":
        peer = torch_nash(tensor(matrix))
      else:
        weigh, theirs = torch_weighting(name), tensor(np.array(products))
        peer = None if weigh is None else lambda weigh=weigh, theirs=theirs: weigh(theirs)
      if peer is not None:
        functions["torchjd"] = peer
      times = time_interleaved(functions, repeats=repeats)
      row = {"method": name, "T": tasks, "kdflax ms": times["kdflax"][0]}
      if "torchjd" in times:
        row |= {"torchjd ms": times["torchjd"][0], "times faster": times["torchjd"][0] / times["kdflax"][0]}
      else:
        row |= {"torchjd ms": "solver not installed", "times faster": ""}
      rows.append(row)
  return rows


def network(num_tasks, batch=BATCH):
  generator = np.random.default_rng(0)
  widths = (*WIDTHS[:-1], num_tasks)
  shapes = list(itertools.pairwise(widths))
  weights = [(generator.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32) for shape in shapes]
  return weights, generator.normal(size=(batch, WIDTHS[0])).astype(np.float32)


def torch_gradients(num_tasks, batch=BATCH):
  import torch
  import torchjd

  torch.set_num_threads(1)
  weights, inputs = network(num_tasks, batch)
  trunk = [tensor(w, requires_grad=True) for w in weights[:-1]]
  head, inputs = tensor(weights[-1]), tensor(inputs)
  aggregator = torchjd.aggregation.MGDA()

  def step():
    hidden = inputs
    for kernel in trunk:
      hidden = torch.relu(hidden @ kernel)
    torchjd.autojac.backward(((hidden @ head) ** 2).mean(0))
    torchjd.autojac.jac_to_grad(trunk, aggregator)

  return step


def gradient_rows(sizes, repeats):
  """Gradients of T losses over the trunk, their Gramian, MGDA and the combination."""
  rows = []
  for tasks in sizes:
    weights, inputs = network(tasks)

    def losses_fn(trunk, head, inputs):
      hidden = inputs
      for kernel in trunk:
        hidden = jax.nn.relu(hidden @ kernel)
      return ((hidden @ head) ** 2).mean(0)

    def step(trunk, head, inputs, batch_size=None):
      _, per_task = balancing.task_gradients(lambda p: losses_fn(p, head, inputs), trunk, batch_size=batch_size)
      return balancing.combine(per_task, balancing.mgda(balancing.gramian(per_task)))

    def by_layer(trunk, head, inputs):
      _, products, pullback = balancing.task_gramian(lambda p: losses_fn(p, head, inputs), trunk)
      return pullback(balancing.mgda(products))

    arrays = [jnp.asarray(w) for w in weights[:-1]], jnp.asarray(weights[-1]), jnp.asarray(inputs)
    functions, memory = {}, {}
    steps = {"kdflax vmap": step, "kdflax map": functools.partial(step, batch_size=1), "kdflax by layer": by_layer}
    for label, function in steps.items():
      compiled = jax.jit(function).lower(*arrays).compile()
      functions[label] = lambda compiled=compiled, arrays=arrays: jax.block_until_ready(compiled(*arrays))
      memory[label] = extra_memory(compiled)

    functions["torchjd"] = torch_gradients(tasks)
    memory["torchjd"] = peak_of_a_step(torch_gradients, (tasks,), (2, 4))
    times = time_interleaved(functions, repeats=repeats)
    best = min(times[label][0] for label in steps)
    rows.append(
      {"T": tasks}
      | {f"{label} ms": times[label][0] for label in functions}
      | {"times faster": times["torchjd"][0] / best}
      | {f"{label} MiB": memory[label] for label in memory}
    )
  return rows


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--smoke", action="store_true")
  smoke = parser.parse_args(argv).smoke
  machine = environment("torch", "torchjd", "quadprog", "cvxpy", "ecos", "clarabel")
  repeats = 3 if smoke else 31
  title = "Weights from a Gramian, float32, one thread, median of a call"
  report("balancing_weightings", title, weighting_rows((3, 8) if smoke else (3, 8, 16, 32, 64), repeats), machine)
  title = f"Gradients of T tasks over a trunk of {WIDTHS[:-1]}, batch {BATCH}, MGDA and combination"
  notes = (
    "MiB, per-task gradients included: for kdflax what the compiled step needs beyond its arguments, for TorchJD the "
    "growth of the peak resident memory of a process of its own."
  )
  report("balancing_gradients", title, gradient_rows((2,) if smoke else (2, 5, 10, 20), repeats), machine, notes)


if __name__ == "__main__":
  main()
