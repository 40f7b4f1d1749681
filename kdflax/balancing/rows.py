"""From the losses of rows to one gradient, whichever the balancer.

A row is one entry of what is balanced: a task, or some Terms of an objective. This is the one place that asks a
balancer what it needs, and the one place that says: a row that is not finite is absent.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from kdflax.balancing.balancers import Balancer
from kdflax.balancing.combiners import Combiner
from kdflax.balancing.gradients import all_finite, combine, finite_tasks, gramian, pull_back, select_tasks
from kdflax.model import PyTree
from kdflax.numerics.examples import AxisName


class Pullback(Protocol):
  """`weights [T] -> (gradient of the shared params, of the others)`, both of the weighted sum of the rows.

  A row with weight 0 must give no gradient, even where its derivative is not finite (0 times NaN is NaN); `evaluate`
  of an objective does so with `guard`.
  """

  def __call__(self, weights: jax.Array, /) -> tuple[PyTree, PyTree]: ...


class RowsUpdate(NamedTuple):
  """What becomes of the rows at one step."""

  shared: PyTree  # gradient of the shared params
  own: PyTree  # gradient of the others
  state: PyTree  # next state of the balancer
  weights: jax.Array | None  # [T], None where the method has none
  present: jax.Array  # [T] bool: the rows that took part


class _Decision(NamedTuple):
  """What a balancer makes of the rows that are present."""

  shared: PyTree  # gradient of the shared params, None where the weights say it
  weights: jax.Array | None
  state: PyTree


def init_rows(balancer: Balancer | Combiner | None, num_rows: int, shared_params: PyTree) -> PyTree:
  """Return the state of a balancer or combiner for some rows, `()` without one.

  Args:
    balancer: None for the sum of the rows.
    num_rows: T.
    shared_params: pytree whose gradients are balanced; of its leaves only shapes and dtypes matter.

  Returns:
    A pytree of arrays.
  """
  if balancer is None:
    return ()
  if balancer.needs == "gradients":
    return balancer.init(jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape), leaf.dtype), shared_params))
  return balancer.init(num_rows)


def update_rows(
  balancer: Balancer | Combiner | None,
  losses: jax.Array,
  pullback: Pullback,
  present: jax.Array,
  state: PyTree,
  *,
  key: jax.Array | None = None,
  weigh_own: bool = True,
  batch_size: int | None = None,
  axis_name: AxisName = None,
) -> RowsUpdate:
  """Make one gradient of the rows.

  With a balancer, a row whose loss or any entry of whose gradient is not finite is absent: the result is that of the
  others alone. Where a method reads whole gradients they are looked at before any product. One that reads the losses
  alone goes back once for all rows; only if that gradient is not finite are the rows taken back one by one. The sum
  of the rows (no balancer) is what it is.

  Args:
    balancer: None for the sum of the rows.
    losses: `[T]`.
    pullback: from weights `[T]` to the two gradients.
    present: bool `[T]`, which rows have examples.
    state: of the balancer, see `init_rows`.
    key: for a balancer that draws.
    weigh_own: whether the params that are not shared get the balancer's weights (True) or the plain sum of the rows.
    batch_size: where a method reads whole gradients, how many rows go back at a time; all when None, see
      `task_gradients`. Static.
    axis_name: mapped axis of `pmap` or `shard_map` to average gradients over, before they are combined: combining is
      not linear.

  Returns:
    The gradients of the shared and of the other params, the next state, the weights `[T]` (None where there are
    none), and which rows took part.
  """
  dtype = losses.dtype

  def pull(weights: jax.Array) -> tuple[PyTree, PyTree]:
    gradients = pullback(weights.astype(dtype))
    return gradients if axis_name is None else lax.pmean(gradients, axis_name)

  if balancer is None:
    return RowsUpdate(*pull(present), state, None, present)

  present = present & jnp.isfinite(losses)
  jacobian = None
  if balancer.needs != "losses":
    jacobian = pull_back(lambda row: pull(row)[0], jnp.diag(present), batch_size)
    present = present & finite_tasks(jacobian)
    jacobian = select_tasks(jacobian, present)

  def decide(present: jax.Array) -> _Decision:
    if balancer.needs == "gradients":
      direction, moved = balancer.update(losses, jacobian, state, key=key, present=present)
      return _Decision(direction, None, moved)
    products = gramian(select_tasks(jacobian, present)) if balancer.needs == "gramian" else None
    weights, moved = balancer.update(losses, state, gramian=products, key=key, present=present)
    shared = None if products is None else combine(jacobian, weights, present=present)
    return _Decision(shared, weights, moved)

  def own_weights(decision: _Decision, present: jax.Array) -> jax.Array:
    return decision.weights if weigh_own and decision.weights is not None else present.astype(dtype)

  def together() -> RowsUpdate:
    """All rows in one pass, or two where the two kinds of params are weighed differently."""
    decision = decide(present)
    other = own_weights(decision, present)
    shared, own = pull(other)
    if decision.shared is not None:
      shared = decision.shared
    elif other is not decision.weights:
      shared, _ = pull(decision.weights)
    return RowsUpdate(shared, own, decision.state, decision.weights, present)

  def one_by_one(update: RowsUpdate) -> tuple[RowsUpdate, jax.Array]:
    """The rows apart, without those that are not finite; and whether there was none among them."""
    decision = decide(update.present)
    weights = own_weights(decision, update.present)
    pair = (weights if decision.weights is None else decision.weights, weights)

    def add(totals: tuple[PyTree, PyTree], row: jax.Array):
      unit = (jnp.arange(losses.shape[0]) == row) & update.present
      parts = pull(unit)
      finite = all_finite(parts)
      added = [
        jax.tree.map(lambda total, leaf, weight=weight: _add_if(finite, total, weight[row], leaf), *both)
        for weight, *both in zip(pair, totals, parts, strict=True)
      ]
      return tuple(added), finite

    zeros = jax.tree.map(jnp.zeros_like, (update.shared, update.own))
    (shared, own), finite = lax.scan(add, zeros, jnp.arange(losses.shape[0]))
    shared = shared if decision.shared is None else decision.shared
    settled = (finite | ~update.present).all()
    return RowsUpdate(shared, own, decision.state, decision.weights, update.present & finite), settled

  # A loop that ends at once stands for a condition: under vmap (several seeds) a condition would run both its branches.
  update = together()
  update, _ = lax.while_loop(
    lambda carry: ~carry[1],
    lambda carry: one_by_one(carry[0]),
    (update, all_finite((update.shared, update.own))),
  )
  return update


def _add_if(adds: jax.Array, total: jax.Array, weight: jax.Array, leaf: jax.Array) -> jax.Array:
  return total + jnp.where(adds, weight * leaf, 0).astype(total.dtype)
