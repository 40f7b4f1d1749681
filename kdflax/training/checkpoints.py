"""Checkpoints: Orbax writes them, this module makes sure that what comes back is what was written.

One checkpoint is one atomic directory `<step>/`: the training state, and beside it, in the same commit, the position of
the data, whatever else the loop needs to continue, and a SHA-256 digest of every array. Orbax loads a file with flipped
bits without a word, so digests are verified on restore, and a checkpoint that fails is passed over for the one before.
"""

import json
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from kdflax.files import digest_of_text, digests

PyTree = Any
_TEMPORARY = "*.orbax-checkpoint-tmp"


class Restored(NamedTuple):
  """A verified checkpoint: its step, its arrays, and the JSON that was saved with them."""

  step: int
  arrays: PyTree
  extra: dict[str, Any]


class Checkpoints:
  """The checkpoints of one training run; a context manager that waits for the last save.

  Only one process group may write to a directory: lock the run directory (`RunDirectory`) before opening it.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep_latest: int = 2,
    best: Callable[[dict[str, float]], float] | None = None,
  ):
    """Opens the directory and removes what interrupted saves left behind.

    Args:
      directory: made if it does not exist.
      keep_latest: how many of the newest checkpoints stay.
      best: `metrics -> score`; the checkpoint with the highest score stays as well. The score sees only checkpoints
        saved with metrics.
    """
    self._directory = pathlib.Path(directory).absolute()
    for leftover in self._directory.glob(_TEMPORARY):
      shutil.rmtree(leftover)
    policies = ocp.training.preservation_policies
    keep: Any = policies.LatestN(keep_latest)
    if best is not None:
      score = lambda metrics: -np.inf if metrics is None else best(metrics)
      keep = policies.AnyPreservationPolicy(
        [keep, policies.BestN(get_metric_fn=score, n=1, reverse=False, keep_checkpoints_without_metrics=False)]
      )
    self._orbax = ocp.training.Checkpointer(str(self._directory), preservation_policy=keep)
    self._saving: Any = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: Any) -> None:
    try:
      self.wait()
    finally:
      self._orbax.close()

  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    return [checkpoint.step for checkpoint in self._orbax.checkpoints]

  def save(self, step: int, arrays: PyTree, extra: dict[str, Any] | None = None, metrics: Any = None) -> None:
    """Saves in the background; the arrays may be donated as soon as this returns.

    Args:
      step: number of the checkpoint.
      arrays: pytree of arrays (typed keys included).
      extra: JSON to come back with the arrays.
      metrics: scores for `best`.

    Raises:
      OSError: if the directory cannot be written to, at the latest at the next save or at the end.
    """
    document: dict[str, Any] = {"extra": extra or {}, "shapes": _shapes(arrays), "digests": digests(arrays)}
    document["digest"] = digest_of_text(json.dumps(document, sort_keys=True))
    self.wait()  # one save at a time: a second one would hold two copies of the state
    self._saving = self._orbax.save_checkpointables_async(
      step, {"state": arrays}, force=True, metrics=metrics, custom_metadata=document
    )

  def wait(self) -> None:
    """Waits until what was saved is on disk."""
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()  # ends its thread and its event loop as well, which nothing else does

  def restore(self, like: PyTree, step: int | None = None) -> Restored | None:
    """Loads the newest checkpoint whose every array is as it was saved, and deletes the newer ones that are not.

    Args:
      like: pytree of the structure, shapes, dtypes (and shardings, where given) to restore; arrays or
        `jax.ShapeDtypeStruct`.
      step: a step to load instead of the newest.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: if there are checkpoints but none of them is intact and fits.
    """
    failures: dict[int, str] = {}
    for found in [s for s in reversed(self.steps()) if step is None or s == step]:
      try:
        restored = self._verified(found, like)
      except Exception as error:  # whatever broke, an older checkpoint may be whole
        reason = f"step {found}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        logging.getLogger(__name__).warning("checkpoint in %s passed over, %s", self._directory, reason)
        failures[found] = reason
        continue
      for broken in failures:  # their steps will be saved again
        self._orbax.delete(broken)
      return restored
    if failures:
      raise ValueError(
        f"no checkpoint in {self._directory} is intact and fits the model; delete the directory to start again, or"
        " restore the configuration that wrote it:\n  " + "\n  ".join(failures.values())
      )
    return None

  def _verified(self, step: int, like: PyTree) -> Restored:
    metadata: Any = self._orbax.checkpointables_metadata(step).custom_metadata
    document = dict(metadata or {})
    claimed = document.pop("digest", None)
    if claimed != digest_of_text(json.dumps(document, sort_keys=True)):
      raise ValueError("its metadata are not as they were saved")
    here, wanted = document["shapes"], _shapes(like)
    for path in sorted(here.keys() | wanted.keys()):
      if here.get(path) != wanted.get(path):
        here, wanted = here.get(path, "absent"), wanted.get(path, "absent")
        raise ValueError(f"{path} is {here} here and {wanted} in the program")
    arrays = self._orbax.load_checkpointables(step, {"state": jax.tree.map(_abstract, like)})["state"]
    changed = [path for path, digest in digests(arrays).items() if document["digests"].get(path) != digest]
    if changed:
      raise ValueError(f"arrays are not as they were saved: {changed}")
    return Restored(step, arrays, document["extra"])


def _shapes(arrays: PyTree) -> dict[str, str]:
  return {jax.tree_util.keystr(p): f"{x.dtype}{list(x.shape)}" for p, x in jax.tree.leaves_with_path(arrays)}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
