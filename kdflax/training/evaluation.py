"""Evaluation: the outputs of models, and the metrics of terms on them, without a gradient and without chance."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdflax.model import Model, PyTree, Variables
from kdflax.objectives import Metrics, Term, evaluate
from kdflax.training import metrics
from kdflax.training.forward import run_fixed, start_context
from kdflax.training.sharding import Layout, laid_out, pin_batch, place_batch


def make_eval_step(models: Mapping[str, Model], terms: Mapping[str, Term], *, layout: Layout | None = None) -> Callable:
  """Compiles an evaluation: `(variables by model name, batch, step=0) -> metrics`, in evaluation mode.

  Terms whose inputs name `"where": "batch.where"` leave out the padding of a last batch. Schedules are read at `step`:
  give that of the training state (`state.step`), or temperatures are those of the start.

  Args:
    models: by name, in an order in which each finds what it reads.
    terms: whose metrics are wanted.
    layout: of the training, if it has one: variables stay where they are, a batch is spread over the devices.
  """

  @jax.jit
  def evaluate_batch(variables: Variables, batch: PyTree, step: jax.Array | int = 0) -> Metrics:
    with laid_out(layout):
      context = apply_models(models, variables, pin_batch(batch), step)
    return evaluate(terms, context, step)[1]

  if layout is None:
    return evaluate_batch
  # Placed here: a batch that does not divide by the devices may be spread inside of a program, but not enter one so.
  return lambda variables, batch, step=0: evaluate_batch(variables, place_batch(batch, layout), step)


def evaluate_dataset(
  evaluate_batch: Callable[..., Metrics], variables: Any, batches: Iterable[PyTree], *, step: jax.Array | int = 0
) -> dict[str, Any]:
  """Returns the means of an evaluation over a whole data set, exact whatever the batches.

      evaluate_batch = training.make_eval_step({"student": student}, {"accuracy": Term(...)})
      training.evaluate_dataset(evaluate_batch, {"student": variables}, data.padded_batches(test, 512))

  Args:
    evaluate_batch: of `make_eval_step`, made once, so that it is compiled once; of several seeds at once it is
      `jax.jit(jax.vmap(evaluate_batch, (0, None, None)))`.
    variables: (params, state) by model name.
    batches: every example once. Terms leave out padding where their inputs name `"where": "batch.where"`.
    step: at which schedules are read.

  Returns:
    Numbers by name of the Term, or lists where `evaluate_batch` serves several seeds.

  Raises:
    ValueError: if there is no batch.
  """
  running = None
  for batch in batches:
    sums = evaluate_batch(variables, batch, step)
    running = metrics.accumulate(metrics.start_running(sums) if running is None else running, sums)
  if running is None:
    raise ValueError("batches holds no batch to evaluate; give an iterator that has not come to its end")
  return metrics.means(metrics.total(running))


def predict(
  model: Model,
  variables: tuple[PyTree, PyTree],
  batches: Iterable[PyTree],
  *,
  names: Sequence[str] = ("logits",),
  seeds: bool = False,
) -> dict[str, Any]:
  """Returns what a model says about a whole data set in evaluation mode.

  Args:
    model: any that reads the batch.
    variables: (params, state).
    batches: every example once; rows whose `where` is False (`data.padded_batches`) are padding and left out.
    names: which of the outputs; feature maps of many images are large.
    seeds: whether the variables, and then the outputs, have a leading axis that counts seeds.

  Returns:
    NumPy arrays `[examples, ...]` by name, `[seeds, examples, ...]` with `seeds`.

  Raises:
    ValueError: if there is no batch, or the model has no output of a name.
  """
  parts, axis = [], 1 if seeds else 0
  for batch in batches:
    batch = dict(batch)
    where = batch.pop("where", None)
    counted = slice(None) if where is None else np.asarray(where)
    said = _say(model, tuple(names), seeds, variables, batch)
    take = lambda leaf, rows=counted: np.asarray(leaf)[:, rows] if seeds else np.asarray(leaf)[rows]
    parts.append(jax.tree.map(take, said))
  if not parts:
    raise ValueError("batches holds no batch to predict; give an iterator that has not come to its end")
  return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=axis), *parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _say(model: Model, names: tuple[str, ...], seeds: bool, variables: Any, batch: PyTree) -> dict[str, Any]:
  """The outputs of these names; compiled once for a model."""

  def say(variables: Any) -> dict[str, Any]:
    params, state = variables
    outputs, _ = model.apply(params, state, batch, train=False, key=None)
    missing = [name for name in names if name not in outputs]
    if missing:
      raise ValueError(f"the model has no outputs {missing}; it has {sorted(outputs)}")
    return {name: outputs[name] for name in names}

  return jax.vmap(say)(variables) if seeds else say(variables)


def apply_models(
  models: Mapping[str, Model], variables: Variables, batch: PyTree, step: jax.Array | int = 0
) -> dict[str, Any]:
  """Returns the context of a batch in evaluation mode.

  Args:
    models: by name, in an order in which each finds what it reads.
    variables: (params, state) of every model.
    batch: what they are applied to.
    step: what a model that changes with time reads at `"step"`.

  Raises:
    ValueError: if a model has no variables.
  """
  missing = [name for name in models if name not in variables]
  if missing:
    raise ValueError(f"no variables for the models {missing}; there are those of {sorted(variables)}")
  return run_fixed(models, models, variables, start_context(batch, step))
