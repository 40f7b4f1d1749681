"""Contrastive losses on embeddings: `[batch, width] -> [batch]`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kdflax.numerics.examples import (
  AxisName,
  all_rows,
  as_examples,
  check_same,
  flatten,
  hyper_parameters,
  mask,
  positions,
)
from kdflax.numerics.products import inner_products
from kdflax.numerics.safe import l2_normalize, log_one_plus_sum_exp, not_before

_HIGHEST = jax.lax.Precision.HIGHEST
_EPSILON = 1e-7  # of the original implementation, added to the denominators


class CRDMemory(NamedTuple):
  """Explicit state of `crd`: the last embeddings of every training example, and the normalisers of the scores.

  A norm of -1 is not yet set. `student_norm` belongs to the scores of student anchors against the teacher's bank.
  """

  student: jax.Array  # [num_examples, width]
  teacher: jax.Array  # [num_examples, width]
  student_norm: jax.Array  # scalar
  teacher_norm: jax.Array  # scalar


def crd_memory(key: jax.Array, num_examples: int, width: int) -> CRDMemory:
  """Make a memory of random unit vectors whose normalisers are not yet set.

  Args:
    key: random key.
    num_examples: size of the training set.
    width: of the embeddings.

  Returns:
    A float32 `CRDMemory`; it holds `2 * num_examples * width` numbers.

  Raises:
    ValueError: if there are no examples or no width.
  """
  if num_examples < 1 or width < 1:
    raise ValueError(f"num_examples and width must be positive; got {num_examples} and {width}")
  student, teacher = l2_normalize(jax.random.normal(key, (2, num_examples, width), jnp.float32))
  return CRDMemory(student, teacher, jnp.float32(-1), jnp.float32(-1))


def crd(
  student_embeddings: jax.Array,
  teacher_embeddings: jax.Array,
  indices: jax.Array,
  memory: CRDMemory,
  *,
  temperature: float | jax.Array = 0.07,
  momentum: float | jax.Array = 0.5,
  axis_name: AxisName = None,
) -> tuple[jax.Array, CRDMemory]:
  """Noise-contrastive estimation between each model's embedding and the other's memory.

  Tells an example's own entry in the other model's memory from the entries of other examples, in both directions:
  maximises a bound on the mutual information of the embeddings. Never 0.

    -log h_0 - sum_{j >= 1} log(1 - h_j),   h_j = P_j / (P_j + m / n),   P_j = exp(v . memory[indices_j] / T) / Z

  summed over student anchors against the teacher's bank and the reverse; m negatives, n rows in the bank, and 1e-7
  added to both denominators. Z is set at the first call to `n mean(exp(...))`, without gradient, and kept from then on;
  below a temperature of about 0.012 it may exceed float32, and is the largest number there. After the scores the rows
  of the examples themselves become `momentum * row + (1 - momentum) * v`, renormalised.

  Rows are read for one anchor at a time, so nothing of the size of batch x negatives x width is held. The memory itself
  gets no gradient. Donate it to the jitted step (`donate_argnums`) and its banks are updated in place: further memory
  does not depend on n, and time only by the caches of the processor.

  Args:
    student_embeddings: `[batch, width]` of unit norm.
    teacher_embeddings: `[batch, width]` of unit norm; gets a gradient, since its embedding layer learns too.
    indices: integer `[batch, 1 + negatives]`, rows of the memory, the example's own first. Out of range, negative ones
      too, they cannot be refused once traced: scores are then NaN and nothing is written.
    memory: from `crd_memory` or the last call.
    temperature: T > 0, dimensionless, may be traced.
    momentum: share of the old row that stays, may be traced.
    axis_name: mapped axis over which the batch is spread, or None. Every device is given the whole memory, and returns
      the whole of it after the batches of all.

  Returns:
    `[batch]` in float32 or wider, and the memory after this batch. If an example comes twice in a batch, its last
    occurrence is the one that is remembered; one whose value is not finite is not.

  Raises:
    ValueError: if shapes do not fit each other or an input has the wrong kind of dtype.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> memory = crd_memory(jax.random.key(0), num_examples=8, width=2)
    >>> embeddings, indices = jnp.eye(2), jnp.array([[0, 3, 4], [1, 5, 6]])
    >>> values, memory = crd(embeddings, embeddings, indices, memory)
    >>> print(values.shape, memory.student.shape)
    (2,) (8, 2)

  Reference: Yonglong Tian, Dilip Krishnan and Phillip Isola, "Contrastive Representation Distillation", 2020, arXiv
  1910.10699. Negatives are the caller's choice; the authors' code draws them from other classes. There is no `where`,
  since a masked example would still have to be kept out of Z and of the memory; leave it out of the batch.
  """
  check_same(
    "shape", student_embeddings=jnp.shape(student_embeddings), teacher_embeddings=jnp.shape(teacher_embeddings)
  )
  student, teacher = as_examples(
    None, lead=1, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings
  )
  indices = jnp.asarray(indices)
  _check_memory(student, indices, memory)
  if not indices.size:
    return student.sum(axis=-1), memory  # of no example
  num_examples = memory.student.shape[0]
  indices = jnp.where(indices < 0, num_examples, indices)  # which does not exist either
  temperature, momentum = hyper_parameters((), None, student.dtype, temperature=temperature, momentum=momentum)
  student_values, student_norm = _one_way(student, memory.teacher, indices, memory.student_norm, temperature, axis_name)
  teacher_values, teacher_norm = _one_way(teacher, memory.student, indices, memory.teacher_norm, temperature, axis_name)
  values = student_values + teacher_values
  # Stopped before the write: its derivative would be one more array of the size of the banks.
  student, teacher, memory = jax.lax.stop_gradient((student, teacher, memory))
  own, finite, student, teacher = (
    _from_all(x, axis_name) for x in (indices[:, 0], jnp.isfinite(values), student, teacher)
  )
  rows = _rows_to_write(own, finite, num_examples)
  remembered = CRDMemory(
    _remember(memory.student, own, rows, student, momentum),
    _remember(memory.teacher, own, rows, teacher, momentum),
    student_norm,
    teacher_norm,
  )
  return values, remembered


def _check_memory(embeddings: jax.Array, indices: jax.Array, memory: CRDMemory) -> None:
  if not isinstance(memory, CRDMemory):
    raise ValueError(f"memory must be a CRDMemory, as crd_memory makes it; got {type(memory).__name__}")
  if embeddings.ndim != 2:
    raise ValueError(f"student_embeddings and teacher_embeddings must be [batch, width]; got shape {embeddings.shape}")
  if not jnp.issubdtype(indices.dtype, jnp.integer) or indices.ndim != 2 or indices.shape[1] < 2:
    raise ValueError(f"indices must be integers [batch, 1 + negatives]; got {indices.dtype}{list(indices.shape)}")
  check_same("batch", student_embeddings=embeddings.shape[:1], indices=indices.shape[:1])
  check_same("shape", memory_student=memory.student.shape, memory_teacher=memory.teacher.shape)
  check_same("width", student_embeddings=embeddings.shape[1:], memory=memory.student.shape[1:])


def _one_way(
  anchors: jax.Array,
  bank: jax.Array,
  indices: jax.Array,
  norm: jax.Array,
  temperature: jax.Array,
  axis_name: AxisName,
) -> tuple[jax.Array, jax.Array]:
  """The NCE term of anchors against a bank `[batch]`, and Z."""
  scores = jax.lax.stop_gradient(_products(anchors, bank, indices) / temperature)
  of_batch = jnp.exp(jax.nn.logsumexp(scores) + jnp.log(bank.shape[0] / scores.size))
  first = of_batch if axis_name is None else jax.lax.pmean(of_batch, axis_name)
  first = jnp.minimum(first, jnp.finfo(norm.dtype).max).astype(norm.dtype)
  norm = jax.lax.stop_gradient(jnp.where(norm < 0, first, norm))
  return _nce_of_bank(anchors, temperature, scores, norm, bank, indices), norm


@jax.custom_jvp
def _nce_of_bank(anchors, temperature, scores, norm, bank, indices):
  """`_nce` of scores that are known already. Its slopes are taken here and not in the backward pass, which would have
  to keep all rows that were read, or the bank as it was before the write.
  """
  del anchors, temperature, indices
  return _nce(scores - jnp.log(norm), bank.shape[0])


@functools.partial(_nce_of_bank.defjvp, symbolic_zeros=True)
def _nce_of_bank_jvp(primals, tangents):
  anchors, temperature, _, norm, bank, indices = primals
  scores = _products(anchors, bank, indices) / temperature
  values, pullback = jax.vjp(lambda scores: _nce(scores - jnp.log(norm), bank.shape[0]), scores)
  (slopes,) = pullback(jnp.ones_like(values))
  moved = jnp.zeros_like(values)
  if not isinstance(tangents[0], SymbolicZero):
    of_anchors = jax.lax.map(lambda row: jnp.matmul(row[0], _rows(bank, row[1]), precision=_HIGHEST), (slopes, indices))
    values = not_before(values, of_anchors.sum(axis=-1))  # the bank is read before a write that waits for the values
    moved = moved + jnp.sum(of_anchors * tangents[0], axis=-1) / temperature
  if not isinstance(tangents[1], SymbolicZero):
    moved = moved - jnp.sum(slopes * scores, axis=-1) / temperature * tangents[1]
  return values, moved


def _products(anchors: jax.Array, bank: jax.Array, indices: jax.Array) -> jax.Array:
  """Inner products `[batch, 1 + negatives]` with rows of the bank, of which those of one anchor are held at a time."""
  one = lambda row: jnp.matmul(_rows(bank, row[1]), row[0], precision=_HIGHEST)
  return jax.lax.map(one, (anchors, indices))


def _nce(log_scores: jax.Array, num_examples: int) -> jax.Array:
  noise = (log_scores.shape[1] - 1) / num_examples
  total = jnp.logaddexp(log_scores, jnp.log(jnp.asarray(noise + _EPSILON, log_scores.dtype)))
  own, others = log_scores[:, 0] - total[:, 0], jnp.log(noise) - total[:, 1:]
  return -own - others.sum(axis=-1)


def _rows(bank: jax.Array, indices: jax.Array) -> jax.Array:
  return bank.at[indices].get(mode="fill", fill_value=jnp.nan)


def _from_all(local: jax.Array, axis_name: AxisName) -> jax.Array:
  """The rows of every device in order: as a sum, so that they are known to be the same everywhere."""
  if axis_name is None:
    return local
  everywhere = jnp.zeros((jax.lax.psum(1, axis_name), *local.shape), local.dtype)
  mine = everywhere.at[jax.lax.axis_index(axis_name)].set(local)
  return jax.lax.psum(mine.astype(jnp.int32) if local.dtype == bool else mine, axis_name).reshape(-1, *local.shape[1:])


def _rows_to_write(own: jax.Array, finite: jax.Array, num_examples: int) -> jax.Array:
  """The examples' rows; a row that does not exist for those that are not remembered.

  Which of two writes to one row wins is not defined, so only the last occurrence writes. That the rows depend on the
  values has a second effect: the compiler sees that everything is read before anything is written, and copies no bank.
  """
  later = jnp.triu(own[:, None] == own, k=1).any(axis=-1)
  return jnp.where(later | (finite == 0), num_examples, own)


def _remember(
  bank: jax.Array, own: jax.Array, rows: jax.Array, embeddings: jax.Array, momentum: float | jax.Array
) -> jax.Array:
  moved = l2_normalize(momentum * _rows(bank, own) + (1 - momentum) * embeddings)
  return bank.at[rows].set(moved.astype(bank.dtype), mode="drop")


def info_nce(
  student: jax.Array,
  teacher: jax.Array,
  *,
  temperature: float | jax.Array = 0.07,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Cross-entropy of picking the example's own teacher embedding out of the batch.

  Matches each example to its teacher embedding against all others, by cosine; the embeddings need not be normalised.
  A zero row has cosine 0 with everything and gets no gradient. 0 for a batch of one.

    -log(exp(s_i . t_i / T) / sum_j exp(s_i . t_j / T)),   s, t of unit norm

  Args:
    student: `[batch, ...]`, trailing axes flattened.
    teacher: `[batch, ...]`, the same shape.
    temperature: T > 0, dimensionless, may be traced; broadcasts against `[batch]`.
    where: bool `[batch]`, which examples count, as anchors and as candidates.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> print(f"{info_nce(student, teacher)[0]:.4f}")
    0.0000

  Reference: Aaron van den Oord, Yazhe Li and Oriol Vinyals, "Representation Learning with Contrastive Predictive
  Coding", 2018, arXiv 1807.03748. One direction: student anchors among teacher embeddings; swap the arguments for the
  other.
  """
  check_same("shape", student=jnp.shape(student), teacher=jnp.shape(teacher))
  student, teacher = (l2_normalize(flatten(x)) for x in as_examples(where, lead=1, student=student, teacher=teacher))
  (temperature,) = hyper_parameters(student.shape[:1], where, student.dtype, temperature=temperature)
  logits = inner_products(student, all_rows(teacher, axis_name)) / temperature[..., None]
  counts = jnp.ones(student.shape[:1], bool) if where is None else jnp.asarray(where)
  candidates = all_rows(counts, axis_name)
  is_own = positions(len(student), axis_name)[:, None] == jnp.arange(candidates.size)
  own = jnp.where(is_own, logits, 0).sum(axis=-1, keepdims=True)
  others = jnp.where(candidates & ~is_own, logits - own, -jnp.inf)
  return mask(log_one_plus_sum_exp(others), where)  # -log softmax of the own
