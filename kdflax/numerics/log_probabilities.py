"""Log-probabilities of two logits, and the divergence between them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from kdflax.numerics.examples import AxisName, all_max, all_sum, as_examples, check_same, hyper_parameters
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


def log_sum_exp(logits: jax.Array, axis_name: AxisName = None) -> tuple[jax.Array, jax.Array]:
  """Two numbers `[..., 1]` whose sum is `log sum_c exp(logits_c)`: the largest logit, and the logarithm of the rest.

  They stay apart because the rounding of their sum would reach every class where logits are far from zero. The classes
  may be spread over the devices of `axis_name`.
  """
  largest = all_max(jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)), axis_name)
  # One of them is e^0 = 1, the others are at most that. More or less is rounding, which is compiled to differ between
  # the maximum and the difference; of logits of 1e9 its exponential is inf or 0.
  total = all_sum(jnp.exp(_at_most(0, logits - largest)).sum(axis=-1, keepdims=True), axis_name)
  return largest, jnp.log(-_at_most(-1, -total))


def _at_most(bound: float, x: jax.Array) -> jax.Array:
  """x cut off at a bound, with the derivative of x."""
  return x - jax.lax.stop_gradient(jnp.maximum(x - bound, 0))


def subtract_log_sum(logits: jax.Array, largest: jax.Array, log_sum: jax.Array) -> jax.Array:
  """`logits - largest - log_sum`, not taken as that: XLA would store the first difference."""
  total = largest + log_sum
  return logits - total - jax.lax.stop_gradient(log_sum - (total - largest))


def log_softmax(logits: jax.Array, temperature: jax.Array) -> jax.Array:
  """`log softmax(logits / T)`."""
  return log_normalize(soften(logits, temperature))


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


def log_normalize(logits: jax.Array, axis_name: AxisName = None) -> jax.Array:
  """`log softmax(logits)`; the classes may be spread over the devices of `axis_name`."""
  return _log_normalize(logits, axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _log_normalize(logits: jax.Array, axis_name: AxisName) -> jax.Array:
  return jnp.minimum(subtract_log_sum(logits, *log_sum_exp(logits, axis_name)), 0)


@_log_normalize.defjvp
def _log_normalize_jvp(axis_name, primals, tangents):
  log_q, tangent = _log_normalize(primals[0], axis_name), tangents[0]
  return log_q, tangent - all_sum(jnp.sum(jnp.exp(log_q) * tangent, axis=-1, keepdims=True), axis_name)


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


def half_difference(q: jax.Array, p: jax.Array) -> jax.Array:
  """`sum_c |p_c - q_c| / 2`, without a gradient where they are equal."""
  difference = q - p
  # Equal logits may be compiled to unequal roundings: what is left between them has a size of 0, but it has a sign.
  rounding = jnp.abs(difference) <= 16 * jnp.finfo(p.dtype).eps * p
  sign = jnp.where(rounding, 0, jnp.sign(difference))
  return (sign * difference).sum(axis=-1) / 2


@jax.custom_jvp
def log_mixture(log_p: jax.Array, log_q: jax.Array, alpha: jax.Array) -> jax.Array:
  """`log(alpha p + (1 - alpha) q)`."""
  alpha = alpha[..., None]
  return jnp.logaddexp(jnp.log(alpha) + log_p, jnp.log1p(-alpha) + log_q)


def _log_mixture_jvp(primals, tangents):
  log_p, log_q, alpha = primals
  log_m, share = log_mixture(*primals), alpha[..., None]
  over = jnp.where(log_m == -jnp.inf, jnp.inf, log_m)  # a class impossible on both sides does not move
  p_slope, q_slope = jnp.exp(jnp.log(share) + log_p - over), jnp.exp(jnp.log1p(-share) + log_q - over)
  of_alpha = tangents[2] if isinstance(tangents[2], SymbolicZero) else tangents[2][..., None]
  return log_m, tangent_sum((*tangents[:2], of_alpha), p_slope, q_slope, jnp.exp(log_p - over) - jnp.exp(log_q - over))


log_mixture.defjvp(_log_mixture_jvp, symbolic_zeros=True)


@jax.custom_jvp
def mixture_divergence(log_p: jax.Array, log_q: jax.Array, beta: jax.Array) -> jax.Array:
  """`beta KL(p || M) + (1 - beta) KL(q || M)` with `M = beta p + (1 - beta) q`."""
  log_m = log_mixture(log_p, log_q, beta)
  return beta * relative_entropy(log_p, log_m) + (1 - beta) * relative_entropy(log_q, log_m)


def _mixture_divergence_jvp(primals, tangents):
  """The mixture is the nearest to both sides of all distributions: to first order its own change adds nothing."""
  log_p, log_q, beta = primals
  log_m = log_mixture(*primals)
  share = beta[..., None]
  p_slope = -share * jnp.exp(log_p) * log_ratio(log_p, log_m)
  q_slope = -(1 - share) * jnp.exp(log_q) * log_ratio(log_q, log_m)
  tangent = tangent_sum(tangents[:2], p_slope, q_slope).sum(axis=-1)
  difference = relative_entropy(log_p, log_m) - relative_entropy(log_q, log_m)
  return mixture_divergence(*primals), tangent + tangent_sum(tangents[2:], difference)


mixture_divergence.defjvp(_mixture_divergence_jvp, symbolic_zeros=True)


def mixture_end(beta: float | jax.Array) -> int | None:
  """0 or 1 if beta is a number that says so, where `mixture_divergence` is by convention a KL; None inside (0, 1).

  Raises:
    ValueError: if beta is a number outside [0, 1] or an array that is not inside (0, 1).
  """
  if isinstance(beta, Tracer):
    return None
  if jnp.ndim(beta) == 0:
    if not 0 <= beta <= 1:
      raise ValueError(f"beta must be between 0 and 1; got {beta}")
    return int(beta) if beta in (0, 1) else None
  if np.any((np.asarray(beta) <= 0) | (np.asarray(beta) >= 1)):
    raise ValueError(f"an array beta must be inside (0, 1); 0 and 1 are forward_kl and reverse_kl; got {beta}")
  return None
