"""What a learner refuses, and how it says so: settings when they are made, the rest before the first step."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdflax.model import Model, PyTree, Variables
from kdflax.objectives import Term, compares_examples, is_watched, stopped_arguments
from kdflax.training.forward import RESERVED, models_at, models_read
from kdflax.training.state import Average, Penalty, TrainState

_LOG = logging.getLogger(__name__)
_ACCUMULATING = {optax.MultiStepsState: "optax.MultiSteps", optax.ApplyEvery: "optax.apply_every"}


def checked_models(models: Mapping[str, Model]) -> dict[str, Model]:
  """Models whose names can be part of a context path and hide nothing that is in the context already."""
  for name in models:
    if name in RESERVED or "." in name:
      raise ValueError(f"{name!r} cannot be the name of a model: no dots, and none of {list(RESERVED)}")
  return dict(models)


def checked_averages(averages: Mapping[str, Average] | None, models: Mapping[str, Model]) -> dict[str, Average]:
  """Averages of models that exist, with decays that are shares."""
  averages = dict(averages or {})
  for name, average in averages.items():
    if name not in models or average.source not in models:
      raise ValueError(f"average {name!r} of {average.source!r}: models are {list(models)}")
    if average.source in averages:
      raise ValueError(f"average {name!r} of {average.source!r}, which is an average itself; follow a trained model")
    if isinstance(average.decay, int | float) and not 0 <= average.decay <= 1:
      raise ValueError(f"the decay of average {name!r} must be between 0 and 1, near 1 as 0.999; got {average.decay}")
  return averages


def checked_penalties(penalties: Mapping[str, Penalty] | None, terms: Mapping[str, Term]) -> dict[str, Penalty]:
  """Penalties with names of their own and weights that are not negative."""
  penalties = dict(penalties or {})
  if set(penalties) & set(terms):
    raise ValueError(f"penalties and terms share the names {sorted(set(penalties) & set(terms))}; metrics need both")
  for name, penalty in penalties.items():
    if isinstance(penalty.weight, int | float) and not penalty.weight >= 0:
      raise ValueError(f"the weight of penalty {name!r} must be at least 0; got {penalty.weight}")
  return penalties


def checked_rows(rows: Mapping[str, Sequence[str]] | None, terms: Mapping[str, Term]) -> dict[str, tuple[str, ...]]:
  """Rows that name every Term once; those that are only watched may be left out."""
  weighed = [name for name, term in terms.items() if not is_watched(term)]
  if rows is None:
    return {name: (name,) for name in weighed}
  named = [term for row in rows.values() for term in row]
  if sorted(named) != sorted({*named, *weighed}) or not set(named) <= set(terms):
    raise ValueError(f"rows must name every term once; rows have {sorted(named)}, terms are {sorted(terms)}")
  return {name: tuple(row) for name, row in rows.items()}


def check_batch_size(batch_size: int | None, hold_gradients: bool) -> None:
  """Refuses to send back no row at a time, or a few at a time whose gradients are not held."""
  if batch_size is not None and batch_size < 1:
    raise ValueError(f"batch_size must be at least 1; got {batch_size}")
  if batch_size is not None and not hold_gradients:
    raise ValueError(
      f"batch_size={batch_size} holds the gradients of the rows that went back before; leave it out with"
      " hold_gradients=False"
    )


def check_parts(accumulate: int, cache_outputs: bool, terms: Mapping[str, Term]) -> None:
  """Refuses to split a batch whose examples are compared."""
  if accumulate < 1:
    raise ValueError(f"accumulate must be at least 1, the number of parts of a batch; got {accumulate}")
  compared = [name for name, term in terms.items() if compares_examples(term)]
  if accumulate > 1 and compared and not cache_outputs:
    raise ValueError(
      f"terms {compared} compare the examples of a batch, so accumulate={accumulate} parts would not give its value;"
      " give cache_outputs=True, which keeps what models say of all parts, leave accumulate at 1 or those terms out"
    )


def check_frozen(models: Mapping[str, Model], averages: Mapping[str, Average], frozen: Variables) -> None:
  """Refuses frozen models that are no models, or that an average would follow for nothing."""
  unknown = set(frozen) - set(models)
  if unknown:
    raise ValueError(f"frozen {sorted(unknown)} are not among the models {list(models)}")
  still = [f"{name!r} of {a.source!r}" for name, a in averages.items() if {name, a.source} & set(frozen)]
  if still:
    raise ValueError(f"average {', '.join(still)} follows nothing: frozen are {list(frozen)}")


def check_reads(models: Mapping[str, Model], fixed: Sequence[str]) -> None:
  """Refuses a model that runs before the trained ones, outside the gradient, and reads one of them."""
  for name in fixed:
    trained = [path for path, read in models_read(models[name], models).items() if read - set(fixed)]
    if trained:
      raise ValueError(
        f"{name!r} is frozen or an average, so it runs first and outside the gradient, but it reads {trained} of a"
        " trained model; train it with the optimizer holding its params still (optax.partition, optax.set_to_zero)"
      )


def check_variables(models: Mapping[str, Model], state: TrainState, frozen: Variables) -> None:
  """Refuses a state that was made with other frozen models than this step is given."""
  both = sorted(set(frozen) & set(state.params))
  neither = [name for name in models if name not in {*frozen, *state.params, *state.averages}]
  if both:
    raise ValueError(f"{both} are given as frozen, but this state trains them; give init the frozen models, too")
  if neither:
    raise ValueError(f"{neither} are neither in this state nor given as frozen; give the step what init was given")


def check_same_shapes(name: str, follower: PyTree, source: str, variables: PyTree) -> None:
  """Refuses an average whose network is not that of its source."""
  shapes = lambda tree: {jax.tree_util.keystr(p): jnp.shape(x) for p, x in jax.tree.leaves_with_path(tree)}
  own, followed = shapes(follower), shapes(variables)
  if own != followed:
    path = next(path for path in [*own, *followed] if own.get(path) != followed.get(path))
    raise ValueError(
      f"average {name!r} must be the network of {source!r}: {path[3:]} has shape {own.get(path, 'absent')} in the one"
      f" and {followed.get(path, 'absent')} in the other"
    )


def check_scalars(penalties: Mapping[str, Penalty], params: dict[str, PyTree]) -> None:
  """Refuses a penalty that is no scalar."""
  for name, penalty in penalties.items():
    shape = jax.eval_shape(penalty.function, params).shape
    if shape:
      raise ValueError(f"penalty {name!r} must return a scalar, it has shape {shape}; sum over it")


def check_optimizer(optimizer: Any, opt_state: PyTree, params: PyTree) -> None:
  """Refuses an optimizer that an update cannot give what it needs."""
  if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
    return
  update = lambda gradient, state: optimizer.update(gradient, state, gradient, value=jnp.float32(0), grad=gradient)
  try:
    jax.eval_shape(update, params, opt_state)
  except TypeError as error:
    raise ValueError(
      f"the optimizer needs more than gradient, params and the value of the objective: {error}; one that evaluates the"
      " objective anew has no place in a step: give optax.lbfgs linesearch=None and a learning rate, say"
    ) from error


def check_accumulates(
  opt_state: PyTree, terms: Mapping[str, Term], averages: Mapping[str, Average], balanced: bool
) -> None:
  """Refuses an optimizer that accumulates where the mean of small updates is not the update of the large batch."""
  holds = lambda node: isinstance(node, tuple(_ACCUMULATING))
  found = [node for node in jax.tree.leaves(opt_state, is_leaf=holds) if holds(node)]
  if not found:
    return
  weighed = {name: term for name, term in terms.items() if not is_watched(term)}
  wrong = {
    "averages": list(averages),
    "the balancer of the terms": list(weighed) if balanced else [],
    "masks of the terms": [name for name, term in weighed.items() if "where" in term.inputs],
    "relations of the terms": [name for name, term in weighed.items() if compares_examples(term)],
  }
  wrong = {what: names for what, names in wrong.items() if names}
  if wrong:
    named = ", ".join(f"{what} {names}" for what, names in wrong.items())
    raise ValueError(
      f"{_ACCUMULATING[type(found[0])]} gives another update than the large batch does, for {named}; give the step the"
      " large batch, and make_learner the optimizer without it and accumulate=n (relations: cache_outputs=True)"
    )


def warn_of_masked_statistics(terms: Mapping[str, Term], states: Mapping[str, PyTree]) -> None:
  """Warns where examples that no Term sees, such as padding, enter the running statistics of a model."""
  masks = {str(term.inputs.get("where")) for term in terms.values() if not is_watched(term)}
  numbers = [name for name, state in states.items() if any(map(_is_float, jax.tree.leaves(state)))]
  if numbers and len(masks) == 1 and masks != {"None"}:
    _LOG.warning(
      "every term leaves out what %s masks, but the models see it: if %s normalise by statistics of a batch, as"
      " BatchNorm does, these count masked examples; fill their rows with copies of others, or drop them",
      next(iter(masks)),
      numbers,
    )


def check_terms_train(terms: Mapping[str, Term], trained: set[str]) -> None:
  """Refuses a Term that stops the gradient to all it reads of trained models: it would train nothing, silently."""
  for name, term in terms.items():
    read = {argument: path for argument, path in _paths(term).items() if models_at(path, trained)}
    if not is_watched(term) and read and read.keys() <= stopped_arguments(term):
      raise ValueError(
        f"term {name!r} trains nothing: it stops the gradient to {term.stop_gradient}, which is all it reads of trained"
        f" models ({list(read.values())}); give it stop_gradient=()"
      )


def check_models_learn(models: Mapping[str, Model], terms: Mapping[str, Term], trained: Sequence[str]) -> None:
  """Refuses a model that no Term sends a gradient to, as a teacher that was forgotten among the frozen ones."""
  weighed = [term for term in terms.values() if not is_watched(term)]
  paths = [path for term in weighed for a, path in _paths(term).items() if a not in stopped_arguments(term)]
  reached = {name for path in paths for name in models_at(path, models)}
  for name in reversed(list(models)):  # each reads the ones before it
    reached |= set().union(*models_read(models[name], models).values()) if name in reached else set()
  idle = [name for name in trained if name not in reached]
  if idle:
    raise ValueError(
      f"no term trains {idle}; give init and step what is not to be trained as frozen, {{{idle[0]!r}: (params, state)}}"
    )


def _is_float(leaf: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _paths(term: Term) -> dict[str, str]:
  return {argument: source for argument, source in term.inputs.items() if isinstance(source, str)}
