"""Standard scores of vectors and Pearson's correlation, whatever the axis and the devices that a vector lies along."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Reduction = Callable[[jax.Array], jax.Array]


def correlation_distance(
  x: jax.Array, y: jax.Array, count: int | jax.Array, total: Reduction, spread: Reduction
) -> jax.Array:
  """Terms whose sum along the vectors is `1 - rho(x, y)`, none of them negative.

  Args:
    x: an array of vectors.
    y: the shape of `x`.
    count: length of a vector.
    total: adds up each vector.
    spread: brings the result of `total` to a shape that broadcasts with `x`.
  """
  (x, x_varies), (y, y_varies) = (standard_score(each, count, total, spread) for each in (x, y))
  # Two unit vectors: 1 - x . y = |x - y|^2 / 2. Next to a constant, whose score is 0, the distance is 1.
  return jnp.square(x - y) * spread(jnp.where(x_varies & y_varies, 0.5, 1).astype(x.dtype))


def standard_score(
  x: jax.Array, count: int | jax.Array, total: Reduction, spread: Reduction
) -> tuple[jax.Array, jax.Array]:
  """(x - mean) / ||x - mean|| and whether x varies; 0 where it does not."""
  mean = total(x) / count
  centred = x - spread(mean)
  # The mean is rounded: what is left of it makes equal entries equal to 0. That changes nothing to differentiate.
  left = jax.lax.stop_gradient(total(centred) / count)
  square, tolerance = total(jnp.square(centred)) - count * left**2, 4 * jnp.finfo(x.dtype).eps
  varies = square > tolerance**2 * jax.lax.stop_gradient(square + count * mean**2)
  return (centred - spread(left)) * spread(jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, square, 1)), 0)), varies
