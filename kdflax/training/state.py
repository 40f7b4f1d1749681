"""Everything that training changes, as one pytree."""

from typing import Any, NamedTuple

import jax

PyTree = Any


class TrainState(NamedTuple):
  """All that a training step reads and replaces, and all that a checkpoint holds.

  Attributes:
    step: int32 scalar, the number of updates done.
    params: what is learned, by model name.
    model_state: what models change otherwise, by model name: running statistics, the memory of a contrastive loss.
    opt_state: of the Optax optimizer.
    balancer_state: of the balancer, `()` without one.
    averages: exponential moving averages of params, by the name of the model that they serve.
    key: typed PRNG key, constant: a step draws from `fold_in(key, step)`.
  """

  step: jax.Array
  params: dict[str, PyTree]
  model_state: dict[str, PyTree]
  opt_state: PyTree
  balancer_state: PyTree
  averages: dict[str, PyTree]
  key: jax.Array
