"""Losses on logits: `[..., classes] -> [...]`, one value per example.

Everything is computed from log-probabilities. A class at -inf is impossible; masked so on both sides it adds nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import check_range, mask
from kdflax.numerics.log_probabilities import log_softmax, log_sum_exp, logit_pair, relative_entropy, soften
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

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[2.0, 1.0, 0.0]])
    >>> print(f"{kl_soft_targets(student, teacher, temperature=2.0)[0]:.4f}")
    0.0838

  Reference: Geoffrey Hinton, Oriol Vinyals and Jeff Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
  1503.02531. PyTorch's default `kl_div` reduction divides by the number of classes as well; this does not. Mutual
  learning (Ying Zhang, Tao Xiang, Timothy M. Hospedales and Huchuan Lu, "Deep Mutual Learning", 2018, arXiv 1706.00384)
  is this loss in both directions, one for each peer.
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

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[2.0, 1.0, 0.0]])
    >>> print(f"{hard_targets(student, teacher)[0]:.4f}")
    0.5514

  Reference: Hugo Touvron, Matthieu Cord, Matthijs Douze, Francisco Massa, Alexandre Sablayrolles and Hervé Jégou,
  "Training data-efficient image transformers and distillation through attention", 2021, arXiv 2012.12877 (hard-label
  distillation).
  """
  student, teacher = logit_pair(student_logits, teacher_logits, where)
  # The position of the maximum by two plain reductions, which a CPU does several times faster than argmax.
  classes = jnp.arange(teacher.shape[-1])
  positions = jnp.where(teacher == teacher.max(axis=-1, keepdims=True), classes, len(classes)).min(-1, keepdims=True)
  largest, log_sum = log_sum_exp(student)
  values = log_sum - (jnp.take_along_axis(student, positions, axis=-1) - largest)
  return mask(values[..., 0], where)


def bernoulli_kl(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence from the teacher's to the student's probabilities of labels that do not exclude each other.

  Matches each label for itself, as a sigmoid does: for multi-label classification, or one logit for one yes or no. 0
  only where all the probabilities are equal.

    sum_c KL(Bernoulli(p_c) || Bernoulli(q_c)),   p = sigmoid(teacher / T), q = sigmoid(student / T)

  Args:
    student_logits: `[..., labels]`; a label at -inf is impossible, and adds nothing if it is so for the teacher too.
    teacher_logits: `[..., labels]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, a sum over the labels without T^2; 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 2.0]])
    >>> print(f"{bernoulli_kl(student, teacher)[0]:.4f}")
    0.1109

  Reference: Penghui Yang, Ming-Kun Xie, Chen-Chen Zong, Lei Feng, Gang Niu, Masashi Sugiyama and Sheng-Jun Huang,
  "Multi-Label Knowledge Distillation", 2023, arXiv 2308.06453, its logits term, which halves nothing and takes no
  temperature.
  """
  student, teacher, temperature = logit_pair(
    student_logits, teacher_logits, where, fewest_classes=1, temperature=temperature
  )

  def log_probabilities(logits: jax.Array) -> jax.Array:
    """Of yes, then of no: pairs that sum to 1, so that `relative_entropy` holds for their sum."""
    logits = soften(logits, temperature)
    return jnp.concatenate([jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)], axis=-1)

  return mask(relative_entropy(log_probabilities(teacher), log_probabilities(student)), where)


def wttm(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  gamma: float | jax.Array,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence of the student at temperature 1 from the teacher's sharpened or flattened probabilities, weighted.

  Matches a power of the teacher's probabilities, as a temperature of 1 / gamma on the teacher alone does; examples
  whose power is far from peaked weigh more. At gamma = 1 it is `forward_kl`; otherwise 0 where the student is the
  transformed teacher.

    S KL(p^gamma / S || q),   S = sum_c p_c^gamma,   p = softmax(teacher), q = softmax(student)

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    gamma: above 0, the power, usually below 1; may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, `where` does not fit, or `gamma` is known not to be
      above 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0]])
    >>> print(f"{wttm(student, teacher, gamma=0.5)[0]:.4f}")
    0.0000

  Reference: Kaixiang Zheng and En-Hui Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024, arXiv
  2402.11148.
  """
  check_range("gamma", gamma, "above 0", lambda power: power > 0, where)
  student, teacher, gamma = logit_pair(student_logits, teacher_logits, where, gamma=gamma)
  powers = soften(log_softmax(teacher, jnp.ones_like(gamma)), 1 / gamma)
  largest, log_sum = log_sum_exp(powers)
  divergence = relative_entropy(log_softmax(powers, jnp.ones_like(gamma)), log_softmax(student, jnp.ones_like(gamma)))
  return mask(jnp.exp(largest + log_sum)[..., 0] * divergence, where)


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

  Examples:
    >>> import jax.numpy as jnp
    >>> print(f"{standardize_logits(jnp.array([1.0, 2.0, 3.0]))[2]:.4f}")
    1.0000

  Reference: Shangquan Sun, Wenqi Ren, Jingzhi Li, Rui Wang and Xiaochun Cao, "Logit Standardization in Knowledge
  Distillation", 2024, arXiv 2403.01427.
  """
  logits = jnp.asarray(logits)
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f"logits must be floating; got {logits.dtype}{list(logits.shape)}; cast it, e.g. to float32")
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

  Reference: Shangquan Sun, Wenqi Ren, Jingzhi Li, Rui Wang and Xiaochun Cao, "Logit Standardization in Knowledge
  Distillation", 2024, arXiv 2403.01427. The division by the temperature comes after it.
  """

  @functools.wraps(loss)
  def wrapped(student_logits, teacher_logits, *args, where=None, **kwargs):
    # Masked first: the derivative of a row of NaN would be NaN, whatever the loss does with it afterwards.
    pair = (standardize_logits(x, epsilon=epsilon) for x in logit_pair(student_logits, teacher_logits, where))
    return loss(*pair, *args, where=where, **kwargs)

  return wrapped
