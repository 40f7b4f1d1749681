"""Metrics of regressions and of several tasks, against their formulas spelled out."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdflax.training import metrics

HIGHER = {"accuracy": True, "error": False}
BASELINE = {"a": {"accuracy": 0.8, "error": 2.0}, "b": {"error": np.array([4.0, 5.0])}}
RESULTS = {"a": {"accuracy": 0.6, "error": 1.0}, "b": {"error": np.array([5.0, 5.0])}}


def test_the_two_improvements_average_differently_and_have_opposite_signs():
  per_task = ((-0.2 / 0.8 + 1 / 2) / 2 + np.array([-1 / 4, 0])) / 2
  per_metric = (0.2 / 0.8 - 1 / 2 + np.array([1 / 4, 0])) / 3
  np.testing.assert_allclose(
    metrics.multitask_improvement(RESULTS, BASELINE, higher_is_better=HIGHER), per_task, rtol=1e-9, atol=1e-12
  )
  np.testing.assert_allclose(
    metrics.delta_m(RESULTS, BASELINE, higher_is_better=HIGHER), 100 * per_metric, rtol=1e-9, atol=1e-12
  )


@pytest.mark.parametrize(
  ("results", "baseline", "higher", "message"),
  [
    ({"a": {"error": 1}}, BASELINE, HIGHER, "name the same"),
    ({}, {}, HIGHER, "name the same"),
    (RESULTS, BASELINE, {"error": False}, "accuracy"),
    ({"a": {"error": 1}}, {"a": {"error": 0}}, HIGHER, "'a' has error 0"),
  ],
)
@pytest.mark.parametrize("metric", [metrics.multitask_improvement, metrics.delta_m])
def test_names_that_differ_and_zeros_are_refused(metric, results, baseline, higher, message):
  with pytest.raises(ValueError, match=message):
    metric(results, baseline, higher_is_better=higher)


def test_r_squared():
  targets = np.array([1.0, 2.0, 6.0])
  predictions = np.stack([targets, np.full(3, 3.0), np.array([1.0, 3.0, 4.0])])
  np.testing.assert_allclose(metrics.r_squared(predictions, targets), [1, 0, 1 - 5 / 14], rtol=1e-9, atol=1e-12)
  assert np.isnan(metrics.r_squared(np.ones(3), np.ones(3)))


def test_absolute_error():
  np.testing.assert_array_equal(metrics.absolute_error(jnp.array([1.0, -2.0]), jnp.array([3.0, -1.0])), [2, 1])
  with pytest.raises(ValueError, match=r"\(3, 1\).*\(3,\)"):
    metrics.absolute_error(jnp.ones((3, 1)), jnp.ones(3))


def test_an_improvement_on_a_negative_baseline_is_one():
  better, worse = {"a": {"r2": 0.1}}, {"a": {"r2": -0.15}}
  of = dict(higher_is_better={"r2": True})
  np.testing.assert_allclose(metrics.multitask_improvement(better, worse, **of), 0.25 / 0.15)
  np.testing.assert_allclose(metrics.delta_m(better, worse, **of), -100 * 0.25 / 0.15)
