"""Checkpoints: Orbax writes them, this module makes sure that what comes back is what was written.

One checkpoint is one atomic directory `<step>/`: the training state, and beside it, in the same commit, its step, its
scores, the position of the data, whatever else the loop needs to continue, and a SHA-256 digest of every array. Orbax
loads a file with flipped bits without a word, so digests are verified on restore, and a checkpoint that fails is passed
over for the one before.
"""

import contextlib
import errno
import json
import logging
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from kdflax.files import DiskFull, digest_of_text, digests
from kdflax.model import PyTree

Score = Callable[[dict[str, Any]], float]
_TEMPORARY = "*.orbax-checkpoint-tmp"
_ASIDE = ".damaged"
_FULL = ("No space left on device", "Disk quota exceeded")  # how TensorStore, too, says it, in a ValueError
_LOG = logging.getLogger(__name__)


class Restored(NamedTuple):
  """A verified checkpoint: its step, its arrays, and the JSON that was saved with them."""

  step: int
  arrays: PyTree
  extra: dict[str, Any]
  metrics: dict[str, Any] | None = None


def read_checkpoint(directory: str | pathlib.Path) -> Restored:
  """Reads one checkpoint without a program that fits it, and verifies it; writes nothing, so a run may go on beside it.

  Args:
    directory: of one step, such as `runs/example/checkpoints/100`.

  Returns:
    The checkpoint, with its arrays on the first device as nested dicts and lists, and the metrics if it has some.

  Raises:
    ValueError: if it is not as it was saved.
    OSError: if it cannot be read.
  """
  directory = pathlib.Path(directory).absolute()
  if not (directory / "_CHECKPOINT_METADATA").is_file():
    raise ValueError(f"{directory} is no checkpoint; name the folder of a step, such as checkpoints/100")
  metadata = ocp.checkpointables_metadata(str(directory))
  document = _verified_document(metadata, int(directory.name) if directory.name.isdigit() else None)
  abstract = jax.tree.map(_abstract, metadata.metadata["state"])
  arrays = ocp.load_checkpointables(str(directory), {"state": abstract})["state"]
  found = {_names(path): digest for path, digest in digests(arrays).items()}
  saved = {_names(p): d for p, d in document["digests"].items() if not _is_empty(document["shapes"][p])}
  if changed := sorted("/".join(path) for path in found.keys() | saved if found.get(path) != saved.get(path)):
    raise ValueError(f"arrays are not as they were saved: {', '.join(changed)}")
  return Restored(document["step"], arrays, document["extra"], document.get("metrics"))


class Checkpoints:
  """The checkpoints of one training run; a context manager that waits for the last save.

  Only one process group may write to a directory: lock the run directory (`RunDirectory`) before opening it.
  """

  def __init__(self, directory: str | pathlib.Path, *, keep_latest: int = 2, best: Score | None = None):
    """Opens the directory and removes what interrupted saves left behind.

    Args:
      directory: made if it does not exist.
      keep_latest: how many of the newest checkpoints stay.
      best: `metrics -> score`; the checkpoint with the highest score stays as well. The score sees only checkpoints
        saved with metrics, as `fit` saves those at which it evaluates. One whose score is NaN is never the best, and
        never takes its place.

    Raises:
      ValueError: if `keep_latest` < 1.
    """
    if keep_latest < 1:
      raise ValueError(f"keep_latest must be at least 1, or nothing could be resumed; got {keep_latest}")
    self._directory = pathlib.Path(directory).absolute()
    self._best, self._keep_latest = best, keep_latest
    self._scores: dict[int, float] = {}
    self._saving: Any = None
    self._remove_leftovers()
    self._orbax = self._open()
    logging.getLogger("absl").addFilter(_is_not_orbax_failing)
    if best is not None:
      for step in self.steps():
        self._read_score(step)

  def _open(self) -> Any:
    """Opens the directory. One damaged checkpoint would stop Orbax, so such a one gets a name that Orbax ignores."""
    attempt = lambda: ocp.training.Checkpointer(str(self._directory), preservation_policy=_Keep(self._kept))
    try:
      return attempt()
    except Exception:
      for step in self._on_disk():
        try:
          ocp.checkpointables_metadata(str(self._directory / str(step)))
        except Exception as error:
          _LOG.warning("checkpoint %s in %s is damaged: %s", step, self._directory, error)
          (self._directory / str(step)).rename(self._directory / f"{step}{_ASIDE}")
      return attempt()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: Any) -> None:
    try:
      self.wait()
    except BaseException:
      with contextlib.suppress(Exception):  # what failed once fails again, in other words
        self._orbax.close()
      raise
    else:
      self._orbax.close()
    finally:
      logging.getLogger("absl").removeFilter(_is_not_orbax_failing)

  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    return [checkpoint.step for checkpoint in self._orbax.checkpoints]

  def best_step(self) -> int | None:
    """The step of the checkpoint with the highest score, the later one of equals; None if none has a score.

    Raises:
      ValueError: if the checkpoints were opened without `best`.
    """
    if self._best is None:
      raise ValueError("these checkpoints have no score; open them with best=lambda metrics: metrics['accuracy'], say")
    return _highest(self._scores, self.steps())

  def save(
    self,
    step: int,
    arrays: PyTree,
    extra: dict[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
  ) -> None:
    """Saves in the background; the arrays may be donated as soon as this returns.

    Args:
      step: number of the checkpoint.
      arrays: pytree of arrays (typed keys included).
      extra: JSON to come back with the arrays.
      metrics: scores for `best`.

    Raises:
      DiskFull: if there is no room left on the disk.
      OSError: if the directory cannot be written to. Both at the latest at the next save or at the end.
    """
    document: dict[str, Any] = {"step": step, "extra": extra or {}, "shapes": _shapes(arrays)}
    document["digests"] = digests(arrays)
    if metrics is not None:
      document["metrics"] = dict(metrics)
      if self._best is not None:
        self._scores[step] = float(self._best(dict(metrics)))
    document["digest"] = digest_of_text(json.dumps(document, sort_keys=True))
    self.wait()  # one save at a time: a second one would hold two copies of the state
    try:
      self._saving = self._orbax.save_checkpointables_async(
        step, {"state": _without_empty(arrays)}, force=True, custom_metadata=document
      )
    except Exception as error:
      self._fail(error)

  def wait(self) -> None:
    """Waits until what was saved is on disk.

    Raises:
      DiskFull: as `save`.
      OSError: as `save`.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      try:
        saving.result()  # ends its thread and its event loop as well, which nothing else does
      except Exception as error:
        self._fail(error)

  def restore(self, like: PyTree, step: int | str | None = None) -> Restored | None:
    """Loads the newest checkpoint whose every array is as it was saved, and deletes the newer ones that are not.

    Args:
      like: pytree of the structure, shapes, dtypes (and shardings, where given) to restore; arrays or
        `jax.ShapeDtypeStruct`.
      step: a step to load instead of the newest, or `"best"` for the one that `best_step` names.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: if there are checkpoints but none of them is intact and fits, or there is no best one.
    """
    if isinstance(step, str):
      if step != "best":
        raise ValueError(f'step must be a number, "best", or None for the newest; got {step!r}')
      step = self.best_step()
      if step is None:
        raise ValueError(f"no checkpoint in {self._directory} has a score; save some with metrics")
    self.wait()
    failures: dict[Any, str] = {}
    for found in [s for s in reversed(self.steps()) if step is None or s == step]:
      try:
        restored = self._verified(found, like)
      except Exception as error:  # whatever broke, an older checkpoint may be whole
        reason = f"step {found}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _LOG.warning("checkpoint in %s passed over, %s", self._directory, reason)
        failures[found] = reason
        continue
      for broken in failures:  # their steps will be saved again
        self._orbax.delete(broken)
      for broken in self._directory.glob(f"*{_ASIDE}"):
        shutil.rmtree(broken)
      return restored
    failures |= {path.name: f"{path.name}: its metadata are damaged" for path in self._directory.glob(f"*{_ASIDE}")}
    if failures:
      raise ValueError(
        f"no checkpoint in {self._directory} is intact and fits the model; delete the directory to start again, or"
        " restore the configuration that wrote it:\n  " + "\n  ".join(failures.values())
      )
    return None

  def _document(self, step: int) -> dict[str, Any]:
    """What was saved beside the arrays, verified.

    Raises:
      Exception: of any kind, as the file may hold anything.
    """
    return _verified_document(self._orbax.checkpointables_metadata(step), step)

  def _verified(self, step: int, like: PyTree) -> Restored:
    document = self._document(step)
    here, wanted = document["shapes"], _shapes(like)
    for path in sorted(here.keys() | wanted.keys()):
      if here.get(path) != wanted.get(path):
        here, wanted = here.get(path, "absent"), wanted.get(path, "absent")
        raise ValueError(f"{path} is {here} here and {wanted} in the program")
    abstract = jax.tree.map(_abstract, _without_empty(like))
    arrays = _with_empty(self._orbax.load_checkpointables(step, {"state": abstract})["state"], like)
    changed = [path for path, digest in digests(arrays).items() if document["digests"].get(path) != digest]
    if changed:
      raise ValueError(f"arrays are not as they were saved: {changed}")
    return Restored(step, arrays, document["extra"])

  def _read_score(self, step: int) -> None:
    """Scores an earlier checkpoint; a damaged one, or one without what is scored, has no score."""
    assert self._best is not None
    try:
      metrics = self._document(step).get("metrics")
      if metrics is not None:
        self._scores[step] = float(self._best(metrics))
    except Exception as error:
      _LOG.warning("checkpoint %s in %s has no score: %s %s", step, self._directory, type(error).__name__, error)

  def _kept(self, steps: Sequence[int]) -> set[int]:
    """The steps that stay: the newest and the best."""
    best = _highest(self._scores, steps)
    return {*steps[-self._keep_latest :], *([] if best is None else [best])}

  def _remove_leftovers(self) -> None:
    for leftover in self._directory.glob(_TEMPORARY):
      shutil.rmtree(leftover)

  def _fail(self, error: Exception) -> None:
    """Raises what a save failed with; a full disk as such, with the room that the save took given back."""
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and not any(s in str(error) for s in _FULL):
      raise error
    self._remove_leftovers()
    raise DiskFull(
      f"the disk is full: a checkpoint could not be written to {self._directory}; make room and give the same command"
      f" again, which continues from step {max(self._on_disk(), default=0)}"
    ) from error

  def _on_disk(self) -> list[int]:
    return [int(path.name) for path in self._directory.iterdir() if path.name.isdigit()]


class _Keep(ocp.training.preservation_policies.PreservationPolicy):
  """Lets Orbax delete all checkpoints but those of the steps that a function keeps of all steps."""

  def __init__(self, kept: Callable[[Sequence[int]], set[int]]):
    self._of = kept

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    """Whether to keep each checkpoint."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = self._of(sorted(steps))
    return [step in kept for step in steps]


def _verified_document(metadata: Any, step: int | None) -> dict[str, Any]:
  """What was saved beside the arrays, if it is as it was saved and of this step."""
  document = dict(metadata.custom_metadata or {})
  claimed = document.pop("digest", None)
  if claimed != digest_of_text(json.dumps(document, sort_keys=True)):
    raise ValueError("its metadata are not as they were saved")
  if step is not None and document.get("step", step) != step:
    raise ValueError(f"it was saved as step {document['step']}; give the directory that name again")
  return document


def _names(path: str) -> tuple[str, ...]:
  """The names in a path of JAX, whether an attribute or a key: what was a NamedTuple comes back as a dict."""
  return tuple(a or b or c for a, b, c in re.findall(r"\['([^']*)'\]|\.(\w+)|\[(\d+)\]", path))


def _is_empty(shape: str) -> bool:
  """Whether an array such as `float32[3, 0]` has no elements, so that Orbax did not write it."""
  return re.search(r"[\[ ]0[,\]]", shape) is not None


def _highest(scores: Mapping[int, float], steps: Sequence[int]) -> int | None:
  """The step of the highest score, the later one of equals; NaN is no score."""
  scored = [step for step in sorted(steps) if not math.isnan(scores.get(step, math.nan))]
  return max(reversed(scored), key=lambda step: scores[step], default=None)


def _is_not_orbax_failing(record: logging.LogRecord) -> bool:
  """Leaves out the hundreds of lines that Orbax logs of one failure: it is raised, too."""
  return record.levelno < logging.ERROR or "/orbax/checkpoint/" not in pathlib.Path(record.pathname).as_posix()


def _without_empty(tree: PyTree) -> PyTree:
  """Arrays of no elements are known by their shapes; Orbax cannot write them."""
  return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _with_empty(tree: PyTree, like: PyTree) -> PyTree:
  leaves, structure = jax.tree.flatten(like)
  loaded = iter(jax.tree.leaves(tree))
  whole = [next(loaded) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
  return jax.tree.unflatten(structure, whole)


def _shapes(arrays: PyTree) -> dict[str, str]:
  return {jax.tree_util.keystr(p): f"{x.dtype}{list(x.shape)}" for p, x in jax.tree.leaves_with_path(arrays)}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
