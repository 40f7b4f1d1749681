"""What methods add to their loss, written again in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import losses, methods, models
from kdflax.objectives import stopped_arguments
from tests.methods.case import pair

RANDOM = np.random.default_rng(0)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_wkd_moves_the_wrong_classes_at_costs_from_the_teachers_head():
  term = methods.wkd_l(pair()).terms["wkd_l"]
  assert stopped_arguments(term) == {"teacher_logits", "teacher_head"}
  assert term.inputs["teacher_head"] == "params.teacher.head.kernel"
  student, teacher = RANDOM.normal(size=(2, 6, 4))
  labels, head = np.arange(6) % 4, RANDOM.normal(size=(5, 4))
  settings = {"temperature": 2.0, "regularization": 0.1, "iterations": 5}
  cost = 1 - np.exp(-1.5 * (1 - unit(head.T) @ unit(head.T).T))
  wrong = [np.flatnonzero(np.arange(4) != label) for label in labels]
  left = [np.stack([x[row, of] for row, of in enumerate(wrong)]) for x in (student, teacher)]
  with jax.enable_x64(True):
    values = term.loss(student, teacher, labels, head, sharpen=1.5, **settings)
    expected = losses.wkd_logits(*left, np.stack([cost[np.ix_(of, of)] for of in wrong]), **settings)
  np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_the_true_class_of_wkd_is_a_cross_entropy_with_what_the_teacher_gives_it():
  term = methods.wkd_l(pair()).terms["wkd_l/target"]
  student, teacher = RANDOM.normal(size=(2, 6, 4))
  labels = np.arange(6) % 4
  values = term.loss(student, teacher, labels, gamma=term.inputs["gamma"])
  p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (teacher, student))
  np.testing.assert_allclose(values, -(p * np.log(q))[np.arange(6), labels], rtol=1e-5)


def test_gram_anchoring_compares_cosines():
  term = methods.gram_anchoring(pair()).terms["gram_anchoring/stage2"]
  student, teacher = RANDOM.normal(size=(2, 3, 2, 2, 5))
  grams = [unit(x.reshape(3, 4, 5)) @ unit(x.reshape(3, 4, 5)).transpose(0, 2, 1) for x in (student, teacher)]
  np.testing.assert_allclose(term.loss(student, teacher), np.square(grams[0] - grams[1]).mean((1, 2)), rtol=1e-5)


def test_vkd_turns_the_student_and_compares_it_with_the_standardised_teacher():
  method = methods.vkd(pair())
  term, connector = method.terms["vkd"], method.models["vkd_connector"]
  student = RANDOM.normal(size=(3, 4)).astype(np.float32)
  params, state = connector.init(jax.random.key(0), student)
  turned = np.asarray(connector.apply(params, state, student, train=True)[0]["output"])
  width = turned.shape[1]
  assert width > 4  # so inner products stay, and with them every length and angle
  np.testing.assert_allclose(turned @ turned.T, student @ student.T, rtol=1e-5, atol=1e-5)
  teacher = 3 + 2 * RANDOM.normal(size=(3, width))
  standardised = (teacher - teacher.mean(1, keepdims=True)) / np.sqrt(teacher.var(1, keepdims=True) + 1e-5)
  error = np.abs(turned - standardised)
  expected = np.where(error < 1, error**2 / 2, error - 1 / 2).mean(1)
  np.testing.assert_allclose(term.loss(turned, teacher.astype(np.float32)), expected, rtol=1e-5)


def test_an_orthogonal_connector_to_fewer_features_has_orthonormal_columns():
  connector = models.orthogonal_connector("student.embedding", 2)
  params, state = connector.init(jax.random.key(1), np.zeros((1, 5), np.float32))
  kernel = connector.apply(params, state, np.eye(5, dtype=np.float32), train=True)[0]["output"]
  np.testing.assert_allclose(kernel.T @ kernel, np.eye(2), atol=1e-6)
  with pytest.raises(ValueError, match=r"orthogonal_connector\('x'\) takes \[batch, \.\.\., features\], got \(5,\)"):
    models.orthogonal_connector("x", 2).init(jax.random.key(0), np.zeros(5, np.float32))


def test_the_queue_of_seed_holds_the_last_rows_with_those_of_the_batch():
  model = methods.seed(pair(), queue=5).models["seed_queue"]
  batches = unit(RANDOM.normal(size=(4, 2, 6))).astype(np.float32)
  _, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 6), jnp.float32))
  start = np.asarray(state["rows"])
  np.testing.assert_allclose(np.linalg.norm(start, axis=1), 1, rtol=1e-6)
  for batch in batches[:3]:
    outputs, state = model.apply({}, state, batch, train=True)
    np.testing.assert_array_equal(outputs["keys"], state["rows"])
  last = [*batches[2][1:], *batches[0][1:], *batches[1], *batches[2][:1]]  # the sixth row took the place of the first
  np.testing.assert_array_equal(state["rows"], last)
  outputs, after = model.apply({}, state, batches[3], train=False)
  assert after is state and not np.array_equal(outputs["keys"], state["rows"])
  with pytest.raises(ValueError, match="a batch of 6 does not fit into a queue of 5; make it longer"):
    model.apply({}, state, np.zeros((6, 6), np.float32), train=True)


def test_the_queue_of_seed_is_that_of_all_devices():
  model = methods.seed(pair(), queue=5, axis_name="devices").models["seed_queue"]
  rows = unit(RANDOM.normal(size=(2, 2, 6))).astype(np.float32)
  _, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 6), jnp.float32))
  step = lambda x: model.apply({}, state, x, train=True)[0]["keys"]
  keys = jax.vmap(step, axis_name="devices")(rows)
  np.testing.assert_array_equal(keys[0], keys[1])
  np.testing.assert_array_equal(keys[0][:4], rows.reshape(4, 6))
