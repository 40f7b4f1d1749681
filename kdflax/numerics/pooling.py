"""Adaptive average pooling of channels-last maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


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
      pooled = jnp.tensordot(x, _pooling_matrix(n, m).astype(x.dtype), axes=(axis, 1), precision="highest")
      x = jnp.moveaxis(pooled, -1, axis)
  return x


def _pooling_matrix(n: int, m: int) -> jax.Array:
  index = jnp.arange(m)[:, None]
  inside = (jnp.arange(n) >= index * n // m) & (jnp.arange(n) < -(-(index + 1) * n // m))
  return inside / inside.sum(1, keepdims=True)


def pool_to_common_size(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Pools each spatial axis of the larger map to the smaller; maps are `[batch, ..., channels]`."""
  sizes = tuple(min(pair) for pair in zip(first.shape[1:-1], second.shape[1:-1], strict=True))
  return adaptive_average_pool(first, sizes), adaptive_average_pool(second, sizes)


def pool_to_at_most(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
  """Pools each spatial axis that is longer than its size to it; a shorter one stays."""
  return adaptive_average_pool(x, tuple(min(pair) for pair in zip(x.shape[1:-1], sizes, strict=True)))
