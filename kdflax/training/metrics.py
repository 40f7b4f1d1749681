"""Metrics: per-example functions for evaluation, and (sum, count) pairs that are added before they are divided.

The per-example functions, `[..., classes]` logits and `[...]` labels to one value each, serve as the loss of a Term;
their mean over a whole data set is then exact whatever the batches. The others take a whole data set, or results, at
once.

A label that is no class (-1, say, for one that is missing) is never right: as if it were one more class, of probability
0. Mask such examples by the `where` of the Term to leave them out. Of logits that hold a NaN every metric is NaN.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Sums = Mapping[str, tuple[Any, Any]]
_LOG = logging.getLogger(__name__)
TaskMetrics = Mapping[str, Mapping[str, Any]]  # by task and metric


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """1 where the most likely class is the label, else 0: `[..., classes], [...] -> [...]`."""
  _check_labels(logits, labels)
  return _nan_of_broken(jnp.argmax(logits, axis=-1) == labels, logits)


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`-log softmax(logits)[label]`, in nats: `[..., classes], [...] -> [...]`; infinite where the label is no class."""
  known = _check_labels(logits, labels)
  chosen = jnp.where(known, labels, 0)[..., None]
  likelihood = jnp.take_along_axis(_log_softmax(logits), chosen, axis=-1)[..., 0]
  return _nan_of_broken(jnp.where(known, -likelihood, jnp.inf), logits)


def brier_score(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`sum_c (softmax(logits)_c - [c = label])^2`, plus 1 where the label is no class. Brier, 1950.

  `[..., classes], [...] -> [...]`, between 0 and 2.
  """
  known = _check_labels(logits, labels)
  probs = jnp.exp(_log_softmax(logits))
  return jnp.square(probs - jax.nn.one_hot(labels, logits.shape[-1])).sum(axis=-1) + ~known


def agreement(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
  """1 where student and teacher choose the same class, else 0: `[..., classes]` twice `-> [...]`."""
  _check_same(student_logits=student_logits, teacher_logits=teacher_logits)
  return _nan_of_broken(accuracy(student_logits, jnp.argmax(teacher_logits, axis=-1)), teacher_logits)


def teacher_kl(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
  """`KL(p || q) = sum_c p_c log(p_c / q_c)` of the teacher's p = softmax and the student's q, in nats.

  `[..., classes]` twice `-> [...]`. A class at -inf for the teacher adds nothing; one at -inf for the student alone
  makes it infinite, as it is.
  """
  _check_same(student_logits=student_logits, teacher_logits=teacher_logits)
  log_p, log_q = _log_softmax(teacher_logits), _log_softmax(student_logits)
  terms = jnp.exp(log_p) * (log_p - log_q)
  terms = jnp.where(log_q == -jnp.inf, jnp.inf, terms)  # also where p has underflown, and the product would be NaN
  terms = jnp.where(log_p == -jnp.inf, 0, terms).sum(axis=-1)
  return _nan_of_broken(_nan_of_broken(terms, student_logits), teacher_logits)


def absolute_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  """`|prediction - target|`, whose mean is the mean absolute error: `[...]` twice `-> [...]`."""
  _check_same(predictions=predictions, targets=targets)
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

      1/T sum_t 1/M_t sum_m sign_tm (N_tm - B_tm) / |B_tm|,     sign 1 if higher is better, else -1

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

  Reference: Baijiong Lin and Yu Zhang, "LibMTL: A Python Library for Multi-Task Learning", 2022, arXiv 2203.14338. It
  divides by B, and so calls an improvement on a negative baseline (of R^2, say) a loss.
  """
  changes = _relative_changes(results, baseline, higher_is_better)
  per_task = [sum(change.values()) / len(change) for change in changes.values()]
  return np.asarray(sum(per_task) / len(per_task))


def delta_m(results: TaskMetrics, baseline: TaskMetrics, *, higher_is_better: Mapping[str, bool]) -> np.ndarray:
  """Relative drop against single-task networks in percent, averaged over all metrics at once: lower is better.

      100 / K sum_tm sign_tm (N_tm - B_tm) / |B_tm|,     sign -1 if higher is better, else 1

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

  Reference: Aviv Navon, Aviv Shamsian, Idan Achituve, Haggai Maron, Kenji Kawaguchi, Gal Chechik and Ethan Fetaya,
  "Multi-Task Learning as a Bargaining Game", 2022, arXiv 2202.01017.
  """
  changes = _relative_changes(results, baseline, higher_is_better)
  per_metric = [value for change in changes.values() for value in change.values()]
  return np.asarray(-100 * sum(per_metric) / len(per_metric))


def _relative_changes(
  results: TaskMetrics, baseline: TaskMetrics, higher_is_better: Mapping[str, bool]
) -> dict[str, dict[str, np.ndarray]]:
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
    changes[task][metric] = (new - old) / abs(old) * (1 if higher_is_better[metric] else -1)
  return changes


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> float:
  """Mean gap between confidence and accuracy over equally wide bins of confidence, weighted by their examples.

  It is no mean over examples, so it takes a whole data set at once.

  Args:
    logits: `[examples, classes]`.
    labels: integers `[examples]`.
    bins: their number.

  Returns:
    Between 0 and 1.

  Raises:
    ValueError: if shapes or dtypes do not fit, there is no example or no bin, or a logit is NaN.

  Reference: Chuan Guo, Geoff Pleiss, Yu Sun and Kilian Q. Weinberger, "On Calibration of Modern Neural Networks", 2017,
  arXiv 1706.04599.
  """
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
  _check_labels(logits, labels)
  if labels.ndim != 1 or not len(labels) or bins < 1 or np.isnan(logits).any():
    raise ValueError(
      f"expected logits [examples, classes] of at least one example, without NaN, and at least one bin; got"
      f" {list(logits.shape)}, {np.isnan(logits).sum()} of them NaN, and {bins} bins"
    )
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  confidence = (probs / probs.sum(-1, keepdims=True)).max(-1)
  correct = logits.argmax(-1) == labels
  index = np.minimum((confidence * bins).astype(int), bins - 1)
  gap = np.bincount(index, confidence, bins) - np.bincount(index, correct, bins)
  return float(np.abs(gap).sum() / len(labels))


class Running(NamedTuple):
  """Sums of (sum, count) pairs in two parts, by name: what has been added, and what adding has rounded away."""

  high: Sums
  low: Sums


def add(total: Sums | None, new: Sums) -> Sums:
  """Adds (sum, count) pairs by name: on the host in float64, so that 60,000 batches add up; as they are under `jit`."""
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((total, new))):
    return new if total is None else jax.tree.map(lambda a, b: a + b, total, new)
  new = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), new)
  return new if total is None else jax.tree.map(lambda a, b: np.asarray(a, np.float64) + b, total, new)


def start_running(new: Sums) -> Running:
  """Nothing, in the shapes and dtypes of what is to be added."""
  nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), new)
  return Running(nothing, nothing)


@jax.jit
def accumulate(running: Running, new: Sums) -> Running:
  """Adds on the device, without waiting for it: two numbers of float32 hold a sum to 14 digits."""
  pairs = jax.tree.map(_add_to_pair, running.high, running.low, new)
  parts = [jax.tree.map(lambda _, pair, part=part: pair[part], new, pairs) for part in (0, 1)]
  return Running(*parts)


def added_up(steps: Sums) -> Sums:
  """The sum over the leading axis, of steps, rounded once: one dispatch counts what as many calls would count."""
  start = start_running(jax.tree.map(lambda leaf: leaf[0], steps))
  return jax.lax.scan(lambda running, new: (accumulate(running, new), None), start, steps)[0].high


def _add_to_pair(high: jax.Array, low: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`high + low + new` in two parts, the low one what rounding took from the high one. Knuth's TwoSum, renormalised."""
  rough = high + new
  without = rough - high
  lost = (high - (rough - without)) + (new - without) + low
  lost = jnp.where(jnp.isfinite(rough), lost, 0)
  fine = rough + lost
  return fine, lost - (fine - rough)


def total(running: Running) -> Sums:
  """The sums in float64, on the host."""
  high, low = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part) for part in running)
  return jax.tree.map(lambda a, b: np.where(np.isfinite(a), a + b, a), high, low)


def saved_running(running: Running) -> dict[str, Any]:
  """The sums as JSON."""
  return {name: [np.asarray(leaf).tolist() for part in running for leaf in part[name]] for name in running.high}


def resumed_running(phase: str, saved: Mapping[str, Any], like: Running) -> Running:
  """What a checkpoint has of a window of the log, or nothing, with a warning, if the metrics are others now."""
  kinds = {name: [leaf for part in like for leaf in part[name]] for name in like.high}
  found = {name: [np.shape(value) for value in values] for name, values in saved.items()}
  if found != {name: [leaf.shape for leaf in leaves] for name, leaves in kinds.items()}:
    _LOG.warning(
      "%s: the checkpoint has sums of the metrics %s, the program has %s; the next row of the log has the means since"
      " the checkpoint only",
      phase,
      sorted(saved),
      sorted(kinds),
    )
    return like
  arrays = {n: [np.asarray(v, leaf.dtype) for v, leaf in zip(saved[n], kinds[n], strict=True)] for n in kinds}
  return Running({n: (a[0], a[1]) for n, a in arrays.items()}, {n: (a[2], a[3]) for n, a in arrays.items()})


def means(sums: Sums) -> dict[str, Any]:
  """Divides (sum, count) pairs: a float by name, or a nested list where they have axes (one per seed, say)."""
  ratio = lambda total, count: (np.asarray(total) / np.maximum(np.asarray(count), 1)).tolist()
  return {name: ratio(*pair) for name, pair in sums.items()}


def _check_labels(logits: Any, labels: Any) -> jax.Array:
  """Raises for labels that would broadcast into nonsense; returns which of them are classes."""
  expected, shape, dtype = jnp.shape(logits)[:-1], jnp.shape(labels), jnp.result_type(labels)
  if not jnp.ndim(logits) or shape != expected or not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f"labels must be integers of shape {expected}, one for each row of the logits {jnp.shape(logits)}; got"
      f" {dtype}{list(shape)}"
    )
  labels = jnp.asarray(labels)
  return (labels >= 0) & (labels < jnp.shape(logits)[-1])


def _check_same(**arrays: Any) -> None:
  shapes = {name: jnp.shape(array) for name, array in arrays.items()}
  if len(set(shapes.values())) > 1:
    raise ValueError(f"{' and '.join(shapes)} must have one shape; got {shapes}")


def _nan_of_broken(values: jax.Array, logits: jax.Array) -> jax.Array:
  """The values in float32 or wider, NaN where a row of logits holds NaN: of it argmax says the class of the NaN."""
  values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  return jnp.where(jnp.isnan(logits).any(axis=-1), jnp.nan, values)


def _log_softmax(logits: jax.Array) -> jax.Array:
  logits = jnp.asarray(logits)
  return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
