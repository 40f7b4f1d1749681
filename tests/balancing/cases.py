"""Gradients `[T, P]` that solvers fail on, and the weightings under test."""

import functools

import jax
import numpy as np

from kdflax import balancing

SIZES = (1, 2, 3, 8, 64)


def cyclic_order(gramian):
  """A fixed order for `pcgrad`, the same relative to every task, so that it can be permuted along with the rows."""
  tasks = gramian.shape[0]
  return (np.arange(tasks)[:, None] + np.arange(1, tasks + 1)) % tasks


def pcgrad(gramian, *, present=None):
  return balancing.pcgrad(gramian, cyclic_order(gramian), present=present)


WEIGHTINGS = {
  "mgda": balancing.mgda,
  "cagrad": balancing.cagrad,
  "upgrad": balancing.upgrad,
  "dual_projection": balancing.dual_projection,
  "nash_mtl": balancing.nash_mtl,
  "fair_grad": functools.partial(balancing.fair_grad, alpha=2.0),
  "imtl_g": balancing.imtl_g,
  "conflict_free": balancing.conflict_free,
  "aligned_mtl": balancing.aligned_mtl,
  "aligned_mtl median": functools.partial(balancing.aligned_mtl, scale="median"),
  "aligned_mtl rmse": functools.partial(balancing.aligned_mtl, scale="rmse"),
  "pcgrad": pcgrad,
  "krum": functools.partial(balancing.krum, num_byzantine=0),
}


@functools.cache
def jitted(name):
  return jax.jit(lambda gramian, present=None: WEIGHTINGS[name](gramian, present=present))


def random(tasks, width, seed=0):
  return np.random.default_rng((tasks, width, seed)).normal(size=(tasks, width))


def adversarial(tasks):
  """Named sets of gradients; every one has T > P, T < P, or structure that breaks a factorisation."""
  for width in (max(2, tasks // 2), 4 * tasks + 2):
    rows = random(tasks, width)
    sign = (-1.0) ** np.arange(tasks)[:, None]
    half = tasks // 2
    duplicate, zero = rows.copy(), rows.copy()
    duplicate[half : 2 * half] = duplicate[:half]
    zero[0] = 0
    scaled = rows * 10.0 ** np.linspace(-4, 4, tasks)[:, None]
    scaled_duplicate = scaled.copy()
    scaled_duplicate[half : 2 * half] = 7 * scaled_duplicate[:half]
    yield f"random {width}", rows
    yield f"conflict {width}", rows - 1.05 * rows.mean(0)
    yield f"opposed {width}", rows[:1] * sign + 1e-2 * rows
    yield f"exactly opposed {width}", rows[:1] * sign
    yield f"nearly opposed {width}", rows[:1] * sign + 1e-5 * rows
    yield f"duplicates {width}", duplicate
    yield f"scaled {width}", scaled
    yield f"scaled duplicates {width}", scaled_duplicate
    yield f"zero row {width}", zero
    yield f"all zero {width}", np.zeros_like(rows)
    yield f"tiny {width}", 1e-6 * rows / np.linalg.norm(rows, axis=1, keepdims=True)
    yield f"nearly equal {width}", rows[:1] + 1e-3 * rows


def many(tasks):
  """Gradients of many tasks that conflict or nearly repeat, without anything that the Gramian cannot tell."""
  for seed in range(2):
    rows, centres = random(tasks, 100, seed), random(tasks // 3, 100, seed)
    yield f"conflict {seed}", rows - 1.02 * rows.mean(0)
    nearest = np.random.default_rng(seed).integers(0, len(centres), tasks)
    for spread in (1e-2, 1e-3, 1e-4):
      yield f"clusters of {spread} {seed}", centres[nearest] + spread * rows
    paired = random(tasks, 1000, seed)
    paired[1::2] = 0.7 * (paired[1::2] - paired[::2])
    yield f"opposed pairs {seed}", paired


def cosines(direction, gradients):
  """Cosines with every gradient; 0 where either is zero."""
  norms = np.linalg.norm(gradients, axis=1) * np.linalg.norm(direction)
  return gradients @ direction / np.where(norms > 0, norms, 1)


def assert_close(got, expected, tolerance):
  """Compare relative to the largest entry of the expected array."""
  got, expected = np.asarray(got), np.asarray(expected)
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(initial=0), 1e-300))
