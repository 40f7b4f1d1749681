"""Sharing: whose parameters are whose, values against the papers' formulas in NumPy, and tasks of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import models
from kdflax.models.experts import smooth_step

KEY = jax.random.key(0)
BATCH = {"image": jax.random.normal(jax.random.key(1), (4, 3, 2))}
MAPS = {"image": jax.random.normal(jax.random.key(2), (2, 5, 4, 1))}
ENCODER = models.mlp((5,), None)
NEXT = models.mlp((3,), None, input="embedding")
HEADS = {"left": models.task_head(3, hidden=(8,)), "right": models.task_head()}

# The model, and the parts of its params that are not the tasks' heads.
ARCHITECTURES = {
  "hard": (models.hard_sharing(ENCODER, HEADS), {"shared"}),
  "soft": (models.soft_sharing(ENCODER, HEADS), {"stacked"}),
  "feature": (models.feature_sharing(ENCODER, NEXT, HEADS), {"shared", "task/*/tower"}),
  "cross-stitch": (
    models.cross_stitch([ENCODER, NEXT], HEADS),
    {"shared/stage0", "shared/stitch1", "shared/stage1"},
  ),
  "mtan": (
    models.mtan(models.mlp((5, 3), None), HEADS, layers=("features.hidden1", "features.hidden2")),
    {"shared", "task/*/attention1", "task/*/attention2"},
  ),
  "mmoe": (models.mmoe(ENCODER, HEADS, num_experts=3), {"shared/level1/experts", "task/*/level1/gate"}),
  "cgc": (
    models.cgc(ENCODER, HEADS),
    {"shared/level1/experts", "task/*/level1/experts", "task/*/level1/gate"},
  ),
  "ple": (
    models.ple([ENCODER, NEXT], HEADS, shared_experts=1, task_experts=2),
    {"shared/level1/gate", "shared/level1/experts", "shared/level1/experts_*", "task/*/level1/gate"}
    | {"shared/level2/experts", "task/*/level2/experts", "task/*/level2/gate"},
  ),
  "dselect-k": (
    models.dselect_k(ENCODER, HEADS, num_experts=3, per_example=True),
    {"shared/level1/experts", "task/*/level1/gate"},
  ),
}


def paths(tree):
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


@functools.cache
def built(name):
  """Returns params, outputs, and the gradient of the sum of squares of each task's output, by task."""
  model, _ = ARCHITECTURES[name]
  params, state = model.init(KEY, BATCH)

  def losses(params):
    outputs, _ = model.apply(params, state, BATCH, train=False, key=None)
    return {task: (z**2).sum() for task, z in outputs["logits"].items()}, outputs

  gradients, outputs = jax.jit(jax.jacrev(losses, has_aux=True))(params)
  return params, outputs, gradients


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_lie_where_they_are_said_to(name):
  params, _, _ = built(name)
  expected = ARCHITECTURES[name][1] | {"task/*/head"}
  expected = {part.replace("*", task) for part in expected for task in HEADS}
  found = paths(params)
  for part in expected:
    assert any(path.startswith(part + "/") for path in found), part
  for path in found:
    assert any(path.startswith(part + "/") for part in expected), path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_task_moves_its_own_and_the_shared_parameters_only(name):
  _, _, gradients = built(name)
  for index, task in enumerate(HEADS):
    for path, gradient in jax.tree.leaves_with_path(gradients[task]):
      path = jax.tree_util.keystr(path, simple=True, separator="/")
      if path.startswith("stacked/"):
        assert np.any(gradient[index]), path
        assert not np.any(gradient[1 - index]), path
      elif path.startswith("task/"):
        assert bool(np.any(gradient)) == path.startswith(f"task/{task}/"), path
      else:
        assert np.any(gradient), path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_by_task(name):
  _, outputs, _ = built(name)
  assert jax.tree.map(jnp.shape, outputs["logits"]) == {"left": (4, 3), "right": (4,)}
  if name == "hard":
    assert outputs["embedding"].shape == (4, 5)
  else:
    assert set(outputs["embedding"]) == set(outputs["features"]) == set(HEADS)


def linear(x, layer):
  return x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


def relu(x):
  return np.maximum(x, 0)


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def perceptron(x, params):
  for layer in params["hidden"].values():
    x = relu(linear(x, layer))
  return x


def heads(embeddings, params):
  """Predictions of both heads from the embedding of each task."""
  left, right = params["task"]["left"]["head"], params["task"]["right"]["head"]
  return {
    "left": linear(relu(linear(embeddings["left"], left["hidden"]["0"])), left["linear"]),
    "right": linear(embeddings["right"], right["linear"])[..., 0],
  }


def numpy_embeddings(name, params):
  x, shared, own = np.asarray(BATCH["image"]).reshape(4, -1), params.get("shared"), params["task"]
  if name == "hard":
    return dict.fromkeys(HEADS, perceptron(x, shared))
  if name == "soft":
    networks = models.unstack(params["stacked"])
    return {task: perceptron(x, network) for task, network in zip(HEADS, networks, strict=True)}
  if name == "feature":
    return {task: perceptron(perceptron(x, shared), own[task]["tower"]) for task in HEADS}
  if name == "cross-stitch":
    first = np.stack([perceptron(x, network) for network in models.unstack(shared["stage0"])])
    mixed = np.einsum("tj,jbc->tbc", shared["stitch1"]["matrix"], first)
    networks = models.unstack(shared["stage1"])
    return {task: perceptron(z, network) for task, z, network in zip(HEADS, mixed, networks, strict=True)}
  if name == "mtan":
    first = relu(linear(x, shared["hidden"]["0"]))
    second = relu(linear(first, shared["hidden"]["1"]))
    result = {}
    for task in HEADS:
      a1, a2 = own[task]["attention1"], own[task]["attention2"]
      z = first / (1 + np.exp(-linear(relu(linear(first, a1["first"])), a1["second"])))
      both = np.concatenate([second, z], -1)
      result[task] = second / (1 + np.exp(-linear(relu(linear(both, a2["first"])), a2["second"])))
    return result
  if name == "ple":
    return numpy_ple(x, shared, own)
  return {task: mixture(x, gate_weights(name, x, own[task]["level1"]["gate"]), own[task], shared) for task in HEADS}


def gate_weights(name, x, gate):
  if name != "dselect-k":
    return softmax(linear(x, gate["linear"]))
  z = np.einsum("bd,dkm->bkm", x, gate["codes"])
  step = np.where(z <= -0.5, 0, np.where(z >= 0.5, 1, -2 * z**3 + 1.5 * z + 0.5))
  weights = np.zeros((len(x), 3))
  share = softmax(np.einsum("bd,dk->bk", x, gate["scores"]))
  for expert in range(3):
    for selector in range(2):
      digits = [step[:, selector, j] if expert >> j & 1 else 1 - step[:, selector, j] for j in range(2)]
      weights[:, expert] += share[:, selector] * digits[0] * digits[1]
  return weights


def mixture(x, weights, own, shared):
  experts = [*models.unstack(own["level1"]["experts"])] if "experts" in own["level1"] else []
  experts += models.unstack(shared["level1"]["experts"])
  return sum(weights[:, [e]] * perceptron(x, expert) for e, expert in enumerate(experts))


def numpy_ple(x, shared, own):
  run = lambda group, x: [perceptron(x, expert) for expert in models.unstack(group["experts"])]
  mix = lambda gate, x, group: np.einsum("be,ebc->bc", softmax(linear(x, gate["linear"])), np.stack(group))
  common = run(shared["level1"], x)
  groups = {task: run({"experts": shared["level1"][f"experts_{task}"]}, x) for task in HEADS}
  first = {task: mix(own[task]["level1"]["gate"], x, groups[task] + common) for task in HEADS}
  between = mix(shared["level1"]["gate"], x, groups["left"] + groups["right"] + common)
  common = run(shared["level2"], between)
  groups = {task: run(own[task]["level2"], first[task]) for task in HEADS}
  return {task: mix(own[task]["level2"]["gate"], first[task], groups[task] + common) for task in HEADS}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_are_those_of_the_formula(name):
  params, outputs, _ = built(name)
  expected = heads(numpy_embeddings(name, params), params)
  for task in HEADS:
    np.testing.assert_allclose(outputs["logits"][task], expected[task], rtol=1e-5, atol=1e-6)


def test_with_three_levels_early_gates_are_shared():
  model = models.ple([ENCODER, NEXT, NEXT], HEADS)
  found = paths(jax.eval_shape(model.init, KEY, BATCH)[0])
  gates = {path.removesuffix("/linear/kernel") for path in found if "gate" in path and path.endswith("kernel")}
  own = {f"task/{task}/level{level}/gate" for task in HEADS for level in (2, 3)}
  assert gates == own | {"shared/level1/gate", "shared/level2/gate"} | {f"shared/level1/gate_{t}" for t in HEADS}


def test_copies_start_apart():
  first, second = models.unstack(built("soft")[0]["stacked"])
  assert not np.allclose(first["hidden"]["0"]["kernel"], second["hidden"]["0"]["kernel"])


def test_a_stitch_starts_as_a_convex_combination():
  def matrix(count):
    heads = {f"task{index}": models.task_head(2) for index in range(count)}
    params, _ = models.cross_stitch((ENCODER, NEXT), heads, self_weight=0.8).init(KEY, BATCH)
    return params["shared"]["stitch1"]["matrix"]

  np.testing.assert_allclose(matrix(3), np.full((3, 3), 0.1) + 0.7 * np.eye(3), rtol=1e-6)
  np.testing.assert_array_equal(matrix(1), [[1.0]])


def test_smooth_step_joins_its_ends_smoothly():
  with jax.enable_x64(True):
    t = jnp.array([-3.0, -1.0, -0.5, 0.0, 1.0, 1.5])
    values, slopes = jax.vmap(jax.value_and_grad(lambda t: smooth_step(t, 2.0)))(t)
    np.testing.assert_allclose(values, [0, 0, 0.15625, 0.5, 1, 1], rtol=1e-9)
    np.testing.assert_allclose(slopes, [0, 0, 0.5625, 0.75, 0, 0], rtol=1e-9)


def test_the_regularizer_of_dselect_k_makes_selectors_definite():
  model = models.dselect_k(ENCODER, HEADS, num_experts=3, num_selected=1)
  params, state = model.init(KEY, BATCH)

  @jax.jit
  def regularizer(params):
    outputs, _ = model.apply(params, state, BATCH, train=False, key=None)
    return outputs["gate_regularizer"]["left"], outputs["gates"]["left"]

  gate = params["task"]["left"]["level1"]["gate"]
  gate["codes"] = jnp.zeros((1, 2))  # every code 1/4, the fourth names no expert
  value, weights = regularizer(params)
  np.testing.assert_allclose(value, 0.75 * np.log(4) + 1 / 0.75 - 1, rtol=1e-5)
  np.testing.assert_allclose(weights, np.full((4, 3), 0.25), rtol=1e-5)
  gate["codes"] = jnp.array([[-0.1, 0.2]])
  slope = jax.grad(lambda p: regularizer(p)[0])(params)["task"]["left"]["level1"]["gate"]["codes"]
  assert slope[0, 0] > 0 and slope[0, 1] < 0  # descent makes both digits definite
  gate["codes"] = jnp.array([[-2.0, 0.7]])
  value, weights = regularizer(params)
  np.testing.assert_array_equal(value, 0)
  np.testing.assert_array_equal(weights, [[0, 0, 1]] * 4)
  slope = jax.grad(lambda p: regularizer(p)[0])(params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_maps_dense_heads_and_batch_statistics():
  """Feature maps pass through masks and mixtures, a head on a map predicts at every position, BatchNorm has state."""
  conv = models.convnet((3, 4), None)
  heads = {"class": models.task_head(3), "depth": models.task_head(2, reads="features.stage2")}
  made = {
    "hard": models.hard_sharing(conv, heads),
    "soft": models.soft_sharing(conv, heads),
    "mtan": models.mtan(conv, heads, layers=("features.stage1", "features.stage2")),
    "mmoe": models.mmoe(conv, heads, num_experts=3),
  }
  for name, model in made.items():
    params, state = jax.eval_shape(model.init, KEY, MAPS)
    outputs, after = jax.eval_shape(lambda p, s, m=model: m.apply(p, s, MAPS, train=True, key=KEY), params, state)
    assert outputs["logits"]["class"].shape == (2, 3), name
    assert outputs["logits"]["depth"].shape == (2, 3, 2, 2), name
    assert state == after and state, name


def test_copies_draw_their_own_dropout():
  deep = models.mlp((40, 40), None, dropout=0.5)
  model, x = models.stacked(deep, 2), {"image": jnp.ones((1, 3))}
  params, state = model.init(KEY, x)
  params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), params)
  with pytest.raises(ValueError, match="needs a key"):
    model.apply(params, state, x, train=True, key=None)
  outputs, _ = model.apply(params, state, x, train=True, key=KEY)
  assert not np.allclose(*outputs["embedding"])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: models.hard_sharing(ENCODER, {}), "at least one task"),
    (lambda: models.hard_sharing(ENCODER, {"a/b": HEADS["left"]}), r"without '/'.*a/b"),
    (
      lambda: models.feature_sharing(ENCODER, {"left": NEXT, "up": NEXT}, HEADS),
      r"\['left', 'up'\].*\['left', 'right'\]",
    ),
    (lambda: models.cross_stitch([], HEADS), "stages"),
    (lambda: models.mtan(ENCODER, HEADS, layers="features.hidden1"), "sequence"),
    (lambda: models.ple([], HEADS), "at least one level"),
    (lambda: models.mmoe(ENCODER, HEADS, num_experts=0), "one shared expert"),
    (lambda: models.dselect_k(ENCODER, HEADS, num_selected=0), "num_selected"),
    (lambda: models.stacked(ENCODER, 0), "copies"),
    (lambda: models.task_head(0), "width"),
    (lambda: models.unstack({"a": jnp.ones(2), "b": jnp.ones((3, 1))}), r"a.*\(2,\).*b.*\(3, 1\)"),
  ],
)
def test_mistakes_are_named_when_a_model_is_made(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (models.hard_sharing(ENCODER, {"left": models.task_head(2, reads="features.hidden9")}), "hidden9.*hidden1"),
    (models.mtan(ENCODER, HEADS, layers=("features.stage1",)), "stage1.*hidden1"),
    (models.feature_sharing(ENCODER, models.mlp((2,), None, input="pooled"), HEADS), "pooled.*embedding"),
    (models.compose(lambda run, batch: run("a", ENCODER, batch) | run("a", ENCODER, batch)), "'a'"),
  ],
)
def test_mistakes_are_named_when_a_model_meets_data(model, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, KEY, BATCH)


def test_a_training_starts_from_given_variables():
  model, batch = models.mlp((4,), 3), {"image": jnp.ones((2, 5))}
  variables = model.init(jax.random.key(7), batch)
  started = models.starting_from(model, variables)
  assert started.init(jax.random.key(0), batch) is variables
  assert started.apply is model.apply and started.inputs == model.inputs
  with pytest.raises(ValueError, match=r"in 1 places: params/hidden/0/kernel is \(5, 4\), the model makes \(6, 4\)"):
    started.init(jax.random.key(0), {"image": jnp.ones((2, 6))})
  with pytest.raises(ValueError, match=r"state/count is \(\), the model makes None"):
    models.starting_from(model, (variables[0], {"count": jnp.zeros(())})).init(jax.random.key(0), batch)
