"""What every adapter does at the boundary: find the input, name the outputs, say whether the module trains.

Modules say in several ways whether they are training. The flags known here are set by name; a module that calls its
flag otherwise is refused as soon as one of its parts is seen to run in the wrong mode.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.model import Outputs, PyTree

# Known mode flags, and their value in training.
FLAGS = {
  "train": True,
  "training": True,
  "is_training": True,
  "deterministic": False,
  "inference": False,
  "use_running_average": False,
}


class Signature(NamedTuple):
  """What a module's method takes beside its input.

  Attributes:
    names: all arguments.
    flags: the known mode flags among them.
    unknown: optional ones of unknown name that may be a mode flag: their default is a bool, a string or None.
  """

  names: tuple[str, ...]
  flags: tuple[str, ...]
  unknown: tuple[str, ...]


def signature_of(function: Callable[..., Any], *, given: Iterable[str] = ()) -> Signature:
  """Reads the arguments of a method, the first two of which are the module and its input.

  Args:
    function: an unbound method.
    given: names of arguments whose value is fixed, or that an adapter gives.

  Returns:
    The signature; what is given counts neither as a flag nor as unknown.

  Raises:
    ValueError: if an argument is required that no adapter knows.
  """
  parameters = inspect.signature(function).parameters
  others = {name: p for name, p in list(parameters.items())[2:] if name not in (*FLAGS, *given)}
  required = [n for n, p in others.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
  if required:
    raise ValueError(
      f"{function.__qualname__} needs {required}, which a Model does not give; the mode flags known are {list(FLAGS)}: "
      "wrap the module in one that takes one of these"
    )
  maybe = lambda p: p.kind is p.VAR_KEYWORD or p.default is None or isinstance(p.default, bool | str)
  flags = tuple(name for name in parameters if name in FLAGS and name not in given)
  return Signature(tuple(parameters), flags, tuple(name for name, p in others.items() if maybe(p)))


def mode(flags: Iterable[str], train: bool) -> dict[str, bool]:
  """Returns the values of mode flags in training or in evaluation."""
  return {name: FLAGS[name] is train for name in flags}


def check_evaluates(parts: Iterable[str]) -> None:
  """Raises a ValueError, naming them, if there are parts that were seen to train in evaluation."""
  if parts := list(parts):
    raise ValueError(
      f"with train=False the parts {parts} ran as in training; the module must hand on its mode flag, one of "
      f"{list(FLAGS)}, or leave the mode to its parts"
    )


def check_trains(parts: Iterable[str], unknown: Iterable[str]) -> None:
  """Raises a ValueError if no part was seen to train, and an unknown argument may be the reason."""
  parts, unknown = list(parts), list(unknown)
  if parts and unknown:
    raise ValueError(
      f"with train=True the parts {parts} ran as in evaluation, and the module takes {unknown}, none of which is a "
      f"known mode flag ({list(FLAGS)}); rename the flag, or wrap the module in one that takes one of these"
    )


def warn_of_masked(batch: Any, has_statistics: bool, train: bool) -> None:
  """Warns that BatchNorm counts what the batch says does not count."""
  if train and has_statistics and isinstance(batch, Mapping) and "where" in batch:
    warnings.warn(
      "the batch has a mask, 'where', but BatchNorm takes its statistics over all examples, masked ones included; "
      "train on whole batches, or use a norm of single examples (LayerNorm, GroupNorm)",
      stacklevel=3,
    )


def pick(batch: Any, inputs: str | tuple[str, ...], input: str | None) -> Any:
  """Returns what the module is called with: (an entry of) the batch, or the array(s) handed to a connector."""
  if inputs != "batch" or input is None:
    return batch
  if not isinstance(batch, Mapping):
    raise ValueError(f"a network takes a batch, a dict with the entry {input!r}; got {type(batch).__name__}")
  if input not in batch:
    raise ValueError(f"the batch has no {input!r}; it has {sorted(batch)}; name the entry by the argument `input`")
  return batch[input]


def named(outputs: Any, inputs: str | tuple[str, ...]) -> Outputs:
  """Returns outputs by name, a bare array as `logits` or, of a connector, `output`."""
  if isinstance(outputs, Mapping):
    return dict(outputs)
  return {"logits" if inputs == "batch" else "output": outputs}


def gather(specs: Mapping[tuple[Any, ...], Any], tree: PyTree, name: str) -> dict[tuple[Any, ...], Any]:
  """Looks every path up in a nested dict, and checks its shape.

  Raises:
    ValueError: if a leaf is missing or has another shape.
  """
  return {path: _at(tree, path, tuple(spec.shape), name) for path, spec in specs.items()}


def _at(tree: PyTree, path: tuple[Any, ...], shape: tuple[int, ...], name: str) -> Any:
  where, node = ".".join(map(str, path)), tree
  for part in map(str, path):
    if not isinstance(node, Mapping) or part not in node:
      there = sorted(node) if isinstance(node, Mapping) else type(node).__name__
      raise ValueError(f"{name} has no {where!r}: looking for {part!r}, there is {there}. Was it made by this model?")
    node = node[part]
  if np.shape(node) != shape:
    raise ValueError(
      f"{name} {where!r} has shape {np.shape(node)}, and this model with this input needs {shape}. Was it made by "
      "this model, for inputs of this size?"
    )
  return node


def shapes(x: PyTree) -> PyTree:
  """Returns the shapes and dtypes of a tree of arrays; a batch whose size an export leaves open counts as one of one.

  A module does not depend on the size of its batch, and shapes that are known can be compared.
  """
  known = lambda shape: tuple(n if isinstance(n, int) else 1 for n in shape[:1]) + tuple(shape[1:])
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(known(np.shape(leaf)), leaf.dtype), x)


def typed(key: jax.Array) -> jax.Array:
  """Returns a typed key; the old uint32 keys are accepted as well."""
  return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
