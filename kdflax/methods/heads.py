"""Methods that use the teacher's classifier, or the student's, on maps."""

from collections.abc import Mapping
from typing import Any

import jax

from kdflax import losses, models
from kdflax.methods.method import Method, Weight
from kdflax.methods.pairs import Pair
from kdflax.objectives import Term


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

  Examples:
    >>> import jax, numpy as np
    >>> from kdflax import methods, models
    >>> batch, teacher = {"image": np.zeros((2, 8, 8, 1), np.float32)}, models.convnet((8, 12))
    >>> pair = methods.pair(models.convnet((4, 6), None), teacher, batch)
    >>> list(methods.simkd(pair, head=teacher.init(jax.random.key(0), batch)[0]["head"]).models)
    ['student']

  Reference: Defang Chen, Jian-Ping Mei, Hailin Zhang, Can Wang, Yan Feng and Chun Chen, "Knowledge Distillation with
  the Reused Teacher Classifier", 2022, arXiv 2203.14001.
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
  hint = Term(losses.hint, inputs, weight)
  return Method({pair.student.name: whole}, {pair.named("simkd"): hint})


def cat_kd(
  pair: Pair,
  *,
  stage: str | None = None,
  student_head: str = "head.kernel",
  teacher_head: str = "head.kernel",
  normalize: bool = False,
  weight: Weight = 10.0,
  **settings: Any,
) -> Method:
  """Learn where in the image each class is seen: the map at the last stage, read by the head at each position.

  Args:
    pair: of classifiers whose linear head reads the mean of that map.
    stage: the student's; the last by default.
    student_head: path of the kernel `[channels, classes]` of the student's head in its params.
    teacher_head: that of the teacher's.
    normalize: whether maps are brought to length 1: the authors' code does so between families of networks, and not
      within one, for which the weight is.
    weight: of the Term, a number or a schedule.
    **settings: `size` (2) of `losses.class_attention_transfer`.

  Returns:
    A method with the Term `cat_kd`, which trains the student's head as well.

  Raises:
    ValueError: if a model has no such head, or the pair no stages.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> methods.cat_kd(pair).terms["cat_kd"].inputs["student_head"]
    'params.student.head.kernel'

  Reference: Ziyao Guo, Haonan Yan, Hui Li and Xiaodong Lin, "Class Attention Transfer Based Knowledge Distillation",
  2023, arXiv 2304.12777.
  """
  stage = pair.some_stages()[-1] if stage is None else stage
  student, teacher = pair.features(stage)
  heads = {"student_head": pair.student.param(student_head), "teacher_head": pair.teacher.param(teacher_head)}
  inputs = {"student": student, "teacher": teacher, **heads, "normalize": normalize, **settings}
  return Method(terms={pair.named("cat_kd"): Term(_class_attention, inputs, weight)})


def _class_attention(
  student: jax.Array,
  teacher: jax.Array,
  student_head: jax.Array,
  teacher_head: jax.Array,
  *,
  where: jax.Array | None = None,
  **settings: Any,
) -> jax.Array:
  """`class_attention_transfer` of maps and heads."""
  return losses.class_attention_transfer(student @ student_head, teacher @ teacher_head, where=where, **settings)
