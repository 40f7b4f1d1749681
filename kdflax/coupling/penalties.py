"""Penalties that tie the parameters of several tasks together, projections, and a proximal step for Optax.

Leaves are coupled as matrices: a kernel `[..., out]` as `[prod(...), out]`, a vector as one column, a scalar as `1 x
1`. Everything works leaf by leaf; parameters are never flattened into one vector.

Sharded parameters under `jit`: `l2_coupling` gathers nothing, whatever the layout. The trace norms are made of products
over the longer side of a matrix. They gather nothing from a matrix sharded on its longer side, nor from a kernel
`[h, w, in, out]` or a stack `[..., tasks]` sharded on the largest axis before the last. A leaf sharded otherwise (on
the shorter side, on another axis, on two axes) is gathered, and so is every one by the method `svd`. The unfolding
`train` may gather, and the proximal step always does, for its SVD.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdflax.coupling.nuclear_norm import nuclear_norm, singular_value_threshold
from kdflax.numerics.safe import not_before

Projection = Callable[[Any], Any]
_UNFOLDINGS = ("last", "tucker", "train")


def l2_coupling(task_params: Sequence[Any], projections: Projection | Sequence[Projection] | None = None) -> jax.Array:
  """Penalise the squared distances between the projected parameters of every two tasks.

  Zero exactly where all projected parameters agree, with an exactly zero gradient there. Each ordered pair counts, so
  every unordered one counts twice:

      sum over i != j of ||P_i th_i - P_j th_j||^2  =  2 T sum_i ||Z_i - mean Z||^2,   Z_i = P_i th_i

  computed in the centred form on the right: T terms in place of T^2, and no cancellation under a common offset.

  Args:
    task_params: one pytree of arrays for each of T >= 2 tasks; trees may differ where projections make them agree.
    projections: None, one callable `params -> pytree` for all tasks, or a sequence with one for each task.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: for fewer than two tasks, a number of projections that is not T, or projected parameters that differ in
      structure or shape: both tasks, the leaf and the shapes are named.

  Reference: Long Duong, Trevor Cohn, Steven Bird and Paul Cook, "Low resource dependency parsing: cross-lingual
  parameter sharing in a neural network parser", ACL 2015. The expanded form `T sum |Z_i|^2 - |sum Z_i|^2` loses all
  digits in float32 under an offset.
  """
  total = jnp.zeros((), jnp.float32)
  for leaves in _task_leaves(task_params, projections):
    # Relative to the first task: equal tasks give exact zeros, which a rounded mean would not.
    stacked = jnp.stack([leaf - leaves[0] for leaf in leaves])
    centred = stacked - jnp.mean(stacked, 0)
    total = total + 2 * len(leaves) * jnp.sum(centred**2)
  return total


def trace_norm_coupling(
  task_params: Sequence[Any],
  projections: Projection | Sequence[Projection] | None = None,
  *,
  smoothing: float | jax.Array = 0.0,
  method: str = "auto",
) -> jax.Array:
  """Penalise the trace (nuclear) norm of the difference between the projected parameters of every two tasks.

  Where L2 coupling shrinks differences, this makes them low-rank: tasks agree but for a few directions, as with
  adapters. Zero exactly where all projected parameters agree, with an exactly zero gradient there.

      sum over i != j of ||P_i th_i - P_j th_j||_*          over ordered pairs, summed over leaves

  so `d / d th_i = 2 sum over j != i of P_i' U V'` with the polar factor `U V'` of each difference. Each unordered pair
  is computed once and doubled; all pairs of all leaves of one matrix shape are one batched call of `nuclear_norm`.

  Args:
    task_params: one pytree of arrays for each of T >= 2 tasks; trees may differ where projections make them agree.
    projections: None, one callable `params -> pytree` for all tasks, or a sequence with one for each task.
    smoothing: scalar `mu >= 0` in the units of the parameters, see `nuclear_norm`; may be traced.
    method: see `nuclear_norm`; static.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: as `l2_coupling` and `nuclear_norm` do.

  Reference: Yongxin Yang and Timothy M. Hospedales, "Trace norm regularised deep multi-task learning", 2016, arXiv
  1606.04038, which penalises the stacked parameters (`stacked_trace_norm`) and so also shrinks what the tasks share;
  differences do not.
  """
  by_shape: dict[Any, list[jax.Array]] = {}
  for leaves in _task_leaves(task_params, projections):
    matrices = [_rows_in_any_order(leaf) for leaf in leaves]
    differences = [first - second for first, second in itertools.combinations(matrices, 2)]
    by_shape.setdefault((matrices[0].shape, matrices[0].dtype), []).extend(differences)
  total = jnp.zeros((), jnp.float32)
  for differences in by_shape.values():
    matrices = not_before(jnp.stack(differences), total)  # one decomposition at a time
    total = total + 2 * jnp.sum(nuclear_norm(matrices, smoothing=smoothing, method=method))
  return total


def stacked_trace_norm(
  stacked: Any,
  *,
  unfolding: str = "last",
  task_axis: int = -1,
  smoothing: float | jax.Array = 0.0,
  method: str = "auto",
) -> jax.Array:
  """Penalise the trace norm of stacked task parameters, unfolded into matrices.

  Draws the tasks into a low-dimensional span; unlike the pairwise penalty it is zero only at zero, so it also shrinks
  what tasks share. The value is the sum over the unfoldings of the tensor `[n_1, ..., n_N]`, its task axis moved last:
    last    one, `[n_1 ... n_(N-1), T]`: how many tasks are linearly independent; its Gram matrix is only T x T.
    tucker  N, one for each axis k: `[n_k, rest]`.
    train   N - 1, one for each j < N: `[n_1 ... n_j, n_(j+1) ... n_N]`.

  Args:
    stacked: an array `[..., T]` of at least two axes, or a pytree of such arrays (their penalties add up).
    unfolding: static; `last`, `tucker` or `train`.
    task_axis: the axis of the tasks in every leaf; 0 for the `stacked` parameters of `models.soft_sharing`. Static.
    smoothing: scalar `mu >= 0`, see `nuclear_norm`; may be traced.
    method: see `nuclear_norm`; static.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: for an unknown unfolding, a leaf of fewer than two axes, or one without that axis.

  Reference: Yongxin Yang and Timothy M. Hospedales, "Trace norm regularised deep multi-task learning", 2016, arXiv
  1606.04038: LAF, Tucker and tensor-train. The sub-gradient differs from its published code, which is not of least norm
  on deficient unfoldings.
  """
  if unfolding not in _UNFOLDINGS:
    raise ValueError(f"stacked_trace_norm: unknown unfolding {unfolding!r}; choose one of {', '.join(_UNFOLDINGS)}")
  total = jnp.zeros((), jnp.float32)
  for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
    if jnp.ndim(leaf) < 2:
      raise ValueError(
        f"stacked_trace_norm: leaf {_path(path)!r} has shape {jnp.shape(leaf)}; tasks are stacked on one of at least "
        "two axes"
      )
    for matrix in _unfold(_tasks_last("stacked_trace_norm", jnp.asarray(leaf), task_axis), unfolding):
      total = total + nuclear_norm(not_before(matrix, total), smoothing=smoothing, method=method)
  return total


def _tasks_last(name: str, leaf: jax.Array, task_axis: int) -> jax.Array:
  if not -leaf.ndim <= task_axis < leaf.ndim:
    raise ValueError(f"{name}: a leaf of shape {leaf.shape} has no task axis {task_axis}")
  return jnp.moveaxis(leaf, task_axis, -1)


def _unfold(tensor: jax.Array, unfolding: str) -> list[jax.Array]:
  shape = tensor.shape
  if unfolding == "last":
    return [_rows_in_any_order(tensor)]
  if unfolding == "tucker":
    return [_rows_in_any_order(jnp.moveaxis(tensor, axis, -1)) for axis in range(tensor.ndim)]
  return [tensor.reshape(math.prod(shape[:axis]), -1) for axis in range(1, tensor.ndim)]


# Projections: callables `params -> pytree`.


def select(pattern: str) -> Projection:
  """Make the projection that keeps the leaves whose path matches a regular expression.

  Tasks of different architecture can be coupled on the part that they share.

  Args:
    pattern: searched (`re.search`) in the leaf's path, written like `encoder/layer1/kernel`.

  Returns:
    A callable from a pytree to the dict `{path: leaf}` of the matching leaves.

  Raises:
    ValueError: when it is called and nothing matches; the pattern and the paths are listed.
  """
  compiled = re.compile(pattern)

  def project(params: Any) -> dict[str, jax.Array]:
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kept = {path: leaf for path, leaf in leaves.items() if compiled.search(path)}
    if not kept:
      raise ValueError(f"select: no leaf path matches {pattern!r}; the paths are {', '.join(leaves) or '(none)'}")
    return kept

  return project


def left_multiply(matrix: jax.Array) -> Projection:
  """Make the projection that maps every matrix leaf `th` to `matrix @ th`.

  Layers of different input width can be coupled in a common space: `matrix` is `[common, width]`, one for each task.

  Args:
    matrix: `[rows, m]`.

  Returns:
    A callable that maps leaves of two or more axes, taken as matrices `[m, n]` (a kernel `[h, w, in, out]` as
    `[h w in, out]`), to `[rows, n]`; vectors and scalars pass unchanged (`select` leaves them out).

  Raises:
    ValueError: when `matrix` is not a matrix, or when the projection is called and a leaf's rows do not fit.
  """
  if jnp.ndim(matrix) != 2:
    raise ValueError(f"left_multiply: matrix must be [rows, m], got shape {jnp.shape(matrix)}")

  def project(params: Any) -> Any:
    def multiply(path, leaf):
      if jnp.ndim(leaf) < 2:
        return leaf
      leaf = _as_matrix(jnp.asarray(leaf))
      if leaf.shape[0] != jnp.shape(matrix)[1]:
        raise ValueError(
          f"left_multiply: leaf {_path(path)!r} has {leaf.shape[0]} rows as a matrix, but the projection is "
          f"{jnp.shape(matrix)}; it needs as many columns"
        )
      return jnp.matmul(matrix, leaf, precision=jax.lax.Precision.HIGHEST)

    return jax.tree_util.tree_map_with_path(multiply, params)

  return project


def compose(*projections: Projection) -> Projection:
  """Make the projection that applies several from left to right: `compose(select("kernel"), left_multiply(P))`.

  Args:
    projections: callables `params -> pytree`; none at all is the identity.

  Returns:
    A callable `params -> pytree`.
  """
  return lambda params: functools.reduce(lambda projected, project: project(projected), projections, params)


def _path(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _as_matrix(leaf: jax.Array) -> jax.Array:
  return leaf.reshape(-1, leaf.shape[-1] if leaf.ndim > 1 else 1)


def _rows_in_any_order(leaf: jax.Array) -> jax.Array:
  """`_as_matrix` for what does not depend on the order of the rows: the largest axis leads them.

  Merged axes keep the sharding of the first of them alone, and the largest is the one that is worth sharding.
  """
  if leaf.ndim > 2:
    leaf = jnp.moveaxis(leaf, max(range(leaf.ndim - 1), key=lambda axis: leaf.shape[axis]), 0)
  return _as_matrix(leaf)


def _task_leaves(task_params: Sequence[Any], projections: Projection | Sequence[Projection] | None):
  """Yields for each leaf the list of its T versions, in float32 or wider."""
  if isinstance(task_params, Mapping):
    raise ValueError(
      f"coupling needs a sequence of tasks' parameters, got a mapping of {list(task_params)}: its values?"
    )
  tasks = list(task_params)
  if len(tasks) < 2:
    raise ValueError(f"coupling needs a sequence of at least 2 tasks' parameters, got {len(tasks)}")
  if projections is not None:
    projections = [projections] * len(tasks) if callable(projections) else list(projections)
    if len(projections) != len(tasks):
      raise ValueError(f"projections: {len(projections)} for {len(tasks)} tasks; give one for each, or one callable")
    tasks = [project(params) for project, params in zip(projections, tasks, strict=True)]
  flat = [{_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(task)} for task in tasks]
  for task in range(1, len(tasks)):
    _check_alike(flat[0], flat[task], task)
  for path in flat[0]:
    versions = [jnp.asarray(leaves[path]) for leaves in flat]
    dtype = jnp.promote_types(jnp.result_type(*versions), jnp.float32)
    yield [version.astype(dtype) for version in versions]


def _check_alike(first: dict[str, Any], other: dict[str, Any], task: int) -> None:
  if differing := sorted(first.keys() ^ other.keys()):
    where = "0" if differing[0] in first else str(task)
    raise ValueError(
      f"coupling: the projected parameters of tasks 0 and {task} differ in structure: leaf {differing[0]!r} is only in "
      f"task {where} ({len(differing)} such leaves); couple a common part with `select`"
    )
  for path, leaf in first.items():
    if jnp.shape(leaf) != jnp.shape(other[path]):
      raise ValueError(
        f"coupling: leaf {path!r} has shape {jnp.shape(leaf)} in task 0 and {jnp.shape(other[path])} in "
        f"task {task} after projection; map them to a common shape with one projection for each task (`left_multiply`)"
      )


# The proximal step.


class ProximalTraceNormState(NamedTuple):
  """Number of steps taken, for a scheduled threshold."""

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # Optax's name for it


def proximal_trace_norm(
  threshold: float | jax.Array | Callable[[jax.Array], Any], *, task_axis: int = -1
) -> optax.GradientTransformation:
  """Make the Optax transformation that ends every step with the proximal operator of the trace norm.

  A sub-gradient of the penalty only hovers around low rank; the proximal step reaches it: singular values below the
  threshold become zero (to rounding), those above lose it. Put it last, after the learning rate:

      optax.chain(optax.sgd(rate), proximal_trace_norm(rate * weight))
      optax.masked(proximal_trace_norm(rate * weight), mask)          to leave leaves out

  Every leaf is taken as the matrix `[all other axes, task_axis]`. For the kernel of a layer, with the last axis, this
  makes the layer low-rank; for a leaf stacked over tasks on that axis it draws the tasks into a low-dimensional span
  and is the proximal form of `stacked_trace_norm`; for a vector it shrinks the L2 norm. `models.soft_sharing` stacks
  tasks first: `task_axis=0`, and a mask that leaves its heads out.

  Its update is `prox(params + updates) - params`, so that `optax.apply_updates` lands on the proximal point. With plain
  gradient steps of size `rate` this is proximal gradient descent on `loss + weight ||.||_*`, and `threshold` is
  `rate * weight`; after Adam, whose steps are scaled, it is a heuristic of the same effect (as decoupled weight decay
  is).

  Args:
    threshold: at least 0, in the units of the parameters, or a schedule `count -> threshold`.
    task_axis: the axis that is the columns of the matrix; static. A scalar is a matrix of one entry.

  Returns:
    An `optax.GradientTransformation` with state `ProximalTraceNormState(count)`; `update` needs `params`.

  Raises:
    ValueError: for a concrete negative threshold, or by `update` without `params` or with a leaf without that axis.

  Reference: Neal Parikh and Stephen Boyd, "Proximal algorithms", Foundations and Trends in Optimization 2014; Jian-Feng
  Cai, Emmanuel J. Candès and Zuowei Shen, "A singular value thresholding algorithm for matrix completion", 2008, arXiv
  0810.3286. The pairwise penalty of `trace_norm_coupling` has no closed proximal form for more than two tasks.
  """
  if isinstance(threshold, int | float) and not threshold >= 0:
    raise ValueError(f"proximal_trace_norm: threshold must be at least 0, got {threshold}")

  def init(params):
    del params
    return ProximalTraceNormState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError("proximal_trace_norm: update needs the parameters; call update(updates, state, params)")
    tau = threshold(state.count) if callable(threshold) else threshold

    def step(update, param):
      if update is None:
        return update
      wide = jnp.promote_types(jnp.result_type(update, param), jnp.float32)
      moved = jnp.asarray(param, wide) + jnp.asarray(update, wide)
      if moved.ndim < 2:
        shrunk = singular_value_threshold(_as_matrix(moved), tau).reshape(moved.shape)
      else:
        turned = _tasks_last("proximal_trace_norm", moved, task_axis)
        shrunk = singular_value_threshold(_as_matrix(turned), tau).reshape(turned.shape)
        shrunk = jnp.moveaxis(shrunk, -1, task_axis)
      return (shrunk - jnp.asarray(param, wide)).astype(jnp.result_type(update))

    updates = jax.tree.map(step, updates, params, is_leaf=lambda leaf: leaf is None)
    return updates, ProximalTraceNormState(jnp.asarray(optax.safe_increment(state.count)))

  return optax.GradientTransformation(init, update)
