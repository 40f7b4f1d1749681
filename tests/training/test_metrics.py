"""Metrics against plain NumPy, and sums that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax.training import metrics

EXAMPLES, CLASSES = 40, 4


@pytest.fixture(scope="module")
def arrays():
  random = np.random.default_rng(0)
  return 2 * random.normal(size=(EXAMPLES, CLASSES)).astype(np.float32), random.integers(CLASSES, size=EXAMPLES)


def _softmax(logits):
  exponentials = np.exp(np.asarray(logits, np.float64))
  return exponentials / exponentials.sum(-1, keepdims=True)


def test_negative_log_likelihood(arrays):
  logits, labels = arrays
  expected = -np.log(_softmax(logits)[np.arange(EXAMPLES), labels])
  np.testing.assert_allclose(metrics.negative_log_likelihood(logits, labels), expected, rtol=1e-5)


def test_brier_score(arrays):
  logits, labels = arrays
  expected = ((_softmax(logits) - np.eye(CLASSES)[labels]) ** 2).sum(-1)
  np.testing.assert_allclose(metrics.brier_score(logits, labels), expected, rtol=1e-5)


def test_accuracy_and_agreement(arrays):
  logits, labels = arrays
  np.testing.assert_array_equal(metrics.accuracy(logits, labels), logits.argmax(-1) == labels)
  teacher = np.roll(logits, 1, axis=0)
  np.testing.assert_array_equal(metrics.agreement(logits, teacher), logits.argmax(-1) == teacher.argmax(-1))


def test_kl_of_the_teacher_and_the_student(arrays):
  student = arrays[0]
  teacher = np.roll(student, 1, axis=0)
  p, q = _softmax(teacher), _softmax(student)
  np.testing.assert_allclose(metrics.teacher_kl(student, teacher), (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-6)


def test_kl_where_a_class_is_impossible():
  """For the teacher it adds nothing, whatever the student says; for the student alone it is infinite."""
  infinite = -np.inf
  student = np.array([[0.0, 0.0, 5.0], [0.0, 0.0, infinite], [0.0, 0.0, infinite]], np.float32)
  teacher = np.array([[0.0, 0.0, infinite], [0.0, 0.0, infinite], [0.0, 0.0, 0.0]], np.float32)
  expected = [np.log((2 + np.exp(5)) / 2), 0, np.inf]
  np.testing.assert_allclose(metrics.teacher_kl(student, teacher), expected, rtol=1e-5)


@pytest.mark.parametrize("label", [-1, CLASSES, 999])
def test_a_label_that_is_no_class_is_never_right(arrays, label):
  logits, labels = arrays
  some = np.where(np.arange(EXAMPLES) < 3, label, labels)
  for metric, missing in [
    (metrics.accuracy, np.zeros(3)),
    (metrics.negative_log_likelihood, np.full(3, np.inf)),
    (metrics.brier_score, (_softmax(logits[:3]) ** 2).sum(-1) + 1),
  ]:
    found = metric(logits, some)
    np.testing.assert_allclose(found[:3], missing, rtol=1e-5)
    np.testing.assert_array_equal(found[3:], metric(logits, labels)[3:])
  assert metrics.expected_calibration_error(np.zeros((2, CLASSES)), np.array([label, label])) == 1 / CLASSES


@pytest.mark.parametrize(
  "labels", [np.zeros((EXAMPLES, 1), int), np.zeros(1, int), np.zeros(EXAMPLES), np.int64(0)], ids=str
)
@pytest.mark.parametrize(
  "metric",
  [metrics.accuracy, metrics.negative_log_likelihood, metrics.brier_score, metrics.expected_calibration_error],
)
def test_labels_that_would_broadcast_are_refused(arrays, metric, labels):
  with pytest.raises(ValueError, match=r"labels must be integers of shape \(40,\)"):
    metric(arrays[0], labels)


@pytest.mark.parametrize("metric", [metrics.agreement, metrics.teacher_kl])
@pytest.mark.parametrize("shape", [(1, CLASSES), (EXAMPLES, CLASSES + 1)])
def test_teacher_and_student_have_one_shape(arrays, metric, shape):
  with pytest.raises(ValueError, match="student_logits and teacher_logits must have one shape"):
    metric(arrays[0], np.zeros(shape, np.float32))


def test_calibration_of_nothing_is_refused(arrays):
  logits, labels = arrays
  for bad in [(logits[:0], labels[:0]), (np.full_like(logits, np.nan), labels), (logits[0], labels[0])]:
    with pytest.raises(ValueError, match="at least one example, without NaN"):
      metrics.expected_calibration_error(*bad)
  with pytest.raises(ValueError, match="and 0 bins"):
    metrics.expected_calibration_error(logits, labels, bins=0)


def test_metrics_of_bfloat16_logits_are_taken_in_float32(arrays):
  logits, labels = arrays
  narrow = jnp.asarray(logits, jnp.bfloat16)
  for metric in (metrics.negative_log_likelihood, metrics.brier_score):
    assert metric(narrow, labels).dtype == jnp.float32
    np.testing.assert_array_equal(metric(narrow, labels), metric(narrow.astype(jnp.float32), labels))


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_expected_calibration_error(arrays, bins):
  logits, labels = arrays
  probs = _softmax(logits)
  confidence, correct = probs.max(-1), probs.argmax(-1) == labels
  expected = 0.0
  for lower in np.arange(bins) / bins:
    inside = (confidence >= lower) & (confidence < lower + 1 / bins)
    if inside.any():
      expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
  assert metrics.expected_calibration_error(logits, labels, bins=bins) == pytest.approx(expected, rel=1e-9)


def test_certainty_is_calibrated_only_when_right():
  """A confidence of exactly 1 belongs to the last bin."""
  logits = np.array([[1000.0, 0.0], [1000.0, 0.0]])
  assert metrics.expected_calibration_error(logits, np.array([0, 0])) == 0
  assert metrics.expected_calibration_error(logits, np.array([1, 1])) == 1
  assert metrics.expected_calibration_error(logits, np.array([0, 1])) == 0.5


def test_sums_add_before_they_are_divided():
  sums = metrics.add(None, {"loss": (jnp.float32(3), jnp.float32(1))})
  sums = metrics.add(sums, {"loss": (jnp.float32(1), jnp.float32(3))})
  assert metrics.means(sums) == {"loss": 1.0}


def test_sums_keep_the_axis_of_the_seeds_and_zero_counts_are_no_error():
  sums = {"loss": (jnp.array([2.0, 3.0]), jnp.array([2.0, 2.0])), "absent": (jnp.float32(0), jnp.float32(0))}
  assert metrics.means(metrics.add(sums, sums)) == {"loss": [1.0, 1.5], "absent": 0.0}


def test_sums_and_counts_are_exact_beyond_what_float32_counts():
  """2**24 + 1 is no number of float32; 60,000 batches of 512 examples count more."""
  new = {"loss": (jnp.float32(0.1) * 512, jnp.float32(512)), "tokens": (jnp.float32(2**24 - 1), jnp.float32(1))}
  expected = float(np.float64(np.float32(0.1) * 512) / 512)
  total, running = None, metrics.start_running(new)
  for _ in range(5):
    total, running = metrics.add(total, new), metrics.accumulate(running, new)
  grown = lambda pair: (np.float64(pair[0]) * 12_000, pair[1] * 12_000)
  assert metrics.means({"loss": grown(total["loss"])})["loss"] == pytest.approx(expected, rel=1e-12)
  scan = jax.jit(lambda r: jax.lax.fori_loop(0, 60_000, lambda _, r: metrics.accumulate(r, new), r))
  running = scan(metrics.start_running(new))
  sums = metrics.total(running)
  assert sums["tokens"] == (60_000 * (2**24 - 1), 60_000) and sums["loss"][1] == 60_000 * 512
  assert metrics.means(sums)["loss"] == pytest.approx(expected, rel=1e-12)
  plain = jax.jit(lambda s: jax.lax.fori_loop(0, 60_000, lambda _, s: s + new["loss"][0], s))(jnp.float32(0))
  assert abs(float(plain) / (60_000 * 512) / expected - 1) > 1e-4  # what float32 alone makes of it


def test_sums_that_are_not_finite_stay_so():
  for value in (np.inf, -np.inf, np.nan):
    running = metrics.start_running({"loss": (jnp.float32(0), jnp.float32(0))})
    for term in (1.0, value, 2.0):
      running = metrics.accumulate(running, {"loss": (jnp.float32(term), jnp.float32(1))})
    np.testing.assert_equal(metrics.means(metrics.total(running))["loss"], value)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("label", [0, 1, 3, -1])
def test_predictions_that_are_no_numbers_are_neither_right_nor_wrong(at, label):
  good, broken = np.array([[2.0, 0, 1, -1]] * 2, np.float32), np.array([[2.0, 0, 1, -1]] * 2, np.float32)
  broken[1, at] = np.nan
  labels = np.array([0, label])
  for metric in (metrics.accuracy, metrics.negative_log_likelihood, metrics.brier_score):
    np.testing.assert_array_equal(np.isnan(metric(broken, labels)), [False, True])
  for metric in (metrics.agreement, metrics.teacher_kl):
    np.testing.assert_array_equal(np.isnan(metric(broken, good)), [False, True])
    np.testing.assert_array_equal(np.isnan(metric(good, broken)), [False, True])
