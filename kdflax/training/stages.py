"""Trainings that come one after the other, each handing on what it trained."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from kdflax.model import Model, PyTree, Variables
from kdflax.objectives import Term
from kdflax.training.forward import models_at, models_read
from kdflax.training.state import TrainState

Train = Callable[[str, Mapping[str, Model], Mapping[str, Term], Variables], TrainState]


class Stage(Protocol):
  """A training as data, such as those of `kdflax.methods`.

  `models` are its own, beside those it shares with other trainings; `terms` its objective; `frozen` the names of what
  it trains that later trainings read as it then is.
  """

  @property
  def models(self) -> Mapping[str, Model]: ...

  @property
  def terms(self) -> Mapping[str, Term]: ...

  @property
  def frozen(self) -> tuple[str, ...]: ...


def train_stages(
  stages: Mapping[str, Stage],
  models: Mapping[str, Model],
  train: Train,
  frozen: Variables | None = None,
) -> tuple[dict[str, Model], dict[str, tuple[PyTree, PyTree]]]:
  """Runs trainings in order, each on the models that its terms read.

  What a stage trains and hands on as frozen joins the frozen models; whatever else it trains that comes again, such as
  a student, goes on from there. What belongs to the stage alone, such as a connector, is left behind.

  Args:
    stages: by name, in order.
    models: those of the training after the last stage, by name: student, teacher and the connectors of its own.
    train: `(name, models, terms, frozen) -> state` does one training: makes a learner and fits it, under the name of
      the stage if it saves. A name that is not among the frozen models is to be trained.
    frozen: (params, state) of the models that are not trained in any stage.

  Returns:
    The models and the frozen variables of the training after the last stage. A model that a stage has trained has an
    `init` that returns what it learned.

  Raises:
    ValueError: if a stage hands on as frozen what it does not train, or what no later training has.
  """
  models, frozen = dict(models), dict(frozen or {})
  for position, (name, stage) in enumerate(stages.items()):
    involved = _involved(models, stage)
    state = train(name, involved, stage.terms, {known: frozen[known] for known in frozen if known in involved})
    later = {*models, *(own for after in list(stages.values())[position + 1 :] for own in after.models)}
    idle = [handed for handed in stage.frozen if handed not in state.params or handed not in later]
    if idle:
      raise ValueError(
        f"stage {name!r} hands on {idle} as frozen; it trains {list(state.params)}, and later trainings have"
        f" {sorted(later)}: give the models of the method with those of the pair"
      )
    for trained, params in state.params.items():
      variables = params, state.model_state[trained]
      if trained in stage.frozen:
        frozen[trained] = variables
      elif trained in models:
        models[trained] = starting_from(models[trained], variables)
  return models, frozen


def starting_from(model: Model, variables: tuple[PyTree, PyTree]) -> Model:
  """A model that starts from (params, state) instead of from chance; of one training, not of several under `vmap`."""

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    return variables

  return Model(init, model.apply, model.inputs)


def _involved(models: Mapping[str, Model], stage: Stage) -> dict[str, Model]:
  """The models that the terms of a stage read, and that those read, in order."""
  available = {**models, **stage.models}
  paths = [path for term in stage.terms.values() for path in term.inputs.values() if isinstance(path, str)]
  needed = set().union(*(models_at(path, available) for path in paths))
  for name in reversed(list(available)):  # each reads the ones before it
    needed |= set().union(*models_read(available[name], available).values()) if name in needed else set()
  return {name: model for name, model in available.items() if name in needed}
