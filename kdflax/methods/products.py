"""Methods on products of feature maps: correlations of channels, and flows between stages."""

from typing import Any

from kdflax import losses
from kdflax.methods.method import Method, Weight, alone
from kdflax.methods.outputs import of_flows, of_maps
from kdflax.methods.pairs import Pair


def nst(pair: Pair, *, weight: Weight = 50.0) -> Method:
  """Learn the distribution of what the channels of each stage respond to.

  Args:
    pair: of models with feature maps, of any widths and sizes.
    weight: of each stage's Term, a number or a schedule.

  Returns:
    A method with the Terms `nst/STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.nst(pair).terms)
    ['nst/stage1', 'nst/stage2']

  Reference: Zehao Huang and Naiyan Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
  arXiv 1707.01219.
  """
  return of_maps(pair, losses.nst, weight=weight)


def ickd(pair: Pair, *, weight: Weight = 2.5) -> Method:
  """Learn how the channels of the last stage correlate.

  Args:
    pair: of models with feature maps; channels that differ are met by a 1x1 convolution, which the authors' code has in
      any case, with BatchNorm.
    weight: of the Term, a number or a schedule.

  Returns:
    A method with the Term `ickd/STAGE` and, where channels differ, the connector `ickd_STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.ickd(pair).models)
    ['ickd_stage2']

  Reference: Li Liu, Qingle Huang, Sihao Lin, Hongwei Xie, Bing Wang, Xiaojun Chang and Xiaodan Liang, "Exploring
  Inter-Channel Correlation for Diversity-preserved Knowledge Distillation", 2021, arXiv 2202.03680.
  """
  last = pair.some_stages()[-1:]
  return of_maps(pair, losses.inter_channel_correlation, stages=last, connect=True, name="ickd", weight=weight)


def fsp(pair: Pair, *, joint: bool = False, weight: Weight | None = None) -> Method:
  """Learn the flow from stage to stage: how the channels of one go with those of the next.

  In the paper this is a training of its own, from which the student goes on.

  Args:
    pair: of models with two stages or more; channels that differ are met by 1x1 convolutions, which the paper has not.
    joint: whether the flow is learned beside the other Terms instead of in a stage before them.
    weight: of each Term, a number or a schedule; by default 1 in a stage of its own, and 50 beside the labels.

  Returns:
    A method with the Terms `fsp/STAGE` and connectors `fsp_STAGE`, all in the stage `fsp` unless `joint`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.fsp(pair).stages["fsp"].models)
    ['fsp_stage1', 'fsp_stage2']

  Reference: Junho Yim, Donggyu Joo, Jihoon Bae and Junmo Kim, "A Gift from Knowledge Distillation: Fast Optimization,
  Network Minimization and Transfer Learning", CVPR 2017.
  """
  weight = (50.0 if joint else 1.0) if weight is None else weight
  method = of_flows(pair, losses.fsp, weight=weight)
  return method if joint else alone(method, pair.named("fsp"))


def kdsvd(pair: Pair, *, weight: Weight = 1.0, **settings: Any) -> Method:
  """Learn how the strongest directions of one stage's map go with those of the next.

  Args:
    pair: of models with two stages or more; channels that differ are met by 1x1 convolutions.
    weight: of each Term, a number or a schedule.
    **settings: `k` (1) of `losses.kdsvd`.

  Returns:
    A method with the Terms `kdsvd/STAGE` and connectors `kdsvd_STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.kdsvd(pair).terms)
    ['kdsvd/stage2']

  Reference: Seung Hyun Lee, Dae Ha Kim and Byung Cheol Song, "Self-supervised Knowledge Distillation Using Singular
  Value Decomposition", 2018, arXiv 1807.06819.
  """
  return of_flows(pair, losses.kdsvd, weight=weight, **settings)
