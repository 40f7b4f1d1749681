"""The data sets by name: how each is read, which tasks it holds and how its pixels are normalised."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdflax.data.arrays import Arrays
from kdflax.data.glyphs import glyphs
from kdflax.data.readers import cifar, mnist
from kdflax.data.sources import digits, overlaid_digits, tabular
from kdflax.model import lookup


class Task(NamedTuple):
  """What one of a data set's labels asks for."""

  classes: int | None
  """Number of classes, or None for a regression of one number."""
  label: str = "label"
  """Where its labels are: a dotted path in the arrays of a split."""


class Normalisation(NamedTuple):
  """Mean and deviation of the pixels of a training split, one of each for each channel, where white is 1."""

  mean: tuple[float, ...]
  deviation: tuple[float, ...]


class Dataset(NamedTuple):
  """What is known of a data set before it is read; a row of `DATASETS`."""

  load: Callable[..., dict[str, Arrays]]
  """`(**settings) -> {"train": arrays, ..., "test": arrays}`."""
  tasks: Mapping[str, Task]
  """The tasks by name."""
  normalisation: Normalisation | None = None
  """Of images of bytes; None where the inputs are floats of a usual scale already."""
  input: str = "image"
  """The array that a model reads."""
  files: str = ""
  """What the folder named by the setting `path` must hold; empty where they come with kdflax or scikit-learn."""


_CIFAR_10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR_100 = Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_GLYPHS = Normalisation((0.0831,), (0.2358,))

DATASETS: Mapping[str, Dataset] = {
  "digits": Dataset(digits, {"digit": Task(10)}),
  "overlaid_digits": Dataset(overlaid_digits, {"left": Task(10, "label.left"), "right": Task(10, "label.right")}),
  "glyphs": Dataset(
    glyphs,
    {
      "character": Task(62, "character"),
      "italic": Task(2, "italic"),
      "fixed_pitch": Task(2, "fixed_pitch"),
      "weight": Task(None, "weight"),
      "width": Task(None, "width"),
    },
    _GLYPHS,
  ),
  "diabetes": Dataset(
    partial(tabular, problem="diabetes"),
    {
      "progression": Task(None, "label.progression"),
      "glucose": Task(None, "label.glucose"),
      "sex": Task(2, "label.sex"),
    },
    input="inputs",
  ),
  "wine": Dataset(
    partial(tabular, problem="wine"),
    {
      "alcohol": Task(None, "label.alcohol"),
      "color_intensity": Task(None, "label.color_intensity"),
      "cultivar": Task(3, "label.cultivar"),
    },
    input="inputs",
  ),
  "mnist": Dataset(
    mnist, {"digit": Task(10)}, Normalisation((0.1307,), (0.3081,)), files="the four IDX files of MNIST"
  ),
  "cifar10": Dataset(
    partial(cifar, classes=10),
    {"class": Task(10)},
    _CIFAR_10,
    files="data_batch_1.bin to data_batch_5.bin and test_batch.bin",
  ),
  "cifar100": Dataset(
    partial(cifar, classes=100),
    {"fine": Task(100), "coarse": Task(20, "coarse_label")},
    _CIFAR_100,
    files="train.bin and test.bin",
  ),
}


def dataset(name: str) -> Dataset:
  """Return what is known of a data set, by its name.

  Args:
    name: `digits`, `overlaid_digits`, `glyphs`, `diabetes`, `wine`, `mnist`, `cifar10` or `cifar100`.

  Raises:
    ValueError: an unknown name; the message lists the known ones.

  Examples:
    >>> dataset("cifar100").tasks["coarse"]
    Task(classes=20, label='coarse_label')
  """
  if name not in DATASETS:
    raise ValueError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
  return DATASETS[name]


def load(name: str, **settings: Any) -> dict[str, Arrays]:
  """Return the splits of a data set by its name, for configurations that hold the name as text.

  Args:
    name: as in `dataset`.
    settings: the arguments of the function of that name; `mnist`, `cifar10` and `cifar100` need `path`.

  Returns:
    Splits by name, each a dict of arrays.

  Raises:
    ValueError: an unknown name, a `path` that is missing, or one for data that are not read from files.

  Examples:
    >>> {name: len(split["label"]) for name, split in load("digits", seed=1).items()}
    {'train': 1000, 'validation': 297, 'test': 500}
  """
  found = dataset(name)
  if found.files and not settings.get("path"):
    bundled = ", ".join(other for other in DATASETS if not DATASETS[other].files)
    raise ValueError(f"{name} is read from files: path must be a folder with {found.files}; {bundled} need none")
  if "path" in settings and not found.files:
    raise ValueError(f"path={str(settings['path'])!r} is for data read from files; {name} needs none")
  return found.load(**settings)


def by_task(arrays: Arrays, tasks: Mapping[str, Task], *, input: str = "image") -> Arrays:
  """Return a split in the form that a model of several tasks takes: its labels by the names of the tasks.

  Args:
    arrays: a split as `load` returns it.
    tasks: those of its data set, or some of them.
    input: the array that a model reads.

  Returns:
    The input, `label` as a dict by task, and `index`.

  Raises:
    ValueError: a label is not there.

  Examples:
    >>> split = load("digits")["train"]
    >>> by_task(split, dataset("digits").tasks)["label"]["digit"].shape
    (1000,)
  """
  label = {name: lookup(arrays, task.label) for name, task in tasks.items()}
  return {input: arrays[input], "label": label, "index": arrays["index"]}


def normalize(image: jax.Array, normalisation: Normalisation | None) -> jax.Array:
  """Turn images of bytes into floats, standardised by the statistics of their data set.

  Args:
    image: `[..., height, width, channels]`; floats are returned as they are.
    normalisation: of the data set; None only divides by 255.

  Returns:
    float32 of the same shape.

  Raises:
    ValueError: the images have another number of channels than the statistics.

  Examples:
    >>> normalize(jnp.full((1, 1, 1), 255, jnp.uint8), Normalisation((0.5,), (0.25,))).item()
    2.0
  """
  if image.dtype != jnp.uint8:
    return image
  scaled = image / jnp.float32(255)
  if normalisation is None:
    return scaled
  channels = len(normalisation.mean)
  if image.shape[-1] != channels:
    raise ValueError(
      f"image has {image.shape[-1]} channels, shape {image.shape}, but the normalisation has {channels}; take that of "
      "its own data set"
    )
  mean, deviation = jnp.asarray(normalisation.mean), jnp.asarray(normalisation.deviation)
  return (scaled - mean) / deviation
