"""Multi-task networks, from any encoders and heads. See `experts` for those that gate between experts.

Every function takes `heads`, one model for each task by name, and returns a `Model` whose outputs hold a dict by task
under `logits`, and under `embedding` and `features` where tasks have their own. Encoders are networks without a head
(`mlp((64,), None)`, `convnet((16, 32), None)`); heads are `task_head`, or any connector that reads an output of the
encoder. Tasks that come in batches of their own are mixed into one batch and masked in the loss by `where`.

The first segment of a parameter's path says whom it belongs to:

    shared/...       several tasks; the rows of a stack `[copies, ...]` are experts, or networks that exchange features
    task/NAME/...    one task: its head, tower, attention or gate
    stacked/...      soft sharing: row i belongs to task i alone, in the order of `heads`; `unstack` takes it apart

so that `make_learner(..., shared="/shared/")` balances exactly what is shared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdflax.model import Model, Outputs, PyTree, lookup
from kdflax.models.adapters import from_nnx
from kdflax.models.composition import Run, compose, stacked, unstack
from kdflax.models.layers import check_widths, head_init, hidden_init
from kdflax.numerics.pooling import pool_to_at_most

Heads = Mapping[str, Model]


def task_head(width: int | None = None, *, hidden: Sequence[int] = (), reads: str = "embedding") -> Model:
  """Map the last axis of an encoder's output to the prediction of a task.

  A classification has one output for each class, a regression one for each target. On a feature map the layers work
  position by position, as 1x1 convolutions: a dense prediction.

  Args:
    width: the outputs; None for a single one without an axis of its own.
    hidden: widths of layers with ReLU before the last, for a deeper head.
    reads: which of the encoder's outputs, such as `"features.stage1"`.

  Returns:
    A model with `output` [batch, ..., width], or [batch, ...] if `width` is None.

  Raises:
    ValueError: if a width is not positive.
  """
  check_widths(width=() if width is None else (width,), hidden=hidden)
  return from_nnx(
    lambda rngs, example: _Head(example.shape[-1], tuple(hidden), width, rngs), inputs=reads, with_example=True
  )


def hard_sharing(encoder: Model, heads: Heads) -> Model:
  """Share one encoder between all tasks.

  Args:
    encoder: a network; its `embedding` and `features` are the outputs of the whole.
    heads: one for each task.

  Returns:
    A model with `logits` by task and the encoder's other outputs. Parameters: `shared`, `task/NAME/head`.

  Raises:
    ValueError: if there are no heads, or a name cannot be part of a path.

  Reference: Rich Caruana, "Multitask Learning: A Knowledge-Based Source of Inductive Bias", ICML 1993.
  """
  tasks = checked_tasks(heads)

  def forward(run: Run, batch: Any) -> Outputs:
    outputs = run("shared", encoder, batch)
    return outputs | {"logits": predict(run, heads, {task: outputs for task in tasks})}

  return compose(forward)


def soft_sharing(encoder: Model, heads: Heads) -> Model:
  """Give every task a network of its own, all run by one vmapped call.

  Without a coupling these are independent networks. Couple them in training by a penalty on what is stacked:

      Penalty(lambda params: trace_norm_coupling(unstack(params["student"]["stacked"])), weight)

  Args:
    encoder: a network, copied for each task; the copies start from different keys.
    heads: one for each task.

  Returns:
    A model with `logits`, `embedding` and `features` by task. Parameters: `stacked` [tasks, ...], `task/NAME/head`.

  Raises:
    ValueError: as `hard_sharing`.

  Reference: Long Duong, Trevor Cohn, Steven Bird and Paul Cook, "Low Resource Dependency Parsing: Cross-lingual
  Parameter Sharing in a Neural Network Parser", ACL 2015.
  """
  tasks = checked_tasks(heads)

  def forward(run: Run, batch: Any) -> Outputs:
    outputs = run("stacked", stacked(encoder, len(tasks)), batch)
    return by_task(run, heads, dict(zip(tasks, unstack(outputs), strict=True)))

  return compose(forward)


def feature_sharing(extractor: Model, towers: Model | Mapping[str, Model], heads: Heads) -> Model:
  """Share a feature extractor, and give every task deeper layers of its own.

  Args:
    extractor: a network.
    towers: a model for all tasks (each has its own copy), or one for each; reads outputs of the extractor by name:
      `mlp((32,), None, input="embedding")`, `convnet((16,), None, input="features.stage1")`.
    heads: one for each task; reads the task's tower.

  Returns:
    A model with `logits`, `embedding` and `features` by task, the latter two those of the towers, and `shared`, the
    outputs of the extractor. Parameters: `shared`, `task/NAME/tower`, `task/NAME/head`.

  Raises:
    ValueError: as `hard_sharing`, or if towers and heads name different tasks.
  """
  tasks = checked_tasks(heads)
  towers = dict.fromkeys(tasks, towers) if isinstance(towers, Model) else towers
  if set(towers) != set(tasks):
    raise ValueError(f"towers are for the tasks {sorted(towers)}, heads for {sorted(tasks)}; name the same")

  def forward(run: Run, batch: Any) -> Outputs:
    shared = run("shared", extractor, batch)
    own = {task: run(f"task/{task}/tower", towers[task], shared) for task in tasks}
    return by_task(run, heads, own) | {"shared": shared}

  return compose(forward)


def cross_stitch(stages: Sequence[Model], heads: Heads, *, self_weight: float = 0.9) -> Model:
  """Let the networks of all tasks exchange features between their stages.

  Before every stage but the first, task t reads `sum_j A[t, j] h_j` of the outputs h_j that the stage before gave for
  each task: one learned [tasks, tasks] matrix A for every such place.

  Args:
    stages: networks in order, copied for each task; all but the first read the one before, by name
      (`mlp((32,), None, input="embedding")`).
    heads: one for each task; reads the last stage.
    self_weight: the first value of A on its diagonal; the other entries of a row share the rest to 1.

  Returns:
    A model with `logits`, `embedding` and `features` by task, of the last stage. Parameters: `shared/stage0`,
    `shared/stage1`, ... [tasks, ...] and `shared/stitch1`, ...; `task/NAME/head`.

  Raises:
    ValueError: as `hard_sharing`, or if there are no stages.

  Reference: Ishan Misra, Abhinav Shrivastava, Abhinav Gupta and Martial Hebert, "Cross-stitch Networks for Multi-task
  Learning", 2016, arXiv 1604.03539. The paper also has a matrix for each channel. Widely used code starts A at ones,
  which makes all tasks alike and features `tasks` times too large.
  """
  tasks = checked_tasks(heads)
  if not stages:
    raise ValueError("cross_stitch: stages must name at least one network")

  def forward(run: Run, batch: Any) -> Outputs:
    outputs = run("shared/stage0", stacked(stages[0], len(tasks)), batch)
    for index, stage in enumerate(stages[1:], start=1):
      outputs = run(f"shared/stitch{index}", _stitch(len(tasks), self_weight), outputs)
      outputs = run(f"shared/stage{index}", stacked(stage, len(tasks), own_inputs=True), outputs)
    return by_task(run, heads, dict(zip(tasks, unstack(outputs), strict=True)))

  return compose(forward)


def mtan(encoder: Model, heads: Heads, *, layers: Sequence[str]) -> Model:
  """Share one encoder, and let every task choose among its features by attention masks.

  For task t, with p_l the shared features at layer l and z_l what the task makes of them:

      z_l = sigmoid(W2 relu(W1 [p_l, z_(l-1)])) * p_l

  W1 and W2 work on the last axis, 1x1 convolutions on a map; z_(l-1) is average-pooled to the size of p_l, and there is
  none at the first layer. The masks do not act on the encoder itself.

  Args:
    encoder: a network.
    heads: one for each task; reads the task's `embedding`, the last z averaged over positions, or
      `features.NAME` of a layer.
    layers: which outputs of the encoder, in order: `("features.stage1", "features.stage2")`.

  Returns:
    A model with `logits`, `embedding` and `features` by task and `shared`, the outputs of the encoder. Parameters:
    `shared`, `task/NAME/attention1`, ..., `task/NAME/head`.

  Raises:
    ValueError: as `hard_sharing`, or if there are no layers or the encoder has none of that name.

  Reference: Shikun Liu, Edward Johns and Andrew J. Davison, "End-to-End Multi-Task Learning with Attention", 2019,
  arXiv 1803.10704. Left out: BatchNorm in the masks, and the 3x3 convolutions between layers.
  """
  tasks = checked_tasks(heads)
  if isinstance(layers, str) or not layers:
    raise ValueError(f"mtan: layers must be a sequence of at least one path, got {layers!r}")

  def attend(run: Run, task: str, shared: Outputs) -> Outputs:
    features, source, reads = {}, {}, ("shared",)
    for index, layer in enumerate(layers, start=1):
      source["shared"] = lookup(shared, layer)
      if index > 1:
        previous, reads = features[_name(layers[index - 2])], ("shared", "previous")
        source["previous"] = pool_to_at_most(previous, source["shared"].shape[1:3]) if previous.ndim == 4 else previous
      features[_name(layer)] = run(f"task/{task}/attention{index}", _attention(reads), source)["output"]
    last = features[_name(layers[-1])]
    return {"embedding": last.mean((1, 2)) if last.ndim == 4 else last, "features": features}

  def forward(run: Run, batch: Any) -> Outputs:
    shared = run("shared", encoder, batch)
    return by_task(run, heads, {task: attend(run, task, shared) for task in tasks}) | {"shared": shared}

  return compose(forward)


def checked_tasks(heads: Heads) -> tuple[str, ...]:
  """Returns the names of the tasks, or raises a ValueError if they cannot be parts of a path."""
  if not heads:
    raise ValueError("heads must have a model for at least one task, got {}")
  bad = [task for task in heads if not task or "/" in task or "." in task]
  if bad:
    raise ValueError(f"the names of tasks are parts of paths, without '/' and '.'; got {bad}")
  return tuple(heads)


def by_task(run: Run, heads: Heads, own: Mapping[str, Outputs]) -> Outputs:
  """Runs every head on the outputs of its task, and turns outputs by task into tasks by output."""
  names = [name for name in next(iter(own.values())) if name != "logits"]
  return {"logits": predict(run, heads, own)} | {name: {task: own[task][name] for task in heads} for name in names}


def predict(run: Run, heads: Heads, own: Mapping[str, Outputs]) -> dict[str, Any]:
  """Runs every head; a head names its result `output`, as connectors do, or `logits`."""
  results = {task: run(f"task/{task}/head", head, own[task]) for task, head in heads.items()}
  return {task: result["logits"] if "logits" in result else result["output"] for task, result in results.items()}


def _name(path: str) -> str:
  return path.rpartition(".")[2]


def _stitch(tasks: int, self_weight: float) -> Model:
  others = (1 - self_weight) / max(tasks - 1, 1)
  diagonal = self_weight if tasks > 1 else 1.0

  def init(key: jax.Array, outputs: Any) -> tuple[PyTree, PyTree]:
    del key, outputs
    return {"matrix": jnp.where(jnp.eye(tasks, dtype=bool), diagonal, others)}, {}

  def apply(
    params: PyTree, state: PyTree, outputs: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    del train, key
    mix = lambda leaf: jnp.tensordot(params["matrix"].astype(leaf.dtype), leaf, axes=1)
    return jax.tree.map(mix, outputs), state

  return Model(init, apply)


def _attention(reads: tuple[str, ...]) -> Model:
  return from_nnx(lambda rngs, example: _Attention(example, rngs), inputs=reads, with_example=True)


class _Head(nnx.Module):
  def __init__(self, inputs: int, hidden: Sequence[int], width: int | None, rngs: nnx.Rngs) -> None:
    widths = (inputs, *hidden)
    self.hidden = nnx.List(
      nnx.Linear(a, b, kernel_init=hidden_init, rngs=rngs) for a, b in zip(widths[:-1], hidden, strict=True)
    )
    self.linear = nnx.Linear(widths[-1], 1 if width is None else width, kernel_init=head_init, rngs=rngs)
    self.scalar = width is None

  def __call__(self, x: jax.Array) -> Outputs:
    for layer in self.hidden:
      x = jax.nn.relu(layer(x))
    x = self.linear(x)
    return {"output": x[..., 0] if self.scalar else x}


class _Attention(nnx.Module):
  def __init__(self, examples: Sequence[jax.ShapeDtypeStruct], rngs: nnx.Rngs) -> None:
    width = examples[0].shape[-1]
    self.first = nnx.Linear(sum(x.shape[-1] for x in examples), width, kernel_init=hidden_init, rngs=rngs)
    self.second = nnx.Linear(width, width, kernel_init=head_init, rngs=rngs)

  def __call__(self, inputs: tuple[jax.Array, ...]) -> Outputs:
    hidden = jax.nn.relu(self.first(jnp.concatenate(inputs, axis=-1)))
    return {"output": jax.nn.sigmoid(self.second(hidden)) * inputs[0]}
