"""Equinox modules as Models, with the real package: parts, modes, state, seeds, gradients, files."""

import functools
import subprocess
import sys

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import files, losses, models, training
from kdflax.export import export_model, load_exported
from kdflax.objectives import Term

KEY = jax.random.key(0)
BATCH = {"image": jax.random.normal(jax.random.key(1), (6, 2, 5, 5)), "label": jnp.arange(6) % 3}


class Net(eqx.Module):
  """Everything at once: a list, a function, numbers, an array that is not learned, BatchNorm, Dropout."""

  convs: list
  norm: eqx.nn.BatchNorm
  drop: eqx.nn.Dropout
  head: eqx.nn.Linear
  order: jax.Array
  activation: object

  def __init__(self, key, mode="batch"):
    first, second = jax.random.split(key)
    self.convs = [eqx.nn.Conv2d(2, 4, 3, key=first)]
    self.norm = eqx.nn.BatchNorm(4, axis_name="batch", momentum=0.9, mode=mode)
    self.drop = eqx.nn.Dropout(0.5)
    self.head = eqx.nn.Linear(4, 3, key=second)
    self.order = jnp.arange(4)[::-1]
    self.activation = jax.nn.relu

  def __call__(self, x, state, *, key=None):
    before, state = self.norm(self.convs[0](x), state)
    embedding = self.activation(before).mean((1, 2))[self.order]
    return {"logits": self.head(self.drop(embedding, key=key)), "features": {"stage1_pre": before}}, state


@functools.cache
def built():
  model = models.from_equinox(Net)
  return model, *jax.jit(model.init)(KEY, BATCH)


def close(a, b, rtol=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * 0.1), a, b)


def test_arrays_are_named_by_their_path_and_only_floating_ones_are_learned():
  _, params, state = built()
  assert {"convs", "norm", "head"} == set(params) and set(params["convs"]["0"]) == {"weight", "bias"}
  assert {"order", "norm"} == set(state) and set(state["norm"]) == {"batch_counter", "batch_state_index"}
  chex.assert_trees_all_equal(state["order"], jnp.array([3, 2, 1, 0]))
  assert not any(leaf.weak_type for leaf in jax.tree.leaves((params, state)))


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_it_says_what_equinox_says(mode):
  """Against the module itself, called by hand in both modes, twice over."""
  model = models.from_equinox(functools.partial(Net, mode=mode))
  params, state = model.init(KEY, BATCH)
  module, own = eqx.nn.make_with_state(Net)(KEY, mode)
  quiet = eqx.tree_at(lambda m: m.drop.p, module, 0)
  of_quiet = models.from_equinox(lambda key: eqx.tree_at(lambda m: m.drop.p, Net(key, mode), 0))
  call = lambda module: jax.vmap(module, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
  for _ in range(2):
    outputs, state = of_quiet.apply(params, state, BATCH, train=True, key=None)
    expected, own = call(quiet)(BATCH["image"], own)
    close(outputs, expected)
  got, same = model.apply(params, state, BATCH, train=False, key=None)
  expected, own = call(eqx.nn.inference_mode(module))(BATCH["image"], own)
  close(got, expected)
  close(jax.tree.leaves(state["norm"]), jax.tree.leaves(own))
  chex.assert_trees_all_equal(same, state)


def test_dropout_draws_for_every_example_from_the_key_and_needs_one():
  model = models.from_equinox(lambda key: eqx.nn.Dropout(0.5))
  batch = {"image": jnp.ones((4, 50))}
  run = lambda key, train=True: model.apply({}, {}, batch, train=train, key=key)[0]["logits"]
  first = run(jax.random.key(7))
  assert len(np.unique(np.asarray(first), axis=0)) == 4 and set(np.unique(first)) == {0.0, 2.0}
  chex.assert_trees_all_equal(first, run(jax.random.key(7)))
  assert jnp.any(first != run(jax.random.key(8)))
  chex.assert_trees_all_equal(run(KEY, train=False), batch["image"])
  with pytest.raises(ValueError, match="needs a key"):
    run(None)
  with pytest.raises(ValueError, match="needs a key"):
    built()[0].apply(*built()[1:], BATCH, train=True, key=None)
  models.from_equinox(lambda key: eqx.nn.Dropout(0.0)).apply({}, {}, batch, train=True, key=None)


def test_seeds_are_vmapped():
  model, *_ = built()
  keys = jax.random.split(KEY, 3)
  params, state = jax.jit(jax.vmap(model.init, in_axes=(0, None)))(keys, BATCH)
  run = jax.jit(jax.vmap(lambda p, s, key: model.apply(p, s, BATCH, train=True, key=key)))
  got = run(params, state, keys)
  for index, key in enumerate(keys):
    one = model.init(key, BATCH)
    close(jax.tree.map(lambda leaf, i=index: leaf[i], (params, state)), one)
    expected = model.apply(*one, BATCH, train=True, key=key)
    close(jax.tree.map(lambda leaf, i=index: leaf[i], got), expected, rtol=1e-4)


def test_it_trains_is_saved_and_leaves(tmp_path):
  model, *_ = built()
  terms = {
    "soft": Term(losses.kl_soft_targets, {"student_logits": "student.logits", "teacher_logits": "teacher.logits"})
  }
  learner = training.make_learner({"teacher": model, "student": model}, terms, optax.sgd(0.1))
  frozen = {"teacher": model.init(jax.random.key(5), BATCH)}
  state = learner.init(KEY, BATCH, frozen)
  after, _ = jax.jit(learner.step)(state, BATCH, frozen)
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after.params, state.params)
  assert moved["student"]["convs"]["0"]["weight"] and moved["student"]["head"]["weight"]
  assert after.model_state["student"]["norm"]["batch_counter"] == 1

  variables = after.params["student"], after.model_state["student"]
  digest = files.save_variables(tmp_path / "student.safetensors", variables)
  restored = files.load_variables(tmp_path / "student.safetensors", digest=digest)
  chex.assert_trees_all_equal(restored, jax.tree.map(np.asarray, variables))
  expected, _ = model.apply(*restored, BATCH, train=False, key=None)

  export_model(tmp_path / "export", model, variables, {"image": BATCH["image"]}, platforms=["cpu"])
  predict = load_exported(tmp_path / "export")
  for size in (1, 6):
    close(predict({"image": BATCH["image"][:size]})["logits"], expected["logits"][:size])


def test_the_readers_of_widths_connectors_and_whole_batches():
  linear = lambda key, example: eqx.nn.Linear(example.shape[-1], 2, key=key)
  connector = models.from_equinox(linear, inputs="student.embedding", with_example=True)
  params, state = connector.init(KEY, jnp.ones((3, 7)))
  outputs, _ = connector.apply(params, state, jnp.ones((3, 7)), train=True, key=None)
  close(outputs["output"], jnp.ones((3, 7)) @ params["weight"].T + params["bias"])
  assert connector.inputs == "student.embedding"
  with pytest.raises(ValueError, match=r"params 'weight' has shape \(2, 7\).*needs \(2, 4\)"):
    connector.apply(params, state, jnp.ones((3, 4)), train=True, key=None)

  whole = models.from_equinox(lambda key: eqx.nn.Lambda(lambda x: x - x.mean(0)), batched=True)
  close(whole.apply({}, {}, {"image": jnp.arange(4.0)}, train=True, key=None)[0]["logits"], jnp.arange(4.0) - 1.5)


def test_arrays_of_numpy_are_learned_and_a_module_with_its_state_may_be_given():
  weights = np.ones((3, 4), np.float32)
  pretrained = lambda key: eqx.tree_at(lambda m: m.weight, eqx.nn.Linear(4, 3, key=key), weights)
  params, _ = models.from_equinox(pretrained).init(KEY, {"image": jnp.ones((2, 4))})
  chex.assert_trees_all_equal(params["weight"], jnp.asarray(weights))
  chex.assert_trees_all_equal(models.from_equinox(eqx.nn.make_with_state(Net)).init(KEY, BATCH), built()[1:])


class Flagged(eqx.Module):
  """A mode flag of its own, handed to BatchNorm whatever `inference_mode` says."""

  norm: eqx.nn.BatchNorm = eqx.field(default_factory=lambda: eqx.nn.BatchNorm(2, "batch", mode="batch"))


class Training(Flagged):
  def __call__(self, x, state, training):
    return self.norm(x, state, inference=not training)


class Backwards(Flagged):
  def __call__(self, x, state):
    return self.norm(x, state, inference=False)


class Foreign(Flagged):
  def __call__(self, x, state, is_eval=True):
    return self.norm(x, state, inference=is_eval)


def test_flags_are_mapped_and_the_wrong_mode_is_refused():
  run = lambda make, train: models.from_equinox(make).apply(
    *models.from_equinox(make).init(KEY, BATCH), BATCH, train=train, key=None
  )
  flagged, plain = lambda key: Training(), lambda key: eqx.nn.BatchNorm(2, "batch", mode="batch")
  for train in (True, False):
    outputs, state = run(flagged, train)
    close(outputs, run(plain, train)[0])
    assert state["norm"]["batch_counter"] == train
  with pytest.raises(
    ValueError, match=r"with train=False the parts \['norm.batch_counter', 'norm.batch_state_index'\]"
  ):
    run(lambda key: Backwards(), False)
  with pytest.raises(
    ValueError, match=r"with train=True the parts \['norm'\] ran as in evaluation.*takes \['is_eval'\]"
  ):
    run(lambda key: Foreign(), True)


def test_a_mask_in_the_batch_draws_a_warning_in_training():
  model, params, state = built()
  masked = BATCH | {"where": jnp.arange(6) < 4}
  with pytest.warns(UserWarning, match="BatchNorm takes its statistics over all examples, masked ones included"):
    model.apply(params, state, masked, train=True, key=KEY)
  model.apply(params, state, masked, train=False, key=None)


def test_without_the_package_its_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "equinox", None)
  with pytest.raises(ImportError, match=r'models.from_equinox needs equinox, .*: pip install "kdflax\[equinox\]"'):
    models.from_equinox(Net)


def test_kdflax_does_not_import_equinox():
  code = "import sys; from kdflax import models; models.from_nnx; assert 'equinox' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
