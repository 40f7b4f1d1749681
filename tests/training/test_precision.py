"""Models compute in bfloat16, and all that is kept is float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import losses, models, training
from kdflax.objectives import Term
from kdflax.training import computing_in

NETWORK = {
  "teacher": models.mlp((8,), 3),
  "student": models.mlp((6,), 3),
  "mean": models.mlp((6,), 3),
  "temperature": models.temperature(),
}
TERMS = {
  "hard": Term(optax.softmax_cross_entropy_with_integer_labels, {"logits": "student.logits", "labels": "batch.label"}),
  "soft": Term(
    losses.kl_soft_targets,
    {
      "student_logits": "student.logits",
      "teacher_logits": "teacher.logits",
      "temperature": "temperature.temperature",
    },
  ),
  "mean": Term(losses.hint, {"student": "student.embedding", "teacher": "mean.embedding"}),
}


def _batch():
  random = np.random.default_rng(0)
  return {"image": random.normal(size=(12, 5)).astype(np.float32), "label": random.integers(3, size=12)}


def _make(**options):
  averages = {"mean": training.Average("student", 0.999)}
  return training.make_learner(NETWORK, TERMS, optax.sgd(0.1), averages=averages, **options)


def test_a_step_in_bfloat16_is_that_in_float32_within_its_digits():
  frozen = {"teacher": NETWORK["teacher"].init(jax.random.key(7), _batch())}
  state = _make().init(jax.random.key(0), _batch(), frozen)
  (exact, sums), (rough, rough_sums) = (
    jax.jit(_make(compute_dtype=dtype).step)(state, _batch(), frozen) for dtype in (None, jnp.bfloat16)
  )
  kinds = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
  assert kinds(rough) == kinds(exact) and kinds(rough_sums) == kinds(sums)
  moved = lambda end: jax.tree.map(lambda a, b: np.asarray(a - b), end.params, state.params)
  for a, b in zip(jax.tree.leaves(moved(rough)), jax.tree.leaves(moved(exact)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())
  assert training.digest(rough.params) != training.digest(exact.params)
  kernels = [end.averages["mean"]["hidden"]["0"]["kernel"] for end in (state, rough)]
  assert (kernels[0] != kernels[1]).mean() > 0.9  # a thousandth of a step moves it: it is kept in float32


def _looking(seen):
  """A model that notes the types it is given; its state is a running mean."""

  def apply(params, state, inputs, *, train, key):
    seen.append(jax.tree.map(lambda leaf: jnp.result_type(leaf), (params, state, inputs)))
    return {"x": params["scale"] * inputs["image"]}, {"mean": (0.9 * state["mean"] + 0.1).astype(jnp.bfloat16)}

  return models.Model(lambda key, batch: ({"scale": jnp.ones(5)}, {"mean": jnp.zeros(2)}), apply)


def test_params_and_inputs_are_cast_and_states_are_not():
  seen, batch = [], _batch()
  model = computing_in(_looking(seen), jnp.bfloat16)
  said, state = model.apply(*model.init(jax.random.key(0), batch), batch, train=True, key=None)
  params, before, inputs = seen[0]
  assert params["scale"] == inputs["image"] == jnp.bfloat16
  assert before["mean"] == state["mean"].dtype == said["x"].dtype == jnp.float32
  assert jnp.issubdtype(inputs["label"], jnp.integer)


def test_what_has_no_params_is_left_alone():
  apply = lambda params, state, inputs, *, train, key: ({"x": inputs}, {"memory": inputs})
  memory = computing_in(models.Model(lambda key, x: ({}, {"memory": x}), apply), jnp.bfloat16)
  third = jnp.full(4, 1 / 3)
  said, state = memory.apply({}, {"memory": third}, third, train=True, key=None)
  np.testing.assert_array_equal(said["x"], third)
  np.testing.assert_array_equal(state["memory"], third)


def test_integers_are_refused():
  with pytest.raises(ValueError, match=r"floating-point type, such as bfloat16; got int32"):
    _make(compute_dtype=jnp.int32)
