"""Weightings that settle what share of the progress every task has, with the rules of `weightings`."""

import jax
import jax.numpy as jnp

from kdflax.balancing import _solvers
from kdflax.balancing._problem import checked_weights, matvec, normalise


def imtl_g(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
  """Return the weights of the direction with equal projections on all gradients.

  d.g_i / |g_i| is the same for every task and the weights add up to 1: `C u = 1`, `w = (u / |g|) / sum(u / |g|)`.
  Weights may be negative, and where the sum of u / |g| is negative the direction conflicts with all tasks;
  `conflict_free` has the same line and never that sign. Zero where that sum is zero. More tasks than dimensions may
  leave no such direction: then `u = pinv(C) 1`, the nearest, and zero if that is zero. A zero row has weight 0.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]` with sum 1.

  Raises:
    ValueError: the Gramian is not square, or `present` is not `[T]` bool.

  Examples:
    >>> [round(weight, 3) for weight in imtl_g(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()]
    [0.333, 0.667]

  Reference: Liyang Liu, Yi Li, Zhanghui Kuang, Jing-Hao Xue, Yimin Chen, Wenming Yang, Qingmin Liao and Wayne Zhang,
  "Towards Impartial Multi-task Learning", ICLR 2021. The pseudo-inverse is that of the cosines: duplicate rows are
  shared between, and no task is lost because its gradient is small.
  """
  p = normalise(gramian, present)
  share, products, rounding = _solvers.equal_products(p)
  smallest = jnp.where(p.valid, p.norms, jnp.inf).min()
  share = share * jnp.where(p.valid, smallest * p.inverse_norms, 0)
  total = share.sum()
  noise = share.shape[0] * jnp.finfo(share.dtype).eps * jnp.abs(share).sum()
  exists = (products.max() > rounding) & (jnp.abs(total) > noise)
  return checked_weights(p, jnp.where(exists, share / jnp.where(exists, total, 1), 0))


def conflict_free(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
  """Return the weights of the direction with equal, positive cosines to all gradients (ConFIG).

  `v = pinv(C) 1`, the unit vector of `v @ unit rows`, as long as the mean over the tasks of the gradients' projections
  on it. More tasks than dimensions may leave no such direction: then it is the nearest by least squares, whose
  cosines differ and may be negative. Where that is 0 too, as among opposed gradients, the weights are 0. A zero row has
  weight 0; T counts it.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`; they may be negative. The progress of no task is, as long as the gradients are independent.

  Raises:
    ValueError: the Gramian is not square, or `present` is not `[T]` bool.

  Examples:
    >>> [round(weight, 3) for weight in conflict_free(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()]
    [0.375, 0.75]

  Reference: Qiang Liu, Mengyu Chu and Nils Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
  Networks", 2024, arXiv 2408.11104. The authors sum the projections over the tasks where this takes the mean.
  """
  p = normalise(gramian, present)
  share, products, rounding = _solvers.equal_products(p)
  exists = products.max() > rounding
  squared_norm = jnp.where(exists, matvec(share, products), 1)
  length = matvec(p.norms, products) / p.num_present
  return checked_weights(p, jnp.where(exists, share * p.inverse_norms * length / squared_norm, 0))


def nash_mtl(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
  """Return the weights of the Nash bargaining solution between the tasks.

  G a = 1 / a: every task's share of the progress, a_i (G a)_i, is 1. The direction does not depend on the norms of the
  gradients up to its length, which is sqrt(T), the same for all gradients; so weights grow as 1 / norm (rescale them
  for a step that follows the gradients). `fair_grad` with alpha = 1. A zero row has weight 0.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`, positive.

  Raises:
    ValueError: the Gramian is not square, or `present` is not `[T]` bool.

  Examples:
    >>> [round(weight, 3) for weight in nash_mtl(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()]
    [0.707, 1.414]

  Reference: Aviv Navon, Aviv Shamsian, Idan Achituve, Haggai Maron, Kenji Kawaguchi, Gal Chechik and Ethan Fetaya,
  "Multi-Task Learning as a Bargaining Game", 2022, arXiv 2202.01017. They solve a sequence of convex programmes from
  the last solution and clip the direction; the equation is the minimum of a'Ga / 2 - sum log a, found here by Newton
  steps to full precision, without state.
  """
  return fair_grad(gramian, alpha=1.0, present=present)


def fair_grad(gramian: jax.Array, *, alpha: jax.Array | float = 1.0, present: jax.Array | None = None) -> jax.Array:
  """Return the weights that are alpha-fair between the tasks.

  G a = a^(-1 / alpha). alpha = 1 is `nash_mtl`; a larger alpha favours the task that gains least, and as alpha goes
  to 0 the weights become equal to 1. Gradients times s > 0 give weights times s^(-2 alpha / (1 + alpha)). A zero row
  has weight 0.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    alpha: fairness, positive; may be traced. Tested from 0.25 to 30.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`, positive (a large alpha may ask for less than the smallest float: 0). Exactly opposed gradients have
    no solution; the weights are then large and finite.

  Raises:
    ValueError: the Gramian is not square, `present` is not `[T]` bool, or alpha is not positive.

  Examples:
    >>> [round(weight, 3) for weight in fair_grad(jnp.array([[4.0, -1.0], [-1.0, 1.0]]), alpha=2.0).tolist()]
    [0.678, 1.495]

  Reference: Hao Ban and Kaiyi Ji, "Fair Resource Allocation in Multi-Task Learning", 2024, arXiv 2402.15638. They use a
  general least-squares solver on the raw Gramian, which stops early for small or badly scaled gradients; here Newton
  steps in log a.
  """
  if isinstance(alpha, (int, float)) and not alpha > 0:
    raise ValueError(f"alpha must be positive; got {alpha}; for equal weights use balancing.fixed")
  p = normalise(gramian, present)
  power = 1 / jnp.asarray(alpha, p.norms.dtype)
  log_norms = jnp.where(p.valid, jnp.log(jnp.where(p.valid, p.norms, 1)), 0)
  x = _solvers.fair_point(p.cosines, log_norms, power)
  return checked_weights(p, x * p.inverse_norms * p.scale ** (-1 / (1 + power)))


def aligned_mtl(gramian: jax.Array, *, scale: str = "min", present: jax.Array | None = None) -> jax.Array:
  """Return the weights that make the principal components of the gradients equally long.

  `sqrt(s) V L^(-1/2) V' 1 / T` with the eigenvalues L and vectors V of the Gramian; s is the smallest, the (lower)
  median or the mean of the eigenvalues that count, those above `T eps lambda_max`. The combined system of gradients
  has condition number 1. A component is as long as the smallest, so near-parallel gradients make small steps with
  "min". Depends on the norms: rows far smaller than `sqrt(T eps)` of the largest are below the rank tolerance. Zero
  Gramian: 1 / T.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    scale: "min", "median" or "rmse"; static.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`.

  Raises:
    ValueError: the Gramian is not square, the scale is unknown, or `present` is not `[T]` bool.

  Examples:
    >>> [round(weight, 3) for weight in aligned_mtl(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()]
    [0.309, 0.558]

  Reference: Dmitry Senushkin, Nikolay Patakin, Arseny Kuznetsov and Anton Konushin, "Independent Component Alignment
  for Multi-Task Learning", 2023, arXiv 2305.19000. The rank tolerance follows the dtype of the Gramian; the authors sum
  over the tasks where this takes the mean.
  """
  if scale not in ("min", "median", "rmse"):
    raise ValueError(f'scale must be "min", "median" or "rmse"; got {scale!r}')
  p = normalise(gramian, present)
  mean = jnp.where(p.present, 1 / p.num_present, 0).astype(p.norms.dtype)
  values, vectors = jnp.linalg.eigh(p.gramian)
  tolerance = p.num_present * jnp.finfo(values.dtype).eps * values[-1]
  kept = values > tolerance
  rank = kept.sum()
  first = values.shape[0] - rank  # eigenvalues ascend
  if scale == "rmse":
    target = jnp.where(kept, values, 0).sum() / jnp.maximum(rank, 1)
  else:
    target = values[first + (0 if scale == "min" else (rank - 1) // 2)]
  ratio = jnp.where(kept, jnp.sqrt(jnp.where(kept, target / values, 0)), 0)
  weights = matvec(vectors, ratio * matvec(vectors.T, mean))
  return checked_weights(p, jnp.where(rank > 0, weights, mean))
