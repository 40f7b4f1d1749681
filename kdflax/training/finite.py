"""What is not finite: found before it is saved, and said with the place where it came up."""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.model import PyTree
from kdflax.numerics.trees import name_of

_LOG = logging.getLogger(__name__)
_CURE = (
  "lower the learning rate, clip the gradients (optax.clip_by_global_norm), look at the examples of these batches, or"
  " let such updates be left out (make_learner(skip_not_finite=True))"
)


class Diverged(ArithmeticError):
  """The state or a loss is no longer finite; the checkpoints are from before."""


def not_finite(state: PyTree) -> list[str]:
  """Paths of the floating-point arrays that hold a NaN or an infinity, `params/student/kernel` say.

  Arrays on the host's own devices are looked at in place, by NumPy: it takes a millisecond for a million numbers, where
  compiling one program for a state of 200 arrays takes XLA up to a quarter of a minute. Elsewhere each shape is
  compiled once, and only the answers travel.
  """
  floating = lambda leaf: jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)
  leaves = [(path, leaf) for path, leaf in jax.tree.leaves_with_path(state) if floating(leaf)]
  answers = jax.device_get([_finite(leaf) for _, leaf in leaves])
  return [name_of(path, "/") for (path, _), finite in zip(leaves, answers, strict=True) if not finite]


def check_state(phase: str, state: PyTree, exempt: Collection[str], place: str) -> None:
  """Raises `Diverged` if arrays are not finite that were so at the start.

  Args:
    phase: the name of the training.
    state: to look at.
    exempt: paths of arrays that began with infinities, as the best value of an optimizer may.
    place: where it came up, for the message.
  """
  lost = [name for name in not_finite(state) if name not in exempt]
  if lost:
    raise Diverged(f"{phase} diverged {place}: {_some(lost)} of the state are no longer finite; {_CURE}")


def exempt_at_start(phase: str, state: PyTree) -> list[str]:
  """Paths of arrays that hold infinities, but no NaN, before the first step.

  Raises:
    Diverged: if the state holds a NaN already.
  """
  suspects = set(not_finite(state))
  for path, leaf in jax.tree.leaves_with_path(state) if suspects else ():
    if name_of(path, "/") in suspects and bool(jnp.isnan(leaf).any()):
      raise Diverged(f"{phase} cannot begin: {name_of(path, '/')} of the state holds NaN; initialise it anew")
  return sorted(suspects)


def check_losses(phase: str, row: Mapping[str, Any], watched: Collection[str], place: str) -> None:
  """Raises `Diverged` if a mean is not finite, unless the learner says itself what it makes of such losses.

  Args:
    phase: the name of the training.
    row: means by name. One of `skipped` or `present/<row>` says that the learner leaves out what is not finite.
    watched: names that may be infinite or NaN.
    place: where it came up, for the message.
  """
  if any(name == "skipped" or name.startswith("present/") for name in row):
    return
  lost = [name for name, value in row.items() if name not in watched and not _all_finite(value)]
  if lost:
    raise Diverged(
      f"{phase} diverged {place}: the means of {_some(lost)} are not finite, though the state still is; {_CURE}. Where"
      " a Term that only watches (of weight 0) may be infinite, name it: Logging(watched=(...))"
    )


class AbsentRows:
  """Warns, once for each, of rows that took part in no update of an interval of the log, and of updates all skipped."""

  def __init__(self, phase: str):
    self._phase, self._said = phase, set()

  def look(self, row: Mapping[str, Any], place: str) -> None:
    """Looks at the means of `present/<row>` and `skipped`."""
    for name, value in row.items():
      if name.startswith("present/") and name not in self._said and not np.all(value):
        self._said.add(name)
        _LOG.warning(
          "%s: the row %r took part in no update %s; it has no examples, weight 0, or a loss or gradient that is not"
          " finite (a broken teacher, say)",
          self._phase,
          name.removeprefix("present/"),
          place,
        )
      if name == "skipped" and name not in self._said and np.any(np.asarray(value) >= 1):
        self._said.add(name)
        _LOG.warning("%s: every update %s was skipped, as it was not finite; nothing is learned", self._phase, place)


def _finite(leaf: Any) -> Any:
  """Whether all elements are finite: on the host at once, elsewhere as an array that is still computed."""
  if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and leaf.sharding.device_set <= set(_host_devices()):
    # Of new arrays: what NumPy sees of the leaf itself would stay with it, and keep its buffer from being donated.
    parts = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    return all(np.isfinite(part).all() for part in parts)
  return _finite_there(leaf)


_finite_there = jax.jit(lambda leaf: jnp.isfinite(leaf).all())


def _host_devices() -> list[Any]:
  return jax.devices("cpu")


def _all_finite(value: Any) -> bool:
  return math.isfinite(value) if isinstance(value, int | float) else bool(np.isfinite(value).all())


def _some(names: list[str]) -> str:
  return f"{', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
