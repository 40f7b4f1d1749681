"""Low-rank students: a model that stays as it is, and small factors that are added to its kernels and learn."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kdflax.model import Model, Outputs, PyTree
from kdflax.models.decoder import FactoredModel
from kdflax.models.layers import Dtype, check_widths
from kdflax.numerics.trees import name_of, nest_names

_FACTORS = ("down", "up")
_VECTORS = ("bias", "scale")  # also where there is one for each layer, which makes two axes


def low_rank_adapters(
  model: Model,
  pattern: str,
  rank: int,
  *,
  base: str = "base",
  scale: float = 1.0,
  dtype: Dtype = jnp.float32,
) -> Model:
  """Make a student of a frozen model: low-rank additions to some of its kernels, which are all that is learned.

    W + scale down up,   down [inputs, rank], up [rank, outputs]

  The frozen model is one of the context's, under the name `base`: its params are read from there, so that they are in
  no checkpoint and no optimizer, and a student of a teacher of the same size shares the teacher's:

      student = models.low_rank_adapters(read.model, "attention/(query|value)", 8, base="teacher")
      learner = training.make_learner({"teacher": read.model, "student": student}, terms, optimizer)
      state = learner.init(key, batch, frozen={"teacher": read.variables})

  `down` starts normal with variance 1 / inputs, `up` at 0, so the student starts as the model is. A decoder multiplies
  by one factor after the other; for any other model the sum is made first, in the dtype of the kernel.

  Args:
    model: a network, which reads the batch.
    pattern: regular expression searched in paths such as `layers/attention/query/kernel`. Of what it finds arrays with
      two axes or more take part, biases and scales of norms aside; the last two axes are those of the matrix, any
      before count matrices.
    rank: of the addition.
    base: the name under which the frozen model stands in the context.
    scale: of the addition; alpha / rank where a paper names alpha.
    dtype: of the factors.

  Returns:
    A model that reads the batch and the params of the frozen one, with the same outputs. Its params are the factors.

  Raises:
    ValueError: if the model reads something else than the batch or the rank is below 1; from `init`, if the pattern
      finds no matrix.

  Reference: Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang and Weizhu
  Chen, "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685.
  """
  if model.inputs != "batch":
    raise ValueError(f"low_rank_adapters takes a network, which reads the batch; this model reads {model.inputs!r}")
  check_widths(rank=[rank])

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    batch, params = example
    kernels = _found(params, pattern)
    factors = {}
    for name, own in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
      *stack, inputs, outputs = kernels[name].shape
      factors[f"{name}/down"] = jax.random.normal(own, (*stack, inputs, rank), dtype) / jnp.sqrt(inputs).astype(dtype)
      factors[f"{name}/up"] = jnp.zeros((*stack, rank, outputs), dtype)
    state = jax.eval_shape(model.init, key, batch)[1]
    return nest_names(factors), model.init(key, batch)[1] if jax.tree.leaves(state) else state

  def apply(
    params: PyTree, state: PyTree, inputs: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Outputs, PyTree]:
    batch, kernels = inputs
    joined = _beside(kernels, params, scale) if isinstance(model, FactoredModel) else None
    joined = merge_low_rank(kernels, params, scale=scale) if joined is None else joined
    return model.apply(joined, state, batch, train=train, key=key)

  return Model(init, apply, ("batch", f"params.{base}"))


def merge_low_rank(params: PyTree, factors: PyTree, *, scale: float = 1.0) -> PyTree:
  """Add what a low-rank student has learned to the params of its frozen model, as to export or to save it.

  Args:
    params: of the frozen model.
    factors: params of the student, of `low_rank_adapters`.
    scale: what that was given.

  Returns:
    Params of the frozen model's structure and dtypes; sums are made in float32 or wider.

  Raises:
    ValueError: if there are factors for what the params do not have, or of another shape.

  Examples:
    >>> factors = {"dense": {"kernel": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 3))}}}
    >>> print(merge_low_rank({"dense": {"kernel": jnp.zeros((2, 3))}}, factors, scale=2.0)["dense"]["kernel"])
    [[2. 2. 2.]
     [2. 2. 2.]]
  """
  pairs = _pairs(factors)
  _check(params, pairs)

  def merged(path: tuple[Any, ...], kernel: jax.Array) -> jax.Array:
    if (name := name_of(path)) not in pairs:
      return kernel
    down, up = pairs[name]
    kind = jnp.promote_types(jnp.promote_types(kernel.dtype, down.dtype), jnp.float32)
    product = jnp.matmul(down.astype(kind), up.astype(kind), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(kind) + scale * product).astype(kernel.dtype)

  return jax.tree.map_with_path(merged, params)


def _beside(params: PyTree, factors: PyTree, scale: float) -> PyTree:
  """The params with factors beside kernels; what is no kernel is merged."""
  pairs = _pairs(factors)
  _check(params, pairs)
  leaves = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  for name, (down, up) in pairs.items():
    place = name.removesuffix("/kernel")
    if place != name:
      leaves |= {f"{place}/down": down, f"{place}/up": scale * up}
  merged = {name: {"down": pair[0], "up": pair[1]} for name, pair in pairs.items() if not name.endswith("/kernel")}
  return merge_low_rank(nest_names(leaves), nest_names(merged), scale=scale) if merged else nest_names(leaves)


def _pairs(factors: PyTree) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Factors by the path of their kernel."""
  if not isinstance(factors, Mapping):
    raise ValueError(f"factors must be the params of low_rank_adapters, a dict; got {type(factors).__name__}")
  leaves = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(factors)}
  names = sorted({name.rpartition("/")[0] for name in leaves})
  if leaves.keys() != {f"{name}/{part}" for name in names for part in _FACTORS}:
    raise ValueError(f"factors must be the params of low_rank_adapters, down and up of each kernel; got {list(leaves)}")
  return {name: (leaves[f"{name}/down"], leaves[f"{name}/up"]) for name in names}


def _check(params: PyTree, pairs: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
  shapes = {name_of(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
  for name, (down, up) in pairs.items():
    if name not in shapes:
      raise ValueError(f"there are factors for {name}, which the params do not have: {sorted(shapes)}")
    if (*down.shape[:-1], up.shape[-1]) != shapes[name]:
      raise ValueError(f"factors of shapes {down.shape} and {up.shape} do not fit {name} of shape {shapes[name]}")


def _found(params: PyTree, pattern: str) -> dict[str, Any]:
  """The matrices that a pattern finds among the params, by name."""
  leaves = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  is_matrix = lambda name, leaf: leaf.ndim >= 2 and name.rpartition("/")[2] not in _VECTORS
  matrices = {name: leaf for name, leaf in leaves.items() if is_matrix(name, leaf)}
  found = {name: leaf for name, leaf in matrices.items() if re.search(pattern, name)}
  if not found:
    raise ValueError(f"pattern={pattern!r} matches none of {list(matrices)}")
  return found
