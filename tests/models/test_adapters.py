"""The boundary: what crosses it, and how BatchNorm, Dropout and keys behave under jit, grad and vmap."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdflax import models

KEY = jax.random.key(0)
BATCH = {"image": jax.random.normal(jax.random.key(1), (4, 6, 6, 2)), "label": jnp.arange(4)}


class LinenMLP(nn.Module):
  width: int = 5

  @nn.compact
  def __call__(self, x, train):
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(self.width, name="first")(x))
    x = nn.Dropout(0.5)(x, deterministic=not train)
    return nn.Dense(3, name="head")(x)


class LinenConvNet(nn.Module):
  """The twin of convnet((3, 4), 5), in the other half of flax."""

  @nn.compact
  def __call__(self, x, train):
    features = {}
    for index, (width, stride) in enumerate([(3, 1), (4, 2)]):
      x = nn.Conv(width, (3, 3), stride, padding=((1, 1), (1, 1)), use_bias=False, name=f"conv{index}")(x)
      x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{index}")(x)
      features |= {f"stage{index + 1}_pre": x, f"stage{index + 1}": nn.relu(x)}
      x = nn.relu(x)
    x = x.mean((1, 2))
    return {"logits": nn.Dense(5, name="head")(x), "embedding": x, "features": features}


def small_convnet():
  return models.convnet((3, 4), 5, dropout=0.5)


MODELS = {
  "mlp": lambda: models.mlp((5, 4), 3, dropout=0.5),
  "convnet": small_convnet,
  "resnet": lambda: models.resnet(8, 3, widths=(2, 2, 3, 4)),
  "linen": lambda: models.from_linen(LinenMLP()),
}


@functools.cache
def built(name):
  model = MODELS[name]()
  return model, *jax.jit(model.init)(KEY, BATCH)


def assert_plain(tree):
  """Nested dicts with string keys and arrays, nothing else."""
  if isinstance(tree, dict):
    assert type(tree) is dict and all(type(key) is str for key in tree)
    for value in tree.values():
      assert_plain(value)
  else:
    assert isinstance(tree, jax.Array)


def linen_twin_of(params, state):
  """Rename the leaves of a convnet to those of its Linen twin."""
  stages = params["stages"]
  twin = {f"conv{i}": stages[i]["conv"] for i in stages} | {f"norm{i}": stages[i]["norm"] for i in stages}
  statistics = {f"norm{i}": state["stages"][i]["norm"] for i in stages}
  return {**twin, "head": params["head"]}, {"batch_stats": statistics}


@pytest.mark.parametrize("train", [False, True])
def test_nnx_and_linen_agree_with_the_same_weights(train):
  ours, twin = models.convnet((3, 4), 5), models.from_linen(LinenConvNet())
  params, state = ours.init(KEY, BATCH)
  # Not the initial statistics, which hide a swap of mean and variance.
  state = jax.tree.map(lambda x: x + jax.random.uniform(jax.random.key(x.size), x.shape), state)
  twin_params, twin_state = linen_twin_of(params, state)
  chex.assert_trees_all_equal_shapes((twin_params, twin_state), twin.init(KEY, BATCH))

  def run(model, params, state):
    def loss(params):
      outputs, new_state = model.apply(params, state, BATCH, train=train, key=None)
      return jnp.sum(jnp.sin(outputs["logits"])), (outputs, new_state)

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  grads, (outputs, new_state) = run(ours, params, state)
  twin_grads, (twin_outputs, twin_new_state) = run(twin, twin_params, twin_state)
  close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
  close(outputs, twin_outputs)
  twin_view = linen_twin_of(grads, new_state)
  close(twin_view[0], twin_grads)
  close(twin_view[1], twin_new_state)


@pytest.mark.parametrize("name", ["mlp", "convnet", "linen"])
def test_only_plain_dicts_cross(name):
  model, params, state = built(name)
  outputs, new_state = jax.jit(functools.partial(model.apply, train=True))(params, state, BATCH, key=KEY)
  for tree in (params, state, outputs, new_state):
    assert_plain(tree)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
  assert (state == {}) == (name in ("mlp", "linen"))


@pytest.mark.parametrize("name", ["convnet", "linen"])
def test_init_under_vmap_is_separate_inits(name):
  model = MODELS[name]()
  keys = jax.random.split(KEY, 3)
  params, state = jax.jit(jax.vmap(model.init, in_axes=(0, None)))(keys, BATCH)
  init = jax.jit(model.init)
  each = [init(key, BATCH) for key in keys]
  chex.assert_trees_all_close((params, state), jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), rtol=1e-6)
  kernel = params["first"]["kernel"] if name == "linen" else params["head"]["kernel"]
  assert jnp.all(jnp.std(kernel, axis=0) > 0)  # the seeds differ

  apply = jax.jit(functools.partial(model.apply, train=True))
  outputs, new_state = jax.jit(jax.vmap(lambda p, s, key: apply(p, s, BATCH, key=key)))(params, state, keys)
  for index, key in enumerate(keys):
    one = apply(*each[index], BATCH, key=key)
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[index], (outputs, new_state)),  # noqa: B023
      one,
      rtol=1e-5,
      atol=1e-5,
    )


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_finite_and_shaped_like_params(name):
  model, params, state = built(name)

  def loss(params):
    outputs, new_state = model.apply(params, state, BATCH, train=True, key=KEY)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], BATCH["label"] % 3)), new_state

  grads, new_state = jax.jit(jax.grad(loss, has_aux=True))(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
  chex.assert_tree_all_finite((grads, new_state))
  assert jnp.any(grads["head"]["kernel"] != 0)


def test_batch_statistics_move_in_training_only():
  model, params, state = built("convnet")
  _, evaluated = model.apply(params, state, BATCH, train=False, key=None)
  chex.assert_trees_all_equal(evaluated, state)
  _, trained = jax.jit(functools.partial(model.apply, train=True))(params, state, BATCH, key=KEY)
  assert all(jnp.any(a != b) for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(state), strict=True))


def test_batch_statistics_are_the_running_mean_of_the_batch():
  model = models.convnet((2,), 3)
  params, state = model.init(KEY, BATCH)
  outputs, new = model.apply(params, state, BATCH, train=True, key=None)
  kernel, x = np.asarray(params["stages"]["0"]["conv"]["kernel"]), np.asarray(BATCH["image"])
  padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
  convolved = sum(padded[:, i : i + 6, j : j + 6] @ kernel[i, j] for i in range(3) for j in range(3))
  mean, var = convolved.mean((0, 1, 2)), convolved.var((0, 1, 2))
  norm = new["stages"]["0"]["norm"]
  np.testing.assert_allclose(norm["mean"], 0.1 * mean, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(norm["var"], 0.9 + 0.1 * var, rtol=1e-5)
  expected = (convolved - mean) / np.sqrt(var + 1e-5)
  np.testing.assert_allclose(outputs["features"]["stage1_pre"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convnet", "linen"])
def test_dropout_follows_the_key_and_nothing_else(name):
  model, params, state = built(name)
  apply = jax.jit(functools.partial(model.apply, train=True))
  first, after = apply(params, state, BATCH, key=jax.random.key(7))
  chex.assert_trees_all_equal(first, apply(params, state, BATCH, key=jax.random.key(7))[0])
  assert jnp.any(first["logits"] != apply(params, state, BATCH, key=jax.random.key(8))[0]["logits"])
  chex.assert_trees_all_equal_structs(after, state)  # no key was put away
  quiet = jax.jit(functools.partial(model.apply, train=False))
  chex.assert_trees_all_equal(quiet(params, state, BATCH, key=KEY), quiet(params, state, BATCH, key=None))


@pytest.mark.parametrize("name", ["mlp", "convnet", "linen"])
def test_dropout_in_training_needs_a_key(name):
  model, params, state = built(name)
  with pytest.raises(ValueError, match="needs a key"):
    model.apply(params, state, BATCH, train=True, key=None)


def test_old_keys_work_as_typed_ones():
  model, params, state = built("mlp")
  typed = model.apply(params, state, BATCH, train=True, key=KEY)
  chex.assert_trees_all_equal(typed, model.apply(params, state, BATCH, train=True, key=jax.random.key_data(KEY)))
  chex.assert_trees_all_equal(model.init(KEY, BATCH), model.init(jax.random.key_data(KEY), BATCH))


@pytest.mark.parametrize("name", ["convnet", "linen"])
def test_shapes_are_enough_to_initialise(name):
  model, params, state = built(name)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
  chex.assert_trees_all_close(jax.jit(lambda key: model.init(key, shapes))(KEY), (params, state), rtol=1e-6)


@pytest.mark.parametrize("name", ["convnet", "linen"])
def test_repeated_steps_compile_once(name):
  model, params, state = built(name)

  traces = []

  @jax.jit
  def step(params, state, batch, key):
    traces.append(None)

    def loss(params):
      outputs, new = model.apply(params, state, batch, train=True, key=key)
      return jnp.sum(outputs["logits"] ** 2), new

    grads, state_ = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), state_

  for index in range(3):
    params, state = step(params, state, BATCH, jax.random.key(index))
  assert len(traces) == 1
  chex.assert_tree_all_finite((params, state))


def test_params_and_state_can_be_donated():
  model = models.convnet((3,), 3)
  params, state = model.init(KEY, BATCH)
  params, state = jax.tree.map(jnp.array, (params, state))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state):
    outputs, state = model.apply(params, state, BATCH, train=True, key=None)
    return jax.tree.map(lambda p: p + jnp.mean(outputs["logits"]), params), state

  for _ in range(2):
    params, state = step(params, state)
  chex.assert_tree_all_finite((params, state))


class Stored(nnx.Module):
  """A module as the NNX tutorials write it: streams kept inside, the mode set from outside."""

  def __init__(self, rngs):
    self.first = nnx.Linear(72, 8, rngs=rngs)
    self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])
    self.norm = nnx.BatchNorm(8, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.drops[1](self.drops[0](self.first(x.reshape(x.shape[0], -1)))))


def test_stored_streams_come_from_the_key():
  model = models.from_nnx(Stored)
  params, state = model.init(KEY, BATCH)
  assert set(params) == {"first", "norm"} and set(state) == {"norm"}
  apply = jax.jit(functools.partial(model.apply, train=True))
  outputs, new = apply(params, state, BATCH, key=KEY)
  assert set(outputs) == {"logits"}
  assert jnp.any(new["norm"]["mean"] != state["norm"]["mean"])
  chex.assert_trees_all_equal(outputs, apply(params, state, BATCH, key=KEY)[0])
  assert jnp.any(outputs["logits"] != apply(params, state, BATCH, key=jax.random.key(5))[0]["logits"])
  with pytest.raises(ValueError, match="needs a key"):
    model.apply(params, state, BATCH, train=True, key=None)
  outputs, new = model.apply(params, state, BATCH, train=False, key=None)
  chex.assert_trees_all_equal(new, state)


def test_two_stored_streams_draw_different_masks():
  class Twice(nnx.Module):
    def __init__(self, rngs):
      self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
      return {f"output{i}": drop(x) for i, drop in enumerate(self.drops)}

  model = models.from_nnx(Twice)
  outputs, _ = model.apply({}, {}, {"image": jnp.ones((4, 50))}, train=True, key=KEY)
  assert jnp.any(outputs["output0"] != outputs["output1"])


def test_other_variables_are_state():
  class Counter(nnx.Variable):
    pass

  class Counting(nnx.Module):
    def __init__(self, rngs):
      self.calls = Counter(jnp.zeros(()))

    def __call__(self, x, train):
      self.calls[...] = self.calls[...] + 1
      return x

  model = models.from_nnx(Counting, input="label")
  params, state = model.init(KEY, BATCH)
  assert params == {}
  for _ in range(2):
    outputs, state = jax.jit(functools.partial(model.apply, train=True))(params, state, BATCH, key=None)
  chex.assert_trees_all_equal(state, {"calls": jnp.asarray(2.0)})
  chex.assert_trees_all_equal(outputs["logits"], BATCH["label"])


def test_arrays_outside_variables_are_refused():
  class Loose(nnx.Module):
    def __init__(self, rngs):
      self.scale = jnp.ones(3)

  with pytest.raises(ValueError, match=r"no nnx\.Variable: \['scale'\]"):
    models.from_nnx(Loose).init(KEY, BATCH)


def test_linen_without_train_and_with_another_method():
  class Plain(nn.Module):
    def setup(self):
      self.layer = nn.Dense(3)

    def __call__(self, x):
      return self.layer(x)

    def doubled(self, x, factor):
      return {"output": factor * self.layer(x)}

  plain = models.from_linen(Plain(), inputs="student.embedding")
  params, state = plain.init(KEY, jnp.ones((2, 4)))
  outputs, _ = plain.apply(params, state, jnp.ones((2, 4)), train=True, key=None)
  doubled = models.from_linen(Plain(), inputs="student.embedding", method="doubled", factor=2.0)
  assert plain.inputs == "student.embedding"
  chex.assert_trees_all_equal(doubled.init(KEY, jnp.ones((2, 4)))[0], params)
  twice, _ = doubled.apply(params, state, jnp.ones((2, 4)), train=True, key=None)
  chex.assert_trees_all_close(twice["output"], 2 * outputs["output"], rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_entry_lists_what_the_batch_has(name):
  model, params, state = built(name)
  batch = {"picture": BATCH["image"], "label": BATCH["label"]}
  with pytest.raises(ValueError, match=r"no 'image'; it has \['label', 'picture'\]"):
    model.apply(params, state, batch, train=False, key=None)
  with pytest.raises(ValueError, match="a dict with the entry 'image'"):
    model.init(KEY, BATCH["image"])


def test_another_entry_can_be_read():
  model = models.mlp((), 3, input="audio")
  params, state = model.init(KEY, {"audio": jnp.ones((2, 5))})
  outputs, _ = model.apply(params, state, {"audio": jnp.ones((2, 5))}, train=True, key=None)
  chex.assert_trees_all_close(
    outputs["logits"], jnp.ones((2, 5)) @ params["head"]["kernel"] + params["head"]["bias"], rtol=1e-6
  )


def test_foreign_params_are_named_with_both_shapes():
  model, params, state = built("mlp")
  larger = {"image": jnp.ones((4, 7, 7, 2))}
  with pytest.raises(ValueError, match=r"params 'hidden\.0\.kernel' has shape \(72, 5\).*needs \(98, 5\)"):
    model.apply(params, state, larger, train=False, key=None)
  with pytest.raises(ValueError, match=r"params has no 'head\.bias'"):
    model.apply({name: value for name, value in params.items() if name != "head"}, state, BATCH, train=False)


def test_counts():
  tree = {"a": jnp.zeros((2, 3)), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16), "c": jnp.zeros(())}
  assert models.count_parameters(tree) == 12
  assert models.count_bytes(tree) == 6 * 4 + 5 * 2 + 4
