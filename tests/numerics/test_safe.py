"""The functions that carry the digits of the losses, against the plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax.numerics import safe


@pytest.mark.parametrize("x", [[-40.0, -41.0], [-1.0, 0.5], [90.0, 3.0], [-np.inf, -np.inf]])
def test_the_logarithm_of_one_plus_a_sum_keeps_the_digits_of_the_sum(x):
  expected = np.log1p(np.exp(np.float64(x)).sum())
  np.testing.assert_allclose(safe.log_one_plus_sum_exp(jnp.float32(x)), expected, rtol=1e-6)
  slope = jax.grad(safe.log_one_plus_sum_exp)(jnp.float32(x))
  np.testing.assert_allclose(slope, np.exp(np.float64(x) - expected), rtol=1e-5)


@pytest.mark.parametrize("distance", [2**-10, 2**-4, 0.5])
def test_a_divergence_keeps_its_digits_where_the_distributions_are_close(distance):
  p, epsilon = np.array([0.25, 0.25, 0.5]), 1e-7
  q_minus_p = np.float32(distance * np.array([0.125, -0.375, 0.25]))  # exact, of sum 0
  expected = (p * np.log((p + epsilon) / (p + np.float64(q_minus_p) + epsilon))).sum()
  got = safe.divergence_terms(jnp.float32(p), jnp.asarray(q_minus_p), jnp.float32(epsilon)).sum()
  np.testing.assert_allclose(got, expected, rtol=1e-5)  # of 1e-7 at the least distance, where a term is 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_a_direction_and_its_derivative_do_not_depend_on_the_scale(scale):
  row = np.array([3.0, -4.0])
  np.testing.assert_allclose(safe.l2_normalize(jnp.float32(row * scale)), row / 5, rtol=1e-6)
  slope = jax.grad(lambda x: safe.l2_normalize(x)[0])(jnp.float32(row * scale)) * scale
  np.testing.assert_allclose(slope, [(1 - 0.36) / 5, 0.48 / 5], rtol=1e-5)


def test_huber_and_its_derivative_at_small_and_large_differences():
  difference = np.array([1e-20, -1e-3, 0.5, -2.0])
  expected = np.where(np.abs(difference) < 1, difference**2 / 2, np.abs(difference) - 0.5)
  np.testing.assert_allclose(safe.huber(jnp.float32(difference)), expected, rtol=1e-6, atol=1e-38)
  slope = jax.grad(lambda x: safe.huber(x).sum())(jnp.float32(difference))
  np.testing.assert_allclose(slope, np.clip(difference, -1, 1), rtol=1e-6)
