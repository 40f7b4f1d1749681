"""Trees of arrays: names of leaves, nesting, and the split into what a pattern matches and the rest."""

import re
from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any


def name_of(path: tuple[Any, ...], separator: str = "/") -> str:
  """Returns the name of a leaf from its path, such as `student/head/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator=separator)


def nest(leaves: Mapping[tuple[Any, ...], Any]) -> dict[str, Any]:
  """Turns `{("block", 0, "kernel"): leaf}` into nested dicts with string keys, which every file format keeps."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = map(str, path)
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def nest_names(leaves: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
  """Turns `{"block/0/kernel": leaf}` into nested dicts."""
  return nest({tuple(name.split(separator)): leaf for name, leaf in leaves.items()})


def partition(tree: PyTree, pattern: str | None, *, name: str = "pattern") -> tuple[PyTree, PyTree]:
  """Splits a tree into the leaves whose name a pattern matches and the others.

  Args:
    tree: any pytree of arrays.
    pattern: regular expression searched in names such as `student/encoder/kernel`; None matches all.
    name: of the argument that the pattern comes from, for the message.

  Returns:
    Two trees of the structure of the first, with None for the leaves of the other.

  Raises:
    ValueError: if the pattern matches none of the leaves.
  """
  matches = lambda path: pattern is None or re.search(pattern, name_of(path))
  matched = jax.tree.map_with_path(lambda path, leaf: leaf if matches(path) else None, tree)
  others = jax.tree.map_with_path(lambda path, leaf: None if matches(path) else leaf, tree)
  if tree and not jax.tree.leaves(matched):
    raise ValueError(f"{name}={pattern!r} matches none of {[name_of(p) for p, _ in jax.tree.leaves_with_path(tree)]}")
  return matched, others


def merge(first: PyTree, second: PyTree) -> PyTree:
  """Puts together again what `partition` has split."""
  return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)
