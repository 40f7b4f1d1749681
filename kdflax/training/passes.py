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
  split = jnp.arange(parts), split_batch(batch, parts)

  def forward(states: PyTree, numbered: tuple[jax.Array, PyTree]):
    index, part = numbered
    values, metrics, states = run(merge(*params), states, part, jax.random.fold_in(key, index))
    return states, (values, metrics)

  moved, seen = lax.scan(forward, states, split)
  counts = {name: count.sum() for name, (_, count) in seen[1].items()}

  def add_up(seen: tuple[Values, Metrics]) -> tuple[jax.Array, Metrics]:
    values, metrics = seen
    whole = {name: _of_whole(value, metrics[name][1], counts[name]).sum() for name, value in values.items()}
    return rows.losses(whole), jax.tree.map(lambda leaf: leaf.sum(0), metrics)

  def back(weights: jax.Array) -> tuple[Gradient, PyTree, tuple[Values, Metrics]]:
    def objective(shared, own, states, part, key):
      values, metrics, states = run(merge(shared, own), states, part, key)
      whole = {name: _of_whole(value, metrics[name][1], counts[name]) for name, value in values.items()}
      return rows.losses(whole), (states, (values, metrics))

    def add(carry: tuple[PyTree, Gradient], numbered: tuple[jax.Array, PyTree]):
      (states, total), (index, part) = carry, numbered
      of_part = lambda shared, own: objective(shared, own, states, part, jax.random.fold_in(key, index))
      _, pullback, (states, seen) = jax.vjp(of_part, *params, has_aux=True)
      total = jax.tree.map(lambda sum_, leaf: sum_ + leaf.astype(sum_.dtype), total, pullback(weights))
      return (states, total), seen

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), params)
    (moved, total), seen = lax.scan(add, (states, zeros), split)
    return jax.tree.map(lambda sum_, leaf: sum_.astype(leaf.dtype), total, params), moved, seen

  losses, metrics = add_up(seen)
  present = rows.present(metrics)
  if balanced:
    return Passes(losses, lambda weights: back(weights)[0], present, moved, metrics)
  gradient, moved, seen = back(present.astype(losses.dtype))
  losses, metrics = add_up(seen)
  return Passes(losses, lambda weights: gradient, present, moved, metrics)


def _of_whole(mean: jax.Array, count: jax.Array, total: jax.Array) -> jax.Array:
  """What the mean over a part adds to the mean over all parts."""
  return mean * (count / jnp.maximum(total, 1))


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
