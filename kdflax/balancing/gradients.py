"""Per-task gradients, their Gramian and their combination, leaf by leaf.

Gradients of T tasks are one pytree like the parameters with a leading T axis on every leaf. No leaf is flattened into
or concatenated with another, so every leaf keeps its sharding and its dtype.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kdflax.balancing._problem import check_gramian, check_present, normalise

PyTree = Any


def stack_losses(losses: PyTree, name: str = "losses") -> jax.Array:
  """Return losses (or what `name` says) as one array `[T]`: an array `[T]` as it is, a dict of scalars sorted by name.

  The order is that of `jax.tree.leaves`, so it does not depend on whether the dict went through `jax.jit`, which sorts.
  """
  leaves = jax.tree.leaves(losses)
  if len(leaves) == 1 and leaves[0] is losses:
    if jnp.ndim(losses) != 1 or not losses.shape[0]:
      raise ValueError(f"{name} must be an array [T] or a pytree of scalars; got an array of shape {jnp.shape(losses)}")
    return losses
  shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(losses)}
  if not leaves or any(shapes.values()):
    raise ValueError(f"{name} must be an array [T] or a pytree of scalars; got a pytree with shapes {shapes}")
  return jnp.stack(jax.tree.leaves(losses))


def losses_array(losses: jax.Array, name: str) -> jax.Array:
  """Return losses as an array in float32 or wider, without a gradient; a dict by name raises ValueError."""
  if isinstance(losses, Mapping):
    raise ValueError(
      f"{name}: losses must be one array [T]; got a {type(losses).__name__}; `task_gradients` returns that array, and "
      "jnp.stack(jax.tree.leaves(losses)) makes it from losses by name"
    )
  losses = lax.stop_gradient(jnp.asarray(losses))
  return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))


def task_gradients(
  losses_fn: Callable[..., Any], params: PyTree, *, has_aux: bool = False, batch_size: int | None = None
) -> Any:
  """Return the losses of all tasks and the gradient of each.

  One forward pass and one pullback for each task: by default all T at once (a vmapped pullback, memory for T backward
  passes), with `batch_size` that many at a time (`jax.lax.map`; 1 has the memory of a single backward pass).

  Take the gradients over the shared parameters only: what belongs to one task has a zero gradient for the others and
  costs T times the memory.

  Args:
    losses_fn: `params -> losses`, an array `[T]` or a pytree of T scalars (a dict by name), taken in the order of
      `jax.tree.leaves`: a dict is sorted by name. With `has_aux`, `params -> (losses, aux)`.
    params: pytree of floating-point arrays.
    has_aux: whether `losses_fn` returns anything beside the losses.
    batch_size: number of pullbacks at a time; all when None. Static.

  Returns:
    `(losses, gradients)`, or `(losses, gradients, aux)`: losses `[T]`, gradients like `params` with a leading T axis.

  Raises:
    ValueError: losses are neither `[T]` nor scalars, a leaf of `params` is not floating point, or `batch_size` < 1.

  Examples:
    >>> losses, gradients = task_gradients(lambda w: jnp.stack([w.sum(), (w**2).sum()]), jnp.array([1.0, 2.0]))
    >>> print(gradients)
    [[1. 1.]
     [2. 4.]]
  """
  if batch_size is not None and batch_size < 1:
    raise ValueError(f"batch_size must be at least 1; got {batch_size}")
  losses, pullback, aux = _losses_and_pullback(losses_fn, params, has_aux)
  (gradients,) = pull_back(pullback, jnp.eye(losses.shape[0], dtype=losses.dtype), batch_size)
  return (losses, gradients, aux) if has_aux else (losses, gradients)


def task_gramian(
  losses_fn: Callable[..., Any], params: PyTree, *, has_aux: bool = False
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], PyTree]] | tuple[Any, ...]:
  """Return the losses of all tasks, the Gramian of their gradients, and the way back for its weights.

  For methods that weigh the tasks by their Gramian, without the memory of T gradients: the gradients of a layer end in
  their inner products as soon as the backward pass has left it, and one more pass back gives the weighted sum:
  `losses, products, pullback = task_gramian(f, params); gradient = pullback(mgda(products))`. Layers that run in a
  `lax.scan` give their gradients together at its end, so there it saves nothing.

  Args:
    losses_fn: as in `task_gradients`.
    params: pytree of floating-point arrays.
    has_aux: whether `losses_fn` returns anything beside the losses.

  Returns:
    `(losses, gramian, pullback)`, or `(losses, gramian, pullback, aux)`: losses `[T]`, gramian `[T, T]`, and `pullback`
    from weights `[T]` to a pytree like `params`, the gradient of the weighted sum.

  Raises:
    ValueError: as `task_gradients`.

  Examples:
    >>> losses, products, pullback = task_gramian(lambda w: jnp.stack([w.sum(), (w**2).sum()]), jnp.array([1.0, 2.0]))
    >>> print(products, pullback(jnp.array([1.0, 0.5])))
    [[ 2.  6.]
     [ 6. 20.]] [2. 3.]
  """
  losses, pullback, aux = _losses_and_pullback(losses_fn, params, has_aux)
  products = gramian(pull_back(pullback, jnp.eye(losses.shape[0], dtype=losses.dtype), None))
  back = lambda weights: pullback(weights.astype(losses.dtype))[0]
  return (losses, products, back, aux) if has_aux else (losses, products, back)


def _losses_and_pullback(losses_fn: Callable[..., Any], params: PyTree, has_aux: bool) -> tuple[Any, Any, Any]:
  """Checks the params, and runs forward."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      name = jax.tree_util.keystr(path) or "params"
      raise ValueError(
        f"params must be floating point; {name} has dtype {jnp.result_type(leaf)}; close over the others"
      )

  def stacked(params: PyTree) -> tuple[jax.Array, Any]:
    out = losses_fn(params)
    losses, aux = out if has_aux else (out, None)
    return stack_losses(losses), aux

  return jax.vjp(stacked, params, has_aux=True)


def pull_back(pullback: Callable[[jax.Array], PyTree], basis: jax.Array, batch_size: int | None) -> PyTree:
  """Return the pullback of every row of a basis on a leading axis: all at once, or `batch_size` at a time."""
  if batch_size is None or batch_size >= len(basis):
    return jax.vmap(pullback)(basis)
  return lax.map(pullback, basis, batch_size=batch_size if batch_size > 1 else None)


def representation_gradients(
  losses_fn: Callable[[PyTree], Any], encoder: Callable[[PyTree], PyTree], params: PyTree
) -> tuple[jax.Array, PyTree, Callable[[PyTree], PyTree]]:
  """Return the losses, their gradients over the shared representation, and the way back to the parameters.

  Instead of T backward passes through the encoder it takes T through the heads and one through the encoder, for the
  combined gradient: `pullback(combine(gradients, weights))`. The Gramian is that of the representation's gradients (all
  examples, all units), which bounds the one over the parameters; the weights are not those of `task_gradients`.

  Args:
    losses_fn: `representation -> losses`, as in `task_gradients`.
    encoder: `params -> representation`, a pytree of floating-point arrays.
    params: pytree of the encoder's parameters.

  Returns:
    `(losses, gradients, pullback)`: losses `[T]`; gradients like the representation with a leading T axis; `pullback`
    maps one gradient over the representation (no T axis) to the gradient over `params`.

  Raises:
    ValueError: losses are neither `[T]` nor scalars, or the representation is not floating point.

  Reference: Ozan Sener and Vladlen Koltun, "Multi-Task Learning as Multi-Objective Optimization", 2018, arXiv
  1810.04650, section 3.3 (MGDA-UB). LibMTL sums over the batch before the inner products; here examples stay apart.
  """
  representation, pullback = jax.vjp(encoder, params)
  losses, gradients = task_gradients(losses_fn, representation)
  return losses, gradients, lambda combined: pullback(combined)[0]


def num_tasks(gradients: PyTree) -> int:
  """Return T, the leading axis of every leaf.

  Raises:
    ValueError: there is no leaf, a leaf has no leading axis, or two leaves differ in it.
  """
  sizes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    if not jnp.ndim(leaf):
      raise ValueError(f"gradients need a leading task axis; {jax.tree_util.keystr(path)} is a scalar")
    sizes.setdefault(leaf.shape[0], jax.tree_util.keystr(path))
  if len(sizes) != 1:
    raise ValueError(
      f"gradients must have one leading axis of T tasks on every leaf; got sizes {sizes or 'of no leaf'}"
    )
  return next(iter(sizes))


def all_finite(tree: PyTree) -> jax.Array:
  """Return whether every entry of every leaf is finite, a scalar bool."""
  finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
  return functools.reduce(jnp.logical_and, finite, jnp.bool_(True))


def finite_tasks(gradients: PyTree) -> jax.Array:
  """Return which tasks have a gradient that is finite everywhere, `[T]` bool."""
  finite = [jnp.isfinite(leaf).all(range(1, leaf.ndim)) for leaf in jax.tree.leaves(gradients)]
  return functools.reduce(jnp.logical_and, finite)


def select_tasks(gradients: PyTree, present: jax.Array) -> PyTree:
  """Return the gradients with 0 in place of absent tasks, before any product: 0 times NaN is NaN."""
  return jax.tree.map(lambda leaf: jnp.where(expand_to(present, leaf), leaf, 0), gradients)


def widen(leaf: jax.Array) -> jax.Array:
  """Return a leaf in float32 or wider."""
  return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def expand_to(values: jax.Array, leaf: jax.Array) -> jax.Array:
  """Return values `[T]` with as many axes as a leaf `[T, ...]`, so that they broadcast over a task's entries."""
  return jnp.expand_dims(values, range(1, leaf.ndim))


def _leaf_gramian(leaf: jax.Array) -> jax.Array:
  axes = tuple(range(1, leaf.ndim))
  dtype = jnp.promote_types(leaf.dtype, jnp.float32)
  return lax.dot_general(
    leaf, leaf, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype
  )


def gramian(gradients: PyTree, *, depth: int | None = None) -> PyTree:
  """Return the inner products of the tasks' gradients, `G_ij = <g_i, g_j>`.

  The sum over the leaves of one product each, in float32 or wider. On sharded leaves each device contracts its part and
  `[T, T]` numbers are added up; no leaf is gathered.

  Args:
    gradients: pytree with a leading T axis on every leaf.
    depth: None for one Gramian. Otherwise one for each subtree that hangs `depth` levels down (1: one for each entry
      of a dict of layers; a large number: one for each leaf), for weights by group, see `per_group`. Static.

  Returns:
    `[T, T]`, or with `depth` a pytree of them.

  Raises:
    ValueError: leaves do not share their leading axis, or depth is negative.

  Examples:
    >>> print(gramian(jnp.array([[1.0, 2.0], [2.0, -1.0]])))
    [[5. 0.]
     [0. 5.]]
  """
  tasks = num_tasks(gradients)
  if depth is None:
    parts = [_leaf_gramian(leaf) for leaf in jax.tree.leaves(gradients)]
    return sum(parts[1:], parts[0]) if parts else jnp.zeros((tasks, tasks))
  if depth < 0:
    raise ValueError(f"depth must be at least 0; got {depth}")
  if depth == 0 or jax.tree.structure(gradients).num_nodes == 1:
    return gramian(gradients)
  children, structure = jax.tree.flatten(gradients, is_leaf=lambda node: node is not gradients)
  return jax.tree.unflatten(structure, [gramian(child, depth=depth - 1) for child in children])


def per_group(weighting: Callable[..., jax.Array]) -> Callable[..., PyTree]:
  """Return a weighting of a pytree of Gramians: each group of parameters gets its own weights, in one vmapped call.

  `combine(gradients, per_group(upgrad)(gramian(gradients, depth=1)))` balances every layer by itself.

  Args:
    weighting: `gramian [T, T] -> weights [T]`, with other arguments the same for all groups.

  Returns:
    A function from a pytree of `[T, T]` (and keyword arguments such as `present`) to the same pytree of `[T]`; raises
    ValueError where there is no Gramian, or they differ in T.
  """

  def weigh(gramians: PyTree, **kwargs) -> PyTree:
    leaves, structure = jax.tree.flatten(gramians)
    if not leaves:
      raise ValueError(f"per_group: there is no Gramian in {gramians}; give a pytree of [T, T]")
    for leaf in leaves:
      check_gramian(leaf, num_tasks=leaves[0].shape[0])
    weights = jax.vmap(lambda one: weighting(one, **kwargs))(jnp.stack(leaves))
    return jax.tree.unflatten(structure, list(weights))

  return weigh


def combine(gradients: PyTree, weights: PyTree, *, present: jax.Array | None = None) -> PyTree:
  """Return the weighted sum of the tasks' gradients, `sum_i w_i g_i`, in the dtype of each leaf.

  Args:
    gradients: pytree with a leading T axis on every leaf.
    weights: `[T]`, or a pytree of `[T]` that is a prefix of `gradients` (weights by group, see `per_group`).
    present: which tasks take part, `[T]` bool; the gradient of an absent task is not looked at, so it may be NaN.

  Returns:
    A pytree like one task's gradient.

  Raises:
    ValueError: weights or `present` do not have one entry for each task.

  Examples:
    >>> print(combine(jnp.array([[1.0, 2.0], [2.0, -1.0]]), jnp.array([0.5, 0.5])))
    [1.5 0.5]
  """
  tasks = num_tasks(gradients)
  for leaf in jax.tree.leaves(weights):
    if jnp.shape(leaf) != (tasks,):
      raise ValueError(f"weights must have shape ({tasks},), one entry for each task; got {jnp.shape(leaf)}")
  if present is not None:
    check_present(present, tasks)

  def leaf_sum(weight, leaf):
    wide = widen(leaf)
    weight = weight.astype(wide.dtype)
    if present is not None:
      weight, wide = jnp.where(present, weight, 0), select_tasks(wide, present)
    total = lax.dot_general(weight, wide, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return total.astype(leaf.dtype)

  return jax.tree.map(
    lambda weight, part: jax.tree.map(lambda leaf: leaf_sum(jnp.asarray(weight), leaf), part), weights, gradients
  )


def gradient_cosines(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
  """Return the cosines between the tasks' gradients.

  0 with a zero gradient or an absent task, with itself included.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    Cosines `[T, T]`, for logs.

  Raises:
    ValueError: the Gramian is not square, or `present` is not `[T]` bool.
  """
  p = normalise(gramian, present)
  return jnp.where(p.valid[:, None] & p.valid, p.cosines, 0)


def conflict_count(gramian: jax.Array, *, present: jax.Array | None = None) -> jax.Array:
  """Return the number of unordered pairs of tasks whose gradients have a negative inner product.

  Args:
    gramian: inner products of the task gradients, `[T, T]`.
    present: which tasks take part, `[T]` bool; all when None.

  Returns:
    A scalar, int32, between 0 and T (T - 1) / 2.

  Raises:
    ValueError: the Gramian is not square, or `present` is not `[T]` bool.
  """
  return jnp.triu(gradient_cosines(gramian, present=present) < 0, 1).sum(dtype=jnp.int32)
