"""The one shape that every model has, the context its outputs go to, and the forms of the six ideas.

Only plain nested dicts of named arrays cross these lines. Whoever writes a model, a loss or a balancer of their own
needs nothing but this module, and it needs neither Flax nor anything else of kdflax.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

PyTree = Any
Outputs = dict[str, Any]
Context = Mapping[str, Any]
Variables = Mapping[str, tuple[PyTree, PyTree]]  # (params, state) by model name


class Init(Protocol):
  """`(key, example) -> (params, state)`; of the example only shapes and dtypes matter."""

  def __call__(self, key: jax.Array, example: Any, /) -> tuple[PyTree, PyTree]: ...


class Apply(Protocol):
  """`(params, state, batch, *, train, key) -> (outputs, state)`, pure; `train` is static."""

  def __call__(
    self, params: PyTree, state: PyTree, batch: Any, /, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]: ...


class Loss(Protocol):
  """`(student, teacher, *, ...) -> one value per example`; a Term names the arguments, so any function will do."""

  def __call__(self, *arrays: Any, **keywords: Any) -> jax.Array: ...


class Cost(Protocol):
  """A coupling or another cost of the params themselves: `params by model name -> scalar`."""

  def __call__(self, params: dict[str, PyTree], /) -> jax.Array: ...


class Model(NamedTuple):
  """Hold a model as two pure functions and the place its input comes from.

  `init(key, example) -> (params, state)` and `apply(params, state, batch, *, train, key) -> (outputs, state)`. `params`
  is what is learned; `state` is what changes otherwise (the running statistics of BatchNorm, frozen arrays), `{}` if
  there is nothing. Both are plain nested dicts of arrays, so they pass through `jit`, `grad`, `vmap` (several seeds:
  `jax.vmap(model.init, in_axes=(0, None))(keys, example)`), donation and checkpoints. `train` is static; `key` feeds
  dropout and may be `None` where nothing is random. A model never stores randomness.

  `inputs` says what the third argument of `apply`, and `example`, is: the batch dict (`"batch"`, a network), the array
  at a context path (`"student.embedding"`, a connector), or a tuple of arrays for a tuple of paths.
  """

  init: Init
  apply: Apply
  inputs: str | tuple[str, ...] = "batch"


def lookup(context: Context, path: str) -> Any:
  """Returns what lies at a dotted path of a context.

  Raises:
    ValueError: if the path does not exist, with what exists where it ends.
  """
  node: Any = context
  for depth, key in enumerate(path.split(".")):
    if not isinstance(node, Mapping) or key not in node:
      parent = ".".join(path.split(".")[:depth]) or "the context"
      there = f"has {sorted(node)}" if isinstance(node, Mapping) else f"is an array of shape {jnp.shape(node)}"
      raise ValueError(f"no {path!r} in the context: {parent} {there}")
    node = node[key]
  return node


def lies_below(path: str, above: str) -> bool:
  """Whether a context path is another one, or leads through it."""
  return path == above or path.startswith(above + ".")


def paths_of(model: Model) -> tuple[str, ...]:
  """The context paths that a model reads."""
  return (model.inputs,) if isinstance(model.inputs, str) else tuple(model.inputs)


def read(context: Context, model: Model) -> Any:
  """What a model is applied to: what lies at its path, or a tuple of it for a tuple of paths."""
  arrays = tuple(lookup(context, path) for path in paths_of(model))
  return arrays[0] if isinstance(model.inputs, str) else arrays


def named_key(key: jax.Array, name: str) -> jax.Array:
  """A key of its own for each name: `fold_in` of the name's CRC-32."""
  return jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))
