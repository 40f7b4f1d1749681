"""A target class against the rest, the rest among themselves, and cross-entropies in log-space."""

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import check_same, mask
from kdflax.numerics.log_probabilities import log_sum_exp, subtract_log_sum


def is_target(labels: jax.Array, logits: jax.Array, where: jax.Array | None) -> jax.Array:
  """bool `[..., classes]`: which class is the label; masked examples have label 0."""
  labels = jnp.asarray(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integers; got {labels.dtype}{list(labels.shape)}; take the argmax of one-hots")
  check_same("leading (example) axes", student_logits=logits.shape[:-1], labels=labels.shape)
  return mask(labels, where)[..., None] == jnp.arange(logits.shape[-1])


def decouple(logits: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities `[..., 2]` of (target, any other), and `[..., classes]` of the others among themselves."""
  own = jnp.sum(jnp.where(is_target, logits, 0), axis=-1, keepdims=True)
  given_other, largest, log_sum, alone = _among(logits, ~is_target)
  margin = jnp.where(alone, jnp.inf, own - largest - log_sum)
  return jnp.concatenate([jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)], axis=-1), given_other


def log_softmax_among(logits: jax.Array, chosen: jax.Array) -> jax.Array:
  """Log-probabilities among the chosen classes, -inf for the others; for all of them where none is chosen."""
  return _among(logits, chosen)[0]


def _among(logits: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """`log_softmax_among`, the two parts of its `log_sum_exp`, and whether no chosen class is possible."""
  hidden = ~chosen | (logits == -jnp.inf)
  # Without any class the sum below is 0, whose logarithm has no derivative: it is taken of zeros instead.
  none = hidden.all(axis=-1, keepdims=True)
  largest, log_sum = log_sum_exp(jnp.where(none, 0, jnp.where(hidden, -jnp.inf, logits)))
  log_probs = jnp.where(hidden, -jnp.inf, subtract_log_sum(jnp.where(hidden, 0, logits), largest, log_sum))
  return log_probs, largest, log_sum, none


def cross_entropy(weights: jax.Array, log_q: jax.Array, absent: jax.Array) -> jax.Array:
  """`-sum_c weights_c log q_c`: a class that is absent adds nothing, any other with log q = -inf makes it inf."""
  missed = log_q == -jnp.inf
  terms = jnp.where(missed, jnp.inf, -weights * jnp.where(missed, 0, log_q))  # also where a weight has underflown
  return jnp.sum(jnp.where(absent, 0, terms), axis=-1)
