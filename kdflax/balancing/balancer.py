"""Balancers: how the losses of T tasks become weights, with explicit state.

A balancer is a pair of pure functions. `init(num_tasks)` makes a state, a pytree of arrays that checkpoints;
`update(losses, state, *, gramian=None, key=None, present=None)` gives the weights `[T]` for these losses and the next
state. Weights come from the state given; learning moves only the returned state (`famo` moves first). They carry no
gradient.

Common rules. A task that is absent (`present`, `[T]` bool) has weight 0, the others are weighed as if alone, and its
entries of the state stay. A task whose loss or gradient is not finite counts as absent, and so does one whose loss is
not positive where a method takes its logarithm (these raise a ValueError outside of `jit`, where the value is known):
no state ever becomes NaN.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from kdflax.balancing._problem import check_gramian, check_present
from kdflax.balancing.gradients import losses_array, stack_losses
from kdflax.model import PyTree


class Init(Protocol):
  """`num_tasks -> state`."""

  def __call__(self, num_tasks: int, /) -> PyTree: ...


class Update(Protocol):
  """`(losses [T], state) -> (weights [T], state)`; what it does not need may be left out."""

  def __call__(
    self,
    losses: jax.Array,
    state: PyTree,
    /,
    *,
    gramian: jax.Array | None = None,
    key: jax.Array | None = None,
    present: jax.Array | None = None,
  ) -> tuple[jax.Array, PyTree]: ...


class Weighting(Protocol):
  """`(losses [T] or Gramian [T, T], ..., present=...) -> weights [T]`."""

  def __call__(self, *arrays: Any, **keywords: Any) -> jax.Array: ...


class Balancer(NamedTuple):
  """A pair of pure functions `init(num_tasks) -> state` and `update(losses, state, ...) -> (weights, state)`.

  `needs_gramian` and `needs_key` say what `update` raises without, so that a training step knows whether to take
  gradients task by task.
  """

  init: Init
  update: Update
  needs_gramian: bool = False
  needs_key: bool = False

  @property
  def needs(self) -> Literal["losses", "gramian"]:
    """What `update` reads: the losses alone, or the Gramian of the gradients as well."""
    return "gramian" if self.needs_gramian else "losses"


class Inputs(NamedTuple):
  """What a method sees of one update."""

  losses: jax.Array  # [T], 1 where not usable
  gramian: Any  # [T, T], None where it is not given, as to a method that does not need it
  key: Any  # likewise
  usable: jax.Array  # [T] bool: present with a loss that the method can use
  num_usable: jax.Array  # at least 1


def joint_loss(losses: PyTree, weights: PyTree, *, present: jax.Array | None = None) -> jax.Array:
  """Return `sum_i weight_i loss_i`, the loss of joint learning.

  Args:
    losses: `[T]`, or a pytree of scalars such as a dict by task.
    weights: `[T]` (for a dict: sorted by name), or a pytree like that of the losses.
    present: which tasks take part, `[T]` bool; an absent loss costs nothing and gives no gradient, even if it is NaN.

  Returns:
    A scalar.

  Raises:
    ValueError: losses and weights differ in their names or their number.

  Examples:
    >>> joint_loss({"left": 1.0, "right": 3.0}, {"left": 0.5, "right": 2.0}).item()
    6.5
  """
  names, given = jax.tree.structure(losses), jax.tree.structure(weights)
  if given != names and given.num_nodes > 1:
    raise ValueError(f"weights must be [T] or a pytree like that of the losses, {names}; got {given}")
  losses, weights = stack_losses(losses), stack_losses(weights, "weights")
  if weights.shape != losses.shape:
    raise ValueError(f"weights must have shape {losses.shape}, one entry for each loss; got {weights.shape}")
  if present is not None:
    check_present(present, losses.shape[0])
    losses, weights = jnp.where(present, losses, 0), jnp.where(present, weights, 0)
  return (weights * losses).sum()


def check_positive(losses: jax.Array, present: jax.Array, name: str) -> None:
  """Raise ValueError when a present loss is known here, outside of a trace, not to be positive."""
  if isinstance(losses, Tracer) or isinstance(present, Tracer):
    return
  with jax.ensure_compile_time_eval():
    tasks = jnp.flatnonzero(~(losses > 0) & present).tolist()
  if tasks:
    raise ValueError(
      f"{name} takes the logarithm of the losses, which must be positive; that of task {tasks[0]} is {losses[tasks[0]]}"
    )


def make_balancer(
  name: str,
  init: Callable[[int], PyTree],
  weigh: Callable[[Inputs, Any], tuple[jax.Array, PyTree]],
  *,
  positive: bool = False,
  needs_gramian: bool = False,
  needs_key: bool = False,
) -> Balancer:
  """Wrap a method with the checks and the rules on absent tasks that all of them share."""

  def checked_init(num_tasks: int) -> PyTree:
    if num_tasks < 1:
      raise ValueError(f"num_tasks must be at least 1; got {num_tasks}")
    return init(num_tasks)

  def update(
    losses: jax.Array,
    state: PyTree,
    *,
    gramian: jax.Array | None = None,
    key: jax.Array | None = None,
    present: jax.Array | None = None,
  ) -> tuple[jax.Array, PyTree]:
    losses = losses_array(losses, name)
    if losses.ndim != 1 or not losses.shape[0]:
      raise ValueError(f"{name}: losses must have shape (T,); got {losses.shape}")
    tasks = losses.shape[0]
    if needs_gramian and gramian is None:
      raise ValueError(
        f"{name} needs the Gramian of the task gradients: update(losses, state, gramian=gramian(gradients))"
      )
    if needs_key and key is None:
      raise ValueError(f"{name} draws random numbers: update(losses, state, key=key)")
    if gramian is not None:
      gramian = lax.stop_gradient(jnp.asarray(gramian))
      check_gramian(gramian, num_tasks=tasks)
    expected = jax.eval_shape(lambda: checked_init(tasks))
    if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, expected):
      raise ValueError(f"{name}: the state does not belong to {tasks} tasks; make it with init({tasks})")
    if present is None:
      present = jnp.ones(tasks, bool)
    check_present(present, tasks)
    usable = present & jnp.isfinite(losses)
    if gramian is not None:
      usable &= jnp.isfinite(jnp.diagonal(gramian))
    if positive:
      check_positive(losses, usable, name)
      usable &= losses > 0
    losses = jnp.where(usable, losses, 1)
    inputs = Inputs(losses, gramian, key, usable, jnp.maximum(usable.sum(), 1))
    weights, next_state = weigh(inputs, state)
    next_state = jax.tree.map(lambda new, old: jnp.asarray(new).astype(jnp.asarray(old).dtype), next_state, state)
    return jnp.where(usable, weights, 0).astype(losses.dtype), next_state

  return Balancer(checked_init, update, needs_gramian, needs_key)


def stateless(name: str, weigh: Callable[[Inputs], jax.Array], **options: bool) -> Balancer:
  """Wrap a method whose state is empty; options as of `make_balancer`."""
  return make_balancer(name, lambda num_tasks: optax.EmptyState(), lambda x, state: (weigh(x), state), **options)


def name_of(function: Callable[..., Any]) -> str:
  """Return what messages call a function that may be a `functools.partial`."""
  function = getattr(function, "func", function)
  return getattr(function, "__name__", str(function))


def shares_of(logits: jax.Array, where: jax.Array) -> jax.Array:
  """Return the softmax over the entries `where`, 0 for the others."""
  largest = jnp.where(where, logits, -jnp.inf).max()
  powers = jnp.where(where, jnp.exp(jnp.where(where, logits - largest, 0)), 0)
  total = powers.sum()
  return powers / jnp.where(total > 0, total, 1)


def per_task(value: jax.Array | float, num_tasks: int, name: str) -> jax.Array:
  """Return `[T]` from a number or `[T]`."""
  if jnp.ndim(value) and jnp.shape(value) != (num_tasks,):
    raise ValueError(f"{name} must be a number or have shape ({num_tasks},), one for each task; got {jnp.shape(value)}")
  return jnp.broadcast_to(jnp.asarray(value, jnp.result_type(float)), (num_tasks,))


class LearnedState(NamedTuple):
  """A number for each task that an Optax optimizer moves."""

  values: jax.Array  # [T]
  optimizer: optax.OptState


def optimized(
  value: jax.Array | float, optimizer: optax.GradientTransformation, name: str
) -> tuple[Callable[[int], LearnedState], Callable[[jax.Array, LearnedState, jax.Array], LearnedState]]:
  """Return `init` and `step` of numbers, one for each task, that an optimizer moves along a given gradient."""

  def init(num_tasks: int) -> LearnedState:
    values = per_task(value, num_tasks, name)
    return LearnedState(values, optimizer.init(values))

  def step(gradient: jax.Array, state: LearnedState, moves: jax.Array) -> LearnedState:
    gradient = jnp.where(moves, gradient, 0).astype(state.values.dtype)
    updates, next_state = optimizer.update(gradient, state.optimizer, state.values)
    new = LearnedState(jnp.asarray(optax.apply_updates(state.values, updates)), next_state)
    # Momentum and weight decay move an absent task even without a gradient, so every per-task entry is put back.
    return jax.tree.map(lambda a, b: jnp.where(moves, a, b) if jnp.shape(b) == moves.shape else a, new, state)

  return init, step


class SmoothedState(NamedTuple):
  """Running weights and the state of the balancer they come from."""

  weights: jax.Array  # [T]
  known: jax.Array  # [T] bool
  step: jax.Array
  inner: PyTree


def smoothed(balancer: Balancer, *, decay: jax.Array | float | optax.Schedule = 0.9) -> Balancer:
  """Return a balancer whose weights are a running mean of another's (CR-MOGM).

  `w <- decay w + (1 - decay) w_new`, starting at the first weights. Removes the bias that weights computed from the
  same noisy gradients as the update have. An absent task keeps its mean for when it comes back.

  Args:
    balancer: the balancer to smooth.
    decay: in [0, 1], or a schedule of the update's number; the paper lets it grow towards 1.

  Returns:
    A Balancer that needs what the other needs.

  Reference: Shiji Zhou, Wenpeng Zhang, Jiyan Jiang, Wenliang Zhong, Jinjie Gu and Wenwu Zhu, "On the Convergence of
  Stochastic Multi-Objective Gradient Manipulation and Beyond", NeurIPS 2022.
  """

  def init(num_tasks: int) -> SmoothedState:
    return SmoothedState(jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool), jnp.int32(0), balancer.init(num_tasks))

  def weigh(x: Inputs, state: SmoothedState):
    new, inner = balancer.update(x.losses, state.inner, gramian=x.gramian, key=x.key, present=x.usable)
    rate = decay(state.step) if callable(decay) else decay
    usable = x.usable & jnp.isfinite(new)
    mean = jnp.where(state.known, rate * state.weights + (1 - rate) * new, new)
    mean = jnp.where(usable, mean, state.weights)
    return mean, SmoothedState(mean, state.known | usable, state.step + 1, inner)

  return make_balancer("smoothed", init, weigh, needs_gramian=balancer.needs_gramian, needs_key=balancer.needs_key)
