"""Losses on relations between the examples of a batch: `[batch, ...] -> [batch]`, one value per anchor.

An anchor is compared with every example of the global batch. Under `pmap` or `shard_map`, `axis_name` gathers the other
devices' examples; the anchors stay local. Trailing axes are flattened, so widths of student and teacher may differ.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero

from kdflax.losses._examples import AxisName, all_rows, all_sum, as_examples, mask
from kdflax.losses._numerics import inner_products, l2_normalize, safe_divide, safe_sqrt


class _Rows(NamedTuple):
  """Features of the local anchors and of the whole batch."""

  local: jax.Array  # [b, width]
  everyone: jax.Array  # [B, width]: the same array where the whole batch is local

  def map(self, function: Callable[[jax.Array], jax.Array]) -> "_Rows":
    """Applies a function to the features, once where both are the same."""
    local = function(self.local)
    return _Rows(local, local if self.everyone is self.local else function(self.everyone))

  def products(self) -> jax.Array:
    """Inner products `[b, B]` of the anchors with the batch."""
    return inner_products(self.local, self.everyone)


class _Pairs(NamedTuple):
  """Which of the pairs (local anchor, example of the batch) exist."""

  anchors: jax.Array  # int [b]: positions of the local anchors in the whole batch
  valid: jax.Array  # bool [b, B]: neither is masked
  distinct: jax.Array  # bool [b, B]: valid, and not the same example
  counted: jax.Array  # scalar: examples of the whole batch that count

  def mean_over_batch(self, values: jax.Array) -> jax.Array:
    """`[b, B] -> [b]`: mean over the examples that count; 0 for a masked anchor."""
    return jnp.where(self.valid, values, 0).sum(axis=-1) / jnp.maximum(self.counted, 1)


def _batch(
  student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: AxisName
) -> tuple[_Rows, _Rows, _Pairs]:
  student, teacher = (x.reshape(x.shape[0], -1) for x in as_examples(where, lead=1, student=student, teacher=teacher))
  local = jnp.ones(student.shape[:1], bool) if where is None else jnp.asarray(where)
  everyone = all_rows(local, axis_name)
  first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local.size
  anchors = first + jnp.arange(local.size)
  valid = local[:, None] & everyone
  distinct = valid & (anchors[:, None] != jnp.arange(everyone.size))
  pairs = _Pairs(anchors, valid, distinct, everyone.sum().astype(student.dtype))
  return _Rows(student, all_rows(student, axis_name)), _Rows(teacher, all_rows(teacher, axis_name)), pairs


def similarity_preserving(
  student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None, axis_name: AxisName = None
) -> jax.Array:
  """Squared difference of the row-normalised similarity matrices.

  Matches which examples activate alike, up to a factor for each anchor; not invariant to a common offset of the
  features. A zero row stays zero and gets no gradient.

    mean_j (G_s - G_t)_ij^2,   G = rows of F F' divided by their L2 norm

  Args:
    student: `[batch, ...]`, trailing axes flattened.
    teacher: `[batch, ...]`, any width.
    where: bool `[batch]`, which examples count, as anchors and as partners.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors.

  Raises:
    ValueError: if the batches differ, an input is not floating, or `where` does not fit.

  Reference: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv 1907.09682. Rows are
  normalised by L2 as in the paper and its authors' code; torchdistill normalises by L1.
  """
  student_rows, teacher_rows, pairs = _batch(student, teacher, where, axis_name)
  similarity = lambda rows: l2_normalize(rows.products())
  return pairs.mean_over_batch(jnp.square(similarity(student_rows) - similarity(teacher_rows)))


def pkt(
  student: jax.Array,
  teacher: jax.Array,
  *,
  epsilon: float | jax.Array = 1e-7,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Divergence between the distributions over the batch that cosine similarity gives each anchor.

  Matches which examples are close in direction; invariant to the length of the features and to rotation, not to a
  common offset. A zero row has cosine 0 with every example and gets no gradient.

    mean_j p_ij log((p_ij + epsilon) / (q_ij + epsilon)),   p_ij = k_ij / sum_j k_ij,   k_ij = (cos(f_i, f_j) + 1) / 2

  q is the student's and p the teacher's; the example itself is one of the j.

  Args:
    student: `[batch, ...]`, trailing axes flattened.
    teacher: `[batch, ...]`, any width.
    epsilon: added to the probabilities inside the logarithm only, may be traced.
    where: bool `[batch]`, which examples count, as anchors and as partners.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors.

  Raises:
    ValueError: if the batches differ, an input is not floating, or `where` does not fit.

  Reference: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018,
  arXiv 1803.10837. The authors' code adds epsilon to the norms too, and has NaN gradients at a zero row.
  """
  student_rows, teacher_rows, pairs = _batch(student, teacher, where, axis_name)

  def probabilities(rows: _Rows) -> jax.Array:
    cosine = rows.map(l2_normalize).products()
    # Rounding may take a cosine below -1, where the cosine is stationary.
    similarity = jnp.where(pairs.valid & (cosine > -1), (cosine + 1) / 2, 0)
    return safe_divide(similarity, similarity.sum(axis=-1, keepdims=True))

  q, p = probabilities(student_rows), probabilities(teacher_rows)
  # p log(p / q) = p (w - log(1 + w)) + (p - q) with w = q / p - 1, and sum_j (p - q) = 0: without that term, which is
  # larger than the result where student and teacher are close, the sum keeps its digits.
  change = (q - p) / (p + epsilon)
  return pairs.mean_over_batch((p + epsilon) * (change - jnp.log1p(change)) + epsilon * jnp.log1p(change))


def correlation_congruence(
  student: jax.Array,
  teacher: jax.Array,
  *,
  kernel: Literal["gaussian", "bilinear"] = "gaussian",
  gamma: float | jax.Array = 0.4,
  order: int = 2,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Squared difference of the kernel matrices of the batch.

  Matches how examples correlate, in absolute terms: rows are used as given, so L2-normalise them first for the paper's
  Gaussian kernel, whose Taylor series assumes unit norms.

    mean_j (C_s - C_t)_ij^2,   C_ij = e^(-2 gamma) sum_{r <= order} (2 gamma f_i . f_j)^r / r!   or   C_ij = f_i . f_j

  Args:
    student: `[batch, ...]`, trailing axes flattened.
    teacher: `[batch, ...]`, any width.
    kernel: "gaussian" (its Taylor series) or "bilinear", static.
    gamma: inverse squared length of the Gaussian, may be traced.
    order: of the series, static.
    where: bool `[batch]`, which examples count, as anchors and as partners.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors.

  Raises:
    ValueError: if the batches differ, an input is not floating, `where` does not fit, or the kernel is unknown.

  Reference: Peng et al., "Correlation Congruence for Knowledge Distillation", 2019, arXiv 1904.01802. Squared as in the
  paper; torchdistill has the root of the sum over B^2, and RepDistiller's file of that name another loss altogether.
  """
  if kernel not in ("gaussian", "bilinear"):
    raise ValueError(f'kernel must be "gaussian" or "bilinear"; got {kernel!r}')
  student_rows, teacher_rows, pairs = _batch(student, teacher, where, axis_name)

  def correlations(rows: _Rows) -> jax.Array:
    products = rows.products()
    if kernel == "bilinear":
      return products
    series = jnp.ones_like(products)
    for r in range(order, 0, -1):  # Horner's scheme
      series = 1 + 2 * gamma / r * products * series
    return jnp.exp(-2 * jnp.asarray(gamma, products.dtype)) * series

  return pairs.mean_over_batch(jnp.square(correlations(student_rows) - correlations(teacher_rows)))


def rkd_distance(
  student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None, axis_name: AxisName = None
) -> jax.Array:
  """Huber loss between the pairwise distances, each over its batch mean.

  Matches the geometry of the batch up to translation, rotation and scale. 0 for a batch of two; a collapsed batch (all
  rows equal) has all distances 0. Distances below the rounding error of their rows count as 0, with derivative 0.

    mean_j huber(d_s / mean d_s - d_t / mean d_t)_ij,   d_ij = ||f_i - f_j||_2, the mean over all ordered pairs i != j

  Args:
    student: `[batch, ...]`, trailing axes flattened.
    teacher: `[batch, ...]`, any width.
    where: bool `[batch]`, which examples count, as anchors and as partners.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors: the mean over all B columns, the diagonal being 0.

  Raises:
    ValueError: if the batches differ, an input is not floating, or `where` does not fit.

  Reference: Park, Kim, Lu and Cho, "Relational Knowledge Distillation", 2019, arXiv 1904.05068. As in the authors'
  code, the gradient flows through the student's mean distance. Equal rows count in that mean at distance 0, where
  some implementations drop them.
  """
  student_rows, teacher_rows, pairs = _batch(student, teacher, where, axis_name)

  def relative(rows: _Rows) -> jax.Array:
    distance = jnp.where(pairs.distinct, _distances(_centre(rows, pairs, axis_name), pairs, axis_name), 0)
    mean = all_sum(distance.sum(), axis_name) / jnp.maximum(pairs.counted * (pairs.counted - 1), 1)
    return safe_divide(distance, mean)

  return pairs.mean_over_batch(optax.huber_loss(relative(student_rows), relative(teacher_rows)))


def _centre(rows: _Rows, pairs: _Pairs, axis_name: AxisName) -> _Rows:
  """Moves the mean of the batch to the origin, so that a common offset costs no digits in a Gram matrix."""
  mean = all_sum(rows.local.sum(0), axis_name) / jnp.maximum(pairs.counted, 1)
  return rows.map(lambda features: features - mean)


def _distances(rows: _Rows, pairs: _Pairs, axis_name: AxisName) -> jax.Array:
  """Euclidean distances `[b, B]`."""
  gram = rows.products()
  # The norms come from the same product, summed in the same order: for equal rows the difference is exactly 0.
  own = jnp.take_along_axis(gram, pairs.anchors[:, None], axis=1)
  scale = own + all_rows(own[:, 0], axis_name)
  return _resolved_sqrt(scale - 2 * gram, scale)


def _resolved_sqrt(squared: jax.Array, scale: jax.Array) -> jax.Array:
  """Root of a squared distance that was taken as a difference of terms of size `scale`.

  Below the rounding error of that difference the distance is 0: equal rows come out at 0, not at the root of an error.
  """
  return safe_sqrt(jnp.where(squared > 16 * jnp.finfo(squared.dtype).eps * scale, squared, 0))


def rkd_angle(
  student: jax.Array,
  teacher: jax.Array,
  *,
  chunk: int = 4,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Huber loss between the angles that pairs of examples make at an anchor.

  Matches the geometry of the batch up to translation, rotation and scale. 0 for a batch of two. An angle with a side
  of length 0 has cosine 0, with derivative 0.

    mean_jk huber(cos_s - cos_t)_ijk,   cos_ijk = <f_j - f_i, f_k - f_i> / (||f_j - f_i|| ||f_k - f_i||)

  Every angle follows from the Gram matrix, so the time is O(B^3 + B^2 width) and the memory O(chunk B^2), whatever
  the width. The derivative is in closed form; forward mode and higher derivatives work.

  Args:
    student: `[batch, ...]`, trailing axes flattened.
    teacher: `[batch, ...]`, any width.
    chunk: examples j worked on at a time, for all anchors, static: memory against speed.
    where: bool `[batch]`, which examples count, at all three corners.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors: the mean over all B * B pairs (j, k), degenerate ones at 0.

  Raises:
    ValueError: if the batches differ, an input is not floating, or `where` does not fit.

  Reference: Park, Kim, Lu and Cho, "Relational Knowledge Distillation", 2019, arXiv 1904.05068.
  """
  student_rows, teacher_rows, pairs = _batch(student, teacher, where, axis_name)
  student_sides, teacher_sides = (_sides(rows, pairs, axis_name) for rows in (student_rows, teacher_rows))
  total = _angle_sums(chunk, student_sides, teacher_sides)
  return mask(total / jnp.maximum(pairs.counted, 1) ** 2, where)


class _Sides(NamedTuple):
  """What the angles at the anchors i need to know of the examples j; `cos_ijk` is

  `inverse_ji (gram_jk inverse_ki + shift_ki) + shift_ji inverse_ki`.
  """

  inverse: jax.Array  # [B, b]: 1 / ||f_j - f_i||, 0 where the side does not exist or has length 0
  shift: jax.Array  # [B, b]: inverse (G_ii / 2 - G_ij)
  gram: jax.Array  # [B, B]


def _sides(rows: _Rows, pairs: _Pairs, axis_name: AxisName) -> _Sides:
  everyone = _centre(rows, pairs, axis_name).everyone
  gram = inner_products(everyone, everyone)
  norms, between = jnp.diagonal(gram), gram[:, pairs.anchors]
  own = norms[pairs.anchors]
  scale = norms[:, None] + own
  length = _resolved_sqrt(jnp.where(pairs.distinct.T, scale - 2 * between, 0), scale)
  inverse = safe_divide(jnp.ones_like(length), length)
  return _Sides(inverse, inverse * (own / 2 - between), gram)


def _cosines(one: _Sides, sides: _Sides) -> jax.Array:
  """Cosines `[B, b]` at the anchors between their sides to one example (a row of `sides`) and to every other."""
  return one.inverse * (one.gram[:, None] * sides.inverse + sides.shift) + one.shift * sides.inverse


def _sum_angles(chunk: int, student: _Sides, teacher: _Sides) -> jax.Array:
  """`sum_jk huber(cos_s - cos_t)_ijk` for each anchor."""

  def with_one(rows):
    return optax.huber_loss(_cosines(rows[0], student), _cosines(rows[1], teacher)).sum(axis=0)

  return jax.lax.map(with_one, (student, teacher), batch_size=chunk).sum(axis=0)


_angle_sums = jax.custom_jvp(_sum_angles, nondiff_argnums=(0,))


@functools.partial(_angle_sums.defjvp, symbolic_zeros=True)
def _angle_sums_jvp(chunk, primals, tangents):
  student, teacher = primals

  # Recomputing the angles in the backward pass is what keeps all [B, B, b] of them out of memory.
  @jax.checkpoint
  def with_one(rows):
    student_row, teacher_row, *row_tangents = rows
    difference = _cosines(student_row, student) - _cosines(teacher_row, teacher)
    slope = jnp.clip(difference, -1, 1)
    moved = [_moved(slope, *of_model) for of_model in zip(rows[:2], primals, row_tangents, strict=True)]
    return moved[0] - moved[1]

  tangents = [None if isinstance(t.gram, SymbolicZero) else t for t in tangents]
  moved = jax.lax.map(with_one, (student, teacher, *tangents), batch_size=chunk)
  return _angle_sums(chunk, student, teacher), moved.sum(axis=0)


def _moved(slope: jax.Array, one: _Sides, sides: _Sides, tangent: _Sides | None) -> jax.Array | float:
  """`sum_k slope_ki dcos_ijk` `[b]` for one example j, with the movement of k's sides counted at j's.

  An angle is the same from j to k as from k to j, so over all pairs the sides of both move it equally.
  """
  if tangent is None:
    return 0.0
  weight = slope * sides.inverse
  of_inverse = (one.gram[:, None] * weight + slope * sides.shift).sum(axis=0)
  of_sides = tangent.inverse * of_inverse + tangent.shift * weight.sum(axis=0)
  return 2 * of_sides + one.inverse * jnp.matmul(tangent.gram, weight, precision=jax.lax.Precision.HIGHEST)
