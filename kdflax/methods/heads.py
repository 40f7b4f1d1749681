"""Methods that use the teacher's classifier, or the student's, on maps."""

from collections.abc import Mapping
from typing import Any

import jax

from kdflax import losses, models
from kdflax.methods.method import Method, Weight, term
from kdflax.methods.pairs import Pair
from kdflax.model import Model, PyTree, lookup


def simkd(
  pair: Pair,
  *,
  head: Mapping[str, jax.Array],
  stage: str | None = None,
  factor: int = 2,
  weight: Weight = 1.0,
) -> Method:
  """Learn the teacher's last map through a projector, and read it by the teacher's own classifier.

  The student is trained by this Term alone: no labels, no logits. Projector and classifier stay in use, so they become
  parts of the student, which takes the place of the student in the learner and leaves as a whole.

  Args:
    pair: of a student that has maps, such as an encoder without a head, and its teacher.
    head: params of the teacher's classifier, `kernel` `[channels, classes]` and optionally `bias`; of the networks of
      kdflax `params["head"]`.
    stage: whose map is learned; the last by default.
    factor: how much narrower than the teacher the projector is.
    weight: of the Term, a number or a schedule.

  Returns:
    A method with the model `student`: it returns `output` (the projected map), `embedding` and `logits`, and its params
    are `encoder` and `reused`. The Term is `simkd`.

  Raises:
    ValueError: if the head does not fit the teacher's map, or the student's map is smaller than the teacher's.

  Reference: Defang Chen, Jian-Ping Mei, Hailin Zhang, Can Wang, Yan Feng and Chun Chen, "Knowledge Distillation with
  the Reused Teacher Classifier", 2022, arXiv 2203.14001.

  Examples:
    >>> import jax, numpy as np
    >>> from kdflax import methods, models
    >>> batch, teacher = {"image": np.zeros((2, 8, 8, 1), np.float32)}, models.convnet((8, 12))
    >>> pair = methods.pair(models.convnet((4, 6), None), teacher, batch)
    >>> list(methods.simkd(pair, head=teacher.init(jax.random.key(0), batch)[0]["head"]).models)
    ['student']
  """
  stage = pair.some_stages()[-1] if stage is None else stage
  student, teacher = pair.features(stage)
  shapes = pair.shapes(stage)
  if any(small < large for small, large in zip(shapes[0][1:3], shapes[1][1:3], strict=True)):
    pair.shapes(stage, same_size=True)
  reused = models.reused_head(student.partition(".")[2], head, size=(shapes[1][1], shapes[1][2]), factor=factor)
  if head["kernel"].shape[0] != shapes[1][-1]:
    raise ValueError(f"the head reads {head['kernel'].shape[0]} channels, but {teacher!r} has {shapes[1][-1]}")
  encoder = pair.student.model
  whole = models.compose(lambda part, batch: part("reused", reused, part("encoder", encoder, batch)))
  inputs = {"student": f"{pair.student.name}.output", "teacher": teacher}
  hint = term(losses.hint, inputs, weight, stop_gradient=(pair.teacher.name,))
  return Method({pair.student.name: whole}, {pair.named("simkd"): hint})


def cat_kd(pair: Pair, *, normalize: bool = False, weight: Weight = 10.0, **settings: Any) -> Method:
  """Learn where in the image each class is seen.

  Args:
    pair: of models with `class_maps`, which `methods.with_class_maps` adds to a classifier.
    normalize: whether maps are brought to length 1: the authors' code does so between families of networks, and not
      within one, for which the weight is.
    weight: of the Term, a number or a schedule.
    **settings: `size` (2) of `losses.class_attention_transfer`.

  Returns:
    A method with the Term `cat_kd`.

  Raises:
    ValueError: if a model has no class maps.

  Reference: Ziyao Guo, Haonan Yan, Hui Li and Xiaodong Lin, "Class Attention Transfer Based Knowledge Distillation",
  2023, arXiv 2304.12777.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> networks = [methods.with_class_maps(models.convnet(widths), "stage2") for widths in ((4, 6), (8, 12))]
    >>> list(methods.cat_kd(methods.pair(*networks, batch)).terms)
    ['cat_kd']
  """
  inputs = {"student": pair.student.path("class_maps"), "teacher": pair.teacher.path("class_maps")}
  inputs |= {"normalize": normalize, **settings}
  loss = losses.class_attention_transfer
  return Method(terms={pair.named("cat_kd"): term(loss, inputs, weight, stop_gradient=(pair.teacher.name,))})


def with_class_maps(model: Model, stage: str, *, head: str = "head.kernel") -> Model:
  """Make a classifier with a linear head on pooled features return `class_maps` as well: its head at each position.

  Args:
    model: the classifier.
    stage: whose map the head reads the mean of.
    head: path of the head's kernel `[channels, classes]` in the params.

  Returns:
    The model, with `class_maps` `[batch, height, width, classes]` among its outputs.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> model = methods.with_class_maps(models.convnet((4, 6)), "stage2")
    >>> methods.pair(model, model, {"image": np.zeros((2, 8, 8, 1), np.float32)}).student.shape("class_maps")
    (2, 4, 4, 10)
  """

  def apply(
    params: PyTree, state: PyTree, batch: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    outputs, state = model.apply(params, state, batch, train=train, key=key)
    return outputs | {"class_maps": outputs["features"][stage] @ lookup(params, head)}, state

  return Model(model.init, apply, model.inputs)
