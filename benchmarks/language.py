"""Losses of vocabulary heads, fused, against the same from whole logits: `python -m benchmarks.language`.

Jensen-Shannon divergence plus cross-entropy, forward and backward with respect to the student's hidden states and head,
in float32: 1,024 tokens, widths 512 and 1,024, by default 32,768 classes. The floor is four matrix products of these
sizes, measured in the same run. Extra memory is what a step needs at once beyond inputs and outputs, as the compiler
plans it; PyTorch's, its gradients included, is the growth of a process's peak. The errors are those against float64,
relative to the largest entry. `memory` is the extra memory of a step as the vocabulary grows, which is not run.
"""

import argparse
import functools
import os
from collections.abc import Callable

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

TOKENS, STUDENT, TEACHER, CLASSES = 1024, 512, 1024, 32_768
VOCABULARIES = (32_768, 131_072, 262_144)


def arrays_of(tokens: int, classes: int, student: int = STUDENT, teacher: int = TEACHER) -> list[np.ndarray]:
  """Hidden states and heads of a student and a teacher, and labels; logits have a standard deviation of 2."""
  rng = np.random.default_rng(0)
  arrays = []
  for width in (student, teacher):
    arrays.append(rng.normal(size=(tokens, width)).astype(np.float32))
    arrays.append((2 / width**0.5 * rng.normal(size=(classes, width))).astype(np.float32))
  return [*arrays, rng.integers(classes, size=tokens)]


def fused(hidden, head, teacher_hidden, teacher_head, labels, *, chunk=None):
  pair = losses.fused_distillation(
    hidden, head, teacher_hidden, teacher_head, labels, divergence="jensen_shannon", chunk=chunk
  )
  return sum(map(losses.masked_mean, pair))


def unfused(hidden, head, teacher_hidden, teacher_head, labels):
  logits = hidden @ head.T
  soft = losses.jensen_shannon(logits, teacher_hidden @ teacher_head.T)
  own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
  return losses.masked_mean(soft) - own.mean()


def products(hidden, head, teacher_hidden, teacher_head, slopes):
  """The four products that no exact method does without: two of logits, two of gradients."""
  return hidden @ head.T, teacher_hidden @ teacher_head.T, slopes @ head, slopes.T @ hidden


def torch_step(tokens: int, classes: int) -> Callable:
  """The same in eager PyTorch, as training scripts write it."""
  hidden, head, teacher_hidden, teacher_head, labels = map(harness.tensor, arrays_of(tokens, classes))
  leaves = [hidden.requires_grad_(), head.requires_grad_()]

  def step():
    for leaf in leaves:
      leaf.grad = None
    logits = hidden @ head.T
    log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(teacher_hidden @ teacher_head.T, -1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - np.log(2)
    kl = lambda log_x: F.kl_div(log_m, log_x, reduction="batchmean", log_target=True)
    value = (kl(log_p) + kl(log_q)) / 2 + F.cross_entropy(logits, labels)
    value.backward()
    return value

  return step


def compiled(function: Callable, arguments, **options):
  return jax.jit(jax.value_and_grad(function, (0, 1)), **options).lower(*arguments).compile()


def temporaries(program) -> float:
  return program.memory_analysis().temp_size_in_bytes / 2**20


def errors(results, exact) -> dict[str, float]:
  """Of the value and of both gradients, relative to the largest entry."""
  relative = lambda got, expected: float(np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max())
  (value, gradients), (expected, slopes) = results, exact
  return {"value off by": relative(value, expected), "gradients off by": max(map(relative, gradients, slopes))}


def in_float64(arrays):
  with jax.enable_x64(True):
    exact = [jnp.asarray(x, "float64" if x.dtype.kind == "f" else None) for x in arrays]
    return jax.tree.map(np.asarray, compiled(fused, exact)(*exact))


def measure(tokens: int, classes: int, chunks: list[int], repeats: int) -> list[dict]:
  arrays = arrays_of(tokens, classes)
  inputs = [jnp.asarray(x) for x in arrays]
  exact = in_float64(arrays)
  whole = [*inputs[:4], jnp.ones((tokens, classes), jnp.float32)]
  steps = {"kdflax, whole logits": compiled(unfused, inputs)}
  steps |= {f"kdflax, fused, chunks of {n}": compiled(functools.partial(fused, chunk=n), inputs) for n in chunks}
  floor = jax.jit(products).lower(*whole).compile()
  functions = {"four products": lambda: jax.block_until_ready(floor(*whole))}
  functions |= {name: lambda step=step: jax.block_until_ready(step(*inputs)) for name, step in steps.items()}
  if torch is not None:
    functions["PyTorch, eager"] = torch_step(tokens, classes)
  times = harness.time_interleaved(functions, repeats=repeats)
  most = temporaries(steps["kdflax, whole logits"])
  rows = []
  for name, (median, lower, upper) in times.items():
    row = {"method": name, "median (ms)": median, "quartiles (ms)": f"{lower:.0f} to {upper:.0f}"}
    row |= {"times the floor": median / times["four products"][0]}
    row |= {"extra memory (MB)": "", "of whole logits": "", "value off by": "", "gradients off by": ""}
    if name in steps:
      extra = temporaries(steps[name])
      row |= {"extra memory (MB)": extra, "of whole logits": extra / most, **errors(steps[name](*inputs), exact)}
    elif name.startswith("PyTorch"):
      row["extra memory (MB)"] = harness.peak_of_a_step(torch_step, (tokens, classes), (2, 16))
    rows.append(row)
  return rows


def memory(tokens: int) -> list[dict]:
  """Extra memory by the number of classes, from shapes alone."""
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  rows = []
  for classes in VOCABULARIES:
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    arguments = [
      shape(tokens, STUDENT),
      shape(classes, STUDENT),
      shape(tokens, TEACHER),
      shape(classes, TEACHER),
      labels,
    ]
    extra = {
      name: temporaries(compiled(function, arguments)) for name, function in (("fused", fused), ("whole", unfused))
    }
    rows.append({"classes": classes, **{f"{name} (MB)": value for name, value in extra.items()}})
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=TOKENS)
  parser.add_argument("--classes", type=int, default=CLASSES)
  parser.add_argument("--chunks", type=int, nargs="*", default=[64, 128, 256])
  parser.add_argument("--repeats", type=int, default=9)
  arguments = parser.parse_args()
  machine = harness.environment("torch")
  if torch is not None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  notes = __doc__.split("\n\n", 1)[1].strip()
  rows = measure(arguments.tokens, arguments.classes, arguments.chunks, arguments.repeats)
  harness.report("language", "Losses of vocabulary heads", rows, machine, notes)
  harness.report("language_memory", "Extra memory of a step by the vocabulary", memory(arguments.tokens), machine)


if __name__ == "__main__":
  main()
