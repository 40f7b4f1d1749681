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
from safetensors import deserialize
from safetensors.numpy import save

from kdflax.files import array_of, write_atomically
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
    ValueError: if an array has another length than `index` or is not finite, an index appears twice, or a name in
    `outputs` has a dot in it or is that of the index.
  """
  index = np.asarray(index, np.int64)
  if len(np.unique(index)) != len(index):
    raise ValueError("index names an example twice; record each example once")
  flat = {name: np.ascontiguousarray(array) for name, array in _flatten(outputs)}  # safetensors writes memory order
  for name, array in flat.items():
    if array.shape[:1] != index.shape:
      raise ValueError(f"{name} has shape {array.shape}; expected {len(index)} rows, one for each index")
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
  content = (directory / _ARRAYS).read_bytes()
  if hashlib.sha256(content).hexdigest() != _recorded_digest(directory / _MANIFEST):
    raise ValueError(f"{directory / _ARRAYS} is not what was recorded (its SHA-256 differs); record the teacher again")
  flat = {name: array_of(stored) for name, stored in deserialize(content)}
  recorded_index = flat.pop(_INDEX)
  rows = np.arange(len(recorded_index))
  if index is not None:
    order = np.argsort(recorded_index)
    place = np.minimum(np.searchsorted(recorded_index[order], index), len(order) - 1)
    rows = order[place]
    missing = np.asarray(index)[recorded_index[rows] != index]
    if missing.size:
      raise ValueError(f"the record in {directory} lacks {missing.size} of the examples, first {missing[:5].tolist()}")
  return nest_names({name: array[rows] for name, array in flat.items()}, _SEPARATOR)


def _recorded_digest(manifest: pathlib.Path) -> str:
  try:
    return json.loads(manifest.read_text())["sha256"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{manifest} is damaged ({type(error).__name__}: {error}); record the teacher again") from error


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
