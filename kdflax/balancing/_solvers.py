"""Small dense solvers for the weightings: bounded iterations, no host calls, no factorisation in a loop.

The quadratic programmes are solved by an active-set method on a tableau. A tableau holds the linear relation between a
residual and a variable for every index, solved for the variable where the index is in the working set and for the
residual elsewhere; moving one index in or out is a rank-one update. So one step costs T^2 element-wise operations,
which vmap batches over right-hand sides, and the inverse of the working set is at hand for the final refinement.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kdflax.balancing._problem import Problem, matvec

_MAX_SOLVES = 6  # of the projections, with growing margins


class _State(NamedTuple):
  """Where the active-set method stands."""

  table: jax.Array  # [n, n + columns]: the relation's matrix, then its constant columns
  inside: jax.Array  # [n] bool: the working set
  x: jax.Array  # [n]: a feasible point, zero outside the working set
  t: jax.Array  # []: the factor of the second constant column (of no use with one column)
  low: jax.Array
  high: jax.Array
  steps: jax.Array
  done: jax.Array


def _exchange(table: jax.Array, index: jax.Array, active: jax.Array | bool = True) -> jax.Array:
  """Swap residual and variable `index`: in the relation `y = M x + r`, solve row `index` for its x."""
  in_row = jnp.arange(table.shape[0])[:, None] == index
  in_column = jnp.arange(table.shape[1])[None, :] == index
  row, column = table[index], jnp.take(table, index, axis=1)
  pivot = row[index]
  scaled = row / pivot
  exchanged = table - column[:, None] * scaled[None, :]
  exchanged = jnp.where(in_row, -scaled[None, :], jnp.where(in_column, column[:, None] / pivot, exchanged))
  exchanged = jnp.where(in_row & in_column, 1 / pivot, exchanged)
  return jnp.where(active, exchanged, table)


def _tolerance(dtype: jnp.dtype, size: int) -> float:
  """Rounding of a sum of `size` products of order one."""
  return 4 * float(jnp.finfo(dtype).eps) * max(size, 2) ** 0.5


def _solution(table: jax.Array, t: jax.Array) -> jax.Array:
  """The constants of the relation: x of the working set, and residuals elsewhere."""
  size = table.shape[0]
  constant = table[:, size]
  return constant if table.shape[1] == size + 1 else constant + t * table[:, size + 1]


def _enter_or_leave(state: _State, free: jax.Array, finish: Callable[[_State, jax.Array], _State]) -> _State:
  """Take one step of the active-set method of Lawson and Hanson.

  The point moves to the minimum over the working set. If that has a negative entry, it stops at the first one to reach
  zero, which leaves; with a free index, a constraint on the others, the last of them stays. Otherwise the index of the
  most negative residual enters, or, when there is none, `finish` decides. An index whose pivot is rounding depends
  linearly on the working set; its residual is zero and it never enters.
  """
  size = state.inside.shape[0]
  small = _tolerance(state.x.dtype, size)

  # 1. Towards the minimum over the working set, as far as all entries stay non-negative.
  values = _solution(state.table, state.t)
  target = jnp.where(state.inside, values, 0)
  negative = state.inside & ~free & (target < 0)
  any_negative = negative.any() & ((state.inside & ~free).sum() > free.any())
  ratio = jnp.where(negative, state.x / jnp.where(negative, state.x - target, 1), jnp.inf)
  x = jnp.where(any_negative, state.x + jnp.where(negative.any(), ratio.min(), 0) * (target - state.x), target)
  leaving = ratio.argmin()

  # 2. What could enter: the most negative residual, where its pivot can be told from rounding.
  may_enter = ~state.inside & (jnp.diagonal(state.table) > small)
  residual = jnp.where(may_enter, values, jnp.inf)
  entering = residual.argmin()
  enters = residual[entering] < -small * jnp.maximum(1, jnp.abs(jnp.where(free, 0, x)).sum())

  # 3. One index leaves, or one enters, or neither does.
  index = jnp.where(any_negative, leaving, entering)
  moves = any_negative | enters
  x = jnp.where(any_negative & (jnp.arange(size) == leaving), 0, x)
  inside = jnp.where(moves & (jnp.arange(size) == index), enters & ~any_negative, state.inside)
  table = _exchange(state.table, index, moves & ~state.done)
  return finish(state._replace(table=table, inside=inside, x=x, steps=state.steps + 1), ~moves)


def _run(
  table: jax.Array,
  inside: jax.Array,
  x: jax.Array,
  free: jax.Array,
  limit: int,
  finish: Callable[[_State, jax.Array], _State] | None = None,
  t: jax.Array | float = 0.0,
) -> _State:
  """Take steps from a feasible point x until nothing moves, or `finish` says so, or the limit is reached."""
  zero = jnp.zeros((), x.dtype)
  state = _State(table, inside, x, zero + t, zero, zero + jnp.inf, jnp.int32(0), jnp.bool_(False))
  stop = finish or (lambda state, optimal: state._replace(done=optimal))
  return lax.while_loop(
    lambda state: ~state.done & (state.steps < limit), lambda state: _enter_or_leave(state, free, stop), state
  )


def _refine(state: _State, matrix: jax.Array, constant: jax.Array, x: jax.Array) -> jax.Array:
  """Solve `matrix x = -constant` on the working set anew, from the original matrix: two steps of refinement."""
  size = matrix.shape[0]
  inverse = jnp.where(state.inside[:, None] & state.inside, state.table[:, :size], 0)
  for _ in range(2):
    x = x - matvec(inverse, matvec(matrix, x) + constant)
  return x


def _noise(weights: jax.Array) -> jax.Array:
  """Squared norm below which `|J'w|^2` is rounding of the cosines, for weights `[..., T]` over unit rows."""
  return 4 * float(jnp.finfo(weights.dtype).eps) * jnp.abs(weights).sum(-1) ** 2


def rounding(weights: jax.Array) -> jax.Array:
  """Rounding of the products of cosines with weights `[..., T]`, which adds up like a random walk."""
  return 8 * float(jnp.finfo(weights.dtype).eps) * jnp.sqrt((weights * weights).sum(-1))


def _cone_projection(cosines: jax.Array, task: jax.Array, linear: jax.Array, margin: jax.Array) -> jax.Array:
  """Weights of the vector nearest to `task @ unit rows` whose product with every unit row is at least the margin.

  Minimises `|J'(task + z)|^2 / 2 - margin . z` over `z >= 0`, with `linear = cosines @ task`. The margin is a number,
  or one for each row.
  """
  size = linear.shape[0]
  table = jnp.concatenate([cosines, (linear - margin)[:, None]], axis=1)
  empty = jnp.zeros(size, bool)
  state = _run(table, empty, jnp.zeros_like(linear), empty, 4 * size + 8)
  refined = _refine(state, cosines, linear - margin, state.x)
  z = jnp.stack([jnp.where(state.inside, jnp.maximum(refined, 0), 0), state.x])
  # With near-dependent rows in the working set the refinement may lose more than it gains; keep the better of the two.
  smallest = jnp.minimum((matvec(z, cosines) + linear - margin / 2).min(1), 0)
  return task + jnp.where(smallest[0] >= smallest[1], z[0], z[1])


def progress_projection(cosines: jax.Array, linear: jax.Array, progress: jax.Array) -> jax.Array:
  """Coefficients of the least that must be added to a vector so that its product with every unit row is large enough.

  Minimises `|z @ unit rows|^2 / 2` over z under `unit_i . (vector + z @ unit rows) >= progress_i`; z is non-negative.
  Where no vector has such products, neither has the result.

  Args:
    cosines: Gramian of unit rows, `[K, K]`.
    linear: products of the unit rows with the vector, `[K]`.
    progress: what they must be at least, `[K]`.

  Returns:
    z `[K]`.
  """
  if not linear.shape[0]:
    return linear
  return _cone_projection(cosines, jnp.zeros_like(linear), linear, progress)


def is_noise(weights: jax.Array, squared_norm: jax.Array) -> jax.Array:
  """Whether the squared norm of a combination of unit rows is rounding of their cosines."""
  return squared_norm <= _noise(weights)


def dual_cone_sum(cosines: jax.Array, tasks: jax.Array, factors: jax.Array) -> jax.Array:
  """Weights (over unit rows) of a sum of projections onto the dual cone `{d : J d >= 0}` of all rows.

  The constraints are asked for with a margin of a few roundings, so that rounding of the Gramian or of the weights
  turns none negative. A row that depends on the working set to rounding cannot enter it, and its product may stay below
  that; where the sum conflicts for this reason, margins grow by twice what was missing and all is solved again. A
  projection that is zero to the precision of the Gramian counts as zero: what is left of it points anywhere.

  Args:
    cosines: Gramian of unit rows, `[T, T]`.
    tasks: combinations of unit rows to project, `[K, T]`, of order one.
    factors: of the projections in the sum, `[K]`, non-negative.

  Returns:
    Weights `[T]`; exact zeros where every direction found conflicts or is zero to precision.
  """
  size, eps = cosines.shape[0], float(jnp.finfo(cosines.dtype).eps)
  linear = matvec(tasks, cosines)

  def solve(carry):
    margins, _, _, tries = carry
    weights = jax.vmap(_cone_projection, (None, 0, 0, 0))(cosines, tasks, linear, margins)
    products = matvec(weights, cosines)
    resolved = (products * weights).sum(1) > _noise(weights)
    total = matvec(jnp.where(resolved, factors, 0), weights)
    reached = matvec(cosines, total)
    length = jnp.sqrt(jnp.maximum(matvec(reached, total), 0))
    # The promise is 1e-5 in cosine for float32; half of it, less what rounding may hide, is left to use here.
    done = reached.min() >= rounding(total) / 4 - eps**0.5 / 64 * length
    missing = jnp.maximum(rounding(weights) - products.min(1), 0)
    return margins + 2 * missing, jnp.where(done, total, 0), done, tries + 1

  start = 2 * rounding(tasks), jnp.zeros(size, cosines.dtype), jnp.bool_(False), jnp.int32(0)
  return lax.while_loop(lambda carry: ~carry[2] & (carry[3] < _MAX_SOLVES), solve, start)[1]


def simplex_minimum(
  cosines: jax.Array, edges: jax.Array, linear: jax.Array | None = None, ratio: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Minimise `|J'x| ^ 2 / 2`, or `linear.x + ratio |J'x|`, over `x >= 0` with `edges.x = 1`.

  With `linear` given, `|g| = min_t (|g|^2 / t + t) / 2` makes it a quadratic programme in x for every t > 0, whose
  feasible set does not depend on t. When x is optimal for a t, t moves to the exact minimum over the working set (the
  solution is affine in t there, so this is an equation in t^2), guarded by a bracket, until the set stays.

  Args:
    cosines: Gramian of unit rows, `[T, T]`.
    edges: `[T]`, at least one entry 1 and none above; rows with 0 cost nothing to leave out.
    linear: `[T]`, None for the plain minimum norm.
    ratio: the factor of the norm, positive.

  Returns:
    The minimiser x `[T]`, with `linear` up to a factor, and `|J'x|^2`, zero where it is zero to precision.
  """
  size, dtype = cosines.shape[0], cosines.dtype

  # 1. Start at the best corner, and in its units: rows that are much longer or shorter do not share digits with it.
  cost = -edges if linear is None else jnp.where(edges > 0, (linear + ratio) / jnp.where(edges > 0, edges, 1), jnp.inf)
  start = cost.argmin()
  edges = edges / edges[start]
  chosen, multiplier = jnp.arange(size + 1) == start, jnp.arange(size + 1) == size

  # 2. The optimality conditions, linear in x and the multiplier of `edges.x = 1`, solved for the corner.
  border = jnp.concatenate([jnp.concatenate([cosines, edges[None]]), jnp.append(-edges, 0)[:, None]], axis=1)
  unit = jnp.zeros(size + 1, dtype).at[size].set(1)
  tilt = jnp.zeros_like(unit) if linear is None else jnp.append(linear, 0)
  constants = jnp.stack([-unit, tilt], axis=1)  # the second one counts t times
  table = _exchange(_exchange(jnp.concatenate([border, constants], axis=1), start), jnp.int32(size))

  # 3. Change the working set until nothing improves; with `linear`, t as well.
  finish, steps, first_t = None, 4 * size + 64, 0.0
  if linear is not None:
    finish, steps, first_t = partial(_next_t, border, constants, ratio), 12 * size + 64, 1 / ratio
  state = _run(table, chosen | multiplier, chosen.astype(dtype), multiplier, steps, finish, first_t)

  # 4. Solve anew for the last working set, without the rounding of the steps.
  columns = jnp.where(state.inside[:size, None], _fresh_columns(border, constants, state)[:size], 0)
  x = columns[:, 0]
  if linear is not None:
    root, *_ = _best_t(cosines, columns, ratio)
    x = x + jnp.where(root > 0, root, state.t) * columns[:, 1]
  x = jnp.maximum(x, 0)
  x = x / matvec(edges, x)
  squared_norm = matvec(x, matvec(cosines, x))
  return x, jnp.where(squared_norm <= _noise(x), 0, squared_norm)


def _fresh_columns(border: jax.Array, constants: jax.Array, state: _State) -> jax.Array:
  """The constant columns without what many exchanges have rounded: x inside the working set, residuals outside."""
  solutions = [
    _refine(state, border, constant, jnp.where(state.inside, column, 0))
    for constant, column in zip(constants.T, state.table[:, border.shape[0] :].T, strict=True)
  ]
  x = jnp.where(state.inside[:, None], jnp.stack(solutions, axis=1), 0)
  residuals = jnp.matmul(border, x, precision=jax.lax.Precision.HIGHEST) + constants
  return jnp.where(state.inside[:, None], x, residuals)


def _best_t(cosines: jax.Array, columns: jax.Array, ratio: jax.Array | float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Where `ratio t = |J'x|` for `x = columns @ (1, t)`, -1 if nowhere, and the slope and offset of that in t^2."""
  # J'x = g + t h, and g, the shortest over the affine hull of the working set, is orthogonal to h, which lies in it.
  offset, along_h = jnp.sum(columns * matvec(cosines, columns), axis=0)
  slope = ratio**2 - along_h
  root = jnp.sqrt(offset / jnp.where(slope > 0, slope, 1))
  # With 0 in that hull |J'x| / t is constant: no root, but the bracket knows the side.
  eps = float(jnp.finfo(cosines.dtype).eps)
  return jnp.where((slope > 0) & (offset > 64 * eps * jnp.abs(columns[:, 0]).sum() ** 2), root, -1), slope, offset


def _next_t(
  border: jax.Array, constants: jax.Array, ratio: jax.Array | float, state: _State, optimal: jax.Array
) -> _State:
  """Move t to its minimum over the working set if x is optimal for it, or into the bracket; done once t stays."""
  size, eps = border.shape[0] - 1, float(jnp.finfo(border.dtype).eps)
  columns = _fresh_columns(border, constants, state)
  root, slope, offset = _best_t(border[:size, :size], jnp.where(state.inside[:size, None], columns[:size], 0), ratio)
  table, t = state.table.at[:, size + 1 :].set(columns), state.t
  above = slope * t**2 > offset
  low, high = jnp.where(above, state.low, t), jnp.where(above, t, state.high)
  settled = jnp.abs(root - t) <= 64 * eps * t
  bisected = jnp.where(jnp.isinf(high), 8 * t, jnp.sqrt(jnp.maximum(low, high / 64) * high))
  t = jnp.where(settled | ((root > low) & (root < high)), root, bisected)
  settled |= (high <= low * (1 + 64 * eps)) | (t < eps)
  return jax.tree.map(
    lambda new, old: jnp.where(optimal, new, old),
    state._replace(table=table, t=t, low=low, high=high, done=settled),
    state,
  )


def fair_point(cosines: jax.Array, log_norms: jax.Array, power: jax.Array | float) -> jax.Array:
  """Solve `C x = f x^-power` with `f = norms^(power - 1)` for x > 0, by Newton steps in log x.

  The root is the minimum of a strictly convex function, `x'C x / 2` plus a sum of convex functions of each entry, whose
  Hessian is scaled to a unit diagonal before it is factored; steps in log x are clipped to one, which keeps x positive
  and the first steps inside the region where the quadratic model holds. A ridge of a few roundings keeps the solution
  finite where opposed rows leave none.

  Args:
    cosines: Gramian of unit rows, `[T, T]`.
    log_norms: logarithm of the norms of the rows, `[T]`.
    power: exponent, positive.

  Returns:
    x `[T]`.
  """
  size, eps = cosines.shape[0], float(jnp.finfo(cosines.dtype).eps)
  matrix = cosines + 4 * size * eps * jnp.eye(size, dtype=cosines.dtype)
  log_f = (power - 1) * log_norms
  lowest = 0.9 * math.log(jnp.finfo(cosines.dtype).tiny)
  longest = jnp.maximum(1 / power, 1)  # downwards the power law alone decides, and it is exact in `power` log x

  def newton(carry):
    u, _, step = carry
    # Row and column of the Hessian are in a unit, of which the logarithm is kept, that leaves one of the two parts of
    # its diagonal near 1: an entry may ask for less than the smallest float. Such a one stands alone, in units of 1.
    log_other = log_f + (1 - power) * u  # of x f x^-power
    unit = jnp.maximum(u, log_other / 2)
    alone = jnp.where(unit < lowest, unit, 0)
    own, other = jnp.exp(u - unit), jnp.exp(log_other - 2 * unit)
    scale = lax.rsqrt(own**2 * jnp.diagonal(matrix) + power * other)
    hessian = matrix * jnp.outer(own * scale, own * scale) + jnp.diag(power * other * scale**2)
    factor = jnp.linalg.cholesky(hessian)
    residual = jnp.exp(log_other - unit - alone) - jnp.exp(u - unit - alone) * matvec(matrix, jnp.exp(u))
    move = scale * jnp.exp(alone - unit) * jax.scipy.linalg.cho_solve((factor, True), scale * residual)
    return u + jnp.clip(move, -longest, 1), jnp.abs(move).max(), step + 1

  def unfinished(carry):
    return (carry[1] > eps ** (1 / 3)) & (carry[2] < 100)  # errors are squared at every step, and one more follows

  start = log_f / (1 + power)  # the solution of orthogonal rows
  u, _, _ = lax.while_loop(unfinished, newton, (start, jnp.full((), jnp.inf, start.dtype), jnp.int32(0)))
  return jnp.exp(newton((u, None, 0))[0])


def equal_products(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return `v = pinv(C) 1`, its products `C v` with the unit rows, and the rounding of these; 0 for zero rows.

  The products are 1 where a direction has equal cosines with all rows; otherwise the nearest that one can have.
  Eigenvalues of C below `T eps` of the largest are zero.
  """
  ones = problem.valid.astype(problem.norms.dtype)
  values, vectors = jnp.linalg.eigh(problem.cosines)
  kept = values > ones.shape[0] * jnp.finfo(ones.dtype).eps * values[-1]
  inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
  share = ones * matvec(vectors, inverse * matvec(vectors.T, ones))
  return share, ones * matvec(problem.cosines, share), rounding(ones) + rounding(share)
