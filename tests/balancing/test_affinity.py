"""Task affinity against its definition, and groups against all that there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import balancing
from tests.balancing.cases import assert_close


def test_affinity_is_what_a_step_for_one_task_does_to_another():
  params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "b": jnp.ones(2)}
  inputs = jnp.linspace(0, 1, 12).reshape(4, 3)

  def losses_fn(params):
    out = jnp.tanh(inputs @ params["w"] + params["b"])
    return {"first": (out**2).mean(), "second": jnp.abs(out - 1).sum(), "third": jnp.zeros(())}

  found = jax.jit(lambda p: balancing.task_affinity(losses_fn, p, learning_rate=0.3))(params)
  names = sorted(losses_fn(params))
  expected = np.zeros((3, 3))
  for i, j in itertools.product(range(3), range(2)):
    gradient = jax.grad(lambda p, i=i: losses_fn(p)[names[i]])(params)
    moved = jax.tree.map(lambda leaf, g: leaf - 0.3 * g, params, gradient)
    expected[i, j] = 1 - losses_fn(moved)[names[j]] / losses_fn(params)[names[j]]
  assert_close(found, expected, 1e-5)
  assert found[0, 0] > 0


def best_by_trial(affinity, num_groups):
  """The largest sum over tasks of the best group that holds it."""
  tasks = range(len(affinity))
  groups = [g for size in range(1, len(affinity) + 1) for g in itertools.combinations(tasks, size)]

  def score(task, group):
    others = [affinity[other, task] for other in group if other != task]
    return sum(others) / len(others) if others else affinity[task, task]

  best = -np.inf
  for chosen in itertools.chain(*(itertools.combinations(groups, n) for n in range(1, num_groups + 1))):
    if set().union(*chosen) == set(tasks):
      best = max(best, sum(max(score(task, g) for g in chosen if task in g) for task in tasks))
  return best


def total(affinity, groups):
  score = lambda task, group: affinity[[other for other in group if other != task] or [task], task].mean()
  return sum(max(score(task, g) for g in groups if task in g) for task in range(len(affinity)))


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_the_best_there_are(num_groups, seed):
  affinity = np.random.default_rng(seed).normal(size=(4, 4))
  groups = balancing.group_tasks(affinity, num_groups)
  assert len(groups) <= num_groups
  assert set().union(*groups) == set(range(4))
  np.testing.assert_allclose(total(affinity, groups), best_by_trial(affinity, num_groups), rtol=1e-9)


def test_two_camps_are_told_apart():
  camp = np.array([0, 1, 0, 1, 1, 0, 1, 0])
  affinity = np.where(camp[:, None] == camp, 0.1, -0.1)
  groups = balancing.group_tasks(affinity, 2)
  assert all(len({*camp[list(group)]}) == 1 for group in groups)
  assert set().union(*groups) == set(range(8))


def test_mistakes():
  with pytest.raises(ValueError, match=r"affinity must be finite numbers \[T, T\]; got shape \(2, 3\)"):
    balancing.group_tasks(np.zeros((2, 3)), 1)
  with pytest.raises(ValueError, match="affinity must be finite"):
    balancing.group_tasks([[np.nan]], 1)
  with pytest.raises(ValueError, match="num_groups must be at least 1; got 0"):
    balancing.group_tasks(np.eye(2), 0)
