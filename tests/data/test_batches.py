"""Batches: every example once per epoch, and the same batches from every position, in every process."""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax.data import (
  DeviceBatches,
  MixedBatches,
  batch_indices,
  gather,
  grain_batches,
  mix,
  padded_batches,
  random_flip,
  random_shift,
)
from kdflax.data.orders import order_at

NUM_EXAMPLES = 23
BATCH_SIZE = 5  # 4 batches per epoch, 3 examples dropped


def _arrays(num_examples=NUM_EXAMPLES):
  rows = np.arange(num_examples)
  return {
    "image": (rows[:, None, None, None] + np.arange(16).reshape(4, 4, 1) / 16).astype(np.float32),
    "label": {"left": rows.astype(np.int32), "right": (rows % 3).astype(np.int32)},
  }


def _augment(record, generator):
  return random_flip(random_shift(1)(record, generator), generator)


def _device(seed=0):
  return DeviceBatches(_arrays(), BATCH_SIZE, jax.random.key(seed))


def _grain(seed=0):
  return grain_batches(_arrays(), BATCH_SIZE, seed=seed, augment=_augment)


def _take(iterator, count):
  return [jax.tree.map(np.asarray, batch) for batch in islice(iterator, count)]


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@partial(jax.jit, static_argnames="steps")
@partial(jax.vmap, in_axes=(0, None))
def _all_indices(key, steps):
  function = lambda step: batch_indices(key, step, num_examples=NUM_EXAMPLES, batch_size=BATCH_SIZE)
  return jax.lax.map(function, jnp.arange(steps))


def _indices(seed):
  """The examples of 12 steps, three epochs: int32 [12, BATCH_SIZE]."""
  return np.asarray(_all_indices(jax.vmap(jax.random.key)(jnp.arange(4)), 12)[seed])


def test_every_epoch_visits_no_example_twice_and_drops_the_rest():
  epochs = _indices(0).reshape(3, 20)
  for visited in epochs:
    assert len(set(visited.tolist())) == 20 and set(visited.tolist()) <= set(range(NUM_EXAMPLES))
  assert len({tuple(visited) for visited in epochs.tolist()}) == 3
  assert len({frozenset(visited) for visited in epochs.tolist()}) > 1  # not always the same ones are dropped


def test_an_epoch_that_divides_visits_every_example_once():
  function = lambda step: batch_indices(jax.random.key(1), step, num_examples=12, batch_size=4)
  batches = jax.jit(jax.vmap(function))(jnp.arange(6))
  np.testing.assert_array_equal(np.sort(np.concatenate(batches[:3])), np.arange(12))
  np.testing.assert_array_equal(np.sort(np.concatenate(batches[3:])), np.arange(12))


def test_an_epoch_is_the_order_of_the_folded_key():
  order = order_at(jax.random.fold_in(jax.random.key(3), 2), jnp.arange(20), NUM_EXAMPLES)
  np.testing.assert_array_equal(_indices(3)[8:].ravel(), order)


@pytest.mark.parametrize("x64", [False, True])
def test_indices_are_the_same_eager_and_traced(x64):
  with jax.enable_x64(x64):
    eager = batch_indices(jax.random.key(2), 9, num_examples=NUM_EXAMPLES, batch_size=BATCH_SIZE)
  assert eager.dtype == jnp.int32 and eager.shape == (BATCH_SIZE,)
  np.testing.assert_array_equal(eager, _indices(2)[9])


def test_device_batches_are_the_rows_of_batch_indices():
  expected = _indices(0)
  for indices, batch in zip(expected, _device(), strict=False):
    _assert_equal(batch, gather(_arrays(), indices))
    assert isinstance(batch["image"], jax.Array)


@pytest.mark.parametrize("make", [_device, _grain])
@pytest.mark.parametrize("position", [0, 1, 4, 7, 13])
def test_a_restored_position_continues_as_if_uninterrupted(make, position):
  uninterrupted = _take(make(), 18)
  first = make()
  _assert_equal(_take(first, position), uninterrupted[:position])
  state = json.loads(json.dumps(first.get_state()))
  fresh = make()
  fresh.set_state(state)
  _assert_equal(_take(fresh, 18 - position), uninterrupted[position:])
  used = make()
  _take(used, 6)
  used.set_state(state)
  assert json.loads(json.dumps(used.get_state())) == state
  _assert_equal(_take(used, 2), uninterrupted[position : position + 2])


@pytest.mark.parametrize("make", [_device, _grain])
def test_another_seed_gives_other_batches(make):
  labels = [np.stack([batch["label"]["left"] for batch in _take(make(seed), 4)]) for seed in (0, 1)]
  assert (labels[0] != labels[1]).any()


def test_batches_are_the_same_in_another_process():
  script = """
import json, sys
import numpy as np
from tests.data.test_batches import _device, _grain, _take
state = json.loads(sys.argv[1])
for make in (_device, _grain):
  batches = make()
  batches.set_state(state[make.__name__])
  for batch in _take(batches, 3):
    print(batch["label"]["left"].tolist(), float(np.sum(batch["image"] * np.arange(16).reshape(4, 4, 1))))
"""
  states, expected = {}, []
  for make in (_device, _grain):
    batches = make()
    _take(batches, 6)
    states[make.__name__] = batches.get_state()
    for batch in _take(batches, 3):
      weighted = float(np.sum(batch["image"] * np.arange(16).reshape(4, 4, 1)))
      expected.append(f"{batch['label']['left'].tolist()} {weighted}")
  root = Path(__file__).parents[2]
  environment = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "1"}
  done = subprocess.run(
    [sys.executable, "-c", script, json.dumps(states)], cwd=root, env=environment, capture_output=True, text=True
  )
  assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 4}, r"batch_size 4 \(here 5\)"),
    ({"num_examples": 24}, r"num_examples 24 \(here 23\)"),
    ({"key": [0, 9]}, r"key \[0, 9\] \(here \[0, 0\]\)"),
    ({"step": -1}, "step -1"),
    ({"order": "shuffle"}, r"order shuffle \(here feistel\)"),
    ({"next_index": 3}, r"has the fields \['batch_size', 'key', 'num_examples', 'order', 'step'\]"),
  ],
)
def test_a_position_of_other_batches_is_refused(change, message):
  batches = _device()
  with pytest.raises(ValueError, match=message):
    batches.set_state(batches.get_state() | change)


def _reversed(arrays):
  return jax.tree.map(lambda values: values[::-1], arrays)


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (lambda: grain_batches(_arrays(), BATCH_SIZE, seed=1), r"position at grain .* other batches: seed 1 \(here 0\)$"),
    (lambda: grain_batches(_arrays(), 4, seed=0), r"other batches: batch_size 4 \(here 5\)$"),
    (lambda: grain_batches(_arrays(24), BATCH_SIZE, seed=0), r"num_examples 24 \(here 23\), content "),
    (lambda: grain_batches(_reversed(_arrays()), BATCH_SIZE, seed=0), r"other batches: content \w+ \(here \w+\)$"),
    (lambda: grain_batches({"image": _arrays()["image"]}, BATCH_SIZE, seed=0), r"other batches: content \w+"),
    (_device, r"a position of a Grain pipeline has the fields \['batch_size', 'content', 'grain', "),
  ],
  ids=["seed", "batch size", "examples", "content", "names", "kind"],
)
def test_a_position_of_another_grain_pipeline_is_refused(other, message):
  other, batches = other(), _grain()
  _take(other, 2)
  position = json.loads(json.dumps(other.get_state()))
  with pytest.raises(ValueError, match=message):
    batches.set_state(position)
  _assert_equal(_take(batches, 1), _take(_grain(), 1))  # where it was


def test_grain_visits_every_example_once_per_epoch_in_a_new_order():
  labels = np.concatenate([batch["label"]["left"] for batch in _take(_grain(), 2 * NUM_EXAMPLES)])
  epochs = labels.reshape(-1, NUM_EXAMPLES)
  assert len(epochs) == 10
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(NUM_EXAMPLES), (10, 1)))
  assert len({tuple(order) for order in epochs.tolist()}) == 10


def test_grain_batches_hold_the_rows_of_their_examples():
  for batch in _take(grain_batches(_arrays(), BATCH_SIZE, seed=0), 6):
    _assert_equal(batch, gather(_arrays(), batch["label"]["left"]))


def test_grain_augments_every_visit_anew_and_deterministically():
  def draws(seed):
    batches = grain_batches(
      _arrays(), NUM_EXAMPLES, seed=seed, augment=lambda record, generator: record | {"draw": generator.random()}
    )
    return np.stack([batch["draw"][np.argsort(batch["label"]["left"])] for batch in _take(batches, 3)])

  np.testing.assert_array_equal(draws(0), draws(0))
  assert len(np.unique(draws(0))) == 3 * NUM_EXAMPLES
  assert not np.intersect1d(draws(0), draws(1)).size


def test_grain_workers_give_the_same_batches():
  batches = grain_batches(_arrays(), BATCH_SIZE, seed=0, augment=_augment, num_workers=1)
  expected = _take(_grain(), 7)
  _assert_equal(_take(batches, 4), expected[:4])
  state = json.loads(json.dumps(batches.get_state()))
  _take(batches, 2)
  batches.set_state(state)
  _assert_equal(_take(batches, 3), expected[4:])


def test_an_augmentation_cannot_write_into_the_data():
  arrays = _arrays()

  def spoil(record, generator):
    record["image"] *= 0
    return record

  with pytest.raises(ValueError, match="read-only"):
    next(grain_batches(arrays, BATCH_SIZE, seed=0, augment=spoil))
  _assert_equal(arrays, _arrays())
  arrays["image"][0] = 0  # the caller's own array stays writable


@pytest.mark.parametrize(
  "make", [lambda a, b: DeviceBatches(a, b, jax.random.key(0)), lambda a, b: grain_batches(a, b, seed=0)]
)
def test_batch_sizes_that_do_not_fit_are_refused_before_work(make):
  with pytest.raises(ValueError, match="batch_size=24 is larger than the data: 23 examples"):
    make(_arrays(), 24)
  for batch_size in (0, -3):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be positive"):
      make(_arrays(), batch_size)
  with pytest.raises(ValueError, match=r"image: 23, label\.left: 22"):
    make({"image": _arrays()["image"], "label": {"left": np.zeros(22)}}, 4)


def test_batch_indices_refuse_a_batch_larger_than_the_data():
  with pytest.raises(ValueError, match="batch_size=9 is larger than the data: 8 examples"):
    batch_indices(jax.random.key(0), 0, num_examples=8, batch_size=9)


@pytest.mark.parametrize(
  ("batch_size", "place"), [*((size, np.asarray) for size in (1, 5, 22, 23, 24, 100)), (5, jnp.asarray)]
)
def test_padded_batches_show_every_example_exactly_once(batch_size, place):
  arrays = jax.tree.map(place, _arrays())
  batches = list(padded_batches(arrays, batch_size))
  assert len(batches) == -(-NUM_EXAMPLES // batch_size)
  for batch in batches:
    where = batch.pop("where")
    assert where.shape == (batch_size,) and where.dtype == bool
    assert all(values.shape[0] == batch_size for values in jax.tree.leaves(batch))
    for padding in np.asarray(batch["image"])[~where]:
      np.testing.assert_array_equal(padding, _arrays()["image"][0])
    batch["where"] = where
  seen = np.concatenate([np.asarray(batch["label"]["left"])[batch["where"]] for batch in batches])
  np.testing.assert_array_equal(seen, np.arange(NUM_EXAMPLES))


def test_padded_batches_refuse_at_the_call():
  with pytest.raises(ValueError, match="batch_size=0 must be positive"):
    padded_batches(_arrays(), 0)
  with pytest.raises(ValueError, match="adds 'where'"):
    padded_batches(_arrays() | {"where": np.ones(NUM_EXAMPLES, bool)}, 4)


def test_a_mixed_batch_holds_the_rows_of_both_and_says_which_are_labelled():
  labelled, unlabelled = _arrays(2), gather(_arrays(), np.array([7, 3, 9]))
  unlabelled["label"]["right"] = np.full(3, -1, np.int32)
  both = mix(labelled, unlabelled)
  assert both["labelled"].tolist() == [True, True, False, False, False]
  np.testing.assert_array_equal(both["label"]["left"], [0, 1, 7, 3, 9])
  np.testing.assert_array_equal(both["label"]["right"], [0, 1, -1, -1, -1])
  np.testing.assert_array_equal(both["image"], np.concatenate([labelled["image"], unlabelled["image"]]))


def test_labels_outside_a_budget_stay_outside_when_mixed():
  labelled, unlabelled = _arrays(3) | {"labelled": np.array([True, False, True])}, _arrays(2)
  both = mix(labelled, unlabelled)
  assert both["labelled"].tolist() == [True, False, True, False, False]
  assert mix(both, unlabelled)["labelled"].tolist() == [True, False, True] + 4 * [False]
  assert mix(unlabelled, labelled)["labelled"].tolist() == [True, True] + 3 * [False]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda b: b.pop("label"), r"label.left: integers \[\] labelled, absent unlabelled\n  label.right: "),
    (lambda b: b["label"].update(up=np.zeros(23)), r"label.up: absent labelled, floats \[\] unlabelled$"),
    (lambda b: b.update(image=b["image"][:, :3]), r"image: \w+ \[4, 4, 1\] labelled, \w+ \[3, 4, 1\] unlabelled$"),
    (
      lambda b: b.update(image=np.zeros((23, 4, 4, 1), np.uint8)),
      r"image: floats .* labelled, integers .* unlabelled$",
    ),
  ],
  ids=["no labels", "more labels", "shape", "kind"],
)
def test_batches_that_do_not_mix_are_told_apart_by_name(change, message):
  other = _arrays()
  change(other)
  with pytest.raises(ValueError, match=message):
    mix(_arrays(), other)


def test_two_streams_are_mixed_and_continue_together():
  make = lambda: MixedBatches(_device(0), _device(1))
  stream = make()
  expected = [mix(*pair) for pair in zip(islice(_device(0), 6), islice(_device(1), 6), strict=True)]
  _assert_equal(_take(stream, 3), expected[:3])
  again = make()
  again.set_state(json.loads(json.dumps(stream.get_state())))
  _assert_equal(_take(again, 3), expected[3:])


def test_random_shift_moves_zeros_in_and_covers_all_shifts():
  image = 1 + np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
  record = {"image": image, "label": 3}
  generator = np.random.default_rng(0)
  seen = set()
  for _ in range(300):
    shifted = random_shift(2)(record, generator)
    assert shifted["label"] == 3 and shifted["image"].dtype == np.uint8
    seen.add(shifted["image"].tobytes())
  expected = set()
  for down in range(-2, 3):
    for right in range(-2, 3):
      moved = np.zeros_like(image)
      for row in range(3):
        for column in range(4):
          if 0 <= row - down < 3 and 0 <= column - right < 4:
            moved[row, column] = image[row - down, column - right]
      expected.add(moved.tobytes())
  assert seen == expected
  np.testing.assert_array_equal(image.ravel(), 1 + np.arange(12))
  with pytest.raises(ValueError, match="max_pixels=-1"):
    random_shift(-1)


def test_random_flip_mirrors_half_of_the_images():
  image = np.arange(12.0).reshape(3, 4, 1)
  generator = np.random.default_rng(0)
  flipped = 0
  for _ in range(400):
    result = random_flip({"image": image}, generator)["image"]
    mirrored = np.array_equal(result, image[:, [3, 2, 1, 0]])
    assert mirrored or np.array_equal(result, image)
    flipped += mirrored
  assert 160 < flipped < 240


@pytest.mark.parametrize("augment", [random_shift(2), random_flip])
def test_augmentations_follow_their_generator(augment):
  record = {"image": np.random.default_rng(9).random((4, 4, 1))}
  runs = []
  for _ in range(2):
    generator = np.random.default_rng(1)
    runs.append([augment(record, generator)["image"] for _ in range(20)])
  _assert_equal(runs[0], runs[1])
  assert len({image.tobytes() for image in runs[0]}) > 1
