"""One line of the contract suite: a loss, its NumPy reference and inputs to try both on."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """A public loss under test.

  Attributes:
    loss: the function in `kdflax.losses`.
    reference: the same mathematics in NumPy, from the paper's formula: `(*arrays, **hyper, **static) -> [batch]`.
    inputs: `(rng, batch) -> arrays`, the positional arguments as float64 (or integer) arrays, examples first.
    hyper: hyper-parameters that may be traced.
    static: hyper-parameters that must not be traced.
    compares: the loss compares examples with each other and takes `axis_name`.
    kind: "logits" or "features": decides the degenerate inputs.
    students, teachers: positions of the student's arrays and of the teacher's, pair by pair.
    zero_at_equality: the loss and its gradient are 0 where student equals teacher.
    hessian: second derivatives exist at generic inputs.
    scales: the least and the largest scale of float32 features from which value and gradient keep their digits.
    label: told apart from other cases of the same loss.
  """

  loss: Callable
  reference: Callable
  inputs: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
  hyper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  compares: bool = False
  kind: str = "features"
  students: tuple[int, ...] = (0,)
  teachers: tuple[int, ...] = (1,)
  zero_at_equality: bool = True
  hessian: bool = True
  scales: tuple[float, float] = (1e-15, 1e15)
  label: str = ""

  def __str__(self):
    return self.loss.__name__ + (f"-{self.label}" if self.label else "")


def pairs_of(*shape, teacher=None):
  """Inputs of a student and a teacher of normal entries; `teacher` is the teacher's trailing shape if it differs."""

  def inputs(rng, batch):
    return rng.normal(size=(batch, *shape)), rng.normal(size=(batch, *(teacher or shape)))

  return inputs


def in_float32_and_float64(function, *arrays):
  """What a function of float32 arrays returns, and what it returns of the same numbers in float64."""
  got = function(*arrays)
  with jax.enable_x64(True):
    return got, function(*(jnp.float64(array) for array in arrays))
