"""Divided differences of the exponential, which keep their digits however close or far the nodes are."""

import math

import jax
import jax.numpy as jnp


def exp_divided_difference(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
  """Second divided difference of exp: `(exp[x, y] - exp[y, z]) / (x - z)` with `exp[x, y] = (e^x - e^y) / (x - y)`.

  It does not depend on the order of the nodes, is positive, and `e^x / 2` where they are equal. Nodes may be far apart,
  as long as e to the largest is in range.
  """
  low = jnp.minimum(jnp.minimum(x, y), z)
  high = jnp.maximum(jnp.maximum(x, y), z)
  middle = jnp.maximum(jnp.minimum(x, y), jnp.minimum(jnp.maximum(x, y), z))
  near = high - low < 1
  zero = jnp.zeros_like(low)
  by_series = jnp.exp(low) * _series(*(jnp.where(near, node - low, zero) for node in (middle, high)))
  low, middle, high = jnp.where(near, -1, low), jnp.where(near, 0, middle), jnp.where(near, 0, high)
  by_slopes = (jnp.exp(high) * _decline(high - middle) - jnp.exp(middle) * _decline(middle - low)) / (high - low)
  return jnp.where(near, by_series, by_slopes)


def _series(x: jax.Array, y: jax.Array) -> jax.Array:
  """`exp[0, x, y]` for x and y in [0, 1]: the sum over k of `(sum_i x^i y^(k - i)) / (k + 2)!`."""
  power, homogeneous, total = jnp.ones_like(x), jnp.ones_like(x), jnp.full_like(x, 0.5)
  for k in range(1, 9 if x.dtype == jnp.float32 else 17):
    power = power * x
    homogeneous = y * homogeneous + power
    total = total + homogeneous / math.factorial(k + 2)
  return total


@jax.custom_jvp
def _decline(x: jax.Array) -> jax.Array:
  """`(1 - e^-x) / x` for x >= 0, 1 at 0."""
  positive = x > 0
  return jnp.where(positive, -jnp.expm1(-x) / jnp.where(positive, x, 1), 1)


@_decline.defjvp
def _decline_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  near = x < 0.5
  terms = range(1, 10 if x.dtype == jnp.float32 else 18)
  small = jnp.where(near, x, 0)
  # The derivative of sum_n (-x)^n / (n + 1)!
  series = sum(n * (-1) ** n * small ** (n - 1) / math.factorial(n + 1) for n in terms)
  large = jnp.where(near, 1, x)
  return _decline(x), jnp.where(near, series, (jnp.exp(-large) - _decline(large)) / large) * dx
