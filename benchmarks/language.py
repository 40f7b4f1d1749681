"""Losses of vocabulary heads, fused, beside the peers: `python -m benchmarks.language`.

Forward and backward with respect to the student's hidden states and head, in float32: 1,024 tokens, widths 512 and
1,024, by default 32,768 classes. The floor is four matrix products of these sizes, measured in the same run with both
libraries; times are given in terms of JAX's. Extra memory is what a step needs at once beyond inputs and outputs, as
the compiler plans it; PyTorch's, its gradients included, is the growth of a process's peak. The errors are those
against float64, relative to the largest entry.

Liger's loss is as it comes, compiled by `torch.compile`, in chunks of 1,024 tokens (its default, here all of them) and
of 256; and not compiled. TRL and EasyDeL have their divergence alone, in the chunks that they choose. Whoever is not
installed is left out. EasyDeL 0.3 asks for an older Flax and some fifty packages: it was put into a folder of its own
(`pip install --no-deps --target DIR easydel eformer ejkernel ray ...`), which `PYTHONPATH=DIR` adds.

All run with `GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483648` if that is
set where the script is started, as README.md advises. The second table is the extra memory of a step as the vocabulary
grows, which is not run.
"""

import argparse
import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kdflax import losses

torch: Any = None
liger: Any = None
trl: Any = None
easydel: Any = None
with contextlib.suppress(ImportError):
  import torch
  import torch.nn.functional as F
with contextlib.suppress(ImportError):
  from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as liger
with contextlib.suppress(ImportError):
  from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as trl

TOKENS, STUDENT, TEACHER, CLASSES = 1024, 512, 1024, 32_768
VOCABULARIES = (32_768, 131_072, 262_144)
BOTH, JSD, KL = "JSD + cross-entropy", "JSD", "forward KL"
NAMES = {JSD: "jensen_shannon", KL: "forward_kl"}


class Method(NamedTuple):
  """A way to a loss.

  Attributes:
    step: runs it; returns the value and the gradients of the student's hidden states and head.
    memory: MB that a step needs at once.
  """

  step: Callable[[], Any]
  memory: Callable[[], float]


def arrays_of(tokens: int, classes: int, student: int = STUDENT, teacher: int = TEACHER) -> list[np.ndarray]:
  """Hidden states and heads of a student and a teacher, and labels; logits have a standard deviation of 2."""
  rng = np.random.default_rng(0)
  arrays = []
  for width in (student, teacher):
    arrays.append(rng.normal(size=(tokens, width)).astype(np.float32))
    arrays.append((2 / width**0.5 * rng.normal(size=(classes, width))).astype(np.float32))
  return [*arrays, rng.integers(classes, size=tokens)]


def fused(hidden, head, teacher_hidden, teacher_head, labels, *, loss=BOTH, chunk=None):
  arrays, options = (hidden, head, teacher_hidden, teacher_head), {"chunk": chunk}
  if loss != BOTH:
    return losses.masked_mean(losses.fused_divergence(*arrays, divergence=NAMES[loss], **options))
  pair = losses.fused_distillation(*arrays, labels, divergence="jensen_shannon", **options)
  return sum(map(losses.masked_mean, pair))


def unfused(hidden, head, teacher_hidden, teacher_head, labels, *, loss=BOTH):
  logits = hidden @ head.T
  divergence = losses.forward_kl if loss == KL else losses.jensen_shannon
  soft = losses.masked_mean(divergence(logits, teacher_hidden @ teacher_head.T))
  if loss != BOTH:
    return soft
  own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
  return soft - own.mean()


def easydel_kl(hidden, head, teacher_hidden, teacher_head, labels):
  """One sequence; without hard labels its loss is `alpha KL(p || q)`."""
  heads = (lambda x: x @ head.T), (lambda x: x @ teacher_head.T)
  value, _ = easydel(hidden[None], teacher_hidden[None], *heads, temperature=1.0, alpha=1.0)
  return value


def products(hidden, head, teacher_hidden, teacher_head, slopes):
  """The four products that no exact method does without: two of logits, two of gradients."""
  return hidden @ head.T, teacher_hidden @ teacher_head.T, slopes @ head, slopes.T @ hidden


def eager(hidden, head, teacher_hidden, teacher_head, labels):
  """Whole logits in eager PyTorch, as training scripts write it."""
  logits = hidden @ head.T
  log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(teacher_hidden @ teacher_head.T, -1)
  log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - np.log(2)
  kl = lambda log_x: F.kl_div(log_m, log_x, reduction="batchmean", log_target=True)
  return (kl(log_p) + kl(log_q)) / 2 + F.cross_entropy(logits, labels)


def torch_products(hidden, head, teacher_hidden, teacher_head, slopes):
  with torch.no_grad():
    return products(hidden, head, teacher_hidden, teacher_head, slopes)


def liger_both(*arrays, chunk, is_compiled):
  options = {"weight_hard_loss": 1.0, "weight_soft_loss": 1.0, "beta": 0.5}
  return liger(**options, chunk_size=chunk, compiled=is_compiled)(*arrays)


def trl_jsd(hidden, head, teacher_hidden, teacher_head, labels):
  values, _ = trl.apply(hidden, head, None, teacher_hidden, teacher_head, None, 0.5)
  return values.mean()


def torch_step(function: Callable, tokens: int, classes: int) -> Callable[[], Any]:
  """A function of tensors with its backward pass."""
  hidden, head, *others = map(harness.tensor, arrays_of(tokens, classes))
  leaves = [hidden.requires_grad_(), head.requires_grad_()]

  def step():
    for leaf in leaves:
      leaf.grad = None
    value = function(*leaves, *others)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]

  return step


def of_torch(function: Callable, tokens: int, classes: int) -> Method:
  """Its memory is measured in a process of its own."""
  step = torch_step(function, tokens, classes)
  small = (function, 16, 512)
  return Method(step, lambda: harness.peak_of_a_step(torch_step, (function, tokens, classes), small))


def of_jax(function: Callable, inputs: list[jax.Array]) -> Method:
  program = compiled(function, inputs)
  return Method(lambda: jax.block_until_ready(program(*inputs)), lambda: temporaries(program))


def compiled(function: Callable, arguments):
  return jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arguments).compile()


def temporaries(program) -> float:
  return program.memory_analysis().temp_size_in_bytes / 2**20


def methods(tokens: int, classes: int, chunks: list[int]) -> dict[tuple[str, str], Method]:
  """By loss and name; the first of each loss is kdflax on whole logits."""
  inputs = [jnp.asarray(x) for x in arrays_of(tokens, classes)]
  found = {}
  for loss in (BOTH, JSD, KL):
    found[loss, "kdflax, whole logits"] = of_jax(functools.partial(unfused, loss=loss), inputs)
    for chunk in chunks if loss == BOTH else [None]:
      name = "kdflax, fused" if chunk is None else f"kdflax, fused, chunks of {chunk}"
      found[loss, name] = of_jax(functools.partial(fused, loss=loss, chunk=chunk), inputs)
  if easydel is not None:
    found[KL, "EasyDeL, chunks of 128"] = of_jax(easydel_kl, inputs)
  if torch is not None:
    found[BOTH, "PyTorch, eager"] = of_torch(eager, tokens, classes)
  if liger is not None:
    for chunk, is_compiled in ((1024, True), (256, True), (1024, False)):
      function = functools.partial(liger_both, chunk=chunk, is_compiled=is_compiled)
      name = f"Liger{', compiled' if is_compiled else ''}, chunks of {chunk}"
      found[BOTH, name] = of_torch(function, tokens, classes)
  if trl is not None:
    found[JSD, "TRL, tiles of 4,096 x 32,768"] = of_torch(trl_jsd, tokens, classes)
  return found


def errors(results, exact) -> dict[str, float]:
  """Of the value and of both gradients, relative to the largest entry."""
  relative = lambda got, expected: float(np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max())
  (value, gradients), (expected, slopes) = results, exact
  return {"value off by": relative(value, expected), "gradients off by": max(map(relative, gradients, slopes))}


def in_float64(arrays, loss: str):
  with jax.enable_x64(True):
    exact = [jnp.asarray(x, "float64" if x.dtype.kind == "f" else None) for x in arrays]
    return jax.tree.map(np.asarray, compiled(functools.partial(fused, loss=loss), exact)(*exact))


def measure(tokens: int, classes: int, chunks: list[int], repeats: int) -> list[dict]:
  arrays = arrays_of(tokens, classes)
  exact = {loss: in_float64(arrays, loss) for loss in (BOTH, JSD, KL)}
  whole = [*map(jnp.asarray, arrays[:4]), jnp.ones((tokens, classes), jnp.float32)]
  floor = jax.jit(products).lower(*whole).compile()
  found = methods(tokens, classes, chunks)
  functions: dict[Any, Callable[[], Any]] = {("", "four products"): lambda: jax.block_until_ready(floor(*whole))}
  if torch is not None:
    tensors = [harness.tensor(np.asarray(x)) for x in whole]
    functions["", "four products, PyTorch"] = lambda: torch_products(*tensors)
  functions |= {key: method.step for key, method in found.items()}
  times = harness.time_interleaved(functions, repeats=repeats)
  memory = {key: method.memory() for key, method in found.items()}
  rows = []
  for key, (median, lower, upper) in times.items():
    row = {"loss": key[0], "method": key[1], "median (ms)": median, "quartiles (ms)": f"{lower:.0f} to {upper:.0f}"}
    row |= {"times the floor": median / times["", "four products"][0]}
    row |= {"extra memory (MB)": "", "of whole logits": "", "value off by": "", "gradients off by": ""}
    if key in found:
      of_whole = memory[key] / memory[key[0], "kdflax, whole logits"]
      row |= {"extra memory (MB)": memory[key], "of whole logits": of_whole, **errors(found[key].step(), exact[key[0]])}
    rows.append(row)
  return sorted(rows, key=lambda row: ["", BOTH, JSD, KL].index(row["loss"]))


def memory_by_classes(tokens: int) -> list[dict]:
  """Extra memory by the number of classes, from shapes alone."""
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
  ways = {"fused": fused, "whole logits": unfused}
  if easydel is not None:
    ways["EasyDeL (KL alone)"] = easydel_kl
  rows = []
  for classes in VOCABULARIES:
    sides = [(shape(tokens, width), shape(classes, width)) for width in (STUDENT, TEACHER)]
    arguments = [*sides[0], *sides[1], labels]
    extra = {f"{name} (MB)": temporaries(compiled(function, arguments)) for name, function in ways.items()}
    rows.append({"classes": classes, "gradient of the head (MB)": classes * STUDENT * 4 / 2**20, **extra})
  return rows


def draw(rows: list[dict]) -> None:
  """The memory by the number of classes, as a picture beside its table."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, panel = plt.subplots(figsize=(6, 4))
  classes = [row["classes"] for row in rows]
  for name in [name for name in rows[0] if name != "classes"]:
    style = ":" if name.startswith("gradient") else "-"
    panel.loglog(classes, [row[name] for row in rows], style, marker=".", label=name.removesuffix(" (MB)"))
  panel.set(xlabel="classes", ylabel="MB beyond inputs and outputs", xticks=classes)
  panel.set_xticks(classes, [f"{count:,}" for count in classes])
  panel.minorticks_off()
  panel.legend()
  panel.set_title(f"Temporaries of a step: JSD + cross-entropy of {TOKENS:,} tokens")
  figure.savefig(harness.RESULTS / f"language_memory{harness.suffix()}.svg", bbox_inches="tight")


def import_easydel() -> None:
  """After jax has its backend: EasyDeL changes jax's flags when it is imported."""
  global easydel
  os.environ["EASYDEL_AUTO"] = "0"
  jax.devices()
  with contextlib.suppress(ImportError):
    from easydel.trainers.distillation_trainer._fn import chunked_distillation_loss as easydel


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=TOKENS)
  parser.add_argument("--classes", type=int, default=CLASSES)
  parser.add_argument("--chunks", type=int, nargs="*", default=[64, 128, 256])
  parser.add_argument("--repeats", type=int, default=9)
  arguments = parser.parse_args()
  machine = harness.environment("torch", "liger_kernel", "trl", "easydel")
  import_easydel()
  if torch is not None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  notes = __doc__.split("\n\n", 1)[1].strip()
  rows = memory_by_classes(arguments.tokens)
  harness.report("language_memory", "Extra memory of a step by the vocabulary", rows, machine)
  draw(rows)
  rows = measure(arguments.tokens, arguments.classes, arguments.chunks, arguments.repeats)
  harness.report("language", "Losses of vocabulary heads", rows, machine, notes)


if __name__ == "__main__":
  main()
