"""From one gradient to the next state: penalties, averages, and updates that are left out."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kdflax.model import PyTree
from kdflax.numerics.examples import AxisName
from kdflax.objectives import Metrics, at, gated, weighted
from kdflax.training.state import Average, Penalty, TrainState


def penalize(
  penalties: Mapping[str, Penalty], params: dict[str, PyTree], step: jax.Array
) -> tuple[jax.Array, PyTree, Metrics]:
  """Returns the weighted sum of the penalties, its gradient, and the metrics of each without its weight."""

  def total(params: dict[str, PyTree]) -> tuple[jax.Array, dict[str, jax.Array]]:
    weights = {name: at(penalty.weight, step) for name, penalty in penalties.items()}
    costs = {name: penalty.function(gated(weights[name], params)) for name, penalty in penalties.items()}
    return jnp.sum(jnp.stack([weighted(weights[name], cost) for name, cost in costs.items()])), costs

  (value, costs), slope = jax.value_and_grad(total, has_aux=True)(params)
  return value, slope, {name: (cost, jnp.ones(())) for name, cost in costs.items()}


def widened(params: PyTree) -> PyTree:
  """Params in float32 or wider: in half precision an average with decay 0.999 would never move."""
  wide = lambda dtype: jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
  return jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), params)


def follower(state: TrainState, source: str, name: str) -> tuple[PyTree, PyTree]:
  """The (params, state) of an average, in the dtypes of what it follows."""
  cast = lambda leaf, like: leaf.astype(like.dtype)
  return jax.tree.map(cast, state.averages[name], state.params[source]), state.model_state[source]


def followed(averages: Mapping[str, Average], state: TrainState, params: dict[str, PyTree]) -> dict[str, PyTree]:
  """The averages after an update."""

  def follow(average: jax.Array, leaf: jax.Array, share: Any) -> jax.Array:
    leaf = leaf.astype(average.dtype)
    # Not `(1 - share) * average + share * leaf`: in float32 the shares of 0.9999 add up to 1 only within 2e-4 of one.
    return jnp.where(share == 1, leaf, average + share * (leaf - average))

  shares = {name: 1 - at(average.decay, state.step) for name, average in averages.items()}
  return {
    name: jax.tree.map(functools.partial(follow, share=share), state.averages[name], params[averages[name].source])
    for name, share in shares.items()
  }


def over_devices(states: PyTree, axis_name: AxisName) -> PyTree:
  """The mean of floating-point statistics over the devices of a mapped axis; a counter or a key has none."""
  if axis_name is None:
    return states
  mean = lambda leaf: jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
  return jax.tree.map(mean, states)


def unless_spoilt(
  before: TrainState, after: TrainState, gradient: PyTree, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  """Returns the state after an update, or before it if a gradient or anything that was finite is so no more.

  The metrics of an update that is left out are those of no example, and `skipped` counts it.
  """
  floats = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  good = [jnp.isfinite(leaf).all() for leaf in floats(gradient)]
  pairs = zip(floats(after), floats(before), strict=True)
  good += [(jnp.isfinite(new) | ~jnp.isfinite(old)).all() for new, old in pairs]
  fine = jnp.stack(good).all()
  state = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, before)._replace(step=after.step)
  metrics = {name: (jnp.where(fine, total, 0), jnp.where(fine, count, 0)) for name, (total, count) in metrics.items()}
  return state, metrics | {"skipped": (1 - fine.astype(jnp.float32), jnp.ones(()))}
