"""Which tasks help each other: measured on the losses, and groups of tasks that should share a network."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.balancing.gradients import stack_losses, task_gradients
from kdflax.model import PyTree


def task_affinity(losses_fn: Callable[[PyTree], Any], params: PyTree, *, learning_rate: jax.Array | float) -> jax.Array:
  """Return by how much a step for one task lowers the loss of another, as a share of that loss.

      Z_ij = 1 - L_j(params - learning_rate g_i) / L_j(params)

  Positive: task i helps task j; negative: it harms it. A single batch says little: average it over training, from a
  network that all tasks share. It costs T backward and T forward passes more than a step.

  Args:
    losses_fn: `params -> losses`, an array `[T]` or a pytree of T scalars, as in `task_gradients`.
    params: pytree of the shared parameters.
    learning_rate: of the step; that of training, or smaller.

  Returns:
    `[T, T]`, from the task of the row to that of the column; 0 towards a task whose loss is 0.

  Raises:
    ValueError: as `task_gradients`.

  Examples:
    >>> losses = lambda w: jnp.stack([w[0] ** 2, 4 - w[0]])
    >>> print(task_affinity(losses, jnp.array([2.0]), learning_rate=0.25))
    [[ 0.75     -0.5     ]
     [-0.265625  0.125   ]]

  Reference: Chris Fifty, Ehsan Amid, Zhe Zhao, Tianhe Yu, Rohan Anil and Chelsea Finn, "Efficiently Identifying Task
  Groupings for Multi-Task Learning", 2021, arXiv 2109.04617.
  """
  losses, gradients = task_gradients(losses_fn, params)
  moved = jax.tree.map(lambda leaf, g: (leaf - learning_rate * g).astype(leaf.dtype), params, gradients)
  after = jax.vmap(lambda params: stack_losses(losses_fn(params)))(moved)
  known = losses != 0
  return jnp.where(known, 1 - after / jnp.where(known, losses, 1), 0)


def group_tasks(affinity: Any, num_groups: int) -> list[tuple[int, ...]]:
  """Choose groups of tasks, one network for each, so that every task is served well by one of them.

  A task gets from a group with others the mean of their affinities to it; alone, its own. A task may be in several
  groups, helping there, and is served by the best. The sum over tasks is the largest there is, by branch and bound
  over all groups: a quarter of a second for eight tasks and three groups, ten times as long for each task more.

  Args:
    affinity: `[T, T]`, from the task of the row to that of the column: the mean of `task_affinity` over training.
    num_groups: how many networks there may be.

  Returns:
    At most `num_groups` groups, each the sorted numbers of its tasks; together they hold every task.

  Raises:
    ValueError: the affinities are not square or not finite, or `num_groups` is below 1.

  Examples:
    >>> group_tasks([[0.1, 0.4, -0.2], [0.3, 0.1, -0.1], [-0.3, -0.3, 0.1]], 2)
    [(0, 1), (2,)]

  Reference: Chris Fifty, Ehsan Amid, Zhe Zhao, Tianhe Yu, Rohan Anil and Chelsea Finn, "Efficiently Identifying Task
  Groupings for Multi-Task Learning", 2021, arXiv 2109.04617. Their code gives a task alone the score 1e-6 instead of
  its own affinity.
  """
  affinity = np.asarray(affinity, np.float64)
  if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1] or not np.isfinite(affinity).all():
    raise ValueError(f"affinity must be finite numbers [T, T]; got shape {affinity.shape}: {affinity}")
  if num_groups < 1:
    raise ValueError(f"num_groups must be at least 1; got {num_groups}")
  tasks = range(len(affinity))
  groups = [group for size in range(1, len(affinity) + 1) for group in itertools.combinations(tasks, size)]
  scores = np.stack([_served(affinity, group) for group in groups])
  order = np.argsort(-np.where(np.isfinite(scores), scores, 0).sum(1), kind="stable")  # good ones first: bounds bite
  groups, scores = [groups[place] for place in order], scores[order]
  # What each task can at best get from the groups that are still to come.
  ahead = np.maximum.accumulate(scores[::-1])[::-1]
  best: tuple[float, list[int]] = (-np.inf, [])

  def choose(start: int, chosen: list[int], served: np.ndarray) -> None:
    """Tries every group from `start` on beside those chosen."""
    nonlocal best
    totals = np.maximum(served, scores[start:]).sum(1)
    if totals.size and totals.max() > best[0]:
      best = (totals.max(), [*chosen, start + int(totals.argmax())])
    if len(chosen) + 1 == num_groups:
      return
    for place in range(start, len(groups)):
      if np.maximum(served, ahead[place]).sum() <= best[0]:
        return
      choose(place + 1, [*chosen, place], np.maximum(served, scores[place]))

  choose(0, [], np.full(len(affinity), -np.inf))
  return sorted(groups[place] for place in best[1])


def _served(affinity: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
  """What each task gets from a group, `[T]`; minus infinity outside of it."""
  scores = np.full(len(affinity), -np.inf)
  for task in group:
    others = [other for other in group if other != task] or [task]
    scores[task] = affinity[others, task].mean()
  return scores
