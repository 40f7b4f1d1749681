"""Forward and backward of the losses on logits against PyTorch: `python -m benchmarks.logits`.

Float32, the mean over a batch and its gradient with respect to the student. PyTorch runs each formula as the usual
training scripts write it, with two threads. `256 x 100` is a batch of CIFAR-100, `64 x 32000` are tokens of a language
model. Extra memory is what a step needs at once beyond its inputs, its gradient included: of kdflax as the compiler
plans it, of PyTorch by the growth of a process's peak, or on a GPU of its allocator's.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

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

SHAPES = ((256, 100), (64, 32_000))
T = 4.0


class Case(NamedTuple):
  """A loss, its PyTorch form, and whether both take labels."""

  loss: Callable
  peer: Callable
  labels: bool = False
  only_small: bool = False  # PyTorch's form holds [classes, classes]


def divergence(log_p, log_q):
  return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def softened(s, t, temperature=1.0):
  return F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)


def peer_kl_soft_targets(s, t):
  return F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="batchmean") * T**2


def peer_standardized(s, t):
  standard = lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7)
  return peer_kl_soft_targets(standard(s), standard(t))


def peer_hard_targets(s, t):
  return F.cross_entropy(s, t.argmax(1))


def peer_dkd(s, t, y):
  target = F.one_hot(y, s.shape[1]).bool()
  q, p = F.softmax(s / T, 1), F.softmax(t / T, 1)
  both = lambda x: torch.stack([(x * target).sum(1), (x * ~target).sum(1)], 1)
  of_target = F.kl_div(both(q).log(), both(p), reduction="batchmean")
  others = lambda x: x / T - 1000.0 * target
  of_others = F.kl_div(F.log_softmax(others(s), 1), F.softmax(others(t), 1), reduction="batchmean")
  return T**2 * (of_target + 8 * of_others)


def peer_nkd(s, t, y):
  target = F.one_hot(y, s.shape[1]).bool()
  log_q, p = F.log_softmax(s, 1), F.softmax(t, 1)
  own = -((p * log_q) * target).sum(1).mean()
  rest = lambda x: x[~target].reshape(len(x), -1)
  return own - 1.5 * (F.softmax(rest(t), 1) * F.log_softmax(rest(s), 1)).sum(1).mean()


def peer_dist(s, t):
  q, p = F.softmax(s, 1), F.softmax(t, 1)
  pearson = lambda a, b: F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()
  return 1 - pearson(q, p) + 1 - pearson(q.T, p.T)


def peer_class_correlation(s, t):
  q, p = F.softmax(s, 1), F.softmax(t, 1)
  return (q.T @ q - p.T @ p).pow(2).sum() / s.shape[1]


def peer_batch_correlation(s, t):
  q, p = F.softmax(s, 1), F.softmax(t, 1)
  return (q @ q.T - p @ p.T).pow(2).sum() / len(s)


def peer_forward_kl(s, t):
  log_q, log_p = softened(s, t)
  return divergence(log_p, log_q)


def peer_reverse_kl(s, t):
  log_q, log_p = softened(s, t)
  return divergence(log_q, log_p)


def peer_total_variation(s, t):
  return (F.softmax(s, 1) - F.softmax(t, 1)).abs().sum(1).mean() / 2


def mixture(log_p, log_q, alpha):
  return torch.logsumexp(torch.stack([log_p + np.log(alpha), log_q + np.log(1 - alpha)]), 0)


def peer_skew_kl(s, t):
  log_q, log_p = softened(s, t)
  return divergence(log_p, mixture(log_p, log_q, 0.1))


def peer_reverse_skew_kl(s, t):
  log_q, log_p = softened(s, t)
  return divergence(log_q, mixture(log_q, log_p, 0.1))


def peer_jensen_shannon(s, t):
  log_q, log_p = softened(s, t)
  log_m = mixture(log_p, log_q, 0.5)
  return (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2


CASES = [
  Case(functools.partial(losses.kl_soft_targets, temperature=T), peer_kl_soft_targets),
  Case(functools.partial(losses.standardized(losses.kl_soft_targets), temperature=T), peer_standardized),
  Case(losses.hard_targets, peer_hard_targets),
  Case(losses.dkd, peer_dkd, labels=True),
  Case(losses.nkd, peer_nkd, labels=True),
  Case(losses.dist, peer_dist),
  Case(losses.class_correlation, peer_class_correlation, only_small=True),
  Case(losses.batch_correlation, peer_batch_correlation),
  Case(losses.forward_kl, peer_forward_kl),
  Case(losses.reverse_kl, peer_reverse_kl),
  Case(losses.total_variation, peer_total_variation),
  Case(losses.skew_kl, peer_skew_kl),
  Case(losses.reverse_skew_kl, peer_reverse_skew_kl),
  Case(losses.jensen_shannon, peer_jensen_shannon),
]


def name_of(case: Case) -> str:
  return case.peer.__name__.removeprefix("peer_")


def inputs_of(case: Case, batch: int, classes: int) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  logits = 3 * rng.normal(size=(2, batch, classes)).astype(np.float32)
  return [*logits, rng.integers(classes, size=batch)] if case.labels else [*logits]


def peer_step(name: str, batch: int, classes: int) -> Callable:
  """A step of PyTorch on logits of its own, returning the loss and its gradient."""
  case = next(case for case in CASES if name_of(case) == name)
  student, *rest = (harness.tensor(x) for x in inputs_of(case, batch, classes))

  def step():
    leaf = student.detach().requires_grad_()
    value = case.peer(leaf, *rest)
    value.backward()
    return value, leaf.grad

  return step


def measure(case: Case, batch: int, classes: int, repeats: int) -> dict:
  arrays = inputs_of(case, batch, classes)
  inputs = [jnp.asarray(x) for x in arrays]
  gradient = jax.value_and_grad(lambda *arrays: losses.masked_mean(case.loss(*arrays)))
  compiled = jax.jit(gradient).lower(*inputs).compile()
  row = {"loss": name_of(case), "logits": f"{batch} x {classes}"}
  functions = {"kdflax": lambda: jax.block_until_ready(compiled(*inputs))}
  memory = {"kdflax extra (MB)": harness.extra_memory(compiled)}
  if torch is not None and not (case.only_small and classes > 1000):
    functions["torch"] = peer_step(name_of(case), batch, classes)
    (value, slope), (expected, expected_slope) = compiled(*inputs), functions["torch"]()
    expected_slope = expected_slope.numpy(force=True)
    difference = np.linalg.norm(np.asarray(slope) - expected_slope) / np.linalg.norm(expected_slope)
    row |= {"value differs by": abs(float(value) / expected.item() - 1), "gradient differs by": float(difference)}
    memory["torch extra (MB)"] = harness.peak_of_a_step(
      peer_step, (name_of(case), batch, classes), (name_of(case), 2, 3)
    )
  times = {name: time for name, (time, _, _) in harness.time_interleaved(functions, repeats=repeats).items()}
  row |= {f"{name} (ms)": time for name, time in times.items()}
  if "torch" in times:
    row["times faster"] = times["torch"] / times["kdflax"]
  return row | {"inputs (MB)": sum(x.nbytes for x in arrays[:2]) / 2**20} | memory


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=31)
  parser.add_argument("--only", default="", help="part of a loss's name")
  arguments = parser.parse_args()
  machine = harness.environment("torch")
  if torch is not None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  cases = [case for case in CASES if arguments.only in name_of(case)]
  rows = [measure(case, *shape, arguments.repeats) for shape in SHAPES for case in cases]
  harness.report("logits", "Losses on logits against PyTorch", rows, machine, __doc__.split("\n\n", 1)[1].strip())


if __name__ == "__main__":
  main()
