"""Functions whose values and derivatives stay finite, and keep their digits, where the plain ones do not."""

import functools

import jax
import jax.numpy as jnp


def safe_sqrt(x: jax.Array) -> jax.Array:
  """Square root whose derivatives are 0 where x <= 0, and so is the value; NaN stays NaN."""
  vanishes = x <= 0
  # Both sides of the selection must be finite in every derivative: where it vanishes the root is taken of 1.
  return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, x)))


def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Quotient that is 0, with derivative 0, where the denominator is 0."""
  nonzero = denominator != 0
  return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


def huber(x: jax.Array, delta: float | jax.Array = 1.0) -> jax.Array:
  """`x^2 / 2` up to delta, `delta |x| - delta^2 / 2` from there on; small x keep their digits in the derivative.

  Written as a minimum and a rest, as usual, the derivative is that of the line and a difference of the two.
  """
  distance = jnp.abs(x)
  return jnp.where(distance < delta, jnp.square(x) / 2, delta * (distance - delta / 2))


@jax.custom_jvp
def log1p_remainder(x: jax.Array) -> jax.Array:
  """`x - log(1 + x)`, about x^2 / 2 near 0, where the difference would lose all digits and so would its derivative."""
  near = jnp.abs(x) < 0.25
  small = jnp.where(near, x, 0)
  ratio = small / (2 + small)  # log(1 + x) = 2 artanh(ratio), and x - 2 ratio = x^2 / (2 + x)
  square, series = ratio * ratio, jnp.zeros_like(x)
  for odd in range(21, 1, -2):
    series = 2 / odd + square * series
  return jnp.where(near, small * ratio - ratio * square * series, x - jnp.log(1 + x))


@log1p_remainder.defjvp
def _log1p_remainder_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  return log1p_remainder(x), x / (1 + x) * dx


def divergence_terms(p: jax.Array, q_minus_p: jax.Array, epsilon: jax.Array) -> jax.Array:
  """Terms of `sum_j p_j log((p_j + e) / (q_j + e))` for p and q of one sum, with its digits where p and q are close.

  With `w = (q + e) / (p + e) - 1` a term is `-p log(1 + w) = p (w - log(1 + w)) + e w + (p - q)`. The last part is left
  out: it is larger than the result where p and q are close, and over j it sums to 0.
  """
  change = q_minus_p / (p + epsilon)
  return p * log1p_remainder(change) + epsilon * change


def log_one_plus_sum_exp(x: jax.Array) -> jax.Array:
  """`log(1 + sum_j exp(x_j))` over the last axis; where every x is far below 0, all digits are in the sum."""
  largest = jax.lax.stop_gradient(x.max(axis=-1, initial=0))
  others = jnp.exp(x - largest[..., None]).sum(axis=-1)
  return largest + jnp.log1p(jnp.expm1(-largest) + others)


@jax.custom_jvp
def exp_remainder(x: jax.Array) -> jax.Array:
  """`e^x - 1 - x` for |x| <= 1 by its series: about x^2 / 2 near 0, where the difference would lose all digits."""
  series = jnp.zeros_like(x)
  for n in range(11 if x.dtype == jnp.float32 else 19, 1, -1):
    series = (1 + series) * (x / n)
  return series * x


@exp_remainder.defjvp
def _exp_remainder_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  remainder = exp_remainder(x)
  return remainder, (x + remainder) * dx


def l2_normalize(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
  """x / ||x|| in float32 or wider, whatever the scale of x; a zero vector stays zero and gets no gradient."""
  x = x.astype(jnp.result_type(x.dtype, jnp.float32))
  x = in_own_units(x, axis)
  return safe_divide(x, _norm(axis, x))


def in_own_units(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
  """x over a power of two about as large as it, which rounds nothing and keeps powers of x in the range of the dtype.

  What does not depend on the scale of x stays what it was, and so do its derivatives: the power of two has none.
  """
  return x / power_of_two(jnp.sum(jnp.abs(x), axis=axis, keepdims=True))


def power_of_two(scale: jax.Array) -> jax.Array:
  """The power of two next below a scale, 1 for 0; without a derivative."""
  scale = jax.lax.stop_gradient(scale)
  return jax.lax.reduce_precision(jnp.where(scale > 0, scale, 1), jnp.finfo(scale.dtype).nexp, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(axis: int | tuple[int, ...], x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))


@_norm.defjvp
def _norm_jvp(axis, primals, tangents):
  norm = _norm(axis, *primals)
  return norm, jnp.sum(safe_divide(primals[0], norm) * tangents[0], axis=axis, keepdims=True)


def not_before(x: jax.Array, done: jax.Array) -> jax.Array:
  """x, known only once `done` is, which broadcasts against it: a zero that depends on `done` is added.

  Batched LAPACK calls that XLA runs side by side on two cores can wait for each other for ever (jaxlib 0.10); an
  optimization barrier is gone by the time they are scheduled.
  """
  done = jax.lax.stop_gradient(done).astype(x.dtype)
  return x + jnp.where(jnp.isfinite(done), 0 * done, 0)
