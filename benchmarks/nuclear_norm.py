"""Value and gradient of the nuclear norm against PyTorch's and JAX's own: `python -m benchmarks.nuclear_norm`.

Float32. Each row is one matrix shape and spectrum: `random` (Gaussian entries) and `1e3` (singular values spaced evenly
in logarithm down to a thousandth, where a plain Gram matrix fails). The gradient error is relative, in Frobenius norm,
against a float64 SVD. The last rows time all pairs of 8 tasks' 512 x 128 layers as one batched call and as loops.

JAX's LAPACK is SciPy's OpenBLAS, whose threads go on spinning after a call and take a core from XLA's matmuls: on two
cores `OPENBLAS_NUM_THREADS=1` is faster, and it is set here. PyTorch has its own library, with one and two threads.
What iterates by products gains from wide vectors: with AVX-512 the matrix of 256 x 256 was 1.5 times faster than
PyTorch's, with AVX2 it is about as fast.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kdflax.coupling import nuclear_norm

try:
  import torch
except ModuleNotFoundError:
  torch = None

SHAPES = ((2304, 512), (1024, 256), (4096, 64), (384, 256), (256, 256))
METHODS = ("auto", "svd", "gram", "newton_schulz")


def make_matrix(m: int, n: int, spectrum: str, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(m, n))
  if spectrum == "random":
    return x.astype(np.float32)
  u, _, vt = np.linalg.svd(x, full_matrices=False)
  return (u * np.geomspace(1, 1 / float(spectrum), n) @ vt).astype(np.float32)


def exact_gradient(x: np.ndarray) -> np.ndarray:
  u, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
  return u @ vt


def relative_error(got, expected) -> float:
  return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


def kdflax_gradient(method: str):
  return jax.jit(jax.value_and_grad(lambda x: nuclear_norm(x, method=method).sum()))


def torch_gradient(x, threads: int):
  torch.set_num_threads(threads)
  leaf = x.detach().requires_grad_()
  torch.linalg.matrix_norm(leaf, ord="nuc").backward()
  return leaf.grad


JNP = jax.jit(jax.value_and_grad(lambda x: jnp.linalg.norm(x, "nuc")))


def measure_matrix(m: int, n: int, spectrum: str, repeats: int, methods=METHODS):
  x = make_matrix(m, n, spectrum)
  on_device = jnp.asarray(x)
  ours = {method: kdflax_gradient(method) for method in methods}
  functions = {method: lambda f=f: jax.block_until_ready(f(on_device)) for method, f in ours.items()}
  functions["jnp"] = lambda: jax.block_until_ready(JNP(on_device))
  if torch is not None:
    theirs = harness.tensor(x)
    functions |= {f"torch {threads}": lambda threads=threads: torch_gradient(theirs, threads) for threads in (1, 2)}
  times = {name: median for name, (median, _, _) in harness.time_interleaved(functions, repeats=repeats).items()}
  expected = exact_gradient(x)
  row = {"matrix": f"{m} x {n}", "spectrum": spectrum}
  row |= {f"{name} (ms)": time for name, time in times.items()}
  if torch is not None:
    row["auto vs torch"] = min(times["torch 1"], times["torch 2"]) / times["auto"]
  row["auto vs jnp"] = times["jnp"] / times["auto"]
  row |= {f"error {method}": relative_error(f(on_device)[1], expected) for method, f in ours.items()}
  return row


def measure_pairs(repeats: int, tasks: int = 8, m: int = 512, n: int = 128):
  """All unordered pairs at once against one call for each."""
  layers = [make_matrix(m, n, "random", seed) for seed in range(tasks)]
  pairs = np.stack([a - b for a, b in itertools.combinations(layers, 2)])
  on_device = jnp.asarray(pairs)
  singles = [jnp.asarray(x) for x in pairs]
  ours = kdflax_gradient("auto")
  functions = {
    "auto, one batched call": lambda: jax.block_until_ready(ours(on_device)),
    "auto, loop": lambda: [jax.block_until_ready(ours(x)) for x in singles],
    "jnp, loop": lambda: [jax.block_until_ready(JNP(x)) for x in singles],
  }
  if torch is not None:
    theirs = [harness.tensor(x) for x in pairs]
    for threads in (1, 2):
      functions[f"torch {threads}, loop"] = lambda threads=threads: [torch_gradient(x, threads) for x in theirs]
  times = harness.time_interleaved(functions, repeats=repeats)
  batched = times["auto, one batched call"][0]
  return [
    {f"{len(pairs)} pairs of {m} x {n}": name, "ms": time[0], "over batched": time[0] / batched}
    for name, time in times.items()
  ]


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--smoke", action="store_true", help="small matrices, a few repeats, no files")
  arguments = parser.parse_args(argv)
  machine = harness.environment("torch")
  if torch is None:
    print("torch is not installed: its columns are left out.")
  shapes, repeats = (((64, 32),), 2) if arguments.smoke else (SHAPES, arguments.repeats)
  rows = [measure_matrix(m, n, spectrum, repeats) for m, n in shapes for spectrum in ("random", "1e3")]
  pairs = measure_pairs(repeats, *((3, 32, 16) if arguments.smoke else ()))
  if arguments.smoke:
    print(harness.markdown_table(rows), harness.markdown_table(pairs), sep="\n\n")
    return
  notes = "\n\n".join([__doc__.split("\n\n", 1)[1].strip(), harness.markdown_table(pairs)])
  harness.report("nuclear_norm", "Nuclear norm: value and gradient", rows, machine | {"pairs": pairs}, notes)


if __name__ == "__main__":
  main()
