"""Metrics: per-example functions for evaluation, and (sum, count) pairs that are added before they are divided.

The per-example functions, `[..., classes]` logits and `[...]` labels to one value each, serve as the loss of a Term;
their mean over a whole data set is then exact whatever the batches. The others take a whole data set, or results, at
once.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = Mapping[str, tuple[Any, Any]]
TaskMetrics = Mapping[str, Mapping[str, Any]]  # by task and metric


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """1 where the most likely class is the label, else 0: `[..., classes], [...] -> [...]`."""
  return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`-log softmax(logits)[label]`, in nats: `[..., classes], [...] -> [...]`."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
  return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]


def brier_score(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`sum_c (softmax(logits)_c - [c = label])^2`: `[..., classes], [...] -> [...]`. Brier, 1950."""
  probs = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
  return jnp.square(probs - jax.nn.one_hot(labels, logits.shape[-1])).sum(axis=-1)


def agreement(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
  """1 where student and teacher choose the same class, else 0: `[..., classes]` twice `-> [...]`."""
  return accuracy(student_logits, jnp.argmax(teacher_logits, axis=-1))


def absolute_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  """`|prediction - target|`, whose mean is the mean absolute error: `[...]` twice `-> [...]`."""
  if jnp.shape(predictions) != jnp.shape(targets):
    raise ValueError(f"predictions {jnp.shape(predictions)} and targets {jnp.shape(targets)} must have one shape")
  return jnp.abs(predictions - targets)


def r_squared(predictions: np.ndarray, targets: np.ndarray, *, axis: int = -1) -> np.ndarray:
  """Share of the targets' variance that is explained: `1 - sum (t - p)^2 / sum (t - mean t)^2` over the examples.

  1 is perfect, 0 is what predicting the mean of these targets gets; below that it is negative. It is no mean over
  examples, so it takes a whole data set at once.

  Args:
    predictions: `[..., examples]`.
    targets: of a shape that broadcasts with it, such as one set of targets for the predictions of several seeds.
    axis: the axis of the examples.

  Returns:
    `[...]`, float64; NaN where the targets are all alike.
  """
  predictions, targets = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
  unexplained = np.square(targets - predictions).sum(axis)
  variance = np.square(targets - targets.mean(axis, keepdims=True)).sum(axis)
  return 1 - np.divide(unexplained, variance, out=np.full(unexplained.shape, np.nan), where=variance > 0)


def multitask_improvement(
  results: TaskMetrics, baseline: TaskMetrics, *, higher_is_better: Mapping[str, bool]
) -> np.ndarray:
  """Improvement over a baseline, averaged over the metrics of a task and then over the tasks: higher is better.

      1/T sum_t 1/M_t sum_m sign_tm (N_tm - B_tm) / B_tm,     sign 1 if higher is better, else -1

  with N the results and B the baseline. 0.02 is an improvement by 2%. A task counts once, however many metrics it has;
  in `delta_m`, the other number in use, every metric counts once, and the sign is the opposite.

  Args:
    results: number, or array `[...]` (one value for each seed), by task and metric.
    baseline: of the same names: usually one network for each task.
    higher_is_better: by the name of the metric.

  Returns:
    A fraction, `[...]`.

  Raises:
    ValueError: if names differ, or an entry of the baseline is 0.

  Reference: Baijiong Lin and Yu Zhang, LibMTL: A Python Library for Multi-Task Learning, 2022, arXiv 2203.14338.
  """
  changes = _relative_changes(results, baseline, higher_is_better)
  per_task = [sum(change.values()) / len(change) for change in changes.values()]
  return np.asarray(sum(per_task) / len(per_task))


def delta_m(results: TaskMetrics, baseline: TaskMetrics, *, higher_is_better: Mapping[str, bool]) -> np.ndarray:
  """Relative drop against single-task networks in percent, averaged over all metrics at once: lower is better.

      100 / K sum_tm sign_tm (N_tm - B_tm) / B_tm,     sign -1 if higher is better, else 1

  over the K metrics of all tasks, so that a task with more metrics counts more. -2 is an improvement by 2%. See
  `multitask_improvement` for the other number in use.

  Args:
    results: number, or array `[...]`, by task and metric.
    baseline: of the same names: one network for each task.
    higher_is_better: by the name of the metric.

  Returns:
    Percent, `[...]`.

  Raises:
    ValueError: if names differ, or an entry of the baseline is 0.

  Reference: Aviv Navon et al., Multi-Task Learning as a Bargaining Game, 2022, arXiv 2202.01017.
  """
  changes = _relative_changes(results, baseline, higher_is_better)
  per_metric = [value for change in changes.values() for value in change.values()]
  return np.asarray(-100 * sum(per_metric) / len(per_metric))


def _relative_changes(results, baseline, higher_is_better) -> dict[str, dict[str, np.ndarray]]:
  """Returns by task and metric the change relative to the baseline, positive where it is for the better."""
  names = lambda tree: sorted((task, metric) for task, metrics in tree.items() for metric in metrics)
  if not names(results) or names(results) != names(baseline):
    raise ValueError(f"results hold {names(results)}, the baseline {names(baseline)}; name the same")
  unknown = sorted({metric for _, metric in names(results)} - set(higher_is_better))
  if unknown:
    raise ValueError(f"higher_is_better does not say about {unknown}; it has {sorted(higher_is_better)}")
  changes: dict[str, dict[str, np.ndarray]] = {task: {} for task in results}
  for task, metric in names(results):
    new, old = np.asarray(results[task][metric], np.float64), np.asarray(baseline[task][metric], np.float64)
    if (old == 0).any():
      raise ValueError(f"the baseline of {task!r} has {metric} 0, and nothing is relative to that")
    changes[task][metric] = (new - old) / old * (1 if higher_is_better[metric] else -1)
  return changes


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> float:
  """Mean gap between confidence and accuracy over equally wide bins of confidence, weighted by their examples.

  It is no mean over examples, so it takes a whole data set at once: `[examples, classes]` and `[examples]`.

  Reference: Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv 1706.04599.
  """
  logits = np.asarray(logits, np.float64)
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  confidence = (probs / probs.sum(-1, keepdims=True)).max(-1)
  correct = logits.argmax(-1) == labels
  index = np.minimum((confidence * bins).astype(int), bins - 1)
  gap = np.bincount(index, confidence, bins) - np.bincount(index, correct, bins)
  return float(np.abs(gap).sum() / len(labels))


def add(total: Sums | None, new: Sums) -> Sums:
  """Adds (sum, count) pairs by name."""
  return new if total is None else jax.tree.map(lambda a, b: a + b, total, new)


def means(sums: Sums) -> dict[str, Any]:
  """Divides (sum, count) pairs: a float by name, or a nested list where they have axes (one per seed, say)."""
  ratio = lambda total, count: (np.asarray(total) / np.maximum(np.asarray(count), 1)).tolist()
  return {name: ratio(*pair) for name, pair in sums.items()}
