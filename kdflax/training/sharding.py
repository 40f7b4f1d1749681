"""Layouts: what of a training lies on which device of a mesh, by rules about names and sizes.

A layout says it once: for params, what follows them (optimizer, balancer, averages), the states of models, frozen
models and batches. XLA's partitioner makes of it the program for each device; nothing here moves a byte.
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdflax.model import PyTree, Variables
from kdflax.numerics.trees import name_of
from kdflax.training.state import TrainState

Axes = str | tuple[str, ...]


class Split(NamedTuple):
  """Cuts an array into equal parts, one for each index of a mesh axis.

  Attributes:
    axis: of the mesh, or several.
    dim: which axis of the array is cut, -1 for the last; by default the longest that the mesh axis divides.
    at_least: arrays of fewer elements stay whole: what they would save costs more messages.
  """

  axis: Axes
  dim: int | None = None
  at_least: int = 2**12


Rule = tuple[str, Split | P]


def fsdp(axis: Axes = "data", *, at_least: int = 2**12) -> Rule:
  """The rule that cuts every large array over the axis that batches are spread over (fully sharded data parallel).

  A device holds its part of params, gradients and optimizer state, and sees a whole kernel only while it is used.

  Args:
    axis: of the mesh.
    at_least: arrays of fewer elements stay whole.

  Reference: Samyam Rajbhandari, Jeff Rasley, Olatunji Ruwase and Yuxiong He, "ZeRO: Memory Optimizations Toward
  Training Trillion Parameter Models", 2020, arXiv 1910.02054. Stage 3, left to XLA's partitioner.
  """
  return "", Split(axis, None, at_least)


def tensor_parallel(axis: Axes = "model", pattern: str = "", *, at_least: int = 2**12) -> Rule:
  """The rule that cuts the last axis of arrays, the outputs of a kernel, over an axis of the mesh.

  A kernel is then never whole anywhere; what travels are the activations.

  Args:
    axis: of the mesh.
    pattern: regular expression searched in names; all by default.
    at_least: arrays of fewer elements stay whole.

  Reference: Mohammad Shoeybi, Mostofa Patwary, Raul Puri, Patrick LeGresley, Jared Casper and Bryan Catanzaro,
  "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019, arXiv 1909.08053. Every
  kernel is cut by its outputs; theirs cuts every second one by its inputs, which a rule with a PartitionSpec says.
  """
  return pattern, Split(axis, -1, at_least)


@dataclasses.dataclass(frozen=True)
class Layout:
  """What is sharded how over a mesh.

      mesh = training.make_mesh({"data": 4, "model": 2})
      layout = training.Layout(mesh, [("student/head/kernel", P(None, "model")), training.fsdp("data")])

  A rule is a regular expression, searched in names such as `student/head/kernel`, and what happens to the arrays that
  it finds. Every `Split` that matches cuts what the rules before it left whole, so `tensor_parallel` and `fsdp` add up;
  a `PartitionSpec` is the last word on an array, `P()` for whole. What no rule cuts is whole on every device.

  The rules speak of params and of the states of models (the memory of `methods.crd`, say, by `("crd/", Split("data",
  0))`). States of the optimizer and the balancer, and averages, lie where their params do, a leading axis of tasks
  being whole.

  Attributes:
    mesh: of `make_mesh`.
    rules: of what is trained, by default all whole.
    frozen: rules of their own for frozen models; by default the same.
    batch: mesh axes that the examples of a batch are spread over.
    leading: how many leading axes of each array count trainings (seeds under `vmap`); rules do not see them.

  Raises:
    ValueError: if an axis is not one of the mesh; when it is applied, if a rule finds nothing, or a PartitionSpec does
      not fit an array.
  """

  mesh: Mesh
  rules: Sequence[Rule] = ()
  frozen: Sequence[Rule] | None = None
  batch: Axes = "data"
  leading: int = 0

  def __post_init__(self) -> None:
    named: dict[str, Sequence[str]] = {"batch": _names(self.batch)}
    for pattern, how in (*self.rules, *(self.frozen or ())):
      named[f"rule {pattern!r}"] = [n for part in ([how.axis] if isinstance(how, Split) else how) for n in _names(part)]
    for where, axes in named.items():
      unknown = [axis for axis in axes if axis not in self.mesh.shape]
      if unknown:
        raise ValueError(f"{where} names the axes {unknown}; the mesh has {dict(self.mesh.shape)}")

  def of_state(self, state: TrainState, follows: Mapping[str, str] | None = None) -> TrainState:
    """The shardings of a training state.

    Args:
      state: of arrays or `jax.ShapeDtypeStruct`.
      follows: by the name of an average, the model whose params it follows: `learner.follows`.

    Returns:
      The same tree of `NamedSharding`.
    """
    _check_rules("rules", self.rules, {"params": state.params, "the states of models": state.model_state})
    sources = follows or {}
    known = {
      path: (leaf.shape[self.leading :], self._spec(self.rules, path, leaf))
      for path, leaf in jax.tree.leaves_with_path(state.params)
    }

    def follow(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
      """As the params whose path this one ends with, if it has their shape."""
      own = leaf.shape[self.leading :]
      for start in range(len(path)):
        shape, spec = known.get(path[start:], (None, P()))
        if shape is not None and own[len(own) - len(shape) :] == shape:
          return self._whole_before(spec, len(own) - len(shape))
        if shape is not None:
          return self._whole_before(self._spec(self.rules, path[start:], leaf, strict=False), 0)
      return self._whole_before(P(), 0)

    def follow_source(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
      source = sources.get(path[0].key, path[0].key)
      return follow((jax.tree_util.DictKey(source), *path[1:]), leaf)

    whole = lambda tree: jax.tree.map(lambda _: self._whole_before(P(), 0), tree)
    return TrainState(
      step=whole(state.step),
      params=self._by_rules(self.rules, state.params),
      model_state=self._by_rules(self.rules, state.model_state),
      opt_state=jax.tree.map_with_path(follow, state.opt_state),
      balancer_state=jax.tree.map_with_path(follow, state.balancer_state),
      averages=jax.tree.map_with_path(follow_source, state.averages),
      key=whole(state.key),
    )

  def of_frozen(self, frozen: Variables) -> Variables:
    """The shardings of frozen (params, state) by model name, as `of_state`."""
    if self.frozen is None:
      return {name: (self._variables(self.rules, name, parts)) for name, parts in frozen.items()}
    _check_rules(
      "frozen", self.frozen, {"the frozen models": {n: part for n, parts in frozen.items() for part in parts}}
    )
    return {name: (self._variables(self.frozen, name, parts)) for name, parts in frozen.items()}

  def of_batch(self, batch: PyTree) -> PyTree:
    """The shardings of a batch: the first axis of every array over `batch`, where that divides it, else whole."""
    spec = _batch_spec(self)
    size = math.prod(self.mesh.shape[axis] for axis in _names(self.batch))
    splits = lambda leaf: np.ndim(leaf) > 0 and np.shape(leaf)[0] % size == 0
    return jax.tree.map(lambda leaf: NamedSharding(self.mesh, spec if splits(leaf) else P()), batch)

  def _variables(self, rules: Sequence[Rule], name: str, variables: Any) -> Any:
    params, state = variables
    return self._by_rules(rules, {name: params})[name], self._by_rules(rules, {name: state})[name]

  def _by_rules(self, rules: Sequence[Rule], tree: PyTree) -> PyTree:
    return jax.tree.map_with_path(lambda path, leaf: self._whole_before(self._spec(rules, path, leaf), 0), tree)

  def _whole_before(self, spec: P, axes: int) -> NamedSharding:
    """A sharding whose first axes, and those that count trainings, are whole."""
    entries = [*[None] * (self.leading + axes), *spec]
    while entries and entries[-1] is None:  # the one spelling that JAX gives results in, so that a step fits its own
      entries.pop()
    return NamedSharding(self.mesh, P(*entries))

  def _spec(self, rules: Sequence[Rule], path: tuple[Any, ...], leaf: Any, *, strict: bool = True) -> P:
    """How rules cut an array, of whose axes those that count trainings are not looked at."""
    name, shape = name_of(path, "/"), np.shape(leaf)[self.leading :]
    cut: list[Any] = [None] * len(shape)
    for pattern, how in rules:
      if not re.search(pattern, name):
        continue
      if not isinstance(how, Split):
        if strict:
          _check_fits(name, shape, how, self.mesh)
        return how if strict or _fits(shape, how, self.mesh) else P()
      size = math.prod(self.mesh.shape[axis] for axis in _names(how.axis))
      taken = {axis for entry in cut for axis in _names(entry)}
      if size == 1 or math.prod(shape) < how.at_least or taken & set(_names(how.axis)):
        continue
      dims = range(len(shape)) if how.dim is None else [d for d in (how.dim,) if -len(shape) <= d < len(shape)]
      free = [dim for dim in dims if cut[dim] is None and shape[dim] and shape[dim] % size == 0]
      if free:
        cut[max(free, key=lambda dim: shape[dim])] = how.axis
    return P(*cut)


def place_batch(batch: Any, mesh: Mesh | Layout, axis: str = "data") -> Any:
  """Puts a batch on a mesh, its examples spread over the devices.

  Args:
    batch: arrays `[examples, ...]`.
    mesh: a layout, or a mesh and the axis to spread over. A batch that does not divide by the devices is refused by a
      mesh; under a layout, which is known to the step, it is copied to all of them, and the step spreads its work.
    axis: of the mesh.

  Raises:
    ValueError: if the batch size is not a multiple of the axis of a mesh.
  """
  if isinstance(mesh, Layout):
    return jax.device_put(batch, mesh.of_batch(batch))
  size = mesh.shape[axis]
  for path, leaf in jax.tree.leaves_with_path(batch):
    if np.ndim(leaf) == 0 or len(leaf) % size:
      raise ValueError(
        f"batch{jax.tree_util.keystr(path)} of shape {np.shape(leaf)} does not split over {size} devices"
      )
  return jax.device_put(batch, NamedSharding(mesh, P(axis)))


def place_frozen(frozen: Variables, layout: Layout) -> Variables:
  """Puts frozen (params, state) where a layout wants them, part by part."""
  return jax.device_put(frozen, layout.of_frozen(frozen))


_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def laid_out(layout: Layout | None) -> Iterator[None]:
  """While a step is traced, tells it of the layout: a batch it draws and gradients it makes are pinned to it.

  As with JAX's own mesh in use, so that it reaches through `vmap` and `scan`, which take arrays only.
  """
  token = _LAYOUT.set(layout)
  try:
    yield
  finally:
    _LAYOUT.reset(token)


def pin_state(state: TrainState, layout: Layout, follows: Mapping[str, str] | None) -> TrainState:
  """In a program: the state as the layout wants it."""
  return jax.lax.with_sharding_constraint(state, layout.of_state(state, follows))


def pin_batch(batch: PyTree) -> PyTree:
  """In a step: a batch spread over the devices, evenly or not."""
  layout = _LAYOUT.get()
  if layout is None:
    return batch
  sharding = NamedSharding(layout.mesh, _batch_spec(layout))
  pin = lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding) if np.ndim(leaf) else leaf
  return jax.tree.map(pin, batch)


def pin_gradient(gradient: PyTree) -> PyTree:
  """In a step: a gradient, by model name, that lies where its params do and is never whole."""
  layout = _LAYOUT.get()
  if layout is None:
    return gradient
  inner = dataclasses.replace(layout, leading=0)
  sharding = lambda path, leaf: inner._whole_before(inner._spec(layout.rules, path, leaf), 0)
  return jax.lax.with_sharding_constraint(gradient, jax.tree.map_with_path(sharding, gradient))


def _batch_spec(layout: Layout) -> P:
  axes = tuple(axis for axis in _names(layout.batch) if layout.mesh.shape[axis] > 1)
  return P(axes[0] if len(axes) == 1 else axes) if axes else P()


def _names(axes: Axes | None) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _check_rules(argument: str, rules: Sequence[Rule], trees: Mapping[str, PyTree]) -> None:
  """Refuses a rule that finds nothing: a name that is misspelt would leave everything whole, silently."""
  names = [name_of(path, "/") for tree in trees.values() for path, _ in jax.tree.leaves_with_path(tree)]
  for pattern, _ in rules:
    if names and not any(re.search(pattern, name) for name in names):
      raise ValueError(f"{argument}: {pattern!r} finds nothing in {' and '.join(trees)}: {names}")


def _check_fits(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
  if not _fits(shape, spec, mesh):
    raise ValueError(
      f"{name} of shape {list(shape)} cannot be cut by {spec} over the mesh {dict(mesh.shape)}; every axis that is cut"
      " must be a multiple of the devices"
    )


def _fits(shape: tuple[int, ...], spec: P, mesh: Mesh) -> bool:
  sizes = [math.prod(mesh.shape[axis] for axis in _names(entry)) for entry in spec]
  return len(sizes) <= len(shape) and all(shape[dim] % size == 0 for dim, size in enumerate(sizes))
