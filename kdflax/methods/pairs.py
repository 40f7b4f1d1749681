"""Student and teacher as methods see them: what they return, of which shapes, read off an example batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from kdflax.model import Model, Outputs, PyTree, named_key
from kdflax.numerics.trees import name_of


class Side(NamedTuple):
  """One model of a pair.

  Attributes:
    name: in the context.
    model: the model.
    outputs: shapes and dtypes of what it returns, nested as the outputs are.
    params: shapes and dtypes of its params.
    aliases: where an output lies that methods ask for by another name.
  """

  name: str
  model: Model
  outputs: Outputs
  params: PyTree
  aliases: Mapping[str, str] = {}

  def path(self, output: str) -> str:
    """The context path of an output.

    Raises:
      ValueError: if the model does not return it, with what it returns.
    """
    self.shape(output)
    return f"{self.name}.{self.aliases.get(output, output)}"

  def shape(self, output: str) -> tuple[int, ...]:
    """The shape of an output.

    Raises:
      ValueError: if the model does not return it, with what it returns.
    """
    there = _shapes(self.outputs)
    where = self.aliases.get(output, output)
    if where not in there:
      asked = repr(output) if where == output else f"{output!r}, said to be {where!r}"
      raise ValueError(f"the model {self.name!r} returns no {asked}; it returns {list(there)}")
    return there[where]

  def param(self, path: str) -> str:
    """The context path of an array among the params, such as `head.kernel`.

    Raises:
      ValueError: if there is none, with what there is.
    """
    there = _shapes(self.params)
    if path not in there:
      raise ValueError(f"the model {self.name!r} has no params {path!r}; it has {list(there)}")
    return f"params.{self.name}.{path}"


class Pair(NamedTuple):
  """A student and its teacher; `methods.pair` makes one.

  Attributes:
    student: who learns.
    teacher: who is listened to: no Term of a method sends a gradient to its outputs.
    stages: the features that are compared, first to last: the student's name to the teacher's.
  """

  student: Side
  teacher: Side
  stages: Mapping[str, str]

  def named(self, part: str) -> str:
    """The name of a part of a method; models that are not called student and teacher are told apart by it."""
    names = (self.student.name, self.teacher.name)
    return part if names == ("student", "teacher") else "_".join((part, *names))

  def some_stages(self, at_least: int = 1) -> tuple[str, ...]:
    """The stages.

    Raises:
      ValueError: if there are too few.
    """
    if len(self.stages) < at_least:
      raise ValueError(
        f"this method compares at least {at_least} stages of features; the pair has {list(self.stages)}. They are the"
        " `features` that both models return under names that end in a digit; or name them: stages={'layer2': 'stage1'}"
      )
    return tuple(self.stages)

  def features(self, stage: str, suffix: str = "") -> tuple[str, str]:
    """The context paths of the student's and the teacher's features at a stage."""
    self._check(stage)
    outputs = f"features.{stage}{suffix}", f"features.{self.stages[stage]}{suffix}"
    return self.student.path(outputs[0]), self.teacher.path(outputs[1])

  def shapes(self, stage: str, *, same_size: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the student's and the teacher's map at a stage.

    Raises:
      ValueError: if one is no map, or with `same_size` if height or width differ.
    """
    student, teacher = (path.partition(".")[2] for path in self.features(stage))
    shapes = self.student.shape(student), self.teacher.shape(teacher)
    if any(len(shape) != 4 for shape in shapes):
      raise ValueError(
        f"this method compares maps [batch, height, width, channels]; {student!r} of {self.student.name!r} is"
        f" {shapes[0]}, {teacher!r} of {self.teacher.name!r} is {shapes[1]}"
      )
    if same_size and shapes[0][1:3] != shapes[1][1:3]:
      raise ValueError(
        f"this method compares maps of one size; {student!r} of {self.student.name!r} is {shapes[0]}, {teacher!r} of"
        f" {self.teacher.name!r} is {shapes[1]}: pair stages of one size, stages={{'student stage': 'teacher stage'}}"
      )
    return shapes

  def _check(self, stage: str) -> None:
    if stage not in self.stages:
      raise ValueError(f"the pair has no stage {stage!r}; it has {list(self.stages)}")


def pair(
  student: Model,
  teacher: Model,
  batch: PyTree,
  *,
  names: tuple[str, str] = ("student", "teacher"),
  stages: Sequence[str] | Mapping[str, str] | None = None,
  student_outputs: Mapping[str, str] | None = None,
  teacher_outputs: Mapping[str, str] | None = None,
) -> Pair:
  """Read off two models what methods need to know of them. Nothing is computed but shapes.

  Args:
    student: who learns.
    teacher: who is listened to.
    batch: an example batch; only shapes and dtypes matter.
    names: what the two are called among the models of the learner. Methods for another pair of names give their parts
      other names, so that several teachers' methods go together.
    stages: the features to compare, first to last: names that both have in `features`, or the student's name to the
      teacher's. By default those that both return under a name that ends in a digit.
    student_outputs: where the student returns what methods ask for, if not under that name, such as
      `{"logits": "logits.left", "embedding": "features.token"}`.
    teacher_outputs: the same for the teacher.

  Returns:
    The pair.

  Raises:
    ValueError: if `stages` names features that a model does not return, or a model does not read the batch.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> pair.stages, pair.teacher.shape("features.stage2")
    ({'stage1': 'stage1', 'stage2': 'stage2'}, (2, 4, 4, 12))
  """
  sides = (
    _side(names[0], student, batch, student_outputs or {}),
    _side(names[1], teacher, batch, teacher_outputs or {}),
  )
  if stages is None:
    student_features, teacher_features = (side.outputs.get("features", {}) for side in sides)
    stages = sorted((name for name in student_features if name in teacher_features and name[-1:].isdigit()), key=_order)
  stages = dict(stages) if isinstance(stages, Mapping) else {name: name for name in stages}
  found = Pair(*sides, stages)
  for stage in stages:
    found.features(stage)
  return found


def _side(name: str, model: Model, batch: PyTree, aliases: Mapping[str, str]) -> Side:
  if model.inputs != "batch":
    raise ValueError(
      f"the model {name!r} reads {model.inputs}, not the batch; make the pair with a network of the same shapes, such"
      " as a member of an ensemble"
    )

  def run(example: Any) -> tuple[Any, PyTree]:
    params, state = model.init(named_key(jax.random.key(0), name), example)
    return model.apply(params, state, example, train=False, key=None)[0], params

  outputs, params = jax.eval_shape(run, batch)
  return Side(name, model, outputs, params, aliases)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  return {name_of(path, "."): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def _order(name: str) -> tuple[str, int]:
  """stage10 comes after stage9."""
  digits = len(name) - len(name.rstrip("0123456789"))
  return name[:-digits], int(name[-digits:])
