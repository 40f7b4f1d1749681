"""From the losses of rows to one gradient: what a balancer makes of the rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdflax import balancing
from kdflax.model import PyTree
from kdflax.numerics.examples import AxisName

Balancing = balancing.Balancer | balancing.Combiner | None


def init_balancer(balancer: Balancing, num_rows: int, shared_params: PyTree) -> PyTree:
  """The state of a balancer, `()` without one."""
  if balancer is None:
    return ()
  if isinstance(balancer, balancing.Combiner):
    return balancer.init(jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape), leaf.dtype), shared_params))
  return balancer.init(num_rows)


def balance(
  balancer: Balancing,
  losses: jax.Array,
  pullback: Callable[[jax.Array], tuple[PyTree, PyTree]],
  present: jax.Array,
  state: PyTree,
  *,
  key: jax.Array,
  weigh_own: bool,
  batch_size: int | None,
  axis_name: AxisName,
) -> tuple[tuple[PyTree, PyTree], PyTree, jax.Array | None]:
  """Makes one gradient of the rows.

  For a balancer, a row whose loss is not finite is absent from the batch. That its gradient spoils no other is up to
  the pullback: evaluate the objective with `guard`.

  Args:
    balancer: None for the sum of the rows.
    losses: `[T]`.
    pullback: `weights [T] -> (gradient of the shared, of the own params)` of the weighted sum of the rows.
    present: bool `[T]`, which rows have examples.
    state: of the balancer.
    key: for a balancer that draws.
    weigh_own: whether own params get the balancer's weights.
    batch_size: pullbacks at a time.
    axis_name: mapped axis to average gradients over.

  Returns:
    The two gradients, the next state of the balancer, and the weights `[T]` if there are any.
  """
  mean = (lambda tree: tree) if axis_name is None else (lambda tree: jax.lax.pmean(tree, axis_name))
  if balancer is None:
    return mean(pullback(present.astype(losses.dtype))), state, None
  present &= jnp.isfinite(losses)
  everything = present.astype(losses.dtype)
  if not (isinstance(balancer, balancing.Combiner) or balancer.needs_gramian):
    weights, state = balancer.update(losses, state, key=key, present=present)
    shared, own = mean(pullback(weights))
    return (shared, own if weigh_own else mean(pullback(everything)[1])), state, weights
  # Gradients are averaged over the devices before they are combined: combining is not linear.
  jacobian = mean(_rows(lambda row: pullback(row)[0], jnp.diag(everything), batch_size))
  if isinstance(balancer, balancing.Combiner):
    direction, state = balancer.update(losses, jacobian, state, key=key, present=present)
    return (direction, mean(pullback(everything)[1])), state, None
  gramian = balancing.gramian(jacobian)
  weights, state = balancer.update(losses, state, gramian=gramian, key=key, present=present)
  own = mean(pullback(weights if weigh_own else everything)[1])
  return (balancing.combine(jacobian, weights, present=present), own), state, weights


def _rows(pullback: Callable[[jax.Array], PyTree], basis: jax.Array, batch_size: int | None) -> PyTree:
  """The gradient of each row, on a leading axis; as `balancing.task_gradients` trades time for memory."""
  if batch_size is None or batch_size >= len(basis):
    return jax.vmap(pullback)(basis)
  return jax.lax.map(pullback, basis, batch_size=batch_size if batch_size > 1 else None)
