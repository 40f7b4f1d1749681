"""Multi-task networks of experts: several encoders, and a gate for each task that weighs them.

Heads, outputs and parameter paths are those of `sharing`; gates belong to their task. The outputs also hold the
`gates`, the weights [batch, experts] that each task gave last, its own experts first.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdflax.model import Model, Outputs, PyTree
from kdflax.models.adapters import from_nnx
from kdflax.models.composition import Run, compose, stacked
from kdflax.models.layers import head_init
from kdflax.models.sharing import Heads, by_task, checked_tasks


class Gate(Protocol):
  """`(path that it reads, number of experts) -> model` with `output` [batch, experts]."""

  def __call__(self, path: str, count: int, /) -> Model: ...


def mmoe(expert: Model, heads: Heads, *, num_experts: int = 4, input: str = "image") -> Model:
  """Share several experts, which every task mixes by a gate of its own.

  All outputs of the experts are mixed, features as well: `z_t = sum_e softmax(W_t x)_e f_e(x)`.

  Args:
    expert: a network, copied; the copies start from different keys.
    heads: one for each task.
    num_experts: how many.
    input: the entry of the batch that the gates read, flattened.

  Returns:
    A model with `logits`, `embedding`, `features` and `gates` by task. Parameters: `shared/level1/experts`
    [num_experts, ...], `task/NAME/level1/gate`, `task/NAME/head`.

  Raises:
    ValueError: if there are no heads or no experts, or a name cannot be part of a path.

  Reference: Jiaqi Ma, Zhe Zhao, Xinyang Yi, Jilin Chen, Lichan Hong and Ed H. Chi, "Modeling Task Relationships in
  Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018.
  """
  return _extraction([expert], heads, num_experts, 0, input, _softmax_gate)


def cgc(expert: Model, heads: Heads, *, shared_experts: int = 2, task_experts: int = 1, input: str = "image") -> Model:
  """Mix shared experts and experts of one task: customised gate control, `ple` with one level.

  Args:
    expert: a network, copied.
    heads: one for each task.
    shared_experts: experts that all tasks read.
    task_experts: experts of each task.
    input: the entry of the batch that the gates read, flattened.

  Returns:
    As `ple`, with the one level `level1`.

  Raises:
    ValueError: as `ple`.

  Reference: Hongyan Tang, Junning Liu, Ming Zhao and Xudong Gong, "Progressive Layered Extraction (PLE): A Novel
  Multi-Task Learning (MTL) Model for Personalized Recommendations", RecSys 2020.
  """
  return _extraction([expert], heads, shared_experts, task_experts, input, _softmax_gate)


def ple(
  levels: Sequence[Model], heads: Heads, *, shared_experts: int = 2, task_experts: int = 1, input: str = "image"
) -> Model:
  """Extract features level by level, by shared experts and experts of one task: progressive layered extraction.

  At a level, a task mixes its own experts and the shared ones by a softmax gate. Between levels a shared gate mixes the
  experts of all, which is what the shared experts of the next level read.

  Args:
    levels: the expert of each level, copied; all but the first read the level before by name
      (`mlp((32,), None, input="embedding")`).
    heads: one for each task; reads the last level.
    shared_experts: experts at each level that all tasks read.
    task_experts: experts of each task at each level.
    input: the entry of the batch that the first gates read, flattened; later ones read the `embedding` that they mix.

  Returns:
    A model with `logits`, `embedding`, `features` and `gates` by task, of the last level. Parameters of the last of L
    levels: `shared/levelL/experts` [shared_experts, ...], `task/NAME/levelL/experts` [task_experts, ...],
    `task/NAME/levelL/gate`; `task/NAME/head`. At earlier levels there is also `shared/level1/gate`, through which the
    experts of one task reach the others: they are shared parameters, `shared/level1/experts_NAME`, and so are the gates
    of all but the last two levels, `shared/level1/gate_NAME`.

  Raises:
    ValueError: if there are no heads, levels or experts, or a name cannot be part of a path.

  Reference: Hongyan Tang, Junning Liu, Ming Zhao and Xudong Gong, "Progressive Layered Extraction (PLE): A Novel
  Multi-Task Learning (MTL) Model for Personalized Recommendations", RecSys 2020. Widely used code has no shared gate
  and runs the shared experts once for every task instead.
  """
  return _extraction(levels, heads, shared_experts, task_experts, input, _softmax_gate)


def dselect_k(
  expert: Model,
  heads: Heads,
  *,
  num_experts: int = 4,
  num_selected: int = 2,
  gamma: float = 1.0,
  per_example: bool = False,
  input: str = "image",
) -> Model:
  """Share several experts of which every task comes to select a few, by a gate that is smooth.

  Selector i of a task writes the number of an expert in binary, each digit smoothed by the cubic step S: 0 below
  `-gamma / 2`, 1 above `gamma / 2`. It gives expert e the weight r_i(e), the product over the digits of `S(z_ij)` or
  `1 - S(z_ij)`; the gate is `sum_i softmax(a)_i r_i`.

  Selectors become definite only if the objective holds `gate_regularizer`: the sum over selectors of the entropy of
  r_i, and, where `num_experts` is no power of two, of `1 / sum_e r_i(e) - 1`, for codes that name no expert.

      Term(lambda value: value, {"value": "student.gate_regularizer.left"}, weight=0.01)

  Args:
    expert: a network, copied.
    heads: one for each task.
    num_experts: how many.
    num_selected: selectors of each task, at most so many experts in the end.
    gamma: width of the step; smaller decides sooner.
    per_example: whether z and a are linear in the input, or numbers of the task alone.
    input: the entry of the batch that `per_example` gates read, flattened.

  Returns:
    As `mmoe`, and `gate_regularizer` by task: [batch] with `per_example`, else a scalar.

  Raises:
    ValueError: as `mmoe`, or if `num_selected` is below 1 or `gamma` is not positive.

  Reference: Hussein Hazimeh, Zhe Zhao, Aakanksha Chowdhery, Maheswaran Sathiamoorthy, Yihua Chen, Rahul Mazumder,
  Lichan Hong and Ed H. Chi, "DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to
  Multi-Task Learning", 2021, arXiv 2106.03760. In one widely used library the regulariser reaches no gradient.
  """
  if num_selected < 1 or not gamma > 0:
    raise ValueError(f"num_selected must be at least 1 and gamma positive, got {num_selected} and {gamma}")

  def gate(path: str, count: int) -> Model:
    make = lambda rngs, example: _SelectorGate(example, count, num_selected, gamma, per_example, rngs)
    return from_nnx(make, inputs=path, with_example=True)

  return _extraction([expert], heads, num_experts, 0, input, gate)


def smooth_step(t: jax.Array, gamma: float = 1.0) -> jax.Array:
  """Returns 0 below -gamma / 2, 1 above gamma / 2, and between the cubic that meets both with slope 0; [...]."""
  t = jnp.clip(t / gamma, -0.5, 0.5)
  return 0.5 + 1.5 * t - 2 * t**3


def _extraction(
  levels: Sequence[Model], heads: Heads, shared_experts: int, task_experts: int, input: str, gate: Gate
) -> Model:
  tasks = checked_tasks(heads)
  if shared_experts < 1 or task_experts < 0 or not levels:
    raise ValueError(
      "there must be at least one level, one shared expert and no negative number of task experts; got "
      f"{len(levels)}, {shared_experts} and {task_experts}"
    )

  def path(task: str, level: int, part: str, last_shared: int) -> str:
    """A part that reaches another task through the shared gates of later levels is shared."""
    own = level > last_shared
    return f"task/{task}/level{level}/{part}" if own else f"shared/level{level}/{part}_{task}"

  def experts(run: Run, path: str, model: Model, count: int, source: Mapping[str, Any]) -> list[Outputs]:
    return [run(path, stacked(model, count), source)] if count else []

  def gated(
    run: Run, path: str, reads: str, source: Mapping[str, Any], groups: Sequence[PyTree]
  ) -> tuple[Outputs, Outputs]:
    return _gated(lambda count: run(path, gate(reads, count), source), groups)

  def forward(run: Run, batch: Any) -> Outputs:
    shared, own, gates, reads, depth = batch, {t: batch for t in tasks}, {}, input, len(levels)
    for level, expert in enumerate(levels, start=1):
      common = experts(run, f"shared/level{level}/experts", expert, shared_experts, shared)
      groups = {t: experts(run, path(t, level, "experts", depth - 1), expert, task_experts, own[t]) for t in tasks}
      mixed = {t: gated(run, path(t, level, "gate", depth - 2), reads, own[t], [*groups[t], *common]) for t in tasks}
      own, gates = {t: both[0] for t, both in mixed.items()}, {t: both[1] for t, both in mixed.items()}
      if level < depth:
        everyone = [*itertools.chain.from_iterable(groups.values()), *common]
        shared, _ = gated(run, f"shared/level{level}/gate", reads, shared, everyone)
      reads = "embedding"
    outputs = by_task(run, heads, own) | {"gates": {t: gates[t]["output"] for t in tasks}}
    if "regularizer" in gates[tasks[0]]:
      outputs["gate_regularizer"] = {t: gates[t]["regularizer"] for t in tasks}
    return outputs

  return compose(forward)


def _gated(gate: Callable[[int], Outputs], groups: Sequence[PyTree]) -> tuple[Outputs, Outputs]:
  """Stacks the experts of all groups, asks the gate for their weights, and mixes every output."""
  outputs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups)
  gates = gate(len(jax.tree.leaves(outputs)[0]))
  mix = lambda leaf: jnp.einsum("be,eb...->b...", gates["output"].astype(leaf.dtype), leaf)
  return jax.tree.map(mix, outputs), gates


def _softmax_gate(path: str, count: int) -> Model:
  return from_nnx(lambda rngs, example: _SoftmaxGate(example, count, rngs), inputs=path, with_example=True)


def _width(example: jax.ShapeDtypeStruct) -> int:
  return math.prod(example.shape[1:])


class _SoftmaxGate(nnx.Module):
  def __init__(self, example: jax.ShapeDtypeStruct, count: int, rngs: nnx.Rngs) -> None:
    self.linear = nnx.Linear(_width(example), count, kernel_init=head_init, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    return {"output": jax.nn.softmax(self.linear(x.reshape(x.shape[0], -1)))}


class _SelectorGate(nnx.Module):
  def __init__(
    self,
    example: jax.ShapeDtypeStruct,
    count: int,
    selected: int,
    gamma: float,
    per_example: bool,
    rngs: nnx.Rngs,
  ) -> None:
    bits = (count - 1).bit_length()
    self.count, self.gamma, self.per_example = count, gamma, per_example
    before = (_width(example),) if per_example else ()
    start = lambda shape: jax.random.uniform(rngs.params(), shape, minval=-gamma / 100, maxval=gamma / 100)
    self.codes = nnx.Param(start((*before, selected, bits)))
    self.scores = nnx.Param(jnp.zeros((*before, selected)))

  def __call__(self, x: jax.Array) -> Outputs:
    codes, scores = self.codes[...], self.scores[...]
    if self.per_example:
      flat = x.reshape(x.shape[0], -1)
      codes, scores = jnp.tensordot(flat, codes, axes=1), flat @ scores
    steps = smooth_step(codes, self.gamma)[..., None, :]
    digits = np.arange(self.count)[:, None] >> np.arange(steps.shape[-1]) & 1
    chosen = jnp.prod(jnp.where(digits == 1, steps, 1 - steps), axis=-1)  # [..., selected, experts]
    weights = jnp.einsum("...k,...ke->...e", jax.nn.softmax(scores), chosen)
    positive = chosen > 0  # the derivative of the entropy has no limit at 0, where the step is flat
    surprise = -jnp.log(jnp.where(positive, chosen, 1))
    regularizer = (chosen * surprise).sum((-2, -1))
    if self.count < 2 ** steps.shape[-1]:
      mass = jnp.maximum(chosen.sum(-1), jnp.finfo(chosen.dtype).eps)
      regularizer += (1 / mass - 1).sum(-1)
    return {"output": jnp.broadcast_to(weights, (x.shape[0], weights.shape[-1])), "regularizer": regularizer}
