"""From the losses of rows to one gradient, whichever the balancer.

A row is one entry of what is balanced: a task, or some Terms of an objective. This is the one place that asks a
balancer what it needs, and the one place that says: a row that is not finite is absent.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from kdflax.balancing.balancer import Balancer
from kdflax.balancing.combiner import Combiner
from kdflax.balancing.gradients import all_finite, combine, finite_tasks, gramian, pull_back, select_tasks
from kdflax.model import PyTree
from kdflax.numerics.examples import AxisName


class Pullback(Protocol):
  """`weights [T] -> (gradient of the shared params, of the others)`, both of the weighted sum of the rows.

  A row whose derivative is not finite must have a loss that is not, and give no gradient with weight 0, where 0 times
  NaN were NaN. `evaluate` of an objective does so with `guard`.
  """

  def __call__(self, weights: jax.Array, /) -> tuple[PyTree, PyTree]: ...


class RowsUpdate(NamedTuple):
  """What becomes of the rows at one step."""

  shared: PyTree  # gradient of the shared params
  own: PyTree  # gradient of the others
  state: PyTree  # next state of the balancer
  weights: jax.Array | None  # [T], None where the method has none
  present: jax.Array  # [T] bool: the rows that took part


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
  hold_gradients: bool = True,
  axis_name: AxisName = None,
) -> RowsUpdate:
  """Make one gradient of the rows.

  With a balancer, a row whose loss or any entry of whose gradient is not finite is absent: the result is that of the
  others alone. Where a method reads whole gradients they are looked at before any product. If what remains is not
  finite either, its cause lies in no row but in what they share: then all rows are absent, the gradients are 0 and the
  state stays. The sum of the rows (no balancer) is what it is.

  Args:
    balancer: None for the sum of the rows.
    losses: `[T]`.
    pullback: from weights `[T]` to the two gradients.
    present: bool `[T]`, which rows have examples.
    state: of the balancer, see `init_rows`.
    key: for a balancer that draws.
    weigh_own: whether the params that are not shared get the balancer's weights (True) or the plain sum of the rows. A
      Combiner gives no weights, so with one it is always the plain sum.
    batch_size: where a method reads whole gradients, how many rows go back at a time; all when None, see
      `task_gradients`. Static.
    hold_gradients: where a method reads the Gramian, whether the gradients of all rows are kept until they are weighed
      (True), or only their products, and one more pass back makes the weighted sum: see `task_gramian`. Static.
    axis_name: mapped axis of `pmap` or `shard_map` to average gradients over, before they are combined: combining is
      not linear.

  Returns:
    The gradients of the shared and of the other params, the next state, the weights `[T]` (None where there are
    none), and which rows took part.
  """

  def pull(weights: jax.Array) -> tuple[PyTree, PyTree]:
    gradients = pullback(weights.astype(losses.dtype))
    return gradients if axis_name is None else lax.pmean(gradients, axis_name)

  if balancer is None:
    return RowsUpdate(*pull(present), state, None, present)
  present = present & jnp.isfinite(losses)
  if balancer.needs == "losses":
    weights, next_state = balancer.update(losses, state, key=key, present=present)
    shared, own = pull(weights)
    own = own if weigh_own else pull(present)[1]
    return _kept_if_finite(RowsUpdate(shared, own, next_state, weights, present), state)
  gradients = pull_back(lambda row: pull(row)[0], jnp.diag(present), batch_size)
  present = present & finite_tasks(gradients)
  if balancer.needs == "gradients":
    gradients = select_tasks(gradients, present)
    shared, next_state = balancer.update(losses, gradients, state, key=key, present=present)
    return _kept_if_finite(RowsUpdate(shared, pull(present)[1], next_state, None, present), state)
  # A product of two rows is finite where both are: masked here, no gradient waits until all others have been seen.
  products = jnp.where(present[:, None] & present, gramian(gradients), 0)
  weights, next_state = balancer.update(losses, state, gramian=products, key=key, present=present)
  shared, own = pull(weights)
  shared = combine(gradients, weights, present=present) if hold_gradients else shared
  own = own if weigh_own else pull(present)[1]
  return _kept_if_finite(RowsUpdate(shared, own, next_state, weights, present), state)


def _kept_if_finite(update: RowsUpdate, state: PyTree) -> RowsUpdate:
  """The update, or none of it where its gradients are not finite."""
  finite = all_finite((update.shared, update.own))
  nothing = RowsUpdate(*jax.tree.map(jnp.zeros_like, update._replace(state=None)))._replace(state=state)
  return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update, nothing)
