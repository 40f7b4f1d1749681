"""Frozen models as files that are known by their content.

A frozen teacher is no part of a training state, so checkpoints do not copy it. Its file says what it is: keep the
digest in the settings of a run, which then refuses to continue with another teacher.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from kdflax.teachers.store import array_of
from kdflax.training import digest, write_atomically

PyTree = Any
_SEPARATOR = "/"


def save_variables(path: str | pathlib.Path, variables: tuple[PyTree, PyTree]) -> str:
  """Write the params and the state of a model to a safetensors file, whole or not at all.

  Args:
    path: the file; its folder is made if it does not exist.
    variables: (params, state), nested dicts of arrays. Empty dicts are kept.

  Returns:
    SHA-256 over the paths, dtypes, shapes and bytes of the arrays, the same for `numpy` and `jax` arrays of any memory
    order and on any device: `kdflax.training.digest(variables)`.

  Raises:
    ValueError: if something is neither a dict nor an array, or a name is empty or has a slash in it.
  """
  params, state = variables
  flat, empty = {}, []
  for name, leaf in [*_flatten(params, "params"), *_flatten(state, "state")]:
    if leaf is None:
      empty.append(name)
    else:
      flat[name] = np.ascontiguousarray(leaf).reshape(leaf.shape)  # safetensors writes memory order
  content = digest((params, state))
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  write_atomically(pathlib.Path(path), save(flat, {"digest": content, "empty": json.dumps(empty)}))
  return content


def load_variables(path: str | pathlib.Path, *, digest: str | None = None) -> tuple[PyTree, PyTree]:
  """Read what `save_variables` wrote, and refuse anything else.

  Args:
    path: the file.
    digest: what `save_variables` returned, for a file that may have been replaced since; damage is noticed without.

  Returns:
    (params, state), nested dicts of NumPy arrays.

  Raises:
    ValueError: if the file is no such file, is damaged, or holds other variables than the digest names.
    OSError: if it cannot be read.
  """
  content = pathlib.Path(path).read_bytes()
  try:
    arrays = {name: array_of(stored) for name, stored in deserialize(content)}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    claimed, variables = header["digest"], _nest(arrays, json.loads(header["empty"]))
  except (SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path} is not a file of save_variables, or is damaged: {type(error).__name__} {error}; save the teacher again"
    ) from error
  if claimed != _digest(variables):
    raise ValueError(f"{path} is damaged: its arrays are not those that were saved; restore the file")
  if digest not in (None, claimed):
    raise ValueError(f"{path} holds other variables than those referenced: digest {claimed}, expected {digest}")
  return variables


_digest = digest  # the argument of `load_variables` has the name as well


def _flatten(tree: PyTree, name: str) -> Iterator[tuple[str, Any]]:
  """Paths and arrays; None for an empty dict."""
  if isinstance(tree, Mapping):
    if not tree:
      yield name, None
    for key, value in tree.items():
      if not isinstance(key, str) or not key or _SEPARATOR in key:
        raise ValueError(f"names must be strings without {_SEPARATOR!r}; {name} has {key!r}")
      yield from _flatten(value, f"{name}{_SEPARATOR}{key}")
  elif isinstance(tree, jax.Array | np.ndarray | np.generic):
    yield name, tree
  else:
    raise ValueError(f"variables are nested dicts of arrays; {name} is a {type(tree).__name__}")


def _nest(arrays: Mapping[str, np.ndarray], empty: list[str]) -> tuple[PyTree, PyTree]:
  tree: dict[str, Any] = {}
  for name, value in [*arrays.items(), *((name, {}) for name in empty)]:
    *parents, last = name.split(_SEPARATOR)
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree["params"], tree["state"]
