"""Weights of the tasks as pure functions of the Gramian of their gradients.

Every weighting maps the Gramian `G = J J'` of the task gradients (`[T, T]`, see `gramian`) to weights `[T]`; the
update is the direction `weights @ J` (see `combine`). All of them are deterministic, jit- and vmap-able, take a
bounded number of steps, compute in float32 or wider, and share these rules:

- Units: the Gramian is divided by its largest diagonal entry and, where a method allows it, by the norms of the rows.
  There is no absolute threshold: gradients times a positive constant give the same direction.
- T identical gradients g give g, unless a docstring says otherwise.
- A zero row (a task with a zero gradient) takes no part in a solve; T still counts it.
- `present`, an optional `[T]` bool: an absent task has weight 0 and the result is that of the other tasks alone,
  whatever its row of the Gramian holds. It may be traced: a new mask compiles nothing.
- A Gramian with NaN or infinity among the present tasks gives NaN weights.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kdflax.balancing import _solvers
from kdflax.balancing._problem import checked_weights, matvec, normalise, preferred


def mgda(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
  """Return the weights of the shortest vector in the convex hull of the gradients.

  Its negative is the direction along which the slowest task falls fastest; it is zero exactly when no direction lowers
  all losses. A zero row is itself that vector: the direction is 0 and the weight is on the zero rows. Small gradients
  dominate, so tasks with small losses decide the step.

  min |w'J|^2 over w >= 0, sum w = 1; with unit rows C and x_i = w_i d_i / d_min, min x'Cx over sum x_i d_min / d_i = 1.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`, non-negative, with sum 1.

  Raises:
    ValueError: the Gramian is not square, or `present` is not `[T]` bool.

  Examples:
    >>> [round(weight, 3) for weight in mgda(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()]
    [0.286, 0.714]

  Reference: Jean-Antoine Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
  Comptes Rendus Mathématique 2012; for networks, Ozan Sener and Vladlen Koltun, "Multi-Task Learning as Multi-Objective
  Optimization", 2018, arXiv 1810.04650. Those use Frank-Wolfe steps, which stop far from the minimum when the norms
  differ; here an active-set method finds it exactly.
  """
  p = normalise(gramian, present)
  smallest = jnp.where(p.valid, p.norms, jnp.inf).min()
  edges = jnp.where(p.valid, smallest * p.inverse_norms, 0)
  edges = jnp.where(p.valid.any(), edges, 1)
  x, _ = _solvers.simplex_minimum(p.cosines, edges)
  zero = p.present & (p.norms == 0)
  on_zero = zero / jnp.maximum(zero.sum(), 1)
  return checked_weights(p, jnp.where(zero.any(), on_zero, x * edges))


def cagrad(gramian: jax.Array, *, c: jax.Array | float = 0.5, present: jax.Array | None = None) -> jax.Array:
  """Return the weights of the direction near the mean gradient that lowers the worst task most.

  max_d min_i g_i.d with |d - g_0| <= c |g_0|, g_0 the mean over the T tasks; d = g_0 + c |g_0| g_w / |g_w| where w
  minimises g_w.g_0 + c |g_0| |g_w| over the simplex. With c = 0 it is the mean; as c grows it turns towards `mgda`.
  Where g_w is 0 (no direction within reach lowers all losses) it is the mean. Zero rows take no part in the minimum.
  T identical gradients g give (1 + c) g.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    c: radius of the search in units of the mean gradient, at least 0; may be traced.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`, non-negative.

  Raises:
    ValueError: the Gramian is not square, `present` is not `[T]` bool, or c is known to be negative.

  Examples:
    >>> [round(weight, 3) for weight in cagrad(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()]
    [0.5, 0.933]

  Reference: Bo Liu, Xingchao Liu, Xiaojie Jin, Peter Stone and Qiang Liu, "Conflict-Averse Gradient Descent for
  Multi-task Learning", 2021, arXiv 2110.14048. Not divided by 1 + c^2, which the authors' code does; TorchJD does not
  either, and returns 0 where g_w is 0.
  """
  if isinstance(c, (int, float)) and not c >= 0:
    raise ValueError(f"c must be at least 0; got {c}")
  p = normalise(gramian, present)
  mean = jnp.where(p.present, 1 / p.num_present, 0).astype(p.norms.dtype)
  scaled = p.norms * mean
  mean_norm = jnp.sqrt(jnp.maximum(matvec(scaled, matvec(p.cosines, scaled)), 0))
  moves = (mean_norm > 0) & (c > 0) & p.valid.any()
  mean_norm = jnp.where(moves, mean_norm, 1)
  smallest = jnp.where(p.valid, p.norms, jnp.inf).min()
  edges = jnp.where(p.valid.any(), jnp.where(p.valid, smallest * p.inverse_norms, 0), 1)
  linear = matvec(p.cosines, scaled / mean_norm)
  x, squared_norm = _solvers.simplex_minimum(p.cosines, edges, linear, jnp.where(moves, c, 1).astype(linear.dtype))
  moves &= squared_norm > 0
  inner = x * p.inverse_norms * lax.rsqrt(jnp.where(moves, squared_norm, 1))
  return checked_weights(p, mean + jnp.where(moves, c * mean_norm * inner, 0))


def upgrad(gramian: jax.Array, *, preference: jax.Array | None = None, present: jax.Array | None = None) -> jax.Array:
  """Return the weights of the combination of all gradients, each projected so that it conflicts with none.

  Every gradient is projected onto the dual cone {d : J d >= 0}; the direction is the preference-weighted sum. It
  conflicts with no task, and each task's share is proportional to its norm. Without conflict it is the mean.

  sum_i u_i argmin_{J d >= 0} |d - g_i|^2, by T non-negative quadratic programmes in the cosines, since the cone does
  not depend on the norms. They are solved exactly; where the cone is only {0} the direction is exactly 0.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    preference: `[T]`, non-negative; 1 / T when None.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`.

  Raises:
    ValueError: the Gramian is not square, or `preference` or `present` is not `[T]`.

  Examples:
    >>> [round(weight, 3) for weight in upgrad(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()]
    [0.625, 1.0]

  Reference: Pierre Quinton and Valérian Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, arXiv
  2406.16232. TorchJD adds 1e-4 of the trace to the diagonal, which loses the promise for badly scaled rows, and returns
  the mean for gradients below 1e-2.
  """
  p = normalise(gramian, present)
  share = preferred(p, preference)
  unit = jnp.eye(p.norms.shape[0], dtype=p.norms.dtype)
  weights = _solvers.dual_cone_sum(p.cosines, unit, share * p.norms) * p.inverse_norms
  return checked_weights(p, jnp.where(p.valid, weights, share))


def dual_projection(
  gramian: jax.Array, *, preference: jax.Array | None = None, present: jax.Array | None = None
) -> jax.Array:
  """Return the weights of the preferred combination of the gradients, projected so that it conflicts with none.

  argmin_{J d >= 0} |d - u'J|^2: one quadratic programme where `upgrad` solves T, so a large gradient may leave nothing
  of a small one that opposes it. Without conflict it is the mean.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    preference: u `[T]`, non-negative; 1 / T when None.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`, at least the preference (all 0 for a zero projection).

  Raises:
    ValueError: the Gramian is not square, or `preference` or `present` is not `[T]`.

  Examples:
    >>> [round(weight, 3) for weight in dual_projection(jnp.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()]
    [0.5, 0.5]

  Reference: David Lopez-Paz and Marc'Aurelio Ranzato, "Gradient Episodic Memory for Continual Learning", 2017, arXiv
  1706.08840, with all tasks in the constraint. Solved on the cosines and exactly, see `upgrad`.
  """
  p = normalise(gramian, present)
  share = preferred(p, preference)
  mixed = share * p.norms
  unit = jnp.abs(mixed).max()
  unit = jnp.where(unit > 0, unit, 1)
  projection = _solvers.dual_cone_sum(p.cosines, (mixed / unit)[None], unit[None])
  return checked_weights(p, jnp.where(p.valid, projection * p.inverse_norms, share))


def pcgrad(gramian: jax.Array, permutations: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
  """Return the weights of the mean of the gradients after projecting out pairwise conflicts.

  Every gradient visits the others in a given order; where it conflicts with g_j, `g_j (g_i.g_j) / |g_j|^2` is taken
  off. Without conflict it is the mean. For three or more tasks a later projection may bring back an earlier conflict.

  Only inner products are needed: each projected gradient is a row of coefficients over the original ones.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    permutations: order of the visits, `[T, T - 1]` or `[T, T]` integers, one row for each task; the row's own index is
      skipped. Draw them with `random_order`.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`.

  Raises:
    ValueError: the Gramian is not square, the permutations have another shape or are not integers, or `present` is not
      `[T]` bool.

  Examples:
    >>> print(pcgrad(jnp.array([[4.0, -1.0], [-1.0, 1.0]]), jnp.array([[1], [0]])).round(3))
    [0.625 1.   ]

  Reference: Tianhe Yu, Saurabh Kumar, Abhishek Gupta, Sergey Levine, Karol Hausman and Chelsea Finn, "Gradient Surgery
  for Multi-Task Learning", 2020, arXiv 2001.06782. The authors sum over the tasks, and add an epsilon to squared norms.
  """
  p = normalise(gramian, present)
  tasks = p.norms.shape[0]
  permutations = jnp.asarray(permutations)
  if permutations.shape not in ((tasks, tasks - 1), (tasks, tasks)):
    raise ValueError(
      f"permutations must have shape ({tasks}, {tasks - 1}) or ({tasks}, {tasks}), one row for each task; "
      f"got {permutations.shape}"
    )
  if permutations.size and not jnp.issubdtype(permutations.dtype, jnp.integer):
    raise ValueError(f"permutations must be integers; got {permutations.dtype}")
  own = jnp.arange(tasks)

  def visit(carry, other):
    coefficients, products = carry  # of unit rows: g_i = coefficients_i J, products = g_i.g_j for every j
    conflicts = p.valid[other] & (other != own)
    amount = jnp.where(conflicts, jnp.minimum(products[own, other], 0), 0)
    coefficients = coefficients.at[own, other].add(-amount)
    return (coefficients, products - amount[:, None] * p.cosines[other]), None

  start = jnp.diag(p.norms)
  (coefficients, _), _ = lax.scan(visit, (start, p.norms[:, None] * p.cosines), permutations.T)
  weights = coefficients.sum(0) * p.inverse_norms / p.num_present
  return checked_weights(p, jnp.where(p.valid, weights, 1 / p.num_present))


def random_order(key: jax.Array, num_tasks: int) -> jax.Array:
  """Draw an order of visits for `pcgrad`: independent permutations of the tasks, `[T, T]`.

  Examples:
    >>> random_order(jax.random.key(0), 3).shape
    (3, 3)
  """
  return jax.vmap(lambda key: jax.random.permutation(key, num_tasks))(jax.random.split(key, num_tasks))


def krum(
  gramian: jax.Array, *, num_byzantine: int, num_selected: int = 1, present: jax.Array | None = None
) -> jax.Array:
  """Return equal weights on the gradients that lie closest to their neighbours.

  The score of a gradient is the sum of its squared distances to its `T - num_byzantine - 2` nearest others; the
  `num_selected` smallest are averaged (ties: the first). For updates from sources of which some may be corrupt. The
  number of neighbours follows the tasks present, and is at least 1 while there are two.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    num_byzantine: number of gradients that may be corrupt; static.
    num_selected: number of gradients to average; static.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Weights `[T]`, non-negative, with sum 1.

  Raises:
    ValueError: the Gramian is not square, `num_byzantine` is negative or above T - 3 (a single task takes 0),
      `num_selected` is not in [1, T], or `present` is not `[T]` bool.

  Examples:
    >>> print(krum(jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 9]]), num_byzantine=0, num_selected=2))
    [0.5 0.5 0. ]

  Reference: Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui and Julien Stainer, "Machine Learning with
  Adversaries: Byzantine Tolerant Gradient Descent", 2017, arXiv 1703.02757. Squared distances as in the paper; TorchJD
  takes their roots, which may select another gradient.
  """
  p = normalise(gramian, present)
  tasks = p.norms.shape[0]
  if num_byzantine < 0 or (tasks < num_byzantine + 3 and (tasks, num_byzantine) != (1, 0)):
    raise ValueError(f"num_byzantine must be in [0, T - 3]; got {num_byzantine} with T = {tasks} tasks")
  if not 1 <= num_selected <= tasks:
    raise ValueError(f"num_selected must be in [1, T]; got {num_selected} with T = {tasks} tasks")
  squared = jnp.diagonal(p.gramian)
  distances = jnp.maximum(squared[:, None] + squared - 2 * p.gramian, 0)
  index = jnp.arange(tasks)
  other = (index[:, None] != index) & p.present
  ascending = jnp.sort(jnp.where(other, distances, jnp.inf), axis=1)
  neighbours = jnp.clip(p.num_present - num_byzantine - 2, jnp.minimum(1, p.num_present - 1), tasks)
  scores = jnp.where(index < neighbours, ascending, 0).sum(1)
  rank = jnp.where(p.present, scores, jnp.inf).argsort().argsort()
  chosen = (rank < num_selected) & p.present
  return checked_weights(p, chosen / jnp.maximum(chosen.sum(), 1).astype(p.norms.dtype))
