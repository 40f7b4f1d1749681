"""The way of an Equinox module into `Model(init, apply)`. Equinox is imported when it is used, never before."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.extras import extra
from kdflax.model import Model, PyTree
from kdflax.models import boundary
from kdflax.numerics.trees import nest

Path = tuple[str, ...]
MakeModule = Callable[..., Any]  # (key) -> module or (module, state); (key, example) with an example


def from_equinox(
  make: MakeModule,
  *,
  input: str = "image",
  inputs: str | tuple[str, ...] = "batch",
  with_example: bool = False,
  batched: bool = False,
  axis_name: str = "batch",
) -> Model:
  """Turn an Equinox module into a `Model`.

  The module looks at one example, as Equinox's do, and is vmapped over the batch: `module(x, key=...)`, or
  `module(x, state, key=...)` if it has state (`eqx.nn.BatchNorm`, any `eqx.nn.StateIndex`), each keyword only where its
  `__call__` has it. Every example has a key of its own. In evaluation `eqx.nn.inference_mode` is set and there is no
  key; a mode flag among the arguments (`inference`, `train`, `training`, `deterministic`, ...) is given as well. The
  module returns outputs by name; a bare array becomes `{"logits": array}`, or `{"output": array}` for a connector.

  `params` are the floating arrays, `state` the other arrays and what the module keeps in `eqx.nn.State`, nested by
  their paths in the module. What is no array (functions, numbers) comes from an abstract build.

  BatchNorm takes its statistics over the whole batch: an example that a Term masks still counts there. A batch that
  says so itself, by an entry `where`, draws a warning in training.

  Args:
    make: `make(key) -> module`, or `(module, state)` as `eqx.nn.make_with_state` returns; with `with_example`,
      `make(key, example)`.
    input: the entry of the batch that a network reads.
    inputs: context path(s) for a connector; see `Model`.
    with_example: let `make` read input widths from `example`, a `jax.ShapeDtypeStruct` [batch, ...] (a tuple of them
      for a tuple of paths). The module must not depend on the batch size.
    batched: whether the module takes the whole batch at once.
    axis_name: of the batch, for `eqx.nn.BatchNorm(size, axis_name=...)`.

  Returns:
    The model. A parameter that does not fit the module raises ValueError with its path and both shapes.

  Raises:
    ImportError: without the package, which the extra `equinox` brings.
    ValueError: from `init` and `apply`, if the batch has no `input`, the module requires an argument of unknown name,
      or `train=True` needs a key and has none; from `apply`, if state moves in evaluation.

  Reference: Patrick Kidger and Cristian Garcia, "Equinox: neural networks in JAX via callable PyTrees and filtered
  transformations", 2021, arXiv 2111.00254.
  """
  with extra("equinox", "models.from_equinox"):
    import equinox as eqx

  def make_module(key: jax.Array, example: Any) -> tuple[Any, Any]:
    made = make(key, example) if with_example else make(key)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], eqx.nn.State)):
      made = eqx.nn.make_with_state(lambda: made)()
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, made)

  @functools.cache
  def build(treedef: Any, specs: tuple[Any, ...]) -> _Blueprint:
    example = jax.tree.unflatten(treedef, specs)
    return _blueprint(*eqx.filter_eval_shape(lambda key: make_module(key, example), jax.random.key(0)))

  def built_for(x: Any) -> _Blueprint:
    leaves, treedef = jax.tree.flatten(boundary.shapes(x) if with_example else None)
    return build(treedef, tuple(leaves))

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    x = boundary.pick(example, inputs, input)
    blueprint = built_for(x)
    made = jax.tree.leaves(make_module(boundary.typed(key), boundary.shapes(x)))
    leaves = dict(zip(blueprint.paths, made, strict=True))
    arrays = lambda specs: nest({path: jnp.asarray(leaves[path], spec.dtype) for path, spec in specs.items()})
    return arrays(blueprint.params), arrays(blueprint.state)

  def apply(
    params: PyTree, state: PyTree, batch: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    x = boundary.pick(batch, inputs, input)
    blueprint = built_for(x)
    if train and key is None and blueprint.drops:
      raise ValueError("apply(train=True) needs a key: the model has dropout or another source of randomness")
    boundary.warn_of_masked(batch, bool(blueprint.norms), train)
    flat = boundary.gather(blueprint.params, params, "params") | boundary.gather(blueprint.state, state, "state")
    module, kept = blueprint.rebuild(flat)
    call = functools.partial(_call, module if train else eqx.nn.inference_mode(module), blueprint, train)
    key = boundary.typed(key) if train and key is not None else None
    if batched:
      outputs, kept = call(x, kept, key)
    else:
      keys = None if key is None else jax.random.split(key, jax.tree.leaves(x)[0].shape[0])
      axes = (0, None, None if key is None else 0)
      outputs, kept = jax.vmap(call, axes, (0, None), axis_name=axis_name)(x, kept, keys)
    flat |= zip(blueprint.kept, jax.tree.leaves(kept), strict=True)
    return boundary.named(outputs, inputs), nest({path: flat[path] for path in blueprint.state})

  return Model(init, apply, inputs)


class _Blueprint(NamedTuple):
  """What is known of a module and its state without any array: the leaves by path, arrays as shapes."""

  treedef: Any
  paths: tuple[Path, ...]  # of all leaves
  leaves: tuple[Any, ...]
  kept: dict[Path, str]  # of what is in `eqx.nn.State`, and the index that it is kept under
  norms: tuple[str, ...]
  drops: bool
  signature: boundary.Signature

  @property
  def params(self) -> dict[Path, jax.ShapeDtypeStruct]:
    return {path: spec for path, spec in self._arrays() if self._learned(path, spec)}

  @property
  def state(self) -> dict[Path, jax.ShapeDtypeStruct]:
    return {path: spec for path, spec in self._arrays() if not self._learned(path, spec)}

  def rebuild(self, arrays: Mapping[Path, Any]) -> tuple[Any, Any]:
    """The module and its state with these arrays."""
    pairs = zip(self.paths, self.leaves, strict=True)
    return self.treedef.unflatten([arrays[path] if _is_array(leaf) else leaf for path, leaf in pairs])

  def _arrays(self) -> list[tuple[Path, Any]]:
    return [(path, leaf) for path, leaf in zip(self.paths, self.leaves, strict=True) if _is_array(leaf)]

  def _learned(self, path: Path, spec: Any) -> bool:
    return path not in self.kept and jnp.issubdtype(spec.dtype, jnp.inexact)


def _blueprint(module: Any, state: Any) -> _Blueprint:
  with extra("equinox", "models.from_equinox"):
    import equinox as eqx

  nodes = lambda kind: jax.tree.leaves_with_path(module, is_leaf=lambda node: isinstance(node, kind))
  found = lambda kind: [(path, node) for path, node in nodes(kind) if isinstance(node, kind)]
  kept = {
    _parts((*path, *inner)): _dotted(path)
    for path, index in found(eqx.nn.StateIndex)
    for inner, _ in jax.tree.leaves_with_path(state.get(index))
  }
  own, treedef = jax.tree.leaves_with_path(module), jax.tree.structure((module, state))
  signature = boundary.signature_of(type(module).__call__, given=("state", "key"))
  return _Blueprint(
    treedef,
    (*(_parts(path) for path, _ in own), *kept),
    tuple(jax.tree.leaves((module, state))),
    kept,
    norms=tuple(_dotted(path) for path, _ in found(eqx.nn.BatchNorm)),
    drops=any(not node.inference and not _is_zero(node.p) for _, node in found(eqx.nn.Dropout)),
    signature=signature._replace(flags=_without_aliases(signature.flags)),
  )


def _call(
  module: Any, blueprint: _Blueprint, train: bool, x: Any, state: Any, key: jax.Array | None
) -> tuple[Any, Any]:
  """The outputs and the state after; a module without state is called without."""
  given = {"key": key} if "key" in blueprint.signature.names else {}
  given |= boundary.mode(blueprint.signature.flags, train)
  if not blueprint.kept:
    return module(x, **given), state
  before = jax.tree.leaves(state)
  outputs, state = module(x, state, **given)
  pairs = zip(blueprint.kept.values(), before, jax.tree.leaves(state), strict=True)
  moved = dict.fromkeys(index for index, old, new in pairs if new is not old)
  if not train:
    boundary.check_evaluates(moved)
  elif not moved and not blueprint.signature.flags:
    boundary.check_trains(blueprint.norms, blueprint.signature.unknown)
  return outputs, state


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, jax.ShapeDtypeStruct)


def _is_zero(rate: Any) -> bool:
  return isinstance(rate, int | float) and rate == 0


def _without_aliases(flags: Sequence[str]) -> tuple[str, ...]:
  """Equinox's own layers take `deterministic` as an old name of `inference`, and complain."""
  return tuple(flag for flag in flags if flag != "deterministic" or "inference" not in flags)


def _dotted(path: Sequence[Any]) -> str:
  return ".".join(_parts(path)) or "the module itself"


def _parts(path: Sequence[Any]) -> Path:
  return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
