"""Contrastive losses on embeddings: `[batch, width] -> [batch]`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdflax.losses._examples import AxisName, all_rows, as_examples, check_same, mask
from kdflax.losses._numerics import inner_products, l2_normalize

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
  """
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
) -> tuple[jax.Array, CRDMemory]:
  """Noise-contrastive estimation between each model's embedding and the other's memory.

  Tells an example's own entry in the other model's memory from the entries of other examples, in both directions:
  maximises a bound on the mutual information of the embeddings. Never 0.

    -log h_0 - sum_{j >= 1} log(1 - h_j),   h_j = P_j / (P_j + m / n),   P_j = exp(v . memory[indices_j] / T) / Z

  summed over student anchors against the teacher's bank and the reverse; m negatives, n rows in the bank, and 1e-7
  added to both denominators. Z is set at the first call to `n mean(exp(...))`, without gradient, and kept from then on.
  After the scores the rows of the examples themselves become `momentum * row + (1 - momentum) * v`, renormalised.

  Donate the memory to the jitted step (`donate_argnums`) and its banks are updated in place: time and further memory do
  not depend on n. The returned memory carries no gradient.

  Args:
    student_embeddings: `[batch, width]` of unit norm.
    teacher_embeddings: `[batch, width]` of unit norm; gets a gradient, since its embedding layer learns too.
    indices: integer `[batch, 1 + negatives]`, rows of the memory, the example's own first. Out of range they cannot be
      refused once traced: scores are then NaN and nothing is written.
    memory: from `crd_memory` or the last call.
    temperature: T > 0, dimensionless, may be traced.
    momentum: share of the old row that stays, may be traced.

  Returns:
    `[batch]` in float32 or wider, and the memory after this batch. If an example comes twice in a batch, its last
    occurrence is the one that is remembered; one whose value is not finite is not.

  Raises:
    ValueError: if shapes do not fit each other or an input has the wrong kind of dtype.

  Reference: Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, arXiv 1910.10699. Negatives are
  the caller's choice; the authors' code draws them from other classes. There is no `where`, since a masked example
  would still have to be kept out of Z and of the memory; leave it out of the batch.
  """
  check_same(
    "shape", student_embeddings=jnp.shape(student_embeddings), teacher_embeddings=jnp.shape(teacher_embeddings)
  )
  student, teacher = as_examples(
    None, lead=1, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings
  )
  indices = jnp.asarray(indices)
  _check_memory(student, indices, memory)
  own = indices[:, 0]
  student_scores, student_norm = _scores(
    student, _rows(memory.teacher, indices), memory.student_norm, memory, temperature
  )
  teacher_scores, teacher_norm = _scores(
    teacher, _rows(memory.student, indices), memory.teacher_norm, memory, temperature
  )
  values = _nce(student_scores, memory) + _nce(teacher_scores, memory)
  # Stopped before the write: its derivative would be one more array of the size of the banks.
  student, teacher, memory = jax.lax.stop_gradient((student, teacher, memory))
  rows = _rows_to_write(own, values, memory)
  after = CRDMemory(
    _remember(memory.student, own, rows, student, momentum),
    _remember(memory.teacher, own, rows, teacher, momentum),
    student_norm,
    teacher_norm,
  )
  return values, after


def _check_memory(embeddings: jax.Array, indices: jax.Array, memory: CRDMemory) -> None:
  if not jnp.issubdtype(indices.dtype, jnp.integer) or indices.ndim != 2 or indices.shape[1] < 2:
    raise ValueError(f"indices must be integers [batch, 1 + negatives]; got {indices.dtype}{list(indices.shape)}")
  check_same("batch", student_embeddings=embeddings.shape[:1], indices=indices.shape[:1])
  check_same("shape", memory_student=memory.student.shape, memory_teacher=memory.teacher.shape)
  check_same("width", student_embeddings=embeddings.shape[1:], memory=memory.student.shape[1:])


def _scores(
  anchors: jax.Array, entries: jax.Array, norm: jax.Array, memory: CRDMemory, temperature: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`exp(v . entry / T) / Z` `[batch, 1 + negatives]`, and Z."""
  products = jnp.einsum("bd,bnd->bn", anchors, entries, precision=jax.lax.Precision.HIGHEST)
  scores = jnp.exp(products / jnp.asarray(temperature, products.dtype))
  first = scores.mean() * memory.student.shape[0]
  norm = jax.lax.stop_gradient(jnp.where(norm < 0, first.astype(norm.dtype), norm))
  return scores / norm, norm


def _nce(scores: jax.Array, memory: CRDMemory) -> jax.Array:
  noise = (scores.shape[1] - 1) / memory.student.shape[0]
  own, others = scores[:, 0], scores[:, 1:]
  return -jnp.log(own / (own + noise + _EPSILON)) - jnp.log(noise / (others + noise + _EPSILON)).sum(axis=-1)


def _rows(bank: jax.Array, indices: jax.Array) -> jax.Array:
  return bank.at[indices].get(mode="fill", fill_value=jnp.nan)


def _rows_to_write(own: jax.Array, values: jax.Array, memory: CRDMemory) -> jax.Array:
  """The examples' rows; a row that does not exist for those that are not remembered.

  Which of two writes to one row wins is not defined, so only the last occurrence writes. That the rows depend on the
  values has a second effect: the compiler sees that everything is read before anything is written, and copies no bank.
  """
  later = jnp.triu(own[:, None] == own, k=1).any(axis=-1)
  return jnp.where(later | ~jnp.isfinite(values), memory.student.shape[0], own)


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
    temperature: T > 0, dimensionless, may be traced.
    where: bool `[batch]`, which examples count, as anchors and as candidates.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Reference: van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
  arXiv 1807.03748. One direction: student anchors among teacher embeddings; swap the arguments for the other.
  """
  check_same("shape", student=jnp.shape(student), teacher=jnp.shape(teacher))
  student, teacher = (
    l2_normalize(x.reshape(x.shape[0], -1)) for x in as_examples(where, lead=1, student=student, teacher=teacher)
  )
  logits = inner_products(student, all_rows(teacher, axis_name)) / jnp.asarray(temperature, student.dtype)
  counts = jnp.ones(student.shape[:1], bool) if where is None else jnp.asarray(where)
  candidates = all_rows(counts, axis_name)
  own = jnp.sum(student * teacher, axis=-1) / jnp.asarray(temperature, student.dtype)
  # Where nobody counts the sum would be empty, and its logarithm without a derivative.
  logits = jnp.where(candidates | ~candidates.any(), logits, -jnp.inf)
  return mask(jax.nn.logsumexp(logits, axis=-1) - own, where)
