"""Files that are whole or not there, arrays known by their digest, and the variables of a model as safetensors.

A frozen teacher is no part of a training state, so checkpoints do not copy it. Its file says what it is: keep the
digest in the settings of a run, which then refuses to continue with another teacher.
"""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from kdflax.numerics.trees import nest_names

PyTree = Any
_SEPARATOR = "/"
_DTYPES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}  # names in safetensors and in NumPy


class DiskFull(OSError):
  """There is no room left on the disk; what was written before is whole."""


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file so that readers see the old content or the new, never a part."""
  data = content.encode() if isinstance(content, str) else content
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def digests(arrays: PyTree) -> dict[str, str]:
  """SHA-256 of every array by path, over dtype, shape and bytes; of the local part where an array spans processes."""
  return {jax.tree_util.keystr(path): _digest_of_array(leaf) for path, leaf in jax.tree.leaves_with_path(arrays)}


def digest(arrays: PyTree) -> str:
  """One SHA-256 for a whole pytree: names a frozen teacher by its content."""
  return digest_of_text(json.dumps(digests(arrays), sort_keys=True))


def _digest_of_array(leaf: Any) -> str:
  if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    parts = [np.ascontiguousarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
  else:
    parts = [np.ascontiguousarray(leaf)]
  content = hashlib.sha256(f"{leaf.dtype}{leaf.shape}".encode())
  for part in parts:
    content.update(part.tobytes())
  return content.hexdigest()


def digest_of_text(text: str) -> str:
  """SHA-256 of a text."""
  return hashlib.sha256(text.encode()).hexdigest()


def check_storable(name: str, dtype: Any) -> None:
  """Raises a ValueError for an array that `array_of` could not read again: float8, complex numbers, objects, text."""
  kind = str(jnp.dtype(dtype)).rstrip("0123456789")
  width = jnp.dtype(dtype).itemsize * 8
  if kind not in _DTYPES.values() or str(jnp.dtype(dtype)) not in (kind, f"{kind}{width}"):
    raise ValueError(
      f"{name} is {jnp.dtype(dtype)}, which a safetensors file does not bring back; save it as float32 or bfloat16, or"
      " as integers"
    )


def array_of(stored: Mapping[str, Any]) -> np.ndarray:
  """An array of a safetensors file; its own NumPy reader knows no bfloat16."""
  kind = stored["dtype"].rstrip("0123456789")
  dtype = jnp.dtype(_DTYPES[kind] + stored["dtype"].removeprefix(kind))
  return np.frombuffer(stored["data"], dtype).reshape(stored["shape"])


def map_arrays(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a safetensors file by name, left on disk and read where they are used.

  Raises:
    ValueError: if the file is none, or is cut short.
  """
  content = np.memmap(path, np.uint8, "r")
  start = 8 + int.from_bytes(content[:8].tobytes(), "little")
  header = json.loads(content[8:start].tobytes())
  header.pop("__metadata__", None)
  cut = lambda begin, end: content[start + begin : start + end]
  return {name: array_of({**stored, "data": cut(*stored["data_offsets"])}) for name, stored in header.items()}


def save_variables(path: str | pathlib.Path, variables: tuple[PyTree, PyTree]) -> str:
  """Write the params and the state of a model to a safetensors file, whole or not at all.

  Args:
    path: the file; its folder is made if it does not exist.
    variables: (params, state), nested dicts of arrays. Empty dicts are kept.

  Returns:
    SHA-256 over the paths, dtypes, shapes and bytes of the arrays, the same for `numpy` and `jax` arrays of any memory
    order and on any device: `kdflax.files.digest(variables)`.

  Raises:
    ValueError: if something is neither a dict nor an array, an array is of a dtype that would not come back (float8,
      complex), or a name is empty or has a slash in it.
  """
  params, state = variables
  flat, empty = {}, []
  for name, leaf in [*_flatten(params, "params"), *_flatten(state, "state")]:
    if leaf is None:
      empty.append(name)
    else:
      check_storable(name, leaf.dtype)
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
    claimed, variables = header["digest"], _variables(arrays, json.loads(header["empty"]))
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


def _variables(arrays: Mapping[str, np.ndarray], empty: list[str]) -> tuple[PyTree, PyTree]:
  tree = nest_names({**arrays, **{name: {} for name in empty}})
  return tree["params"], tree["state"]
