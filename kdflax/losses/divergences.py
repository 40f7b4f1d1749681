"""Divergences between two softmax distributions: `[..., classes] -> [...]`, one value per example, without T^2.

q is the student's and p the teacher's distribution at temperature T. All of it happens on log-probabilities; mixtures
are sums of exponentials. A class at -inf on both sides adds nothing. A class at -inf on one side only is impossible
there: the divergence is infinite where the other side's expectation runs over it, however unlikely it is there.
"""

import jax
import jax.numpy as jnp

from kdflax.numerics.divided_differences import exp_divided_difference
from kdflax.numerics.examples import check_range, mask
from kdflax.numerics.log_probabilities import (
  half_difference,
  log_mixture,
  log_softmax,
  logit_pair,
  mixture_divergence,
  mixture_end,
  relative_entropy,
  soften,
  softmax,
)


def _log_probabilities(
  student_logits: jax.Array, teacher_logits: jax.Array, where: jax.Array | None, **hyper: float | jax.Array
) -> list[jax.Array]:
  """log q, log p and the hyper-parameters after the temperature, which come first."""
  student, teacher, temperature, *others = logit_pair(student_logits, teacher_logits, where, fewest_classes=2, **hyper)
  return [log_softmax(student, temperature), log_softmax(teacher, temperature), *others]


def _check_share(name: str, value: float | jax.Array, where: jax.Array | None) -> None:
  check_range(name, value, "at least 0 and below 1", lambda share: (share >= 0) & (share < 1), where)


def forward_kl(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence from the teacher's to the student's distribution.

  Makes the student cover every class that the teacher gives probability; it is `kl_soft_targets` without T^2.

    KL(p || q) = sum_c p_c (log p_c - log q_c)

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
    >>> print(f"{forward_kl(student, teacher)[0]:.4f}")
    0.0538

  Reference: Geoffrey Hinton, Oriol Vinyals and Jeff Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
  1503.02531.
  """
  log_q, log_p = _log_probabilities(student_logits, teacher_logits, where, temperature=temperature)
  return mask(relative_entropy(log_p, log_q), where)


def reverse_kl(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence from the student's to the teacher's distribution.

  Makes the student keep to classes that the teacher gives probability, at the price of leaving some out.

    KL(q || p) = sum_c q_c (log q_c - log p_c)

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
    >>> print(f"{reverse_kl(student, teacher)[0]:.4f}")
    0.0681

  Reference: Yuxian Gu, Li Dong, Furu Wei and Minlie Huang, "MiniLLM: Knowledge Distillation of Large Language Models",
  2024, arXiv 2306.08543 (the divergence of each token; the paper samples sequences from the student).
  """
  log_q, log_p = _log_probabilities(student_logits, teacher_logits, where, temperature=temperature)
  return mask(relative_entropy(log_q, log_p), where)


def total_variation(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Half the absolute difference of the distributions.

  Between 0 and 1, symmetric; its gradient does not shrink as the distributions meet, and is 0 where they are equal.

    sum_c |p_c - q_c| / 2

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
    >>> print(f"{total_variation(student, teacher)[0]:.4f}")
    0.1219

  Reference: Yuqiao Wen, Zichao Li, Wenyu Du and Lili Mou, "f-Divergence Minimization for Sequence-Level Knowledge
  Distillation", 2023, arXiv 2307.15190.
  """
  student, teacher, temperature = logit_pair(student_logits, teacher_logits, where, temperature=temperature)
  q, p = softmax(soften(student, temperature)), softmax(soften(teacher, temperature))
  return mask(half_difference(q, p), where)


def skew_kl(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  alpha: float | jax.Array = 0.1,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence from the teacher's distribution to its mixture with the student's.

  `forward_kl` whose value never exceeds `-log alpha` and whose gradient stays bounded where the student has hardly any
  probability. At alpha = 0 it is `forward_kl`.

    KL(p || alpha p + (1 - alpha) q)

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    alpha: share of the teacher in the mixture, in [0, 1), may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, `where` does not fit, or `alpha` is a number
      outside [0, 1).

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[2.0, 1.0, 0.0]])
    >>> print(f"{skew_kl(student, teacher)[0]:.4f}")
    0.0452

  Reference: Jongwoo Ko, Sungnyun Kim, Tianyi Chen and Se-Young Yun, "DistiLLM: Towards Streamlined Distillation for
  Large Language Models", 2024, arXiv 2402.03898.
  """
  _check_share("alpha", alpha, where)
  log_q, log_p, alpha = _log_probabilities(student_logits, teacher_logits, where, temperature=temperature, alpha=alpha)
  return mask(relative_entropy(log_p, log_mixture(log_p, log_q, alpha)), where)


def reverse_skew_kl(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  alpha: float | jax.Array = 0.1,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence from the student's distribution to its mixture with the teacher's.

  `reverse_kl` whose value never exceeds `-log alpha`, finite also where the teacher has no probability. At alpha = 0
  it is `reverse_kl`.

    KL(q || alpha q + (1 - alpha) p)

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    alpha: share of the student in the mixture, in [0, 1), may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, `where` does not fit, or `alpha` is a number
      outside [0, 1).

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[2.0, 1.0, 0.0]])
    >>> print(f"{reverse_skew_kl(student, teacher)[0]:.4f}")
    0.0518

  Reference: Jongwoo Ko, Sungnyun Kim, Tianyi Chen and Se-Young Yun, "DistiLLM: Towards Streamlined Distillation for
  Large Language Models", 2024, arXiv 2402.03898.
  """
  _check_share("alpha", alpha, where)
  log_q, log_p, alpha = _log_probabilities(student_logits, teacher_logits, where, temperature=temperature, alpha=alpha)
  return mask(relative_entropy(log_q, log_mixture(log_q, log_p, alpha)), where)


def jensen_shannon(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  beta: float | jax.Array = 0.5,
  where: jax.Array | None = None,
) -> jax.Array:
  """Generalised Jensen-Shannon divergence: both distributions against their mixture.

  Between the two directions of KL, bounded, symmetric at beta = 1/2. The ends are not its limits: as beta goes to 0 or
  1 the divergence goes to 0, while a beta of exactly 0 or 1 is by convention `forward_kl` or `reverse_kl`.

    beta KL(p || M) + (1 - beta) KL(q || M),   M = beta p + (1 - beta) q

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    beta: share of the teacher in the mixture: a number in [0, 1], or an array inside (0, 1), as is a traced number; it
      broadcasts against `[...]`.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, `beta` is a number outside [0, 1] or an array that is
      not inside (0, 1), or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[2.0, 1.0, 0.0]])
    >>> print(f"{jensen_shannon(student, teacher)[0]:.4f}")
    0.0149

  Reference: Rishabh Agarwal, Nino Vieillard, Yongchao Zhou, Piotr Stanczyk, Sabela Ramos, Matthieu Geist and Olivier
  Bachem, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024, arXiv 2306.13649.
  Some implementations mix probabilities in the dtype of the inputs, which turns negative in bfloat16.
  """
  if (end := mixture_end(beta)) is not None:
    return (forward_kl, reverse_kl)[end](student_logits, teacher_logits, temperature=temperature, where=where)
  log_q, log_p, beta = _log_probabilities(student_logits, teacher_logits, where, temperature=temperature, beta=beta)
  return mask(mixture_divergence(log_p, log_q, beta), where)


def alpha_beta(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  alpha: float | jax.Array,
  beta: float | jax.Array,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence that weighs errors by both probabilities, each in a power of its own.

  Between the two directions of KL and beyond them: alpha weighs the classes where the teacher is likely, beta those
  where the student is. At (1, 0) it is `forward_kl`, at (0, 1) `reverse_kl`; the formula has limits where alpha, beta
  or their sum is 0, and these are taken. Never negative, and 0 where the distributions are equal.

    -sum_c (p_c^a q_c^b - a/(a+b) p_c^(a+b) - b/(a+b) q_c^(a+b)) / (a b)

  Args:
    student_logits: `[..., classes]`; -inf masks a class if the teacher masks it too.
    teacher_logits: `[..., classes]`.
    alpha: a, the power of the teacher's probabilities, of any sign, may be traced; broadcasts against `[...]`.
    beta: b, the power of the student's probabilities, likewise.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which examples count.

  Returns:
    `[...]` in float32 or wider, 0 for masked examples. Where a + b is not positive, or a power is negative, it may be
    too large for that: probabilities close to 0 are divided by.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0]])
    >>> print(f"{alpha_beta(student, teacher, alpha=0.5, beta=0.5)[0]:.4f}")
    0.0740

  Reference: Guanghui Wang, Zhiyong Yang, Zitai Wang, Shi Wang, Qianqian Xu and Qingming Huang, "ABKD: Pursuing a Proper
  Allocation of the Probability Mass in Knowledge Distillation via alpha-beta-Divergence", 2025, arXiv 2505.04560. In
  the limits the authors' code has alpha or beta times this. Here every term is `(log q - log p)^2 exp[(a+b) log p, a
  log p + b log q, (a+b) log q]`, a divided difference of the exponential, which is the same number and has all the
  limits.
  """
  log_q, log_p, alpha, beta = _log_probabilities(
    student_logits, teacher_logits, where, temperature=temperature, alpha=alpha, beta=beta
  )
  a, b = jnp.broadcast_to(alpha[..., None], log_p.shape), jnp.broadcast_to(beta[..., None], log_p.shape)
  never_p, never_q = log_p == -jnp.inf, log_q == -jnp.inf
  possible = ~(never_p | never_q)
  x, y = jnp.where(possible, log_p, 0), jnp.where(possible, log_q, 0)
  terms = jnp.square(y - x) * exp_divided_difference((a + b) * x, a * x + b * y, (a + b) * y)
  # Of a class that one side rules out a single power is left, if the exponents let the others vanish.
  terms = jnp.where(never_p & ~never_q, _alone(log_q, b, a), terms)
  terms = jnp.where(never_q & ~never_p, _alone(log_p, a, b), terms)
  return mask(jnp.where(never_p & never_q, 0, terms).sum(axis=-1), where)


def _alone(log_x: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
  """What a class adds to `alpha_beta` that the other side rules out, with the exponents of its own and of the other."""
  finite = (other > 0) & (own + other > 0)
  divisor = jnp.where(finite, other * (own + other), 1)
  return jnp.where(finite, jnp.exp((own + other) * jnp.where(log_x == -jnp.inf, 0, log_x)) / divisor, jnp.inf)
