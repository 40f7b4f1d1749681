"""Losses by the distance over which probability must be moved: between Gaussians of features, between classes."""

import jax
import jax.numpy as jnp

from kdflax.losses.maps import check_channels, check_maps
from kdflax.numerics.examples import (
  as_features,
  check_range,
  example_means,
  hyper_parameters,
  mask,
)
from kdflax.numerics.log_probabilities import log_softmax, logit_pair
from kdflax.numerics.pooling import adaptive_average_pool, masked_average_pool, window_sizes


def wkd_features(
  student: jax.Array,
  teacher: jax.Array,
  *,
  mean_weight: float | jax.Array = 1.0,
  grid: int = 1,
  epsilon: float | jax.Array = 1e-5,
  where: jax.Array | None = None,
) -> jax.Array:
  """Squared Wasserstein distance between the Gaussians of the features in each cell of a grid.

  Matches mean and spread of every channel over the positions of a cell, not which position has what: channels must
  agree, sizes need not.

    mean over cells of sum_c (mean_weight (mean_s - mean_t)_c^2 + (std_s - std_t)_c^2),   std = sqrt(variance + epsilon)

  Args:
    student: `[batch, ..., channels]`, for images `[batch, height, width, channels]`.
    teacher: `[batch, ..., channels]`, as many axes.
    mean_weight: weight of the means, may be traced.
    grid: cells along each spatial axis, as windows of adaptive average pooling, static.
    epsilon: added to the variance, in squared units of the features, may be traced.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, a sum over channels; 0 for masked examples. The variance has n - 1 in the
    denominator, and is 0 of a single position.

  Raises:
    ValueError: if the batch, the number of axes or the channels differ, an input is not floating, `where` does not fit
      or `grid` is not positive.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[0.0], [2.0]]]), jnp.array([[[1.0], [3.0]]])
    >>> print(wkd_features(student, teacher))
    [1.]

  Reference: Jiaming Lv, Haoyuan Yang and Peihua Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for
  Knowledge Distillation", 2024, arXiv 2412.08139 (WKD-F with diagonal covariances).
  """
  if not isinstance(grid, int) or grid < 1:
    raise ValueError(f"grid must be a positive int, not traced; got {grid!r}")
  check_maps(student=student, teacher=teacher)
  check_channels(student=student, teacher=teacher)
  student, teacher = as_features(where, student=student, teacher=teacher)
  mean_weight, epsilon = hyper_parameters((), None, student.dtype, mean_weight=mean_weight, epsilon=epsilon)

  def statistics(features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Mean and standard deviation `[batch, ..., channels]` of the cells, and which cells count."""
    cells = (grid,) * (features.ndim - 2)
    # Centred first: the variance is that of what is left, and a common offset costs no digits.
    centre, _ = masked_average_pool(features, (1,) * len(cells), where)
    centred = features - centre
    if where is not None and jnp.ndim(where) > 1:
      centred = mask(centred, where)
    mean, counted = masked_average_pool(centred, cells, where)
    square, _ = masked_average_pool(jnp.square(centred), cells, where)
    count = _counts(features, cells, where)
    variance = jnp.maximum(square - jnp.square(mean), 0) * count / jnp.maximum(count - 1, 1)
    return mean + centre, jnp.sqrt(variance + epsilon), counted

  (student_mean, student_std, counted), (teacher_mean, teacher_std, _) = statistics(student), statistics(teacher)
  distances = mean_weight * jnp.square(student_mean - teacher_mean) + jnp.square(student_std - teacher_std)
  return example_means(distances.sum(axis=-1), counted)


def _counts(features: jax.Array, cells: tuple[int, ...], where: jax.Array | None) -> jax.Array:
  """How many positions of each cell count, broadcasting against `[batch, ..., channels]` of the cells."""
  sizes = window_sizes(features.shape[1:-1], cells)[..., None].astype(features.dtype)
  if where is None or jnp.ndim(where) == 1:
    return sizes
  return jnp.round(adaptive_average_pool(jnp.asarray(where, features.dtype)[..., None], cells) * sizes)


def wkd_logits(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  cost: jax.Array,
  *,
  temperature: float | jax.Array,
  regularization: float | jax.Array,
  iterations: int,
  where: jax.Array | None = None,
) -> jax.Array:
  """Cost of turning the student's probabilities into the teacher's, where a class is nearer to some than to others.

  Matches the probabilities in a way that knows which classes are alike: what is given to a neighbour of the right class
  costs little. The plan is that of Sinkhorn's iterations, which blur it by the regularization, so the minimum is not 0;
  for WKD-L leave the target's class out of logits and costs.

    sum_ij plan_ij cost_ij,   plan = diag(u) M diag(v),   M = exp(-cost / regularization)

  from `u = 1 / classes` on in turns `v = p / (M' u)` and `u = q / (M v)`, in log-space; the derivative is that of the
  iterations.

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    cost: `[classes, classes]`, or one matrix for each example `[..., classes, classes]`: from the student's class to
      the teacher's, such as one minus the cosine of the rows of the teacher's head.
    temperature: T > 0 of both distributions, dimensionless, may be traced; broadcasts against `[...]`.
    regularization: a number above 0, in units of the cost, may be traced.
    iterations: number of turns, static.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, without T^2; 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `cost`, `iterations`, `regularization` or `where`
      does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[9.0, 0.0]]), jnp.array([[0.0, 9.0]])
    >>> cost = 1 - jnp.eye(2)
    >>> print(f"{wkd_logits(student, teacher, cost, temperature=1.0, regularization=0.1, iterations=10)[0]:.4f}")
    0.9998

  Reference: Jiaming Lv, Haoyuan Yang and Peihua Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for
  Knowledge Distillation", 2024, arXiv 2412.08139. The authors' code iterates on probabilities and adds 1e-8 to costs
  and sums.
  """
  if not isinstance(iterations, int) or iterations < 1:
    raise ValueError(f"iterations must be a positive int, not traced; got {iterations!r}")
  check_range("regularization", regularization, "above 0", lambda value: value > 0)
  student, teacher, temperature = logit_pair(student_logits, teacher_logits, where, temperature=temperature)
  (regularization,) = hyper_parameters((), None, student.dtype, regularization=regularization)
  cost = _checked_cost(cost, student, where)
  log_q, log_p = (log_softmax(logits, temperature) for logits in (student, teacher))
  log_m = -cost / regularization
  from_columns = lambda g: jax.nn.logsumexp(log_m + g[..., None, :], axis=-1)
  from_rows = lambda f: jax.nn.logsumexp(log_m + f[..., None], axis=-2)

  @jax.checkpoint
  def turn(potentials, _):
    f, _ = potentials
    g = log_p - from_rows(f)
    return (log_q - from_columns(g), g), None

  start = jnp.full_like(log_q, -jnp.log(log_q.shape[-1]))
  (f, g), _ = jax.lax.scan(turn, (start, start), length=iterations)
  plan = jnp.exp(f[..., None] + log_m + g[..., None, :])
  return mask((plan * cost).sum(axis=(-2, -1)), where)


def _checked_cost(cost: jax.Array, student: jax.Array, where: jax.Array | None) -> jax.Array:
  """The cost in the dtype of the logits, zeros for masked examples where each has its own."""
  cost, classes = jnp.asarray(cost), student.shape[-1]
  square = (classes, classes)
  if cost.shape not in (square, (*student.shape[:-1], *square)) or not jnp.issubdtype(cost.dtype, jnp.floating):
    raise ValueError(
      f"cost must be floating of shape {square}, or one such matrix for each example of {student.shape[:-1]}; got "
      f"{cost.dtype}{list(cost.shape)}"
    )
  return mask(cost.astype(student.dtype), where if cost.ndim > 2 else None)
