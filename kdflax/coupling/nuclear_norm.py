"""The nuclear norm at matmul speed, with the minimum-norm sub-gradient, and its proximal operator.

Everything here works on tall matrices `X = U S V'` of shape `[..., m, n]`, `m >= n`. With `H = (X'X + mu^2 I)^(1/2)`
the smoothed norm is `tr H - n mu`, its gradient is the polar factor `X H^-1`, and its slope in `mu` is `tr(mu H^-1) -
n`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_MAX_REFINEMENTS = 16


class _Polar(NamedTuple):
  """`value [...]`, and its derivatives in the matrix, `factor [..., m, n]`, and in the smoothing, `slope [...]`."""

  value: jax.Array
  factor: jax.Array
  slope: jax.Array


def nuclear_norm(matrix: jax.Array, *, smoothing: float | jax.Array = 0.0, method: str = "auto") -> jax.Array:
  """Sum the singular values of a matrix, smoothed on request.

  The convex surrogate of the rank: as a penalty it drives singular values to exactly zero. On a vector it is the L2
  norm.

      value = sum over min(m, n) of sqrt(s_k^2 + mu^2) - mu          mu = smoothing

  The gradient is `U diag(s / sqrt(s^2 + mu^2)) V'`; without smoothing it is the sub-gradient of least norm, `U_r V_r'`
  over the numerical rank r: singular values not above `2 sqrt(max(m, n)) eps s_1` count as zero. It is 0 at 0, its
  spectral norm is at most 1, and it is finite for every finite matrix of any scale: no SVD or eigendecomposition is
  ever differentiated.

  Methods, n being the smaller side and eps that of the dtype of the computation:
    svd             the reference; the gradient is off by about `eps s_1 / s_r`.
    gram            an eigenbasis V of `X'X`. Its rounding costs `eps (s_1 / s_r)^2`, which is accepted below 256 eps.
                    Above, the columns of `X V` are measured again, and what is left between them is solved for by
                    Newton steps made of n x n products. Beyond a condition of about `1 / sqrt(eps)` (3e3 in float32,
                    7e7 in float64) these do not settle and the part that is kept goes through Newton-Schulz down to the
                    rank tolerance. As accurate as the SVD throughout; two or four products with X, one n x n
                    eigenbasis.
    newton_schulz   products alone, about 30 with X in float32 and 60 in float64: for accelerators. There is no rank
                    decision: a direction below `eps^0.6 s_1` (7e-5 in float32, 4e-10 in float64) gets a weight between
                    0 and 1.
    auto            by the platform that the program is lowered for: `gram` on a CPU, `newton_schulz` elsewhere; so for
                    every shape, dtype and smoothing. Measured by `benchmarks/nuclear_norm.py` on a CPU: `gram` is up to
                    4 times faster than `svd`, 1.1 to 1.3 times for square matrices; only square ones of a condition
                    beyond its Newton steps (3e3 in float32) would gain by `svd`. A single column has a closed form in
                    every method.

  Supported: jit, vmap, forward and reverse mode, also in a traced `smoothing`; second derivatives in any mode, exact
  for smoothing > 0 or full rank, finite elsewhere. Third derivatives raise.

  Args:
    matrix: `[..., m, n]` real; computed in float32 or wider.
    smoothing: `mu >= 0` in the units of the matrix; a scalar or an array that broadcasts to `[...]`; may be traced.
    method: static; one of `auto`, `svd`, `gram`, `newton_schulz`.

  Returns:
    `[...]`, float32 or wider; 0 where a side is empty.

  Raises:
    ValueError: for fewer than two axes, a dtype that is not real floating point, a smoothing whose shape does not
      broadcast, a concrete negative smoothing, or an unknown method.

  Reference: Watson, "Characterization of the subdifferential of some matrix norms", 1992; Nakatsukasa and Higham,
  "Stable and efficient spectral divide and conquer algorithms", 2013; Chen and Chow, "A stable scaling of Newton-Schulz
  for improving the sign function computation of a Hermitian matrix", 2014. Widely used versions return an arbitrary
  orthonormal factor on the null space: of norm `sqrt(min(m, n))` at 0, where this one returns 0.
  """
  if method not in _METHODS:
    raise ValueError(f"nuclear_norm: unknown method {method!r}; choose one of {', '.join(_METHODS)}.")
  matrix = _as_real("nuclear_norm", matrix)
  smoothing = _smoothing_like(matrix, smoothing)
  if 0 in matrix.shape[-2:]:
    return jnp.zeros(matrix.shape[:-2], matrix.dtype)
  if matrix.shape[-2] < matrix.shape[-1]:
    matrix = matrix.mT
  return _norm("vector" if matrix.shape[-1] == 1 else method, matrix, smoothing)


def singular_value_threshold(matrix: jax.Array, threshold: float | jax.Array) -> jax.Array:
  """Shrink every singular value by a threshold and stop at zero: the proximal operator of the nuclear norm.

      argmin_Z  ||Z - X||_F^2 / 2 + threshold ||Z||_*  =  U diag(max(s - threshold, 0)) V'

  The result has as many non-zero singular values as X has above the threshold. Threshold 0 returns X up to rounding.
  The derivative is that of the operator itself, finite for repeated singular values, and not that of an SVD.

  Args:
    matrix: `[..., m, n]` real; computed in float32 or wider.
    threshold: in the units of the matrix, at least 0; a scalar or an array that broadcasts to `[...]`; may be traced.

  Returns:
    `[..., m, n]` in the dtype of `matrix`.

  Raises:
    ValueError: for fewer than two axes, a dtype that is not real floating point, a threshold whose shape does not
      broadcast, or a concrete negative threshold.

  Reference: Cai, Candes and Shen, "A singular value thresholding algorithm for matrix completion", 2008, arXiv
  0810.3286.
  """
  wide = _as_real("singular_value_threshold", matrix)
  threshold = _smoothing_like(wide, threshold, "singular_value_threshold: threshold")
  if 0 in wide.shape:
    return jnp.asarray(matrix)
  tall = wide.mT if wide.shape[-2] < wide.shape[-1] else wide
  shrunk = _threshold(tall, threshold)
  return (shrunk.mT if tall.shape != wide.shape else shrunk).astype(jnp.asarray(matrix).dtype)


def _as_real(name: str, matrix: jax.Array) -> jax.Array:
  matrix = jnp.asarray(matrix)
  if matrix.ndim < 2:
    raise ValueError(
      f"{name}: matrix must be [..., m, n], got shape {matrix.shape}; give a vector as one column [n, 1]."
    )
  if not jnp.issubdtype(matrix.dtype, jnp.floating):
    raise ValueError(f"{name}: matrix must be real floating point, got {matrix.dtype}; convert it first.")
  return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def _smoothing_like(matrix: jax.Array, smoothing, name: str = "nuclear_norm: smoothing") -> jax.Array:
  """The smoothing with the batch shape and the dtype of the matrix."""
  if isinstance(smoothing, int | float) and not smoothing >= 0:
    raise ValueError(f"{name} must be at least 0, got {smoothing}.")
  smoothing = jnp.asarray(smoothing, matrix.dtype)
  batch = matrix.shape[:-2]
  if smoothing.ndim > len(batch) or any(
    have not in (1, want) for have, want in zip(smoothing.shape[::-1], batch[::-1], strict=False)
  ):
    raise ValueError(f"{name} of shape {smoothing.shape} does not broadcast to the batch {batch} of the matrices.")
  return jnp.broadcast_to(smoothing, batch)


# Derivatives: of the norm by the polar factor, of the polar factor by the equation that defines H, never of an SVD.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(method: str, x: jax.Array, mu: jax.Array) -> jax.Array:
  return _polar(method, x, mu).value


@_norm.defjvp
def _norm_jvp(method, primals, tangents):
  polar, (dx, dmu) = _polar(method, *primals), tangents
  return polar.value, jnp.sum(polar.factor * dx, (-2, -1)) + polar.slope * dmu


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _polar(method: str, x: jax.Array, mu: jax.Array) -> _Polar:
  # A power of two keeps the squares in range and rounds nothing. A reciprocal that is subnormal would be flushed to 0.
  largest = jnp.maximum(jnp.max(jnp.abs(x), (-2, -1)), mu)
  exponent = jnp.minimum(jnp.frexp(largest)[1] - 1, -int(jnp.finfo(x.dtype).minexp))
  scale = jnp.ldexp(jnp.ones_like(largest), jnp.where(largest > 0, exponent, 0))
  polar = _batched(method)(x / scale[..., None, None], mu / scale)
  return polar._replace(value=polar.value * scale)


@_polar.defjvp
def _polar_jvp(method, primals, tangents):
  """From `H^2 = X'X + mu^2 I` and `factor H = X`, in the basis where H is diagonal."""
  (x, mu), (dx, dmu) = primals, tangents
  polar = _polar(method, x, mu)
  u, s, vt = _svd(x)
  h = jnp.hypot(s, mu[..., None])
  inverse = jnp.where(h > _tolerance(x) * jnp.max(h, -1, keepdims=True), 1 / jnp.where(h > 0, h, 1), 0)
  pairs = h[..., :, None] + h[..., None, :]
  pairs = jnp.where(pairs > 0, 1 / jnp.where(pairs > 0, pairs, 1), 0)
  dxv = _matmul(dx, vt.mT)
  inner = s[..., :, None] * _matmul(u.mT, dxv)
  identity = jnp.eye(s.shape[-1], dtype=x.dtype)
  dh = (inner + inner.mT + 2 * (mu * dmu)[..., None, None] * identity) * pairs
  dfactor = _matmul((dxv - _matmul(u * (s * inverse)[..., None, :], dh)) * inverse[..., None, :], vt)
  dvalue = jnp.sum(polar.factor * dx, (-2, -1)) + polar.slope * dmu
  dh_diagonal = jnp.diagonal(dh, axis1=-2, axis2=-1)
  dslope = dmu * jnp.sum(inverse, -1) - mu * jnp.sum(dh_diagonal * inverse**2, -1)
  return polar, _Polar(dvalue, dfactor, dslope)


@jax.custom_jvp
def _threshold(x: jax.Array, threshold: jax.Array) -> jax.Array:
  u, s, vt = _svd(x)
  return _matmul(u * jnp.maximum(s - threshold[..., None], 0)[..., None, :], vt)


@_threshold.defjvp
def _threshold_jvp(primals, tangents):
  """The symmetric part of `U'dX V` moves by divided differences, the skew part and the rest by ratios."""
  (x, threshold), (dx, dthreshold) = primals, tangents
  u, s, vt = _svd(x)
  f = jnp.maximum(s - threshold[..., None], 0)
  kept = f > 0
  ratio = jnp.where(kept, f / jnp.where(kept, s, 1), 0)
  row, column = (lambda a: a[..., :, None]), (lambda a: a[..., None, :])
  mixed = row(kept) != column(kept)
  difference = (row(f) - column(f)) / jnp.where(mixed, row(s) - column(s), 1)
  symmetric = jnp.where(mixed, difference, row(kept) & column(kept))
  total = row(s) + column(s)
  skew = jnp.where(total > 0, (row(f) + column(f)) / jnp.where(total > 0, total, 1), 0)
  dxv = _matmul(dx, vt.mT)
  inner = _matmul(u.mT, dxv)
  turned = (symmetric * (inner + inner.mT) + skew * (inner - inner.mT)) / 2
  turned -= dthreshold[..., None, None] * jnp.eye(s.shape[-1], dtype=x.dtype) * column(kept)
  moved = _matmul(u, turned) + (dxv - _matmul(u, inner)) * column(ratio)
  return _matmul(u * column(f), vt), _matmul(moved, vt)


@jax.custom_jvp
def _svd(x):
  return jnp.linalg.svd(x, full_matrices=False)


@_svd.defjvp
def _svd_jvp(primals, tangents):
  raise NotImplementedError("nuclear_norm has first and second derivatives, singular_value_threshold first ones only.")


# The polar factor, four ways: (x [..., m, n], mu [...]) -> _Polar.


def _tolerance(x: jax.Array) -> float:
  """Relative to the largest singular value; rounding errors add up like a random walk."""
  return 2 * math.sqrt(max(x.shape[-2:])) * float(jnp.finfo(x.dtype).eps)


def _from_spectrum(s_squared: jax.Array, h: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`h - mu` and `1 - mu / h` of `h = sqrt(s^2 + mu^2)`, without the difference that cancels."""
  mu = mu[..., None]
  value = s_squared / jnp.where(h > 0, h + mu, 1)
  return value, value / jnp.where(h > 0, h, 1)


def _vector(x: jax.Array, mu: jax.Array) -> _Polar:
  s_squared = jnp.sum(x * x, -2)
  h = jnp.sqrt(s_squared + mu[..., None] ** 2)
  value, slope = _from_spectrum(s_squared, h, mu)
  return _Polar(value[..., 0], x / jnp.where(h > 0, h, 1)[..., None], -slope[..., 0])


def _by_svd(x: jax.Array, mu: jax.Array) -> _Polar:
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  h = jnp.hypot(s, mu[..., None])
  keep = h > _tolerance(x) * jnp.max(h, -1, keepdims=True)
  value, slope = _from_spectrum(s * s, h, mu)
  weight = jnp.where(keep, s / jnp.where(keep, h, 1), 0)
  return _Polar(jnp.sum(value, -1), _matmul(u * weight[..., None, :], vt), -jnp.sum(slope, -1))


def _by_gram(x: jax.Array, mu: jax.Array) -> _Polar:
  h_squared, v = jnp.linalg.eigh(_matmul(x.mT, x))
  s_squared = jnp.maximum(h_squared, 0)
  h_squared = s_squared + mu[..., None] ** 2
  # 256 eps: below it the rounding of X'X is not worth a second look.
  benign = jnp.min(h_squared, -1) > jnp.max(h_squared, -1) / 256

  def accept():
    h = jnp.sqrt(h_squared)
    value, slope = _from_spectrum(s_squared, h, mu)
    factor = _matmul(x, _matmul(v / h[..., None, :], v.mT))
    return _Polar(jnp.sum(value, -1), factor, -jnp.sum(slope, -1))

  return jax.lax.cond(jnp.all(benign), accept, lambda: _refine(x, v, mu))


def _refine(x: jax.Array, v: jax.Array, mu: jax.Array) -> _Polar:
  """The polar factor from an approximate eigenbasis v of X'X.

  The columns of X V are close to orthogonal relative to their own lengths h, however different these are. So
  `V'H^2 V = D (I + F) D`, D = diag(h), and `C = V'H V D^-1` solves `C'C = I + F` with C D symmetric. Newton's step,
  `C_ij += R_ij h_i / (h_i + h_j)` for the residual R, divides by sums only: clusters of singular values do no harm.
  """
  identity = jnp.eye(x.shape[-1], dtype=x.dtype)
  y = _matmul(x, v)
  s_squared = jnp.sum(y * y, -2)
  h = jnp.sqrt(s_squared + mu[..., None] ** 2)
  keep = h > _tolerance(x) * jnp.max(h, -1, keepdims=True)
  weight = jnp.where(keep, 1 / jnp.where(keep, h, 1), 0)
  w = y * weight[..., None, :]
  target = jnp.where(identity > 0, identity, _matmul(w.mT, w))
  share = jnp.where(keep, h, 1)
  share = share[..., :, None] / (share[..., :, None] + share[..., None, :])
  start = jnp.broadcast_to(identity, target.shape)
  c, size = _settle(start, lambda c: target - _matmul(c.mT, c), lambda c, r: c + r * share)
  inverse, remainder = _inverse(c, 2 * identity - c)
  ok = jnp.all(jnp.maximum(size, remainder) <= 4 * _settled(c))

  def solved():
    extra = jnp.diagonal(c, axis1=-2, axis2=-1) - 1
    extra_inverse = jnp.diagonal(inverse, axis1=-2, axis2=-1) - 1
    value, slope = _from_spectrum(s_squared, h, mu)
    value = jnp.sum(value + extra * h, -1)
    slope = jnp.sum(slope - mu[..., None] * extra_inverse * weight, -1)
    return _Polar(value, _matmul(w, _matmul(inverse, v.mT)), -slope)

  def iterated():
    kept_v = v * keep[..., None, :].astype(x.dtype)
    polar = _by_newton_schulz(_matmul(_matmul(x, kept_v), v.mT), mu, floor=_tolerance(x))
    return polar._replace(factor=_matmul(_matmul(polar.factor, kept_v), v.mT))

  return jax.lax.cond(ok, solved, iterated)


def _inverse(matrix: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The inverse by Newton's iteration from a start, and the largest entry of what is left, `|I - matrix inverse|`.

  Not by LAPACK: in jaxlib 0.10 two batched triangular solves that XLA runs side by side on two cores wait for each
  other for ever.
  """
  identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
  return _settle(start, lambda z: identity - _matmul(matrix, z), lambda z, r: z + _matmul(z, r))


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


def _by_newton_schulz(x: jax.Array, mu: jax.Array, floor: float | None = None) -> _Polar:
  """The polar factor of `[X; mu I]` by scaled cubic Newton-Schulz steps, whose number the floor fixes."""
  identity = jnp.eye(x.shape[-1], dtype=x.dtype)

  def gram(top, bottom):
    return _matmul(top.mT, top) + _matmul(bottom, bottom)

  def step(carry, alpha):
    top, bottom = carry
    lift = 1.5 * alpha * identity - 0.5 * alpha**3 * gram(top, bottom)
    return (_matmul(top, lift), _matmul(bottom, lift)), None

  bottom = mu[..., None, None] * identity
  # ||B'B||_F^(1/2) lies between s_1 and n^(1/4) s_1: tighter than ||B||_F.
  bound = jnp.sqrt(jnp.linalg.norm(gram(x, bottom), axis=(-2, -1)))[..., None, None]
  bound = jnp.where(bound > 0, bound, 1)
  alphas = _scales(float(jnp.finfo(x.dtype).eps), floor)
  (top, bottom), _ = jax.lax.scan(step, (x / bound, bottom / bound), jnp.asarray(alphas, x.dtype))
  # tr(I - mu H^-1) = tr((I + mu H^-1)^-1 factor'factor): exact near zero, where the difference would cancel. The
  # eigenvalues of I + mu H^-1 lie in [1, 2]: Chebyshev's start is within 1/17.
  shifted = identity + bottom
  inverse, _ = _inverse(shifted, (24 * identity - 8 * shifted) / 17)
  slope = jnp.sum(inverse * _matmul(top.mT, top), (-2, -1))
  return _Polar(jnp.sum(top * x, (-2, -1)) - mu * slope, top, -slope)


def _scales(eps: float, floor: float | None) -> list[float]:
  """Scales alpha of the steps `s -> (3 alpha s - alpha^3 s^3) / 2` that lift [floor, 1] to 1.

  The best scale for [l, 1] is sqrt(3 / (1 + l + l^2)), but near sqrt(3) it throws the largest singular values back to l
  and their vectors with them; 1.6 keeps them above 0.35.
  """
  lower = eps**0.6 if floor is None else floor
  alphas = []
  while 1 - lower > 4 * math.sqrt(eps):
    alpha = min(1.6, math.sqrt(3 / (1 + lower + lower**2)))
    lower = min(1.5 * alpha * s - 0.5 * (alpha * s) ** 3 for s in (lower, 1.0))
    alphas.append(alpha)
  return [*alphas, 1.0]  # quadratic from here


def _auto(x: jax.Array, mu: jax.Array) -> _Polar:
  return jax.lax.platform_dependent(x, mu, cpu=_by_gram, default=_by_newton_schulz)


_METHODS = ("auto", "svd", "gram", "newton_schulz")


@functools.cache
def _batched(method: str):
  """The method with `vmap` turned into a leading axis, so that its branches stay branches."""
  by_name = {"auto": _auto, "svd": _by_svd, "gram": _by_gram, "newton_schulz": _by_newton_schulz, "vector": _vector}
  polar = custom_vmap(jax.jit(lambda x, mu: by_name[method](x, mu)))  # jit: called eagerly, it compiles once

  @polar.def_vmap
  def _(axis_size, in_batched, x, mu):
    x, mu = (
      a if batched else jnp.broadcast_to(a, (axis_size, *a.shape))
      for a, batched in zip((x, mu), in_batched, strict=True)
    )
    result = polar(x, mu)
    return result, jax.tree.map(lambda _: True, result)

  return polar
