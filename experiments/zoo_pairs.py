"""The pairs of the zoo: recipes, published accuracies, networks by name, and batches with augmentation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.networks import FLAT, network, read_one_task
from kdflax import data, methods, models, training


class Recipe(NamedTuple):
  """How networks are trained on a data set: SGD with momentum 0.9, the rate a tenth at three places, as published."""

  pair: tuple[str, str]
  teacher_steps: int
  student_steps: int
  batch_size: int
  learning_rate: float
  clip: float = float("inf")  # of the global norm of the gradient
  shift: int = 0  # pixels
  flip: bool = False
  chosen: tuple[str, ...] = ()  # methods to compare, if not all


# Of each kind a few: logits, features and maps, relations, contrast.
CHOSEN = (
  "kl_soft_targets",
  "dkd",
  "dist",
  "standardize_logits",
  "reverse_kl",
  "hint",
  "cosine",
  "attention_transfer",
  "vid",
  "similarity_preserving",
  "pkt",
  "rkd_distance",
  "crd",
)
RECIPES = {
  "glyphs": Recipe(("convnet-8-16-32-flat", "convnet-2-4-4-flat"), 600, 300, 64, 0.05, clip=5.0, chosen=CHOSEN),
  "digits": Recipe(("convnet-16-32", "convnet-4-8"), 600, 600, 64, 0.05, clip=5.0),
  # 240 epochs of 50000 images, as RepDistiller and mdistiller train every pair below.
  "cifar100": Recipe(("resnet56", "resnet20"), 187_500, 187_500, 64, 0.05, shift=4, flip=True),
}

# Top-1 accuracy on CIFAR-100: RepDistiller's README; DKD mdistiller's; the last three logit-standardization-KD's.
PUBLISHED = """
  method                  resnet56-resnet20  resnet32x4-resnet8x4  resnet110-resnet32
  teacher                             72.34                 79.42               74.31
  baseline                            69.06                 72.50               71.14
  kl_soft_targets                     70.66                 73.33               73.08
  hint                                69.21                 73.50               71.06
  attention_transfer                  70.55                 73.44               72.31
  similarity_preserving               69.67                 72.94               72.69
  correlation_congruence              69.63                 72.97               71.48
  vid                                 70.38                 73.09               72.61
  pkt                                 70.34                 73.64               72.61
  activation_boundary                 69.47                 73.17               70.98
  factor_transfer                     69.84                 72.86               72.37
  fsp                                 69.95                 72.62               71.89
  nst                                 69.60                 73.30               71.96
  crd                                 71.16                 75.51               73.48
  rkd                                 69.61                 71.90               71.82
  dkd                                 71.97                 76.32               74.11
  standardize_logits                  71.43                 76.62               74.17
  ctkd                                71.19                 73.39               73.52
  mlkd                                72.19                 77.08               74.11
"""


def published(pair: tuple[str, str]) -> dict[str, float]:
  """Returns the published accuracies of a pair on CIFAR-100 in percent by method; none for other pairs."""
  (_, *pairs), *rows = (line.split() for line in PUBLISHED.strip().splitlines())
  name = "-".join(pair)
  return {method: float(numbers[pairs.index(name)]) for method, *numbers in rows} if name in pairs else {}


def load(config: Any) -> dict[str, Any]:
  """Reads the data set of a config; `row` counts the examples of a split."""
  splits = read_one_task(config)
  kept = {name: {key: split[key] for key in ("image", "label")} for name, split in splits.items()}
  return {name: split | {"row": np.arange(len(split["label"]), dtype=np.int32)} for name, split in kept.items()}


def classifier(name: str, dataset: str) -> models.Model:
  """A network by its name for a data set.

  Raises:
    ValueError: if there is no such network, or it has fewer than two stages of maps.
  """
  known = data.dataset(dataset)
  model = network(name, max(task.classes or 0 for task in known.tasks.values()), known.normalisation)
  if name.startswith("mlp") or (name.startswith("convnet") and name.removesuffix(FLAT).count("-") < 2):
    raise ValueError(f"{name} has fewer than two stages of feature maps, which the methods compare")
  return model


def draw_augmented(arrays: Any, key: jax.Array, step: jax.Array, *, size: int, shift: int, flip: bool) -> Any:
  """A batch from the device, its images shifted with zeros moving in, and mirrored in half of the cases."""
  batch = data.sample(arrays, key, step, size=size)
  image = batch["image"]
  key = jax.random.fold_in(training.named_key(key, "augmentation"), step)
  if shift:
    padded = jnp.pad(image, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    corners = jax.random.randint(training.named_key(key, "shift"), (size, 2), 0, 2 * shift + 1)
    crop = lambda one, corner: jax.lax.dynamic_slice(one, (*corner, 0), image.shape[1:])
    image = jax.vmap(crop)(padded, corners)
  if flip:
    mirrored = jax.random.bernoulli(training.named_key(key, "flip"), shape=(size, 1, 1, 1))
    image = jnp.where(mirrored, image[:, :, ::-1], image)
  return batch | {"image": image}


def pair_of(student: models.Model, teacher: models.Model, arrays: Any) -> methods.Pair:
  """Reads the shapes of the maps off the networks."""
  pair = methods.pair(student, teacher, jax.tree.map(lambda x: x[:2], arrays))
  sizes = [_sizes(side) for side in (pair.student, pair.teacher)]
  if sizes[0] != sizes[1]:
    raise ValueError(
      f"the maps of teacher and student must have the same sizes; student {sizes[0]}, teacher {sizes[1]}"
    )
  return pair


def _sizes(side: methods.Side) -> dict[str, tuple[int, ...]]:
  return {name: shape.shape[1:3] for name, shape in side.outputs["features"].items() if name[-1].isdigit()}
