"""Running models by name: each reads its input from the context, and its outputs are added to it.

Training and evaluation build their context here, so that a path means the same in both: `batch`, `step`, the outputs of
each model under its name, and `params` by model name.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from kdflax.model import Model, PyTree, Variables, named_key, paths_of, read

RESERVED = ("batch", "step", "params")  # what a context holds beside the outputs of models


def start_context(batch: PyTree, step: jax.Array | int) -> dict[str, Any]:
  """The context before any model has run."""
  return {"batch": batch, "step": jnp.asarray(step, jnp.int32), "params": {}}


def run_fixed(
  models: Mapping[str, Model], names: Iterable[str], variables: Variables, context: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the context with what some models say in evaluation mode, and with their params.

  Args:
    models: all models by name.
    names: which of them to run, in an order in which each finds what it reads.
    variables: their (params, state).
    context: what they read.
  """
  names = list(names)
  seen = _with_params(context, {name: variables[name][0] for name in names})
  for name in names:
    seen[name], _ = models[name].apply(*variables[name], read(seen, models[name]), train=False, key=None)
  return seen


def run_trained(
  models: Mapping[str, Model],
  params: Mapping[str, PyTree],
  states: Mapping[str, PyTree],
  context: Mapping[str, Any],
  key: jax.Array,
) -> tuple[dict[str, Any], dict[str, PyTree]]:
  """Returns the context with what the models say that have params here, in training mode, and their next states.

  Args:
    models: all models by name, in an order in which each finds what it reads.
    params: of those that are trained.
    states: of the same.
    context: what they read.
    key: of this update; each model gets one of its own, by its name.

  Raises:
    ValueError: if a model returns a state unlike the one it was given, which would compile every step again, and fit no
      checkpoint.
  """
  seen, moved = _with_params(context, params), {}
  for name in models:
    if name in params:
      inputs = read(seen, models[name])
      seen[name], moved[name] = models[name].apply(
        params[name], states[name], inputs, train=True, key=named_key(key, name)
      )
      _check_state(name, states[name], moved[name])
  return seen, moved


def init_models(
  models: Mapping[str, Model], key: jax.Array, batch: PyTree, given: Variables, sources: Mapping[str, str]
) -> tuple[dict[str, tuple[PyTree, PyTree]], dict[str, Any]]:
  """Returns the variables of all models, and a context in which every output is zeros of its shape.

  Args:
    models: by name, in an order in which each finds what it reads.
    key: each model gets one of its own, by its name.
    batch: of it only shapes and dtypes matter.
    given: variables that are there already.
    sources: by the name of a model, the name whose key it gets; a model that follows another starts as it does.
  """
  variables: dict[str, tuple[PyTree, PyTree]] = {}
  context = start_context(jax.tree.map(_zeros, batch), 0)
  for name, model in models.items():
    example = read(context, model)
    own_key = named_key(key, sources.get(name, name))
    variables[name] = given[name] if name in given else model.init(own_key, example)
    say = lambda params, state, inputs, m=model: m.apply(params, state, inputs, train=False, key=None)[0]
    outputs = jax.eval_shape(say, *variables[name], example)
    context = _with_params(context, {name: variables[name][0]}) | {name: jax.tree.map(_zeros, outputs)}
  return variables, context


def models_at(path: str, models: Iterable[str]) -> set[str]:
  """The names of the models whose outputs or params lie at a context path."""
  first, *rest = path.split(".")
  if first == "params":
    return {rest[0]} & set(models) if rest else set(models)
  return {first} & set(models)


def models_read(model: Model, models: Iterable[str]) -> dict[str, set[str]]:
  """By context path that a model reads, the names of the models whose outputs or params lie there."""
  return {path: models_at(path, models) for path in paths_of(model)}


def _check_state(name: str, before: PyTree, after: PyTree) -> None:
  try:
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
  except AssertionError as error:
    raise ValueError(
      f"the model {name!r} returns a state unlike the one it was given; structure, shapes and types must stay: {error}"
    ) from error


def _with_params(context: Mapping[str, Any], params: Mapping[str, PyTree]) -> dict[str, Any]:
  return {**context, "params": {**context["params"], **params}}


def _zeros(like: Any) -> jax.Array:
  return jnp.zeros(like.shape, jax.dtypes.canonicalize_dtype(like.dtype))  # NumPy's int64 labels become int32
