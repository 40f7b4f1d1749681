"""PCD against its programme, solved in float64 by trying every set of active promises; UW-SO against its formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import balancing
from tests.balancing.cases import assert_close, random


def nearest(rows, tau):
  """The vector nearest to the first row with `row_j . d >= tau_j |row_j|^2` for the others; None if there is none."""
  first, others = rows[0], rows[1:]
  asked = tau * (others**2).sum(1)
  best = None
  for size in range(len(others) + 1):
    for active in map(list, itertools.combinations(range(len(others)), size)):
      held = others[active]
      factors = np.linalg.lstsq(held @ held.T, asked[active] - held @ first, rcond=None)[0]
      d = first + factors @ held
      if (others @ d >= asked - 1e-9).all() and (
        best is None or np.sum((d - first) ** 2) < np.sum((best - first) ** 2)
      ):
        best = d
  return best


def directions(steps, tau, beta, epsilon):
  """Step by step, by the formula; `steps [steps, T, P]`."""
  squares, result = 0, []
  for step, gradients in enumerate(steps, start=1):
    squares = beta * squares + (1 - beta) * (gradients**2).sum(1)
    rows = gradients / np.sqrt(squares / (1 - beta**step) + epsilon)[:, None]
    d = nearest(rows, tau)
    length = np.linalg.norm(gradients[0])
    result.append(gradients[0] if d is None else d * length / np.linalg.norm(d))
  return np.stack(result)


def walk(balancer, steps, **options):
  update, state, result = jax.jit(balancer.update), balancer.init(steps.shape[1]), []
  for gradients in steps:
    gradients = jnp.asarray(gradients)
    weights, state = update(jnp.ones(len(gradients)), state, gramian=balancing.gramian(gradients), **options)
    result.append(balancing.combine(gradients, weights, present=options.get("present")))
  return np.stack(result)


@pytest.mark.parametrize("tau", [0.02, np.array([0.1, 0.9, 0.5])], ids=["a number", "one each"])
def test_pcd_solves_its_programme(tau):
  scales = np.array([1.0, 30.0, 0.01, 1.0])[:, None]  # the promises do not depend on the lengths
  steps = np.stack([random(4, 6, seed) * scales for seed in range(4)])
  with jax.enable_x64(True):
    got = walk(balancing.pcd(tau=tau, beta=0.9, epsilon=1e-3), steps)
  assert_close(got, directions(steps, np.broadcast_to(tau, 3), 0.9, 1e-3), 1e-9)


def test_pcd_follows_the_first_task_where_the_promises_cannot_all_be_kept():
  first = random(3, 5)[:1]
  steps = np.stack([np.concatenate([first, [other, -other]]) for other in random(2, 5, 1)])
  assert_close(walk(balancing.pcd(tau=0.2), steps), np.stack([first[0]] * 2), 1e-6)


def test_pcd_of_equal_gradients_is_that_gradient_and_of_a_zero_first_one_is_zero():
  gradients = np.repeat(random(1, 5), 3, axis=0)[None]
  assert_close(walk(balancing.pcd(tau=0.5), gradients), gradients[:, 0], 1e-6)
  gradients = gradients * np.array([0.0, 1, 1])[:, None]
  np.testing.assert_array_equal(walk(balancing.pcd(), gradients), 0)


def test_pcd_without_the_first_task_does_nothing_and_alone_is_it():
  gradients = random(3, 5)[None]
  np.testing.assert_array_equal(walk(balancing.pcd(), gradients, present=jnp.array([False, True, True])), 0)
  assert_close(walk(balancing.pcd(), gradients[:, :1]), gradients[:, 0], 1e-6)


def test_pcd_names_what_is_wrong():
  with pytest.raises(ValueError, match=r"beta, the share of a running mean that stays, must be in \[0, 1\); got 1.0"):
    balancing.pcd(beta=1.0)
  with pytest.raises(ValueError, match=r"pcd: tau must be a number or have shape \(2,\).*got \(3,\)"):
    balancing.pcd(tau=jnp.ones(3)).init(3)


def test_uw_so_is_a_softmax_of_inverse_losses():
  losses = np.array([0.5, 2.0, 4.0])
  powers = np.exp(1 / (losses * 3.0))
  with jax.enable_x64(True):
    got = balancing.uw_so(jnp.asarray(losses), 3.0)
    assert_close(got, powers / powers.sum(), 1e-9)
    alone = balancing.uw_so(jnp.asarray(losses).at[1].set(jnp.nan), 3.0, present=jnp.array([True, False, True]))
  assert_close(alone, np.array([powers[0], 0, powers[2]]) / (powers[0] + powers[2]), 1e-9)
  np.testing.assert_array_equal(balancing.uw_so(jnp.array([1.0, 0.0]), 1.0), [0, 1])
  assert not np.any(jax.grad(lambda x: balancing.uw_so(x, 1.0)[0])(jnp.ones(2)))
  with pytest.raises(ValueError, match=r"uw_so: losses must have shape \(T,\); got \(2, 2\)"):
    balancing.uw_so(jnp.ones((2, 2)), 1.0)
