"""Log-probabilities of two logits, and the divergence between them."""

import jax
import jax.numpy as jnp

from kdflax.losses._examples import as_examples, check_same, hyper_parameters
from kdflax.losses._numerics import exp_remainder


def logit_pair(
  student_logits: jax.Array, teacher_logits: jax.Array, where: jax.Array | None, **hyper: float | jax.Array
) -> list[jax.Array]:
  """Both logits and the hyper-parameters, checked, in float32 or wider; masked examples have zeros for logits."""
  check_same("shape", student_logits=jnp.shape(student_logits), teacher_logits=jnp.shape(teacher_logits))
  student, teacher = as_examples(where, student_logits=student_logits, teacher_logits=teacher_logits)
  return [student, teacher, *hyper_parameters(student.shape[:-1], where, student.dtype, **hyper)]


def soften(logits: jax.Array, temperature: jax.Array) -> jax.Array:
  """`logits / T`; T broadcasts against the examples, a class at -inf stays there."""
  impossible = logits == -jnp.inf
  # Dividing -inf would make the derivative with respect to a learned temperature NaN.
  softened = jnp.where(impossible, 0, logits) / temperature[..., None]
  return jnp.where(impossible, -jnp.inf, softened)


def log_softmax(logits: jax.Array, temperature: jax.Array) -> jax.Array:
  """`log softmax(logits / T)`."""
  return jax.nn.log_softmax(soften(logits, temperature))


def relative_entropy(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """`sum_c p_c (log p_c - log q_c)` of two normalised distributions; 0 log 0 is 0.

  Summed as `p_c (e^u - 1 - u)` with `u = log q_c - log p_c`, which is the same because p and q both sum to 1. No term
  is negative, so nearly equal distributions do not lose the small result in the rounding of their logarithms.
  """
  possible = log_p > -jnp.inf
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  u = jnp.where(possible, log_q - log_p, 0)
  near = jnp.abs(u) < 1
  terms = jnp.where(near, p * exp_remainder(jnp.where(near, u, 0)), q - p - p * u)
  return jnp.sum(jnp.where(possible, terms, q), axis=-1)
