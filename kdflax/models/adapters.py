"""The two ways of a Flax module into `Model(init, apply)`: NNX and Linen.

Only plain nested dicts of arrays cross this boundary. Inside, the Flax module lives for the length of one trace.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors, linen, nnx

from kdflax.model import Model, Outputs, PyTree
from kdflax.numerics.trees import nest


def count_parameters(params: PyTree) -> int:
  """Count the numbers in a tree of arrays or of shapes.

  Args:
    params: any tree of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    The number of elements of all leaves together.
  """
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_bytes(params: PyTree) -> int:
  """Count the bytes in a tree of arrays or of shapes.

  Args:
    params: any tree of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    The size of all leaves together, in bytes.
  """
  return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))


def from_nnx(
  make: Callable[..., nnx.Module],
  *,
  input: str = "image",
  inputs: str | tuple[str, ...] = "batch",
  with_example: bool = False,
) -> Model:
  """Turn a Flax NNX module into a `Model`.

  The module is called as `module(x, train=..., rngs=...)`, each keyword only where its `__call__` has it. Without
  `train` the mode is set by `module.train()` and `module.eval()` instead. It returns outputs by name; a bare array
  becomes `{"logits": array}`, or `{"output": array}` for a connector.

  `params` are the `nnx.Param`, `state` every other variable; lists become dicts with the keys "0", "1", ... Random
  streams (`Dropout(rate, rngs=rngs)`) are no state: each call derives them from `key`, so the same key gives the same
  mask. The graph definition comes from an abstract build, without arrays, and is kept for every input shape seen.
  Values a module sows are dropped: return intermediate features by name.

  Args:
    make: `make(rngs) -> module`; with `with_example`, `make(rngs, example)`.
    input: the entry of the batch that a network reads.
    inputs: context path(s) for a connector; see `Model`.
    with_example: let `make` read input widths from `example`, a `jax.ShapeDtypeStruct` (a tuple of them for a tuple of
      paths). The module must not depend on the batch size.

  Returns:
    The model. A parameter that does not fit the module raises ValueError with its path and both shapes.

  Raises:
    ValueError: from `init` and `apply`, if the batch has no `input`, the module holds arrays that are no
      `nnx.Variable`, or `train=True` needs a key and has none.
  """

  @functools.cache
  def build(treedef, specs) -> _Blueprint:
    example = jax.tree.unflatten(treedef, specs)
    return _blueprint(lambda: _make(jax.random.key(0), example))

  def _make(key, example):
    rngs = nnx.Rngs(key)
    return make(rngs, example) if with_example else make(rngs)

  def _built_for(x):
    leaves, treedef = jax.tree.flatten(_shapes(x) if with_example else None)
    return build(treedef, tuple(leaves))

  def init(key, example):
    x = _pick(example, inputs, input)
    _built_for(x)  # the checks of a module, before any array is made
    leaves = dict(nnx.to_flat_state(nnx.state(_make(_typed(key), _shapes(x)))))
    params = {path: _value(v) for path, v in leaves.items() if isinstance(v, nnx.Param)}
    state = {path: _value(v) for path, v in leaves.items() if not isinstance(v, nnx.Param | nnx.RngState)}
    return nest(params), nest(state)

  def apply(params, state, batch, *, train, key=None):
    x = _pick(batch, inputs, input)
    blueprint = _built_for(x)
    if train and key is None and blueprint.random:
      raise ValueError("apply(train=True) needs a key: the model has dropout or another source of randomness.")
    key = None if key is None else _typed(key)
    flat = _gather(blueprint.params, params, "params") | _gather(blueprint.state, state, "state")
    flat |= _streams(blueprint.streams, key)
    # A copy, for gradients: the variables must belong to the trace that changes them.
    module = nnx.merge(blueprint.graph, nnx.from_flat_state(flat), copy=True)
    outputs = _call(module, x, train, None if key is None else nnx.Rngs(key))
    after = dict(nnx.to_flat_state(nnx.state(module)))
    return _named(outputs, inputs), nest({path: _value(after[path]) for path in blueprint.state})

  return Model(init, apply, inputs)


def from_linen(
  module: linen.Module,
  *,
  input: str = "image",
  inputs: str | tuple[str, ...] = "batch",
  method: str | Callable | None = None,
  **kwargs: Any,
) -> Model:
  """Turn a Flax Linen module into a `Model`.

  Called as `module.apply(variables, x, train=...)`, without `train` where the method has no such argument. It returns
  outputs by name; a bare array becomes `{"logits": array}`, or `{"output": array}` for a connector. `state` holds every
  collection but `params`, by name, and changes only in training. Partitioning boxes are taken off.

  Args:
    module: the module; its parameters may depend on the shape of the example, not on its values.
    input: the entry of the batch that a network reads.
    inputs: context path(s) for a connector; see `Model`.
    method: the method to call instead of `__call__`.
    **kwargs: passed to every call.

  Returns:
    The model.

  Raises:
    ValueError: from `init` and `apply`, if the batch has no `input` or `train=True` needs a key and has none.
  """
  function = getattr(type(module), method) if isinstance(method, str) else method or type(module).__call__
  takes_train = "train" in inspect.signature(function).parameters

  def options(train):
    return {"method": method, **({"train": train} if takes_train else {}), **kwargs}

  def init(key, example):
    variables = module.lazy_init({"params": key}, _shapes(_pick(example, inputs, input)), **options(False))
    variables = dict(linen.meta.unbox(variables))
    return variables.pop("params", {}), variables

  def apply(params, state, batch, *, train, key=None):
    x = _pick(batch, inputs, input)
    # Streams of any other name fall back to that of the parameters.
    rngs = None if key is None else {"dropout": key, "params": key}
    mutable = list(state) if train and state else False
    try:
      result = module.apply({"params": params, **state}, x, rngs=rngs, mutable=mutable, **options(train))
    except errors.InvalidRngError as error:
      raise ValueError(f"apply(train={train}) needs a key: {error}") from error
    outputs, changed = result if mutable else (result, {})  # pyright: ignore[reportGeneralTypeIssues]
    return _named(outputs, inputs), {**state, **changed}

  return Model(init, apply, inputs)


class _Blueprint(NamedTuple):
  """What is known of an NNX module without any array: its graph, and the shapes of its leaves by path."""

  graph: Any
  params: dict[tuple, Any]
  state: dict[tuple, Any]
  streams: dict[tuple, Any]
  random: bool


def _blueprint(build: Callable[[], nnx.Module]) -> _Blueprint:
  seen: dict[str, Any] = {}

  def trace():
    module = build()
    seen["dropout"] = any(isinstance(part, nnx.Dropout) and part.rate > 0 for _, part in nnx.iter_modules(module))
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
  return _Blueprint(seen["graph"], params, state, streams, random=seen["dropout"] or bool(streams))


def _refuse_loose_arrays(module: nnx.Module) -> None:
  """Raise for arrays outside variables: built under a trace, flax takes them for static and keeps the tracer."""
  loose = [
    ".".join(map(str, (*path, name)))
    for path, part in nnx.iter_modules(module)
    for name, value in vars(part).items()
    if isinstance(value, jax.Array)
  ]
  if loose:
    raise ValueError(f"The module holds arrays that are no nnx.Variable: {loose}; wrap each in one, such as nnx.Param.")


def _streams(streams, key) -> dict[tuple, jax.Array]:
  """Give every stored random stream its own key, and count from zero."""
  key = jax.random.key(0) if key is None else key  # never drawn from: without a key nothing is random
  values = {}
  for index, (path, (kind, shape)) in enumerate(streams.items()):
    if issubclass(kind, nnx.RngKey):
      own = jax.random.fold_in(key, index)
      values[path] = jax.random.split(own, shape) if shape else own
    else:
      values[path] = jnp.zeros(shape, jnp.uint32)
  return values


def _call(module, x, train: bool, rngs):
  accepted = inspect.signature(type(module).__call__).parameters
  if "train" not in accepted:
    module.train() if train else module.eval()
  given = {"train": train, "rngs": rngs}
  return module(x, **{name: value for name, value in given.items() if name in accepted})


def _pick(batch, inputs, input: str):
  """Return what the module is called with: one entry of the batch, or the array(s) handed to a connector."""
  if inputs != "batch":
    return batch
  if not isinstance(batch, Mapping):
    raise ValueError(f"A network takes a batch, a dict with the entry {input!r}; got {type(batch).__name__}.")
  if input not in batch:
    raise ValueError(f"The batch has no {input!r}; it has {sorted(batch)}. Name the entry with input=...")
  return batch[input]


def _named(outputs, inputs) -> Outputs:
  if isinstance(outputs, Mapping):
    return dict(outputs)
  return {"logits" if inputs == "batch" else "output": outputs}


def _gather(specs, tree, name: str) -> dict[tuple, jax.Array]:
  """Look every path up in a nested dict, and check its shape."""
  return {path: _look_up(tree, path, spec.shape, name) for path, spec in specs.items()}


def _look_up(tree, path, shape, name: str):
  where, node = ".".join(map(str, path)), tree
  for part in map(str, path):
    if not isinstance(node, Mapping) or part not in node:
      there = sorted(node) if isinstance(node, Mapping) else type(node).__name__
      raise ValueError(f"{name} has no {where!r}: looking for {part!r}, there is {there}. Was it made by this model?")
    node = node[part]
  if jnp.shape(node) != shape:
    raise ValueError(
      f"{name} {where!r} has shape {jnp.shape(node)}, and this model with this input needs {shape}. "
      "Was it made by this model, for inputs of this size?"
    )
  return node


def _shapes(x):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), x)


def _typed(key):
  """Accept the old uint32 keys as well."""
  return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _value(variable):
  return variable.get_value()
