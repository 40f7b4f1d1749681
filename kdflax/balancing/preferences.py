"""Balancers that lead to a chosen point of the Pareto front, by the losses alone."""

import jax
import jax.numpy as jnp
from jax import lax

from kdflax.balancing.balancer import Balancer, Inputs, per_task, stateless


def pbi(preference: jax.Array, *, penalty: jax.Array | float = 5.0, reference: jax.Array | float = 0.0) -> Balancer:
  """Return a balancer for a point of the Pareto front: penalty-based boundary intersection.

  Weights are the gradient of `d1 + penalty d2`: d1 the length of `L - reference` along the preference, d2 the
  distance from that line (gradient 0 on it). With a penalty the weight of a loss below the line may be negative.

  Args:
    preference: direction in the space of the losses, `[T]`, non-negative.
    penalty: of the distance from the direction; may be traced.
    reference: lower bounds of the losses, a number or `[T]`.

  Returns:
    A Balancer with an empty state.

  Examples:
    >>> balancer = pbi(jnp.array([3.0, 4.0]), penalty=0.0)
    >>> weights, _ = balancer.update(jnp.array([1.0, 4.0]), balancer.init(2))
    >>> print(weights.round(3))
    [0.6 0.8]

  Reference: Qingfu Zhang and Hui Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE
  Transactions on Evolutionary Computation 2007.
  """

  def weigh(x: Inputs) -> jax.Array:
    tasks = x.losses.shape[0]
    direction = _unit(jnp.where(x.usable, per_task(preference, tasks, "pbi: preference"), 0))
    shifted = jnp.where(x.usable, x.losses - per_task(reference, tasks, "pbi: reference"), 0)
    across = shifted - (shifted * direction).sum() * direction
    noise = 4 * jnp.finfo(across.dtype).eps * jnp.abs(shifted).max()
    return direction + penalty * jnp.where(jnp.abs(across).max() > noise, _unit(across), 0)

  return stateless("pbi", weigh)


def cosmos(preference: jax.Array, *, penalty: jax.Array | float = 1.0) -> Balancer:
  """Return a balancer for a point of the Pareto front: a weighted sum that rewards alignment with the preference.

  Weights are the gradient of `r.L - penalty cos(r, L)`. The method's other half, a model that takes r as an input, is
  the model's; draw r from a Dirichlet distribution for every batch then.

  Args:
    preference: r `[T]`, non-negative; may be traced.
    penalty: of the cosine; may be traced.

  Returns:
    A Balancer with an empty state.

  Examples:
    >>> balancer = cosmos(jnp.array([0.5, 0.5]))
    >>> weights, _ = balancer.update(jnp.array([2.0, 2.0]), balancer.init(2))
    >>> print(weights.round(3))
    [0.5 0.5]

  Reference: Michael Ruchte and Josif Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
  2021, arXiv 2103.13392.
  """

  def weigh(x: Inputs) -> jax.Array:
    wanted = jnp.where(x.usable, per_task(preference, x.losses.shape[0], "cosmos: preference"), 0)
    losses = jnp.where(x.usable, x.losses, 0)
    length = jnp.sqrt((losses**2).sum())
    direction, towards = _unit(wanted), _unit(losses)
    slope = (direction - (direction * towards).sum() * towards) / jnp.where(length > 0, length, 1)
    return wanted - penalty * slope

  return stateless("cosmos", weigh)


def _unit(vector: jax.Array) -> jax.Array:
  largest = jnp.abs(vector).max()
  vector = vector / jnp.where(largest > 0, largest, 1)
  squared = (vector**2).sum()
  return vector * lax.rsqrt(jnp.where(squared > 0, squared, 1))
