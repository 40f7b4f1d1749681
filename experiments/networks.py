"""Networks that experiments name on the command line, for images of floats or of bytes."""

import jax
import jax.numpy as jnp

from kdflax import models


def network(name: str, num_classes: int | None) -> models.Model:
  """Makes a network from its name; one without classes is an encoder.

  Args:
    name: `resnet20`, `mlp-256` with the widths of its hidden layers, or `convnet-16-32` with the channels of its
      stages.
    num_classes: width of the logits, or None.

  Raises:
    ValueError: if there is no such network.
  """
  kind, widths = _parsed(name)
  if kind == "mlp":
    return _of_bytes(models.mlp(widths, num_classes))
  if kind == "convnet":
    return _of_bytes(models.convnet(widths, num_classes))
  return _of_bytes(models.resnet(name, num_classes))


def embedding_width(name: str) -> int:
  """Width of the embedding of a network, from its name."""
  return _parsed(name)[1][-1]


def _parsed(name: str) -> tuple[str, tuple[int, ...]]:
  kind, *widths = name.split("-")
  if kind in ("mlp", "convnet") and widths and all(width.isdigit() and int(width) for width in widths):
    return kind, tuple(map(int, widths))
  if name not in models.RESNETS:
    known = f"mlp-256 with its hidden layers, convnet-16-32 with its stages, or {', '.join(models.RESNETS)}"
    raise ValueError(f"no network {name!r}: name {known}")
  return name, models.RESNETS[name][1]


def _of_bytes(model: models.Model) -> models.Model:
  """The model on images that may be bytes, which are standardised with the statistics of CIFAR-100."""

  def prepare(batch):
    return batch | {"image": _standardized(batch["image"])}

  def apply(params, state, batch, *, train, key=None):
    return model.apply(params, state, prepare(batch), train=train, key=key)

  return models.Model(lambda key, batch: model.init(key, jax.eval_shape(prepare, batch)), apply)


def _standardized(image: jax.Array) -> jax.Array:
  if image.dtype != jnp.uint8:
    return image
  mean, deviation = jnp.asarray([0.5071, 0.4867, 0.4408]), jnp.asarray([0.2675, 0.2565, 0.2761])
  return (image / jnp.float32(255) - mean) / deviation
