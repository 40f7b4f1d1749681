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
from kdflax.numerics.trees import merge

Metrics = dict[str, tuple[jax.Array, jax.Array]]
_TEACHER = "teacher"  # in stop_gradient: what a Term says is its teacher
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
      neither value nor gradient. Optax's `where` is positional and means classes; it is left alone. The models see
      masked examples as all others: the statistics of BatchNorm count them.
    weight: number >= 0, scalar array, or `optax.Schedule`. Where it is 0, the Term costs nothing and gives no gradient,
      even if its value or its derivative is not finite.
    stop_gradient: what gets no gradient through this Term. `"teacher"`, the default, is what the Term says is its
      teacher: the arguments that the loss calls so (`teacher`, `teacher_logits`, ...), whichever model they come from;
      for a loss that has none, Optax's say, what comes from a model of that name beside others. The name of a model
      alone stops nothing: a network called "teacher" learns from its labels as any other, a student that teaches
      another is stopped where it does. All else are context paths, with what lies below them; the name of a model
      covers its params as well. Each must be, or lie above, the path of an input.
    examples: the arguments whose leading axes count examples, for a loss that takes no `where` itself. By default all
      from the context that lead with the shape of `where`, but for params, and for class weights where there are as
      many classes as examples: the loss is then traced with one example more in all other arguments, and one that still
      fits is left as it is.

  Raises:
    ValueError: if the loss has no argument of a given name, one it requires is missing, a weight is negative,
      `stop_gradient` stops nothing, or `examples` names no input.
  """

  loss: Callable[..., Any]
  inputs: Mapping[str, Any]
  weight: float | jax.Array | optax.Schedule = 1.0
  stop_gradient: tuple[str, ...] = (_TEACHER,)
  examples: tuple[str, ...] | None = None

  def __post_init__(self) -> None:
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
    named = [stopped for stopped in self.stop_gradient if stopped != _TEACHER]
    idle = [stopped for stopped in named if not any(_is_of(path, stopped) for path in paths)]
    if idle:
      raise ValueError(f"stop_gradient of {name} names {idle}, where none of its inputs lies: {paths}")
    if self.examples is not None and not set(self.examples) <= set(self.inputs) - {"where"}:
      raise ValueError(f"examples of {name} must be among its inputs {sorted(self.inputs)}; got {self.examples}")


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
    guard: whether a Term whose value or gradient is not finite has the value NaN and gives no gradient, where 0 times
      NaN would spoil that of all others. Its gradient is that to what it reads of the context. With it the objective
      has derivatives in reverse mode only.

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
    mean = functools.partial(_weighted_mean, term, step, axis_name)
    try:
      values[name], metrics[name] = (_guarded(mean, axis_name) if guard else mean)(read_by({name: term}, context))
    except (ValueError, TypeError, AssertionError) as error:
      error.add_note(f"in term {name!r}")
      raise
  return values, metrics


def _weighted_mean(
  term: Term, step: jax.Array | int, axis_name: AxisName, context: Context
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the weighted mean of a Term, and its unweighted (sum, count)."""
  value, where = per_example(term, context, step, axis_name)
  mean = masked_mean(value, where, axis_name)
  return weighted(at(term.weight, step), mean), jax.lax.stop_gradient(masked_sum(value, where, axis_name))


def per_example(
  term: Term, context: Context, step: jax.Array | int = 0, axis_name: AxisName = None
) -> tuple[jax.Array, jax.Array | None]:
  """Returns what the loss of a Term returns, and its `where`."""
  arguments = {argument: _value(source, context, step) for argument, source in term.inputs.items()}
  where = arguments.pop("where", None)
  parameters = _parameters(_innermost(term.loss))
  if "where" in parameters and parameters["where"].kind is _KEYWORD_ONLY:
    arguments |= {} if where is None else {"where": where}
  elif where is not None:  # masking the result is not enough: 0 times the derivative at a NaN is NaN
    counting = _counting(term, arguments, where)
    arguments |= {name: jax.tree.map(lambda array: _masked(array, where), arguments[name]) for name in counting}
  if axis_name is not None and "axis_name" in parameters:
    arguments["axis_name"] = axis_name
  stopped = stopped_arguments(term)
  flowing = [name for name in arguments if isinstance(term.inputs.get(name), str) and name not in stopped]
  arguments |= {name: jax.lax.stop_gradient(arguments[name]) for name in stopped}
  loss = lambda inputs: jnp.asarray(term.loss(**(arguments | inputs)))
  weight = at(term.weight, step)
  values = loss({name: gated(weight, arguments[name]) for name in flowing})
  return values, examples_of(where, values.ndim)  # which may count the positions of an example


def at(value: Any, step: jax.Array | int) -> Any:
  """The number at a step, from a number or a schedule."""
  return value(step) if callable(value) else value


def weighted(weight: Any, mean: jax.Array) -> jax.Array:
  """The product, but 0 where the weight is, whatever the mean."""
  if isinstance(weight, int | float):
    return weight * mean if weight else jnp.zeros_like(mean)
  return jnp.where(weight == 0, 0, weight * mean)


def gated(weight: Any, arrays: Any) -> Any:
  """Arrays as they are, without a gradient where the weight is 0: 0 times a derivative that is not finite is NaN."""
  if isinstance(weight, int | float):
    return arrays
  gate = lambda array: jnp.where(weight == 0, jax.lax.stop_gradient(array), array)
  return jax.tree.map(lambda array: gate(array) if jnp.issubdtype(array.dtype, jnp.inexact) else array, arrays)


def _guarded(mean: Callable[[Context], Any], axis_name: AxisName) -> Callable[[Context], Any]:
  """The mean of a Term, but NaN and without a gradient where it or its gradient is not finite on some device.

  The gradient is taken on the way forward, where it can still say that the value does not count.
  """

  def forward(numbers, others):
    value, pullback, metric = jax.vjp(lambda numbers: mean(merge(numbers, others)), numbers, has_aux=True)
    (slopes,) = pullback(jnp.ones_like(value))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in (value, *jax.tree.leaves(slopes))]).all()
    broken = all_max(~finite, axis_name)
    return (jnp.where(broken, jnp.nan, value), metric), jax.tree.map(lambda x: jnp.where(broken, 0, x), slopes)

  def backward(slopes, cotangents):
    return jax.tree.map(lambda slope: (cotangents[0] * slope).astype(slope.dtype), slopes), None

  guarded = jax.custom_vjp(lambda numbers, others: forward(numbers, others)[0])
  guarded.defvjp(forward, backward)

  def split_and_guarded(context):
    is_number = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    numbers = jax.tree.map(lambda leaf: leaf if is_number(leaf) else None, context)
    return guarded(numbers, jax.tree.map(lambda leaf: None if is_number(leaf) else leaf, context))

  return split_and_guarded


def read_by(terms: Mapping[str, Term], context: Context) -> dict[str, Any]:
  """Returns the part of a context that Terms read.

  Raises:
    ValueError: if a path does not exist, with what exists there.
  """
  paths = {source for term in terms.values() for source in term.inputs.values() if isinstance(source, str)}
  for path in paths:
    lookup(context, path)
  return _below(context, [path.split(".") for path in paths])


def _below(node: Any, paths: list[list[str]]) -> Any:
  if not all(paths):  # one of them ends here
    return node
  return {
    key: _below(node[key], [path[1:] for path in paths if path[0] == key]) for key in sorted({p[0] for p in paths})
  }


def _value(source: Any, context: Context, step: jax.Array | int) -> Any:
  if callable(source):
    return source(step)
  return lookup(context, source) if isinstance(source, str) else source


def _counting(term: Term, arguments: Mapping[str, Any], where: jax.Array) -> list[str]:
  """The arguments whose leading axes count examples, as those of `where` do."""
  leads = lambda array: jnp.shape(array)[: jnp.ndim(where)] == jnp.shape(where)
  if term.examples is not None:
    for name in term.examples:
      if not all(map(leads, jax.tree.leaves(arguments[name]))):
        shapes = jax.tree.map(jnp.shape, arguments[name])
        raise ValueError(f"{name} counts examples, so it must lead with the shape of where {where.shape}; got {shapes}")
    return list(term.examples)
  sources = {name: source for name, source in term.inputs.items() if name in arguments and isinstance(source, str)}
  read = [name for name, source in sources.items() if not lies_below(source, "params")]
  candidates = [name for name in read if any(map(leads, jax.tree.leaves(arguments[name])))]
  shapes = {name: [jnp.shape(array) for array in jax.tree.leaves(arguments[name])] for name in candidates}
  wide = {name for name in candidates for shape in shapes[name] if where.shape[0] in shape[where.ndim :]}
  if where.shape[0] < 2:  # which broadcasts to any number
    return candidates
  return [
    name for name in candidates if not wide - {name} or _must_grow(name, candidates, term, arguments, where.shape)
  ]


def _must_grow(
  name: str, candidates: list[str], term: Term, arguments: Mapping[str, Any], examples: tuple[int, ...]
) -> bool:
  """Whether the loss cannot give one value more unless this argument, too, has one example more."""
  longer = (examples[0] + 1, *examples[1:])

  def grown(array: Any) -> jax.ShapeDtypeStruct:
    shape = jnp.shape(array)
    shape = (*longer, *shape[len(longer) :]) if shape[: len(longer)] == examples else shape
    return jax.ShapeDtypeStruct(shape, jnp.result_type(array))

  try:
    kept = {name: arguments[name]}
    shapes = {other: jax.tree.map(grown, arguments[other]) for other in candidates} | kept
    program = jax.make_jaxpr(lambda arrays: jnp.asarray(term.loss(**(dict(arguments) | arrays))))(shapes).jaxpr
  except Exception:  # of whatever kind: it does not fit
    return True
  first = len(jax.tree.leaves([shapes[other] for other in sorted(candidates) if other < name]))
  own = program.invars[first : first + len(jax.tree.leaves(shapes[name]))]
  used = {id(variable) for equation in program.eqns for variable in equation.invars}
  given = program.outvars[0].aval.shape
  return not given or given != longer[: len(given)] or not any(id(variable) in used for variable in own)


def _masked(array: Any, where: jax.Array) -> Any:
  """Zeros in place of masked examples, if the leading axes of the array count examples."""
  if jnp.shape(array)[: jnp.ndim(where)] != jnp.shape(where):
    return array
  array = jnp.asarray(array)
  return jnp.where(jnp.expand_dims(where, range(jnp.ndim(where), array.ndim)), array, jnp.zeros_like(array))


def stopped_arguments(term: Term) -> frozenset[str]:
  """The arguments of a Term that get no gradient through it."""
  paths = {argument: source for argument, source in term.inputs.items() if isinstance(source, str)}
  stopped = {a for a, path in paths.items() for stop in term.stop_gradient if stop != _TEACHER and _is_of(path, stop)}
  if _TEACHER in term.stop_gradient:
    called = {argument for argument in paths if argument == _TEACHER or argument.startswith(_TEACHER + "_")}
    from_teacher = {argument for argument, path in paths.items() if _is_of(path, _TEACHER)}
    of_models = {argument for argument, path in paths.items() if path.split(".")[0] not in ("batch", "step")}
    stopped |= called or (from_teacher if from_teacher < of_models else set())
  return frozenset(stopped)


def _is_of(path: str, stopped: str) -> bool:
  """Whether a path lies at or below another, or at the params of the model that the other names."""
  return lies_below(path, stopped) or ("." not in stopped and lies_below(path, f"params.{stopped}"))


def compares_examples(term: Term) -> bool:
  """Whether the value of an example depends on the others, as that of every loss that takes `axis_name`."""
  return "axis_name" in _parameters(_innermost(term.loss))


def is_watched(term: Term) -> bool:
  """Whether a Term is only watched: its weight is the number 0."""
  return isinstance(term.weight, int | float) and term.weight == 0


def _innermost(loss: Callable) -> Callable:
  """The function below any partial, which turns positional arguments into keyword-only ones."""
  while isinstance(loss, functools.partial):
    loss = loss.func
  return loss


def _parameters(loss: Callable) -> Mapping[str, inspect.Parameter]:
  return inspect.signature(loss).parameters


def _name(loss: Callable) -> str:
  return getattr(loss, "__name__", None) or getattr(getattr(loss, "func", None), "__name__", repr(loss))
