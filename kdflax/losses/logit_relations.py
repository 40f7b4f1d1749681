"""Losses on logits that compare examples with each other: DIST, and the two correlations of MLKD."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdflax.losses._examples import AxisName, all_rows, all_sum, mask
from kdflax.losses._log_probabilities import log_softmax, logit_pair
from kdflax.losses._numerics import inner_products, safe_sqrt


def dist(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  beta: float | jax.Array = 1.0,
  gamma: float | jax.Array = 1.0,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """One minus the correlations of the probabilities, within each example and within each class.

  Matches how an example ranks the classes (beta) and how a class ranks the examples of the batch (gamma), both up to
  shift and positive scale. A constant vector has correlation 0 with a varying one and 1 with another constant, without
  gradient; so a class that is impossible everywhere adds nothing, and a batch of one has only the first part.

    T^2 (beta (1 - rho(q_i, p_i)) + gamma mean_c (B/2) (z(q_:c) - z(p_:c))_i^2),   z(x) = (x - mean x) / ||x - mean x||

  rho is Pearson's correlation; the mean over the batch of the second part is `gamma (1 - mean_c rho(q_:c, p_:c))`.

  Args:
    student_logits: `[..., classes]`; all leading axes together are the batch.
    teacher_logits: `[..., classes]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    beta: weight of the correlation within an example, may be traced.
    gamma: weight of the correlation within a class, may be traced.
    where: bool `[...]`, which examples count, also in the statistics of a class.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Reference: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022, arXiv 2205.10536. The authors' code
  bounds the norms from below by an absolute constant; here a vector is constant if it varies by less than its rounding.
  """
  student, teacher, temperature, beta, gamma = logit_pair(
    student_logits, teacher_logits, where, temperature=temperature, beta=beta, gamma=gamma
  )
  q, p = (jnp.exp(log_softmax(logits, temperature)) for logits in (student, teacher))
  count = _count(q, where, axis_name)

  row_sum = lambda x: x.sum(axis=-1, keepdims=True)
  within_example = _correlation_distance(q, p, row_sum, q.shape[-1]).sum(axis=-1)
  column_sum = lambda x: all_sum(mask(x, where).sum(axis=tuple(range(x.ndim - 1))), axis_name)
  within_class = count * _correlation_distance(q, p, column_sum, count).mean(axis=-1)
  return mask(temperature**2 * (beta * within_example + gamma * within_class), where)


def class_correlation(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Squared difference of the class-by-class correlation matrices of a batch.

  Matches which classes get probability together over the batch. The number belongs to the batch; the values are its
  exact shares, of either sign, 0 where student equals teacher.

    (B / K) (q_i + p_i)' D (q_i - p_i),   D = Q'Q - P'P,   of mean ||D||^2 / K;   Q, P the probabilities [B, K]

  Args:
    student_logits: `[..., classes]`; all leading axes together are the batch.
    teacher_logits: `[..., classes]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples. The memory is the smaller of batch^2 and classes^2.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Reference: Jin, Wang and Lin, "Multi-Level Logit Distillation", CVPR 2023. No T^2, as in the paper.
  """
  plus, minus, count = _sum_and_difference(student_logits, teacher_logits, temperature, where, axis_name)
  shape, classes = plus.shape[:-1], plus.shape[-1]
  plus, minus = plus.reshape(-1, classes), minus.reshape(-1, classes)
  # D = (M + M') / 2 with M = sum_j plus_j minus_j'. Without the difference of two large matrices no digits are lost.
  if classes <= plus.shape[0]:
    product = all_sum(inner_products(plus.T, minus.T), axis_name)
    values = jnp.sum(inner_products(plus, product + product.T) * minus, axis=-1) / 2
  else:  # the same sums over the pairs of examples, never [classes, classes]
    all_plus, all_minus = all_rows(plus, axis_name), all_rows(minus, axis_name)
    crossed = inner_products(plus, all_minus) * inner_products(minus, all_plus)
    straight = inner_products(minus, all_minus) * inner_products(plus, all_plus)
    values = jnp.sum(crossed + straight, axis=-1) / 2
  return mask(count / classes * values.reshape(shape), where)


def batch_correlation(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Squared difference of the example-by-example correlation matrices of a batch.

  Matches which examples get alike probabilities.

    sum_j (q_i . q_j - p_i . p_j)^2,   of mean ||QQ' - PP'||^2 / B;   Q, P the probabilities [B, K]

  Args:
    student_logits: `[..., classes]`; all leading axes together are the batch.
    teacher_logits: `[..., classes]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count, on both sides of a pair.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Reference: Jin, Wang and Lin, "Multi-Level Logit Distillation", CVPR 2023. No T^2, as in the paper.
  """
  plus, minus, _ = _sum_and_difference(student_logits, teacher_logits, temperature, where, axis_name)
  shape, classes = plus.shape[:-1], plus.shape[-1]
  plus, minus = plus.reshape(-1, classes), minus.reshape(-1, classes)
  twice = inner_products(plus, all_rows(minus, axis_name)) + inner_products(minus, all_rows(plus, axis_name))
  return mask(jnp.square(twice / 2).sum(axis=-1).reshape(shape), where)


def _sum_and_difference(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  temperature: float | jax.Array,
  where: jax.Array | None,
  axis_name: AxisName,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """q + p and q - p, 0 for masked examples, and the number of examples that count.

  `q_i . q_j - p_i . p_j` is half of `(q + p)_i . (q - p)_j + (q - p)_i . (q + p)_j`, where nothing large cancels.
  """
  student, teacher, temperature = logit_pair(student_logits, teacher_logits, where, temperature=temperature)
  q, p = (mask(jnp.exp(log_softmax(logits, temperature)), where) for logits in (student, teacher))
  return q + p, q - p, _count(q, where, axis_name)


def _count(rows: jax.Array, where: jax.Array | None, axis_name: AxisName) -> jax.Array:
  counted = rows[..., 0].size if where is None else jnp.asarray(where).sum()
  return jnp.maximum(all_sum(jnp.asarray(counted, rows.dtype), axis_name), 1)


def _correlation_distance(
  x: jax.Array, y: jax.Array, total: Callable[[jax.Array], jax.Array], count: int | jax.Array
) -> jax.Array:
  """Terms whose sum along the axis that `total` adds up is `1 - rho(x, y)`, none of them negative."""
  (x, x_varies), (y, y_varies) = (_standard_score(each, total, count) for each in (x, y))
  # Two unit vectors: 1 - x . y = |x - y|^2 / 2. Next to a constant, whose score is 0, the distance is 1.
  return jnp.square(x - y) * jnp.where(x_varies & y_varies, 0.5, 1)


def _standard_score(
  x: jax.Array, total: Callable[[jax.Array], jax.Array], count: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(x - mean) / ||x - mean|| and whether x varies; 0 where it does not."""
  centred = x - total(x) / count
  centred = centred - total(centred) / count  # the first mean is rounded: equal entries are now equal to 0
  norm = safe_sqrt(total(jnp.square(centred)))
  varies = norm > 4 * jnp.finfo(x.dtype).eps * safe_sqrt(total(jnp.square(x)))
  return jnp.where(varies, centred, 0) / jnp.where(varies, norm, 1), varies
