"""Methods on feature maps before the ReLU, which learn what it will let through."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from kdflax import losses, models
from kdflax.methods.method import Method, Weight, alone, times
from kdflax.methods.pairs import Pair
from kdflax.objectives import Term


def activation_boundary(
  pair: Pair, *, suffix: str = "_pre", joint: bool = False, weight: Weight = 3e-3, **settings: Any
) -> Method:
  """Learn on which side of zero each unit is, before the ReLU.

  In the paper this is a training of its own, from which the student goes on.

  Args:
    pair: of models with feature maps of equal sizes, before the ReLU as well as after it.
    suffix: of the names of the maps before the ReLU: `stage1_pre` for `stage1`.
    joint: whether the boundary is learned beside the other Terms instead of in a stage before them.
    weight: of the last stage's Term, halved for each before; a number or a schedule.
    **settings: `margin` (1) of `losses.activation_boundary`.

  Returns:
    A method with 1x1 convolutions `activation_boundary_STAGE` and the Terms `activation_boundary/STAGE`, all in the
    stage `activation_boundary` unless `joint`.

  Raises:
    ValueError: if a model does not return the maps before the ReLU, or sizes differ.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.activation_boundary(pair, joint=True).terms)
    ['activation_boundary/stage2', 'activation_boundary/stage1']

  Reference: Byeongho Heo, Minsik Lee, Sangdoo Yun and Jin Young Choi, "Knowledge Transfer via Distillation of
  Activation Boundaries Formed by Hidden Neurons", 2019, arXiv 1811.03233.
  """
  name = pair.named("activation_boundary")
  settings_of = {stage: settings for stage in pair.some_stages()}
  method = _before_activation(pair, losses.activation_boundary, name, suffix, weight, settings_of)
  return method if joint else alone(method, name)


def ofd(pair: Pair, *, margins: Mapping[str, Any] | None = None, suffix: str = "_pre", weight: Weight = 1e-3) -> Method:
  """Learn what passes the teacher's ReLU, and below it no more than that nothing passes.

  Args:
    pair: of models with feature maps of equal sizes, before the ReLU as well as after it.
    margins: for each stage, by the student's name, `losses.ofd_margin` of the teacher's last batch normalisation before
      the ReLU: `[channels]`, or a context path of it. By default they are made of the params of a teacher that is a
      `convnet` or a `resnet`.
    suffix: of the names of the maps before the ReLU: `stage1_pre` for `stage1`.
    weight: of the last stage's Term, halved for each before; a number or a schedule.

  Returns:
    A method with 1x1 convolutions `ofd_STAGE`, with BatchNorm, and the Terms `ofd/STAGE`.

  Raises:
    ValueError: if a stage has no margin, a model does not return the maps before the ReLU, or sizes differ.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.ofd(pair).terms)
    ['ofd/stage2', 'ofd/stage1']

  Reference: Byeongho Heo, Jeesoo Kim, Sangdoo Yun, Hyojin Park, Nojun Kwak and Jin Young Choi, "A Comprehensive
  Overhaul of Feature Distillation", 2019, arXiv 1904.01866.
  """
  stages, name = pair.some_stages(), pair.named("ofd")
  if margins is None:
    norms = {stage: _last_norm(pair, stage) for stage in stages}
    settings = {
      s: {f"teacher_{part}": pair.teacher.param(f"{norms[s]}.{part}") for part in ("scale", "bias")} for s in stages
    }
    return _before_activation(pair, _ofd_of_norm, name, suffix, weight, settings)
  if missing := [stage for stage in stages if stage not in margins]:
    raise ValueError(f"margins lacks the stages {missing}; it has {list(margins)}")
  settings = {stage: {"margin": margins[stage]} for stage in stages}
  return _before_activation(pair, losses.ofd, name, suffix, weight, settings)


def _ofd_of_norm(
  student: jax.Array,
  teacher: jax.Array,
  teacher_scale: jax.Array,
  teacher_bias: jax.Array,
  *,
  where: jax.Array | None = None,
) -> jax.Array:
  """`ofd` at the margin of the teacher's batch normalisation."""
  return losses.ofd(student, teacher, margin=losses.ofd_margin(teacher_scale, teacher_bias), where=where)


def _last_norm(pair: Pair, stage: str) -> str:
  """Where the teacher's params hold the last batch normalisation of a stage, if it is a convnet or a resnet."""
  try:
    index = str(int(pair.stages[stage].removeprefix("stage")) - 1)
    block = pair.teacher.params["stages"][index]
    path = "norm" if "norm" in block else f"{max(block, key=int)}.second.norm"
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"the params of {pair.teacher.name!r} have no batch normalisation where a convnet or resnet has that of"
      f" {pair.stages[stage]!r}; give margins={{{stage!r}: losses.ofd_margin(scale, bias), ...}} of your network's"
    ) from error
  return f"stages.{index}.{path}"


def _before_activation(
  pair: Pair,
  loss: Callable[..., jax.Array],
  name: str,
  suffix: str,
  weight: Weight,
  settings: Mapping[str, Mapping[str, Any]],
) -> Method:
  """A loss of the maps before the ReLU, through connectors, halved for each stage before the last."""
  connectors, terms = {}, {}
  for depth, stage in enumerate(reversed(pair.some_stages())):
    student, teacher = pair.features(stage, suffix)
    connector = f"{name}_{stage}"
    channels = pair.shapes(stage, same_size=True)[1][-1]
    connectors[connector] = models.conv_connector(student, channels, batch_norm=True)
    inputs = {"student": f"{connector}.output", "teacher": teacher, **settings[stage]}
    share = times(weight, 1 / 2**depth)
    terms[f"{name}/{stage}"] = Term(loss, inputs, share)
  return Method(connectors, terms)
