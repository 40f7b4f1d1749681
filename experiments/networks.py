"""Networks and data sets that experiments name on the command line."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdflax import data, models

# Of how a data set is read: large families would outweigh all others, and two cores would be busy for an hour.
SETTINGS: dict[str, dict[str, Any]] = {"glyphs": {"faces_per_family": 4}}


FLAT = "-flat"
# What to learn of a data set of several tasks, if not all. One image hardly shows a fixed pitch, and the width is
# normal for nine faces in ten.
TASKS = {"glyphs": ("character", "italic", "weight")}


def tasks_of(name: str) -> dict[str, data.Task]:
  """The tasks that experiments learn together on a data set."""
  known = data.dataset(name).tasks
  return {task: known[task] for task in TASKS.get(name, known)}


def network(name: str, num_classes: int | None, normalisation: data.Normalisation | None = None) -> models.Model:
  """Makes a network from its name; one without classes is an encoder.

  Args:
    name: `resnet20`, `mlp-256` with the widths of its hidden layers, or `convnet-16-32` with the channels of its
      stages; `convnet-16-32-flat` keeps the positions of the last one.
    num_classes: width of the logits, or None.
    normalisation: of the data set, for images of bytes.

  Raises:
    ValueError: if there is no such network.
  """
  kind, widths = _parsed(name.removesuffix(FLAT))
  if kind == "mlp":
    return normalized(models.mlp(widths, num_classes), normalisation)
  if kind == "convnet":
    return normalized(models.convnet(widths, num_classes, pool=not name.endswith(FLAT)), normalisation)
  return normalized(models.resnet(name, num_classes), normalisation)


def embedding_width(name: str, arrays: data.Arrays) -> int:
  """Width of the embedding of a network, from its name and the images it is for."""
  model, example = network(name, None), jax.tree.map(lambda x: x[:1], {"image": arrays["image"]})
  say = lambda key: model.apply(*model.init(key, example), example, train=False, key=None)[0]
  return jax.eval_shape(say, jax.random.key(0))["embedding"].shape[-1]


def _parsed(name: str) -> tuple[str, tuple[int, ...]]:
  kind, *widths = name.split("-")
  if kind in ("mlp", "convnet") and widths and all(width.isdecimal() and int(width) for width in widths):
    return kind, tuple(map(int, widths))
  if name not in models.RESNETS:
    known = f"mlp-256 with its hidden layers, convnet-16-32 with its stages, or {', '.join(models.RESNETS)}"
    raise ValueError(f"no network {name!r}: name {known}")
  return name, models.RESNETS[name][1]


def normalized(model: models.Model, normalisation: data.Normalisation | None) -> models.Model:
  """The model on images that may be bytes, which are normalised as `data.normalize` does."""

  def prepare(batch):
    return batch | {"image": data.normalize(batch["image"], normalisation)}

  def apply(params, state, batch, *, train, key=None):
    return model.apply(params, state, prepare(batch), train=train, key=key)

  return models.Model(lambda key, batch: model.init(key, jax.eval_shape(prepare, batch)), apply)


def read(config: Any) -> dict[str, data.Arrays]:
  """Reads the splits of the data set that a config names.

  Args:
    config: with `dataset`, `path` and `held_out`: the training examples to keep for validation.
  """
  settings = {"path": config.path} if config.path else dict(SETTINGS.get(config.dataset, {}))
  return data.load(config.dataset, **settings | ({"validation": config.held_out} if config.held_out else {}))


def largest_task(name: str) -> str:
  """The task of a data set with the most classes, by its name."""
  tasks = data.dataset(name).tasks
  return max(tasks, key=lambda task: tasks[task].classes or 0)


def read_one_task(config: Any) -> dict[str, data.Arrays]:
  """Reads the splits that a config names, with the labels of their largest task under `label`.

  Args:
    config: as `read` takes it.
  """
  name = largest_task(config.dataset)
  tasks = {name: data.dataset(config.dataset).tasks[name]}
  splits = {split: data.by_task(arrays, tasks) for split, arrays in read(config).items()}
  return {split: arrays | {"label": arrays["label"][name]} for split, arrays in splits.items()}


def standardized(splits: dict[str, data.Arrays]) -> dict[str, data.Arrays]:
  """Splits by task whose regressions have mean 0 and deviation 1 on the training examples; classes stay."""
  training = splits["train"]["label"]
  scales = {
    task: (labels.mean(), labels.std()) for task, labels in training.items() if np.issubdtype(labels.dtype, np.floating)
  }
  return {
    split: arrays
    | {"label": arrays["label"] | {task: (arrays["label"][task] - mean) / std for task, (mean, std) in scales.items()}}
    for split, arrays in splits.items()
  }


def few_glyphs(tasks: Mapping[str, data.Task], labels: int, seed: int) -> dict[str, data.Arrays]:
  """Reads the splits of the glyphs by task, normalised, with as many training images as there are labels.

  Args:
    tasks: of the data set; the labels of a regression are standardised by those of the training images.
    labels: training images, equally many of each character.
    seed: of their choice.
  """
  splits = {split: data.by_task(arrays, tasks) for split, arrays in data.load("glyphs", **SETTINGS["glyphs"]).items()}
  chosen = data.with_label_budget(splits["train"], labels, seed=seed, task="character")["labelled"]
  splits["train"] = data.gather(splits["train"], np.flatnonzero(chosen))
  normalisation = data.dataset("glyphs").normalisation
  return {
    split: arrays | {"image": np.asarray(data.normalize(jnp.asarray(arrays["image"]), normalisation))}
    for split, arrays in standardized(splits).items()
  }


def check_dataset(config: Any, known: Sequence[str]) -> None:
  """Raises a ValueError unless `dataset`, `path` and `held_out` of a config fit together and to its experiment.

  Args:
    config: of an experiment.
    known: data sets that it has settings for.
  """
  if config.dataset not in known:
    raise ValueError(f"dataset={config.dataset!r} is not for this experiment, which takes {', '.join(known)}")
  if config.held_out < 0:
    raise ValueError(f"held_out must be at least 0; got {config.held_out}")
  files = data.dataset(config.dataset).files
  if config.held_out and not files:
    from_files = ", ".join(name for name in known if data.dataset(name).files)
    raise ValueError(
      f"held_out={config.held_out} is for {from_files}; {config.dataset} has a validation split of its own"
    )
  if files and not config.path:
    raise ValueError(f"dataset={config.dataset!r} needs path: a folder with {files}; of {', '.join(known)}")
  if config.path and not files:
    raise ValueError(f"path={config.path!r} is for data read from files; {config.dataset} needs none")


def forwarded(config: Any) -> Any:
  """Returns a config in which `cifar`, the setting of version 0.1, is said as `dataset` and `path`; goes with 0.3."""
  if not config.cifar:
    return config
  warnings.warn(f"--cifar goes with version 0.3: --dataset cifar100 --path {config.cifar}", FutureWarning, stacklevel=3)
  return dataclasses.replace(config, dataset="cifar100", path=config.cifar, cifar="")


def check_widths(**layers: Sequence[int]) -> None:
  """Raises a ValueError that names the first setting in which a layer has no positive width."""
  for name, widths in layers.items():
    if any(width < 1 for width in widths):
      raise ValueError(f"{name} must be widths of at least 1; got {tuple(widths)}")
