"""Numerically safe pieces that several losses share."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def safe_sqrt(x: jax.Array) -> jax.Array:
  """Square root whose derivatives are 0 where x <= 0, and so is the value; NaN stays NaN."""
  vanishes = x <= 0
  # Both sides of the selection must be finite in every derivative: where it vanishes the root is taken of 1.
  return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, x)))


def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Quotient that is 0, with derivative 0, where the denominator is 0."""
  nonzero = denominator != 0
  return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


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
  """x / ||x||, whatever the scale of x; a zero vector stays zero and gets no gradient."""
  return safe_divide(x, _norm(axis, x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(axis: int | tuple[int, ...], x: jax.Array) -> jax.Array:
  # A power of two about as large as x takes the scale out of the squares, without rounding.
  scale = jax.lax.reduce_precision(jnp.sum(jnp.abs(x), axis=axis, keepdims=True), jnp.finfo(x.dtype).nexp, 0)
  scale = jnp.where(scale > 0, scale, 1)
  return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale), axis=axis, keepdims=True))


@_norm.defjvp
def _norm_jvp(axis, primals, tangents):
  norm = _norm(axis, *primals)
  return norm, jnp.sum(safe_divide(primals[0], norm) * tangents[0], axis=axis, keepdims=True)


def after(x: jax.Array, done: jax.Array) -> jax.Array:
  """x, known only once `done` is, which broadcasts against it: a zero that depends on `done` is added.

  Batched LAPACK calls that XLA runs side by side on two cores can wait for each other for ever (jaxlib 0.10); an
  optimization barrier is gone by the time they are scheduled.
  """
  done = jax.lax.stop_gradient(done).astype(x.dtype)
  return x + jnp.where(jnp.isfinite(done), 0 * done, 0)


def inner_products(rows: jax.Array, others: jax.Array) -> jax.Array:
  """`[b, d], [B, d] -> [b, B]` at full precision: accelerators would round the operands to bf16 by default."""
  if rows is others:
    return _gram(rows)
  return jnp.matmul(rows, others.T, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _gram(rows: jax.Array) -> jax.Array:
  """Inner products of rows with each other; knowing that both sides move alike saves a product in the backward pass."""
  return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


@_gram.defjvp
def _gram_jvp(primals, tangents):
  (rows,), (moved,) = primals, tangents
  half = jnp.matmul(moved, rows.T, precision=jax.lax.Precision.HIGHEST)
  return _gram(rows), half + half.T


@jax.custom_jvp
def gram_difference(x: jax.Array, y: jax.Array) -> jax.Array:
  """`x x' - y y'` of `[n, d]`, taken as `(x + y) (x - y)'` and its transpose halved, so that nothing large cancels."""
  plus, minus = x + y, x - y
  half = inner_products(plus, minus)
  # To read a large matrix by columns takes a CPU longer than short products do.
  transpose = half.T if x.shape[1] >= x.shape[0] else inner_products(minus, plus)
  return (half + transpose) / 2


def _gram_difference_jvp(primals, tangents):
  half = gram_difference_half_tangent(primals, tangents)
  return gram_difference(*primals), half + half.T


gram_difference.defjvp(_gram_difference_jvp, symbolic_zeros=True)


def gram_difference_half_tangent(primals: Sequence[jax.Array], tangents: Sequence[jax.Array | SymbolicZero]):
  """`dx x' - dy y'` of the sides that move; the tangent of `gram_difference` is that and its transpose."""
  signed = zip((1, -1), primals, tangents, strict=True)
  halves = [sign * inner_products(moved, x) for sign, x, moved in signed if not isinstance(moved, SymbolicZero)]
  return sum(halves[1:], start=halves[0])


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
