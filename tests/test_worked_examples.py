"""Three ways to use kdflax in a program of one's own; each test is an example to copy from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from kdflax import losses, models, training
from kdflax.objectives import Term


@pytest.fixture
def batch():
  random = np.random.default_rng(0)
  image = random.normal(size=(32, 6)).astype(np.float32)
  return {"image": image, "label": image[:, :3].argmax(1), "teacher": 4 * image[:, :3]}  # the teacher's logits


def test_losses_in_an_optax_loop_with_a_linen_model(batch):
  student = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(3)])
  params = student.init(jax.random.key(0), batch["image"])
  optimizer = optax.adam(0.03)
  opt_state = optimizer.init(params)

  def objective(params, batch):
    logits = student.apply(params, batch["image"])
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    soft = losses.kl_soft_targets(logits, batch["teacher"], temperature=4.0)
    return losses.masked_mean(0.1 * hard + 0.9 * soft)  # every loss gives one value per example

  @jax.jit
  def step(params, opt_state, batch):
    value, gradient = jax.value_and_grad(objective)(params, batch)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value

  for _ in range(60):
    params, opt_state, value = step(params, opt_state, batch)
  assert value < 0.2
  assert (student.apply(params, batch["image"]).argmax(-1) == batch["label"]).mean() > 0.9


def test_losses_in_an_optax_loop_with_an_nnx_model(batch):
  rngs = nnx.Rngs(0)
  student = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
  graph, params = nnx.split(student)  # from here on pure functions of arrays, as everywhere in JAX
  optimizer = optax.adam(0.03)
  opt_state = optimizer.init(params)

  def objective(params, batch):
    logits = nnx.merge(graph, params)(batch["image"])
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    soft = losses.kl_soft_targets(logits, batch["teacher"], temperature=4.0)
    return losses.masked_mean(0.1 * hard + 0.9 * soft)

  @jax.jit
  def step(params, opt_state, batch):
    value, gradient = jax.value_and_grad(objective)(params, batch)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value

  for _ in range(60):
    params, opt_state, value = step(params, opt_state, batch)
  assert value < 0.2
  nnx.update(student, params)
  assert (student(batch["image"]).argmax(-1) == batch["label"]).mean() > 0.9


def test_a_loss_of_your_own_is_a_term_like_any_other(batch):
  def margin(student_logits, teacher_logits, *, gap=1.0):
    """Asks the student's score of the teacher's choice to exceed its other scores by `gap`."""
    chosen = jax.nn.one_hot(teacher_logits.argmax(-1), student_logits.shape[-1])
    own = (student_logits * chosen).sum(-1)
    other = jnp.where(chosen == 1, -jnp.inf, student_logits).max(-1)
    return jax.nn.relu(gap + other - own)  # one value per example, [batch]

  terms = {
    "soft": Term(losses.kl_soft_targets, {"student_logits": "student.logits", "teacher_logits": "batch.teacher"}),
    "margin": Term(
      margin,
      {"student_logits": "student.logits", "teacher_logits": "batch.teacher", "gap": optax.linear_schedule(0, 1, 50)},
      weight=0.5,
    ),
  }
  learner = training.make_learner({"student": models.mlp((8,), 3)}, terms, optax.adam(0.03))
  state, step = learner.init(jax.random.key(0), batch), training.make_train_step(learner)
  for _ in range(60):
    state, metrics = step(state, batch)
  assert training.metrics.means(metrics)["margin"] < 0.3
