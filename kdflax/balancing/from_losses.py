"""Balancers that look at the losses alone: one backward pass, whatever the number of tasks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdflax.balancing._problem import check_present
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
from kdflax.balancing.gradients import losses_array


def fixed(weights: jax.Array | float) -> Balancer:
  """Return a balancer with constant weights, a number or `[T]`.

  Its state is empty. Equal weights are `fixed(1.0)` (the sum of the losses) or `fixed(1 / T)` (their mean).

  Args:
    weights: a number for all tasks, or `[T]`.

  Returns:
    A Balancer; init and update raise ValueError for another number of tasks.

  Examples:
    >>> balancer = fixed(jnp.array([1.0, 3.0]))
    >>> weights, _ = balancer.update(jnp.array([0.5, 2.0]), balancer.init(2))
    >>> print(weights)
    [1. 3.]
  """

  def init(num_tasks: int) -> optax.EmptyState:
    per_task(weights, num_tasks, "fixed: weights")
    return optax.EmptyState()

  def weigh(x: Inputs, state):
    return per_task(weights, x.losses.shape[0], "fixed: weights"), state

  return make_balancer("fixed", init, weigh)


def random_weights() -> Balancer:
  """Return a balancer that draws `softmax(N(0, I))` at every update; needs a key.

  Examples:
    >>> balancer = random_weights()
    >>> weights, _ = balancer.update(jnp.ones(3), balancer.init(3), key=jax.random.key(0))
    >>> print(weights.sum().round(3))
    1.0

  Reference: Baijiong Lin, Feiyang Ye, Yu Zhang and Ivor W. Tsang, "Reasonable Effectiveness of Random Weighting: A
  Litmus Test for Multi-Task Learning", 2022, arXiv 2111.10603.
  """

  def weigh(x: Inputs) -> jax.Array:
    return shares_of(jax.random.normal(x.key, x.losses.shape, x.losses.dtype), x.usable)

  return stateless("random_weights", weigh, needs_key=True)


class WeightAverageState(NamedTuple):
  """Losses of the epoch so far and the means of the last two."""

  total: jax.Array  # [T], over the epoch so far
  number: jax.Array  # [T] int
  last: jax.Array  # [T]
  before: jax.Array  # [T]
  means: jax.Array  # [T] int: epochs with a mean
  step: jax.Array  # int


def dynamic_weight_average(*, temperature: jax.Array | float = 2.0, steps_per_epoch: int = 1) -> Balancer:
  """Return a balancer that favours the tasks whose losses fall slowest from epoch to epoch.

  1 for two epochs, then `T softmax(r / temperature)` with r the last epoch's mean loss over the one before. A task
  without two such means yet has r = 1. Meant for positive losses.

  Args:
    temperature: higher is closer to equal weights; may be traced.
    steps_per_epoch: updates in an epoch; static.

  Returns:
    A Balancer.

  Raises:
    ValueError: `steps_per_epoch` is below 1.

  Examples:
    >>> balancer = dynamic_weight_average()
    >>> state = balancer.init(2)
    >>> for losses in ([4.0, 4.0], [4.0, 2.0], [4.0, 1.0]):  # the second task falls faster
    ...   weights, state = balancer.update(jnp.array(losses), state)
    >>> [round(entry, 3) for entry in weights.tolist()]
    [1.124, 0.876]

  Reference: Shikun Liu, Edward Johns and Andrew J. Davison, "End-to-End Multi-Task Learning with Attention", 2019,
  arXiv 1803.10704.
  """
  if steps_per_epoch < 1:
    raise ValueError(f"steps_per_epoch must be at least 1; got {steps_per_epoch}")

  def init(num_tasks: int) -> WeightAverageState:
    zero, none, one = jnp.zeros(num_tasks), jnp.zeros(num_tasks, jnp.int32), jnp.ones(num_tasks)
    return WeightAverageState(zero, none, one, one, none, jnp.int32(0))

  def weigh(x: Inputs, state: WeightAverageState):
    known = (state.means >= 2) & (state.before != 0)
    ratio = jnp.where(known, state.last / jnp.where(known, state.before, 1), 1)
    weights = jnp.where(state.step < 2 * steps_per_epoch, 1, x.num_usable * shares_of(ratio / temperature, x.usable))
    total = state.total + jnp.where(x.usable, x.losses, 0)
    number = state.number + x.usable
    ends = (state.step + 1) % steps_per_epoch == 0
    rolls = ends & (number > 0)
    return weights, WeightAverageState(
      jnp.where(ends, 0, total),
      jnp.where(ends, 0, number),
      jnp.where(rolls, total / jnp.maximum(number, 1), state.last),
      jnp.where(rolls, state.last, state.before),
      jnp.minimum(state.means + rolls, 2),
      state.step + 1,
    )

  return make_balancer("dynamic_weight_average", init, weigh)


def uncertainty(*, optimizer: optax.GradientTransformation, log_variance: jax.Array | float = 0.0) -> Balancer:
  """Return a balancer that learns each task's noise: weights `exp(-s) / 2`.

  s, the log variance of the task's error, follows `sum_i L_i exp(-s_i) / 2 + s_i / 2` (minimum `s = log L`) by an
  optimizer of its own, so the model's weight decay does not touch it.

  Args:
    optimizer: moves s.
    log_variance: s at the start, a number or `[T]`.

  Returns:
    A Balancer.

  Examples:
    >>> balancer = uncertainty(optimizer=optax.sgd(0.1), log_variance=jnp.log(2.0))
    >>> weights, _ = balancer.update(jnp.array([1.0, 4.0]), balancer.init(2))
    >>> print(weights.round(3))
    [0.25 0.25]

  Reference: Alex Kendall, Yarin Gal and Roberto Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for
  Scene Geometry and Semantics", 2018, arXiv 1705.07115. The regression form for every task.
  """
  init, step = optimized(log_variance, optimizer, "uncertainty: log_variance")

  def weigh(x: Inputs, state: LearnedState):
    weights = jnp.exp(-state.values) / 2
    return weights, step(1 / 2 - x.losses * weights, state, x.usable)

  return make_balancer("uncertainty", init, weigh)


def imtl_l(*, optimizer: optax.GradientTransformation, log_scale: jax.Array | float = 0.0) -> Balancer:
  """Return a balancer that learns scales which make all losses equal: weights `exp(s)`.

  s follows `sum_i exp(s_i) L_i - s_i`, whose minimum is `exp(s_i) L_i = 1`. `uncertainty` with s of the other sign and
  twice the weights.

  Args:
    optimizer: moves s.
    log_scale: s at the start, a number or `[T]`.

  Returns:
    A Balancer.

  Examples:
    >>> balancer = imtl_l(optimizer=optax.sgd(0.1))
    >>> _, state = balancer.update(jnp.array([1.0, 4.0]), balancer.init(2))
    >>> print(state.values.round(3))  # the weight of the larger loss falls
    [ 0.  -0.3]

  Reference: Liyang Liu, Yi Li, Zhanghui Kuang, Jing-Hao Xue, Yimin Chen, Wenming Yang, Qingmin Liao and Wayne Zhang,
  "Towards Impartial Multi-task Learning", ICLR 2021. `imtl_g` is the part on gradients.
  """
  init, step = optimized(log_scale, optimizer, "imtl_l: log_scale")

  def weigh(x: Inputs, state: LearnedState):
    weights = jnp.exp(state.values)
    return weights, step(x.losses * weights - 1, state, x.usable)

  return make_balancer("imtl_l", init, weigh)


def geometric() -> Balancer:
  """Return a balancer whose update is that of the geometric mean of the losses: weights `GLS / (T L_i)`.

  `GLS = exp(mean log L)`, without the overflow of the product. Losses must be positive. Its state is empty.

  Examples:
    >>> balancer = geometric()
    >>> weights, _ = balancer.update(jnp.array([1.0, 4.0]), balancer.init(2))
    >>> print(weights)
    [1.   0.25]

  Reference: Sumanth Chennupati, Ganesh Sistu, Senthil Yogamani and Samir A. Rawashdeh, "MultiNet++: Multi-Stream
  Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning", 2019, arXiv 1904.08492. LibMTL reports other
  weights than it applies.
  """

  def weigh(x: Inputs) -> jax.Array:
    logs = jnp.log(x.losses)  # 0 where not usable
    return jnp.exp(logs.sum() / x.num_usable - logs) / x.num_usable

  return stateless("geometric", weigh, positive=True)


def uw_so(losses: jax.Array, temperature: jax.Array | float, *, present: jax.Array | None = None) -> jax.Array:
  """Return the weights of uncertainty weighting in closed form: `softmax(1 / (L temperature))`.

  What `uncertainty` learns has its minimum at `1 / L`; this takes it at once. Small losses get large weights, the more
  so the lower the temperature. Without gradient.

  Args:
    losses: `[T]`, positive. A loss of 0 takes all.
    temperature: positive; may be traced.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`, non-negative, with sum 1.

  Raises:
    ValueError: losses are not `[T]`, or `present` is not `[T]` bool.

  Examples:
    >>> print(uw_so(jnp.array([1.0, 4.0]), 1.0).round(3))
    [0.679 0.321]

  Reference: Lukas Kirchdorfer, Cathrin Elich, Simon Kutsche, Heiner Stuckenschmidt, Lukas Schott and Jan M. Köhler,
  "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning", 2024, arXiv 2408.07985.
  """
  losses = losses_array(losses, "uw_so")
  if losses.ndim != 1:
    raise ValueError(f"uw_so: losses must have shape (T,); got {losses.shape}")
  if present is None:
    present = jnp.ones(losses.shape, bool)
  check_present(present, losses.shape[0])
  inverse = 1 / (jnp.where(present, losses, 1) * temperature)
  return shares_of(jnp.minimum(inverse, jnp.finfo(inverse.dtype).max), present)


def from_loss_weighting(weighting: Weighting) -> Balancer:
  """Return a balancer that applies a function of the losses; its state is empty.

  Args:
    weighting: `weighting(losses, present=...) -> weights`, for hyper-parameters a `functools.partial` of one such as
      `uw_so`.

  Returns:
    A Balancer.
  """
  return stateless(f"from_loss_weighting({name_of(weighting)})", lambda x: weighting(x.losses, present=x.usable))


class FamoState(NamedTuple):
  """Logits, the Adam state that moves them, and the logarithms of the last losses."""

  logits: LearnedState
  log_losses: jax.Array  # [T]
  known: jax.Array  # [T] bool


def famo(*, learning_rate: jax.Array | float = 0.025, weight_decay: float = 1e-3) -> Balancer:
  """Return a balancer that lowers the logarithms of all losses at the same rate, without task gradients.

  With z = softmax(s), an update first moves s by Adam (L2 decay in the gradient) along `J_softmax' (log L_last - log
  L)`, so that tasks that fell little gain weight, then gives `(z / L) / sum(z / L)`. Losses must be positive.

  Args:
    learning_rate: of Adam; a number or an `optax.Schedule`.
    weight_decay: coefficient of s in its gradient.

  Returns:
    A Balancer.

  Examples:
    >>> balancer = famo()
    >>> weights, _ = balancer.update(jnp.array([1.0, 4.0]), balancer.init(2))
    >>> print(weights.round(3))
    [0.8 0.2]

  Reference: Bo Liu, Yihao Feng, Peter Stone and Qiang Liu, "FAMO: Fast Adaptive Multitask Optimization", 2023, arXiv
  2306.03792. The authors evaluate the change on the same batch by a second forward pass; here it is the change since
  the last update. Call update on losses of the same batch before and after the step for theirs.
  """
  optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))
  start, step = optimized(0.0, optimizer, "famo")

  def init(num_tasks: int) -> FamoState:
    return FamoState(start(num_tasks), jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool))

  def weigh(x: Inputs, state: FamoState):
    logs = jnp.log(x.losses)
    moves = x.usable & state.known
    change = jnp.where(moves, state.log_losses - logs, 0)
    shares = shares_of(state.logits.values, x.usable)
    logits = step(shares * (change - (shares * change).sum()), state.logits, moves)
    logits = jax.tree.map(lambda new, old: jnp.where(moves.any(), new, old), logits, state.logits)
    weights = shares_of(logits.values - logs, x.usable)
    return weights, FamoState(logits, jnp.where(x.usable, logs, state.log_losses), state.known | x.usable)

  return make_balancer("famo", init, weigh, positive=True)


class TchebycheffState(NamedTuple):
  """Number of updates, and the losses seen at the end of the warm-up."""

  step: jax.Array
  total: jax.Array  # [T]
  number: jax.Array  # [T] int


def smooth_tchebycheff(*, smoothing: jax.Array | float = 1.0, warmup_steps: int, nadir_steps: int) -> Balancer:
  """Return a balancer that lowers the largest log loss relative to a nadir, smoothly.

  `warmup_steps` updates with weights `1 / L`; the nadir n is the mean of the last `nadir_steps` of their losses. Then
  `T softmax(log(L / n) / smoothing) / L`, the gradient of `T smoothing logsumexp(log(L / n) / smoothing)`. Losses
  must be positive. A task that had no loss while the nadir was taken has L = n.

  Args:
    smoothing: 0 is the maximum, large is the sum of the logs; may be traced.
    warmup_steps: updates before the nadir is set; static.
    nadir_steps: how many of them the nadir is the mean of; static.

  Returns:
    A Balancer.

  Raises:
    ValueError: not 1 <= nadir_steps <= warmup_steps.

  Examples:
    >>> balancer = smooth_tchebycheff(warmup_steps=1, nadir_steps=1)
    >>> _, state = balancer.update(jnp.array([1.0, 4.0]), balancer.init(2))
    >>> weights, _ = balancer.update(jnp.array([1.0, 2.0]), state)  # the second has halved its loss
    >>> [round(entry, 3) for entry in weights.tolist()]
    [1.333, 0.333]

  Reference: Xi Lin, Xiaoyuan Zhang, Zhiyuan Yang, Fei Liu, Zhenkun Wang and Qingfu Zhang, "Smooth Tchebycheff
  Scalarization for Multi-Objective Optimization", 2024, arXiv 2402.19078.
  """
  if not 1 <= nadir_steps <= warmup_steps:
    raise ValueError(f"must have 1 <= nadir_steps <= warmup_steps; got {nadir_steps} and {warmup_steps}")

  def init(num_tasks: int) -> TchebycheffState:
    return TchebycheffState(jnp.int32(0), jnp.zeros(num_tasks), jnp.zeros(num_tasks, jnp.int32))

  def weigh(x: Inputs, state: TchebycheffState):
    known = (state.number > 0) & (state.total > 0)
    nadir = jnp.where(known, state.total / jnp.maximum(state.number, 1), x.losses)
    shares = x.num_usable * shares_of(jnp.log(x.losses / nadir) / smoothing, x.usable)
    warm = state.step < warmup_steps
    takes = x.usable & warm & (state.step >= warmup_steps - nadir_steps)
    total = state.total + jnp.where(takes, x.losses, 0)
    step = jnp.minimum(state.step + 1, warmup_steps)
    return jnp.where(warm, 1, shares) / x.losses, TchebycheffState(step, total, state.number + takes)

  return make_balancer("smooth_tchebycheff", init, weigh, positive=True)
