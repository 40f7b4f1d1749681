"""Computing in half precision, with everything that is kept in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kdflax.model import Model, PyTree


def computing_in(model: Model, dtype: DTypeLike | None) -> Model:
  """A model that computes in another floating-point type than its params are kept in.

  Its params and what it reads are cast on the way in, but for numbers without an axis (a temperature); what it says is
  float32 again, so that losses, optimizers, averages and checkpoints see no difference, and gradients arrive in the
  type of the params. Its state keeps its type, as running statistics in bfloat16 would stand still: a layer that mixes
  its state in, as BatchNorm does, goes on in the wider type unless it has a `dtype` of its own. A model without params
  (a memory, recorded outputs) is left as it is.

  Args:
    model: any.
    dtype: `jnp.bfloat16`, say; None for the model as it is. float16 overflows at 65504, and nothing here scales losses.

  Returns:
    A model of the same params and state.

  Raises:
    ValueError: if the dtype is not floating point.
  """
  if dtype is None:
    return model
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"models compute in a floating-point type, such as bfloat16; got {jnp.dtype(dtype)}")

  def apply(
    params: PyTree, state: PyTree, inputs: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    if not jax.tree.leaves(params):
      return model.apply(params, state, inputs, train=train, key=key)
    said, moved = model.apply(_cast(params, dtype), state, _cast(inputs, dtype), train=train, key=key)
    kept = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), moved, state)
    return _cast(said, jnp.float32), kept

  return model._replace(apply=apply)


def _cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
  """Arrays of numbers in another type; integers, keys, masks and single numbers as they are."""
  is_cast = lambda leaf: jnp.ndim(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if is_cast(leaf) else leaf, tree)
