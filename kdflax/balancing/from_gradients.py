"""Methods that look at whole gradients: functions of them, and combiners with a buffer for each task.

Buffers `[T, ...]` mirror the gradients leaf by leaf, so they take T times the memory of the parameters and shard like
them. They are running means corrected for their start at 0, so that the first direction has the full length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kdflax.balancing._problem import check_present, matvec
from kdflax.balancing.balancer import check_positive, shares_of
from kdflax.balancing.combiner import Combiner, usable_gradients
from kdflax.balancing.gradients import combine, expand_to, gramian, num_tasks, select_tasks, widen

PyTree = Any


def grad_drop(
  gradients: PyTree, key: jax.Array, *, leak: jax.Array | float = 0.0, present: jax.Array | None = None
) -> PyTree:
  """Return the mean of the gradients, keeping in every coordinate only one sign, drawn in proportion.

  P = (1 + sum_i g_i / sum_i |g_i|) / 2 is the probability that a coordinate keeps its positive entries; the others
  count with the factor `leak`. Coordinates on which all tasks agree are their mean.

  Args:
    gradients: pytree with a leading T axis on every leaf.
    key: random key; each leaf draws with a key of its own.
    leak: part of the dropped entries that passes, a number or one for each task `[T]`, in [0, 1].
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    A pytree like one task's gradient.

  Raises:
    ValueError: leaves do not share their leading axis, or `leak` or `present` does not have one entry for each task.

  Examples:
    >>> gradients = jnp.array([[1.0, 2.0], [3.0, 2.0]])  # two tasks that agree
    >>> print(grad_drop(gradients, jax.random.key(0)))
    [2. 2.]

  Reference: Zhao Chen, Jiquan Ngiam, Yanping Huang, Thang Luong, Henrik Kretzschmar, Yuning Chai and Dragomir Anguelov,
  "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", 2020, arXiv 2010.06808. Mean over the
  tasks where TorchJD sums; on parameter gradients, where LibMTL drops on the representation.
  """
  tasks = num_tasks(gradients)
  if jnp.ndim(leak) and jnp.shape(leak) != (tasks,):
    raise ValueError(f"leak must be a number or have shape ({tasks},); got {jnp.shape(leak)}")
  if present is not None:
    check_present(present, tasks)
  count = tasks if present is None else jnp.maximum(present.sum(), 1)

  def leaf_drop(index, leaf):
    wide = widen(leaf) if present is None else select_tasks(widen(leaf), present)
    magnitude = jnp.abs(wide).sum(0)
    agreement = wide.sum(0) / jnp.where(magnitude > 0, magnitude, 1)
    uniform = jax.random.uniform(jax.random.fold_in(key, index), leaf.shape[1:], wide.dtype)
    positive = uniform < (1 + agreement) / 2
    passes = expand_to(jnp.broadcast_to(jnp.asarray(leak, wide.dtype), (tasks,)), leaf)
    kept = jnp.where((wide > 0) == positive, 1, passes)
    return ((kept * wide).sum(0) / count).astype(leaf.dtype)

  leaves, structure = jax.tree.flatten(gradients)
  return jax.tree.unflatten(structure, [leaf_drop(index, leaf) for index, leaf in enumerate(leaves)])


def trimmed_mean(gradients: PyTree, *, trim: int, present: jax.Array | None = None) -> PyTree:
  """Return the mean of the gradients without the `trim` largest and smallest entries of every coordinate.

  For gradients from sources of which up to `trim` may be corrupt. With fewer than 2 trim + 1 tasks present, as many as
  leave at least one entry are dropped.

  Args:
    gradients: pytree with a leading T axis on every leaf.
    trim: entries to drop at each end, 2 trim < T; static.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    A pytree like one task's gradient.

  Raises:
    ValueError: `trim` is negative or leaves no task, leaves do not share their leading axis, or `present` is not `[T]`.

  Examples:
    >>> print(trimmed_mean(jnp.array([[1.0], [2.0], [100.0]]), trim=1))
    [2.]

  Reference: Dong Yin, Yudong Chen, Kannan Ramchandran and Peter Bartlett, "Byzantine-Robust Distributed Learning:
  Towards Optimal Statistical Rates", 2018, arXiv 1803.01498.
  """
  tasks = num_tasks(gradients)
  if trim < 0 or 2 * trim >= tasks:
    raise ValueError(f"trim must satisfy 0 <= 2 trim < T; got trim = {trim} with T = {tasks} tasks")
  if present is not None:
    check_present(present, tasks)
  count = tasks if present is None else present.sum()
  dropped = jnp.minimum(trim, (count - 1) // 2)
  rank = jnp.arange(tasks)
  kept = (rank >= dropped) & (rank < count - dropped)

  def leaf_mean(leaf):
    wide = widen(leaf)
    if present is not None:
      wide = jnp.where(expand_to(present, leaf), wide, jnp.inf)  # sorted behind all others
    total = select_tasks(jnp.sort(wide, axis=0), kept).sum(0)
    return (total / jnp.maximum(kept.sum(), 1)).astype(leaf.dtype)

  return jax.tree.map(leaf_mean, gradients)


class BufferState(NamedTuple):
  """Running mean of every task's gradient, the sum of its coefficients, and the number of updates."""

  buffer: PyTree  # like the gradients
  mass: jax.Array  # [T]
  step: jax.Array  # [T] int


def _buffer(gradients: PyTree) -> BufferState:
  tasks = num_tasks(gradients)
  zeros = jax.tree.map(lambda leaf: jnp.zeros_like(widen(leaf)), gradients)
  return BufferState(zeros, jnp.zeros(tasks), jnp.zeros(tasks, jnp.int32))


def _average(state: BufferState, gradients: PyTree, moves: jax.Array, decay: Callable) -> tuple[BufferState, PyTree]:
  """Return the next state and the corrected means; `decay` maps the number of the update to the share that stays."""
  step = state.step + moves
  stays = jnp.where(moves, decay(jnp.maximum(step, 1).astype(state.mass.dtype)), 1)
  mass = stays * state.mass + (1 - stays)

  def move(old, new):
    share = expand_to(stays, old).astype(old.dtype)
    return share * old + (1 - share) * jnp.where(expand_to(moves, old), new, 0).astype(old.dtype)

  buffer = jax.tree.map(move, state.buffer, gradients)
  scale = 1 / jnp.where(mass > 0, mass, 1)
  means = jax.tree.map(lambda leaf: leaf * expand_to(scale, leaf).astype(leaf.dtype), buffer)
  return BufferState(buffer, mass, step), means


def _like(direction: PyTree, gradients: PyTree) -> PyTree:
  return jax.tree.map(lambda value, leaf: value.astype(leaf.dtype), direction, gradients)


def db_mtl(*, beta: float = 0.9, beta_sigma: float = 0.0) -> Combiner:
  """Return a combiner that balances the scales of both losses and gradients.

  The gradients of log L (g / L) go into running means, every mean is stretched to the longest, and the direction is
  their mean. T identical gradients g of equal losses L give g / L. Losses must be positive; a task whose loss is not
  counts as absent.

  Args:
    beta: share of the running mean that stays is `beta / k^beta_sigma` at update k; in [0, 1).
    beta_sigma: decay of that share.

  Returns:
    A Combiner whose state holds a buffer of T gradients.

  Raises:
    ValueError: beta is known not to be in [0, 1).

  Examples:
    >>> combiner, gradients = db_mtl(), jnp.array([[1.0, 0.0], [0.0, 8.0]])
    >>> direction, _ = combiner.update(jnp.array([1.0, 2.0]), gradients, combiner.init(gradients))
    >>> print(direction.round(3))
    [2. 2.]

  Reference: Baijiong Lin, Weisen Jiang, Feiyang Ye, Yu Zhang, Pengguang Chen, Ying-Cong Chen, Shu Liu and James T.
  Kwok, "Dual-Balancing for Multi-Task Learning", 2023, arXiv 2308.12029. Mean where the authors sum, and the running
  mean is corrected for its start at 0: without that the length grows by 1 / (1 - beta) over the first updates.
  """
  if isinstance(beta, int | float) and not 0 <= beta < 1:
    raise ValueError(f"db_mtl: beta, the share of a running mean that stays, must be in [0, 1); got {beta}")

  def update(losses, gradients, state, *, key=None, present=None):
    del key
    losses, gradients, present = usable_gradients(losses, gradients, state.mass.shape[0], present, "db_mtl")
    check_positive(losses, present, "db_mtl")
    usable = present & (losses > 0)
    inverse = jnp.where(usable, 1 / jnp.where(usable, losses, 1), 0)
    logs = jax.tree.map(lambda leaf: widen(leaf) * expand_to(inverse, leaf).astype(widen(leaf).dtype), gradients)
    state, means = _average(state, logs, usable, lambda k: beta / k**beta_sigma)
    norms = jnp.sqrt(jnp.where(usable, jnp.diagonal(gramian(means)), 0))
    weights = jnp.where(norms > 0, norms.max() / jnp.where(norms > 0, norms, 1), 0) / jnp.maximum(usable.sum(), 1)
    return _like(combine(means, weights, present=usable), gradients), state

  return Combiner(_buffer, update)


class MocoState(NamedTuple):
  """Running gradients and the weights."""

  gradients: BufferState
  weights: jax.Array  # [T]


def moco(
  *, beta: float = 0.5, beta_sigma: float = 0.5, gamma: float = 0.1, gamma_sigma: float = 0.5, ridge: float = 0.0
) -> Combiner:
  """Return a combiner that follows the common descent direction of running gradients.

  At update k: running means y of the gradients, of which `1 - beta / k^beta_sigma` stays; then the weights move on
  the simplex, `w <- P(w - gamma / k^gamma_sigma (Y Y' / m + ridge I) w)` with m the mean squared norm, which takes
  the units out of the step; the direction is `w @ y`. The weights tend to those of `mgda` on gradients with less
  noise. They start equal.

  Args:
    beta: rate of the running gradients.
    beta_sigma: decay of that rate.
    gamma: rate of the weights.
    gamma_sigma: decay of that rate.
    ridge: pull towards equal weights, in units of m.

  Returns:
    A Combiner whose state holds a buffer of T gradients.

  Raises:
    ValueError: beta is known not to be in (0, 1].

  Examples:
    >>> combiner, gradients = moco(), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> direction, _ = combiner.update(jnp.ones(2), gradients, combiner.init(gradients))
    >>> [round(entry, 3) for entry in direction.tolist()]
    [0.54, 1.38]

  Reference: Heshan Fernando, Han Shen, Miao Liu, Subhajit Chaudhury, Keerthiram Murugesan and Tianyi Chen, "Mitigating
  Gradient Bias in Multi-objective Learning: A Provably Convergent Approach", ICLR 2023. LibMTL has a softmax where the
  paper projects, and multiplies unit gradients by the losses.
  """
  if isinstance(beta, int | float) and not 0 < beta <= 1:
    raise ValueError(f"moco: beta, the rate of the running gradients, must be in (0, 1]; got {beta}")

  def init(gradients: PyTree) -> MocoState:
    tasks = num_tasks(gradients)
    return MocoState(_buffer(gradients), jnp.full(tasks, 1 / tasks, float))

  def update(losses, gradients, state, *, key=None, present=None):
    del key
    _, gradients, present = usable_gradients(losses, gradients, state.weights.shape[0], present, "moco")
    buffer, means = _average(state.gradients, gradients, present, lambda k: 1 - beta / k**beta_sigma)
    products = jnp.where(present[:, None] & present, gramian(means), 0)
    count = jnp.maximum(present.sum(), 1)
    unit = jnp.trace(products) / count
    products = products / jnp.where(unit > 0, unit, 1)
    kept = jnp.where(present, state.weights, 0)
    total = kept.sum()
    kept = jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), present / count)
    k = jnp.max(buffer.step).astype(kept.dtype)
    slope = matvec(products, kept) + ridge * kept
    weights = project_simplex(kept - gamma / jnp.maximum(k, 1) ** gamma_sigma * slope, present)
    stored = jnp.where(present, weights, state.weights)
    direction = _like(combine(means, weights, present=present), gradients)
    return direction, MocoState(buffer, stored.astype(state.weights.dtype))

  return Combiner(init, update)


def project_simplex(vector: jax.Array, where: jax.Array) -> jax.Array:
  """Project onto the probability simplex of the entries `where`; the others are 0."""
  ordered = -jnp.sort(jnp.where(where, -vector, jnp.inf))
  index = jnp.arange(1, vector.shape[0] + 1)
  excess = (jnp.cumsum(jnp.where(jnp.isfinite(ordered), ordered, 0)) - 1) / index
  last = jnp.where(ordered > excess, index, 0).max()
  return jnp.where(where, jnp.maximum(vector - excess[jnp.maximum(last - 1, 0)], 0), 0)


class ExcessState(NamedTuple):
  """Sum of squared gradients, the first excess risks, and the weights."""

  squares: PyTree  # like the gradients
  initial: jax.Array  # [T]
  weights: jax.Array  # [T]
  known: jax.Array  # [T] bool


def excess_mtl(*, learning_rate: float = 0.01) -> Combiner:
  """Return a combiner that follows the tasks that are farthest from convergence.

  The excess risk of a task is estimated by `sum g^2 / sqrt(A)` with A the running sum of g^2 (its Adagrad
  preconditioner). The first update stores the estimates e0 and gives equal weights; then `w <- w exp(learning_rate e
  / e0)`, renormalised to sum 1. Coordinates with A = 0 count 0, and so does a task with e0 = 0.

  Args:
    learning_rate: of the weights.

  Returns:
    A Combiner whose state holds a buffer of T gradients.

  Examples:
    >>> combiner, gradients = excess_mtl(), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> direction, _ = combiner.update(jnp.ones(2), gradients, combiner.init(gradients))
    >>> [round(entry, 3) for entry in direction.tolist()]  # at first the mean
    [0.5, 1.5]

  Reference: Yifei He, Shiji Zhou, Guojun Zhang, Hyokun Yun, Yi Xu, Belinda Zeng, Trishul Chilimbi and Han Zhao, "Robust
  Multi-Task Learning with Excess Risks", 2024, arXiv 2402.02009. Mean over the tasks where LibMTL keeps a sum of T;
  there a zero gradient at the first update leaves NaN weights for ever.
  """

  def init(gradients: PyTree) -> ExcessState:
    tasks = num_tasks(gradients)
    squares = jax.tree.map(lambda leaf: jnp.zeros_like(widen(leaf)), gradients)
    return ExcessState(squares, jnp.zeros(tasks), jnp.full(tasks, 1 / tasks, float), jnp.zeros(tasks, bool))

  def update(losses, gradients, state, *, key=None, present=None):
    del key
    _, gradients, present = usable_gradients(losses, gradients, state.weights.shape[0], present, "excess_mtl")
    squares = jax.tree.map(lambda total, leaf: total + widen(leaf) ** 2, state.squares, gradients)

    def leaf_excess(total, leaf):
      ratio = jnp.where(total > 0, widen(leaf) ** 2 * lax.rsqrt(jnp.where(total > 0, total, 1)), 0)
      return ratio.sum(range(1, leaf.ndim))

    excess = sum(jax.tree.leaves(jax.tree.map(leaf_excess, squares, gradients)))
    initial = jnp.where(state.known | ~present, state.initial, excess)
    relative = jnp.where(state.known & (initial > 0), excess / jnp.where(initial > 0, initial, 1), 0)
    logits = jnp.log(state.weights) + learning_rate * relative
    weights = shares_of(jnp.minimum(logits, jnp.finfo(logits.dtype).max), present)
    # The sum of the stored weights stays 1: present tasks share out what they had. From 0 a weight could never grow.
    shared = weights * jnp.where(present, state.weights, 0).sum()
    stored = jnp.where(present, jnp.maximum(shared, jnp.finfo(shared.dtype).tiny), state.weights)
    direction = combine(gradients, weights, present=present)
    known = state.known | present
    stored, initial = stored.astype(state.weights.dtype), initial.astype(state.initial.dtype)
    return direction, ExcessState(squares, initial, stored, known)

  return Combiner(init, update)
