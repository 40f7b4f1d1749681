"""Adaptive average pooling of channels-last maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdflax.numerics.safe import safe_divide


def adaptive_average_pool(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
  """Averages axes 1, 2, ... of a channels-last map to the given sizes.

  Output i of m over n inputs averages the window [floor(i n / m), ceil((i + 1) n / m)); windows overlap where m does
  not divide n.
  """
  for axis, m in enumerate(sizes, start=1):
    n = x.shape[axis]
    if n % m == 0:  # windows of one size side by side: no matrix is needed
      x = x.reshape(*x.shape[:axis], m, n // m, *x.shape[axis + 1 :]).mean(axis + 1)
    else:
      pooled = jnp.tensordot(
        x, _pooling_matrix(n, m).astype(x.dtype), axes=(axis, 1), precision=jax.lax.Precision.HIGHEST
      )
      x = jnp.moveaxis(pooled, -1, axis)
  return x


def masked_average_pool(
  x: jax.Array, sizes: tuple[int, ...], where: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Averages the positions of a window that count, and says which windows have any.

  Args:
    x: `[batch, ..., channels]`, zeros where masked.
    sizes: as of `adaptive_average_pool`.
    where: None or bool `[batch]`, which is handed back, or bool over the positions `[batch, ...]`.

  Returns:
    The pooled map, 0 for a window without a position that counts, and `where` over the windows.
  """
  pooled = adaptive_average_pool(x, sizes)
  if where is None or jnp.ndim(where) == 1:
    return pooled, where
  share = adaptive_average_pool(jnp.asarray(where, x.dtype)[..., None], sizes)
  return safe_divide(pooled, share), share[..., 0] > 0


def _pooling_matrix(n: int, m: int) -> jax.Array:
  index = jnp.arange(m)[:, None]
  inside = (jnp.arange(n) >= index * n // m) & (jnp.arange(n) < -(-(index + 1) * n // m))
  return inside / inside.sum(1, keepdims=True)


def window_sizes(size: Sequence[int], sizes: Sequence[int]) -> jax.Array:
  """How many positions each window has when a map of one size is pooled to another: of the shape of the latter."""
  counts = jnp.ones(())
  for n, m in zip(size, sizes, strict=True):
    counts = counts[..., None] * jnp.array([-(-(i + 1) * n // m) - i * n // m for i in range(m)])
  return counts


def pool_to_common_size(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Pools each spatial axis of the larger map to the smaller; maps are `[batch, ..., channels]`."""
  sizes = tuple(min(pair) for pair in zip(first.shape[1:-1], second.shape[1:-1], strict=True))
  return adaptive_average_pool(first, sizes), adaptive_average_pool(second, sizes)


def pool_to_at_most(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
  """Pools each spatial axis that is longer than its size to it; a shorter one stays."""
  return adaptive_average_pool(x, tuple(min(pair) for pair in zip(x.shape[1:-1], sizes, strict=True)))
