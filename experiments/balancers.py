"""The balancers that the studies compare, and one program for many of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from kdflax import balancing as b

# By the name of the paper, `(number of tasks, number of steps) -> balancer`. All are compared with constant weights.
BALANCERS = {name: entry.build for name, entry in b.CATALOGUE.items() if entry.function is not b.fixed}
NEED_THREE_TASKS = tuple(name for name, entry in b.CATALOGUE.items() if entry.least > 2)
# Of each kind a few: from losses, from the Gramian, from whole gradients.
CHOSEN = ("DWA", "uncertainty", "FAMO", "MGDA", "PCGrad", "CAGrad", "Nash-MTL", "Aligned-MTL", "UPGrad", "DB-MTL")


def one_of(made: Sequence[Any], index: jax.Array) -> Any:
  """Returns the balancer of an index that may be traced, so that one program serves all; so for combiners.

  The state holds that of each, and only the chosen one moves.
  """

  def update(*arguments, **keywords):
    *inputs, states = arguments

    def run(chosen: int):
      result, state = made[chosen].update(*inputs, states[chosen], **keywords)
      return result, (*states[:chosen], state, *states[chosen + 1 :])

    return jax.lax.switch(index, [partial(run, chosen) for chosen in range(len(made))])

  init = lambda like: tuple(one.init(like) for one in made)
  needs_key = any(one.needs_key for one in made)
  if made[0].needs == "gradients":
    return b.Combiner(init, update, needs_key)
  return b.Balancer(init, update, any(one.needs_gramian for one in made), needs_key)
