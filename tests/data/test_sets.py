"""The table of data sets: what it says is what is read, and images meet the statistics of their own set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import networks
from kdflax import data, models
from kdflax.model import lookup

BUNDLED = [name for name, known in data.DATASETS.items() if not known.files]
FROM_FILES = [name for name, known in data.DATASETS.items() if known.files]
OF_BYTES = [name for name, known in data.DATASETS.items() if known.normalisation]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_row_says_what_is_read(name):
  # The split of the glyphs, by family, is part of the data.
  known, splits = data.dataset(name), data.load(name, **({} if name == "glyphs" else {"seed": 1}))
  assert list(splits) == ["train", "validation", "test"]
  assert (known.normalisation is None) == (splits["train"][known.input].dtype == np.float32)
  labels = {task: lookup(splits["train"], row.label) for task, row in known.tasks.items()}
  others = {known.input, "index", "source", "family"}
  left = {key: values for key, values in splits["train"].items() if key not in others}
  assert len(labels) == len(jax.tree.leaves(left))  # no task is left out
  for task, row in known.tasks.items():
    if row.classes is None:
      assert labels[task].dtype == np.float32
    else:
      assert labels[task].dtype == np.int32 and set(labels[task].tolist()) == set(range(row.classes))
  arrays = data.by_task(splits["train"], known.tasks, input=known.input)
  assert set(arrays) == {known.input, "label", "index"}
  assert all(arrays["label"][task] is labels[task] for task in labels)


def test_superclasses_are_a_task_beside_the_classes():
  split = {
    "image": np.zeros((2, 1)),
    "label": np.array([3, 7]),
    "coarse_label": np.array([0, 1]),
    "index": np.arange(2),
  }
  tasks = data.dataset("cifar100").tasks
  assert {task: rows.tolist() for task, rows in data.by_task(split, tasks)["label"].items()} == {
    "fine": [3, 7],
    "coarse": [0, 1],
  }
  del split["coarse_label"]
  with pytest.raises(ValueError, match="no 'coarse_label'"):
    data.by_task(split, tasks)


@pytest.mark.parametrize("name", FROM_FILES)
def test_what_is_read_from_files_asks_for_a_folder(name):
  with pytest.raises(
    ValueError, match=rf"^{name} is read from files: path must be .*; digits, overlaid_digits, .* none$"
  ):
    data.load(name)
  with pytest.raises(FileNotFoundError, match="there"):
    data.load(name, path="there")


def test_what_is_bundled_takes_no_folder():
  for name in ("digits", "glyphs"):
    with pytest.raises(ValueError, match=rf"^path='there' is for data read from files; {name} needs none$"):
      data.load(name, path="there")


@pytest.mark.parametrize("name", OF_BYTES)
def test_bytes_are_standardised_for_each_channel(name):
  known = data.dataset(name).normalisation
  image = np.random.default_rng(0).integers(256, size=(2, 3, 3, len(known.mean)), dtype=np.uint8)
  expected = (image / 255.0 - np.array(known.mean)) / np.array(known.deviation)
  np.testing.assert_allclose(data.normalize(jnp.asarray(image), known), expected, rtol=1e-5, atol=1e-6)


def test_floats_stay_and_bytes_without_statistics_are_scaled():
  floats = jnp.linspace(-1, 2, 3)
  assert data.normalize(floats, data.Normalisation((0.5,), (0.5,))) is floats
  np.testing.assert_allclose(data.normalize(jnp.array([0, 51, 255], jnp.uint8), None), [0, 0.2, 1], rtol=1e-6)


def test_one_channel_is_never_standardised_by_three():
  grey, colour = jnp.zeros((2, 4, 4, 1), jnp.uint8), data.dataset("cifar100").normalisation
  with pytest.raises(ValueError, match=r"^image has 1 channels, shape \(2, 4, 4, 1\), but the normalisation has 3;"):
    data.normalize(grey, colour)
  with pytest.raises(ValueError, match="has 1 channels"):
    networks.network("mlp-4", 10, colour).init(jax.random.key(0), {"image": grey})


def test_a_network_of_bytes_is_one_of_their_normalised_floats():
  known = data.dataset("mnist").normalisation
  image = jnp.asarray(np.random.default_rng(0).integers(256, size=(2, 4, 4, 1), dtype=np.uint8))
  model, inner = networks.network("mlp-4", 10, known), models.mlp((4,), 10)
  variables = model.init(jax.random.key(0), {"image": image})
  said, _ = model.apply(*variables, {"image": image}, train=False)
  expected, _ = inner.apply(*variables, {"image": data.normalize(image, known)}, train=False, key=None)
  np.testing.assert_array_equal(said["logits"], expected["logits"])
