"""Methods on feature maps that compare channels or positions as distributions, for dense tasks above all."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdflax import losses, models
from kdflax.methods.method import Method, Weight
from kdflax.methods.outputs import of_maps
from kdflax.methods.pairs import Pair
from kdflax.numerics.safe import l2_normalize
from kdflax.objectives import Term


def cwd(pair: Pair, *, stages: Sequence[str] | None = None, temperature: Any = 1.0, weight: Weight = 10.0) -> Method:
  """Learn where each channel is strong: its softmax over the positions.

  Args:
    pair: of models with feature maps; channels that differ are met by a 1x1 convolution.
    stages: which, by the student's names; the last by default. Published for all levels of a detector's pyramid.
    temperature: a number, a schedule or a context path.
    weight: of each stage's Term, a number or a schedule.

  Returns:
    A method with the Terms `cwd/STAGE` and connectors `cwd_STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.cwd(pair).models)
    ['cwd_stage2']

  Reference: Changyong Shu, Yifan Liu, Jianfei Gao, Zheng Yan and Chunhua Shen, "Channel-wise Knowledge Distillation for
  Dense Prediction", 2021, arXiv 2011.13256.
  """
  stages = pair.some_stages()[-1:] if stages is None else stages
  return of_maps(
    pair, losses.channel_wise, stages=stages, connect=True, name="cwd", weight=weight, temperature=temperature
  )


def pkd(pair: Pair, *, stages: Sequence[str] | None = None, weight: Weight = 6.0) -> Method:
  """Learn each channel up to its mean and scale over batch and positions: how it correlates with the teacher's.

  Args:
    pair: of models with feature maps; channels that differ are met by a 1x1 convolution.
    stages: which, by the student's names; the last by default. Published for all levels of a detector's pyramid.
    weight: of each stage's Term, a number or a schedule.

  Returns:
    A method with the Terms `pkd/STAGE` and connectors `pkd_STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.pkd(pair).models)
    ['pkd_stage2']

  Reference: Weihan Cao, Yifan Zhang, Jianfei Gao, Anda Cheng, Ke Cheng and Jian Cheng, "PKD: General Distillation
  Framework for Object Detectors via Pearson Correlation Coefficient", 2022, arXiv 2207.02039.
  """
  stages = pair.some_stages()[-1:] if stages is None else stages
  return of_maps(pair, losses.channel_correlation, stages=stages, connect=True, name="pkd", weight=weight)


def gram_anchoring(pair: Pair, *, stages: Sequence[str] | None = None, weight: Weight = 2.0, **settings: Any) -> Method:
  """Learn which positions of an image are alike: the cosines between all of them.

  Args:
    pair: of models with feature maps, or tokens `[batch, tokens, width]`, of as many positions and of any widths.
    stages: which, by the student's names; the last by default.
    weight: of each stage's Term, a number or a schedule.
    **settings: `kind` ("square"), `temperature` and `clip_negative` of `losses.token_similarity`.

  Returns:
    A method with the Terms `gram_anchoring/STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.gram_anchoring(pair).terms)
    ['gram_anchoring/stage2']

  Reference: Oriane Siméoni, Huy V. Vo, Maximilian Seitzer, Federico Baldassarre, Maxime Oquab, Cijo Jose, Vasil
  Khalidov, Marc Szafraniec, Seungeun Yi, Michaël Ramamonjisoa, Francisco Massa, Daniel Haziza, Luca Wehrstedt, Jianyuan
  Wang, Timothée Darcet, Théo Moutakanni, Leonel Sentana, Claire Roberts, Andrea Vedaldi, Jamie Tolan, John Brandt,
  Camille Couprie, Julien Mairal, Hervé Jégou, Patrick Labatut and Piotr Bojanowski, "DINOv3", 2025, arXiv 2508.10104.
  """
  stages = pair.some_stages()[-1:] if stages is None else stages
  return of_maps(pair, _unit_token_similarity, stages=stages, name="gram_anchoring", weight=weight, **settings)


def wkd_f(
  pair: Pair, *, stage: str | None = None, mean_weight: Any = 4.0, grid: int = 1, weight: Weight = 0.08
) -> Method:
  """Learn each channel's mean and deviation over the positions, as of a Gaussian.

  Args:
    pair: of models with feature maps.
    stage: whose, by the student's name; the last by default.
    mean_weight: of the means against the deviations.
    grid: cells on a side that have means and deviations of their own.
    weight: of the Term, a number or a schedule; published with a decay from epoch 150 of 240 on.

  Returns:
    A method with the connector `wkd_f_connector`, a 1x1 convolution with BatchNorm and ReLU, and the Term `wkd_f`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.wkd_f(pair).models)
    ['wkd_f_connector']

  Reference: Jiaming Lv, Haoyuan Yang and Peihua Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for
  Knowledge Distillation", 2024, arXiv 2412.08139.
  """
  stage = pair.some_stages()[-1] if stage is None else stage
  (student, teacher), connector = pair.features(stage), pair.named("wkd_f_connector")
  channels = pair.shapes(stage)[1][-1]
  model = models.conv_connector(student, channels, batch_norm=True, activation=jax.nn.relu)
  inputs = {"student": f"{connector}.output", "teacher": teacher, "mean_weight": mean_weight, "grid": grid}
  return Method({connector: model}, {pair.named("wkd_f"): Term(losses.wkd_features, inputs, weight)})


def _unit_token_similarity(student: jax.Array, teacher: jax.Array, **arguments: Any) -> jax.Array:
  return losses.token_similarity(*(l2_normalize(jnp.asarray(x)) for x in (student, teacher)), **arguments)
