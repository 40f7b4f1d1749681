"""Layers for many tasks and teachers: orthogonal projections, and one weight with low-rank additions for each task."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kdflax.model import PyTree


def orthogonal_matrix(raw: jax.Array) -> jax.Array:
  """An orthogonal matrix from free parameters: `exp(A - A')`, A the lower triangle.

  A projection that turns features without changing a length or an angle, so that a student cannot bend them to the
  teacher. Whatever the parameters are the result is orthogonal, with determinant 1; zeros give the identity.

  Args:
    raw: `[..., width, width]`; what lies above the diagonal does not matter.

  Returns:
    `[..., width, width]`. For a projection to fewer features take so many of its rows or columns.

  Raises:
    ValueError: if the matrix is not square.

  Examples:
    >>> import jax.numpy as jnp
    >>> matrix = orthogonal_matrix(jnp.array([[0.0, 0.0], [jnp.pi / 2, 0.0]]))
    >>> print(jnp.abs(matrix - jnp.array([[0.0, -1.0], [1.0, 0.0]])).max() < 1e-6)
    True

  Reference: Roy Miles, Ismail Elezi and Jiankang Deng, "VkD: Improving Knowledge Distillation using Orthogonal
  Projections", 2024, arXiv 2403.06213.
  """
  if raw.ndim < 2 or raw.shape[-1] != raw.shape[-2]:
    raise ValueError(f"raw must be square, [..., width, width]; got shape {raw.shape}")
  lower = jnp.tril(raw)
  return jax.scipy.linalg.expm(lower - lower.mT)


def multi_task_low_rank(
  params: Mapping[str, PyTree],
  x: jax.Array,
  task_inputs: Mapping[str, jax.Array] | None = None,
  *,
  mode: Literal["matrix", "matrixv2", "addition"],
  shared_scale: float | jax.Array,
  task_scales: Mapping[str, float | jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """A dense layer for all tasks, with a low-rank addition to its weight for each.

  The large kernel may stay frozen, as of a pretrained transformer, while the small factors learn.

    shared = W x + B + a U D x,   task = W x + B + a_t U_t D_t x_t

  In "matrixv2" a task has the shared addition as well. In "addition" there are no shared factors: what is added to
  `W x + B` is the layer norm of the sum of all tasks' outputs.

  Args:
    params: `{"kernel": [in, out], "bias": [out], "tasks": {task: {"down": [in, rank], "up": [rank, out]}}}`, and
      `"shared"` of the form of a task, or for "addition" `"norm": {"scale": [out], "bias": [out]}`.
    x: `[..., in]`, of the shared stream.
    task_inputs: `[..., in]` by task, of the streams of the tasks; None where all read x.
    mode: static.
    shared_scale: a.
    task_scales: a_t by task.

  Returns:
    The shared output `[..., out]`, and that of each task.

  Raises:
    ValueError: if `mode` is not one of those allowed, or the tasks of `params`, `task_scales` and `task_inputs` differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> task = {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}
    >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2), "tasks": {"left": task}, "shared": task}
    >>> shared, tasks = multi_task_low_rank(
    ...   params, jnp.array([1.0, 2.0]), mode="matrix", shared_scale=1.0, task_scales={"left": 2.0}
    ... )
    >>> print(shared, tasks["left"])
    [4. 5.] [7. 8.]

  Reference: Ahmed Agiza, Marina Neseem and Sherief Reda, "MTLoRA: A Low-Rank Adaptation Approach for Efficient
  Multi-Task Learning", 2024, arXiv 2403.20320.
  """
  if mode not in ("matrix", "matrixv2", "addition"):
    raise ValueError(f'mode must be "matrix", "matrixv2" or "addition"; got {mode!r}')
  tasks = set(params["tasks"])
  for name, given in (("task_scales", task_scales), ("task_inputs", task_inputs)):
    if given is not None and set(given) != tasks:
      raise ValueError(f"{name} must be of the tasks {sorted(tasks)} of params; got {sorted(given)}")
  low_rank = lambda factors, inputs: inputs @ factors["down"] @ factors["up"]
  dense = x @ params["kernel"] + params["bias"]
  shared = shared_scale * low_rank(params["shared"], x) if mode != "addition" else None
  outputs: dict[str, Any] = {}
  for task, factors in params["tasks"].items():
    own = task_scales[task] * low_rank(factors, x if task_inputs is None else task_inputs[task])
    outputs[task] = dense + own + (shared if mode == "matrixv2" else 0)
  if mode == "addition":
    shared = _layer_norm(jnp.asarray(sum(outputs.values())), **params["norm"])
  return dense + shared, outputs


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
  deviation = x - x.mean(axis=-1, keepdims=True)
  return deviation * jax.lax.rsqrt(jnp.square(deviation).mean(axis=-1, keepdims=True) + 1e-5) * scale + bias
