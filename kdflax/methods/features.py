"""Methods on feature maps, through connectors that learn with the student and stay behind when it leaves."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdflax import losses, models
from kdflax.methods.method import Method, Stage, Weight, alone, times
from kdflax.methods.outputs import adapted, of_maps
from kdflax.methods.pairs import Pair
from kdflax.model import Model, PyTree
from kdflax.objectives import Term


def fitnets(pair: Pair, *, stage: str | None = None, joint: bool = False, weight: Weight | None = None) -> Method:
  """Guide a middle stage of the student to that of the teacher, through a convolutional regressor.

  In the paper this is a training of its own, from which the student goes on; widely used implementations train it
  beside the labels.

  Args:
    pair: of models with feature maps; a student's map twice or n times as large is met by the regressor's stride.
    stage: the student's; the middle one by default.
    joint: whether the hint is a Term beside the others instead of a stage before them.
    weight: of the Term, a number or a schedule; by default 1 in a stage of its own, and beside the labels 100, as
      published for that.

  Returns:
    A method with the model `fitnets_regressor` and the Term `fitnets`, both in the stage `fitnets` unless `joint`.

  Raises:
    ValueError: if the pair has no such stage, or no stride makes the sizes equal.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.fitnets(pair).stages), list(methods.fitnets(pair, joint=True).terms)
    (['fitnets'], ['fitnets'])

  Reference: Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta and Yoshua Bengio,
  "FitNets: Hints for Thin Deep Nets", 2015, arXiv 1412.6550.
  """
  stages = pair.some_stages()
  stage = stages[len(stages) // 2] if stage is None else stage
  student, teacher = pair.features(stage)
  name, regressor = pair.named("fitnets"), pair.named("fitnets_regressor")
  channels, stride = pair.shapes(stage)[1][-1], _stride(pair, stage)
  connector = models.conv_connector(student, channels, kernel=3, stride=stride, batch_norm=True, activation=jax.nn.relu)
  inputs = {"student": f"{regressor}.output", "teacher": teacher}
  weight = (100.0 if joint else 1.0) if weight is None else weight
  hint = {name: Term(losses.hint, inputs, weight)}
  method = Method({regressor: connector}, hint)
  return method if joint else alone(method, name)


def attention_transfer(pair: Pair, *, weight: Weight = 1000.0, **settings: Any) -> Method:
  """Learn where the teacher looks: the strength of each stage's map at each position.

  Args:
    pair: of models with feature maps, of any widths and sizes.
    weight: of each stage's Term, a number or a schedule.
    **settings: `power` (2) of `losses.attention_transfer`.

  Returns:
    A method with the Terms `attention_transfer/STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.attention_transfer(pair).terms)
    ['attention_transfer/stage1', 'attention_transfer/stage2']

  Reference: Sergey Zagoruyko and Nikos Komodakis, "Paying More Attention to Attention: Improving the Performance of
  Convolutional Neural Networks via Attention Transfer", 2017, arXiv 1612.03928.
  """
  return of_maps(pair, losses.attention_transfer, weight=weight, **settings)


def vid(pair: Pair, *, weight: Weight = 1.0) -> Method:
  """Predict each stage of the teacher as a Gaussian, whose variance is learned.

  Args:
    pair: of models with feature maps, of equal sizes at each stage.
    weight: of each stage's Term, a number or a schedule.

  Returns:
    A method with the connectors `vid_STAGE` and the Terms `vid/STAGE`.

  Raises:
    ValueError: if the sizes of a stage differ.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.vid(pair).models)
    ['vid_stage1', 'vid_stage2']

  Reference: Sungsoo Ahn, Shell Xu Hu, Andreas Damianou, Neil D. Lawrence and Zhenwen Dai, "Variational Information
  Distillation for Knowledge Transfer", 2019, arXiv 1904.05835.
  """
  name, connectors, terms = pair.named("vid"), {}, {}
  for stage in pair.some_stages():
    student, teacher = pair.features(stage)
    gaussian = f"{name}_{stage}"
    connectors[gaussian] = models.vid_connector(student, pair.shapes(stage, same_size=True)[1][-1])
    inputs = {"predicted_mean": f"{gaussian}.output", "variance": f"{gaussian}.variance", "teacher": teacher}
    terms[f"{name}/{stage}"] = Term(losses.vid, inputs, weight)
  return Method(connectors, terms)


def review_kd(pair: Pair, *, width: int | None = None, weight: Weight = 1.0) -> Method:
  """Compare each stage of the teacher with what the student's stages from there on say together.

  The paper adds the pooled embedding as one more level, and warms the weight up over the first 20 of 240 epochs.

  Args:
    pair: of models with feature maps, of any widths and sizes.
    width: of the fusion; by default the teacher's channels at the last stage.
    weight: of each stage's Term, a number or a schedule.

  Returns:
    A method with the model `review_kd_fusion` and the Terms `review_kd/STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.review_kd(pair).models)
    ['review_kd_fusion']

  Reference: Pengguang Chen, Shu Liu, Hengshuang Zhao and Jiaya Jia, "Distilling Knowledge via Knowledge Review", 2021,
  arXiv 2104.09044.
  """
  name, fusion = pair.named("review_kd"), pair.named("review_kd_fusion")
  deepest_first = pair.some_stages()[::-1]
  shapes = [pair.shapes(stage)[1] for stage in deepest_first]
  model = models.review_fusion(
    [pair.features(stage)[0] for stage in deepest_first],
    [shape[-1] for shape in shapes],
    sizes=[(shape[1], shape[2]) for shape in shapes],
    width=shapes[0][-1] if width is None else width,
  )
  terms = {}
  for stage in pair.stages:
    inputs = {"student": f"{fusion}.features.{stage}", "teacher": pair.features(stage)[1]}
    terms[f"{name}/{stage}"] = Term(losses.hierarchical_context, inputs, weight)
  return Method({fusion: model}, terms)


def factor_transfer(
  pair: Pair, *, rate: float = 0.5, joint: bool = False, weight: Weight = 200.0, **settings: Any
) -> Method:
  """Learn the factors that the teacher's last map can be rebuilt from.

  First a paraphraser learns to rebuild the map; then it stands still, and a translator of the student's map learns to
  say what it says.

  Args:
    pair: of models with feature maps, of one size at the last stage.
    rate: factors per channel of the teacher.
    joint: whether the paraphraser learns beside the student, instead of in a stage before.
    weight: of the Term, a number or a schedule.
    **settings: `input_power` (2) and `output_power` (1) of `losses.factor_transfer`.

  Returns:
    A method with the models `factor_transfer_paraphraser` and `factor_transfer_translator` and the Term
    `factor_transfer`. `factor_transfer/rebuild` is that of the stage `factor_transfer_paraphraser`, unless `joint`.

  Raises:
    ValueError: if `rate` leaves no factor.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> methods.factor_transfer(pair).stages["factor_transfer_paraphraser"].frozen
    ('factor_transfer_paraphraser',)

  Reference: Jangho Kim, SeongUk Park and Nojun Kwak, "Paraphrasing Complex Network: Network Compression via Factor
  Transfer", 2018, arXiv 1802.04977.
  """
  name = pair.named("factor_transfer")
  paraphraser, translator = (pair.named(f"factor_transfer_{part}") for part in ("paraphraser", "translator"))
  stage = pair.some_stages()[-1]
  student, teacher = pair.features(stage)
  own = {paraphraser: models.paraphraser(teacher, rate=rate)}
  factors = int(rate * pair.shapes(stage)[1][-1])
  inputs = {"student": f"{translator}.output", "teacher": f"{paraphraser}.output", **settings}
  terms = {name: Term(losses.factor_transfer, inputs, weight)}
  inputs = {"student": f"{paraphraser}.reconstruction", "teacher": teacher}
  rebuild = {f"{name}/rebuild": Term(losses.hint, inputs, 1.0)}
  connectors = own | {translator: models.translator(student, factors)}
  if joint:
    return Method(connectors, terms | rebuild)
  return Method(connectors, terms, {paraphraser: Stage(own, rebuild, frozen=(paraphraser,))})


def mgd(pair: Pair, *, stages: Sequence[str] | None = None, masked: float = 0.65, weight: Weight = 2e-5) -> Method:
  """Generate the teacher's map from a part of the student's, whose other positions are hidden at random.

  The student's map, through a 1x1 convolution where channels differ, is set to 0 at some positions; two 3x3
  convolutions with a ReLU between them must make the teacher's map of the rest. In evaluation nothing is hidden.

  Args:
    pair: of models with feature maps of equal sizes.
    stages: which, by the student's names; the last by default. The paper takes all levels of a detector's pyramid.
    masked: share of the positions that are hidden, anew for every example and step.
    weight: of the squared difference summed over the map, as published; a number or a schedule.

  Returns:
    A method with the models `mgd_STAGE_masked`, `mgd_STAGE_hidden` and `mgd_STAGE_generated` (and `mgd_STAGE` where
    channels differ) and the Terms `mgd/STAGE`.

  Raises:
    ValueError: if `masked` is not in [0, 1), or sizes differ.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.mgd(pair).models)
    ['mgd_stage2', 'mgd_stage2_masked', 'mgd_stage2_hidden', 'mgd_stage2_generated']

  Reference: Zhendong Yang, Zhe Li, Mingqi Shao, Dachuan Shi, Zehuan Yuan and Chun Yuan, "Masked Generative
  Distillation", 2022, arXiv 2205.01529.
  """
  if not 0 <= masked < 1:
    raise ValueError(f"masked must be in [0, 1); got {masked}")
  name, stages = pair.named("mgd"), pair.some_stages()[-1:] if stages is None else stages
  connectors, paths = adapted(pair, stages, name)
  terms = {}
  for stage in stages:
    shape = pair.shapes(stage, same_size=True)[1]
    hiding, hidden, generated = (f"{name}_{stage}_{part}" for part in ("masked", "hidden", "generated"))
    connectors[hiding] = _positions_hidden(paths[stage], masked)
    connectors[hidden] = models.conv_connector(f"{hiding}.output", shape[-1], kernel=3, activation=jax.nn.relu)
    connectors[generated] = models.conv_connector(f"{hidden}.output", shape[-1], kernel=3)
    inputs = {"student": f"{generated}.output", "teacher": pair.features(stage)[1]}
    terms[f"{name}/{stage}"] = Term(losses.hint, inputs, times(weight, math.prod(shape[1:])))
  return Method(connectors, terms)


def vkd(pair: Pair, *, weight: Weight = 1.0, **settings: Any) -> Method:
  """Learn the teacher's embedding, standardised for each example, through a connector that can only turn the student's.

  A free linear connector can keep to itself what the student should have learned; this keeps lengths and angles.

  Args:
    pair: of models with an `embedding`: pooled maps or tokens in the paper.
    weight: of the Term, a number or a schedule.
    **settings: `beta` (1) of `losses.smooth_l1`.

  Returns:
    A method with the connector `vkd_connector` and the Term `vkd`.

  Raises:
    ValueError: if a model has no embedding.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.vkd(pair).models)
    ['vkd_connector']

  Reference: Roy Miles, Ismail Elezi and Jiankang Deng, "VkD: Improving Knowledge Distillation using Orthogonal
  Projections", 2024, arXiv 2403.06213. For tasks that generate, the paper whitens the teacher's features instead.
  """
  name, connector = pair.named("vkd"), pair.named("vkd_connector")
  turned = models.orthogonal_connector(pair.student.path("embedding"), pair.teacher.shape("embedding")[-1])
  inputs = {"student": f"{connector}.output", "teacher": pair.teacher.path("embedding"), **settings}
  return Method({connector: turned}, {name: Term(_smooth_l1_of_standardized, inputs, weight)})


def _smooth_l1_of_standardized(student: jax.Array, teacher: jax.Array, **arguments: Any) -> jax.Array:
  """As layer normalisation without parameters has the teacher's."""
  teacher = jnp.asarray(teacher, jnp.promote_types(teacher.dtype, jnp.float32))
  return losses.smooth_l1(student, jax.nn.standardize(teacher, epsilon=1e-5), **arguments)


def _positions_hidden(path: str, share: float) -> Model:
  """A model without params that sets a map to 0 at random positions, in training."""

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    return {}, {}

  def apply(params: PyTree, state: PyTree, x: Any, *, train: bool, key: jax.Array | None = None) -> tuple[Any, PyTree]:
    if train and key is not None:
      x = x * jax.random.bernoulli(key, 1 - share, (*x.shape[:-1], 1))
    return {"output": x}, state

  return Model(init, apply, path)


def _stride(pair: Pair, stage: str) -> int:
  """The stride that takes the student's map to the size of the teacher's."""
  student, teacher = pair.shapes(stage)
  stride = -(-student[1] // teacher[1])
  if any(-(-large // stride) != small for large, small in zip(student[1:3], teacher[1:3], strict=True)):
    pair.shapes(stage, same_size=True)
  return stride
