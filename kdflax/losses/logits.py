"""Losses on logits: `[..., classes] -> [...]`, one value per example.

Everything is computed from log-probabilities. A class at -inf is impossible; masked so on both sides it adds nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import check_same, mask
from kdflax.numerics.log_probabilities import less, log_softmax, log_sum_exp, logit_pair, relative_entropy, soften
from kdflax.numerics.safe import safe_sqrt


def kl_soft_targets(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Kullback-Leibler divergence from the teacher's to the student's softened probabilities.

  Matches the whole distribution over the classes. As the temperature grows it becomes `sum_c (s_c - t_c)^2 / (2 K)`
  over centred logits; the factor T^2 keeps the size of its gradient independent of T.

    T^2 sum_c p_c (log p_c - log q_c),   p = softmax(teacher / T), q = softmax(student / T)

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Reference: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
  PyTorch's default `kl_div` reduction divides by the number of classes as well; this does not. Mutual learning (Zhang
  et al., "Deep Mutual Learning", 2018, arXiv 1706.00384) is this loss in both directions, one for each peer.
  """
  student, teacher, temperature = logit_pair(student_logits, teacher_logits, where, temperature=temperature)
  divergence = relative_entropy(log_softmax(teacher, temperature), log_softmax(student, temperature))
  return mask(temperature**2 * divergence, where)


def hard_targets(student_logits: jax.Array, teacher_logits: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
  """Cross-entropy of the student with the teacher's most likely class.

  Uses only the teacher's decision, nothing of its confidence; the first of equally likely classes wins.

    -log softmax(student)[argmax_c teacher_c]

  Args:
    student_logits: `[..., classes]`.
    teacher_logits: `[..., classes]`; gets no gradient.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Reference: Touvron et al., "Training data-efficient image transformers and distillation through attention", 2021,
  arXiv 2012.12877 (hard-label distillation).
  """
  student, teacher = logit_pair(student_logits, teacher_logits, where)
  # The position of the maximum by two plain reductions, which a CPU does several times faster than argmax.
  classes = jnp.arange(teacher.shape[-1])
  positions = jnp.where(teacher == teacher.max(axis=-1, keepdims=True), classes, len(classes)).min(-1, keepdims=True)
  largest, log_sum = log_sum_exp(student)
  values = log_sum - (jnp.take_along_axis(student, positions, axis=-1) - largest)
  return mask(values[..., 0], where)


def dkd(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array = 4.0,
  alpha: float | jax.Array = 1.0,
  beta: float | jax.Array = 8.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Decoupled distillation: the target class against the rest, and the rest among themselves.

  Matches the teacher's confidence in the true class (weight alpha) and, independently of it, how the teacher ranks the
  other classes (weight beta). With beta equal to the teacher's probability of the other classes and alpha = 1 it is
  `kl_soft_targets`. With two classes the second part is 0.

    T^2 (alpha KL(b_p || b_q) + beta KL(p^ || q^)),   b = (p_y, 1 - p_y),   p^_j = p_j / (1 - p_y) for j != y

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    labels: integer `[...]`, the true class y of each example. A label outside `0 .. classes - 1` cannot be refused
      once traced; where it counts the value is NaN.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    alpha: weight of the target part, may be traced.
    beta: weight of the other classes' part, may be traced.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input has the wrong kind of dtype, or `where` does not fit.

  Reference: Zhao et al., "Decoupled Knowledge Distillation", 2022, arXiv 2203.08679. The authors' code takes the
  logarithm of summed probabilities, which is NaN for large logits, and hides the target with a logit of -1000; this
  stays in log-space.
  """
  student, teacher, temperature, alpha, beta = logit_pair(
    student_logits, teacher_logits, where, temperature=temperature, alpha=alpha, beta=beta
  )
  is_target = _is_target(labels, student, where)
  p, q = (_decouple(soften(logits, temperature), is_target) for logits in (teacher, student))
  target = relative_entropy(p[0], q[0])
  others = relative_entropy(p[1], q[1])
  values = temperature**2 * (alpha * target + beta * others)
  return mask(jnp.where(is_target.any(axis=-1), values, jnp.nan), where)


def nkd(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  gamma: float | jax.Array = 1.5,
  where: jax.Array | None = None,
) -> jax.Array:
  """Normalised distillation: a soft target-class loss and a cross-entropy over the other classes.

  Matches how the teacher ranks the other classes, and pushes the target class by the teacher's confidence in it. Both
  parts are cross-entropies, so the minimum is not 0. With two classes the second part is 0.

    -p_y log q_y - gamma T^2 sum_{j != y} p^_j log q^_j

  p_y and q_y are softmax probabilities at temperature 1; p^ and q^ are softmax probabilities at temperature T over the
  other classes alone.

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    labels: integer `[...]`, the true class y of each example. A label outside `0 .. classes - 1` cannot be refused
      once traced; where it counts the value is NaN.
    temperature: T > 0 of the other classes' part, dimensionless, may be traced; broadcasts against `[...]`.
    gamma: weight of the other classes' part, may be traced.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input has the wrong kind of dtype, or `where` does not fit.

  Reference: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
  Normalized Loss and Customized Soft Labels", 2023, arXiv 2303.13005. As in the authors' code the target part takes no
  temperature. Nothing is detached here; stop the teacher where the loss is used.
  """
  student, teacher, temperature, gamma = logit_pair(
    student_logits, teacher_logits, where, temperature=temperature, gamma=gamma
  )
  is_target = _is_target(labels, student, where)
  (log_p, _), (log_q, _) = (_decouple(logits, is_target) for logits in (teacher, student))
  (_, log_p_others), (_, log_q_others) = (
    _decouple(soften(logits, temperature), is_target) for logits in (teacher, student)
  )
  target = _cross_entropy(log_p[..., :1], log_q[..., :1])
  others = _cross_entropy(log_p_others, log_q_others)
  values = target + gamma * temperature**2 * others
  return mask(jnp.where(is_target.any(axis=-1), values, jnp.nan), where)


def _is_target(labels: jax.Array, logits: jax.Array, where: jax.Array | None) -> jax.Array:
  """bool `[..., classes]`: which class is the label; masked examples have label 0."""
  labels = jnp.asarray(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integers; got {labels.dtype}{list(labels.shape)}. Take the argmax of one-hots.")
  check_same("leading (example) axes", student_logits=logits.shape[:-1], labels=labels.shape)
  return mask(labels, where)[..., None] == jnp.arange(logits.shape[-1])


def _decouple(logits: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities `[..., 2]` of (target, any other), and `[..., classes]` of the others among themselves."""
  own = jnp.sum(jnp.where(is_target, logits, 0), axis=-1, keepdims=True)
  hidden = is_target | (logits == -jnp.inf)
  # Without any other class the sum below is 0, whose logarithm has no derivative: it is taken of zeros instead.
  alone = hidden.all(axis=-1, keepdims=True)
  largest, log_sum = log_sum_exp(jnp.where(alone, 0, jnp.where(hidden, -jnp.inf, logits)))
  given_other = jnp.where(hidden, -jnp.inf, less(jnp.where(hidden, 0, logits), largest, log_sum))
  margin = jnp.where(alone, jnp.inf, own - largest - log_sum)
  return jnp.concatenate([jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)], axis=-1), given_other


def _cross_entropy(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """`-sum_c p_c log q_c`: a class with log p = -inf adds nothing, any other with log q = -inf makes it inf."""
  missed = log_q == -jnp.inf
  terms = jnp.where(missed, jnp.inf, -jnp.exp(log_p) * jnp.where(missed, 0, log_q))  # also where p has underflown
  return jnp.sum(jnp.where(log_p == -jnp.inf, 0, terms), axis=-1)


def standardize_logits(logits: jax.Array, *, axis: int = -1, epsilon: float | jax.Array = 1e-7) -> jax.Array:
  """Shifts logits to mean 0 and scales them to standard deviation 1.

  After it a loss sees only the shape of the logits, not their size. A constant row becomes 0; there the derivative of
  the deviation is taken as 0, so that the gradient is the centring over epsilon. A class at -inf stays there and takes
  no part.

    (x - mean x) / (std x + epsilon),   std with n - 1 in the denominator

  Args:
    logits: `[..., classes, ...]`.
    axis: the axis of the classes, static.
    epsilon: in the units of the logits, may be traced.

  Returns:
    The shape of `logits`, in float32 or wider.

  Raises:
    ValueError: if the logits are not floating or have no such axis.

  Reference: Sun et al., "Logit Standardization in Knowledge Distillation", 2024, arXiv 2403.01427.
  """
  logits = jnp.asarray(logits)
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f"logits must be floating; got {logits.dtype}{list(logits.shape)}. Cast it, e.g. to float32.")
  if not -logits.ndim <= axis < logits.ndim:
    raise ValueError(f"axis must be one of the {logits.ndim} axes of logits {logits.shape}; got {axis}")
  logits = logits.astype(jnp.result_type(logits.dtype, jnp.float32))
  possible = logits != -jnp.inf
  count = possible.sum(axis=axis, keepdims=True).astype(logits.dtype)
  total = lambda x: jnp.where(possible, x, 0).sum(axis=axis, keepdims=True)
  finite = jnp.where(possible, logits, 0)
  centred = finite - total(finite) / jnp.maximum(count, 1)
  centred = centred - total(centred) / jnp.maximum(count, 1)  # the first mean is rounded
  variance = total(jnp.square(centred)) / jnp.maximum(count - 1, 1)
  return jnp.where(possible, centred / (safe_sqrt(variance) + epsilon), -jnp.inf)


def standardized(loss: Callable[..., jax.Array], *, epsilon: float | jax.Array = 1e-7) -> Callable[..., jax.Array]:
  """Makes a logit loss see standardised logits on both sides.

    standardized(kl_soft_targets)(student_logits, teacher_logits, temperature=2.0)

  Args:
    loss: any loss that takes `(student_logits, teacher_logits, ...)`, classes last; further arguments pass through.
    epsilon: as in `standardize_logits`.

  Returns:
    A loss with the same arguments.

  Reference: Sun et al., "Logit Standardization in Knowledge Distillation", 2024, arXiv 2403.01427. The division by the
  temperature comes after it.
  """

  @functools.wraps(loss)
  def wrapped(student_logits, teacher_logits, *args, where=None, **kwargs):
    # Masked first: the derivative of a row of NaN would be NaN, whatever the loss does with it afterwards.
    pair = (standardize_logits(x, epsilon=epsilon) for x in logit_pair(student_logits, teacher_logits, where))
    return loss(*pair, *args, where=where, **kwargs)

  return wrapped
