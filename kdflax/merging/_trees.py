"""What every way of merging does with its trees: check that they are alike, widen the leaves, put them back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdflax.numerics.trees import PyTree, name_of


class Aligned(NamedTuple):
  """The leaves of trees that are alike: for each leaf its name and its version in every tree, float32 or wider."""

  names: list[str]
  versions: list[list[jax.Array]]
  treedef: Any
  dtypes: list[Any]

  def rebuild(self, leaves: Sequence[jax.Array]) -> PyTree:
    """A tree of the structure and the dtypes of the first."""
    return self.treedef.unflatten([leaf.astype(dtype) for leaf, dtype in zip(leaves, self.dtypes, strict=True)])


def align(trees: Mapping[str, PyTree]) -> Aligned:
  """Returns the leaves of several trees beside each other.

  Args:
    trees: pytrees of floating arrays by the name that a message gives them; the first sets structure and dtypes.

  Raises:
    ValueError: if the trees differ in structure or shape, or a leaf is not floating.
  """
  names = check_alike(trees)
  flat = [[jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in trees.values()]
  versions = [list(leaves) for leaves in zip(*flat, strict=True)]
  for name, leaves in zip(names, versions, strict=True):
    for where, leaf in zip(trees, leaves, strict=True):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"leaf {name!r} of {where} is {leaf.dtype}; only floating arrays merge: leave the others out")
  wide = [_widened(leaves) for leaves in versions]
  treedef = jax.tree.structure(next(iter(trees.values())))
  return Aligned(names, wide, treedef, [leaves[0].dtype for leaves in versions])


def check_alike(trees: Mapping[str, PyTree]) -> list[str]:
  """Returns the names of the leaves, or raises a ValueError if trees differ in structure or shape."""
  (first, tree), *others = trees.items()
  named = _by_name(tree)
  for other, other_tree in others:
    _check_pair(first, tree, named, other, other_tree)
  return list(named)


def several(name: str, trees: Sequence[PyTree]) -> dict[str, PyTree]:
  """The trees of a sequence argument by the names `tuned[0]`, `tuned[1]`, ..."""
  if isinstance(trees, Mapping | str) or not isinstance(trees, Sequence):
    kind = f"a mapping of {sorted(map(str, trees))}" if isinstance(trees, Mapping) else type(trees).__name__
    raise ValueError(f"{name} must be a sequence of pytrees, one for each model; got {kind}")
  if not trees:
    raise ValueError(f"{name} must hold at least one pytree; got none")
  return {f"{name}[{index}]": tree for index, tree in enumerate(trees)}


def per_model(name: str, values: Any, count: int) -> jax.Array:
  """A number, or one for each model, as an array `[count]`."""
  values = jnp.asarray(values)
  if values.shape not in ((), (count,)):
    raise ValueError(f"{name} must be a number or one for each of {count} models; got shape {values.shape}")
  return jnp.broadcast_to(values, (count,))


def _by_name(tree: PyTree) -> dict[str, Any]:
  return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _check_pair(first: str, tree: PyTree, named: Mapping[str, Any], other: str, other_tree: PyTree) -> None:
  theirs = _by_name(other_tree)
  alone = [(name, first) for name in named if name not in theirs] + [(n, other) for n in theirs if n not in named]
  if alone:
    name, where = alone[0]
    raise ValueError(
      f"{first} and {other} differ in structure: leaf {name!r} is only in {where} ({len(alone)} such leaves); merge "
      "models of one architecture"
    )
  for name, leaf in named.items():
    if jnp.shape(leaf) != jnp.shape(theirs[name]):
      raise ValueError(
        f"leaf {name!r} has shape {jnp.shape(leaf)} in {first} and {jnp.shape(theirs[name])} in {other}; merge models "
        "of one architecture"
      )
  structures = jax.tree.structure(tree), jax.tree.structure(other_tree)
  if structures[0] != structures[1]:
    raise ValueError(f"{first} and {other} hold their leaves in other containers: {structures[0]} and {structures[1]}")


def _widened(leaves: Sequence[jax.Array]) -> list[jax.Array]:
  dtype = jnp.result_type(jnp.float32, *leaves)
  return [leaf.astype(dtype) for leaf in leaves]
