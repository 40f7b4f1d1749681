"""Models made of models: name the parts, say how data flows, and get one `Model`."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kdflax.model import Model, Outputs, PyTree, named_key, read
from kdflax.models.boundary import shapes
from kdflax.numerics.trees import name_of


class Run(Protocol):
  """`(path, model, source) -> outputs`: runs a part of a composed model."""

  def __call__(self, path: str, model: Model, source: Mapping[str, Any], /) -> Any: ...


class Forward(Protocol):
  """`(run, batch) -> outputs`: how data flows between the parts of a composed model."""

  def __call__(self, run: Run, batch: Any, /) -> Outputs: ...


def compose(forward: Forward) -> Model:
  """Build a model from a function that runs other models.

  `forward(run, batch) -> outputs` calls `run(path, model, source)` for every part. `path` is where the parameters and
  the state of the part lie (`"task/left/head"`), and gives the part its own randomness; `source`, a batch or the
  outputs of an earlier part, is where the part finds its inputs: by name (`mlp(input="embedding")`,
  `convnet(input="features.stage1")`) or by context path (`linear_connector("features.stage1", 8)`).

  The parts are found by tracing `forward` without arrays, so they may depend on shapes, not on values.

  Args:
    forward: as above; pure, and the same paths at every call.

  Returns:
    A model whose params and state are nested by the segments of the paths.

  Raises:
    ValueError: from `init`, if two parts have one path; from `init` and `apply`, if an input does not exist.
  """

  def init(key: jax.Array, batch: Any) -> tuple[PyTree, PyTree]:
    parts: dict[str, tuple[Model, Any]] = {}

    def trace(path: str, model: Model, source: Mapping[str, Any]) -> Any:
      if path in parts:
        raise ValueError(f"two parts of a model are called {path!r}; give each its own path")
      x = _view(source, model)
      parts[path] = model, shapes(x)
      return model.apply(*model.init(key, x), x, train=False, key=None)[0]

    jax.eval_shape(lambda batch: forward(trace, batch), batch)
    params: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for path, (model, example) in parts.items():
      own_params, own_state = model.init(named_key(key, path), example)
      _place(params, path, own_params)
      _place(state, path, own_state)
    return params, state

  def apply(
    params: PyTree, state: PyTree, batch: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    after: dict[str, Any] = {}

    def run(path: str, model: Model, source: Mapping[str, Any]) -> Any:
      own_key = None if key is None else named_key(key, path)
      x = _view(source, model)
      outputs, own_state = model.apply(_at(params, path), _at(state, path), x, train=train, key=own_key)
      _place(after, path, own_state)
      return outputs

    return forward(run, batch), after

  return Model(init, apply)


def starting_from(model: Model, variables: tuple[PyTree, PyTree]) -> Model:
  """Give a model the params that its training starts from, as those of a checkpoint.

      student = models.starting_from(read.model, read.variables)

  A learner copies them, so they are there after its steps as well. Initialise outside of `jit`, which would compile
  them into its program.

  Args:
    model: any model.
    variables: its (params, state), whose dtypes may be others than those of its `init`.

  Returns:
    The model, whose `init` returns these whatever the key.

  Raises:
    ValueError: from `init`, if the variables are not of the structure and the shapes that the model itself makes.
  """

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    named = lambda tree: {name_of(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
    parts = dict(zip(("params", "state"), jax.eval_shape(model.init, key, example), strict=True))
    expected, given = named(parts), named(dict(zip(parts, variables, strict=True)))
    differing = [name for name in sorted(expected | given) if expected.get(name) != given.get(name)]
    if differing:
      pairs = [f"{name} is {given.get(name)}, the model makes {expected.get(name)}" for name in differing[:5]]
      raise ValueError(f"variables do not fit the model in {len(differing)} places: {'; '.join(pairs)}")
    return variables

  return model._replace(init=init)


def stacked(model: Model, copies: int, *, own_inputs: bool = False) -> Model:
  """Build several copies of a model, their parameters stacked, that one vmapped call runs all at once.

  Args:
    model: what is copied. Copies start from different keys.
    copies: how many.
    own_inputs: whether every copy has an input of its own, along a leading axis of the input; else all read the same.

  Returns:
    A model whose params, state and outputs have a leading axis of length `copies`. `unstack` takes them apart.

  Raises:
    ValueError: if `copies` is below 1.
  """
  if copies < 1:
    raise ValueError(f"copies must be at least 1, got {copies}")

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    spec = lambda x: jax.ShapeDtypeStruct(x.shape[1:] if own_inputs else x.shape, x.dtype)
    example = jax.tree.map(spec, example)
    return jax.vmap(lambda own_key: model.init(own_key, example))(jax.random.split(key, copies))

  def apply(params: PyTree, state: PyTree, x: Any, *, train: bool, key: jax.Array | None = None) -> tuple[Any, PyTree]:
    keys = None if key is None else jax.random.split(key, copies)
    axes = (0, 0, 0 if own_inputs else None, None if key is None else 0)
    one = lambda params, state, x, key: model.apply(params, state, x, train=train, key=key)
    return jax.vmap(one, axes)(params, state, x, keys)

  return Model(init, apply, model.inputs)


def unstack(tree: PyTree) -> list[PyTree]:
  """Take a stacked tree apart: one tree for each entry of the leading axis, as `kdflax.coupling` wants them.

  Args:
    tree: pytree of arrays [copies, ...], such as the params of a `stacked` model.

  Returns:
    A list of `copies` trees of arrays [...].

  Raises:
    ValueError: if the tree has no leaves, or they do not share a leading axis.
  """
  lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(tree)}
  if len(lengths) != 1 or 0 in lengths:
    shapes = {name_of(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
    raise ValueError(f"unstack takes arrays with a common leading axis, got {shapes}")
  return [jax.tree.map(lambda leaf, i=index: leaf[i], tree) for index in range(lengths.pop())]


def _view(source: Mapping[str, Any], model: Model) -> Any:
  """Returns what a part is called with: everything by name for a network, the arrays it asks for for a connector."""
  if model.inputs == "batch":
    return _flat(source)
  return read(source, model)


def _flat(source: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the entries, and those of nested dicts once more under dotted names."""
  names = {}
  for name, value in source.items():
    names[prefix + name] = value
    if isinstance(value, Mapping):
      names |= _flat(value, f"{prefix}{name}.")
  return names


def _place(tree: dict[str, Any], path: str, value: PyTree) -> None:
  if jax.tree.leaves(value):
    *parents, last = path.split("/")
    for parent in parents:
      tree = tree.setdefault(parent, {})
    tree[last] = value


def _at(tree: Mapping[str, Any], path: str) -> PyTree:
  for part in path.split("/"):
    tree = tree.get(part, {})
  return tree
