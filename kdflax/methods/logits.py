"""Methods on logits."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from kdflax import losses, models
from kdflax.methods.method import Method, Weight
from kdflax.methods.outputs import of_logits
from kdflax.methods.pairs import Pair
from kdflax.model import Model, PyTree


def soft_targets(pair: Pair, *, temperature: Any = 4.0, weight: Weight = 0.9, **settings: Any) -> Method:
  """Learn the teacher's softened probabilities: KD as it began.

  Published with a cross-entropy of weight 0.1 beside it.

  Args:
    pair: of models with `logits`.
    temperature: a number, a schedule or a context path.
    weight: of the Term, a number or a schedule.
    **settings: further arguments of `losses.kl_soft_targets`.

  Returns:
    A method with the Term `soft_targets`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> methods.soft_targets(pair).terms["soft_targets"].weight
    0.9

  Reference: Geoffrey Hinton, Oriol Vinyals and Jeff Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
  1503.02531.
  """
  settings |= {"temperature": temperature}
  return of_logits(pair, losses.kl_soft_targets, name="soft_targets", weight=weight, **settings)


def standardized_targets(pair: Pair, *, temperature: Any = 2.0, weight: Weight = 9.0, **settings: Any) -> Method:
  """Learn the teacher's probabilities after both logits were brought to mean 0 and deviation 1.

  So the student need not match the size of the teacher's logits. Published with a cross-entropy of weight 0.1.

  Args:
    pair: of models with `logits`.
    temperature: applied after the standardisation; a number, a schedule or a context path.
    weight: of the Term, a number or a schedule.
    **settings: further arguments of `losses.kl_soft_targets`.

  Returns:
    A method with the Term `standardized_targets`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> methods.standardized_targets(pair).terms["standardized_targets"].inputs["temperature"]
    2.0

  Reference: Shangquan Sun, Wenqi Ren, Jingzhi Li, Rui Wang and Xiaochun Cao, "Logit Standardization in Knowledge
  Distillation", 2024, arXiv 2403.01427.
  """
  loss = losses.standardized(losses.kl_soft_targets)
  return of_logits(pair, loss, name="standardized_targets", weight=weight, temperature=temperature, **settings)


def hard_targets(pair: Pair, *, weight: Weight = 0.5) -> Method:
  """Learn the class that the teacher finds likeliest, as if it were a label; DeiT gives the label as much weight.

  Args:
    pair: of models with `logits`.
    weight: of the Term, a number or a schedule.

  Returns:
    A method with the Term `hard_targets`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.hard_targets(pair).terms)
    ['hard_targets']

  Reference: Hugo Touvron, Matthieu Cord, Matthijs Douze, Francisco Massa, Alexandre Sablayrolles and Hervé Jégou,
  "Training data-efficient image transformers and distillation through attention", 2021, arXiv 2012.12877.
  """
  return of_logits(pair, losses.hard_targets, weight=weight)


def dkd(pair: Pair, *, labels: str = "batch.label", weight: Weight = 1.0, **settings: Any) -> Method:
  """Learn how sure the teacher is of the true class, and apart from it how it ranks the others.

  Published with a warm-up of the weight over the first 20 of 240 epochs: give an `optax.linear_schedule`.

  Args:
    pair: of models with `logits`.
    labels: context path of the true classes.
    weight: of the Term, a number or a schedule.
    **settings: `temperature` (4), `alpha` (1) and `beta` (8) of `losses.dkd`.

  Returns:
    A method with the Term `dkd`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.dkd(pair, beta=2.0).terms)
    ['dkd']

  Reference: Borui Zhao, Quan Cui, Renjie Song, Yiyu Qiu and Jiajun Liang, "Decoupled Knowledge Distillation", 2022,
  arXiv 2203.08679.
  """
  return of_logits(pair, losses.dkd, weight=weight, labels=labels, **settings)


def nkd(pair: Pair, *, labels: str = "batch.label", weight: Weight = 1.0, **settings: Any) -> Method:
  """Learn the teacher's probability of the true class, and that of the others among themselves.

  Args:
    pair: of models with `logits`.
    labels: context path of the true classes.
    weight: of the Term, a number or a schedule.
    **settings: `temperature` (1) and `gamma` (1.5) of `losses.nkd`.

  Returns:
    A method with the Term `nkd`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.nkd(pair).terms)
    ['nkd']

  Reference: Zhendong Yang, Ailing Zeng, Zhe Li, Tianke Zhang, Chun Yuan and Yu Li, "From Knowledge Distillation to
  Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", 2023, arXiv
  2303.13005.
  """
  return of_logits(pair, losses.nkd, weight=weight, labels=labels, **settings)


def dist(pair: Pair, *, temperature: Any = 4.0, weight: Weight = 1.0, **settings: Any) -> Method:
  """Learn what correlates: the classes of an example, and the examples of a batch for each class.

  Args:
    pair: of models with `logits`.
    temperature: a number, a schedule or a context path.
    weight: of the Term, a number or a schedule.
    **settings: `beta` (1) and `gamma` (1) of `losses.dist`.

  Returns:
    A method with the Term `dist`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.dist(pair).terms)
    ['dist']

  Reference: Tao Huang, Shan You, Fei Wang, Chen Qian and Chang Xu, "Knowledge Distillation from A Stronger Teacher",
  2022, arXiv 2205.10536.
  """
  return of_logits(pair, losses.dist, weight=weight, temperature=temperature, **settings)


def mlkd(pair: Pair, *, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0), weight: Weight = 0.9) -> Method:
  """Learn the teacher's probabilities, how classes correlate in them and how examples do, at several temperatures.

  Published with a cross-entropy of weight 0.1, two views of each image and masks by confidence, which are left out.

  Args:
    pair: of models with `logits`.
    temperatures: all are used at once.
    weight: of each of the three Terms at each temperature, a number or a schedule.

  Returns:
    A method with the Terms `mlkd/instance/T`, `mlkd/class/T` and `mlkd/batch/T`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.mlkd(pair, temperatures=[2.0]).terms)
    ['mlkd/instance/2', 'mlkd/class/2', 'mlkd/batch/2']

  Reference: Ying Jin, Jiaqi Wang and Dahua Lin, "Multi-Level Logit Distillation", CVPR 2023.
  """
  levels = {"instance": losses.kl_soft_targets, "class": losses.class_correlation, "batch": losses.batch_correlation}
  method = Method()
  for temperature in temperatures:
    for level, loss in levels.items():
      name = f"mlkd/{level}/{temperature:g}"
      method |= of_logits(pair, loss, name=name, weight=weight, temperature=temperature)
  return method


def ctkd(
  pair: Pair,
  *,
  start: float = 1.0,
  span: float = 20.0,
  reversal: float | optax.Schedule = 1.0,
  weight: Weight = 0.9,
) -> Method:
  """Learn soft targets at a temperature that learns to make them harder for the student.

  Published with a `reversal` that rises from 0 to 1 along a cosine in the first 10 of 240 epochs, and a cross-entropy
  of weight 0.1.

  Args:
    pair: of models with `logits`.
    start: the lowest temperature.
    span: the highest minus the lowest.
    reversal: how much the temperature's gradient is turned round, a number or a schedule of the step.
    weight: of the Term, a number or a schedule.

  Returns:
    A method with the model `ctkd_temperature`, one that reads the schedule off the step, and the Term `ctkd`.

  Raises:
    ValueError: if `start` or `span` is not positive, or a model has no logits.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> methods.ctkd(pair).terms["ctkd"].inputs["temperature"]
    'ctkd_temperature.temperature'

  Reference: Zheng Li, Xiang Li, Lingfeng Yang, Borui Zhao, Renjie Song, Lei Luo, Jun Li and Jian Yang, "Curriculum
  Temperature for Knowledge Distillation", 2022, arXiv 2211.16231.
  """
  learned, progress = pair.named("ctkd_temperature"), pair.named("ctkd_progress")
  parts = {progress: _of_step(reversal)} if callable(reversal) else {}
  factor = f"{progress}.value" if callable(reversal) else reversal
  parts[learned] = models.temperature(start=start, span=span, reversal=factor)
  return of_logits(
    pair, losses.kl_soft_targets, name="ctkd", weight=weight, temperature=f"{learned}.temperature"
  )._replace(models=parts)


def _of_step(schedule: optax.Schedule) -> Model:
  """A model without params whose `value` is that of a schedule."""

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    return {}, {}

  def apply(
    params: PyTree, state: PyTree, step: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    return {"value": schedule(step)}, state

  return Model(init, apply, "step")
