"""Balancers that look at the Gramian of the tasks' gradients: one backward pass for each task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kdflax.balancing import _solvers, weightings
from kdflax.balancing._problem import checked_weights, matvec, normalise
from kdflax.balancing.balancer import (
  Balancer,
  Inputs,
  LearnedState,
  Weighting,
  make_balancer,
  name_of,
  optimized,
  per_task,
  shares_of,
  stateless,
)


def from_weighting(weighting: Weighting, *, random_order: bool = False) -> Balancer:
  """Return a balancer that applies a weighting to the Gramian; its state is empty.

  Args:
    weighting: `weighting(gramian, present=...) -> weights`, for hyper-parameters a `functools.partial` of one.
    random_order: whether the weighting takes an order of the tasks as its second argument (`pcgrad`), drawn with
      `random_order` from the key of every update.

  Returns:
    A Balancer that needs the Gramian, and with `random_order` a key.

  Examples:
    >>> balancer = from_weighting(weightings.mgda)
    >>> weights, _ = balancer.update(jnp.ones(2), balancer.init(2), gramian=jnp.array([[4.0, -1.0], [-1.0, 1.0]]))
    >>> [round(entry, 3) for entry in weights.tolist()]
    [0.286, 0.714]
  """

  def weigh(x: Inputs) -> jax.Array:
    order = (weightings.random_order(x.key, x.losses.shape[0]),) if random_order else ()
    return weighting(x.gramian, *order, present=x.usable)

  return stateless(f"from_weighting({name_of(weighting)})", weigh, needs_gramian=True, needs_key=random_order)


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

  Examples:
    >>> balancer = grad_norm(optimizer=optax.sgd(0.1))
    >>> weights, state = balancer.update(jnp.ones(2), balancer.init(2), gramian=jnp.array([[4.0, -1.0], [-1.0, 1.0]]))
    >>> print(weights)  # at first
    [1. 1.]

  Reference: Zhao Chen, Vijay Badrinarayanan, Chen-Yu Lee and Andrew Rabinovich, "GradNorm: Gradient Normalization for
  Adaptive Loss Balancing in Deep Multitask Networks", 2018, arXiv 1711.02257.
  """
  start, step = optimized(logits, optimizer, "grad_norm: logits")

  def init(num_tasks: int) -> GradNormState:
    return GradNormState(start(num_tasks), jnp.ones(num_tasks), jnp.zeros(num_tasks, bool))

  def weigh(x: Inputs, state: GradNormState):
    started = state.known.any()
    initial = jnp.where(state.known | ~x.usable, state.initial, x.losses)
    shares = shares_of(state.logits.values, x.usable)
    weights = x.num_usable * shares
    squared = jnp.where(x.usable, jnp.diagonal(x.gramian), 0)
    norms = jnp.sqrt(jnp.where(jnp.isfinite(squared), squared, 0))
    ratio = jnp.where(x.usable, x.losses / jnp.where(initial == 0, 1, initial), 0)
    mean = ratio.sum() / x.num_usable
    rate = ratio / jnp.where(mean == 0, 1, mean)
    target = (weights * norms).sum() / x.num_usable * jnp.where(rate > 0, rate, 0) ** alpha
    slope = jnp.where(x.usable, jnp.sign(weights * norms - target) * norms, 0)
    gradient = weights * (slope - (shares * slope).sum())
    logits = step(gradient, state.logits, x.usable)
    logits = jax.tree.map(lambda new, old: jnp.where(started, new, old), logits, state.logits)
    return jnp.where(started, weights, 1), GradNormState(logits, initial, state.known | x.usable)

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

  Examples:
    >>> balancer = grad_vac()
    >>> gramian, key = jnp.array([[4.0, -1.0], [-1.0, 1.0]]), jax.random.key(0)
    >>> weights, _ = balancer.update(jnp.ones(2), balancer.init(2), gramian=gramian, key=key)
    >>> print(weights.round(3))  # at first as pcgrad
    [0.625 1.   ]

  Reference: Zirui Wang, Yulia Tsvetkov, Orhan Firat and Yuan Cao, "Gradient Vaccine: Investigating and Improving
  Multi-task Optimization in Massively Multilingual Models", 2021, arXiv 2010.05874. LibMTL sums over the tasks where
  this takes the mean.
  """

  def init(num_tasks: int) -> GradVacState:
    return GradVacState(jnp.zeros((num_tasks, num_tasks)))

  def weigh(x: Inputs, state: GradVacState):
    p = normalise(x.gramian, x.usable)
    own = jnp.arange(p.norms.shape[0])
    dtype = p.norms.dtype
    eps = jnp.finfo(dtype).eps

    def visit(carry, other):
      coefficients, target = carry  # g_i = coefficients_i @ unit gradients
      products = matvec(coefficients, p.cosines)
      norm = jnp.sqrt(jnp.maximum((products * coefficients).sum(1), 0))
      meets = (other != own) & p.valid & p.valid[other] & (norm > 0)
      cosine = jnp.clip(products[own, other] / jnp.where(norm > 0, norm, 1), -1, 1)
      wanted = target[own, other]
      sine = jnp.sqrt(jnp.maximum(1 - wanted**2, eps))
      amount = norm * (wanted * jnp.sqrt(1 - cosine**2) / sine - cosine)
      coefficients = coefficients.at[own, other].add(jnp.where(meets & (cosine < wanted), amount, 0))
      turned = (1 - beta) * wanted + beta * cosine
      return (coefficients, target.at[own, other].set(jnp.where(meets & jnp.isfinite(turned), turned, wanted))), None

    order = weightings.random_order(x.key, own.shape[0])
    (coefficients, target), _ = lax.scan(visit, (jnp.diag(p.norms), state.target.astype(dtype)), order.T)
    weights = coefficients.sum(0) * p.inverse_norms / p.num_present
    return checked_weights(p, jnp.where(p.valid, weights, 1 / p.num_present)), GradVacState(target)

  return make_balancer("grad_vac", init, weigh, needs_gramian=True, needs_key=True)


class PcdState(NamedTuple):
  """Running mean of the squared norms, and the sum of its coefficients."""

  squares: jax.Array  # [T]
  mass: jax.Array  # [T]


def pcd(
  *, tau: jax.Array | float = 0.02, beta: jax.Array | float = 0.999, epsilon: jax.Array | float = 1e-8
) -> Balancer:
  """Return a balancer that follows task 0 and lets every other task make at least some progress.

  With `h_i = g_i / sqrt(v_i + epsilon)`, v the running mean of the squared norms corrected for its start at 0:

    min |d - h_0|^2 / 2   under   h_j . d >= tau_j |h_j|^2 for j > 0,   then d |g_0| / |d|

  The running means move first, then the weights are made. Where no such direction exists, or it is 0, the direction is
  g_0. A task with a zero gradient asks for nothing; if it is task 0, or task 0 is absent, the weights are 0.

  Args:
    tau: share of its own gradient that each other task is promised, a number or `[T - 1]`; may be traced.
    beta: share of the running means that stays, in [0, 1); may be traced.
    epsilon: added to the running means, in their units; may be traced.

  Returns:
    A Balancer that needs the Gramian.

  Raises:
    ValueError: beta is known not to be in [0, 1), or (by init and update) tau has another shape.

  Examples:
    >>> balancer = pcd(tau=0.5)
    >>> weights, _ = balancer.update(jnp.ones(2), balancer.init(2), gramian=jnp.array([[4.0, -1.0], [-1.0, 1.0]]))
    >>> print(weights.round(3))
    [1. 2.]

  Reference: Dara Varam and Mohamed I. AlHajri, "Not All Objectives Are Born Equal: Priority-Constrained Descent for
  Hierarchical Multi-Objective Optimization", 2026, arXiv 2606.29521.
  """
  if isinstance(beta, int | float) and not 0 <= beta < 1:
    raise ValueError(f"pcd: beta, the share of a running mean that stays, must be in [0, 1); got {beta}")

  def promised(num_tasks: int) -> jax.Array:
    return per_task(tau, num_tasks - 1, "pcd: tau")

  def init(num_tasks: int) -> PcdState:
    promised(num_tasks)
    return PcdState(jnp.zeros(num_tasks), jnp.zeros(num_tasks))

  def weigh(x: Inputs, state: PcdState) -> tuple[jax.Array, PcdState]:
    p = normalise(x.gramian, x.usable)
    stays = jnp.where(x.usable, beta, 1)
    squares = stays * state.squares + (1 - stays) * jnp.where(x.usable, jnp.diagonal(x.gramian), 0)
    mass = stays * state.mass + (1 - stays)
    unit = jnp.sqrt(p.scale)  # of p.norms
    lengths = jnp.where(p.valid, unit * p.norms / jnp.sqrt(squares / jnp.where(mass > 0, mass, 1) + epsilon), 0)
    progress = promised(p.norms.shape[0]) * lengths[1:]
    others = _solvers.progress_projection(p.cosines[1:, 1:], lengths[0] * p.cosines[1:, 0], progress)
    direction = jnp.append(lengths[0], others)
    products = matvec(p.cosines, direction)
    squared_norm = matvec(direction, products)
    missing = jnp.where(p.valid[1:], progress - products[1:], 0).max(initial=0)
    exists = (missing <= _solvers.rounding(direction)) & ~_solvers.is_noise(direction, squared_norm)
    scaled = direction * p.norms[0] * lax.rsqrt(jnp.where(exists, squared_norm, 1)) * p.inverse_norms
    first = jnp.arange(p.norms.shape[0]) == 0
    weights = jnp.where(exists, scaled, first) * p.valid[0]
    return checked_weights(p, weights), PcdState(squares, mass)

  return make_balancer("pcd", init, weigh, needs_gramian=True)
