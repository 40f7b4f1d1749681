"""Orthogonal projections, and dense layers with low-rank additions for each task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import models


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def test_an_orthogonal_matrix_keeps_lengths_and_learns():
  raw = normal(0, 5, 5)
  matrix = models.orthogonal_matrix(raw)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(5), atol=1e-5)
  np.testing.assert_array_equal(models.orthogonal_matrix(jnp.triu(raw, 1)), np.eye(5))
  gradient = jax.grad(lambda raw: (models.orthogonal_matrix(raw) * normal(1, 5, 5)).sum())(raw)
  assert jnp.isfinite(gradient).all() and jnp.tril(gradient, -1).any() and not jnp.triu(gradient).any()
  with pytest.raises(ValueError, match=r"raw must be square.*\(2, 3\)"):
    models.orthogonal_matrix(raw[:2, :3])


def factors(seed, rank):
  return {"down": normal(seed, 4, rank), "up": normal(seed + 1, rank, 3)}


PARAMS = {
  "kernel": normal(2, 4, 3),
  "bias": normal(3, 3),
  "tasks": {"left": factors(4, 2), "right": factors(6, 1)},
  "shared": factors(8, 2),
  "norm": {"scale": normal(10, 3), "bias": normal(11, 3)},
}
SCALES = {"left": 0.5, "right": 2.0}
X = normal(12, 2, 4)


def weight(addition, scale):
  return scale * addition["down"] @ addition["up"]


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_a_low_rank_addition_is_a_dense_layer_of_its_weight(mode):
  shared, tasks = models.multi_task_low_rank(PARAMS, X, mode=mode, shared_scale=1.5, task_scales=SCALES)
  added = weight(PARAMS["shared"], 1.5)
  for task, output in tasks.items():
    kernel = PARAMS["kernel"] + weight(PARAMS["tasks"][task], SCALES[task]) + (added if mode == "matrixv2" else 0)
    np.testing.assert_allclose(output, X @ kernel + PARAMS["bias"], rtol=1e-4, atol=1e-4)
  if mode == "addition":
    total = np.asarray(tasks["left"] + tasks["right"])
    scores = (total - total.mean(1, keepdims=True)) / np.sqrt(total.var(1, keepdims=True) + 1e-5)
    expected = X @ PARAMS["kernel"] + PARAMS["bias"] + scores * PARAMS["norm"]["scale"] + PARAMS["norm"]["bias"]
  else:
    expected = X @ (PARAMS["kernel"] + added) + PARAMS["bias"]
  np.testing.assert_allclose(shared, expected, rtol=1e-4, atol=1e-4)


def test_tasks_may_have_streams_of_their_own():
  inputs = {"left": 2 * X, "right": X}
  options = {"mode": "matrix", "shared_scale": 1.0, "task_scales": SCALES}
  _, tasks = models.multi_task_low_rank(PARAMS, X, inputs, **options)
  expected = X @ PARAMS["kernel"] + PARAMS["bias"] + 2 * X @ weight(PARAMS["tasks"]["left"], 0.5)
  np.testing.assert_allclose(tasks["left"], expected, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match=r"task_inputs must be of the tasks \['left', 'right'\].*got \['left'\]"):
    models.multi_task_low_rank(PARAMS, X, {"left": X}, **options)
  with pytest.raises(ValueError, match="mode must be"):
    models.multi_task_low_rank(PARAMS, X, **(options | {"mode": "sum"}))
