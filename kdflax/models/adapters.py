"""The two ways of a Flax module into `Model(init, apply)`: NNX and Linen.

Only plain nested dicts of arrays cross this boundary. Inside, the Flax module lives for the length of one trace.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors, linen, nnx

from kdflax.model import Model, PyTree
from kdflax.models import boundary
from kdflax.numerics.trees import nest

Path = tuple[Any, ...]
MakeModule = Callable[..., nnx.Module]  # (rngs) -> module, or (rngs, example) -> module


def count_parameters(params: PyTree) -> int:
  """Number of entries in a tree of arrays or of shapes.

  Args:
    params: any tree of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    The number of entries of all leaves together.
  """
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_bytes(params: PyTree) -> int:
  """Size in bytes of a tree of arrays or of shapes.

  Args:
    params: any tree of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    The size of all leaves together, in bytes.
  """
  return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))


def from_nnx(
  make: MakeModule,
  *,
  input: str | None = "image",
  inputs: str | tuple[str, ...] = "batch",
  with_example: bool = False,
) -> Model:
  """Turn a Flax NNX module into a `Model`.

  The module is called as `module(x, train=..., rngs=...)`, each keyword only where its `__call__` has it. In place of
  `train` it may take `training`, `is_training`, `deterministic`, `inference` or `use_running_average`. Without any the
  mode is set by `module.train()`; in evaluation `module.eval()` is called as well, and nothing is dropped. It returns
  outputs by name; a bare array becomes `{"logits": array}`, or `{"output": array}` for a connector.

  `params` are the `nnx.Param`, `state` every other variable; lists become dicts with the keys "0", "1", ... Random
  streams (`Dropout(rate, rngs=rngs)`) are no state: each call derives them from `key`, so the same key gives the same
  mask. The graph definition comes from an abstract build, without arrays, and is kept for every input shape seen.
  Values a module sows are dropped: return intermediate features by name.

  BatchNorm takes its statistics over the whole batch: an example that a Term masks still counts there. A batch that
  says so itself, by an entry `where`, draws a warning in training.

  Args:
    make: `make(rngs) -> module`; with `with_example`, `make(rngs, example)`.
    input: the entry of the batch that a network reads; None for the whole batch, as a dict.
    inputs: context path(s) for a connector; see `Model`.
    with_example: let `make` read input widths from `example`, a `jax.ShapeDtypeStruct` (a tuple of them for a tuple of
      paths). The module must not depend on the batch size.

  Returns:
    The model. A parameter that does not fit the module raises ValueError with its path and both shapes.

  Raises:
    ValueError: from `init` and `apply`, if the batch has no `input`, the module holds arrays that are no
      `nnx.Variable` or requires an argument of unknown name, or `train=True` needs a key and has none; from `apply`, if
      BatchNorm or Dropout run in the wrong mode, as under a flag of unknown name.
  """

  @functools.cache
  def build(treedef: Any, specs: tuple[Any, ...]) -> _Blueprint:
    example = jax.tree.unflatten(treedef, specs)
    return _blueprint(lambda: make_module(jax.random.key(0), example))

  def make_module(key: jax.Array, example: Any) -> nnx.Module:
    rngs = nnx.Rngs(key)
    return make(rngs, example) if with_example else make(rngs)

  def built_for(x: Any) -> _Blueprint:
    leaves, treedef = jax.tree.flatten(boundary.shapes(x) if with_example else None)
    return build(treedef, tuple(leaves))

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    x = boundary.pick(example, inputs, input)
    built_for(x)  # the checks of a module, before any array is made
    leaves = dict(nnx.to_flat_state(nnx.state(make_module(boundary.typed(key), boundary.shapes(x)))))
    params = {path: _value(v) for path, v in leaves.items() if isinstance(v, nnx.Param)}
    state = {path: _value(v) for path, v in leaves.items() if not isinstance(v, nnx.Param | nnx.RngState)}
    return nest(params), nest(state)

  def apply(
    params: PyTree, state: PyTree, batch: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    x = boundary.pick(batch, inputs, input)
    blueprint = built_for(x)
    if train and key is None and blueprint.random:
      raise ValueError("apply(train=True) needs a key: the model has dropout or another source of randomness")
    boundary.warn_of_masked(batch, bool(blueprint.statistics), train)
    key = None if key is None else boundary.typed(key)
    flat = boundary.gather(blueprint.params, params, "params") | boundary.gather(blueprint.state, state, "state")
    flat |= _streams(blueprint.streams, key)
    # A copy, for gradients: the variables must belong to the trace that changes them.
    module = nnx.merge(blueprint.graph, nnx.from_flat_state(flat), copy=True)
    rngs = None if key is None else nnx.Rngs(key)
    counts = _counts(rngs)
    outputs = _call(module, x, blueprint.signature, train, rngs)
    after = dict(nnx.to_flat_state(nnx.state(module)))
    moved = {path for path in flat if _value(after[path]) is not flat[path]}
    drawn = any(new is not old for new, old in zip(_counts(rngs), counts, strict=True))
    _check_mode(blueprint, moved, drawn or bool(moved & blueprint.streams.keys()), train)
    return boundary.named(outputs, inputs), nest({path: _value(after[path]) for path in blueprint.state})

  return Model(init, apply, inputs)


def from_linen(
  module: linen.Module,
  *,
  input: str = "image",
  inputs: str | tuple[str, ...] = "batch",
  method: str | Callable[..., Any] | None = None,
  **kwargs: Any,
) -> Model:
  """Turn a Flax Linen module into a `Model`.

  Called as `module.apply(variables, x, train=...)`. In place of `train` the method may take `training`, `is_training`,
  `deterministic`, `inference` or `use_running_average`, or the module may have a field of such a name. It returns
  outputs by name; a bare array becomes `{"logits": array}`, or `{"output": array}` for a connector. `state` holds every
  collection but `params`, by name, and changes only in training. Partitioning boxes are taken off.

  BatchNorm takes its statistics over the whole batch: an example that a Term masks still counts there. A batch that
  says so itself, by an entry `where`, draws a warning in training.

  Args:
    module: the module; its parameters may depend on the shape of the example, not on its values.
    input: the entry of the batch that a network reads.
    inputs: context path(s) for a connector; see `Model`.
    method: the method to call instead of `__call__`.
    **kwargs: passed to every call. A mode flag among them is fixed in training and evaluation.

  Returns:
    The model.

  Raises:
    ValueError: if the method requires an argument of unknown name; from `init` and `apply`, if the batch has no `input`
      or `train=True` needs a key and has none; from `apply`, if BatchNorm or Dropout run in the wrong mode, as under a
      flag of unknown name.
  """
  function = getattr(type(module), method) if isinstance(method, str) else method or type(module).__call__
  signature = boundary.signature_of(function, given=kwargs)
  fields = () if signature.flags else [name for name in boundary.FLAGS if name in type(module).__dataclass_fields__]
  fixed = any(name in boundary.FLAGS for name in kwargs)

  def in_mode(train: bool) -> linen.Module:
    changes: dict[str, Any] = {**boundary.mode(fields, train)}
    return module.clone(**changes) if fields else module

  def options(train: bool) -> dict[str, Any]:
    return {"method": method, **boundary.mode(signature.flags, train), **kwargs}

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    x = boundary.shapes(boundary.pick(example, inputs, input))
    variables = dict(linen.meta.unbox(in_mode(False).lazy_init({"params": key}, x, **options(False))))
    return variables.pop("params", {}), variables

  def apply(
    params: PyTree, state: PyTree, batch: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    x = boundary.pick(batch, inputs, input)
    boundary.warn_of_masked(batch, "batch_stats" in state, train)
    # Streams of any other name fall back to that of the parameters.
    rngs = None if key is None else {"dropout": key, "params": key}
    mutable = list(state) if train and state else False
    trained: dict[str, bool] = {}
    try:
      with linen.intercept_methods(_watching(trained, None if fixed or train else boundary.check_evaluates)):
        result = in_mode(train).apply({"params": params, **state}, x, rngs=rngs, mutable=mutable, **options(train))
    except errors.InvalidRngError as error:
      raise ValueError(f"apply(train={train}) needs a key: {error}") from error
    if train and not fixed and not any(trained.values()) and not signature.flags and not fields:
      boundary.check_trains(trained, signature.unknown)
    outputs, changed = result if mutable else (result, {})  # pyright: ignore[reportGeneralTypeIssues]
    return boundary.named(outputs, inputs), {**state, **changed}

  return Model(init, apply, inputs)


def _watching(trained: dict[str, bool], check: Callable[[Sequence[str]], None] | None) -> Callable[..., Any]:
  """Interceptor of Linen's calls that notes which BatchNorm and Dropout run as in training, and checks each at once."""

  def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    flag = _mode_of(module) if context.method_name == "__call__" else None
    if flag is not None:
      bound = inspect.signature(type(module).__call__).bind_partial(module, *args, **kwargs).arguments
      value = getattr(module, flag) if bound.get(flag) is None else bound[flag]
      name = "/".join(module.path) or type(module).__name__
      trained[name] = value is not None and not value
      if check is not None and trained[name]:
        check([name])
    return call(*args, **kwargs)

  return intercept


def _mode_of(module: linen.Module) -> str | None:
  """The flag of a Linen part that behaves otherwise in training."""
  if isinstance(module, linen.BatchNorm):
    return "use_running_average"
  drops = isinstance(module, linen.Dropout) and module.rate > 0
  attends = isinstance(module, linen.MultiHeadDotProductAttention) and module.dropout_rate > 0
  return "deterministic" if drops or attends else None


class _Blueprint(NamedTuple):
  """What is known of an NNX module without any array: its graph, and the shapes of its leaves by path."""

  graph: Any
  params: dict[Path, Any]
  state: dict[Path, Any]
  streams: dict[Path, Any]
  statistics: tuple[Path, ...]  # of the state, what BatchNorm keeps
  drops: tuple[Path, ...]  # parts that drop
  signature: boundary.Signature

  @property
  def random(self) -> bool:
    return bool(self.drops or self.streams)


def _blueprint(build: Callable[[], nnx.Module]) -> _Blueprint:
  seen: dict[str, Any] = {}

  def trace() -> list[Any]:
    module = build()
    seen["signature"] = boundary.signature_of(type(module).__call__, given=("rngs",))
    seen["drops"] = tuple(path for path, part in nnx.iter_modules(module) if _drop_rate(part)[1] > 0)
    _refuse_loose_arrays(module)
    seen["graph"], leaves = nnx.split(module)
    seen["leaves"] = leaves = dict(nnx.to_flat_state(leaves))
    return [leaf.get_value() for leaf in leaves.values()]

  values = jax.eval_shape(trace)
  kinds = {path: type(leaf) for path, leaf in seen["leaves"].items()}
  specs = dict(zip(kinds, values, strict=True))
  streams = {path: (kind, specs[path].shape) for path, kind in kinds.items() if issubclass(kind, nnx.RngState)}
  params = {path: specs[path] for path, kind in kinds.items() if issubclass(kind, nnx.Param)}
  state = {path: spec for path, spec in specs.items() if path not in streams and path not in params}
  statistics = tuple(path for path in state if issubclass(kinds[path], nnx.BatchStat))
  return _Blueprint(seen["graph"], params, state, streams, statistics, seen["drops"], seen["signature"])


def _drop_rate(part: nnx.Module) -> tuple[str, float]:
  """The attribute of an NNX part that says how much it drops, and its value."""
  name = "rate" if isinstance(part, nnx.Dropout) else "dropout_rate"
  rate = getattr(part, name, 0.0)
  return name, float(rate) if isinstance(rate, int | float) else 0.0


def _refuse_loose_arrays(module: nnx.Module) -> None:
  """Raises for arrays outside variables: built under a trace, flax takes them for static and keeps the tracer."""
  loose = [
    ".".join(map(str, (*path, name)))
    for path, part in nnx.iter_modules(module)
    for name, value in vars(part).items()
    if isinstance(value, jax.Array)
  ]
  if loose:
    raise ValueError(f"the module holds arrays that are no nnx.Variable: {loose}; wrap each in one, such as nnx.Param")


def _streams(streams: Mapping[Path, Any], key: jax.Array | None) -> dict[Path, jax.Array]:
  """Gives every stored random stream its own key, and counts from zero."""
  key = jax.random.key(0) if key is None else key  # never drawn from: without a key nothing is random
  values = {}
  for index, (path, (kind, shape)) in enumerate(streams.items()):
    if issubclass(kind, nnx.RngKey):
      own = jax.random.fold_in(key, index)
      values[path] = jax.random.split(own, shape) if shape else own
    else:
      values[path] = jnp.zeros(shape, jnp.uint32)
  return values


def _call(module: nnx.Module, x: Any, signature: boundary.Signature, train: bool, rngs: nnx.Rngs | None) -> Any:
  attributes = boundary.mode(("training", "is_training", "inference"), train)
  if not train:
    module.eval(**attributes)
    for _, part in nnx.iter_modules(module):
      name, rate = _drop_rate(part)
      if rate > 0:
        setattr(part, name, 0.0)  # whatever flag it is called with
  elif not signature.flags:
    module.train(**attributes)
  given = {"rngs": rngs} if "rngs" in signature.names else {}
  return module(x, **boundary.mode(signature.flags, train), **given)  # pyright: ignore[reportCallIssue]


def _check_mode(blueprint: _Blueprint, moved: set[Path], drawn: bool, train: bool) -> None:
  """Refuses BatchNorm and Dropout in the wrong mode, by the variables that moved and whether numbers were drawn."""
  trained = [_dotted(path[:-1]) for path in blueprint.statistics if path in moved]
  if not train:
    boundary.check_evaluates(dict.fromkeys(trained))
  elif not blueprint.signature.flags and not trained and not drawn:
    idle = [_dotted(path[:-1]) for path in blueprint.statistics] + [_dotted(path) for path in blueprint.drops]
    boundary.check_trains(dict.fromkeys(idle), blueprint.signature.unknown)


def _counts(rngs: nnx.Rngs | None) -> list[Any]:
  """How often was drawn from each stream, as values that are replaced when one is."""
  return [] if rngs is None else jax.tree.leaves(nnx.state(rngs, nnx.RngCount))


def _dotted(path: Path) -> str:
  return ".".join(map(str, path)) or "the module itself"


def _value(variable: nnx.Variable) -> Any:
  return variable.get_value()
