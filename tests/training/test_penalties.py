"""Penalties of the params: their place beside the terms, the balancer and the metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import balancing, models, training
from kdflax.coupling import l2_coupling
from kdflax.objectives import Term

MODEL = {"net": models.soft_sharing(models.mlp((3,), None), {"a": models.task_head(), "b": models.task_head()})}
BATCH = {"image": np.ones((4, 2), np.float32), "label": {"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}}
TERMS = {
  task: Term(optax.squared_error, {"predictions": f"net.logits.{task}", "targets": f"batch.label.{task}"})
  for task in ("a", "b")
}


def coupling(params):
  return l2_coupling(models.unstack(params["net"]["stacked"]))


def update(**settings):
  """Returns what one step of gradient descent at rate 1 subtracts, and the metrics."""
  learner = training.make_learner(MODEL, TERMS, optax.sgd(1.0), **settings)
  state = learner.init(jax.random.key(0), BATCH)
  after, metrics = jax.jit(learner.step)(state, BATCH)
  return state.params, jax.tree.map(jnp.subtract, state.params, after.params), metrics


@pytest.mark.parametrize("balancer", [None, balancing.fixed(0.25), balancing.from_weighting(balancing.mgda)])
def test_the_gradient_of_a_penalty_is_added_whatever_balances_the_rows(balancer):
  weight = lambda step: 0.5 + step  # a schedule, at step 0
  penalties = {"coupling": training.Penalty(coupling, weight)}
  params, plain, metrics = update(balancer=balancer)
  _, penalised, more = update(balancer=balancer, penalties=penalties)
  expected = jax.tree.map(lambda a, b: a + 0.5 * b, plain, jax.grad(coupling)(params))
  for a, b in zip(jax.tree.leaves(penalised), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert set(more) - set(metrics) == {"coupling"}
  np.testing.assert_allclose(more["coupling"][0], coupling(params), rtol=1e-5)


def test_bad_penalties_are_named():
  with pytest.raises(ValueError, match=r"share the names \['a'\]"):
    training.make_learner(MODEL, TERMS, optax.sgd(1.0), penalties={"a": training.Penalty(coupling)})
  with pytest.raises(ValueError, match="'c' must be at least 0; got -1"):
    training.make_learner(MODEL, TERMS, optax.sgd(1.0), penalties={"c": training.Penalty(coupling, -1)})
  vector = training.Penalty(lambda params: jnp.stack([coupling(params)] * 2))
  with pytest.raises(ValueError, match=r"'c' must return a scalar, it has shape \(2,\)"):
    training.make_learner(MODEL, TERMS, optax.sgd(1.0), penalties={"c": vector}).init(jax.random.key(0), BATCH)


@pytest.mark.parametrize("weight", [0, jnp.zeros(()), lambda step: 0.0 * step], ids=["number", "array", "schedule"])
def test_a_penalty_of_weight_zero_is_zero_whatever_it_multiplies(weight):
  """Neither 0 times inf nor 0 times the derivative of a root at 0."""
  root = lambda params: jnp.sqrt(jnp.square(0 * params["net"]["task"]["a"]["head"]["linear"]["kernel"]).sum())
  penalties = {
    "infinite": training.Penalty(lambda params: jnp.inf * coupling(params), weight),
    "root": training.Penalty(root, weight),
  }
  _, plain, _ = update()
  _, penalised, metrics = update(penalties=penalties)
  jax.tree.map(np.testing.assert_array_equal, penalised, plain)
  assert metrics["root"] == (0, 1)
