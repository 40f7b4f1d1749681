"""Balancers: how the losses of T tasks become weights, with explicit state.

A balancer is a pair of pure functions. `init(num_tasks)` makes a state, a pytree of arrays that checkpoints;
`update(losses, state, *, gramian=None, key=None, present=None)` gives the weights `[T]` for these losses and the next
state. Weights come from the state given; learning moves only the returned state (`famo` moves first). They carry no
gradient.

Common rules. A task that is absent (`present`, `[T]` bool) has weight 0, the others are weighed as if alone, and its
entries of the state stay. A task whose loss is not finite counts as absent, and so does one whose loss is not
positive where a method takes its logarithm (these raise a ValueError outside of `jit`, where the value is known): no
state ever becomes NaN.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from kdflax.balancing import weightings
from kdflax.balancing._solvers import check_gramian, check_present, matvec, normalise, restrict
from kdflax.balancing.gradients import losses_array, stack_losses

PyTree = Any


class Balancer(NamedTuple):
  """A pair of pure functions `init(num_tasks) -> state` and `update(losses, state, ...) -> (weights, state)`.

  `needs_gramian` and `needs_key` say what `update` raises without, so that a training step knows whether to take
  gradients task by task.
  """

  init: Callable[[int], PyTree]
  update: Callable[..., tuple[jax.Array, PyTree]]
  needs_gramian: bool = False
  needs_key: bool = False

  @property
  def needs(self) -> Literal["losses", "gramian"]:
    """What `update` reads: the losses alone, or the Gramian of the gradients as well."""
    return "gramian" if self.needs_gramian else "losses"


class Inputs(NamedTuple):
  """What a method sees of one update."""

  losses: jax.Array  # [T], 1 where not usable
  gramian: Any  # [T, T], or None where the method does not need it
  key: Any
  usable: jax.Array  # [T] bool: present with a loss that the method can use
  number: jax.Array  # how many are usable, at least 1


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
  """
  names, given = jax.tree.structure(losses), jax.tree.structure(weights)
  if given != names and given.num_nodes > 1:
    raise ValueError(f"weights must be [T] or a pytree like that of the losses, {names}; got {given}.")
  losses, weights = stack_losses(losses), stack_losses(weights, "weights")
  if weights.shape != losses.shape:
    raise ValueError(f"weights must have shape {losses.shape}, one entry for each loss; got {weights.shape}.")
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
      f"{name} takes the logarithm of the losses, which must be positive; "
      f"that of task {tasks[0]} is {losses[tasks[0]]}."
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
      raise ValueError(f"num_tasks must be at least 1; got {num_tasks}.")
    return init(num_tasks)

  def update(losses, state, *, gramian=None, key=None, present=None):
    losses = losses_array(losses, name)
    if losses.ndim != 1 or not losses.shape[0]:
      raise ValueError(f"{name}: losses must have shape (T,); got {losses.shape}.")
    tasks = losses.shape[0]
    if needs_gramian and gramian is None:
      raise ValueError(
        f"{name} needs the Gramian of the task gradients: update(losses, state, gramian=gramian(gradients))."
      )
    if needs_key and key is None:
      raise ValueError(f"{name} draws random numbers: update(losses, state, key=key).")
    if gramian is not None:
      gramian = lax.stop_gradient(jnp.asarray(gramian))
      check_gramian(gramian, num_tasks=tasks)
    expected = jax.eval_shape(lambda: checked_init(tasks))
    if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, expected):
      raise ValueError(f"{name}: the state does not belong to {tasks} tasks; make it with init({tasks}).")
    if present is None:
      present = jnp.ones(tasks, bool)
    check_present(present, tasks)
    usable = present & jnp.isfinite(losses)
    if positive:
      check_positive(losses, usable, name)
      usable &= losses > 0
    losses = jnp.where(usable, losses, 1)
    inputs = Inputs(losses, gramian, key, usable, jnp.maximum(usable.sum(), 1))
    weights, moved = weigh(inputs, state)
    moved = jax.tree.map(lambda new, old: jnp.asarray(new).astype(jnp.asarray(old).dtype), moved, state)
    return jnp.where(usable, weights, 0).astype(losses.dtype), moved

  return Balancer(checked_init, update, needs_gramian, needs_key)


def stateless(name: str, weigh: Callable[[Inputs], jax.Array], **kwargs) -> Balancer:
  """Wrap a method whose state is empty."""
  return make_balancer(name, lambda num_tasks: optax.EmptyState(), lambda x, state: (weigh(x), state), **kwargs)


def shares_of(logits: jax.Array, where: jax.Array) -> jax.Array:
  """Return the softmax over the entries `where`, 0 for the others."""
  largest = jnp.where(where, logits, -jnp.inf).max()
  powers = jnp.where(where, jnp.exp(jnp.where(where, logits - largest, 0)), 0)
  total = powers.sum()
  return powers / jnp.where(total > 0, total, 1)


def per_task(value: jax.Array | float, num_tasks: int, name: str) -> jax.Array:
  """Return `[T]` from a number or `[T]`."""
  if jnp.ndim(value) and jnp.shape(value) != (num_tasks,):
    raise ValueError(
      f"{name} must be a number or have shape ({num_tasks},), one for each task; got {jnp.shape(value)}."
    )
  return jnp.broadcast_to(jnp.asarray(value, jnp.result_type(float)), (num_tasks,))


class LearnedState(NamedTuple):
  """A number for each task that an Optax optimizer moves."""

  values: jax.Array  # [T]
  optimizer: optax.OptState


def learned(value: jax.Array | float, optimizer: optax.GradientTransformation, name: str):
  """Return `init` and `step` of numbers, one for each task, that an optimizer moves along a given gradient."""

  def init(num_tasks: int) -> LearnedState:
    values = per_task(value, num_tasks, name)
    return LearnedState(values, optimizer.init(values))

  def step(gradient: jax.Array, state: LearnedState, moves: jax.Array) -> LearnedState:
    gradient = jnp.where(moves, gradient, 0).astype(state.values.dtype)
    updates, moved = optimizer.update(gradient, state.optimizer, state.values)
    new = LearnedState(jnp.asarray(optax.apply_updates(state.values, updates)), moved)
    # Momentum and weight decay move an absent task even without a gradient, so every per-task entry is put back.
    return jax.tree.map(lambda a, b: jnp.where(moves, a, b) if jnp.shape(b) == moves.shape else a, new, state)

  return init, step


def from_weighting(weighting: Callable[..., jax.Array], *, random_order: bool = False) -> Balancer:
  """Return a balancer that applies a weighting to the Gramian; its state is empty.

  Args:
    weighting: `weighting(gramian, present=...) -> weights`, for hyper-parameters a `functools.partial` of one.
    random_order: whether the weighting takes an order of the tasks as its second argument (`pcgrad`), drawn with
      `random_order` from the key of every update.

  Returns:
    A Balancer that needs the Gramian, and with `random_order` a key.
  """
  function = getattr(weighting, "func", weighting)
  name = f"from_weighting({getattr(function, '__name__', function)})"

  def weigh(x: Inputs) -> jax.Array:
    order = (weightings.random_order(x.key, x.losses.shape[0]),) if random_order else ()
    return weighting(x.gramian, *order, present=x.usable)

  return stateless(name, weigh, needs_gramian=True, needs_key=random_order)


class GradNormState(NamedTuple):
  """Learned logits and the losses at the start."""

  logits: LearnedState
  initial: jax.Array  # [T]
  known: jax.Array  # [T] bool


def grad_norm(
  *, alpha: jax.Array | float = 1.5, optimizer: optax.GradientTransformation, logits: jax.Array | float = 0.0
) -> Balancer:
  """Return a balancer that learns weights which make the tasks train at the same rate.

  The first update stores the losses and gives 1. Then weights are `w = T softmax(s)`, and s moves along the gradient of
  `sum_i |w_i d_i - mean(w d) r_i^alpha|` (the target held constant), with d the gradient norms and r the losses over
  the first ones, divided by their mean. A task that is absent at first stores its loss when it comes.

  Args:
    alpha: strength of the pull towards equal rates; may be traced.
    optimizer: moves s; the gradient scales with d.
    logits: s at the start, a number or `[T]`.

  Returns:
    A Balancer that needs the Gramian (its diagonal).

  Reference:
    Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing, 2018, arXiv:1711.02257.
  """
  start, step = learned(logits, optimizer, "grad_norm: logits")

  def init(num_tasks: int) -> GradNormState:
    return GradNormState(start(num_tasks), jnp.ones(num_tasks), jnp.zeros(num_tasks, bool))

  def weigh(x: Inputs, state: GradNormState):
    started = state.known.any()
    initial = jnp.where(state.known | ~x.usable, state.initial, x.losses)
    shares = shares_of(state.logits.values, x.usable)
    weights = x.number * shares
    squared = jnp.where(x.usable, jnp.diagonal(x.gramian), 0)
    norms = jnp.sqrt(jnp.where(jnp.isfinite(squared), squared, 0))
    ratio = jnp.where(x.usable, x.losses / jnp.where(initial == 0, 1, initial), 0)
    mean = ratio.sum() / x.number
    rate = ratio / jnp.where(mean == 0, 1, mean)
    target = (weights * norms).sum() / x.number * jnp.where(rate > 0, rate, 0) ** alpha
    slope = jnp.where(x.usable, jnp.sign(weights * norms - target) * norms, 0)
    gradient = weights * (slope - (shares * slope).sum())
    moved = step(gradient, state.logits, x.usable)
    moved = jax.tree.map(lambda new, old: jnp.where(started, new, old), moved, state.logits)
    return jnp.where(started, weights, 1), GradNormState(moved, initial, state.known | x.usable)

  return make_balancer("grad_norm", init, weigh, needs_gramian=True)


class GradVacState(NamedTuple):
  """Target cosine of every ordered pair of tasks."""

  target: jax.Array  # [T, T]


def grad_vac(*, beta: jax.Array | float = 0.5) -> Balancer:
  """Return a balancer that turns pairs of gradients towards a running target cosine.

  Every gradient visits the others in random order. Where the cosine phi of g_i with g_j is below the pair's target t,
  the multiple of g_j that makes it t is added; then `t <- (1 - beta) t + beta phi`. Targets start at 0, so the first
  update is `pcgrad`. The update is the mean over the tasks. Pairs with an absent or a zero gradient are left out.

  Args:
    beta: rate of the running target, in [0, 1]; may be traced.

  Returns:
    A Balancer that needs the Gramian and a key.

  Reference:
    Wang et al., Gradient Vaccine, 2021, arXiv:2010.05874. LibMTL sums over the tasks where this takes the mean.
  """

  def init(num_tasks: int) -> GradVacState:
    return GradVacState(jnp.zeros((num_tasks, num_tasks)))

  def weigh(x: Inputs, state: GradVacState):
    p = normalise(x.gramian, x.usable)
    own = jnp.arange(p.norms.shape[0])
    dtype = p.norms.dtype
    eps = jnp.finfo(dtype).eps

    def visit(carry, other):
      rows, target = carry  # g_i = rows_i times unit rows
      products = matvec(rows, p.cosines)
      norm = jnp.sqrt(jnp.maximum((products * rows).sum(1), 0))
      meets = (other != own) & p.valid & p.valid[other] & (norm > 0)
      cosine = jnp.clip(products[own, other] / jnp.where(norm > 0, norm, 1), -1, 1)
      wanted = target[own, other]
      sine = jnp.sqrt(jnp.maximum(1 - wanted**2, eps))
      amount = norm * (wanted * jnp.sqrt(1 - cosine**2) / sine - cosine)
      rows = rows.at[own, other].add(jnp.where(meets & (cosine < wanted), amount, 0))
      moved = (1 - beta) * wanted + beta * cosine
      return (rows, target.at[own, other].set(jnp.where(meets & jnp.isfinite(moved), moved, wanted))), None

    order = weightings.random_order(x.key, own.shape[0])
    (rows, target), _ = lax.scan(visit, (jnp.diag(p.norms), state.target.astype(dtype)), order.T)
    weights = rows.sum(0) * p.inverse_norms / p.number
    return restrict(p, jnp.where(p.valid, weights, 1 / p.number)), GradVacState(target)

  return make_balancer("grad_vac", init, weigh, needs_gramian=True, needs_key=True)


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

  Reference:
    Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond, NeurIPS 2022.
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
