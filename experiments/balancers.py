"""Every balancer of kdflax by the name of its paper, with the settings of that paper."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdflax import balancing as b

Made = b.Balancer | b.Combiner
_ADAM = optax.adam(0.025)  # for the numbers that a balancer learns


def _gramian(weighting: Callable, **settings) -> Callable[[int, int], Made]:
  return lambda tasks, steps: b.from_weighting(partial(weighting, **settings))


BALANCERS: dict[str, Callable[[int, int], Made]] = {  # (number of tasks, number of steps) -> balancer
  # From the losses alone.
  "random weights": lambda tasks, steps: b.random_weights(),
  "DWA": lambda tasks, steps: b.dynamic_weight_average(steps_per_epoch=max(steps // 30, 1)),
  "uncertainty": lambda tasks, steps: b.uncertainty(optimizer=_ADAM),
  "IMTL-L": lambda tasks, steps: b.imtl_l(optimizer=_ADAM),
  "geometric": lambda tasks, steps: b.geometric(),
  "FAMO": lambda tasks, steps: b.famo(),
  "smooth Tchebycheff": lambda tasks, steps: b.smooth_tchebycheff(
    warmup_steps=max(steps // 10, 1), nadir_steps=max(steps // 20, 1)
  ),
  "PBI": lambda tasks, steps: b.pbi(jnp.ones(tasks)),
  "COSMOS": lambda tasks, steps: b.cosmos(jnp.ones(tasks) / tasks),
  # From the Gramian of the tasks' gradients.
  "GradNorm": lambda tasks, steps: b.grad_norm(optimizer=_ADAM),
  "GradVac": lambda tasks, steps: b.grad_vac(),
  "PCGrad": lambda tasks, steps: b.from_weighting(b.pcgrad, random_order=True),
  "MGDA": _gramian(b.mgda),
  "CAGrad": _gramian(b.cagrad),
  "IMTL-G": _gramian(b.imtl_g),
  "Nash-MTL": _gramian(b.nash_mtl),
  "FairGrad": _gramian(b.fair_grad, alpha=2.0),
  "Aligned-MTL": _gramian(b.aligned_mtl),
  "UPGrad": _gramian(b.upgrad),
  "DualProj": _gramian(b.dual_projection),
  "ConFIG": _gramian(b.conflict_free),
  "Krum": _gramian(b.krum, num_byzantine=0),
  "smoothed UPGrad": lambda tasks, steps: b.smoothed(b.from_weighting(b.upgrad)),
  # From the gradients themselves.
  "DB-MTL": lambda tasks, steps: b.db_mtl(),
  "MoCo": lambda tasks, steps: b.moco(),
  "ExcessMTL": lambda tasks, steps: b.excess_mtl(),
  "GradDrop": lambda tasks, steps: b.from_function(b.grad_drop, needs_key=True),
  "trimmed mean": lambda tasks, steps: b.from_function(partial(b.trimmed_mean, trim=1)),
}

NEED_THREE_TASKS = ("Krum", "trimmed mean")


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
  if isinstance(made[0], b.Combiner):
    return b.Combiner(init, update, needs_key)
  return b.Balancer(init, update, any(one.needs_gramian for one in made), needs_key)
