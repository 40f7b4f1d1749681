"""Forward and backward of the feature losses against PyTorch: `python -m benchmarks.features`.

Float32, the mean over a batch and its gradient with respect to the student. PyTorch runs each formula as the usual
training scripts write it, on its own layout (channels first, contiguous); kdflax runs under jit, channels last. Extra
memory is what a step needs at once beyond its inputs, its gradient included: of kdflax as the compiler plans it, of
PyTorch by the growth of a process's peak, or on a GPU of its allocator's.
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

LAST, OTHER_WIDTH, EARLY = (8, 8, 256), (8, 8, 128), (16, 16, 64)
MARGIN = np.linspace(-1, -0.1, LAST[-1], dtype=np.float32)
VARIANCE = np.linspace(0.5, 2, LAST[-1], dtype=np.float32)


class Case(NamedTuple):
  """A loss, its PyTorch form on maps with the channels first, and the maps: the students' are the first half."""

  loss: Callable
  peer: Callable
  shapes: tuple[tuple[int, int, int], ...]


def peer_cosine(s, t):
  return (1 - F.cosine_similarity(s, t, dim=1)).mean()


def attention(features, power=2):
  return F.normalize(features.pow(power).mean(1).flatten(1))


def peer_attention_transfer(s, t):
  return (attention(s) - attention(t)).pow(2).mean()


def peer_factor_transfer(s, t):
  return (attention(s) - attention(t)).abs().mean()


def peer_class_attention_transfer(s, t):
  maps = lambda f: F.normalize(F.adaptive_avg_pool2d(f, (2, 2)).flatten(2), dim=2)
  return F.mse_loss(maps(s), maps(t))


def peer_hierarchical_context(s, t):
  total, weights, weight = F.mse_loss(s, t), 1.0, 1.0
  for level in (4, 2, 1):
    weight /= 2
    total = total + weight * F.mse_loss(F.adaptive_avg_pool2d(s, level), F.adaptive_avg_pool2d(t, level))
    weights += weight
  return total / weights


@functools.cache
def variance_and_margin():
  """As tensors, made once, as a module's buffers are."""
  return tuple(harness.tensor(value)[:, None, None] for value in (VARIANCE, MARGIN))


def peer_vid(mean, t):
  variance, _ = variance_and_margin()
  return ((mean - t).pow(2) / variance + torch.log(variance)).mean() / 2


def peer_activation_boundary(s, t, margin=1.0):
  inactive = (s + margin).pow(2) * ((s > -margin) & (t <= 0)).float()
  active = (s - margin).pow(2) * ((s <= margin) & (t > 0)).float()
  return (inactive + active).sum() / len(s)


def peer_ofd(s, t):
  _, margin = variance_and_margin()
  target = torch.maximum(t, margin)
  return (F.mse_loss(s, target, reduction="none") * ((s > target) | (t > 0)).float()).sum() / len(s)


def peer_fsp(s_first, s_last, t_first, t_last):
  def flow(first, last):
    first = F.adaptive_avg_pool2d(first, last.shape[2:])
    return (first.flatten(2).unsqueeze(2) * last.flatten(2).unsqueeze(1)).mean(-1)

  return F.mse_loss(flow(s_first, s_last), flow(t_first, t_last))


def peer_nst(s, t):
  s, t = (F.normalize(f.flatten(2), dim=2) for f in (s, t))
  kernel = lambda a, b: (a.unsqueeze(2) * b.unsqueeze(1)).sum(-1).pow(2).mean()
  return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def peer_inter_channel_correlation(s, t):
  correlation = lambda f: F.normalize(torch.bmm(f.flatten(2), f.flatten(2).transpose(1, 2)), dim=2)
  return (correlation(s) - correlation(t)).pow(2).sum() / (s.shape[0] * s.shape[1])


def peer_kdsvd(s_first, s_last, t_first, t_last, k=1):
  def vectors(features, count):
    _, values, vectors = torch.linalg.svd(features.flatten(2).transpose(1, 2), full_matrices=False)
    return F.normalize(values[:, None, :count], dim=2), vectors[:, :count].transpose(1, 2)

  def layer(s, t):
    _, candidates = vectors(s, k + 3)
    weights, teacher = vectors(t, k)
    cosines = candidates.transpose(1, 2) @ teacher
    closest = cosines.abs() == cosines.abs().amax(1, keepdim=True)
    return weights * (candidates @ (closest * cosines.sign())), weights * teacher

  kernel = lambda a, b: torch.exp(-(b.unsqueeze(2) - a.unsqueeze(1)).pow(2) / 8)
  (s_first, t_first), (s_last, t_last) = layer(s_first, t_first), layer(s_last, t_last)
  return (kernel(s_first, s_last) - kernel(t_first, t_last)).pow(2).sum() / len(s_first)


CASES = [
  Case(losses.hint, lambda s, t: F.mse_loss(s, t), (LAST, LAST)),
  Case(losses.cosine, peer_cosine, (LAST, LAST)),
  Case(losses.attention_transfer, peer_attention_transfer, (OTHER_WIDTH, LAST)),
  Case(losses.factor_transfer, peer_factor_transfer, (OTHER_WIDTH, LAST)),
  Case(losses.class_attention_transfer, peer_class_attention_transfer, (LAST, LAST)),
  Case(losses.hierarchical_context, peer_hierarchical_context, (LAST, LAST)),
  Case(lambda s, t: losses.vid(s, t, variance=VARIANCE), peer_vid, (LAST, LAST)),
  Case(losses.activation_boundary, peer_activation_boundary, (LAST, LAST)),
  Case(lambda s, t: losses.ofd(s, t, margin=MARGIN), peer_ofd, (LAST, LAST)),
  Case(losses.fsp, peer_fsp, (EARLY, OTHER_WIDTH, EARLY, OTHER_WIDTH)),
  Case(losses.nst, peer_nst, (OTHER_WIDTH, LAST)),
  Case(losses.inter_channel_correlation, peer_inter_channel_correlation, (LAST, LAST)),
  Case(losses.kdsvd, peer_kdsvd, (EARLY, OTHER_WIDTH, EARLY, OTHER_WIDTH)),
]


def name_of(case: Case) -> str:
  return case.peer.__name__.removeprefix("peer_") if case.loss is not losses.hint else "hint"


def maps_of(case: Case, batch: int) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  return [rng.normal(size=(batch, *shape)).astype(np.float32) for shape in case.shapes]


def peer_step(name: str, batch: int) -> Callable:
  """A step of PyTorch on maps of its own, returning the loss and the gradient of the first map."""
  case = next(case for case in CASES if name_of(case) == name)
  maps = [harness.tensor(np.moveaxis(a, -1, 1)) for a in maps_of(case, batch)]

  def step():
    leaves = [t.detach().requires_grad_(i < len(maps) // 2) for i, t in enumerate(maps)]
    value = case.peer(*leaves)
    value.backward()
    return value, leaves[0].grad

  return step


def measure(case: Case, batch: int, repeats: int) -> dict:
  arrays = maps_of(case, batch)
  inputs = [jnp.asarray(a) for a in arrays]
  students = tuple(range(len(arrays) // 2))
  gradient = jax.value_and_grad(lambda *maps: losses.masked_mean(case.loss(*maps)), students)
  compiled = jax.jit(gradient).lower(*inputs).compile()
  name, megabytes = name_of(case), 2**20
  row = {"loss": name, "maps": ", ".join("x".join(map(str, shape)) for shape in dict.fromkeys(case.shapes))}
  functions = {"kdflax": lambda: jax.block_until_ready(compiled(*inputs))}
  memory = {"kdflax extra (MB)": harness.extra_memory(compiled)}
  if torch is not None:
    functions["torch"] = peer_step(name, batch)
    value, gradients = compiled(*inputs)
    expected, expected_gradient = functions["torch"]()
    expected_gradient = np.moveaxis(expected_gradient.numpy(force=True), 1, -1)
    difference = np.linalg.norm(np.asarray(gradients[0]) - expected_gradient) / np.linalg.norm(expected_gradient)
    row |= {
      "value differs by": abs(float(value) / expected.item() - 1),
      "gradient differs by": float(difference),
    }
    memory["torch extra (MB)"] = harness.peak_of_a_step(peer_step, (name, batch), (name, 1))
  times = {name: time for name, (time, _, _) in harness.time_interleaved(functions, repeats=repeats).items()}
  row |= {f"{name} (ms)": time for name, time in times.items()}
  if torch is not None:
    row["times faster"] = times["torch"] / times["kdflax"]
  return row | {"inputs (MB)": sum(a.nbytes for a in arrays) / megabytes} | memory


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--only", default="", help="part of a loss's name")
  arguments = parser.parse_args()
  machine = harness.environment("torch")
  if torch is not None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  cases = [case for case in CASES if arguments.only in name_of(case)]
  rows = [measure(case, arguments.batch, arguments.repeats) for case in cases]
  notes = (
    f"Batch {arguments.batch}, float32, forward and backward, medians. PyTorch's formulas are the usual ones. Extra "
    "memory includes the gradient: of kdflax as the compiler plans it, of PyTorch the growth of a process's peak. "
    "KDSVD differs where the two decompositions turn a singular vector the other way, which the method leaves open."
  )
  harness.report("features", "Feature losses against PyTorch", rows, machine, notes)


if __name__ == "__main__":
  main()
