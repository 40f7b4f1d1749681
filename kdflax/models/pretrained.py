"""Checkpoints of language models as others share them: config.json and safetensors, in and out, never a pickle.

A tensor of a layer becomes one row of the array that all layers share. Arrays are made one after another, each from the
parts of the files that its devices hold, so beside the arrays there is never more than one of them in memory.
"""

import dataclasses
import fnmatch
import functools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kdflax.files import write_atomically
from kdflax.model import Model, PyTree
from kdflax.models.decoder import decoder
from kdflax.models.decoder_config import DecoderConfig
from kdflax.models.families import read_config, tensor_name, write_config
from kdflax.models.layers import Dtype
from kdflax.numerics.trees import name_of, nest_names

Place = Sharding | Callable[[PyTree], PyTree]  # of all arrays, or what a tree of shapes becomes

_CONFIG, _WHOLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
# What the names of a language model begin with, alone and beside a model of images, and what that of its head does.
_PREFIXES = {"model.": "", "language_model.model.": "language_model.", "model.language_model.": ""}
_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_COPIED = (
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.*",
  "merges.txt",
  "chat_template*",
  "generation_config.json",
)
_SHOWN = 5  # names of one kind in a message


class Pretrained(NamedTuple):
  """A language model that was read.

  `variables` is (params, state) as the trainings here take it, `frozen={"teacher": pretrained.variables}`.
  """

  config: DecoderConfig
  model: Model
  variables: tuple[PyTree, PyTree]


def load_pretrained(
  directory: str | pathlib.Path,
  *,
  head: bool = True,
  features: bool = False,
  sharding: Place | None = None,
  param_dtype: Dtype | None = None,
  dtype: Dtype | None = None,
  remat: Literal["layer", "products"] | None = None,
  scan: bool = True,
  attention: Literal["xla", "cudnn"] | None = None,
) -> Pretrained:
  """Read a language model from a directory of config.json and safetensors, as Hugging Face's transformers writes it.

  The families are Llama 2 and 3, Qwen 2, 2.5 and 3, Gemma 2 and 3 (of one with images, its language model).

  Args:
    directory: with `config.json` and `model.safetensors`, or several files and `model.safetensors.index.json`.
    head: whether the model returns logits. Losses that take hidden states and a head find the latter in the params; see
      `decoder`.
    features: whether it returns the hidden states behind each layer.
    sharding: where the params go: one sharding for all, or a function from the tree of their shapes to one of
      shardings, such as `lambda params: layout.of_frozen({"teacher": (params, {})})["teacher"][0]` for a layout of a
      training. None is the default device. Each device is given what it holds and no more.
    param_dtype: of the params, such as `jnp.float32` for a student that is trained; None keeps that of the files.
    dtype: to compute in; None is that of the params.
    remat, scan, attention: how to compute; see `DecoderConfig`.

  Returns:
    The config, the model and its (params, state).

  Raises:
    ValueError: if the directory has no config or no safetensors, the family or something in its config is not known, a
      file is damaged or cut short, or a tensor is missing, left over, of another shape or quantized; all before any
      array is made.
    OSError: if a file cannot be read.
  """
  directory = pathlib.Path(directory)
  config = dataclasses.replace(_config(directory), dtype=dtype, remat=remat, scan=scan, attention=attention)
  leaves, tensors = _leaves(config), _of_text(_tensors(directory), config.tied)
  _check_tensors(directory, tensors, leaves)
  shardings = _shardings(sharding, leaves)
  params = {}
  for leaf in leaves:
    parts = [tensors[name] for name in leaf.names]
    params[leaf.path] = _array(leaf, parts, param_dtype, shardings[leaf.path])
  config = dataclasses.replace(config, param_dtype=params["embedding"].dtype)
  return Pretrained(config, decoder(config, head=head, features=features), (nest_names(params), {}))


def save_pretrained(
  directory: str | pathlib.Path,
  config: DecoderConfig,
  params: PyTree,
  *,
  like: str | pathlib.Path | None = None,
  shard_bytes: int = 5_000_000_000,
) -> None:
  """Write a language model as `load_pretrained` and Hugging Face's transformers read it.

  Args:
    directory: made if it does not exist. config.json comes last: without it the directory is not whole.
    config: of the model.
    params: of it, in the dtypes that they shall have there. Low-rank additions are merged first (`merge_low_rank`).
    like: directory of a checkpoint with the same vocabulary, whose tokenizer files are copied and whose config.json
      fills in what a `DecoderConfig` does not hold, such as the numbers of special tokens.
    shard_bytes: how large a file becomes at most; each is held in memory while it is written.

  Raises:
    ValueError: if no family has such a model, the params are not of this config, or the directory holds a model.
  """
  directory = pathlib.Path(directory)
  entries = write_config(config)
  arrays = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  leaves = _leaves(config)
  _check_params(arrays, leaves)
  there = sorted(
    path.name for path in directory.glob("*") if path.name.startswith((_CONFIG, "model.safetensors", "model-"))
  )
  if there:
    raise ValueError(f"{directory} holds a model already ({', '.join(there[:_SHOWN])}); choose another directory")
  directory.mkdir(parents=True, exist_ok=True)
  rows = [(name, leaf, row) for leaf in leaves for row, name in enumerate(leaf.names)]
  files = _divided(rows, arrays, shard_bytes)
  for name, part in files.items():
    _write_file(directory / name, {tensor: _row(arrays[leaf.path], leaf, row) for tensor, leaf, row in part})
  if len(files) > 1:
    total = sum(leaf.nbytes for leaf in arrays.values())
    names = {tensor: name for name, part in files.items() for tensor, _, _ in part}
    write_atomically(directory / _INDEX, _json({"metadata": {"total_size": total}, "weight_map": names}))
  entries["torch_dtype"] = str(arrays["embedding"].dtype)
  if like is not None:
    _copy_others(pathlib.Path(like), directory)
    entries = _entries(pathlib.Path(like)) | entries
    entries = {name: value for name, value in entries.items() if name not in ("dtype", "rope_parameters")}
  write_atomically(directory / _CONFIG, _json(entries))


class _Leaf(NamedTuple):
  """An array of the params, and the tensors that are its rows, or the one that it is."""

  path: str
  shape: tuple[int, ...]
  names: tuple[str, ...]
  stacked: bool
  transposed: bool  # a projection, kept as [outputs, inputs] there

  @property
  def row(self) -> tuple[int, ...]:
    """The shape of a tensor."""
    shape = self.shape[1:] if self.stacked else self.shape
    return shape[::-1] if self.transposed else shape


class _Tensor(NamedTuple):
  """Where a tensor lies, and what it is."""

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  kind: str

  def read(self, index: Sequence[slice]) -> np.ndarray:
    """A part of it. The file is opened for this alone: a mapping that stays would keep what was read in memory."""
    with safe_open(self.file, "numpy") as file:
      return file.get_slice(self.name)[tuple(index)]


def _leaves(config: DecoderConfig) -> list[_Leaf]:
  example = {"tokens": jax.ShapeDtypeStruct((1, 1), jnp.int32)}
  params, _ = jax.eval_shape(decoder(config).init, jax.random.key(0), example)
  found = []
  for path, spec in jax.tree.leaves_with_path(params):
    path = name_of(path)
    stacked, template = path.startswith("layers/"), tensor_name(path, config)
    names = tuple(template.format(layer) for layer in range(config.depth)) if stacked else (template,)
    found.append(_Leaf(path, spec.shape, names, stacked, path.endswith("/kernel")))
  return found


def _array(leaf: _Leaf, parts: Sequence[_Tensor], dtype: Dtype | None, sharding: Sharding) -> jax.Array:
  """The array of a leaf; each device's part is read from the files once, whoever else holds the same."""
  dtype = jnp.dtype(dtype or functools.reduce(jnp.promote_types, [_DTYPES[part.kind] for part in parts]))
  seen: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

  def read(index: tuple[slice, ...] | None) -> np.ndarray:
    index = (slice(None),) * len(leaf.shape) if index is None else index
    bounds = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
    if bounds not in seen:
      rows = [slice(start, stop) for start, stop, _ in bounds]
      chosen = range(*bounds[0]) if leaf.stacked else range(1)
      inner = rows[1:] if leaf.stacked else rows
      block = np.empty((len(chosen), *(part.stop - part.start for part in inner)), dtype)
      for place, row in zip(block, chosen, strict=True):
        tensor = parts[row].read(inner[::-1] if leaf.transposed else inner)
        place[...] = tensor.T if leaf.transposed else tensor
      seen[bounds] = block if leaf.stacked else block[0]
    return seen[bounds]

  return jax.make_array_from_callback(leaf.shape, sharding, read)


def _shardings(sharding: Place | None, leaves: Iterable[_Leaf]) -> dict[str, Sharding]:
  shapes = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in leaves}
  if sharding is None:
    sharding = SingleDeviceSharding(jax.local_devices()[0])
  if isinstance(sharding, Sharding):
    return dict.fromkeys(shapes, sharding)
  tree = sharding(nest_names(shapes))
  found = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
  if found.keys() != shapes.keys() or not all(isinstance(leaf, Sharding) for leaf in found.values()):
    raise ValueError(f"sharding must return a sharding for each of {sorted(shapes)}; got {found}")
  return found


def _config(directory: pathlib.Path) -> DecoderConfig:
  try:
    return read_config(_entries(directory))
  except ValueError as error:
    error.add_note(f"in {directory / _CONFIG}")
    raise


def _entries(directory: pathlib.Path) -> dict[str, Any]:
  if not (directory / _CONFIG).is_file():
    there = "is no directory" if not directory.is_dir() else f"has no {_CONFIG}"
    raise ValueError(f"{directory} {there}; a checkpoint is a directory with {_CONFIG} and *.safetensors")
  try:
    entries = json.loads((directory / _CONFIG).read_text())
  except ValueError as error:
    raise ValueError(f"{directory / _CONFIG} is no JSON, or is damaged: {error}") from error
  if not isinstance(entries, dict):
    raise ValueError(f"{directory / _CONFIG} must hold entries by name, got {type(entries).__name__}")
  return entries


def _tensors(directory: pathlib.Path) -> dict[str, _Tensor]:
  """All tensors by name, as the headers of the files describe them."""
  found: dict[str, _Tensor] = {}
  for path in _files(directory):
    try:
      with safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no dict)
          part = file.get_slice(name)
          found[name] = _Tensor(path, name, tuple(part.get_shape()), str(part.get_dtype()))
    except (SafetensorError, OSError) as error:
      if not path.is_file():
        raise ValueError(
          f"{directory / _INDEX} names {path.name}, which is not there; get the whole checkpoint"
        ) from error
      raise ValueError(f"{path} is no safetensors file, or is cut short or damaged: {error}; get it again") from error
  return found


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  if (directory / _INDEX).is_file():
    try:
      names = set(json.loads((directory / _INDEX).read_text())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise ValueError(f"{directory / _INDEX} is no index of tensors, or is damaged: {error!r}") from error
    foreign = sorted(str(name) for name in names if pathlib.Path(str(name)).name != name)
    if foreign:
      raise ValueError(f"{directory / _INDEX} names files elsewhere: {foreign}; they must lie beside it")
    return [directory / name for name in sorted(names)]
  if (directory / _WHOLE).is_file():
    return [directory / _WHOLE]
  there = sorted(path.name for path in directory.iterdir())
  raise ValueError(
    f"{directory} has neither {_WHOLE} nor {_INDEX}, but {there}; kdflax reads no pickle, so save the weights of a .bin"
    " or .pth file as safetensors first"
  )


def _of_text(tensors: Mapping[str, _Tensor], tied: bool) -> dict[str, _Tensor]:
  """Tensors by what they are called in a model of text alone, without those that it computes or does not have."""
  prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in tensors), "model.")
  head = f"{_PREFIXES[prefix]}lm_head.weight"
  found = {}
  for name, tensor in tensors.items():
    if name.startswith(_IMAGES) or name.endswith("rotary_emb.inv_freq") or (tied and name == head):
      continue
    inner = "lm_head.weight" if name == head else name
    found["model." + name.removeprefix(prefix) if name.startswith(prefix) else inner] = tensor
  return found


def _check_tensors(directory: pathlib.Path, tensors: Mapping[str, _Tensor], leaves: Sequence[_Leaf]) -> None:
  expected = {name: leaf.row for leaf in leaves for name in leaf.names}
  both = [name for name in expected if name in tensors]
  problems = {
    "missing": [f"{name} {list(expected[name])}" for name in expected if name not in tensors],
    "left over": [f"{name} {list(tensors[name].shape)}" for name in tensors if name not in expected],
    "of another shape": [
      f"{name} is {list(tensors[name].shape)}, and the config says {list(expected[name])}"
      for name in both
      if tensors[name].shape != expected[name]
    ],
    "of a dtype that is not read": [
      f"{name} {tensors[name].kind}" for name in both if tensors[name].kind not in _DTYPES
    ],
  }
  _refuse(problems, f"{directory} does not fit its config; tensors")


def _check_params(arrays: Mapping[str, Any], leaves: Sequence[_Leaf]) -> None:
  expected = {leaf.path: leaf.shape for leaf in leaves}
  kinds = {name: str(jnp.dtype(array.dtype)) for name, array in arrays.items()}
  problems = {
    "missing": [name for name in expected if name not in arrays],
    "left over": [name for name in arrays if name not in expected],
    "of another shape": [
      f"{name} is {list(array.shape)}, and the config says {list(expected[name])}"
      for name, array in arrays.items()
      if name in expected and tuple(array.shape) != expected[name]
    ],
    "of a dtype that is not written": [
      f"{name} {kind}" for name, kind in kinds.items() if kind not in {str(np.dtype(kind)) for kind in _DTYPES.values()}
    ],
  }
  _refuse(problems, "the params are not of this config; those")


def _refuse(problems: Mapping[str, Sequence[str]], what: str) -> None:
  found = []
  for kind, names in problems.items():
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    found += [f"{kind}: {', '.join(names[:_SHOWN])}{more}"] if names else []
  if found:
    raise ValueError(f"{what} {'; '.join(found)}")


def _row(array: Any, leaf: _Leaf, row: int) -> np.ndarray:
  tensor = np.asarray(array[row] if leaf.stacked else array)
  return np.ascontiguousarray(tensor.T if leaf.transposed else tensor)


def _divided(
  rows: Sequence[tuple[str, _Leaf, int]], arrays: Mapping[str, Any], shard_bytes: int
) -> dict[str, list[tuple[str, _Leaf, int]]]:
  """The tensors by file, in the order of their names, none larger than it may be unless a tensor is."""
  parts: list[list[tuple[str, _Leaf, int]]] = [[]]
  size = 0
  for name, leaf, row in sorted(rows, key=lambda entry: entry[2]):
    own = arrays[leaf.path].nbytes // len(leaf.names)
    if parts[-1] and size + own > shard_bytes:
      parts.append([])
      size = 0
    parts[-1].append((name, leaf, row))
    size += own
  if len(parts) == 1:
    return {_WHOLE: parts[0]}
  return {f"model-{n:05}-of-{len(parts):05}.safetensors": part for n, part in enumerate(parts, 1)}


def _write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes a file whole or not at all, without a copy of it in memory."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  os.close(handle)
  try:
    save_file(tensors, temporary, {"format": "pt"})
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def _copy_others(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the tokenizer and what else belongs to a vocabulary."""
  for path in sorted(source.iterdir()):
    if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in _COPIED):
      shutil.copy(path, target / path.name)


def _json(entries: Mapping[str, Any]) -> str:
  return json.dumps(entries, indent=2) + "\n"
