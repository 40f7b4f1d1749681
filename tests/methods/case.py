"""A small pair of convolutional networks and what every method of the catalogue is given for it."""

import functools

import jax
import numpy as np

from kdflax import methods, models

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(3, size=12)
BATCH = {
  "image": RANDOM.normal(size=(5, 6, 6, 1)).astype(np.float32),
  "label": LABELS[:5],
  "index": np.arange(5),
}
STUDENT, TEACHER = models.convnet((3, 4), 3), models.convnet((4, 6), 3)


@functools.cache
def pair() -> methods.Pair:
  return methods.pair(STUDENT, TEACHER, BATCH)


@functools.cache
def frozen():
  """(params, state) of the teacher."""
  return jax.jit(TEACHER.init)(jax.random.key(1), BATCH)


def given(name):
  """The keyword arguments that an entry of the catalogue needs, in small."""
  params, _ = frozen()
  everything = {"num_examples": len(LABELS), "head": params["head"]}
  chosen = {key: everything[key] for key in methods.CATALOGUE[name].takes}
  small = {
    "crd": {"labels": LABELS, "negatives": 6, "width": 4},
    "similarity_distribution": {"queue": 7},
    "mlkd": {"temperatures": (2.0,)},
  }
  return chosen | small.get(name, {})
