"""The files of a record: its parts, which are safetensors files, and the manifest that lists them."""

import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from kdflax.files import check_storable, map_arrays
from kdflax.numerics.trees import name_of

PyTree = Any
MANIFEST = "manifest.json"
ARRAYS = "outputs.safetensors"  # the only part that `record` writes
INDEX, VIEW, INPUT = "index", "view", "input"  # arrays of a part beside the outputs; the last is a CRC-32 of a row
SEPARATOR = "."


class Part(NamedTuple):
  """One file of a record, as its manifest lists it."""

  file: str
  rows: int
  sha256: str


def read_manifest(directory: pathlib.Path) -> dict[str, Any] | None:
  """The manifest of a record: `parts`, `complete`, `inputs` and `source`; None if there is none."""
  path = directory / MANIFEST
  if not path.is_file():
    return None
  try:
    document = json.loads(path.read_text())
    if "parts" not in document:  # of `record`
      document["parts"] = [[ARRAYS, document["examples"], document["sha256"]]]
    parts = [Part(*part) for part in document["parts"]]
    source, complete = document.get("source", {}), document.get("complete", True)
    return {"parts": parts, "complete": complete, "inputs": document.get("inputs"), "source": source}
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); record the teacher again") from error


def flat_outputs(outputs: PyTree, rows: int, name: str = "index") -> dict[str, np.ndarray]:
  """Outputs by path, checked: as many rows as expected, finite, of dtypes that come back."""
  flat = {path: np.ascontiguousarray(array) for path, array in _flatten(outputs)}  # safetensors writes memory order
  for path, array in flat.items():
    if array.shape[:1] != (rows,):
      raise ValueError(f"{path} has shape {array.shape}; expected {rows} rows, one for each {name}")
    check_storable(path, array.dtype)
    if not np.isfinite(array).all():
      raise ValueError(f"{path} holds NaN or infinite values; the teacher is broken")
  return flat


def fingerprints(array: Any) -> np.ndarray:
  """A CRC-32 of each row, int64 `[rows]`; tells whether a student sees what the teacher saw."""
  array = np.asarray(array)
  kind = described(array).encode()
  return np.array([zlib.crc32(np.ascontiguousarray(row).tobytes(), zlib.crc32(kind)) for row in array], np.int64)


def described(array: Any) -> str:
  """Type and shape of a row, such as `float32[8,8,1]`."""
  return f"{array.dtype}[{','.join(str(n) for n in array.shape[1:])}]"


def open_part(directory: pathlib.Path, part: Part, verify: bool) -> dict[str, np.ndarray]:
  """The arrays of a file by path, on disk, if they are what the manifest says."""
  path = directory / part.file
  if not path.is_file():
    raise ValueError(f"{directory} holds no complete teacher record ({part.file} is missing); record the teacher again")
  if verify:
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != part.sha256:
      raise ValueError(f"{path} is not what was recorded (its SHA-256 differs); record the teacher again")
  try:
    flat = map_arrays(path)
    index = flat[INDEX]
  except (LookupError, ValueError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is no record ({type(error).__name__}: {error}); record the teacher again") from error
  odd = [f"{name} has shape {list(array.shape)}" for name, array in flat.items() if array.shape[:1] != (part.rows,)]
  odd += [f"{name} is the beginning of {o}" for name in flat for o in flat if o.startswith(f"{name}{SEPARATOR}")]
  once = VIEW in flat or len(np.unique(index)) == len(index)
  if odd or index.ndim != 1 or index.dtype.kind != "i" or not once:
    why = ", ".join(odd) or f"the index {index.dtype}{list(index.shape)} repeats some or is no list of integers"
    raise ValueError(f"{path} does not hold each of {part.rows!r} examples once: {why}; record the teacher again")
  return {VIEW: np.zeros(part.rows, np.int64), **flat}


def is_output(name: str) -> bool:
  """Whether an array of a part is an output of the teacher."""
  return name not in (INDEX, VIEW, INPUT)


def _flatten(tree: PyTree) -> Iterable[tuple[str, np.ndarray]]:
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = name_of(path, SEPARATOR)
    if not is_output(name) or name.count(SEPARATOR) >= len(path):
      taken = f"{INDEX!r}, {VIEW!r} and {INPUT!r} are taken"
      raise ValueError(f"{name!r} is the name of an output, but dots separate names and {taken}; rename it")
    yield name, np.asarray(leaf)
