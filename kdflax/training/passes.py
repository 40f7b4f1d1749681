"""Forward and back through an objective: with the whole batch at once, or with one part of it after another.

In parts, sums and counts are added before anything is divided, so that every mean over examples or tokens, its gradient
and what a balancer makes of it are those of the large batch.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kdflax.model import PyTree
from kdflax.numerics.trees import merge
from kdflax.objectives import Metrics

Values = Mapping[str, jax.Array]
Gradient = tuple[PyTree, PyTree]  # of the shared params and of the others


class Run(Protocol):
  """`(params, states of the models, batch, key) -> (weighted mean of each Term, metrics, next states)`."""

  def __call__(
    self, params: PyTree, states: PyTree, batch: PyTree, key: jax.Array, /
  ) -> tuple[Values, Metrics, PyTree]: ...


class Rows(NamedTuple):
  """What a balancer sees of the Terms."""

  losses: Callable[[Values], jax.Array]  # [T]
  present: Callable[[Metrics], jax.Array]  # [T] bool: which have examples


class Passes(NamedTuple):
  """What an objective says of a batch."""

  losses: jax.Array  # [T]
  pullback: Callable[[jax.Array], Gradient]  # of the weighted sum of the rows
  present: jax.Array  # [T] bool
  states: PyTree
  metrics: Metrics


def pass_whole(run: Run, rows: Rows, params: Gradient, states: PyTree, batch: PyTree, key: jax.Array) -> Passes:
  """Goes forward with the whole batch, and back whenever the pullback is called."""

  def objective(shared: PyTree, own: PyTree):
    values, metrics, moved = run(merge(shared, own), states, batch, key)
    return rows.losses(values), (metrics, moved)

  losses, pullback, (metrics, moved) = jax.vjp(objective, *params, has_aux=True)
  return Passes(losses, pullback, rows.present(metrics), moved, metrics)


def pass_in_parts(
  run: Run,
  rows: Rows,
  params: Gradient,
  states: PyTree,
  batch: PyTree,
  key: jax.Array,
  *,
  parts: int,
  balanced: bool,
) -> Passes:
  """Goes through a batch in equal parts, by `lax.scan`: memory is that of one part.

  What a mean is divided by is known only after all parts, so a pass forward comes first. With a balancer, it gives the
  losses that the weights are made of; without one, it is left with the counts, and the compiler drops the models from
  it unless a mask depends on them. States of models go from part to part.

  Args:
    run: the models and Terms.
    rows: what a balancer sees of the Terms.
    params: (shared, own).
    states: of the models.
    batch: the large batch.
    key: each part gets one of its own.
    parts: how many.
    balanced: whether the pullback is called with weights that depend on the losses.
  """
  keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(parts))
  work = _Work(run, rows, params, states, (split_batch(batch, parts), keys))
  moved, seen = _forward(work)
  counts = {name: count.sum() for name, (_, count) in seen.metrics.items()}
  losses, metrics = _added_up(work, seen, counts)
  present = rows.present(metrics)
  if balanced:
    return Passes(losses, lambda weights: _back(work, counts, weights)[0], present, moved, metrics)
  gradient, moved, seen = _back(work, counts, present.astype(losses.dtype))
  losses, metrics = _added_up(work, seen, counts)
  return Passes(losses, lambda weights: gradient, present, moved, metrics)


class _Work(NamedTuple):
  """What every pass through the parts has in common."""

  run: Run
  rows: Rows
  params: Gradient
  states: PyTree
  parts: tuple[PyTree, jax.Array]  # batches and keys, on a leading axis


class _Seen(NamedTuple):
  """What the parts say, on a leading axis."""

  values: Values
  metrics: Metrics


def _forward(work: _Work) -> tuple[PyTree, _Seen]:
  """Returns the states after all parts, and what each says."""

  def step(states: PyTree, part: tuple[PyTree, jax.Array]) -> tuple[PyTree, _Seen]:
    values, metrics, states = work.run(merge(*work.params), states, *part)
    return states, _Seen(values, metrics)

  return lax.scan(step, work.states, work.parts)


def _back(work: _Work, counts: Values, weights: jax.Array) -> tuple[Gradient, PyTree, _Seen]:
  """Returns the gradient of the weighted sum of the rows over all parts, and what `_forward` does."""

  def step(carry: tuple[PyTree, Gradient], part: tuple[PyTree, jax.Array]) -> tuple[tuple[PyTree, Gradient], _Seen]:
    states, total = carry

    def objective(shared: PyTree, own: PyTree):
      values, metrics, moved = work.run(merge(shared, own), states, *part)
      return work.rows.losses(_of_whole(values, metrics, counts)), (moved, _Seen(values, metrics))

    _, pullback, (moved, seen) = jax.vjp(objective, *work.params, has_aux=True)
    add = lambda total, leaf: total + leaf.astype(total.dtype)
    return (moved, jax.tree.map(add, total, pullback(weights))), seen

  wide = lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
  (moved, total), seen = lax.scan(step, (work.states, jax.tree.map(wide, work.params)), work.parts)
  return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), total, work.params), moved, seen


def _added_up(work: _Work, seen: _Seen, counts: Values) -> tuple[jax.Array, Metrics]:
  """The losses of the rows `[T]` and the metrics of the whole batch."""
  whole = {name: parts.sum() for name, parts in _of_whole(seen.values, seen.metrics, counts).items()}
  return work.rows.losses(whole), jax.tree.map(lambda leaf: leaf.sum(0), seen.metrics)


def _of_whole(values: Values, metrics: Metrics, counts: Values) -> dict[str, jax.Array]:
  """What the means over a part add to the means over all parts."""
  return {name: mean * (metrics[name][1] / jnp.maximum(counts[name], 1)) for name, mean in values.items()}


def split_batch(batch: PyTree, parts: int) -> PyTree:
  """Arrays `[batch, ...]` as `[parts, batch / parts, ...]`.

  Neighbours go to different parts: a batch that is spread over devices stays where it is.

  Raises:
    ValueError: if the arrays do not all lead with one number of examples, a multiple of the parts.
  """
  shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(batch)}
  if any(not shape or shape[0] % parts for shape in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
    raise ValueError(
      f"accumulate={parts} splits a batch by its first axis, which must be the same multiple of it in every array; got"
      f" {shapes}"
    )
  return jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, parts, *leaf.shape[1:])).swapaxes(0, 1), batch)
