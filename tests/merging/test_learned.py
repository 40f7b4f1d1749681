"""Merging learned by distillation: a Model of coefficients, trained by the Terms that exist."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import losses, merging, models, training
from kdflax.objectives import Term, evaluate

NETWORK = models.hard_sharing(models.mlp((16,), None), {"left": models.task_head(3), "right": models.task_head(3)})
LAYERS = ["shared/hidden/0", "task/left/head/linear", "task/right/head/linear"]
TASKS = ("left", "right")


def make_batch(seed, count=32):
  return {"image": np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)}


def label(batch, task):
  """Each task looks at the sums of two other inputs."""
  return np.argmax(batch["image"][:, :3] + batch["image"][:, 2:] * (1 if task == "left" else -1), 1)


@pytest.fixture(scope="module")
def base_and_tuned():
  """A base, and what plain descent on the labels of one task makes of it."""
  base, _ = NETWORK.init(jax.random.key(0), make_batch(0))
  batch = make_batch(0, 64)
  labels = {task: label(batch, task) for task in TASKS}

  def objective(params, task):
    logits = NETWORK.apply(params, {}, batch, train=True, key=None)[0]["logits"][task]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[task]).mean()

  def tune(task):
    step = lambda params, _: (optax.apply_updates(params, jax.tree.map(lambda g: -g, slope(params))), None)
    slope = jax.grad(lambda params: objective(params, task))
    return jax.jit(lambda params: jax.lax.scan(step, params, length=60)[0])(base)

  return base, [tune(task) for task in TASKS]


TERMS = {
  task: Term(
    losses.kl_soft_targets,
    {"student_logits": f"merged.logits.{task}", "teacher_logits": f"{task}.logits.{task}"},
    stop_gradient=(task,),
  )
  for task in TASKS
}


def distance(params, tuned, batch):
  """The distillation loss of params of the network."""
  says = lambda params: NETWORK.apply(params, {}, batch, train=False, key=None)[0]
  context = dict(zip(TASKS, map(says, tuned), strict=True)) | {"merged": says(params)}
  return float(sum(evaluate(TERMS, context)[0].values()))


def test_learned_coefficients_merge_better_than_any_single_scale(base_and_tuned):
  base, tuned = base_and_tuned
  merged = merging.learned(base, tuned, NETWORK)
  learner = training.make_learner({"left": NETWORK, "right": NETWORK, "merged": merged}, TERMS, optax.adam(0.05))
  frozen = {task: (params, {}) for task, params in zip(TASKS, tuned, strict=True)}
  state = learner.init(jax.random.key(0), make_batch(1), frozen)
  np.testing.assert_array_equal(state.params["merged"]["coefficients"], np.full((2, 3), 0.3, np.float32))
  step = jax.jit(learner.step)
  for seed in range(60):
    state, _ = step(state, make_batch(1 + seed % 4), frozen)
  coefficients = state.params["merged"]["coefficients"]
  jax.tree.map(np.testing.assert_array_equal, state.model_state["merged"]["base"], base)

  unseen = make_batch(99, 256)
  scales = {scale: distance(merging.task_arithmetic(base, tuned, scale), tuned, unseen)
            for scale in (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)}  # fmt: skip
  assert distance(merging.layer_wise(base, tuned, coefficients), tuned, unseen) < 0.85 * min(scales.values())
  # Each head belongs to one task, whose tuned head it takes whole.
  own, other = coefficients[[0, 1], [1, 2]], coefficients[[1, 0], [1, 2]]
  assert (own > 0.9).all()
  np.testing.assert_allclose(other, 0.3, rtol=1e-5)  # a head that a task never saw has no difference to add


def test_by_context_paths_the_same_is_learned_and_nothing_is_held(base_and_tuned):
  base, tuned = base_and_tuned
  batch, optimizer = make_batch(1), optax.sgd(0.5)
  held = merging.learned(base, tuned, NETWORK, initial=[0.1, 0.6])
  read = merging.learned("params.base", [f"params.{task}" for task in TASKS], NETWORK, initial=[0.1, 0.6])
  assert read.inputs == ("params.base", "params.left", "params.right", "batch")
  frozen = {name: (params, {}) for name, params in zip(("base", *TASKS), (base, *tuned), strict=True)}
  after = {}
  for name, merged in {"held": held, "read": read}.items():
    learner = training.make_learner(dict.fromkeys(frozen, NETWORK) | {"merged": merged}, TERMS, optimizer)
    state = learner.init(jax.random.key(0), batch, frozen)
    after[name], _ = jax.jit(learner.step)(state, batch, frozen)
  assert after["read"].model_state == {"merged": {}}
  coefficients = [state.params["merged"]["coefficients"] for state in after.values()]
  np.testing.assert_allclose(*coefficients, rtol=1e-6)
  assert np.any(coefficients[0] != np.float32([[0.1], [0.6]]))
  with pytest.raises(ValueError, match=r"all pytrees or all context paths; only \['base'\] are paths"):
    merging.learned("params.base", tuned, NETWORK)
  with pytest.raises(ValueError, match=r"tuned must be a sequence of pytrees.*got str"):
    merging.learned("params.base", "params.left", NETWORK)


def test_it_answers_as_the_network_with_the_merged_params(base_and_tuned):
  base, tuned = base_and_tuned
  coefficients = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
  by_hand = jax.tree.map_with_path(
    lambda path, b, *ts: b + sum(
      coefficients[i, LAYERS.index(jax.tree_util.keystr(path[:-1], simple=True, separator="/"))] * (t - b)
      for i, t in enumerate(ts)
    ), base, *tuned)  # fmt: skip
  params = merging.layer_wise(base, tuned, coefficients)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, by_hand)
  merged, batch = merging.learned(base, tuned, NETWORK, initial=coefficients), make_batch(3)
  variables = merged.init(jax.random.key(0), batch)
  got, state = merged.apply(*variables, batch, train=False, key=None)
  expected, _ = NETWORK.apply(params, {}, batch, train=False, key=None)
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  assert jax.tree.structure(state) == jax.tree.structure(variables[1]) and merged.inputs == "batch"


def test_equal_coefficients_are_task_arithmetic(base_and_tuned):
  base, tuned = base_and_tuned
  assert merging.layers(base) == LAYERS
  for scale in (0.4, [0.2, -0.3]):
    merged = merging.learned(base, tuned, NETWORK, initial=scale)
    (params, _) = merged.init(jax.random.key(0), make_batch(0))
    got = merging.layer_wise(base, tuned, params["coefficients"])
    expected = merging.task_arithmetic(base, tuned, scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_who_shares_a_coefficient_is_a_function_of_the_path(base_and_tuned):
  base, tuned = base_and_tuned
  assert merging.layers(base, lambda path: path.split("/")[0]) == ["shared", "task"]
  assert len(merging.layers(base, lambda path: path)) == len(jax.tree.leaves(base))
  only_shared = merging.layer_wise(base, tuned[:1], jnp.array([[1.0, 0.0]]), lambda path: path.split("/")[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), only_shared["shared"], tuned[0]["shared"])
  jax.tree.map(np.testing.assert_array_equal, only_shared["task"], base["task"])


def test_statistics_start_from_those_given_and_move_on_in_training():
  network, batch = models.convnet((2,), 3), {"image": np.ones((4, 5, 5, 1), np.float32)}
  base, state = network.init(jax.random.key(0), batch)
  state = jax.tree.map(lambda leaf: leaf + 1, state)
  merged = merging.learned(base, [base], network, state=state)
  params, start = merged.init(jax.random.key(0), batch)
  jax.tree.map(np.testing.assert_array_equal, start["model"], state)
  _, after = merged.apply(params, start, batch, train=True, key=jax.random.key(1))
  _, expected = network.apply(base, state, batch, train=True, key=jax.random.key(1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after["model"], expected)
  assert jax.tree.leaves(expected) and not np.array_equal(*map(lambda s: jax.tree.leaves(s)[0], (expected, state)))
  with pytest.raises(ValueError, match="the model's state and state differ in structure"):
    merging.learned(base, [base], network, state={}).init(jax.random.key(0), batch)


def test_what_does_not_fit_is_refused(base_and_tuned):
  base, tuned = base_and_tuned
  shape = r"must be \[models, layers\] = \(2, 3\).*'shared/hidden/0', 'task/left/head/linear'.*got shape \(2, 2\)"
  with pytest.raises(ValueError, match=shape):
    merging.learned(base, tuned, NETWORK, initial=np.ones((2, 2)))
  with pytest.raises(ValueError, match=shape):
    merging.layer_wise(base, tuned, np.ones((2, 2)))
  with pytest.raises(ValueError, match=r"initial must be a number or one for each of 2 models; got shape \(3,\)"):
    merging.learned(base, tuned, NETWORK, initial=[1, 2, 3])
  wide = {"image": np.ones((2, 7), np.float32)}
  with pytest.raises(
    ValueError, match=r"'shared/hidden/0/kernel' has shape \(7, 16\) in the model's params and \(5, 16\)"
  ):
    merging.learned(base, tuned, NETWORK).init(jax.random.key(0), wide)
