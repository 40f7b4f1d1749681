"""Losses on logits that compare examples with each other: DIST, and the two correlations of MLKD."""

import functools

import jax
import jax.numpy as jnp

from kdflax.numerics.correlations import correlation_distance
from kdflax.numerics.examples import AxisName, all_max, all_rows, all_sum, mask, masked_sum
from kdflax.numerics.log_probabilities import log_softmax, logit_pair, soften, softmax
from kdflax.numerics.products import gram_difference, gram_difference_half_tangent, inner_products
from kdflax.numerics.safe import safe_divide

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


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

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> print(f"{dist(student, teacher)[0]:.4f}")
    0.0000

  Reference: Tao Huang, Shan You, Fei Wang, Chen Qian and Chang Xu, "Knowledge Distillation from A Stronger Teacher",
  2022, arXiv 2205.10536. The authors' code bounds the norms from below by an absolute constant; here a vector is
  constant if it varies by less than its rounding.
  """
  hyper = {"temperature": temperature, "beta": beta, "gamma": gamma}
  student, teacher, temperature, beta, gamma = logit_pair(
    student_logits, teacher_logits, where, fewest_classes=2, **hyper
  )
  (q, of_q), (p, of_p) = (
    _relative_to_class(log_softmax(logits, temperature), where, axis_name) for logits in (student, teacher)
  )
  count = _count(student, where, axis_name)
  along_classes = lambda x: x.sum(axis=-1, keepdims=True)
  within_example = correlation_distance(q * of_q, p * of_p, q.shape[-1], along_classes, lambda x: x)
  # Down the rows by matrix products: XLA's sum along that axis takes twenty times as long on a CPU, also as the
  # derivative of a broadcast.
  counted = jnp.ones(len(q), q.dtype) if where is None else jnp.asarray(where, q.dtype).reshape(-1)
  down = lambda x: all_sum(_matmul(counted, x), axis_name)
  spread = lambda x: jnp.tensordot(jnp.ones(len(q), q.dtype), x, axes=0, precision=jax.lax.Precision.HIGHEST)
  within_class = correlation_distance(q, p, count, down, spread)
  within_example, within_class = (
    each.sum(axis=-1).reshape(jnp.shape(student_logits)[:-1])
    for each in (within_example, count / q.shape[-1] * within_class)
  )
  values = beta * within_example + gamma * within_class
  return mask(temperature**2 * values, where)


def class_correlation(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Squared difference of the class-by-class correlation matrices of a batch.

  Matches which classes get probability together over the batch. The number belongs to the batch; each class shares out
  its row among the examples, by the probability that they give it.

    (B / K) sum_c u_ic ||D_c||^2,   D = Q'Q - P'P,   u_ic = (q_ic + p_ic) / sum_j (q_jc + p_jc),   of mean ||D||^2 / K

  Q, P are the probabilities [B, K].

  Args:
    student_logits: `[..., classes]`; all leading axes together are the batch.
    teacher_logits: `[..., classes]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples. The memory is O(classes^2), or O(batch classes) where there
    are more than four times as many classes as examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> print(f"{class_correlation(student, teacher)[0]:.4f}")
    0.1196

  Reference: Ying Jin, Jiaqi Wang and Dahua Lin, "Multi-Level Logit Distillation", CVPR 2023. No T^2, as in the paper.
  """
  q, p, count = _probabilities(student_logits, teacher_logits, temperature, where, axis_name)
  squares = _squares_by_class(q, p, axis_name)
  shares = safe_divide(q + p, all_sum(_down(q + p), axis_name))
  values = count / q.shape[-1] * _matmul(shares, squares)
  return mask(values.reshape(jnp.shape(student_logits)[:-1]), where)


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

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> print(f"{batch_correlation(student, teacher)[0]:.4f}")
    0.0347

  Reference: Ying Jin, Jiaqi Wang and Dahua Lin, "Multi-Level Logit Distillation", CVPR 2023. No T^2, as in the paper.
  """
  q, p, _ = _probabilities(student_logits, teacher_logits, temperature, where, axis_name)
  if axis_name is None:
    values = _squared_gram_difference(q, p)
  else:
    plus, minus = q + p, q - p
    twice = inner_products(plus, all_rows(minus, axis_name)) + inner_products(minus, all_rows(plus, axis_name))
    values = jnp.square(twice / 2).sum(axis=-1)
  return mask(values.reshape(jnp.shape(student_logits)[:-1]), where)


def _squares_by_class(q: jax.Array, p: jax.Array, axis_name: AxisName) -> jax.Array:
  """The squared lengths `[classes]` of the rows of `Q'Q - P'P`, for q and p `[batch, classes]`."""
  if q.shape[-1] <= 4 * len(q):
    if axis_name is None:
      return _squared_gram_difference(q.T, p.T)
    return jnp.square(all_sum(gram_difference(q.T, p.T), axis_name)).sum(axis=-1)
  # The same sums over the pairs of examples, never [classes, classes].
  plus, minus = q + p, q - p
  all_plus, all_minus = all_rows(plus, axis_name), all_rows(minus, axis_name)
  products = lambda a, b, c: _matmul(inner_products(a, b), c)
  crossed = products(minus, all_minus, all_plus) + 2 * products(minus, all_plus, all_minus)
  return all_sum(_down(plus * crossed + minus * products(plus, all_plus, all_minus)), axis_name) / 4


def _down(x: jax.Array) -> jax.Array:
  """The sum over the batch, as a product: XLA's own takes twenty times as long on a CPU."""
  return _matmul(jnp.ones(len(x), x.dtype), x)


@jax.custom_jvp
def _squared_gram_difference(x: jax.Array, y: jax.Array) -> jax.Array:
  """The squared lengths of the rows of `D = xx' - yy'`; the derivative uses that D is symmetric."""
  return jnp.square(gram_difference(x, y)).sum(axis=-1)


def _squared_gram_difference_jvp(primals, tangents):
  difference = gram_difference(*primals)
  products = difference * gram_difference_half_tangent(primals, tangents)
  return jnp.square(difference).sum(axis=-1), 2 * (products.sum(axis=1) + products.sum(axis=0))


_squared_gram_difference.defjvp(_squared_gram_difference_jvp, symbolic_zeros=True)


def _relative_to_class(
  log_probs: jax.Array, where: jax.Array | None, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
  """Probabilities `[batch, classes]` over the largest of their class, 0 for masked examples, and that `[classes]`.

  The correlation within a class is the same, and its squares stay in range however unlikely the class is.
  """
  if where is not None:
    log_probs = jnp.where(where[..., None], log_probs, -jnp.inf)
  log_probs = log_probs.reshape(-1, log_probs.shape[-1])
  largest = jax.lax.stop_gradient(log_probs)
  while len(largest) > 1:  # by halves, which may overlap: six times as fast as XLA's maximum along that axis on a CPU
    largest = jnp.maximum(largest[: -(len(largest) // -2)], largest[len(largest) // 2 :])
  largest = all_max(largest.max(axis=0, initial=-jnp.inf), axis_name)
  largest = jnp.where(largest > -jnp.inf, largest, 0)
  return jnp.exp(log_probs - largest), jnp.exp(largest)


def _probabilities(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  temperature: float | jax.Array,
  where: jax.Array | None,
  axis_name: AxisName,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """q and p, `[batch, classes]`, 0 for masked examples, and how many count on all devices."""
  student, teacher, temperature = logit_pair(student_logits, teacher_logits, where, temperature=temperature)
  q, p = (mask(softmax(soften(logits, temperature)), where) for logits in (student, teacher))
  return q.reshape(-1, q.shape[-1]), p.reshape(-1, p.shape[-1]), _count(q, where, axis_name)


def _count(values: jax.Array, where: jax.Array | None, axis_name: AxisName) -> jax.Array:
  """How many examples of `values [..., classes]` count on all devices, at least 1."""
  return jnp.maximum(masked_sum(values[..., 0], where, axis_name)[1], 1)
