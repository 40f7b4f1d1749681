"""Teachers on one footing: variance 1 by one scale, and weights by example."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import teachers


def features_of(width, rows=None):
  rng = np.random.default_rng(width)
  return rng.normal(size=(rows or 3 * width, width)) * rng.uniform(0.1, 4, width) @ rng.normal(size=(width, width)) + 5


@pytest.mark.parametrize("width", [1, 2, 3, 8, 10, 12, 28, 36, 44, 52, 384])
def test_every_channel_has_variance_one_by_one_scale(width):
  features = features_of(width)
  mean, matrix = teachers.phi_s(features.reshape(3, -1, width))
  covariance = matrix @ np.cov(features.T).reshape(width, width) @ matrix.T
  np.testing.assert_allclose(np.diag(covariance), 1, rtol=1e-9)
  scale = np.trace(np.cov(features.T).reshape(width, width)) / width
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(width) / scale, atol=1e-9 / scale)
  np.testing.assert_allclose(mean, features.mean(0))


@pytest.mark.parametrize("width", [8, 12, 28, 36, 44, 384])
def test_a_hadamard_matrix_shares_out_every_eigenvector_evenly(width):
  features = features_of(width)
  _, matrix = teachers.phi_s(features)
  eigenvalues, vectors = np.linalg.eigh(np.cov(features.T))
  shares = np.abs(matrix @ vectors) * np.sqrt(eigenvalues.mean() * width)
  np.testing.assert_allclose(shares, 1, rtol=1e-6)


def test_standardised_features_can_be_undone_and_keep_relative_distances():
  features = features_of(12).astype(np.float32)
  mean, matrix = teachers.phi_s(features)
  assert mean.dtype == matrix.dtype == np.float32
  out = np.asarray(teachers.standardize(jnp.asarray(features), mean, matrix))
  np.testing.assert_allclose(out @ np.linalg.inv(matrix).T + mean, features, rtol=1e-3, atol=1e-2)
  ratio = np.linalg.norm(out[0] - out[1:], axis=1) / np.linalg.norm(features[0] - features[1:], axis=1)
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_the_hardest_teacher_of_an_example_is_never_dropped():
  losses = jnp.array([[1.0, 5.0, 2.0], [3.0, 4.0, 2.5]])
  keep = np.array([[True, False, False], [False, False, True]])
  np.testing.assert_array_equal(teachers.teacher_dropping(losses, keep), [[1, 1, 0], [1, 0, 1]])


def test_fusion_weights_follow_the_cross_entropies():
  cross_entropies = jnp.array([[1.0, 3.0], [2.0, 0.5]])
  np.testing.assert_array_equal(teachers.fusion_weights(cross_entropies, kind="min_ce"), [[1, 0], [0, 1]])
  rewards = np.exp(np.exp(-np.asarray(cross_entropies)))
  np.testing.assert_allclose(
    teachers.fusion_weights(cross_entropies, kind="avg_ce"), rewards / rewards.sum(0), rtol=1e-6
  )


@pytest.mark.parametrize(
  ("message", "call"),
  [
    (r"at least 2 rows.*\(1, 4\)", lambda: teachers.phi_s(np.ones((1, 4)))),
    (r"vary; the mean variance of their 4 channels is 0", lambda: teachers.phi_s(np.ones((3, 4)))),
    (
      r"width; got features \(3, 4\), mean \(3,\)",
      lambda: teachers.standardize(np.ones((3, 4)), np.ones(3), np.eye(4)),
    ),
    (r"one shape; got \(2, 3\) and \(3,\)", lambda: teachers.teacher_dropping(jnp.ones((2, 3)), jnp.ones(3, bool))),
    (r"kind must be.*got 'least'", lambda: teachers.fusion_weights(jnp.ones(2), kind="least")),
  ],
)
def test_mistakes_are_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()
