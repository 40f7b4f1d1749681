"""The catalogue: every balancing method, what it reads and solves, and how it is set up as published.

The one table that docs/balancing.md, the studies and the tests read. A new method gets an entry under the name the
field knows it by; what is no method of its own gets a line in `TOOLS`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdflax.balancing import from_gradients, from_gramian, from_losses, preferences, shares, weightings
from kdflax.balancing.balancer import Balancer, smoothed
from kdflax.balancing.combiner import Combiner, from_function

TOOLS = {
  "combine": "the weighted sum of the tasks' gradients",
  "conflict_count": "how many pairs of gradients conflict, for logs",
  "from_balancer": "a combiner that applies a balancer",
  "from_function": "a combiner from a function of the gradients",
  "from_loss_weighting": "a balancer from a function of the losses",
  "from_weighting": "a balancer from a weighting of the Gramian",
  "gradient_cosines": "cosines between the gradients, for logs",
  "gramian": "inner products of the gradients; with `depth=1` one Gramian for each layer",
  "group_tasks": "which tasks should share a network, from their affinities",
  "init_rows": "the state for `update_rows`",
  "joint_loss": "the weighted sum of the losses",
  "per_group": "a weighting for each layer by itself, of `gramian(gradients, depth=1)`",
  "random_order": "draws the order for `pcgrad`",
  "representation_gradients": "T backward passes through the heads only, and one through the trunk",
  "smoothed": "averages the weights of any balancer over time (CR-MOGM), for noisy Gramians",
  "task_affinity": "by how much a step for one task lowers the loss of another (TAG)",
  "task_gradients": "losses and gradients of all tasks; `batch_size` trades time for memory",
  "task_gramian": "losses and Gramian without holding the gradients of all tasks, and the way back for its weights",
  "update_rows": "from the losses of rows to one gradient, for any balancer, combiner or None: what a learner calls",
}


class Entry(NamedTuple):
  """One method.

  Attributes:
    function: of `kdflax.balancing`, whose docstring names the paper.
    solves: what it minimises or solves, in a line.
    build: `(number of tasks, number of steps) -> Balancer or Combiner`, with the published setting.
    when: what it is for.
    setting: what was published, in words; empty where there is nothing to set.
    least: the number of tasks below which it is of no use.
  """

  function: Callable[..., Any]
  solves: str
  build: Callable[[int, int], Balancer | Combiner]
  when: str
  setting: str = ""
  least: int = 1

  @property
  def reads(self) -> Literal["losses", "gramian", "gradients"]:
    """What the method looks at."""
    return self.build(3, 30).needs

  @property
  def state(self) -> str:
    """What the method keeps from step to step, in words."""
    tasks, width = 3, 5
    made: Any = self.build(tasks, 30)
    like = jnp.zeros((tasks, width)) if made.needs == "gradients" else tasks
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: made.init(like)))]
    if (tasks, width) in shapes:
      return "T gradients"
    return "`[T, T]`" if (tasks, tasks) in shapes else "small" if shapes else "none"


def _adam() -> optax.GradientTransformation:
  """For the numbers that a balancer learns."""
  return optax.adam(0.025)


def _of_gramian(weighting: Callable[..., jax.Array], **settings: Any) -> Callable[[int, int], Balancer]:
  return lambda tasks, steps: from_gramian.from_weighting(partial(weighting, **settings))


CATALOGUE: dict[str, Entry] = {
  "constant weights": Entry(
    from_losses.fixed,
    "`sum w_i L_i`",
    lambda tasks, steps: from_losses.fixed(1.0),
    "the baseline that most methods fail to beat on average: always run it",
    "all 1",
  ),
  "random weights": Entry(
    from_losses.random_weights,
    "the same with random w",
    lambda tasks, steps: from_losses.random_weights(),
    "a second baseline",
  ),
  "DWA": Entry(
    from_losses.dynamic_weight_average,
    "equal relative progress from epoch to epoch",
    lambda tasks, steps: from_losses.dynamic_weight_average(steps_per_epoch=max(steps // 30, 1)),
    "losses of like scale",
    "temperature 2; here 30 epochs",
  ),
  "uncertainty": Entry(
    from_losses.uncertainty,
    "`sum L e^-s / 2 + s / 2` over s too",
    lambda tasks, steps: from_losses.uncertainty(optimizer=_adam()),
    "losses of different units",
    "here Adam at 0.025",
  ),
  "UW-SO": Entry(
    from_losses.uw_so,
    "`w = softmax(1 / (L temperature))`",
    lambda tasks, steps: from_losses.from_loss_weighting(partial(from_losses.uw_so, temperature=10.0)),
    "as uncertainty, without learning: one number to tune",
    "temperature tuned on each data set; here 10",
  ),
  "IMTL-L": Entry(
    from_losses.imtl_l,
    "`sum e^s L - s` over s too",
    lambda tasks, steps: from_losses.imtl_l(optimizer=_adam()),
    "as uncertainty, without its noise model",
    "here Adam at 0.025",
  ),
  "geometric": Entry(
    from_losses.geometric,
    "`(prod L_i)^(1/T)`",
    lambda tasks, steps: from_losses.geometric(),
    "positive losses of very different scale",
  ),
  "FAMO": Entry(
    from_losses.famo,
    "the slowest fall of `log L`",
    lambda tasks, steps: from_losses.famo(),
    "many tasks, where T backward passes are too many",
    "Adam at 0.025, decay 0.001",
  ),
  "smooth Tchebycheff": Entry(
    from_losses.smooth_tchebycheff,
    "smoothed `max log(L / nadir)`",
    lambda tasks, steps: from_losses.smooth_tchebycheff(
      warmup_steps=max(steps // 10, 1), nadir_steps=max(steps // 20, 1)
    ),
    "the worst task counts",
    "smoothing 1; here a tenth of the steps to warm up",
  ),
  "PBI": Entry(
    preferences.pbi,
    "distance along and from a preferred line",
    lambda tasks, steps: preferences.pbi(jnp.ones(tasks)),
    "a chosen point of the Pareto front, not convex ones too",
    "penalty 5",
  ),
  "COSMOS": Entry(
    preferences.cosmos,
    "r.L less the cosine with r",
    lambda tasks, steps: preferences.cosmos(jnp.ones(tasks) / tasks),
    "one model for all preferences",
    "penalty by data set; here 1",
  ),
  "GradNorm": Entry(
    from_gramian.grad_norm,
    "equal training rates in gradient norm",
    lambda tasks, steps: from_gramian.grad_norm(optimizer=_adam()),
    "tasks of different speed",
    "alpha 1.5; here Adam at 0.025",
  ),
  "GradVac": Entry(
    from_gramian.grad_vac,
    "pairwise target cosines",
    lambda tasks, steps: from_gramian.grad_vac(),
    "tasks with stable similarity, e.g. languages",
    "beta 0.5 in LibMTL",
  ),
  "PCD": Entry(
    from_gramian.pcd,
    "nearest to the first gradient, with a share of progress for each other",
    lambda tasks, steps: from_gramian.pcd(),
    "one task comes first, the others (teachers, say) are constraints",
    "tau 0.02, beta 0.999, epsilon 1e-8 in TorchJD",
  ),
  "PCGrad": Entry(
    weightings.pcgrad,
    "pairwise projection of conflicts",
    lambda tasks, steps: from_gramian.from_weighting(weightings.pcgrad, random_order=True),
    "comparison with the literature; may conflict for T > 2",
  ),
  "MGDA": Entry(
    weightings.mgda,
    "shortest vector of the convex hull",
    _of_gramian(weightings.mgda),
    "a certificate of Pareto stationarity; small gradients decide",
  ),
  "CAGrad": Entry(
    weightings.cagrad,
    "best worst-task progress near the mean",
    _of_gramian(weightings.cagrad),
    "a good default between the mean and MGDA",
    "c 0.5",
  ),
  "IMTL-G": Entry(
    shares.imtl_g,
    "equal projections on all gradients",
    _of_gramian(shares.imtl_g),
    "all tasks at one speed; weights may be negative",
  ),
  "Nash-MTL": Entry(
    shares.nash_mtl,
    "`G a = 1 / a`",
    _of_gramian(shares.nash_mtl),
    "scale-free bargaining; length sqrt(T), so rescale the step",
  ),
  "FairGrad": Entry(
    shares.fair_grad,
    "`G a = a^(-1/alpha)`",
    _of_gramian(shares.fair_grad, alpha=2.0),
    "tune between the sum and the worst task",
    "alpha 2",
  ),
  "Aligned-MTL": Entry(
    shares.aligned_mtl,
    "condition number 1 of the gradient system",
    _of_gramian(shares.aligned_mtl),
    "unstable training by dominating directions",
    'scale "min"',
  ),
  "UPGrad": Entry(
    weightings.upgrad,
    "each gradient projected on the cone of no conflict, summed",
    _of_gramian(weightings.upgrad),
    "no task may rise, and large gradients should count",
  ),
  "DualProj": Entry(
    weightings.dual_projection,
    "mean gradient projected on that cone (GEM)",
    _of_gramian(weightings.dual_projection),
    "the mean's path unless it harms a task",
  ),
  "ConFIG": Entry(
    shares.conflict_free,
    "equal, positive cosines with all gradients, by least squares where there is no such direction",
    _of_gramian(shares.conflict_free),
    "loss scales differ by orders (physics terms, distillation terms)",
  ),
  "Krum": Entry(
    weightings.krum,
    "nearest to its neighbours",
    _of_gramian(weightings.krum, num_byzantine=0),
    "sources that may be corrupt",
    "here none of them corrupt",
    least=3,
  ),
  "smoothed UPGrad": Entry(
    smoothed,
    "running mean of the weights of another balancer",
    lambda tasks, steps: smoothed(from_gramian.from_weighting(weightings.upgrad)),
    "noisy Gramians",
    "decay grows to 1; here 0.9",
  ),
  "DB-MTL": Entry(
    from_gradients.db_mtl,
    "equal norms of running gradients of `log L`",
    lambda tasks, steps: from_gradients.db_mtl(),
    "loss scale and gradient scale both differ",
    "beta 0.9",
  ),
  "MoCo": Entry(
    from_gradients.moco,
    "MGDA on running gradients",
    lambda tasks, steps: from_gradients.moco(),
    "small batches, noisy gradients",
    "beta 0.5, gamma 0.1, both falling with the root of the step",
  ),
  "ExcessMTL": Entry(
    from_gradients.excess_mtl,
    "worst excess risk",
    lambda tasks, steps: from_gradients.excess_mtl(),
    "label noise: hard tasks need not be far from converged",
    "learning rate 0.01",
  ),
  "GradDrop": Entry(
    from_gradients.grad_drop,
    "one sign for each coordinate, drawn",
    lambda tasks, steps: from_function(from_gradients.grad_drop, needs_key=True),
    "many weak conflicts",
    "no leak",
  ),
  "trimmed mean": Entry(
    from_gradients.trimmed_mean,
    "mean without extremes by coordinate",
    lambda tasks, steps: from_function(partial(from_gradients.trimmed_mean, trim=1)),
    "sources that may be corrupt",
    "here one at each end",
    least=3,
  ),
}
