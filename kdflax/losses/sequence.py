"""Losses of tokens whose teacher is known in part or has another vocabulary: `[..., classes] -> [...]`.

One value per token. q is the student's and p the teacher's distribution at temperature T, without T^2. Of a teacher
whose k likeliest classes were stored, everything else is one outcome more: the tail.
"""

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import as_examples, check_classes, check_same, hyper_parameters, mask
from kdflax.numerics.log_probabilities import (
  half_difference,
  log_softmax,
  log_sum_exp,
  mixture_divergence,
  mixture_end,
  relative_entropy,
  soften,
  softmax,
  subtract_log_sum,
)


def top_k_kl(
  student_logits: jax.Array,
  teacher_log_probs: jax.Array,
  teacher_indices: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  tail: bool = True,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence from a teacher known on k classes to the student, over these classes and the rest as one.

  Never above the divergence over all classes, and equal to it where k is all of them. Without the tail both sides are
  renormalised over the k classes: the student then learns nothing of the probability that it gives to others, and with
  k = 1 nothing at all.

    sum_j p_j (log p_j - log q_j) + p_rest (log p_rest - log q_rest),   j among the teacher's k classes

  Args:
    student_logits: `[..., classes]`.
    teacher_log_probs: `[..., k]`, logarithms of the teacher's probabilities over all classes, at the temperature. An
      entry of -inf fills up a shorter record and takes no part. Where rounding makes the probabilities sum to more
      than 1 they are normalised.
    teacher_indices: integer `[..., k]`, their classes, none twice. One outside `0 .. classes - 1` cannot be refused
      once traced; the value is NaN.
    temperature: T > 0 of the student alone, dimensionless, may be traced; broadcasts against `[...]`.
    tail: whether the rest is an outcome; static.
    where: bool `[...]`, which tokens count.

  Returns:
    `[...]` in float32 or wider, 0 for masked tokens.

  Raises:
    ValueError: if shapes or dtypes do not fit, or an index or the temperature is known and out of range.

  Examples:
    >>> logits, known = jnp.array([2.0, 1.0, 0.0, 0.0]), jnp.log(jnp.array([0.5, 0.25]))
    >>> print(f"{top_k_kl(logits, known, jnp.array([1, 0])):.4f}")
    0.2808
    >>> print(f"{top_k_kl(logits, known, jnp.array([1, 0]), tail=False):.4f}")
    0.3434

  Reference: Anshumann Anshumann, Mohd Abbas Zaidi, Akhil Kedia, Jinwoo Ahn, Taehwak Kwon, Kangwook Lee, Haejun Lee and
  Joohyung Lee, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", 2025, arXiv 2503.16870 (its
  account of top-k distillation). Most implementations leave the tail out; one clamps it, which stops its gradient.
  """
  log_q, log_p = _outcomes(student_logits, teacher_log_probs, teacher_indices, temperature, tail, where)
  return mask(relative_entropy(log_p, log_q), where)


def top_k_reverse_kl(
  student_logits: jax.Array,
  teacher_log_probs: jax.Array,
  teacher_indices: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  tail: bool = True,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence from the student to a teacher known on k classes, over these classes and the rest as one.

  Keeps the student to what the teacher knows. The tail is what makes it stable: without it the student may leave the k
  classes altogether, as both sides are renormalised over them.

    sum_j q_j (log q_j - log p_j) + q_rest (log q_rest - log p_rest),   j among the teacher's k classes

  Args:
    student_logits: `[..., classes]`.
    teacher_log_probs: `[..., k]`, logarithms of the teacher's probabilities over all classes, at the temperature. An
      entry of -inf fills up a shorter record and takes no part. The rest is given the rounding of a sum of 1 at least,
      as a probability of 0 would make the divergence infinite.
    teacher_indices: integer `[..., k]`, their classes, none twice. One outside `0 .. classes - 1` cannot be refused
      once traced; the value is NaN.
    temperature: T > 0 of the student alone, dimensionless, may be traced; broadcasts against `[...]`.
    tail: whether the rest is an outcome; static.
    where: bool `[...]`, which tokens count.

  Returns:
    `[...]` in float32 or wider, 0 for masked tokens.

  Raises:
    ValueError: if shapes or dtypes do not fit, or an index or the temperature is known and out of range.

  Examples:
    >>> logits, known = jnp.array([2.0, 1.0, 0.0, 0.0]), jnp.log(jnp.array([0.5, 0.25]))
    >>> print(f"{top_k_reverse_kl(logits, known, jnp.array([1, 0])):.4f}")
    0.2965

  Reference: Jonas Hübotter, Frederike Lübeck, Lejs Behric, Anton Baumann, Marco Bagatella, Daniel Marta, Ido Hakimi,
  Idan Shenfeld, Thomas Kleine Buening, Carlos Guestrin and Andreas Krause, "Reinforcement Learning via
  Self-Distillation", 2026, arXiv 2601.20802 (where the k classes are the student's).
  """
  log_q, log_p = _outcomes(student_logits, teacher_log_probs, teacher_indices, temperature, tail, where)
  return mask(_reverse(log_q, log_p, tail), where)


def top_k_jensen_shannon(
  student_logits: jax.Array,
  teacher_log_probs: jax.Array,
  teacher_indices: jax.Array,
  *,
  beta: float | jax.Array = 0.5,
  temperature: float | jax.Array = 1.0,
  tail: bool = True,
  where: jax.Array | None = None,
) -> jax.Array:
  """Generalised Jensen-Shannon divergence to a teacher known on k classes, over these and the rest as one.

  Bounded, symmetric at beta = 1/2. A beta of exactly 0 or 1 is by convention `top_k_kl` or `top_k_reverse_kl`, which
  are not its limits.

    beta KL(p || M) + (1 - beta) KL(q || M),   M = beta p + (1 - beta) q,   over the teacher's k classes and the rest

  Args:
    student_logits: `[..., classes]`.
    teacher_log_probs: `[..., k]`, logarithms of the teacher's probabilities over all classes, at the temperature. An
      entry of -inf fills up a shorter record and takes no part.
    teacher_indices: integer `[..., k]`, their classes, none twice. One outside `0 .. classes - 1` cannot be refused
      once traced; the value is NaN.
    beta: share of the teacher in the mixture: a number in [0, 1], or an array inside (0, 1), as is a traced number; it
      broadcasts against `[...]`.
    temperature: T > 0 of the student alone, dimensionless, may be traced; broadcasts against `[...]`.
    tail: whether the rest is an outcome; without it both sides are renormalised over the k classes; static.
    where: bool `[...]`, which tokens count.

  Returns:
    `[...]` in float32 or wider, 0 for masked tokens.

  Raises:
    ValueError: if shapes or dtypes do not fit, or beta, an index or the temperature is known and out of range.

  Examples:
    >>> logits, known = jnp.array([2.0, 1.0, 0.0, 0.0]), jnp.log(jnp.array([0.5, 0.25]))
    >>> print(f"{top_k_jensen_shannon(logits, known, jnp.array([1, 0])):.4f}")
    0.0701

  Reference: Rishabh Agarwal, Nino Vieillard, Yongchao Zhou, Piotr Stanczyk, Sabela Ramos, Matthieu Geist and Olivier
  Bachem, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024, arXiv 2306.13649
  (over all classes).
  """
  end = mixture_end(beta)
  log_q, log_p = _outcomes(student_logits, teacher_log_probs, teacher_indices, temperature, tail, where)
  if end is not None:
    return mask(_reverse(log_q, log_p, tail) if end else relative_entropy(log_p, log_q), where)
  (beta,) = hyper_parameters(log_q.shape[:-1], where, log_q.dtype, beta=beta)
  return mask(mixture_divergence(log_p, log_q, beta), where)


def sampled_kl(
  student_logits: jax.Array,
  teacher_indices: jax.Array,
  teacher_weights: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Cross-entropy of the student with classes drawn from the teacher, or with any weights on a few classes.

  With n classes drawn with replacement from the teacher and weights 1 / n its gradient is an unbiased estimate of that
  of `forward_kl`, which needs no other class; its value is larger by the teacher's entropy. Classes stored exactly and
  draws from the others, weighted by `p_rest / n`, may be mixed. Weights are not normalised.

    -sum_j w_j log q(class_j)

  Args:
    student_logits: `[..., classes]`.
    teacher_indices: integer `[..., n]`; a class that comes again adds up. One outside `0 .. classes - 1` with a weight
      cannot be refused once traced; the value is NaN.
    teacher_weights: `[..., n]`; a weight of 0 fills up a shorter record.
    temperature: T > 0 of the student, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which tokens count.

  Returns:
    `[...]` in float32 or wider, 0 for masked tokens.

  Raises:
    ValueError: if shapes or dtypes do not fit, or an index or the temperature is known and out of range.

  Examples:
    >>> print(f"{sampled_kl(jnp.array([2.0, 1.0, 0.0]), jnp.array([1, 0, 1]), jnp.array([0.25, 0.5, 0.25])):.4f}")
    0.9076

  Reference: Anshumann Anshumann, Mohd Abbas Zaidi, Akhil Kedia, Jinwoo Ahn, Taehwak Kwon, Kangwook Lee, Haejun Lee and
  Joohyung Lee, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", 2025, arXiv 2503.16870.
  """
  check_same("shape", teacher_weights=jnp.shape(teacher_weights), teacher_indices=jnp.shape(teacher_indices))
  student, weights = as_examples(where, student_logits=student_logits, teacher_weights=teacher_weights)
  log_q = _log_softmax(student, temperature, where)
  own = _pick(log_q, teacher_indices, weights != 0, where)
  return mask(-jnp.sum(weights * jnp.where((weights == 0) & (own == -jnp.inf), 0, own), axis=-1), where)


def unordered_logits(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Distance of the sorted probabilities, which needs no common vocabulary.

  Matches how sure the teacher is, not of what: any permutation of the student's classes gives the same value. It is the
  Wasserstein distance of the two distributions if moving probability between any two classes costs the same. Between 0
  and 2.

    sum_k |q_(k) - p_(k)|,   the k-th largest probabilities, the shorter list filled up with 0

  Args:
    student_logits: `[..., classes]`.
    teacher_logits: `[..., other classes]`, of the same tokens: different tokenizers are aligned before.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[...]`.
    where: bool `[...]`, which tokens count.

  Returns:
    `[...]` in float32 or wider, 0 for masked tokens.

  Raises:
    ValueError: if the leading axes differ, an input is not floating, `where` does not fit, or the temperature is known
      and not above 0.

  Examples:
    >>> print(f"{unordered_logits(jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.25, 0.25]))):.4f}")
    0.5000

  Reference: Nicolas Boizard, Kevin El Haddad, Céline Hudelot and Pierre Colombo, "Towards Cross-Tokenizer Distillation:
  the Universal Logit Distillation Loss for LLMs", 2024, arXiv 2402.12030. The paper adds it up over the tokens.
  """
  student, teacher = as_examples(where, student_logits=student_logits, teacher_logits=teacher_logits)
  temperature = _temperature(temperature, student, where)
  most = max(student.shape[-1], teacher.shape[-1])
  q, p = (_ascending(logits, temperature, most) for logits in (student, teacher))
  return mask(2 * half_difference(q, p), where)


def _temperature(temperature: float | jax.Array, student: jax.Array, where: jax.Array | None) -> jax.Array:
  return hyper_parameters(student.shape[:-1], where, student.dtype, temperature=temperature)[0]


def _log_softmax(student: jax.Array, temperature: float | jax.Array, where: jax.Array | None) -> jax.Array:
  return log_softmax(student, _temperature(temperature, student, where))


def _ascending(logits: jax.Array, temperature: jax.Array, length: int) -> jax.Array:
  """Probabilities from the smallest to the largest, with zeros before them."""
  probabilities = softmax(soften(jnp.sort(logits, axis=-1), temperature))
  return jnp.pad(probabilities, [(0, 0)] * (logits.ndim - 1) + [(length - logits.shape[-1], 0)])


def _pick(log_q: jax.Array, indices: jax.Array, used: jax.Array, where: jax.Array | None) -> jax.Array:
  """log q of the classes; of an entry that is not used, of any class, and NaN where there is no such class."""
  if not jnp.issubdtype(jnp.result_type(indices), jnp.integer):
    shown = f"{jnp.result_type(indices)}{list(jnp.shape(indices))}"
    raise ValueError(f"teacher_indices must be integers; got {shown}")
  classes, used = log_q.shape[-1], used if where is None else used & jnp.asarray(where)[..., None]
  check_classes("teacher_indices", indices, classes, used, "They are classes of the student's vocabulary")
  known = used & (indices >= 0) & (indices < classes)
  picked = jnp.take_along_axis(log_q, jnp.where(known, indices, 0), axis=-1)
  return jnp.where(used & ~known, jnp.nan, picked)


def _outcomes(
  student_logits: jax.Array,
  teacher_log_probs: jax.Array,
  teacher_indices: jax.Array,
  temperature: float | jax.Array,
  tail: bool,
  where: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """log q and log p of the k classes, `[..., k]`, and with a tail of the rest, `[..., k + 1]`."""
  student, log_p = as_examples(where, student_logits=student_logits, teacher_log_probs=teacher_log_probs)
  check_same("shape", teacher_log_probs=log_p.shape, teacher_indices=jnp.shape(teacher_indices))
  log_all = _log_softmax(student, temperature, where)
  used = log_p != -jnp.inf
  log_q = jnp.where(used, _pick(log_all, teacher_indices, used, where), -jnp.inf)
  if not tail:
    return _renormalize(log_q), _renormalize(log_p)
  # Classes that are not among the k; entries that are not used mark none.
  at = jnp.where(used, teacher_indices, student.shape[-1])
  among = jnp.put_along_axis(jnp.zeros(student.shape, bool), at, True, axis=-1, inplace=False, mode="drop")
  log_q_rest = _log_sum(jnp.where(among, -jnp.inf, log_all))
  log_sum = _log_sum(log_p)
  log_p = jnp.where(used, log_p - jnp.maximum(log_sum, 0), -jnp.inf)
  # Of a sum of about 1 only rounding is left where no class is, or none that the student can have.
  rounding = -log_p.shape[-1] * jnp.finfo(log_p.dtype).eps
  nowhere = among.all(axis=-1, keepdims=True) | ((log_q_rest == -jnp.inf) & (log_sum >= rounding))
  known_in_full = (log_sum >= 0) | nowhere
  rest = -jnp.expm1(jnp.where(known_in_full, -1, log_sum))
  log_p_rest = jnp.where(known_in_full, -jnp.inf, jnp.log(rest))
  return jnp.concatenate([log_q, log_q_rest], axis=-1), jnp.concatenate([log_p, log_p_rest], axis=-1)


def _log_sum(log_x: jax.Array) -> jax.Array:
  """`log sum exp`, `[..., 1]`; -inf, without a gradient, of nothing."""
  empty = (log_x == -jnp.inf).all(axis=-1, keepdims=True)
  largest, log_sum = log_sum_exp(jnp.where(empty, 0, log_x))
  return jnp.where(empty, -jnp.inf, largest + log_sum)


def _renormalize(log_x: jax.Array) -> jax.Array:
  """Log-probabilities that sum to 1; where all are impossible they stay so."""
  impossible = log_x == -jnp.inf
  empty = impossible.all(axis=-1, keepdims=True)
  return jnp.where(impossible, -jnp.inf, subtract_log_sum(log_x, *log_sum_exp(jnp.where(empty, 0, log_x))))


def _reverse(log_q: jax.Array, log_p: jax.Array, tail: bool) -> jax.Array:
  """KL(q || p), where the teacher's rest has at least the rounding of the sum that it was taken from."""
  if tail:
    floor = jnp.log(jnp.finfo(log_p.dtype).eps)
    possible = log_q[..., -1:] != -jnp.inf
    rest = jnp.where(possible, jnp.maximum(log_p[..., -1:], floor), log_p[..., -1:])
    log_p = jnp.concatenate([log_p[..., :-1], rest], axis=-1)
  return relative_entropy(log_q, log_p)
