"""What a method is: models, Terms, and trainings that come before the student's."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import optax

from kdflax.model import Model
from kdflax.objectives import Term

Weight = float | jax.Array | optax.Schedule


class Stage(NamedTuple):
  """A training before the student's, as data; `training.train_stages` runs it.

  Attributes:
    models: connectors that this training needs, by name. Of the student and the teacher it needs those that are read.
    terms: its whole objective, by name.
    frozen: names of what it trains and later trainings read as it then is. Whatever else it trains that comes again,
      such as the student, goes on from there.
  """

  models: Mapping[str, Model]
  terms: Mapping[str, Term]
  frozen: tuple[str, ...] = ()


class Method(NamedTuple):
  """What a paper adds to a student and a teacher; `a | b` is both methods at once.

  Attributes:
    models: connectors and memories by name, to be given to the learner after the student and the teacher.
    terms: Terms by name, to be trained beside the labels' Term.
    stages: trainings before that, by name, in order.
  """

  models: Mapping[str, Model] = {}
  terms: Mapping[str, Term] = {}
  stages: Mapping[str, Stage] = {}

  def __or__(self, other: "Method") -> "Method":
    """Puts two methods together.

    Raises:
      ValueError: if both give one name to a model, a Term or a stage.
    """
    if not isinstance(other, Method):
      return NotImplemented
    both = {kind: sorted(set(a) & set(b)) for kind, a, b in zip(self._fields, self, other, strict=True)}
    clashes = {kind: names for kind, names in both.items() if names}
    if clashes:
      raise ValueError(
        f"both methods name {clashes}; for a second student or teacher make the pair with other names of its models"
      )
    return Method({**self.models, **other.models}, {**self.terms, **other.terms}, {**self.stages, **other.stages})


def alone(method: Method, name: str) -> Method:
  """A method as a training of its own, before the student's."""
  return Method(stages={name: Stage(method.models, method.terms)})


def times(weight: Weight, factor: float) -> Weight:
  """A weight, which may be a schedule, times a number."""
  return (lambda step: weight(step) * factor) if callable(weight) else weight * factor
