"""Methods that are a loss on outputs of student and teacher, whatever the loss: the pieces of all others."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from kdflax import models
from kdflax.methods.method import Method, Weight
from kdflax.methods.pairs import Pair
from kdflax.objectives import Term


def of_logits(
  pair: Pair, loss: Callable[..., Any], *, name: str | None = None, weight: Weight = 1.0, **settings: Any
) -> Method:
  """Compare the logits by any loss `(student_logits, teacher_logits, ...)`.

  Args:
    pair: of models with `logits`.
    loss: returns one value per example.
    name: of the Term; by default that of the loss.
    weight: of the Term, a number or a schedule.
    **settings: what else the loss takes: numbers, schedules or context paths, such as `labels="batch.label"`.

  Returns:
    A method with one Term.

  Raises:
    ValueError: if a model has no logits, or the loss has no such argument.

  Examples:
    >>> import numpy as np
    >>> from kdflax import losses, methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.of_logits(pair, losses.reverse_kl, temperature=2.0).terms)
    ['reverse_kl']
  """
  inputs = {"student_logits": pair.student.path("logits"), "teacher_logits": pair.teacher.path("logits"), **settings}
  return Method(terms={_name(pair, loss, name): Term(loss, inputs, weight)})


def of_embeddings(
  pair: Pair,
  loss: Callable[..., Any],
  *,
  connect: bool = False,
  name: str | None = None,
  weight: Weight = 1.0,
  **settings: Any,
) -> Method:
  """Compare the embeddings by any loss `(student, teacher, ...)`.

  Args:
    pair: of models with an `embedding`.
    loss: returns one value per example.
    connect: whether the student's goes through a linear connector to the teacher's width; relations need none.
    name: of the Term; by default that of the loss.
    weight: of the Term, a number or a schedule.
    **settings: what else the loss takes: numbers, schedules or context paths.

  Returns:
    A method with one Term, and the connector `NAME_connector`.

  Raises:
    ValueError: if a model has no embedding, or the loss has no such argument.

  Examples:
    >>> import numpy as np
    >>> from kdflax import losses, methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.of_embeddings(pair, losses.cosine, connect=True).models)
    ['cosine_connector']
  """
  name = _name(pair, loss, name)
  student, teacher, connectors = pair.student.path("embedding"), pair.teacher.path("embedding"), {}
  if connect:
    connector = f"{name}_connector"
    connectors[connector] = models.linear_connector(student, pair.teacher.shape("embedding")[-1])
    student = f"{connector}.output"
  inputs = {"student": student, "teacher": teacher, **settings}
  return Method(connectors, {name: Term(loss, inputs, weight)})


def of_maps(
  pair: Pair,
  loss: Callable[..., Any],
  *,
  stages: Sequence[str] | None = None,
  connect: bool = False,
  name: str | None = None,
  weight: Weight = 1.0,
  **settings: Any,
) -> Method:
  """Compare the feature maps of some stages by any loss `(student, teacher, ...)`, one Term for each.

  Args:
    pair: of models with the stages among their `features`.
    loss: returns one value per example.
    stages: which, by the student's names; all by default.
    connect: whether the student's goes through a 1x1 convolution where the teacher has other channels.
    name: the Terms are `NAME/STAGE`; by default that of the loss.
    weight: of each Term, a number or a schedule.
    **settings: what else the loss takes: numbers, schedules or context paths.

  Returns:
    A method with a Term for each stage, and connectors `NAME_STAGE` where channels differ.

  Raises:
    ValueError: if the pair has no stages or not these, or the loss has no such argument.

  Examples:
    >>> import numpy as np
    >>> from kdflax import losses, methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.of_maps(pair, losses.nst).terms)
    ['nst/stage1', 'nst/stage2']
  """
  name = _name(pair, loss, name)
  stages = pair.some_stages() if stages is None else stages
  connectors, paths = (
    adapted(pair, stages, name) if connect else ({}, {stage: pair.features(stage)[0] for stage in stages})
  )
  inputs = {stage: {"student": paths[stage], "teacher": pair.features(stage)[1], **settings} for stage in stages}
  return Method(connectors, {f"{name}/{s}": Term(loss, inputs[s], weight) for s in stages})


def of_flows(
  pair: Pair, loss: Callable[..., Any], *, name: str | None = None, weight: Weight = 1.0, **settings: Any
) -> Method:
  """Compare the flow from each stage to the next by a loss of two layers of each model, such as `fsp` or `kdsvd`.

  Args:
    pair: of models with two stages or more.
    loss: takes `student_first`, `student_last`, `teacher_first` and `teacher_last`.
    name: the Terms are `NAME/STAGE` after the later stage; by default that of the loss.
    weight: of each Term, a number or a schedule.
    **settings: what else the loss takes: numbers, schedules or context paths.

  Returns:
    A method with a Term for every two consecutive stages, and 1x1 convolutions `NAME_STAGE` where channels differ.

  Raises:
    ValueError: if the pair has fewer than two stages, or the loss has no such argument.

  Examples:
    >>> import numpy as np
    >>> from kdflax import losses, methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((4, 6)), batch)
    >>> list(methods.of_flows(pair, losses.kdsvd, k=2).terms)
    ['kdsvd/stage2']
  """
  name, stages = _name(pair, loss, name), pair.some_stages(2)
  connectors, paths = adapted(pair, stages, name)
  terms = {}
  for first, last in itertools.pairwise(stages):
    inputs = {
      "student_first": paths[first],
      "student_last": paths[last],
      "teacher_first": pair.features(first)[1],
      "teacher_last": pair.features(last)[1],
      **settings,
    }
    terms[f"{name}/{last}"] = Term(loss, inputs, weight)
  return Method(connectors, terms)


def adapted(pair: Pair, stages: Sequence[str], name: str) -> tuple[dict[str, models.Model], dict[str, str]]:
  """1x1 convolutions to the teacher's channels where widths differ, and the paths of the maps that fit."""
  connectors, paths = {}, {}
  for stage in stages:
    student, teacher = pair.shapes(stage)
    paths[stage] = pair.features(stage)[0]
    if student[-1] != teacher[-1]:
      connectors[f"{name}_{stage}"] = models.conv_connector(paths[stage], teacher[-1])
      paths[stage] = f"{name}_{stage}.output"
  return connectors, paths


def _name(pair: Pair, loss: Callable[..., Any], name: str | None) -> str:
  if name is None:
    name = getattr(loss, "__name__", None)
    if name is None:
      raise ValueError(f"{loss!r} has no name of its own; give the method one: name='...'")
  return pair.named(name)
