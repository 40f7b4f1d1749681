"""Many settings of one training as one program: weights, temperatures, learning rates, or anything that is a number."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdflax import training

PyTree = Any

# Where the settings are counted in a state. All share step and key, so what depends on these alone, the batches and a
# frozen teacher, is worked out once and not for each setting.
_AXES = training.TrainState(step=None, params=0, model_state=0, opt_state=0, balancer_state=0, averages=0, key=None)  # type: ignore[arg-type]


def sweep(make: Callable[[PyTree], training.Learner], settings: PyTree) -> training.Learner:
  """Returns one learner that trains a network for each setting, all from the same weights and batches.

  Args:
    make: `setting -> learner`; the numbers of a setting are traced, so they may be weights of Terms, temperatures and
      learning rates, but no shapes.
    settings: a pytree of arrays `[settings]`, as `grid` makes it.
  """

  def init(*arguments: PyTree) -> training.TrainState:
    return jax.vmap(lambda setting: make(setting).init(*arguments), out_axes=_AXES)(settings)

  def step(state: training.TrainState, *arguments: PyTree) -> tuple[training.TrainState, Any]:
    one = lambda state, setting: make(setting).step(state, *arguments)
    return jax.vmap(one, in_axes=(_AXES, 0), out_axes=(_AXES, 0))(state, settings)

  return training.Learner(init, step)


def grid(**values: Sequence[float]) -> dict[str, np.ndarray]:
  """Every combination of some values, by name: arrays `[settings]`, the last name changing fastest."""
  return {name: axis.ravel() for name, axis in zip(values, np.meshgrid(*values.values(), indexing="ij"), strict=True)}


def setting_at(settings: Mapping[str, np.ndarray], index: int) -> dict[str, float]:
  """One setting of a grid."""
  return {name: float(axis[index]) for name, axis in settings.items()}
