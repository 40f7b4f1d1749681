"""The pairs of the zoo: recipes, published accuracies, networks by name, and batches with augmentation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import phases
from experiments.networks import network, read
from experiments.zoo_methods import Pair
from kdflax import data, losses, models, training


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


RECIPES = {
  "digits": Recipe(("convnet-16-32", "convnet-4-8"), 600, 600, 64, 0.05, clip=5.0),
  # 240 epochs of 50000 images, as RepDistiller and mdistiller train every pair below.
  "cifar100": Recipe(("resnet56", "resnet20"), 187_500, 187_500, 64, 0.05, shift=4, flip=True),
}

# Top-1 accuracy on CIFAR-100: RepDistiller's README; DKD mdistiller's, standardize_logits logit-standardization-KD's.
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
  dkd                                 71.97                 76.32               74.11
  standardize_logits                  71.43                 76.62               74.17
"""


def published(pair: tuple[str, str]) -> dict[str, float]:
  """Returns the published accuracies of a pair on CIFAR-100 in percent by method; none for other pairs."""
  (_, *pairs), *rows = (line.split() for line in PUBLISHED.strip().splitlines())
  name = "-".join(pair)
  return {method: float(numbers[pairs.index(name)]) for method, *numbers in rows} if name in pairs else {}


def load(config: Any) -> dict[str, Any]:
  """Reads the data set of a config; `row` counts the examples of a split."""
  splits = read(config)
  kept = {name: {key: split[key] for key in ("image", "label")} for name, split in splits.items()}
  return {name: split | {"row": np.arange(len(split["label"]), dtype=np.int32)} for name, split in kept.items()}


def classifier(name: str, dataset: str) -> models.Model:
  """A network by its name for a data set, that also returns `class_maps`, its head at each position.

  Raises:
    ValueError: if there is no such network, or it has fewer than two stages of maps.
  """
  known = data.dataset(dataset)
  inner = network(name, max(task.classes or 0 for task in known.tasks.values()), known.normalisation)
  if name.startswith("mlp") or (name.startswith("convnet") and name.count("-") < 2):
    raise ValueError(f"{name} has fewer than two stages of feature maps, which the methods compare")

  def apply(params, state, batch, *, train, key=None):
    outputs, state = inner.apply(params, state, batch, train=train, key=key)
    last = max(stage for stage in outputs["features"] if stage.startswith("stage") and not stage.endswith("_pre"))
    return outputs | {"class_maps": outputs["features"][last] @ params["head"]["kernel"]}, state

  return models.Model(inner.init, apply)


def draw_augmented(arrays: Any, key: jax.Array, step: jax.Array, *, size: int, shift: int, flip: bool) -> Any:
  """A batch from the device, its images shifted with zeros moving in, and mirrored in half of the cases."""
  batch = phases.draw(arrays, key, step, size)
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


def pair_of(student: models.Model, teacher: models.Model, arrays: Any) -> Pair:
  """Reads the shapes of the maps off the networks."""
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), arrays)

  def maps(model: models.Model) -> dict[str, tuple[int, int, int]]:
    def features(batch):
      return model.apply(*model.init(jax.random.key(0), batch), batch, train=False, key=None)[0]["features"]

    shapes = jax.eval_shape(features, batch)
    return {name: shapes[name].shape[1:] for name in sorted(shapes) if name[-1].isdigit()}

  pair = Pair(maps(student), maps(teacher), np.asarray(arrays["label"]))
  sizes = [{stage: shape[:2] for stage, shape in side.items()} for side in (pair.student, pair.teacher)]
  if sizes[0] != sizes[1]:
    raise ValueError(
      f"the maps of teacher and student must have the same sizes; student {sizes[0]}, teacher {sizes[1]}"
    )
  return pair


def margins(params: Any, stages: tuple[str, ...]) -> dict[str, jax.Array]:
  """`ofd_margin` of the last batch normalisation before the ReLU of each stage, [seeds, channels]."""
  found = {}
  for index, stage in enumerate(stages):
    block = params["stages"][str(index)]
    norm = block["norm"] if "norm" in block else block[max(block, key=int)]["second"]["norm"]
    found[stage] = losses.ofd_margin(norm["scale"], norm["bias"])
  return found
