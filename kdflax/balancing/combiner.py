"""Combiners: how the losses and gradients of T tasks become one update, with explicit state.

A combiner is a pair of pure functions like a balancer, for methods that look at whole gradients. `init(gradients)`
makes the state from the shapes of gradients with a leading T axis; `update(losses, gradients, state, *, key=None,
present=None)` gives the direction (a pytree like one gradient) and the next state. Absent tasks are treated as by a
balancer, and a task counts as absent whose loss or any entry of whose gradient is not finite.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kdflax.balancing._problem import check_present
from kdflax.balancing.balancer import Balancer
from kdflax.balancing.gradients import combine, finite_tasks, gramian, losses_array, num_tasks, select_tasks

PyTree = Any


class Combiner(NamedTuple):
  """A pair of pure functions, see the module: `init(gradients)` and `update(losses, gradients, state, ...)`."""

  init: Callable[[PyTree], PyTree]
  update: Callable[..., tuple[PyTree, PyTree]]
  needs_key: bool = False

  @property
  def needs(self) -> Literal["gradients"]:
    """What `update` reads beside the losses: the gradient of every task."""
    return "gradients"


def check_inputs(
  losses: jax.Array, gradients: PyTree, present: jax.Array | None, name: str
) -> tuple[jax.Array, jax.Array]:
  """Return wide losses, and which tasks take part: those present whose loss and whole gradient are finite."""
  losses = losses_array(losses, name)
  tasks = num_tasks(gradients)
  if losses.shape != (tasks,):
    raise ValueError(f"{name}: losses must have shape ({tasks},) like the gradients; got {losses.shape}")
  if present is None:
    present = jnp.ones(tasks, bool)
  check_present(present, tasks)
  return losses, present & jnp.isfinite(losses) & finite_tasks(gradients)


def usable_gradients(
  losses: jax.Array, gradients: PyTree, tasks: int, present: jax.Array | None, name: str
) -> tuple[jax.Array, PyTree, jax.Array]:
  """Return wide losses, gradients with the rows of unusable tasks set to 0, and which tasks are usable."""
  if num_tasks(gradients) != tasks:
    raise ValueError(f"{name}: the state is for {tasks} tasks, but the gradients are of {num_tasks(gradients)}")
  losses, present = check_inputs(losses, gradients, present, name)
  return losses, select_tasks(gradients, present), present


def from_balancer(balancer: Balancer) -> Combiner:
  """Return a combiner that applies a balancer's weights; it takes the Gramian only where the balancer needs it.

  Args:
    balancer: any Balancer.

  Returns:
    A Combiner with the balancer's state.
  """

  def init(gradients: PyTree) -> PyTree:
    return balancer.init(num_tasks(gradients))

  def update(losses, gradients, state, *, key=None, present=None):
    _, present = check_inputs(losses, gradients, present, "from_balancer")
    products = gramian(gradients) if balancer.needs_gramian else None
    weights, state = balancer.update(losses, state, gramian=products, key=key, present=present)
    return combine(gradients, weights, present=present), state

  return Combiner(init, update, balancer.needs_key)


def from_function(function: Callable[..., PyTree], *, needs_key: bool = False) -> Combiner:
  """Return a combiner without state from a function of the gradients, such as `grad_drop` or `trimmed_mean`.

  Args:
    function: `function(gradients, present=...)`, or with `needs_key` `function(gradients, key, present=...)`; for
      hyper-parameters a `functools.partial`.
    needs_key: whether the function takes a key.

  Returns:
    A Combiner; with `needs_key`, update raises ValueError without a key.
  """
  name = getattr(getattr(function, "func", function), "__name__", str(function))

  def update(losses, gradients, state, *, key=None, present=None):
    if needs_key and key is None:
      raise ValueError(f"{name} draws random numbers: update(losses, gradients, state, key=key)")
    _, present = check_inputs(losses, gradients, present, name)
    return function(gradients, *((key,) if needs_key else ()), present=present), state

  return Combiner(lambda gradients: (), update, needs_key)
