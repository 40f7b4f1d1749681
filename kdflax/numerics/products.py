"""Matrix products at full precision, and differences of Gram matrices that keep their digits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


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
  (rows,), (tangent,) = primals, tangents
  half = jnp.matmul(tangent, rows.T, precision=jax.lax.Precision.HIGHEST)
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


def gram_difference_half_tangent(
  primals: Sequence[jax.Array], tangents: Sequence[jax.Array | SymbolicZero]
) -> jax.Array:
  """`dx x' - dy y'` of the sides that move; the tangent of `gram_difference` is that and its transpose."""
  signed = zip((1, -1), primals, tangents, strict=True)
  halves = [sign * inner_products(tangent, x) for sign, x, tangent in signed if not isinstance(tangent, SymbolicZero)]
  return sum(halves[1:], start=halves[0])
