"""What every weighting starts from: a checked Gramian without its units, and weights that answer for absent tasks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Problem(NamedTuple):
  gramian: jax.Array  # [T, T], largest diagonal entry 1, absent tasks zero
  scale: jax.Array  # what the Gramian was divided by
  cosines: jax.Array  # [T, T], unit diagonal, rows that take no part are those of the identity
  norms: jax.Array  # [T], in units of the largest
  inverse_norms: jax.Array  # [T], 0 for rows that take no part
  valid: jax.Array  # [T], present and not zero
  present: jax.Array  # [T]
  num_present: jax.Array | int  # at least 1


def check_gramian(gramian: jax.Array, present: jax.Array | None = None, num_tasks: int | None = None) -> None:
  """Raise ValueError unless `gramian` is `[T, T]` and `present` is `[T]` bool."""
  if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not gramian.shape[0]:
    raise ValueError(f"gramian must be square, [T, T], and not empty; got shape {gramian.shape}; for groups, use vmap")
  tasks = gramian.shape[0]
  if num_tasks is not None and num_tasks != tasks:
    raise ValueError(f"gramian has shape {gramian.shape} but there are {num_tasks} tasks")
  if jnp.issubdtype(gramian.dtype, jnp.complexfloating):
    raise ValueError(f"gramian must be real; got dtype {gramian.dtype}")
  if present is not None:
    check_present(present, tasks)


def check_present(present: jax.Array, num_tasks: int) -> None:
  """Raise ValueError unless `present` is `[T]` bool."""
  if jnp.shape(present) != (num_tasks,) or jnp.asarray(present).dtype != jnp.bool_:
    raise ValueError(
      f"present must be bool of shape ({num_tasks},), one entry for each task; "
      f"got {jnp.asarray(present).dtype} of shape {jnp.shape(present)}"
    )


def normalise(gramian: jax.Array, present: jax.Array | None) -> Problem:
  """Check the Gramian, drop absent tasks, and take out its scale and the norms."""
  gramian = jnp.asarray(gramian)
  check_gramian(gramian, present)
  tasks = gramian.shape[0]
  gramian = gramian.astype(jnp.promote_types(gramian.dtype, jnp.float32))
  count: jax.Array | int = tasks
  if present is None:
    present = jnp.ones(tasks, bool)
  else:
    count = jnp.maximum(present.sum(), 1)
    gramian = jnp.where(present[:, None] & present, gramian, 0)
  largest = jnp.diagonal(gramian).max()
  scale = jnp.where(largest > 0, largest, 1)
  gramian = gramian / scale
  norms = jnp.sqrt(jnp.diagonal(gramian))
  valid = norms > 0
  inverse_norms = jnp.where(valid, 1 / jnp.where(valid, norms, 1), 0)
  cosines = jnp.clip(gramian * inverse_norms[:, None] * inverse_norms, -1, 1)
  diagonal = jnp.arange(tasks)[:, None] == jnp.arange(tasks)
  return Problem(gramian, scale, jnp.where(diagonal, 1, cosines), norms, inverse_norms, valid, present, count)


def checked_weights(problem: Problem, weights: jax.Array) -> jax.Array:
  """Give absent tasks 0, and NaN to all when the Gramian is not finite."""
  weights = jnp.where(problem.present, weights, 0)
  return jnp.where(jnp.isfinite(problem.gramian).all(), weights, jnp.nan)


def preferred(problem: Problem, preference: jax.Array | None) -> jax.Array:
  """Return the preference of the present tasks, equal shares by default."""
  tasks = problem.norms.shape[0]
  if preference is None:
    return jnp.where(problem.present, 1 / problem.num_present, 0).astype(problem.norms.dtype)
  if jnp.shape(preference) != (tasks,):
    raise ValueError(f"preference must have shape ({tasks},), one entry for each task; got {jnp.shape(preference)}")
  return jnp.where(problem.present, jnp.asarray(preference, problem.norms.dtype), 0)


def matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
  """Multiply a matrix or a vector with a vector; accelerators would round the factors of a float32 product."""
  return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)
