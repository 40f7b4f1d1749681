"""The training loop: step, log, evaluate, save, and only then the next batch."""

import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.model import PyTree
from kdflax.training import finite
from kdflax.training.checkpoints import Checkpoints, Restored
from kdflax.training.guard import Preempted
from kdflax.training.metrics import Running, accumulate, means, resumed_running, saved_running, start_running, total
from kdflax.training.run import MetricsLog, differences


class Saving(NamedTuple):
  """Where a training is saved, and resumed from.

  Attributes:
    checkpoints: where to save and resume; the last state is always saved.
    save_every: updates between checkpoints.
    bound: what training depends on besides its arguments, by name, as a text that says its content: the `digest` of a
      frozen teacher, which is no part of the state. Kept with every checkpoint, and compared on resume.
  """

  checkpoints: Checkpoints | None = None
  save_every: int = 1000
  bound: Mapping[str, str] | None = None


class Logging(NamedTuple):
  """What is said of a training.

  Attributes:
    log: gets a row of means every `log_every` updates, and one for each evaluation.
    log_every: updates between rows, and between the looks at whether all is finite.
    progress: called as `progress(updates done, latest row)` after each call of `step`.
    watched: names of metrics that may be infinite or NaN: Terms of weight 0, which train nothing.
  """

  log: MetricsLog | None = None
  log_every: int = 100
  progress: Callable[[int, dict[str, Any]], None] | None = None
  watched: Collection[str] = ()


class Evaluation(NamedTuple):
  """How good a training is.

  Attributes:
    evaluate: `state -> means by name`.
    evaluate_every: updates between evaluations; only at the end by default.
  """

  evaluate: Callable[[PyTree], dict[str, Any]] | None = None
  evaluate_every: int | None = None


def fit(
  step: Callable[[PyTree, PyTree], tuple[PyTree, Any]],
  state: PyTree,
  batches: Iterator[Any],
  *,
  num_steps: int,
  steps_per_call: int = 1,
  phase: str = "train",
  saving: Saving | None = None,
  logging: Logging | None = None,
  evaluation: Evaluation | None = None,
  stop: threading.Event | None = None,
  **old_names: Any,
) -> PyTree:
  """Trains to a step, from the newest checkpoint if there is one, to the same bits as without interruption.

  A checkpoint holds the state, the metrics summed since the last log row, the position of the data and the number of
  rows in the log, so that a run that was killed anywhere continues as if it had not been. The `best` of `Checkpoints`
  gets what `evaluate` returned at that step, as a float by name (the mean, where it is an array over seeds); so a
  checkpoint has a score where an evaluation and a save fall on the same step, as they do at the end.

  Every `log_every` updates and before each save, all floating-point arrays of the state are looked at, and the means of
  the metrics: a training whose state is no longer finite is not saved, and ends. What was infinite at the start (the
  best value that an optimizer has seen) may remain so. Losses may be NaN where the learner says itself that it left
  them out, by a metric `skipped` or `present/<row>`; a row that was absent for a whole interval is warned of once.

  Args:
    step: `(state, batch) -> (state, metrics)`; the state given is not used again (donate it).
    state: where training starts without a checkpoint. It is given away: if there is a checkpoint its arrays are deleted
      before those of the checkpoint are loaded, so that there is room for one state only. `jax.ShapeDtypeStruct` with
      shardings will do where there is a checkpoint.
    batches: iterator; one with `get_state` and `set_state` is put back to its position on resume, any other must not
      depend on it (`itertools.repeat` of arrays that the step samples from).
    num_steps: updates in all.
    steps_per_call: updates that one call of `step` makes; must divide `num_steps` and every interval.
    phase: name of this training in the log.
    saving: where to save and resume; nowhere by default.
    logging: where to, and how often.
    evaluation: how, and how often.
    stop: when set, the loop saves after the step under way and raises.
    **old_names: the fields of `Saving`, `Logging` and `Evaluation` as keywords, for one release.

  Returns:
    The last state.

  Raises:
    Preempted: if `stop` was set before the end; the state is saved.
    Diverged: if the state or a loss is no longer finite; the newest checkpoint is of a state that was.
    ValueError: if the intervals are not multiples of `steps_per_call`, the batches end too early, no checkpoint found
      is intact, the newest one is of a later step than `num_steps`, or what is `bound` is not what it was.
  """
  saving, logging, evaluation = _grouped(saving, logging, evaluation, old_names)
  _check_intervals(num_steps, steps_per_call, saving, logging, evaluation)
  run = _Run(phase, num_steps, state, batches, saving, logging, evaluation or Evaluation())
  _resume(run)
  if run.done >= num_steps:
    return run.state
  run.exempt, run.seen = finite.exempt_at_start(phase, run.state), (run.done, _position(run))
  while True:
    batch = _next_batch(run)
    run.state, metrics = step(run.state, batch)
    _count(run, metrics)
    run.done += steps_per_call
    stopped = stop is not None and stop.is_set()
    _log(run)
    scores = _evaluate(run)
    _save(run, scores, stopped)
    if logging.progress is not None:
      logging.progress(run.done, {**run.row, **(scores or {})})
    if stopped or run.done >= num_steps:
      break
  return _finish(run)


@dataclasses.dataclass
class _Run:
  """Where a training stands."""

  phase: str
  num_steps: int
  state: PyTree
  batches: Any
  saving: Saving
  logging: Logging
  evaluation: Evaluation
  done: int = 0
  window: Running | None = None  # metrics since the last row of the log
  saved_window: Any = None  # the same, as a checkpoint has it, until the first metrics say what they are
  row: dict[str, Any] = dataclasses.field(default_factory=dict)
  exempt: Collection[str] = ()
  seen: tuple[int, Any] = (0, None)  # step and position of the data when all was finite

  def __post_init__(self) -> None:
    self.absent = finite.AbsentRows(self.phase)

  def is_due(self, interval: int | None) -> bool:
    return self.done >= self.num_steps or (interval is not None and self.done % interval == 0)


def _grouped(
  saving: Saving | None, logging: Logging | None, evaluation: Evaluation | None, old_names: dict[str, Any]
) -> tuple[Saving, Logging, Evaluation]:
  """The three groups of settings, with what was given by an old name in its place."""
  groups = [saving or Saving(), logging or Logging(), evaluation or Evaluation()]
  unknown = set(old_names) - {field for group in groups for field in group._fields}
  if unknown:
    raise TypeError(f"fit got unexpected arguments {sorted(unknown)}; see Saving, Logging and Evaluation")
  first, second, third = (
    group._replace(**{name: value for name, value in old_names.items() if name in group._fields}) for group in groups
  )
  return first, second, third


def _check_intervals(
  num_steps: int, steps_per_call: int, saving: Saving, logging: Logging, evaluation: Evaluation
) -> None:
  intervals = {"num_steps": num_steps, "save_every": saving.save_every, "log_every": logging.log_every}
  intervals |= {"evaluate_every": evaluation.evaluate_every} if evaluation.evaluate_every is not None else {}
  for name, interval in intervals.items():
    if interval < 1 or interval % steps_per_call:
      raise ValueError(f"{name} must be a positive multiple of steps_per_call={steps_per_call}; got {interval}")


def _resume(run: _Run) -> None:
  """Puts the state, the log and the data where the newest checkpoint has them, or the log where it begins."""
  log, restored = run.logging.log, _restored(run)
  if restored is None:
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(run.state)):
      raise ValueError(f"{run.phase} has no checkpoint to take the values of the state from; give arrays")
    if log is not None:
      log.rewind(run.phase)
    return
  run.done, run.state = restored.step, restored.arrays["state"]
  run.saved_window = restored.extra.get("window")
  if run.done >= run.num_steps:
    if log is not None:
      log.passed(run.phase, restored.extra["rows"])
    return
  if hasattr(run.batches, "set_state"):
    run.batches.set_state(restored.extra["data"])
  if log is not None:
    log.rewind(run.phase, restored.extra["rows"])


def _restored(run: _Run) -> Restored | None:
  """The newest checkpoint, if this training may continue from it. The arrays given make room for it."""
  checkpoints = run.saving.checkpoints
  if checkpoints is None:
    return None
  shapes = jax.tree.map(_shape, run.state)
  if checkpoints.steps():
    given, run.state = run.state, shapes
    for leaf in jax.tree.leaves(given):
      if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf.delete()
  restored = checkpoints.restore({"state": shapes})
  if restored is None:
    return None
  _check_bound(run.phase, restored.extra.get("bound", {}), run.saving.bound or {})
  if restored.step > run.num_steps:
    raise ValueError(
      f"{run.phase} has a checkpoint of step {restored.step}, later than num_steps={run.num_steps}; give at least"
      f" num_steps={restored.step}, or delete the later checkpoints"
    )
  return restored


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _check_bound(phase: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
  differing = [f"{name}: {old} in the checkpoint, {new} now" for name, old, new in differences(before, now)]
  if differing:
    raise ValueError(
      f"{phase} is bound to other content than its checkpoint; give what it was trained with (the teacher's file, say),"
      " or delete the checkpoints of this phase to start it again:\n  " + "\n  ".join(differing)
    )


def _next_batch(run: _Run) -> Any:
  try:
    return next(run.batches)
  except StopIteration as error:
    raise ValueError(
      f"the batches ended after {run.done} of num_steps={run.num_steps} updates; give batches that start again"
      " (data.DeviceBatches, itertools.cycle), or fewer steps"
    ) from error


def _count(run: _Run, metrics: Any) -> None:
  """Adds metrics to those since the last row of the log."""
  if run.window is None:
    run.window = start_running(metrics)
    if run.saved_window is not None:
      run.window, run.saved_window = resumed_running(run.phase, run.saved_window, run.window), None
  run.window = accumulate(run.window, metrics)


def _log(run: _Run) -> None:
  """Writes a row of means if it is time, and looks at whether all is finite."""
  if not run.is_due(run.logging.log_every):
    return
  assert run.window is not None
  averages, run.window = means(total(run.window)), None
  run.row = {"phase": run.phase, "step": run.done, **averages}
  if run.logging.log is not None:
    run.logging.log.append(run.row)
  run.absent.look(averages, f"since the row before that of step {run.done}")
  place = _place(run)
  _check_finite(run)
  finite.check_losses(run.phase, averages, run.logging.watched, place)


def _evaluate(run: _Run) -> dict[str, Any] | None:
  """Returns the scores if it is time."""
  if run.evaluation.evaluate is None or not run.is_due(run.evaluation.evaluate_every):
    return None
  scores = run.evaluation.evaluate(run.state)
  if run.logging.log is not None:
    run.logging.log.append({"phase": run.phase, "step": run.done, **scores})
  return scores


def _save(run: _Run, scores: dict[str, Any] | None, stopped: bool) -> None:
  """Saves if it is time; never a state that is not finite."""
  if not (stopped or run.is_due(run.saving.save_every)):
    return
  _check_finite(run)
  if run.saving.checkpoints is None:
    return
  extra = {
    "data": _position(run),
    "rows": run.logging.log.rows(run.phase) if run.logging.log is not None else 0,
    "bound": dict(run.saving.bound or {}),
    "window": None if run.window is None else saved_running(run.window),
  }
  scores = None if scores is None else {name: float(np.mean(score)) for name, score in scores.items()}
  run.saving.checkpoints.save(run.done, {"state": run.state}, extra, scores)


def _check_finite(run: _Run) -> None:
  if run.seen[0] != run.done:
    finite.check_state(run.phase, run.state, run.exempt, _place(run))
    run.seen = (run.done, _position(run))


def _place(run: _Run) -> str:
  """Where a training stands, for a message."""
  (before, position), now = run.seen, _position(run)
  place = f"at step {run.done}" if before == run.done else f"between the steps {before} and {run.done}"
  if now is not None:
    place += f" (data from {_short(position)} to {_short(now)})"
  if run.saving.checkpoints is not None and run.saving.checkpoints.steps():
    place += f", after the checkpoint of step {run.saving.checkpoints.steps()[-1]}"
  return place


def _position(run: _Run) -> Any:
  return run.batches.get_state() if hasattr(run.batches, "get_state") else None


def _short(position: Any) -> str:
  text = "the start" if position is None else str(position)
  return text if len(text) <= 200 else f"{text[:200]}..."


def _finish(run: _Run) -> PyTree:
  if run.saving.checkpoints is not None:
    run.saving.checkpoints.wait()
  if run.done < run.num_steps:
    raise Preempted(f"{run.phase} stopped at step {run.done} of {run.num_steps}; the same command continues it")
  if run.logging.log is not None:
    run.logging.log.passed(run.phase, run.logging.log.rows(run.phase))
  return run.state
