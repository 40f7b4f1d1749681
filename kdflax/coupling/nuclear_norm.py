"""The nuclear norm at matmul speed, with the minimum-norm sub-gradient, and its proximal operator.

Everything here works on tall matrices `X = U S V'` of shape `[..., m, n]`, `m >= n`. With `H = (X'X + mu^2 I)^(1/2)`
the smoothed norm is `tr H - n mu`, its gradient is the polar factor `X H^-1`, and its slope in `mu` is `tr(mu H^-1) -
n`.
"""

import functools

import jax
import jax.numpy as jnp

from kdflax.coupling._polar import METHODS, Polar, by, matmul, tolerance


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
    newton_schulz   products alone, about 20 with X in float32 and 40 in float64 and half as many n x n products: for
                    accelerators. There is no rank decision: a direction below `eps^0.6 s_1` (7e-5 in float32, 4e-10 in
                    float64) gets a weight between 0 and 1.
    auto            by the platform that the program is lowered for: `newton_schulz` on accelerators, `gram` on a CPU.
                    There a matrix with m <= 1.25 n and a smoothing of the number 0 goes through `newton_schulz` first,
                    and through `gram` if its rank is in doubt afterwards; so it is as accurate as `gram`. Measured by
                    `benchmarks/nuclear_norm.py` on a CPU: up to 4 times faster than `svd`; for square matrices 1.5
                    times with AVX-512, as fast with AVX2, and slower if their rank is in doubt. A single column has a
                    closed form in every method.

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

  Reference: G. Alistair Watson, "Characterization of the subdifferential of some matrix norms", Linear Algebra and its
  Applications 1992; Yuji Nakatsukasa and Nicholas J. Higham, "Stable and efficient spectral divide and conquer
  algorithms", SIAM Journal on Scientific Computing 2013; Noah Amsel, David Persson, Christopher Musco and Robert M.
  Gower, "The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm", 2025, arXiv
  2505.16932. Widely used versions return an arbitrary orthonormal factor on the null space: of norm `sqrt(min(m, n))`
  at 0, where this one returns 0.
  """
  if method not in METHODS:
    raise ValueError(f"nuclear_norm: unknown method {method!r}; choose one of {', '.join(METHODS)}")
  matrix = _as_real("nuclear_norm", matrix)
  smoothed = not (isinstance(smoothing, int | float) and smoothing == 0)
  smoothing = _smoothing_like(matrix, smoothing)
  if 0 in matrix.shape[-2:]:
    return jnp.zeros(matrix.shape[:-2], matrix.dtype)
  if matrix.shape[-2] < matrix.shape[-1]:
    matrix = matrix.mT
  return _norm("vector" if matrix.shape[-1] == 1 else method, smoothed, matrix, smoothing)


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

  Reference: Jian-Feng Cai, Emmanuel J. Candès and Zuowei Shen, "A singular value thresholding algorithm for matrix
  completion", 2008, arXiv 0810.3286.
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
      f"{name}: matrix must be [..., m, n], got shape {matrix.shape}; give a vector as one column [n, 1]"
    )
  if not jnp.issubdtype(matrix.dtype, jnp.floating):
    raise ValueError(f"{name}: matrix must be real floating point, got {matrix.dtype}; convert it first")
  return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def _smoothing_like(matrix: jax.Array, smoothing, name: str = "nuclear_norm: smoothing") -> jax.Array:
  """The smoothing with the batch shape and the dtype of the matrix."""
  if isinstance(smoothing, int | float) and not smoothing >= 0:
    raise ValueError(f"{name} must be at least 0, got {smoothing}")
  smoothing = jnp.asarray(smoothing, matrix.dtype)
  batch = matrix.shape[:-2]
  if smoothing.ndim > len(batch) or any(
    have not in (1, want) for have, want in zip(smoothing.shape[::-1], batch[::-1], strict=False)
  ):
    raise ValueError(f"{name} of shape {smoothing.shape} does not broadcast to the batch {batch} of the matrices")
  return jnp.broadcast_to(smoothing, batch)


# Derivatives: of the norm by the polar factor, of the polar factor by the equation that defines H, never of an SVD.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _norm(method: str, smoothed: bool, x: jax.Array, mu: jax.Array) -> jax.Array:
  return _polar(method, smoothed, x, mu).value


@_norm.defjvp
def _norm_jvp(method, smoothed, primals, tangents):
  polar, (dx, dmu) = _polar(method, smoothed, *primals), tangents
  return polar.value, jnp.sum(polar.factor * dx, (-2, -1)) + polar.slope * dmu


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _polar(method: str, smoothed: bool, x: jax.Array, mu: jax.Array) -> Polar:
  # A power of two keeps the squares in range and rounds nothing. A reciprocal that is subnormal would be flushed to 0.
  largest = jnp.maximum(jnp.max(jnp.abs(x), (-2, -1)), mu)
  exponent = jnp.minimum(jnp.frexp(largest)[1] - 1, -int(jnp.finfo(x.dtype).minexp))
  scale = jnp.ldexp(jnp.ones_like(largest), jnp.where(largest > 0, exponent, 0))
  polar = by(method, smoothed)(x / scale[..., None, None], mu / scale)
  return polar._replace(value=polar.value * scale)


@_polar.defjvp
def _polar_jvp(method, smoothed, primals, tangents):
  """From `H^2 = X'X + mu^2 I` and `factor H = X`, in the basis where H is diagonal."""
  (x, mu), (dx, dmu) = primals, tangents
  polar = _polar(method, smoothed, x, mu)
  u, s, vt = _svd(x)
  h = jnp.hypot(s, mu[..., None])
  inverse = jnp.where(h > tolerance(x) * jnp.max(h, -1, keepdims=True), 1 / jnp.where(h > 0, h, 1), 0)
  pairs = h[..., :, None] + h[..., None, :]
  pairs = jnp.where(pairs > 0, 1 / jnp.where(pairs > 0, pairs, 1), 0)
  dxv = matmul(dx, vt.mT)
  inner = s[..., :, None] * matmul(u.mT, dxv)
  identity = jnp.eye(s.shape[-1], dtype=x.dtype)
  dh = (inner + inner.mT + 2 * (mu * dmu)[..., None, None] * identity) * pairs
  dfactor = matmul((dxv - matmul(u * (s * inverse)[..., None, :], dh)) * inverse[..., None, :], vt)
  dvalue = jnp.sum(polar.factor * dx, (-2, -1)) + polar.slope * dmu
  dh_diagonal = jnp.diagonal(dh, axis1=-2, axis2=-1)
  dslope = dmu * jnp.sum(inverse, -1) - mu * jnp.sum(dh_diagonal * inverse**2, -1)
  return polar, Polar(dvalue, dfactor, dslope)


@jax.custom_jvp
def _threshold(x: jax.Array, threshold: jax.Array) -> jax.Array:
  u, s, vt = _svd(x)
  return matmul(u * jnp.maximum(s - threshold[..., None], 0)[..., None, :], vt)


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
  dxv = matmul(dx, vt.mT)
  inner = matmul(u.mT, dxv)
  turned = (symmetric * (inner + inner.mT) + skew * (inner - inner.mT)) / 2
  turned -= dthreshold[..., None, None] * jnp.eye(s.shape[-1], dtype=x.dtype) * column(kept)
  moved = matmul(u, turned) + (dxv - matmul(u, inner)) * column(ratio)
  return matmul(u * column(f), vt), matmul(moved, vt)


@jax.custom_jvp
def _svd(x):
  return jnp.linalg.svd(x, full_matrices=False)


@_svd.defjvp
def _svd_jvp(primals, tangents):
  raise NotImplementedError("nuclear_norm has first and second derivatives, singular_value_threshold first ones only")
