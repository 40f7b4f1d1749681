"""Weights that another library trained, brought into a model: names by regular expressions, every tensor accounted for.

A safetensors file holds arrays and no code; a file that could run code when it is read, such as a pickle of PyTorch, is
refused.
"""

import collections
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize

from kdflax.files import array_of
from kdflax.model import PyTree
from kdflax.numerics.trees import name_of

Problems = dict[str, list[str]]  # names by what is wrong with them
Placed = dict[str, tuple[str, np.ndarray]]  # by path: the name of a tensor, and what became of it

_SHOWN = 5  # names of one kind in a message


class Rule(NamedTuple):
  r"""Where the tensors go whose whole name a pattern matches, and what is done to them on the way.

  `Rule(r"layer\.(\d+)\.dense\.weight", r"params/layers/\1/dense/kernel", axes=(1, 0))` brings the weight of a linear
  layer, which PyTorch keeps as [outputs, inputs].
  """

  pattern: str
  """Regular expression that matches the whole name of a tensor; of several rules that match, the first counts."""
  path: str | tuple[str, ...] | None
  r"""Path of the leaf, from `params/` or `state/` on, with the groups of the pattern as `\1`. Several paths take equal
  parts of the tensor, cut along its last axis after the transposition (queries, keys and values in one). None leaves
  the tensor out."""
  axes: tuple[int, ...] | None = None
  """The transposition, as `numpy.transpose` takes it; None keeps the order."""
  shape: tuple[int, ...] | None = None
  """The shape after the transposition (and the cut), as `numpy.reshape` takes it; None keeps it."""


def import_variables(
  file: str | pathlib.Path | Sequence[str | pathlib.Path],
  rules: Iterable[Rule],
  *,
  like: tuple[PyTree, PyTree],
  sha256: str | Sequence[str] | None = None,
) -> tuple[PyTree, PyTree]:
  r"""Read weights that another library saved as safetensors into the params and the state of a model.

  Nothing is guessed and nothing is left over: every tensor of the file meets a rule, every leaf of the model is filled
  by exactly one tensor, and shapes agree after the transposition. All that does not is named in one message.

  Args:
    file: the safetensors file, or all parts of one that was saved in parts.
    rules: where each tensor goes; see `Rule`.
    like: (params, state) of the model, or their shapes: `jax.eval_shape(model.init, key, example)` needs no memory.
    sha256: of the whole file, or one for each, where another file must not be taken for it.

  Returns:
    (params, state), nested dicts of NumPy arrays with the dtypes of `like`. Floats are cast, integers only if no value
    changes.

  Raises:
    ValueError: if a file is not safetensors, is damaged or is not the one that `sha256` names; a rule is no regular
      expression; tensors without a rule, leaves without a tensor or with two, wrong shapes or kinds of numbers.
    OSError: if a file cannot be read.

  Examples:
    >>> import os, tempfile
    >>> from safetensors.numpy import save_file
    >>> like = {"head": {"kernel": np.zeros((3, 2), np.float32)}}, {}
    >>> rules = [Rule(r"(\w+)\.weight", r"params/\1/kernel", axes=(1, 0)), Rule(r".*\.steps", None)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = os.path.join(folder, "model.safetensors")
    ...   save_file({"head.weight": np.ones((2, 3), np.float32), "head.steps": np.zeros(1)}, file)
    ...   params, state = import_variables(file, rules, like=like)
    >>> params["head"]["kernel"].shape
    (3, 2)
  """
  files = [file] if isinstance(file, str | pathlib.Path) else list(file)
  digests = [sha256] * len(files) if sha256 is None or isinstance(sha256, str) else list(sha256)
  if len(digests) != len(files) or (isinstance(sha256, str) and len(files) > 1):
    raise ValueError(f"sha256 must name each of the {len(files)} files; got {sha256!r}")
  patterns = [(_compiled(rule), rule) for rule in rules]
  tensors = {name: x for path, wanted in zip(files, digests, strict=True) for name, x in _read(path, wanted).items()}
  leaves = _named("params", like[0]) | _named("state", like[1])
  problems: Problems = collections.defaultdict(list)
  placed = _place(tensors, patterns, leaves, problems)
  _check(placed, leaves, problems)
  if problems:
    raise ValueError(f"{', '.join(map(str, files))} does not fit the model: {_listed(problems)}")
  cast = {path: np.asarray(part, leaves[path].dtype) for path, (_, part) in placed.items()}
  take = lambda name, tree: jax.tree.map_with_path(lambda path, _: cast[f"{name}/{name_of(path)}"], tree)
  return take("params", like[0]), take("state", like[1])


def _place(
  tensors: Mapping[str, np.ndarray],
  patterns: Sequence[tuple[re.Pattern[str], Rule]],
  leaves: Mapping[str, Any],
  problems: Problems,
) -> Placed:
  """Applies to each tensor the first rule that matches its name."""
  placed: Placed = {}
  for name, tensor in sorted(tensors.items()):
    found = next(((match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(name))), None)
    if found is None:
      problems["tensors that no rule names"].append(f"{name} {list(tensor.shape)}")
      continue
    match, rule = found
    try:
      parts = _applied(rule, match, tensor)
    except (ValueError, IndexError, re.error) as error:
      problems["rules that do not fit their tensor"].append(f"{name} {list(tensor.shape)}: {error}")
      continue
    for path, part in parts.items():
      if path not in leaves:
        problems["paths that the model does not have"].append(f"{path} (of {name})")
      elif path in placed:
        problems["paths with two tensors"].append(f"{path} (of {placed[path][0]} and {name})")
      else:
        placed[path] = name, part
  return placed


def _check(placed: Placed, leaves: Mapping[str, Any], problems: Problems) -> None:
  """Asks that every leaf has its tensor, of its shape and of its kind of numbers."""
  for path, spec in leaves.items():
    if path not in placed:
      problems["paths without a tensor"].append(f"{path} {list(spec.shape)}")
      continue
    name, part = placed[path]
    if part.shape != tuple(spec.shape):
      problems["wrong shapes"].append(f"{path} is {list(spec.shape)}, {name} gives {list(part.shape)}")
    elif not _fits(part, spec.dtype):
      problems["wrong kinds of numbers"].append(f"{path} is {spec.dtype}, {name} is {part.dtype}")


def _compiled(rule: Rule) -> re.Pattern[str]:
  try:
    return re.compile(rule.pattern)
  except re.error as error:
    raise ValueError(f"rules: {rule.pattern!r} is no regular expression: {error}") from error


def _read(path: str | pathlib.Path, sha256: str | None) -> dict[str, np.ndarray]:
  """The tensors of a file by name."""
  content = pathlib.Path(path).read_bytes()
  if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256.lower():
    raise ValueError(f"{path} is not the file that is asked for: its SHA-256 is {found}, not {sha256}; get it again")
  try:
    return {name: array_of(stored) for name, stored in deserialize(content)}
  except (SafetensorError, LookupError, ValueError, TypeError) as error:
    raise ValueError(
      f"{path} is no safetensors file, or is damaged: {error}; kdflax reads no pickle, so save the weights of a .bin or"
      " .pt file by safetensors.torch.save_file first"
    ) from error


def _applied(rule: Rule, match: re.Match[str], tensor: np.ndarray) -> dict[str, np.ndarray]:
  """What a rule makes of a tensor, by path."""
  if rule.path is None:
    return {}
  if rule.axes is not None:
    tensor = tensor.transpose(rule.axes)
  if isinstance(rule.path, str):
    parts = {match.expand(rule.path): tensor}
  else:
    cut = np.split(tensor, len(rule.path), axis=-1)
    parts = {match.expand(path): part for path, part in zip(rule.path, cut, strict=True)}
  return parts if rule.shape is None else {path: part.reshape(rule.shape) for path, part in parts.items()}


def _named(name: str, tree: PyTree) -> dict[str, Any]:
  """The leaves by path, from the name on."""
  return {f"{name}/{name_of(path)}": leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _fits(tensor: np.ndarray, dtype: Any) -> bool:
  """Whether a cast is one of floats, or changes no value."""
  if jnp.issubdtype(tensor.dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.floating):
    return jnp.issubdtype(tensor.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
  return bool((tensor.astype(dtype) == tensor).all())


def _listed(problems: Mapping[str, Sequence[str]]) -> str:
  """All kinds of problems, the first few of each."""
  parts = []
  for kind, names in problems.items():
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    parts.append(f"{kind}: {', '.join(names[:_SHOWN])}{more}")
  return "; ".join(parts)
