"""Flax modules whose mode flag is not `train`: the known ones are set, and none runs in the wrong mode unnoticed."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdflax import models

KEY = jax.random.key(0)
BATCH = {"image": jax.random.normal(jax.random.key(1), (4, 3))}
FLAGS = {
  "train": True,
  "training": True,
  "is_training": True,
  "deterministic": False,
  "inference": False,
  "use_running_average": False,
}


def linen_with(flag, default="", wrong=False, rate=0.5):
  """A module with BatchNorm and Dropout whose `__call__` has a flag of that name."""
  trains = f"{flag} is {FLAGS.get(flag, False) is not wrong}"
  space = {"nn": nn}
  exec(
    "class Net(nn.Module):\n  @nn.compact\n"
    f"  def __call__(self, x, {flag}{default}):\n"
    f"    x = nn.BatchNorm(use_running_average=not ({trains}), name='norm')(x)\n"
    f"    return nn.Dropout({rate}, deterministic=not ({trains}), name='drop')(x)\n",
    space,
  )
  return models.from_linen(space["Net"]())


def nnx_with(flag, default="", wrong=False, rate=0.5):
  trains = f"{flag} is {FLAGS.get(flag, False) is not wrong}"
  space = {"nnx": nnx}
  exec(
    "class Net(nnx.Module):\n  def __init__(self, rngs):\n    self.norm = nnx.BatchNorm(3, rngs=rngs)\n"
    f"    self.drop = nnx.Dropout({rate})\n"
    f"  def __call__(self, x, {flag}{default}, rngs=None):\n"
    f"    x = self.norm(x, use_running_average=not ({trains}))\n"
    f"    return self.drop(x, deterministic=not ({trains}), rngs=rngs)\n",
    space,
  )
  return models.from_nnx(space["Net"])


MAKERS = {"linen": linen_with, "nnx": nnx_with}


def run(model, train, key=KEY, batch=BATCH):
  params, state = model.init(KEY, batch)
  outputs, after = jax.jit(lambda p, s: model.apply(p, s, batch, train=train, key=key))(params, state)
  moved = any(map(lambda a, b: bool(jnp.any(a != b)), jax.tree.leaves(state), jax.tree.leaves(after)))
  return outputs["logits"], moved


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("flag", FLAGS)
def test_known_flags_are_set(kind, flag):
  model = MAKERS[kind](flag)
  trained, moved = run(model, True)
  x = np.asarray(BATCH["image"])
  by_batch = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
  assert moved and np.any(trained == 0)  # statistics of the batch, and a mask
  np.testing.assert_allclose(trained, np.where(trained == 0, 0, 2 * by_batch), rtol=1e-4, atol=1e-5)
  evaluated, moved = run(model, False)
  assert not moved
  np.testing.assert_allclose(evaluated, x / np.sqrt(1 + 1e-5), rtol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_flag_of_unknown_name_is_refused(kind):
  make = MAKERS[kind]
  with pytest.raises(ValueError, match=r"Net.__call__ needs \['phase'\].*known are \['train', 'training'"):
    run(make("phase"), False)
  # By default as in training: evaluation would move the statistics.
  with pytest.raises(ValueError, match=r"with train=False the parts \['norm'\] ran as in training"):
    run(make("phase", "=False"), False)
  # By default as in evaluation: nothing would ever train.
  with pytest.raises(ValueError, match=r"with train=True the parts \['norm', 'drop'\] ran as in.*takes \['phase'\]"):
    run(make("phase", "=True"), True)
  run(make("phase", "=True"), False)
  run(make("phase", "=False"), True)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_known_flag_handed_on_the_wrong_way_round_is_refused(kind):
  with pytest.raises(ValueError, match=r"with train=False the parts \['norm'\] ran as in training"):
    run(MAKERS[kind]("train", wrong=True), False)


def test_dropout_alone_in_the_wrong_mode():
  class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, phase=False):
      return nn.Dropout(0.5, name="drop")(x, phase)

  with pytest.raises(ValueError, match=r"with train=False the parts \['drop'\] ran as in training"):
    run(models.from_linen(Linen()), False)

  class Nnx(nnx.Module):
    def __init__(self, rngs):
      self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, phase=False):
      return self.drop(x, deterministic=phase)

  chex.assert_trees_all_equal(run(models.from_nnx(Nnx), False)[0], BATCH["image"])  # nothing is dropped
  assert np.any(run(models.from_nnx(Nnx), True)[0] == 0)


def test_a_flag_may_be_a_field_of_a_linen_module():
  class Net(nn.Module):
    training: bool = False

    @nn.compact
    def __call__(self, x):
      return nn.BatchNorm(use_running_average=not self.training)(x)

  assert run(models.from_linen(Net()), True)[1] and not run(models.from_linen(Net(training=True)), False)[1]


def test_a_flag_may_be_an_attribute_of_an_nnx_module():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.norm, self.training = nnx.BatchNorm(3, rngs=rngs), False

    def __call__(self, x):
      return self.norm(x, use_running_average=not self.training)

  assert run(models.from_nnx(Net), True)[1] and not run(models.from_nnx(Net), False)[1]


def test_a_flag_fixed_by_the_caller_stays():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, phase, deterministic=False):
      return nn.Dropout(0.5)(x, deterministic)

  for train in (True, False):
    chex.assert_trees_all_equal(run(models.from_linen(Net(), phase=3, deterministic=True), train)[0], BATCH["image"])
    assert np.any(run(models.from_linen(Net(), phase=3, deterministic=False), train)[0] == 0)


def test_parts_that_are_frozen_on_purpose_stay():
  """A module that takes its flag and keeps a part as it is means to."""

  class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return nn.BatchNorm(use_running_average=True)(x)

  class Nnx(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)

    def __call__(self, x, train):
      return self.norm(x)

  for model in (models.from_linen(Linen()), models.from_nnx(Nnx)):
    assert not run(model, True)[1]


def test_nothing_in_a_module_without_parts_of_two_modes_is_refused():
  class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, scale: float = 2.0, flip=False, name_of_output="logits", **others):
      return nn.LayerNorm()(x) * scale

  for train in (True, False):
    run(models.from_linen(Linen()), train)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_mask_in_the_batch_draws_a_warning_in_training(kind):
  masked, model = BATCH | {"where": jnp.arange(4) < 3}, MAKERS[kind]("train", rate=0.0)
  with pytest.warns(UserWarning, match="BatchNorm takes its statistics over all examples, masked ones included"):
    run(model, True, batch=masked)
  run(model, False, batch=masked)
  run(models.mlp((2,), 3), True, batch=masked)
