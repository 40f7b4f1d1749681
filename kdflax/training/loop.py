"""The training loop: step, log, evaluate, save, and only then the next batch."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.training.checkpoints import Checkpoints
from kdflax.training.metrics import add, means
from kdflax.training.run import MetricsLog, Preempted, differences

PyTree = Any


def fit(
  step: Callable[[PyTree, PyTree], tuple[PyTree, Any]],
  state: PyTree,
  batches: Any,
  *,
  num_steps: int,
  steps_per_call: int = 1,
  phase: str = "train",
  checkpoints: Checkpoints | None = None,
  bound: Mapping[str, str] | None = None,
  save_every: int = 1000,
  log: MetricsLog | None = None,
  log_every: int = 100,
  evaluate: Callable[[PyTree], dict[str, Any]] | None = None,
  evaluate_every: int | None = None,
  stop: threading.Event | None = None,
  progress: Callable[[int, dict[str, Any]], None] | None = None,
) -> PyTree:
  """Trains to a step, from the newest checkpoint if there is one, to the same bits as without interruption.

  A checkpoint holds the state, the metrics summed since the last log row, the position of the data and the number of
  rows in the log, so that a run that was killed anywhere continues as if it had not been.

  Args:
    step: `(state, batch) -> (state, metrics)`; the state given is not used again (donate it).
    state: where training starts without a checkpoint.
    batches: iterator; one with `get_state` and `set_state` is put back to its position on resume, any other must not
      depend on it (`itertools.repeat` of arrays that the step samples from).
    num_steps: updates in all.
    steps_per_call: updates that one call of `step` makes; must divide `num_steps` and every interval.
    phase: name of this training in the log.
    checkpoints: where to save and resume; the last state is always saved.
    bound: what training depends on besides its arguments, by name, as a text that says its content: the `digest` of a
      frozen teacher, which is no part of the state. Kept with every checkpoint, and compared on resume.
    save_every: updates between checkpoints.
    log: gets a row of means every `log_every` updates, and one for each evaluation.
    log_every: updates between rows.
    evaluate: `state -> means by name`, run every `evaluate_every` updates and at the end.
    evaluate_every: updates between evaluations; only at the end by default.
    stop: when set, the loop saves after the step under way and raises.
    progress: called as `progress(updates done, latest row)` after each call of `step`.

  Returns:
    The last state.

  Raises:
    Preempted: if `stop` was set before the end; the state is saved.
    ValueError: if the intervals are not multiples of `steps_per_call`, no checkpoint found is intact, or what is
      `bound` is not what it was.
  """
  intervals = {"num_steps": num_steps, "save_every": save_every, "log_every": log_every}
  intervals |= {"evaluate_every": evaluate_every} if evaluate_every else {}
  for name, interval in intervals.items():
    if interval < 1 or interval % steps_per_call:
      raise ValueError(f"{name} must be a positive multiple of steps_per_call={steps_per_call}; got {interval}")
  evaluate_every = evaluate_every or num_steps
  batch = next(batches)
  window = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, state, batch)[1])
  nothing, done, row = window, 0, {}
  restored = checkpoints.restore({"state": state, "window": window}) if checkpoints is not None else None
  if restored is not None:
    _check_bound(phase, restored.extra.get("bound", {}), bound or {})
    done, state = restored.step, restored.arrays["state"]
    window = jax.device_get(restored.arrays["window"])  # on the host it adds to metrics on any devices
    if done >= num_steps:
      if log is not None:
        log.passed(phase, restored.extra["rows"])
      return state
    if hasattr(batches, "set_state"):
      batches.set_state(restored.extra["data"])
    batch = next(batches)
  if log is not None:
    log.rewind(phase, restored.extra["rows"] if restored else None)

  def save(scores: dict[str, Any] | None) -> None:
    if checkpoints is not None:
      position = batches.get_state() if hasattr(batches, "get_state") else None
      rows = log.rows(phase) if log is not None else 0
      extra = {"data": position, "rows": rows, "bound": dict(bound or {})}
      scores = None if scores is None else {name: float(np.mean(score)) for name, score in scores.items()}
      checkpoints.save(done, {"state": state, "window": window}, extra, scores)

  while True:
    state, metrics = step(state, batch)
    window = _add(window, metrics)
    done += steps_per_call
    ended, stopped, scores = done >= num_steps, stop is not None and stop.is_set(), None
    if done % log_every == 0 or ended:
      row = {"phase": phase, "step": done, **means(window)}
      window = nothing
      if log is not None:
        log.append(row)
    if evaluate is not None and (done % evaluate_every == 0 or ended):
      scores = evaluate(state)
      if log is not None:
        log.append({"phase": phase, "step": done, **scores})
    if done % save_every == 0 or ended or stopped:
      save(scores)
    if progress is not None:
      progress(done, {**row, **(scores or {})})
    if ended or stopped:
      break
    batch = next(batches)
  if checkpoints is not None:
    checkpoints.wait()
  if not ended:
    raise Preempted(f"{phase} stopped at step {done} of {num_steps}; the same command continues it")
  if log is not None:
    log.passed(phase, log.rows(phase))
  return state


def _check_bound(phase: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
  differing = [f"{name}: {old} in the checkpoint, {new} now" for name, old, new in differences(before, now)]
  if differing:
    raise ValueError(
      f"{phase} is bound to other content than its checkpoint; give what it was trained with (the teacher's file, say),"
      " or delete the checkpoints of this phase to start it again:\n  " + "\n  ".join(differing)
    )


_add = jax.jit(add)
