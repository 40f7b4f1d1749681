"""Log-probabilities of two logits, and the divergence between them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kdflax.numerics.examples import as_examples, check_same, hyper_parameters
from kdflax.numerics.safe import exp_remainder


def logit_pair(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  where: jax.Array | None,
  *,
  fewest_classes: int = 2,
  **hyper: float | jax.Array,
) -> list[jax.Array]:
  """Both logits and the hyper-parameters, checked, in float32 or wider; masked examples have zeros for logits.

  Raises:
    ValueError: if the shapes differ, an input is not floating, there are too few classes, a hyper-parameter or `where`
      does not fit, or a temperature that is known before tracing is not positive.
  """
  check_same("shape", student_logits=jnp.shape(student_logits), teacher_logits=jnp.shape(teacher_logits))
  if jnp.shape(student_logits)[-1:] == (1,) and fewest_classes > 1:
    raise ValueError(
      f"student_logits and teacher_logits need at least 2 classes, since one has probability 1 whatever its logit; got "
      f"{jnp.shape(student_logits)}. Use bernoulli_kl for a single logit"
    )
  student, teacher = as_examples(where, student_logits=student_logits, teacher_logits=teacher_logits)
  return [student, teacher, *hyper_parameters(student.shape[:-1], where, student.dtype, **hyper)]


def soften(logits: jax.Array, temperature: jax.Array) -> jax.Array:
  """`logits / T`; T broadcasts against the examples, a class at -inf stays there."""
  return _divide(logits, temperature[..., None])


def log_sum_exp(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two numbers `[..., 1]` whose sum is `log sum_c exp(logits_c)`: the largest logit, and the logarithm of the rest.

  They stay apart because the rounding of their sum would reach every class where logits are far from zero.
  """
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  # One of them is e^0 = 1, the others are at most that. More or less is rounding, which is compiled to differ between
  # the maximum and the difference; of logits of 1e9 its exponential is inf or 0.
  total = jnp.exp(_at_most(0, logits - largest)).sum(axis=-1, keepdims=True)
  return largest, jnp.log(-_at_most(-1, -total))


def _at_most(bound: float, x: jax.Array) -> jax.Array:
  """x cut off at a bound, with the derivative of x."""
  return x - jax.lax.stop_gradient(jnp.maximum(x - bound, 0))


def less(logits: jax.Array, largest: jax.Array, log_sum: jax.Array) -> jax.Array:
  """`logits - largest - log_sum`, not taken as that: XLA would store the first difference."""
  total = largest + log_sum
  return logits - total - jax.lax.stop_gradient(log_sum - (total - largest))


def log_softmax(logits: jax.Array, temperature: jax.Array) -> jax.Array:
  """`log softmax(logits / T)`."""
  return _normalize(soften(logits, temperature))


# The functions below bring their own derivatives: shorter than what differentiating each operation would give, and
# without the selections that keep -inf out of that. XLA compiles them several times faster for a CPU.


def tangent_sum(tangents: Sequence[jax.Array | SymbolicZero], *slopes: jax.Array) -> jax.Array:
  """Sum of slope * tangent over the arguments that are differentiated."""
  pairs = zip(slopes, tangents, strict=True)
  moving = [slope * tangent for slope, tangent in pairs if not isinstance(tangent, SymbolicZero)]
  return sum(moving, start=jnp.zeros_like(slopes[0]))


def log_ratio(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """`log q_c - log p_c`, 0 for a class that is impossible for either."""
  return jnp.where((log_p == -jnp.inf) | (log_q == -jnp.inf), 0, log_q - log_p)


@jax.custom_jvp
def _divide(logits: jax.Array, temperature: jax.Array) -> jax.Array:
  return logits / temperature


def _divide_jvp(primals, tangents):
  logits, temperature = primals
  finite = jnp.where(logits == -jnp.inf, 0, logits)
  return _divide(*primals), tangent_sum(tangents, 1 / temperature, -finite / temperature**2)


_divide.defjvp(_divide_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _normalize(logits: jax.Array) -> jax.Array:
  return jnp.minimum(less(logits, *log_sum_exp(logits)), 0)


@_normalize.defjvp
def _normalize_jvp(primals, tangents):
  log_q, tangent = _normalize(*primals), tangents[0]
  return log_q, tangent - jnp.sum(jnp.exp(log_q) * tangent, axis=-1, keepdims=True)


@jax.custom_jvp
def softmax(logits: jax.Array) -> jax.Array:
  """Probabilities of logits that the temperature has divided already."""
  exponentials = jnp.exp(jnp.minimum(logits - jnp.max(logits, axis=-1, keepdims=True), 0))
  return exponentials / jnp.maximum(exponentials.sum(axis=-1, keepdims=True), 1)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
  q, tangent = softmax(*primals), tangents[0]
  return q, q * (tangent - jnp.sum(q * tangent, axis=-1, keepdims=True))


@jax.custom_jvp
def relative_entropy(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """`sum_c p_c (log p_c - log q_c)` of two normalised distributions; 0 log 0 is 0, and it is inf if q_c alone is 0.

  Summed as `p_c (e^u - 1 - u)` with `u = log q_c - log p_c`, which is the same because p and q both sum to 1. No term
  is negative, so nearly equal distributions do not lose the small result in the rounding of their logarithms.
  """
  impossible = log_p == -jnp.inf
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  u = jnp.where(impossible, 0, log_q - log_p)
  near = jnp.abs(u) < 1
  terms = jnp.where(near, p * exp_remainder(jnp.where(near, u, 0)), q - p - p * u)
  # p may have underflown, and 0 times the infinite u would be NaN.
  terms = jnp.where(log_q == -jnp.inf, jnp.inf, terms)
  return jnp.sum(jnp.where(impossible, q, terms), axis=-1)


def _relative_entropy_jvp(primals, tangents):
  log_p, log_q = primals
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  slopes = -p * log_ratio(log_p, log_q), q - p
  return relative_entropy(*primals), tangent_sum(tangents, *slopes).sum(axis=-1)


relative_entropy.defjvp(_relative_entropy_jvp, symbolic_zeros=True)
