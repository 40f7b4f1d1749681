"""Evaluation: the outputs of models, and the metrics of terms on them, without a gradient and without chance."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from kdflax.model import Model, PyTree, Variables
from kdflax.objectives import Metrics, Term, evaluate
from kdflax.training.forward import run_fixed, start_context


def make_eval_step(models: Mapping[str, Model], terms: Mapping[str, Term]) -> Callable:
  """Compiles an evaluation: `(variables by model name, batch, step=0) -> metrics`, in evaluation mode.

  Terms whose inputs name `"where": "batch.where"` leave out the padding of a last batch. Schedules are read at `step`:
  give that of the training state (`state.step`), or temperatures are those of the start.
  """

  @jax.jit
  def evaluate_batch(variables: Variables, batch: PyTree, step: jax.Array | int = 0) -> Metrics:
    return evaluate(terms, apply_models(models, variables, batch, step), step)[1]

  return evaluate_batch


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
