"""Stored teachers: what a teacher said about every example, recorded once and read back as a model.

A record is a directory with one safetensors file of arrays `[examples, ...]` and a manifest: which examples in which
order, where it came from, and a digest that is verified when it is read. Nothing is pickled.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from kdflax.files import array_of, check_storable, write_atomically
from kdflax.model import Model
from kdflax.numerics.trees import name_of, nest_names

PyTree = Any
_ARRAYS, _MANIFEST = "outputs.safetensors", "manifest.json"
_INDEX = "index"  # name of the index among the arrays
_SEPARATOR = "."


def record(
  directory: str | pathlib.Path, outputs: PyTree, index: np.ndarray, *, source: Mapping[str, Any] | None = None
) -> str:
  """Writes a teacher's outputs.

  Args:
    directory: made if it does not exist; an earlier record in it is replaced.
    outputs: nested dict of arrays `[examples, ...]`, in the order of `index`.
    index: int `[examples]`, which example each row belongs to, without repetition.
    source: JSON to keep with it: model, digest of its params, data set.

  Returns:
    SHA-256 of the arrays.

  Raises:
    ValueError: if an array has another length than `index`, is not finite or of a dtype that would not come back
      (float8, complex), an index appears twice, or a name in `outputs` has a dot in it or is that of the index.
  """
  index = np.asarray(index, np.int64)
  if index.ndim != 1:
    raise ValueError(f"index must be [examples]; got shape {list(index.shape)}")
  if len(np.unique(index)) != len(index):
    raise ValueError("index names an example twice; record each example once")
  flat = {name: np.ascontiguousarray(array) for name, array in _flatten(outputs)}  # safetensors writes memory order
  for name, array in flat.items():
    if array.shape[:1] != index.shape:
      raise ValueError(f"{name} has shape {array.shape}; expected {len(index)} rows, one for each index")
    check_storable(name, array.dtype)
    if not np.isfinite(array).all():
      raise ValueError(f"{name} holds NaN or infinite values; the teacher is broken")
  content = save({**flat, _INDEX: index})
  digest = hashlib.sha256(content).hexdigest()
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / _MANIFEST).unlink(missing_ok=True)  # a record without a manifest is no record
  write_atomically(directory / _ARRAYS, content)
  manifest = {"sha256": digest, "examples": len(index), "source": dict(source or {})}
  write_atomically(directory / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
  return digest


def read_record(directory: str | pathlib.Path, index: np.ndarray | None = None) -> PyTree:
  """Reads a record, its rows in the order of `index`.

  Args:
    directory: where `record` wrote.
    index: int `[examples]`, the examples wanted; by default all in the recorded order.

  Returns:
    The nested dict of arrays `[examples, ...]`.

  Raises:
    ValueError: if there is no complete record, its content is not what was recorded, or it lacks an example.
  """
  directory = pathlib.Path(directory)
  for name in (_MANIFEST, _ARRAYS):
    if not (directory / name).is_file():
      raise ValueError(f"{directory} holds no complete teacher record ({name} is missing); record the teacher again")
  flat = _arrays_of(directory)
  recorded_index = flat.pop(_INDEX)
  rows = np.arange(len(recorded_index))
  if index is not None:
    missing = np.asarray(index)[~np.isin(index, recorded_index)]
    if missing.size:
      raise ValueError(f"the record in {directory} lacks {missing.size} of the examples, first {missing[:5].tolist()}")
    order = np.argsort(recorded_index)
    rows = order[np.searchsorted(recorded_index[order], index)]
  return nest_names({name: array[rows] for name, array in flat.items()}, _SEPARATOR)


def _arrays_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a record by name, the index among them, if they are what its manifest says."""
  path, manifest = directory / _ARRAYS, directory / _MANIFEST
  try:
    document = json.loads(manifest.read_text())
    digest, examples = document["sha256"], document["examples"]
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    raise ValueError(f"{manifest} is damaged ({type(error).__name__}: {error}); record the teacher again") from error
  content = path.read_bytes()
  if hashlib.sha256(content).hexdigest() != digest:
    raise ValueError(f"{path} is not what was recorded (its SHA-256 differs); record the teacher again")
  try:
    flat = {name: array_of(stored) for name, stored in deserialize(content)}
    index = flat[_INDEX]
  except (SafetensorError, LookupError, ValueError, TypeError) as error:
    raise ValueError(f"{path} is no record ({type(error).__name__}: {error}); record the teacher again") from error
  odd = [f"{name} has shape {list(array.shape)}" for name, array in flat.items() if array.shape[:1] != (examples,)]
  odd += [f"{name} is the beginning of {o}" for name in flat for o in flat if o.startswith(f"{name}{_SEPARATOR}")]
  if odd or index.ndim != 1 or index.dtype.kind != "i" or len(np.unique(index)) != len(index):
    why = ", ".join(odd) or f"the index {index.dtype}{list(index.shape)} repeats some or is no list of integers"
    raise ValueError(f"{path} does not hold each of {examples!r} examples once: {why}; record the teacher again")
  return flat


def recorded(path: str = "batch.teacher") -> Model:
  """A teacher whose outputs come with the batch: the same Terms serve it as a live one.

  Args:
    path: context path of the recorded outputs, put there with the data.

  Returns:
    A model without params that returns what it is given.
  """
  return Model(lambda key, example: ({}, {}), lambda params, state, batch, *, train, key=None: (batch, state), path)


def _flatten(tree: PyTree) -> Iterable[tuple[str, np.ndarray]]:
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = name_of(path, _SEPARATOR)
    if name == _INDEX or name.count(_SEPARATOR) >= len(path):
      raise ValueError(f"{name!r} is the name of an output, but dots separate names and {_INDEX!r} is taken; rename it")
    yield name, np.asarray(leaf)
