"""What losses on features and maps `[batch, ..., channels]` share: checks, one size for both, positions in a row."""

import math

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import as_features, check_broadcasts, check_same
from kdflax.numerics.pooling import pool_to_common_size


def check_maps(**maps: jax.Array) -> None:
  """Raises a ValueError unless all are maps with the same number of axes."""
  shapes = {name: jnp.shape(features) for name, features in maps.items()}
  if min(map(len, shapes.values())) < 3 or len(set(map(len, shapes.values()))) > 1:
    shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(f"{' and '.join(shapes)} must all be maps [batch, ..., channels]; got {shown}")


def check_channels(**maps: jax.Array) -> None:
  """Raises a ValueError unless all have the same last axis."""
  channels = {name: jnp.shape(features)[-1:] for name, features in maps.items()}
  check_same("channels, the last axis (or a connector between them)", **channels)


def map_pair(student: jax.Array, teacher: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Two maps with the same number of positions: the larger pooled to the smaller."""
  check_maps(student=student, teacher=teacher)
  student, teacher = as_features(where, student=student, teacher=teacher)
  return pool_to_common_size(student, teacher)


def in_a_row(features: jax.Array) -> jax.Array:
  """`[batch, ..., channels] -> [batch, positions, channels]`."""
  return features.reshape(features.shape[0], math.prod(features.shape[1:-1]), features.shape[-1])


def same_shape(where: jax.Array | None, **features: jax.Array) -> list[jax.Array]:
  """Features, checked to have one shape, in float32 or wider and with zeros for what is masked."""
  check_same("shape (or a connector between them)", **{name: jnp.shape(array) for name, array in features.items()})
  return as_features(where, **features)


def like_teacher(teacher: jax.Array, **parameters: jax.Array | float) -> jax.Array:
  """A parameter of the teacher's feature in its dtype, checked to broadcast against it."""
  ((name, parameter),) = parameters.items()
  check_broadcasts(name, jnp.shape(parameter), "the teacher", teacher.shape)
  return jnp.asarray(parameter, teacher.dtype)
