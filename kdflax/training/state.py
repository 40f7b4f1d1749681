"""Everything that training changes, as one pytree, and what may change it beside the optimizer."""

from typing import NamedTuple

import jax
import optax

from kdflax.model import Cost, PyTree


class Average(NamedTuple):
  """A model whose params follow another's: `average = decay * average + (1 - decay) * source` after each update.

  `decay` is in [0, 1], 0.999 say, or a schedule of such numbers.
  """

  source: str
  decay: float | optax.Schedule


class Penalty(NamedTuple):
  """A cost of the params themselves: `function(params by model name) -> scalar`, times a weight or a schedule.

  A Term that reads params by path (`"params.student.head.kernel"`) is a row like any other. A Penalty is none: no
  balancer sees it, and its gradient, which passes through no model, is taken once beside the rows, however many there
  are. That is why it is a form of its own and no Term with a switch.
  """

  function: Cost
  weight: float | jax.Array | optax.Schedule = 1.0


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
