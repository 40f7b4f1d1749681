"""Squared distances from a Gram matrix, and from differences for rows so close that it has lost their digits."""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from kdflax.numerics.products import inner_products


def squared_distances(
  rows: jax.Array, others: jax.Array, mean: jax.Array, distinct: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Squared Euclidean distances, and what the Gram matrix has them as differences of.

  They come from the Gram matrix unless two distinct rows are closer than about a tenth of their length: then all are
  sums of squared differences, several times the work. Equal rows alone, as an example that was drawn twice, do not ask
  for that.

  Args:
    rows: `[n, d]`.
    others: `[m, d]`, or `rows` itself.
    mean: `[d]`, of the batch: a common offset costs the Gram matrix no digits.
    distinct: bool `[n, m]`, which pairs matter.

  Returns:
    The distances `[n, m]`, 0 where the two are not distinct, and exactly 0, with derivative 0, where they are equal;
    and the sums of squared lengths `[n, m]` after centring.
  """
  centred = rows - mean
  centred_others = centred if others is rows else others - mean
  scale = jnp.square(centred).sum(axis=-1)[:, None] + jnp.square(centred_others).sum(axis=-1)
  squared = scale - 2 * inner_products(centred, centred_others)
  close = distinct & (squared < scale / 256)

  def look_closer():
    equal = (squared < 16 * jnp.finfo(squared.dtype).eps * scale) & _same_signature(rows, others)
    again = lambda: sums_of_squared_differences(rows, others, squared)
    return jax.lax.cond(anywhere(close & ~equal), again, lambda: jnp.where(equal, 0, squared))

  known = jax.lax.cond(anywhere(close), look_closer, lambda: squared)
  return jnp.where(distinct, known, 0), scale


@custom_vmap
def anywhere(x: jax.Array) -> jax.Array:
  """Whether any holds, over all batches of a `vmap` together: so a branch that asks for it stays a branch."""
  return x.any()


@anywhere.def_vmap
def _(axis_size, in_batched, x):
  return anywhere(x), False


def _same_signature(rows: jax.Array, others: jax.Array) -> jax.Array:
  """Whether two weighted sums agree to the last bit, as they do for equal rows and for hardly any others."""
  weights = jnp.cos(jnp.arange(rows.shape[-1], dtype=rows.dtype))
  signature = lambda x: ((x * weights).sum(axis=-1), (x * jnp.flip(weights)).sum(axis=-1))
  pairs = zip(signature(rows), signature(others), strict=True)
  first, second = (a[:, None] == b for a, b in pairs)
  return first & second


def sums_of_squared_differences(rows: jax.Array, others: jax.Array, like: jax.Array) -> jax.Array:
  """`sum_d (rows_nd - others_md)^2` like `like`, over a few d at a time: nothing of shape [n, m, d] is held."""

  @jax.checkpoint
  def add(total, column):
    return total + jnp.square(column[0][:, None] - column[1]), None

  return jax.lax.scan(add, 0 * like, (rows.T, others.T), unroll=8)[0]
