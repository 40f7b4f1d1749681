"""Weights in eight bits: a quarter of the file, the arithmetic as before."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.model import Model, PyTree

_FIELDS = {"int8", "scale"}


def int8_weights(model: Model, variables: tuple[PyTree, PyTree]) -> tuple[Model, tuple[PyTree, PyTree]]:
  """Round the matrices of a model to eight bits, each column (or output channel) by a scale of its own.

  What is returned is a model like any other: what it costs is measured as any accuracy is, and it leaves by every way.
  The weights are stored in eight bits; it computes in the floats they are turned back into. Arrays of less than two
  axes (biases, BatchNorm) and what is not float stay.

      w_ij = scale_j round(w_ij / scale_j),    scale_j = max_i |w_ij| / 127

  Args:
    model: any.
    variables: its (params, state).

  Returns:
    The model and its (params, state), in which each matrix is `{"int8": int8 [..., n], "scale": float32 [n]}`.

  Examples:
    >>> model = Model(lambda key, x: ({}, {}), lambda p, s, x, *, train, key=None: (x @ p["w"], s))
    >>> small, (params, _) = int8_weights(model, ({"w": np.array([[1.0, 0.0], [-0.5, 2.54]], np.float32)}, {}))
    >>> params["w"]["int8"].tolist()
    [[127, 0], [-64, 127]]

  Reference: Benoit Jacob, Skirmantas Kligys, Bo Chen, Menglong Zhu, Matthew Tang, Andrew Howard, Hartwig Adam and
  Dmitry Kalenichenko, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
  2017, arXiv 1712.05877. Only the weights, symmetric, and without training.
  """
  params, state = variables

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    params, state = model.init(key, example)
    return _rounded(params), state

  def apply(
    params: PyTree, state: PyTree, batch: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    return model.apply(_restored(params), state, batch, train=train, key=key)

  return Model(init, apply, model.inputs), (_rounded(params), state)


def _rounded(tree: PyTree) -> PyTree:
  if isinstance(tree, Mapping):
    return {name: _rounded(value) for name, value in tree.items()}
  if np.ndim(tree) < 2 or not jnp.issubdtype(tree.dtype, jnp.floating):
    return tree
  weights = np.asarray(tree, np.float32)
  largest = np.abs(weights).max(axis=tuple(range(weights.ndim - 1)), initial=0)
  scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
  return {"int8": np.rint(weights / scale).astype(np.int8), "scale": scale.astype(np.float32)}


def _restored(tree: PyTree) -> PyTree:
  if not isinstance(tree, Mapping):
    return tree
  if set(tree) == _FIELDS:
    # Behind the barrier no compiler folds the constants into floats, which are four times as large.
    return jax.lax.optimization_barrier(jnp.asarray(tree["int8"])).astype(jnp.float32) * tree["scale"]
  return {name: _restored(value) for name, value in tree.items()}
