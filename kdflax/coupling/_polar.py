"""The polar factor of tall matrices, five ways: by SVD, by the Gram matrix, by iteration, in closed form, and the best.

Each takes a batch of matrices `X [..., m, n]`, `m >= n`, of entries at most about 1, and the smoothing `mu [...]`;
`smoothed` is False where mu is known to be 0.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_MAX_REFINEMENTS = 16
_MAX_CALLS = 64  # of LAPACK for one batch: each takes its part of the time to compile


class Polar(NamedTuple):
  """`value [...]`, and its derivatives in the matrix, `factor [..., m, n]`, and in the smoothing, `slope [...]`."""

  value: jax.Array
  factor: jax.Array
  slope: jax.Array


def tolerance(x: jax.Array) -> float:
  """Relative to the largest singular value; rounding errors add up like a random walk."""
  return 2 * math.sqrt(max(x.shape[-2:])) * float(jnp.finfo(x.dtype).eps)


def _from_spectrum(s_squared: jax.Array, h: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`h - mu` and `1 - mu / h` of `h = sqrt(s^2 + mu^2)`, without the difference that cancels."""
  mu = mu[..., None]
  value = s_squared / jnp.where(h > 0, h + mu, 1)
  return value, value / jnp.where(h > 0, h, 1)


def _vector(x: jax.Array, mu: jax.Array, smoothed: bool) -> Polar:
  """In closed form, for a single column."""
  s_squared = jnp.sum(x * x, -2)
  h = jnp.sqrt(s_squared + mu[..., None] ** 2)
  value, slope = _from_spectrum(s_squared, h, mu)
  return Polar(value[..., 0], x / jnp.where(h > 0, h, 1)[..., None], -slope[..., 0])


def _by_svd(x: jax.Array, mu: jax.Array, smoothed: bool) -> Polar:
  """From the singular vectors, without those of values that are rounding."""
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  h = jnp.hypot(s, mu[..., None])
  keep = h > tolerance(x) * jnp.max(h, -1, keepdims=True)
  value, slope = _from_spectrum(s * s, h, mu)
  weight = jnp.where(keep, s / jnp.where(keep, h, 1), 0)
  return Polar(jnp.sum(value, -1), matmul(u * weight[..., None, :], vt), -jnp.sum(slope, -1))


def _by_gram(x: jax.Array, mu: jax.Array, smoothed: bool) -> Polar:
  """From the eigenvectors of X'X, refined where squaring has cost digits."""
  h_squared, v = _eigenbasis(matmul(x.mT, x))
  s_squared = jnp.maximum(h_squared, 0)
  h_squared = s_squared + mu[..., None] ** 2
  # 256 eps: below it the rounding of X'X is not worth a second look.
  benign = jnp.min(h_squared, -1) > jnp.max(h_squared, -1) / 256

  def accept():
    h = jnp.sqrt(h_squared)
    value, slope = _from_spectrum(s_squared, h, mu)
    factor = matmul(x, matmul(v / h[..., None, :], v.mT))
    return Polar(jnp.sum(value, -1), factor, -jnp.sum(slope, -1))

  return jax.lax.cond(jnp.all(benign), accept, lambda: _refine(x, v, mu, smoothed))


def _eigenbasis(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues and eigenvectors; on a CPU by one call for each matrix of a batch, which XLA runs side by side.

  Most times jaxlib 0.10 takes the matrices of a batched call one after the other.
  """
  eigh = functools.partial(jnp.linalg.eigh, symmetrize_input=False)
  batch, side = gram.shape[:-2], gram.shape[-1]
  if not 2 <= math.prod(batch) <= _MAX_CALLS:
    return eigh(gram)

  def side_by_side(gram):
    values, vectors = zip(*(eigh(matrix) for matrix in gram.reshape(-1, side, side)), strict=True)
    return jnp.stack(values).reshape(*batch, side), jnp.stack(vectors).reshape(gram.shape)

  return jax.lax.platform_dependent(gram, cpu=side_by_side, default=lambda gram: tuple(eigh(gram)))


def _refine(x: jax.Array, v: jax.Array, mu: jax.Array, smoothed: bool) -> Polar:
  """The polar factor from an approximate eigenbasis v of X'X.

  The columns of X V are close to orthogonal relative to their own lengths h, however different these are. So
  `V'H^2 V = D (I + F) D`, D = diag(h), and `C = V'H V D^-1` solves `C'C = I + F` with C D symmetric. Newton's step,
  `C_ij += R_ij h_i / (h_i + h_j)` for the residual R, divides by sums only: clusters of singular values do no harm.
  """
  identity = jnp.eye(x.shape[-1], dtype=x.dtype)

  # 1. The columns of X V, their lengths h, and those that are more than rounding.
  y = matmul(x, v)
  s_squared = jnp.sum(y * y, -2)
  h = jnp.sqrt(s_squared + mu[..., None] ** 2)
  keep = h > tolerance(x) * jnp.max(h, -1, keepdims=True)
  weight = jnp.where(keep, 1 / jnp.where(keep, h, 1), 0)

  # 2. I + F, the products of the unit columns, and C by Newton's steps.
  w = y * weight[..., None, :]
  target = jnp.where(identity > 0, identity, matmul(w.mT, w))
  share = jnp.where(keep, h, 1)
  share = share[..., :, None] / (share[..., :, None] + share[..., None, :])
  start = jnp.broadcast_to(identity, target.shape)
  c, size = _settle(start, lambda c: target - matmul(c.mT, c), lambda c, r: c + r * share)

  # 3. C^-1, which makes the factor `W C^-1 V'`, if both iterations have settled.
  inverse, remainder = _inverse(c, 2 * identity - c)
  ok = jnp.all(jnp.maximum(size, remainder) <= 4 * _settled(c))

  def solved():
    extra = jnp.diagonal(c, axis1=-2, axis2=-1) - 1
    extra_inverse = jnp.diagonal(inverse, axis1=-2, axis2=-1) - 1
    value, slope = _from_spectrum(s_squared, h, mu)
    value = jnp.sum(value + extra * h, -1)
    slope = jnp.sum(slope - mu[..., None] * extra_inverse * weight, -1)
    return Polar(value, matmul(w, matmul(inverse, v.mT)), -slope)

  # 4. Else by iteration, on what is more than rounding.
  def iterated():
    kept_v = v * keep[..., None, :].astype(x.dtype)
    polar = _by_newton_schulz(matmul(matmul(x, kept_v), v.mT), mu, smoothed, floor=tolerance(x))
    return polar._replace(factor=matmul(matmul(polar.factor, kept_v), v.mT))

  return jax.lax.cond(ok, solved, iterated)


def _inverse(matrix: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The inverse by Newton's iteration from a start, and the largest entry of what is left, `|I - matrix inverse|`.

  Not by LAPACK: in jaxlib 0.10 two batched triangular solves that XLA runs side by side on two cores wait for each
  other for ever.
  """
  identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
  return _settle(start, lambda z: identity - matmul(matrix, z), lambda z, r: z + matmul(z, r))


def _settled(matrix: jax.Array) -> float:
  """Largest entry of a residual of products `[n, n]` that is rounding."""
  return 2 * math.sqrt(matrix.shape[-1]) * float(jnp.finfo(matrix.dtype).eps)


def _settle(start: jax.Array, residual: Callable, move: Callable) -> tuple[jax.Array, jax.Array]:
  """Repeats `x <- move(x, residual(x))` until the residual is rounding: x, and the residual's largest entry."""

  def measured(x):
    r = residual(x)
    return x, r, jnp.max(jnp.abs(r), (-2, -1))

  def unsettled(carry):
    (_, _, size), count = carry
    return (count < _MAX_REFINEMENTS) & jnp.any(size > _settled(start))

  def step(carry):
    (x, r, _), count = carry
    return measured(move(x, r)), count + 1

  (x, _, size), _ = jax.lax.while_loop(unsettled, step, (measured(start), 0))
  return x, size


def _by_newton_schulz(x: jax.Array, mu: jax.Array, smoothed: bool, floor: float | None = None) -> Polar:
  """The polar factor of `[X; mu I]`: odd polynomials of it, whose number the floor fixes, take singular values to 1."""
  identity = jnp.eye(x.shape[-1], dtype=x.dtype)
  gram = lambda blocks: sum(matmul(block.mT, block) for block in blocks)

  # 1. Odd polynomials of `[X; mu I]`, scaled so that no singular value is above 1.
  def step(blocks, coefficients):
    linear, cubic, quintic = coefficients
    squares = gram(blocks)
    lift = linear * identity + matmul(squares, cubic * identity + quintic * squares)
    return [matmul(block, lift) for block in blocks], None

  blocks = [x, mu[..., None, None] * identity] if smoothed else [x]
  # ||B'B||_F^(1/2) lies between s_1 and n^(1/4) s_1: tighter than ||B||_F.
  largest = jnp.sqrt(jnp.linalg.norm(gram(blocks), axis=(-2, -1)))[..., None, None]
  largest = jnp.where(largest > 0, largest, 1)
  eps = float(jnp.finfo(x.dtype).eps)
  polynomials = jnp.asarray(_polynomials(eps, eps**0.6 if floor is None else floor), x.dtype)
  (top, *bottom), _ = jax.lax.scan(step, [block / largest for block in blocks], polynomials)

  # 2. The value and its slope in mu, from the two blocks of the factor.
  if not smoothed:
    return Polar(jnp.sum(top * x, (-2, -1)), top, -jnp.sum(top * top, (-2, -1)))
  # tr(I - mu H^-1) = tr((I + mu H^-1)^-1 factor'factor): exact near zero, where the difference would cancel. The
  # eigenvalues of I + mu H^-1 lie in [1, 2]: Chebyshev's start is within 1/17.
  shifted = identity + bottom[0]
  inverse, _ = _inverse(shifted, (24 * identity - 8 * shifted) / 17)
  slope = jnp.sum(inverse * matmul(top.mT, top), (-2, -1))
  return Polar(jnp.sum(top * x, (-2, -1)) - mu * slope, top, -slope)


@functools.cache
def _polynomials(eps: float, floor: float) -> np.ndarray:
  """Coefficients of s, s^3, s^5, `[steps, 3]`, that one after the other lift [floor, 1] to 1.

  Each is the best for the range that the one before leaves, but made for [0.1, 1] at the widest: the best one for a
  wider range throws the largest singular values back to its lower end, and their vectors with them.
  """
  taylor = np.array([15, -10, 3]) / 8  # leaves the third power of what is missing
  apply = lambda p, s: p[0] * s + p[1] * s**3 + p[2] * s**5
  polynomials, lower = [], floor
  while 1 - lower > np.cbrt(eps) / 2:
    if lower > 0.9:
      p = taylor
    else:
      p, error = _best_polynomial(max(lower, 0.1))
      p = p / (1 + error) / 1.001  # nothing leaves [0, 1], above which rounding would grow ninefold each time
    lower = min(apply(p, lower), apply(p, 1.0))
    polynomials.append(p)
  return np.array([*polynomials, taylor])


def _best_polynomial(lower: float) -> tuple[np.ndarray, float]:
  """The odd polynomial of degree 5 nearest to 1 on [lower, 1], and its largest distance, by Remez' exchange."""
  inner = lower + (1 - lower) * np.array([0.25, 0.75])
  best = np.zeros(4)  # three coefficients and the distance
  for _ in range(20):
    s = np.array([lower, *inner, 1.0])
    best = np.linalg.solve(np.stack([s, s**3, s**5, [1, -1, 1, -1]], axis=1), np.ones(4))
    inner = np.sqrt(np.sort(np.roots([5 * best[2], 3 * best[1], best[0]])))  # where the slope is 0
  return best[:3], float(best[3])


def _auto(x: jax.Array, mu: jax.Array, smoothed: bool) -> Polar:
  """What is fastest on the platform that the program is compiled for."""
  on_cpu, elsewhere = (functools.partial(method, smoothed=smoothed) for method in (_on_cpu, _by_newton_schulz))
  return jax.lax.platform_dependent(x, mu, cpu=on_cpu, default=elsewhere)


def _on_cpu(x: jax.Array, mu: jax.Array, smoothed: bool) -> Polar:
  """By the Gram matrix; if X is about square by iteration, which is faster there, unless the rank is in doubt."""
  if smoothed or 4 * x.shape[-2] > 5 * x.shape[-1]:
    return _by_gram(x, mu, smoothed)
  polar = _by_newton_schulz(x, mu, smoothed)
  residual = jnp.eye(x.shape[-1], dtype=x.dtype) - matmul(polar.factor.mT, polar.factor)
  settled = jnp.all(jnp.abs(residual) <= 4 * _settled(x))
  return jax.lax.cond(settled, lambda: polar, lambda: _by_gram(x, mu, smoothed))


_BY_NAME = {"auto": _auto, "svd": _by_svd, "gram": _by_gram, "newton_schulz": _by_newton_schulz, "vector": _vector}
METHODS = tuple(name for name in _BY_NAME if name != "vector")


@functools.cache
def by(method: str, smoothed: bool) -> Callable[[jax.Array, jax.Array], Polar]:
  """The method with `vmap` turned into a leading axis, so that its branches stay branches."""
  polar = custom_vmap(jax.jit(lambda x, mu: _BY_NAME[method](x, mu, smoothed)))  # jit: called eagerly, it compiles once

  @polar.def_vmap
  def _(axis_size, in_batched, x, mu):
    x, mu = (
      a if batched else jnp.broadcast_to(a, (axis_size, *a.shape))
      for a, batched in zip((x, mu), in_batched, strict=True)
    )
    result = polar(x, mu)
    return result, jax.tree.map(lambda _: True, result)

  return polar
