"""Forward and back through an objective: with the whole batch at once, or with one part of it after another.

In parts, sums and counts are added before anything is divided, so that every mean over examples or tokens, its gradient
and what a balancer makes of it are those of the large batch. Losses that compare examples need to see them all: then
what models say of each part is kept, and the Terms are evaluated on all of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

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


class Say(Protocol):
  """`(params, states of the models, batch, key) -> (what Terms read of each model, next states)`."""

  def __call__(
    self, params: PyTree, states: PyTree, batch: PyTree, key: jax.Array, /
  ) -> tuple[dict[str, PyTree], PyTree]: ...


class Judge(Protocol):
  """`(params, what models say, batch) -> (weighted mean of each Term, metrics)`."""

  def __call__(self, params: PyTree, said: dict[str, PyTree], batch: PyTree, /) -> tuple[Values, Metrics]: ...


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
  work = _Work(run, rows, params, states, _split(batch, key, parts))
  moved, seen = _forward(work)
  counts = {name: count.sum() for name, (_, count) in seen.metrics.items()}
  losses, metrics = _added_up(work, seen, counts)
  present = rows.present(metrics)
  if balanced:
    return Passes(losses, lambda weights: _back(work, counts, weights)[0], present, moved, metrics)
  gradient, moved, seen = _back(work, counts, present.astype(losses.dtype))
  losses, metrics = _added_up(work, seen, counts)
  return Passes(losses, lambda weights: gradient, present, moved, metrics)


def pass_cached(
  say: Say,
  judge: Judge,
  rows: Rows,
  params: Gradient,
  states: PyTree,
  batch: PyTree,
  key: jax.Array,
  *,
  parts: int,
) -> Passes:
  """Goes through a batch in equal parts and evaluates the Terms on what models said of all of it.

  The first pass keeps what Terms read, `lax.scan` part by part; then the Terms say what they make of the whole and how
  it moves with each output; the second pass takes that back through the models, part by part. So the losses and their
  gradients are those of the large batch, whatever they compare.

  Args:
    say: the models.
    judge: the Terms.
    rows: what a balancer sees of the Terms.
    params: (shared, own).
    states: of the models.
    batch: the large batch.
    key: each part gets one of its own, the same in both passes.
    parts: how many.

  Reference: Luyu Gao, Yunyi Zhang, Jiawei Han and Jamie Callan, "Scaling Deep Contrastive Learning Batch Size under
  Memory Limited Setup", 2021, arXiv 2101.06983. Theirs keeps embeddings; here whatever the Terms read.
  """
  work = _split(batch, key, parts)
  size = len(jax.tree.leaves(work[0])[0][0])

  def forward(states: PyTree, part: tuple[PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
    said, moved = say(merge(*params), states, *part)
    return moved, said

  def objective(shared: PyTree, own: PyTree, numbers: PyTree) -> tuple[jax.Array, Metrics]:
    values, metrics = judge(merge(shared, own), _joined(merge(numbers, others), size), batch)
    return rows.losses(values), metrics

  def pull(weights: jax.Array) -> Gradient:
    *direct, slopes = pullback(weights)

    def back(carry: tuple[PyTree, Gradient], part: Any) -> tuple[tuple[PyTree, Gradient], None]:
      (states, total), (slopes, *part) = carry, part

      def numbers_said(shared: PyTree, own: PyTree) -> tuple[PyTree, PyTree]:
        said, moved = say(merge(shared, own), states, *part)
        return _numbers(said)[0], moved

      _, pull_part, moved = jax.vjp(numbers_said, *params, has_aux=True)
      return (moved, jax.tree.map(_add_wide, total, pull_part(slopes))), None

    (_, total), _ = lax.scan(back, (states, jax.tree.map(_wide_zeros, params)), (slopes, *work))
    return _narrowed(jax.tree.map(_add_wide, total, tuple(direct)), params)

  moved, said = lax.scan(forward, states, work)
  numbers, others = _numbers(said)
  losses, pullback, metrics = jax.vjp(objective, *params, numbers, has_aux=True)
  return Passes(losses, pull, rows.present(metrics), moved, metrics)


def _numbers(said: PyTree) -> tuple[PyTree, PyTree]:
  """What has a gradient, and the rest: masks, indices; each with None for the other."""
  is_number = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
  return (
    jax.tree.map(lambda leaf: leaf if is_number(leaf) else None, said),
    jax.tree.map(lambda leaf: None if is_number(leaf) else leaf, said),
  )


def _joined(said: PyTree, size: int) -> PyTree:
  """What was said of parts `[parts, size, ...]` as of the whole batch; what is not of examples, its mean."""

  def join(leaf: jax.Array) -> jax.Array:
    if leaf.ndim > 1 and leaf.shape[1] == size:
      return leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])
    return leaf.mean(0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[0]

  return jax.tree.map(join, said)


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
    return (moved, jax.tree.map(_add_wide, total, pullback(weights))), seen

  (moved, total), seen = lax.scan(step, (work.states, jax.tree.map(_wide_zeros, work.params)), work.parts)
  return _narrowed(total, work.params), moved, seen


def _wide_zeros(leaf: jax.Array) -> jax.Array:
  """What gradients of parts are added to: in half precision a small one would be lost."""
  return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))


def _add_wide(total: jax.Array, leaf: jax.Array) -> jax.Array:
  return total + leaf.astype(total.dtype)


def _narrowed(total: Gradient, params: Gradient) -> Gradient:
  """A sum over all parts in the dtypes of the params."""
  return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), total, params)


def _added_up(work: _Work, seen: _Seen, counts: Values) -> tuple[jax.Array, Metrics]:
  """The losses of the rows `[T]` and the metrics of the whole batch."""
  whole = {name: parts.sum() for name, parts in _of_whole(seen.values, seen.metrics, counts).items()}
  return work.rows.losses(whole), jax.tree.map(lambda leaf: leaf.sum(0), seen.metrics)


def _of_whole(values: Values, metrics: Metrics, counts: Values) -> dict[str, jax.Array]:
  """What the means over a part add to the means over all parts."""
  return {name: mean * (metrics[name][1] / jnp.maximum(counts[name], 1)) for name, mean in values.items()}


def _split(batch: PyTree, key: jax.Array, parts: int) -> tuple[PyTree, jax.Array]:
  """The parts of a batch and a key for each, on a leading axis."""
  return split_batch(batch, parts), jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(parts))


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
