"""Merging learned by distillation: a coefficient for every tuned model and layer, trained as any model is."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdflax.merging._trees import align, check_alike, per_model, several
from kdflax.model import Model, PyTree, paths_of
from kdflax.numerics.trees import name_of


def layer_of(path: str) -> str:
  """The layer that a leaf belongs to by default: `"hidden/0"` of `"hidden/0/kernel"`, and `""` of what is on top."""
  return path.rpartition("/")[0]


def layers(params: PyTree, layer_of: Callable[[str], str] = layer_of) -> list[str]:
  """The layers of a model, in the order of the coefficients of `layer_wise` and `learned`.

  Args:
    params: a pytree.
    layer_of: from the path of a leaf, such as `"hidden/0/kernel"`, to the name of its layer: leaves of one name share
      their coefficients. `lambda path: path` gives every leaf its own, `lambda path: ""` all leaves one.

  Returns:
    The names, in the order of the first leaf of each.

  Examples:
    >>> layers({"head": {"bias": 0, "kernel": 0}, "hidden": [{"kernel": 0}, {"kernel": 0}]})
    ['head', 'hidden/0', 'hidden/1']
  """
  return list(dict.fromkeys(layer_of(name_of(path)) for path, _ in jax.tree.leaves_with_path(params)))


def layer_wise(
  base: PyTree, tuned: Sequence[PyTree], coefficients: jax.Array, layer_of: Callable[[str], str] = layer_of
) -> PyTree:
  """Add what every tuned model has learned to the base, each layer by a scale of its own.

  `task_arithmetic` is the case of equal coefficients. The derivative by a coefficient is the inner product of the
  gradient of the merged layer with the model's difference there.

      base_l + sum_i c_il (tuned_il - base_l)      for every layer l

  Args:
    base: a pytree of floating arrays, the params that all were tuned from.
    tuned: one pytree like it for each model.
    coefficients: `[models, layers]`, the layers in the order of `layers(base, layer_of)`; may be traced.
    layer_of: which leaves share a coefficient, see `layers`.

  Returns:
    A pytree like the base, in its dtypes; computed in float32 or wider.

  Raises:
    ValueError: if the trees differ (the leaf and both shapes are named), a leaf is not floating, or there is not one
      coefficient for each model and layer.

  Examples:
    >>> base = {"first": {"kernel": jnp.ones(1)}, "second": {"kernel": jnp.ones(1)}}
    >>> tuned = {"first": {"kernel": jnp.array([3.0])}, "second": {"kernel": jnp.array([5.0])}}
    >>> layer_wise(base, [tuned], jnp.array([[1.0, 0.5]]))
    {'first': {'kernel': Array([3.], dtype=float32)}, 'second': {'kernel': Array([3.], dtype=float32)}}

  Reference: Enneng Yang, Zhenyi Wang, Li Shen, Shiwei Liu, Guibing Guo, Xingwei Wang and Dacheng Tao, "AdaMerging:
  Adaptive Model Merging for Multi-Task Learning", 2023, arXiv 2310.02575.
  """
  aligned = align({"base": base} | several("tuned", tuned))
  names = layers(base, layer_of)
  coefficients = jnp.asarray(coefficients)
  _check_coefficients(coefficients.shape, len(tuned), names)
  merged = []
  for name, (start, *leaves) in zip(aligned.names, aligned.versions, strict=True):
    column = coefficients[:, names.index(layer_of(name))].astype(start.dtype)
    merged.append(start + sum((c * (leaf - start) for c, leaf in zip(column, leaves, strict=True)), jnp.zeros(())))
  return aligned.rebuild(merged)


def learned(
  base: PyTree | str,
  tuned: Sequence[PyTree] | Sequence[str],
  model: Model,
  *,
  state: PyTree | None = None,
  initial: float | Sequence[float] | jax.Array = 0.3,
  layer_of: Callable[[str], str] = layer_of,
) -> Model:
  """Make the model whose only parameters say how much of each tuned model goes into each layer.

  It answers as `model` does with the params `layer_wise(base, tuned, coefficients)`. Trained by the Terms of a
  distillation from the tuned models, on data that need no labels, it learns the merging that answers most like all of
  them at once. Afterwards `layer_wise(base, tuned, params["coefficients"])` are the params of `model`: the merged model
  costs what one costs, and leaves as one does.

      merged = merging.learned("params.base", ["params.left", "params.right"], network)
      make_learner(
        {"base": network, "left": network, "right": network, "merged": merged},
        {task: Term(losses.kl_soft_targets,
                    {"student_logits": f"merged.logits.{task}", "teacher_logits": f"{task}.logits.{task}"})
         for task in ("left", "right")},
        optax.adam(1e-2),
      )        with the variables of base, left and right given as frozen

  Args:
    base: a pytree of floating arrays, the params that all were tuned from; or the context path where they lie,
      `"params.NAME"` for a frozen model of that name.
    tuned: one pytree like it, or a context path, for each model.
    model: what the params belong to.
    state: what the model's state starts from (the running statistics of the base); the model's own start by default.
      Training moves it on, as it does for the model alone.
    initial: the coefficients to start from: a number, one for each tuned model, or `[models, layers]`.
    layer_of: which leaves share a coefficient, see `layers`.

  Returns:
    A model. Its params are `{"coefficients": [models, layers]}` in float32, in the order of `layers(base, layer_of)`.
    With context paths it reads these and what `model` reads, and its state is that of `model`: the tuned models are in
    memory once, as the teachers that they are, and in no checkpoint. With pytrees it reads what `model` reads, and its
    state also holds `base` and `tuned`, so that it may leave the context.

  Raises:
    ValueError: here, or from `init` with context paths, if the trees differ (the leaf and both shapes are named), a
      leaf is not floating or the initial coefficients do not fit; from `init`, if the base or the state are not of the
      model; if only some of `base` and `tuned` are paths.

  Reference: Seyed Arshan Dalili and Mehrdad Mahdavi, "Model Merging via Multi-Teacher Knowledge Distillation", 2025,
  arXiv 2512.21288, which minimises the KL divergence from the tuned models by sharpness-aware steps
  (`optax.contrib.sam`); Enneng Yang, Zhenyi Wang, Li Shen, Shiwei Liu, Guibing Guo, Xingwei Wang and Dacheng Tao,
  "AdaMerging: Adaptive Model Merging for Multi-Task Learning", 2023, arXiv 2310.02575, which minimises the entropy.
  """
  trees = {"base": base} | several("tuned", tuned)
  named = [name for name, tree in trees.items() if isinstance(tree, str)]
  if named and len(named) < len(trees):
    raise ValueError(f"base and tuned must be all pytrees or all context paths; only {named} are paths")
  if not named:
    _start(initial, base, tuned, layer_of)  # mistakes show before anything is traced

  def split(inputs: Sequence[Any]) -> tuple[PyTree, list[PyTree], Any]:
    start, *others = inputs
    rest = tuple(others[len(tuned) :])
    return start, others[: len(tuned)], rest[0] if isinstance(model.inputs, str) else rest

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    start, models, rest = split(example)
    own_params, own_state = model.init(key, rest)
    check_alike({"the model's params": own_params, "base": start})
    if state is not None:
      check_alike({"the model's state": own_state, "state": state})
    return {"coefficients": _start(initial, start, models, layer_of)}, own_state if state is None else state

  def apply(
    params: PyTree, state: PyTree, inputs: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    start, models, rest = split(inputs)
    merged = layer_wise(start, models, params["coefficients"], layer_of)
    return model.apply(merged, state, rest, train=train, key=key)

  reader = Model(init, apply, (*map(str, trees.values()), *paths_of(model)) if named else "batch")
  return reader if named else _holding(reader, base, list(tuned), model)


def _holding(reader: Model, base: PyTree, tuned: Sequence[PyTree], model: Model) -> Model:
  """The model that finds in its state what the other reads of a context."""

  def joined(base: PyTree, tuned: Sequence[PyTree], inputs: Any) -> tuple[Any, ...]:
    return (base, *tuned, *([inputs] if isinstance(model.inputs, str) else inputs))

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    params, own_state = reader.init(key, joined(base, tuned, example))
    return params, {"base": base, "tuned": {str(index): tree for index, tree in enumerate(tuned)}, "model": own_state}

  def apply(
    params: PyTree, state: PyTree, inputs: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    models = [state["tuned"][str(index)] for index in range(len(tuned))]
    inputs = joined(state["base"], models, inputs)
    outputs, own_state = reader.apply(params, state["model"], inputs, train=train, key=key)
    return outputs, {**state, "model": own_state}

  return Model(init, apply, model.inputs)


def _start(initial: Any, base: PyTree, tuned: Sequence[PyTree], layer_of: Callable[[str], str]) -> jax.Array:
  """The coefficients to start from, `[models, layers]`, after a look at the trees."""
  align({"base": base} | several("tuned", tuned))
  names, start = layers(base, layer_of), jnp.asarray(initial, jnp.float32)
  if start.ndim < 2:  # a number, or one for each model
    start = jnp.tile(per_model("initial", start, len(tuned))[:, None], len(names))
  _check_coefficients(start.shape, len(tuned), names)
  return start


def _check_coefficients(shape: tuple[int, ...], models: int, names: Sequence[str]) -> None:
  if shape != (models, len(names)):
    raise ValueError(
      f"coefficients must be [models, layers] = {(models, len(names))}, one for each model and of the layers {names}; "
      f"got shape {shape}"
    )
