"""Losses of vocabulary heads: one value per token, without ever holding logits of `[tokens, vocabulary]`.

The tokens go through in chunks, and the pass that makes the values makes their gradient as well: four matrix products
for a student and a teacher, three for a student alone. Logits, sums and the gradients of heads are float32 or wider
whatever the dtype of hidden states and heads.

That pass has to guess what will become of the values: that they are all multiplied by one number, as a mean over the
tokens that count does, or by a number times `expected_weights`. Then nothing is left for the backward pass but to
multiply; several cotangents, such as a balancer's rows, cost nothing either. If something else becomes of the values
the gradient is as right, and takes a second pass. What a gradient of its own forbids: forward mode (`jax.jvp`,
`jax.jacfwd`) and second derivatives, which raise an error; take the divergence of logits for those.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdflax.losses._heads import (
  Number,
  Side,
  check_sides,
  cross_entropy_of,
  divergence_of,
  facts_of_labels,
  values_of,
)
from kdflax.numerics.examples import AxisName


def fused_divergence(
  student_hidden: jax.Array,
  student_head: jax.Array,
  teacher_hidden: jax.Array,
  teacher_head: jax.Array,
  *,
  divergence: str = "forward_kl",
  temperature: float | jax.Array = 1.0,
  beta: float | jax.Array = 0.5,
  alpha: float | jax.Array = 0.1,
  student_bias: jax.Array | None = None,
  teacher_bias: jax.Array | None = None,
  student_soft_cap: float | jax.Array | None = None,
  teacher_soft_cap: float | jax.Array | None = None,
  num_classes: int | None = None,
  expected_weights: float | jax.Array = 1.0,
  where: jax.Array | None = None,
  chunk: int | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Divergence of two language models, from their hidden states and vocabulary heads.

  Exactly the divergence of their logits, which are never held for all tokens. Its gradient reaches whatever is
  differentiated, on both sides.

    D(p, q),   q = softmax(student_hidden student_head' / T), p = softmax(teacher_hidden teacher_head' / T)

  Args:
    student_hidden: `[..., width]`; multiply it by a scale that the model has for its logits.
    student_head: `[classes, width]`, a row for each class; the embedding where they are tied.
    teacher_hidden: `[..., other width]` of the same tokens.
    teacher_head: `[classes, other width]`.
    divergence: "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "reverse_skew_kl" or "total_variation", as the
      functions of these names; static.
    temperature: T > 0, dimensionless, divides the logits of both sides; may be traced; broadcasts against `[...]`, as
      do all numbers here.
    beta: share of the teacher in the mixture of "jensen_shannon": a number in [0, 1], of which 0 and 1 are the forward
      and the reverse KL, or an array or traced number inside (0, 1).
    alpha: in [0, 1), for the skewed divergences; may be traced.
    student_bias, teacher_bias: `[classes]`, added to the logits.
    student_soft_cap, teacher_soft_cap: c > 0 turns these logits z into `c tanh(z / c)`, before the temperature; None is
      no cap. May be traced.
    num_classes: how many of the first rows of both heads stand for the same classes; static. None: as many as the
      shorter head has. Rows beyond, as of a vocabulary that was filled up to a round number, have probability 0 on
      both sides.
    expected_weights: in which proportions the values will count, such as 1 / length for a mean over sequences;
      broadcasts to `[...]`. It changes no number, and where it is right it saves the second pass.
    where: bool `[...]`, which tokens count; the hidden states of others are not looked at.
    chunk: tokens at once, static; it changes the memory and no number. None: as many as have 8 million logits a side
      on a CPU, 134 million elsewhere.
    axis_name: mapped axis of `jax.shard_map` over which the rows of the heads (and biases) are spread, while every
      device has the same tokens: only maxima and sums of rows cross devices. Under plain `jax.jit` on a mesh shardings
      say that, and this stays None.

  Returns:
    `[...]` in float32 or wider, 0 for masked tokens.

  Raises:
    ValueError: if shapes or dtypes do not fit, a head is transposed, the divergence is unknown, the heads share no
      class, or a temperature, beta, alpha, soft cap or chunk is known and out of range.

  Examples:
    >>> hidden, head = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> values = fused_divergence(hidden, head, 2 * hidden, head, divergence="reverse_kl")
    >>> [round(float(value), 4) for value in values]
    [0.052, 0.0704]

  Reference: Pin-Lun Hsu, Yun Dai, Vignesh Kothapalli, Qingquan Song, Shao Tang, Siyu Zhu, Steven Shimizu, Shivam Sahni,
  Haowen Ning and Yanning Chen, "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv 2410.10989. There
  the mean is taken inside, and the logits that a shorter head lacks are 0.
  """
  student = Side("student", student_hidden, student_head, student_bias, student_soft_cap)
  teacher = Side("teacher", teacher_hidden, teacher_head, teacher_bias, teacher_soft_cap)
  tokens = check_sides([student, teacher], where, chunk)
  numbers = {"temperature": temperature, "alpha": alpha, "beta": beta}
  soft, hyper = divergence_of(student, teacher, divergence, num_classes, axis_name, **numbers)
  facts = {"counted": _counted(tokens, where)}
  sides, weights = [student, teacher], [[expected_weights]]
  return values_of(sides, {"counted": soft}, hyper, facts, weights, where, chunk, axis_name)[0]


def fused_cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  *,
  bias: jax.Array | None = None,
  soft_cap: float | jax.Array | None = None,
  z_loss: float | jax.Array = 0.0,
  ignore_index: int | None = None,
  expected_weights: float | jax.Array = 1.0,
  where: jax.Array | None = None,
  chunk: int | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Cross-entropy of a language model with labels, from hidden states and vocabulary head.

  Exactly the cross-entropy of the logits, which are never held for all tokens.

    -log q_y + z_loss (log sum_c exp z_c)^2,   z = hidden head', q = softmax(z)

  Args:
    hidden: `[..., width]`; multiply it by a scale that the model has for its logits.
    head: `[classes, width]`, a row for each class; the embedding where they are tied.
    labels: integer `[...]`, the class y of each token; `shift_labels` puts it beside its prediction. A label outside
      `0 .. classes - 1` cannot be refused once traced; where it counts the value is NaN.
    bias: `[classes]`, added to the logits.
    soft_cap: c > 0 turns these logits z into `c tanh(z / c)`; None is no cap. May be traced.
    z_loss: weight of the squared logarithm of the normaliser, which keeps it near 1; may be traced.
    ignore_index: the label of tokens that do not count, often -100; static.
    expected_weights: in which proportions the values will count; broadcasts to `[...]`. It changes no number, and where
      it is right it saves the second pass.
    where: bool `[...]`, which tokens count; the hidden states of others are not looked at.
    chunk: tokens at once, static; it changes the memory and no number. None: as many as have 8 million logits a side
      on a CPU, 134 million elsewhere.
    axis_name: mapped axis of `jax.shard_map` over which the rows of the heads (and biases) are spread, while every
      device has the same tokens: only maxima and sums of rows cross devices. Under plain `jax.jit` on a mesh shardings
      say that, and this stays None.

  Returns:
    `[...]` in float32 or wider, 0 for masked and ignored tokens.

  Raises:
    ValueError: if shapes or dtypes do not fit, a head is transposed, or a label, soft cap or chunk is known and out of
      range.

  Examples:
    >>> hidden, head = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> values = fused_cross_entropy(hidden, head, jnp.array([1, -100]), ignore_index=-100)
    >>> [round(float(value), 4) for value in values]
    [1.862, 0.0]

  Reference: Erik Wijmans, Brody Huval, Alexander Hertzberg, Vladlen Koltun and Philipp Krähenbühl, "Cut Your Losses in
  Large-Vocabulary Language Models", 2024, arXiv 2411.09009. There blocks of the vocabulary are recomputed in the
  backward pass as well.
  """
  only = Side("", hidden, head, bias, soft_cap)
  tokens = check_sides([only], where, chunk)
  facts = facts_of_labels(only, labels, tokens, _counted(tokens, where), ignore_index, axis_name)
  facts["counted"] = facts["labelled"]
  hard, weights = cross_entropy_of(only, axis_name), [[expected_weights]]
  return values_of([only], {"labelled": hard}, _z_loss(z_loss), facts, weights, where, chunk, axis_name)[0]


def fused_distillation(
  student_hidden: jax.Array,
  student_head: jax.Array,
  teacher_hidden: jax.Array,
  teacher_head: jax.Array,
  labels: jax.Array,
  *,
  divergence: str = "forward_kl",
  temperature: float | jax.Array = 1.0,
  beta: float | jax.Array = 0.5,
  alpha: float | jax.Array = 0.1,
  student_bias: jax.Array | None = None,
  teacher_bias: jax.Array | None = None,
  student_soft_cap: float | jax.Array | None = None,
  teacher_soft_cap: float | jax.Array | None = None,
  z_loss: float | jax.Array = 0.0,
  ignore_index: int | None = None,
  num_classes: int | None = None,
  expected_weights: tuple[float | jax.Array, float | jax.Array] | None = (1.0, 1.0),
  where: jax.Array | None = None,
  chunk: int | None = None,
  axis_name: AxisName = None,
) -> tuple[jax.Array, jax.Array]:
  """Divergence from a teacher and cross-entropy with labels, of the same student's logits in one pass.

  `fused_divergence` and `fused_cross_entropy` at the price of the first. The cross-entropy is at temperature 1 and over
  all rows of the student's head.

    D(p, q)  and  -log q_y + z_loss (log sum_c exp z_c)^2

  Args:
    student_hidden: `[..., width]`; multiply it by a scale that the model has for its logits.
    student_head: `[classes, width]`, a row for each class; the embedding where they are tied.
    teacher_hidden: `[..., other width]` of the same tokens.
    teacher_head: `[classes, other width]`.
    labels: integer `[...]`, the class y of each token; `shift_labels` puts it beside its prediction. A label outside
      the student's rows cannot be refused once traced; where it counts the value is NaN.
    divergence: "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "reverse_skew_kl" or "total_variation", as the
      functions of these names; static.
    temperature: T > 0, dimensionless, divides the logits of both sides; may be traced; broadcasts against `[...]`, as
      do all numbers here.
    beta: share of the teacher in the mixture of "jensen_shannon": a number in [0, 1], of which 0 and 1 are the forward
      and the reverse KL, or an array or traced number inside (0, 1).
    alpha: in [0, 1), for the skewed divergences; may be traced.
    student_bias, teacher_bias: `[classes]`, added to the logits.
    student_soft_cap, teacher_soft_cap: c > 0 turns these logits z into `c tanh(z / c)`, before the temperature; None is
      no cap. May be traced.
    z_loss: weight of the squared logarithm of the normaliser; may be traced.
    ignore_index: the label of tokens whose cross-entropy does not count, often -100; static.
    num_classes: how many of the first rows of both heads stand for the same classes; static. None: as many as the
      shorter head has. Rows beyond, as of a vocabulary that was filled up to a round number, have probability 0 on
      both sides.
    expected_weights: in which proportion the two values will count: a pair, each a number or of the tokens. It changes
      no number, and where it is right it saves the second pass. None keeps the two gradients apart: two products and
      one gradient of the head more, but no proportion takes a second pass, nor does a balancer between the two.
    where: bool `[...]`, which tokens count; the hidden states of others are not looked at.
    chunk: tokens at once, static; it changes the memory and no number. None: as many as have 8 million logits a side
      on a CPU, 134 million elsewhere.
    axis_name: mapped axis of `jax.shard_map` over which the rows of the heads (and biases) are spread, while every
      device has the same tokens: only maxima and sums of rows cross devices. Under plain `jax.jit` on a mesh shardings
      say that, and this stays None.

  Returns:
    The divergence and the cross-entropy, both `[...]` in float32 or wider, 0 for tokens that do not count.

  Raises:
    ValueError: as `fused_divergence` and `fused_cross_entropy`.

  Examples:
    >>> hidden, head = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> soft, hard = fused_distillation(hidden, head, 2 * hidden, head, jnp.array([1, 2]), divergence="reverse_kl")
    >>> [round(float(value), 4) for value in (*soft, *hard)]
    [0.052, 0.0704, 1.862, 0.7586]

  Reference: Pin-Lun Hsu, Yun Dai, Vignesh Kothapalli, Qingquan Song, Shao Tang, Siyu Zhu, Steven Shimizu, Shivam Sahni,
  Haowen Ning and Yanning Chen, "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv 2410.10989.
  """
  student = Side("student", student_hidden, student_head, student_bias, student_soft_cap)
  teacher = Side("teacher", teacher_hidden, teacher_head, teacher_bias, teacher_soft_cap)
  tokens = check_sides([student, teacher], where, chunk)
  numbers = {"temperature": temperature, "alpha": alpha, "beta": beta}
  soft, hyper = divergence_of(student, teacher, divergence, num_classes, axis_name, **numbers)
  counted = _counted(tokens, where)
  facts = {"counted": counted} | facts_of_labels(student, labels, tokens, counted, ignore_index, axis_name)
  losses = {"counted": soft, "labelled": cross_entropy_of(student, axis_name)}
  weights = [(1.0, 0.0), (0.0, 1.0)] if expected_weights is None else [expected_weights]
  sides, hyper = [student, teacher], hyper | _z_loss(z_loss)
  soft_values, hard_values = values_of(sides, losses, hyper, facts, weights, where, chunk, axis_name)
  return soft_values, hard_values


def fused_linear(
  student_hidden: jax.Array,
  student_head: jax.Array,
  teacher_hidden: jax.Array,
  teacher_head: jax.Array,
  *,
  divergence: str | Callable[..., jax.Array] = "forward_kl",
  labels: jax.Array | None = None,
  **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """`fused_divergence`, or with labels `fused_distillation`, by the name of a divergence or its function.

    D(p, q),   q = softmax(student_hidden student_head' / T), p = softmax(teacher_hidden teacher_head' / T)

  Args:
    student_hidden: `[..., width]`.
    student_head: `[classes, width]`.
    teacher_hidden: `[..., other width]`.
    teacher_head: `[classes, other width]`.
    divergence: the name of one of the six divergences, or the function itself, such as `losses.reverse_kl`.
    labels: integer `[...]`, or None.
    **options: of these functions.

  Returns:
    The divergence `[...]`, or with labels both it and the cross-entropy.

  Raises:
    ValueError: as these functions.

  Examples:
    >>> hidden, head = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> values = fused_linear(hidden, head, 2 * hidden, head, divergence="reverse_kl")
    >>> [round(float(value), 4) for value in values]
    [0.052, 0.0704]

  Reference: Pin-Lun Hsu, Yun Dai, Vignesh Kothapalli, Qingquan Song, Shao Tang, Siyu Zhu, Steven Shimizu, Shivam Sahni,
  Haowen Ning and Yanning Chen, "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv 2410.10989.
  """
  arrays = (student_hidden, student_head, teacher_hidden, teacher_head)
  name = divergence if isinstance(divergence, str) else getattr(divergence, "__name__", str(divergence))
  if labels is None:
    return fused_divergence(*arrays, divergence=name, **options)
  return fused_distillation(*arrays, labels, divergence=name, **options)


def _counted(tokens: tuple[int, ...], where: jax.Array | None) -> jax.Array:
  return jnp.ones(tokens, bool) if where is None else jnp.asarray(where)


def _z_loss(z_loss: float | jax.Array) -> dict[str, Number]:
  """Nothing if there is none: that saves a pass over the logits."""
  return {} if isinstance(z_loss, int | float) and z_loss == 0 else {"z_loss": z_loss}
