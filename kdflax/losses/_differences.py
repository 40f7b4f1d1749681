"""What squared distances from a Gram matrix have lost to rounding, for rows that are close to each other."""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


@custom_vmap
def lost_to_rounding(
  rows: jax.Array, others: jax.Array, distinct: jax.Array, squared: jax.Array, scale: jax.Array
) -> jax.Array:
  """What is missing from squared distances that were taken as differences of terms of size `scale`.

  0 unless two distinct rows are closer than a sixteenth of their length: then the distances are taken again as sums of
  squared differences, several times the work of the Gram matrix. Equal rows alone, as an example that was drawn twice,
  do not ask for that. Without a derivative.

  Args:
    rows: `[..., n, d]`.
    others: `[..., m, d]`.
    distinct: bool `[..., n, m]`, which pairs matter.
    squared: `[..., n, m]`, the squared distances so far.
    scale: `[..., n, m]`, the sum of the squared lengths.

  Returns:
    `[..., n, m]`, to be added.
  """
  close = distinct & (squared < scale / 256)
  equal = (squared < 16 * jnp.finfo(squared.dtype).eps * scale) & _same_signature(rows, others)
  again = lambda: _sums_of_squared_differences(rows, others, squared) - squared
  return jax.lax.cond((close & ~equal).any(), again, lambda: jnp.where(equal, -squared, 0))


@lost_to_rounding.def_vmap
def _(axis_size, in_batched, *arguments):
  """A leading axis more, so that the branches stay branches."""
  stack = lambda x: jnp.broadcast_to(x, (axis_size, *x.shape))
  arguments = [x if batched else stack(x) for x, batched in zip(arguments, in_batched, strict=True)]
  return lost_to_rounding(*arguments), True


def _same_signature(rows: jax.Array, others: jax.Array) -> jax.Array:
  """Whether two weighted sums agree to the last bit, as they do for equal rows and for hardly any others."""
  weights = jnp.cos(jnp.arange(rows.shape[-1], dtype=rows.dtype))
  signature = lambda x: ((x * weights).sum(axis=-1), (x * jnp.flip(weights)).sum(axis=-1))
  pairs = zip(signature(rows), signature(others), strict=True)
  first, second = (a[..., :, None] == b[..., None, :] for a, b in pairs)
  return first & second


def _sums_of_squared_differences(rows: jax.Array, others: jax.Array, like: jax.Array) -> jax.Array:
  """`sum_d (rows_nd - others_md)^2` like `like`, over a few d at a time: nothing of shape [n, m, d] is held."""
  add = lambda total, column: (total + jnp.square(column[0][..., :, None] - column[1][..., None, :]), None)
  columns = jnp.moveaxis(rows, -1, 0), jnp.moveaxis(others, -1, 0)
  return jax.lax.scan(add, 0 * like, columns, unroll=8)[0]
