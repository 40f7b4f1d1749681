"""Balancing several tasks: weights from losses and gradients, each method one function."""

from kdflax.balancing.affinity import group_tasks, task_affinity
from kdflax.balancing.balancer import Balancer, joint_loss, smoothed
from kdflax.balancing.catalogue import CATALOGUE, Entry
from kdflax.balancing.combiner import Combiner, from_balancer, from_function
from kdflax.balancing.from_gradients import db_mtl, excess_mtl, grad_drop, moco, trimmed_mean
from kdflax.balancing.from_gramian import from_weighting, grad_norm, grad_vac, pcd
from kdflax.balancing.from_losses import (
  dynamic_weight_average,
  famo,
  fixed,
  from_loss_weighting,
  geometric,
  imtl_l,
  random_weights,
  smooth_tchebycheff,
  uncertainty,
  uw_so,
)
from kdflax.balancing.gradients import (
  combine,
  conflict_count,
  gradient_cosines,
  gramian,
  per_group,
  representation_gradients,
  task_gradients,
  task_gramian,
)
from kdflax.balancing.preferences import cosmos, pbi
from kdflax.balancing.rows import Pullback, RowsUpdate, init_rows, update_rows
from kdflax.balancing.shares import aligned_mtl, conflict_free, fair_grad, imtl_g, nash_mtl
from kdflax.balancing.weightings import cagrad, dual_projection, krum, mgda, pcgrad, random_order, upgrad

__all__ = [
  "CATALOGUE",
  "Balancer",
  "Combiner",
  "Entry",
  "Pullback",
  "RowsUpdate",
  "aligned_mtl",
  "cagrad",
  "combine",
  "conflict_count",
  "conflict_free",
  "cosmos",
  "db_mtl",
  "dual_projection",
  "dynamic_weight_average",
  "excess_mtl",
  "fair_grad",
  "famo",
  "fixed",
  "from_balancer",
  "from_function",
  "from_loss_weighting",
  "from_weighting",
  "geometric",
  "grad_drop",
  "grad_norm",
  "grad_vac",
  "gradient_cosines",
  "gramian",
  "group_tasks",
  "imtl_g",
  "imtl_l",
  "init_rows",
  "joint_loss",
  "krum",
  "mgda",
  "moco",
  "nash_mtl",
  "pbi",
  "pcd",
  "pcgrad",
  "per_group",
  "random_order",
  "random_weights",
  "representation_gradients",
  "smooth_tchebycheff",
  "smoothed",
  "task_affinity",
  "task_gradients",
  "task_gramian",
  "trimmed_mean",
  "uncertainty",
  "update_rows",
  "upgrad",
  "uw_so",
]
