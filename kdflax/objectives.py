"""Objectives: losses bound to the named outputs of any number of models.

A context is a nested dict, `{"student": Outputs, "teacher": Outputs, ..., "batch": {...}}`. A Term says where in it the
arguments of a loss are found and how much the loss weighs; an objective is a dict of Terms.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdflax.model import Context, lies_below, lookup
from kdflax.numerics.examples import AxisName, all_max, examples_of, masked_mean, masked_sum

Metrics = dict[str, tuple[jax.Array, jax.Array]]
_STOPPED = ("teacher",)  # by default
_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class Term:
  """A loss, the context paths that its arguments come from, and a weight.

  Attributes:
    loss: a function of named arrays that returns one value per example (or a scalar). Any function will do, kdflax's or
      not; `functools.partial` fixes static hyper-parameters.
    inputs: argument name -> where its value comes from: a context path such as `"student.features.stage1"`, an
      `optax.Schedule` called with the step (a temperature that changes), or a constant. `"where"` (one bool per
      example) may always be given: it masks the mean, and goes to the loss as well if that has a keyword-only
      `where`, as kdflax's losses do. Any other loss sees zeros in place of masked examples, in every array from the
      context whose leading axes are those of `where`: whatever stands for a missing label there (NaN, -1) reaches
      neither value nor gradient. Optax's `where` is positional and means classes; it is left alone.
    weight: number >= 0, scalar array, or `optax.Schedule`.
    stop_gradient: context paths whose arrays get no gradient through this Term, with all that lies below them. Each
      must be, or lie above, the path of an input, but for `"teacher"`, which a tuple that adds to the default may keep.

  Raises:
    ValueError: if the loss has no argument of a given name, one it requires is missing, a weight is negative, or
      `stop_gradient` stops nothing.
  """

  loss: Callable[..., Any]
  inputs: Mapping[str, Any]
  weight: float | jax.Array | optax.Schedule = 1.0
  stop_gradient: tuple[str, ...] = _STOPPED

  def __post_init__(self):
    name, parameters = _name(self.loss), _parameters(self.loss)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
      unknown = set(self.inputs) - set(parameters) - {"where"}
      if unknown:
        raise ValueError(f"{name} has no argument {sorted(unknown)}; it has {list(parameters)}")
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind not in _VARIADIC}
    if required - set(self.inputs):
      raise ValueError(f"{name} needs {sorted(required - set(self.inputs))}; inputs name only {sorted(self.inputs)}")
    if isinstance(self.weight, int | float) and not self.weight >= 0:
      raise ValueError(f"the weight of {name} must be at least 0; got {self.weight}")
    if isinstance(self.stop_gradient, str):
      raise ValueError(f"stop_gradient must be a tuple of context paths; write ({self.stop_gradient!r},)")
    paths = [source for source in self.inputs.values() if isinstance(source, str)]
    named = [stopped for stopped in self.stop_gradient if stopped not in _STOPPED]
    idle = [stopped for stopped in named if not any(lies_below(path, stopped) for path in paths)]
    if idle:
      raise ValueError(f"stop_gradient of {name} names {idle}, where none of its inputs lies: {paths}")


def evaluate(
  terms: Mapping[str, Term],
  context: Context,
  step: jax.Array | int = 0,
  *,
  axis_name: AxisName = None,
  guard: bool = False,
) -> tuple[dict[str, jax.Array], Metrics]:
  """Evaluates every Term of an objective on a context.

  Args:
    terms: Terms by name.
    context: outputs of the models by name, and the batch.
    step: the training step, for weights and arguments that are schedules.
    axis_name: mapped axis of `pmap` or `shard_map` that the batch is spread over; also passed to the losses that
      compare examples. Under plain `jit` on a mesh it stays None.
    guard: whether a Term gives no gradient whose value is not finite, or that is given the weight 0 going backward,
      even where its derivative is not finite; 0 times NaN is NaN, and spoils that of all other Terms. With it the
      objective has derivatives in reverse mode only.

  Returns:
    The weighted mean of each Term by name (their sum is the objective), and its unweighted (sum, count) by name,
    ready to be added up over batches.

  Raises:
    ValueError: if a path does not exist (with what exists there), or all weights are the number 0.
  """
  if terms and all(map(is_watched, terms.values())):
    raise ValueError(f"all weights are 0: {list(terms)}; an objective needs at least one positive weight")
  values, metrics = {}, {}
  for name, term in terms.items():
    try:
      value, where = per_example(term, context, step, axis_name, guard=guard)
    except (ValueError, TypeError, AssertionError) as error:
      error.add_note(f"in term {name!r}")
      raise
    weight = term.weight(step) if callable(term.weight) else term.weight
    values[name] = weight * masked_mean(value, where, axis_name)
    metrics[name] = jax.lax.stop_gradient(masked_sum(value, where, axis_name))
  return values, metrics


def per_example(
  term: Term, context: Context, step: jax.Array | int = 0, axis_name: AxisName = None, *, guard: bool = False
) -> tuple[jax.Array, jax.Array | None]:
  """Returns what the loss of a Term returns, and its `where`; with `guard` as in `evaluate`."""
  arguments = {argument: _value(source, term, context, step) for argument, source in term.inputs.items()}
  where = arguments.pop("where", None)
  read = [argument for argument in arguments if isinstance(term.inputs[argument], str)]
  function = term.loss
  while isinstance(function, functools.partial):  # which turns positional arguments into keyword-only ones
    function = function.func
  parameters = _parameters(function)
  if "where" in parameters and parameters["where"].kind is _KEYWORD_ONLY:
    arguments |= {} if where is None else {"where": where}
  elif where is not None:  # masking the result is not enough: 0 times the derivative at a NaN is NaN
    arguments |= {name: jax.tree.map(lambda array: _masked(array, where), arguments[name]) for name in read}
  if axis_name is not None and "axis_name" in parameters:
    arguments["axis_name"] = axis_name
  loss = lambda inputs: jnp.asarray(term.loss(**(arguments | inputs)))
  if guard:
    accept = lambda value: jnp.isfinite(masked_mean(value, examples_of(where, value.ndim), axis_name))
    loss = _guarded(loss, accept, axis_name)
  values = loss({name: arguments[name] for name in read if not is_stopped(term, term.inputs[name])})
  return values, examples_of(where, values.ndim)  # which may count the positions of an example


def _guarded(
  loss: Callable[[Any], jax.Array], accept: Callable[[jax.Array], jax.Array], axis_name: AxisName
) -> Callable[[Any], jax.Array]:
  """The loss, with a gradient of exactly 0 where its value is not accepted, or that to it is 0 on every device."""
  guarded = jax.custom_vjp(loss)

  def forward(inputs):
    value, pullback = jax.vjp(loss, inputs)
    return value, (pullback, accept(value))

  def backward(residuals, cotangent):
    pullback, accepted = residuals
    weighed = all_max((cotangent != 0).any().astype(jnp.float32), axis_name) > 0
    block = lambda slope: slope if slope.dtype == jax.dtypes.float0 else jnp.where(accepted & weighed, slope, 0)
    return (jax.tree.map(block, pullback(cotangent)[0]),)

  guarded.defvjp(forward, backward)
  return guarded


def _value(source: Any, term: Term, context: Context, step: jax.Array | int) -> Any:
  if callable(source):
    return source(step)
  if not isinstance(source, str):
    return source
  value = lookup(context, source)
  return jax.lax.stop_gradient(value) if is_stopped(term, source) else value


def _masked(array: Any, where: jax.Array) -> Any:
  """Zeros in place of masked examples, if the leading axes of the array count examples."""
  if jnp.shape(array)[: jnp.ndim(where)] != jnp.shape(where):
    return array
  array = jnp.asarray(array)
  return jnp.where(jnp.expand_dims(where, range(jnp.ndim(where), array.ndim)), array, jnp.zeros_like(array))


def is_stopped(term: Term, path: str) -> bool:
  """Whether a Term gives no gradient to what lies at a path."""
  return any(lies_below(path, stopped) for stopped in term.stop_gradient)


def is_watched(term: Term) -> bool:
  """Whether a Term is only watched: its weight is the number 0."""
  return isinstance(term.weight, int | float) and term.weight == 0


def _parameters(loss: Callable) -> Mapping[str, inspect.Parameter]:
  return inspect.signature(loss).parameters


def _name(loss: Callable) -> str:
  return getattr(loss, "__name__", None) or getattr(getattr(loss, "func", None), "__name__", repr(loss))
