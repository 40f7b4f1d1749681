"""Merging: the params of several models into those of one, by formula or learned by distillation."""

from kdflax.merging.averages import average, fisher, regmean
from kdflax.merging.differences import dare, task_arithmetic, ties
from kdflax.merging.learned import layer_wise, layers, learned

__all__ = [
  "average",
  "dare",
  "fisher",
  "layer_wise",
  "layers",
  "learned",
  "regmean",
  "task_arithmetic",
  "ties",
]
