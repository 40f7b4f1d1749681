"""Losses on logits that know the true class: `[..., classes] -> [...]`, one value per example.

Everything is computed from log-probabilities. A class at -inf is impossible; masked so on both sides it adds nothing.
"""

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import check_range, mask
from kdflax.numerics.log_probabilities import log_softmax, logit_pair, relative_entropy, soften
from kdflax.numerics.targets import cross_entropy, decouple, is_target, log_softmax_among


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

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[2.0, 1.0, 0.0]])
    >>> print(f"{dkd(student, teacher, jnp.array([0]))[0]:.4f}")
    1.0188

  Reference: Borui Zhao, Quan Cui, Renjie Song, Yiyu Qiu and Jiajun Liang, "Decoupled Knowledge Distillation", 2022,
  arXiv 2203.08679. The authors' code takes the logarithm of summed probabilities, which is NaN for large logits, and
  hides the target with a logit of -1000; this stays in log-space.
  """
  student, teacher, temperature, alpha, beta = logit_pair(
    student_logits, teacher_logits, where, temperature=temperature, alpha=alpha, beta=beta
  )
  of_target = is_target(labels, student, where)
  p, q = (decouple(soften(logits, temperature), of_target) for logits in (teacher, student))
  target = relative_entropy(p[0], q[0])
  others = relative_entropy(p[1], q[1])
  values = temperature**2 * (alpha * target + beta * others)
  return mask(jnp.where(of_target.any(axis=-1), values, jnp.nan), where)


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

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[2.0, 1.0, 0.0]])
    >>> print(f"{nkd(student, teacher, jnp.array([0]))[0]:.4f}")
    1.4066

  Reference: Zhendong Yang, Ailing Zeng, Zhe Li, Tianke Zhang, Chun Yuan and Yu Li, "From Knowledge Distillation to
  Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", 2023, arXiv
  2303.13005. As in the authors' code the target part takes no temperature. Nothing is detached here; stop the teacher
  where the loss is used.
  """
  student, teacher, temperature, gamma = logit_pair(
    student_logits, teacher_logits, where, temperature=temperature, gamma=gamma
  )
  of_target = is_target(labels, student, where)
  (log_p, _), (log_q, _) = (decouple(logits, of_target) for logits in (teacher, student))
  (_, log_p_others), (_, log_q_others) = (
    decouple(soften(logits, temperature), of_target) for logits in (teacher, student)
  )
  target = cross_entropy(jnp.exp(log_p[..., :1]), log_q[..., :1], log_p[..., :1] == -jnp.inf)
  others = cross_entropy(jnp.exp(log_p_others), log_q_others, log_p_others == -jnp.inf)
  values = target + gamma * temperature**2 * others
  return mask(jnp.where(of_target.any(axis=-1), values, jnp.nan), where)


def rld(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array,
  top_temperature: float | jax.Array,
  alpha: float | jax.Array,
  beta: float | jax.Array,
  where: jax.Array | None = None,
) -> jax.Array:
  """Refined logit distillation: the teacher's confidence on the true class, and its ranking of what lies below that.

  Matches the student's probability of the true class to the largest that the teacher gives any class, right or wrong,
  so a mistaken teacher misleads no one; and the distribution over the classes that the teacher puts below the true
  one, which is 0 without such a class.

    alpha T_top^2 KL((p_max, 1 - p_max) || (q_y, 1 - q_y)) + beta T^2 KL(p^ || q^)

  p and q of the first part are softmax probabilities at T_top; p^ and q^ those at T over the classes c whose teacher
  logit is below that of the label y. A label whose class the student rules out with -inf makes the value inf.

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    labels: integer `[...]`, the true class y of each example. A label outside `0 .. classes - 1` cannot be refused
      once traced; where it counts the value is NaN.
    temperature: T > 0 of the second part, dimensionless, may be traced; broadcasts against `[...]`.
    top_temperature: T_top > 0 of the first part, likewise.
    alpha: weight of the first part, may be traced.
    beta: weight of the second part, may be traced.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input has the wrong kind of dtype, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 1.0, 0.0]]), jnp.array([[1.0, 2.0, 0.0]])
    >>> weights = {"alpha": 1.0, "beta": 1.0}
    >>> print(f"{rld(student, teacher, jnp.array([1]), temperature=2.0, top_temperature=2.0, **weights)[0]:.4f}")
    0.1452

  Reference: Wujie Sun, Defang Chen, Siwei Lyu, Genlang Chen, Chun Chen and Can Wang, "Knowledge Distillation with
  Refined Logits", 2024, arXiv 2408.07703.
  """
  hyper = {"temperature": temperature, "top_temperature": top_temperature, "alpha": alpha, "beta": beta}
  student, teacher, temperature, top_temperature, alpha, beta = logit_pair(
    student_logits, teacher_logits, where, fewest_classes=2, **hyper
  )
  of_target, classes = is_target(labels, student, where), jnp.arange(student.shape[-1])
  is_top = jnp.argmax(teacher, axis=-1, keepdims=True) == classes
  top, _ = decouple(soften(teacher, top_temperature), is_top)
  target, _ = decouple(soften(student, top_temperature), of_target)
  below = teacher < jnp.sum(jnp.where(of_target, teacher, 0), axis=-1, keepdims=True)
  p, q = (log_softmax_among(soften(logits, temperature), below) for logits in (teacher, student))
  values = alpha * top_temperature**2 * relative_entropy(top, target) + beta * temperature**2 * relative_entropy(p, q)
  return mask(jnp.where(of_target.any(axis=-1), values, jnp.nan), where)


def ofa(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  epsilon: float | jax.Array,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Cross-entropy with the teacher's probabilities, that of the true class enhanced.

  Matches a teacher of another architecture, whose ranking of the other classes helps less the less it is sure: a power
  above 1 favours the target. A cross-entropy, so the minimum is not 0. At epsilon = 1 it is the plain one with soft
  targets.

    -sum_c ((p_c + [c = y])^epsilon - [c = y]) log q_c,   p = softmax(teacher / T), q = softmax(student / T)

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    labels: integer `[...]`, the true class y of each example. A label outside `0 .. classes - 1` cannot be refused
      once traced; where it counts the value is NaN.
    epsilon: above 0, the power, may be traced; broadcasts against `[...]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, without T^2; 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input has the wrong kind of dtype, `where` does not fit, or `epsilon` is known
      not to be above 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]])
    >>> print(f"{ofa(student, teacher, jnp.array([0]), epsilon=1.5)[0]:.4f}")
    0.5834

  Reference: Zhiwei Hao, Jianyuan Guo, Kai Han, Yehui Tang, Han Hu, Yunhe Wang and Chang Xu, "One-for-All: Bridge the
  Gap Between Heterogeneous Architectures in Knowledge Distillation", 2023, arXiv 2310.19444.
  """
  check_range("epsilon", epsilon, "above 0", lambda power: power > 0, where)
  student, teacher, epsilon, temperature = logit_pair(
    student_logits, teacher_logits, where, epsilon=epsilon, temperature=temperature
  )
  of_target = is_target(labels, student, where)
  log_p, log_q = (log_softmax(logits, temperature) for logits in (teacher, student))
  enhanced = jnp.expm1(epsilon[..., None] * jnp.log1p(jnp.exp(log_p)))
  weights = jnp.where(of_target, enhanced, jnp.exp(soften(log_p, 1 / epsilon)))
  values = cross_entropy(weights, log_q, log_p == -jnp.inf)
  return mask(jnp.where(of_target.any(axis=-1), values, jnp.nan), where)
