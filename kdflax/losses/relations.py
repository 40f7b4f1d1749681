"""Losses on relations between the examples of a batch: `[batch, ...] -> [batch]`, one value per anchor.

An anchor is compared with every example of the global batch. Under `pmap` or `shard_map`, `axis_name` gathers the other
devices' examples; the anchors stay local. Trailing axes are flattened, so widths of student and teacher may differ.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from kdflax.losses.pairs import Pairs, Side, compare
from kdflax.numerics.angles import Sides, angle_sums
from kdflax.numerics.distances import anywhere, squared_distances, sums_of_squared_differences
from kdflax.numerics.examples import AxisName, all_sum, check_range, hyper_parameters, mask
from kdflax.numerics.products import inner_products
from kdflax.numerics.safe import divergence_terms, huber, l2_normalize, safe_divide, safe_sqrt


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

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [0.5], [-1.0]])
    >>> print(f"{similarity_preserving(student, teacher)[0]:.4f}")
    0.6667

  Reference: Frederick Tung and Greg Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv 1907.09682. Rows
  are normalised by L2 as in the paper and its authors' code; torchdistill normalises by L1.
  """
  of_student, of_teacher, pairs = compare(student, teacher, where, axis_name)
  similarity = lambda side: l2_normalize(side.products())
  return pairs.mean_over_batch(jnp.square(similarity(of_student) - similarity(of_teacher)))


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
    epsilon: a number, added to the probabilities inside the logarithm only, may be traced.
    where: bool `[batch]`, which examples count, as anchors and as partners.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors.

  Raises:
    ValueError: if the batches differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [0.5], [-1.0]])
    >>> print(f"{pkt(student, teacher)[0]:.4f}")
    0.1698

  Reference: Nikolaos Passalis and Anastasios Tefas, "Learning Deep Representations with Probabilistic Knowledge
  Transfer", 2018, arXiv 1803.10837. The authors' code adds epsilon to the norms too, and has NaN gradients at a zero
  row.
  """
  of_student, of_teacher, pairs = compare(student, teacher, where, axis_name)
  (epsilon,) = hyper_parameters((), None, of_student.local.dtype, epsilon=epsilon)
  similarities = functools.partial(_half_cosines, pairs=pairs, axis_name=axis_name)
  p, q_minus_p = _shares(similarities(of_student), similarities(of_teacher), jnp.maximum(pairs.counted, 1))
  return pairs.mean_over_batch(divergence_terms(p, q_minus_p, epsilon))


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
  Gaussian kernel, whose Taylor series assumes unit norms. The bilinear value is of the fourth degree in the features,
  the Gaussian one of degree `4 order`: in float32 that holds up to 1e9, or 1e4 at order 2, and from 1e-8 on.

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
    ValueError: if the batches differ, an input is not floating, `where` does not fit, `gamma` is not a number, or
      `kernel` or `order` is not one of those allowed.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [0.5], [-1.0]])
    >>> print(f"{correlation_congruence(student, teacher)[0]:.4f}")
    0.1878

  Reference: Baoyun Peng, Xiao Jin, Jiaheng Liu, Shunfeng Zhou, Yichao Wu, Yu Liu, Dongsheng Li and Zhaoning Zhang,
  "Correlation Congruence for Knowledge Distillation", 2019, arXiv 1904.01802. Squared as in the paper; torchdistill has
  the root of the sum over B^2, and RepDistiller's file of that name another loss altogether.
  """
  if kernel not in ("gaussian", "bilinear"):
    raise ValueError(f'kernel must be "gaussian" or "bilinear"; got {kernel!r}')
  if not isinstance(order, int) or order < 0:
    raise ValueError(f"order must be a whole number, at least 0; got {order!r}")
  of_student, of_teacher, pairs = compare(student, teacher, where, axis_name)

  (gamma,) = hyper_parameters((), None, of_student.local.dtype, gamma=gamma)

  def correlations(side: Side) -> jax.Array:
    products = side.products()
    if kernel == "bilinear":
      return products
    series = jnp.zeros_like(products)
    for r in range(order, 0, -1):  # Horner's scheme, without the 1 that the difference would cancel
      series = 2 * gamma / r * products * (1 + series)
    return jnp.exp(-2 * gamma) * series

  return pairs.mean_over_batch(jnp.square(correlations(of_student) - correlations(of_teacher)))


def rkd_distance(
  student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None, axis_name: AxisName = None
) -> jax.Array:
  """Huber loss between the pairwise distances, each over its batch mean.

  Matches the geometry of the batch up to translation, rotation and scale. 0 for a batch of two; a collapsed batch (all
  rows equal) has all distances 0. A distance of 0 has derivative 0.

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

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [0.5], [-1.0]])
    >>> print(f"{rkd_distance(student, teacher)[0]:.4f}")
    0.3110

  Reference: Wonpyo Park, Dongju Kim, Yan Lu and Minsu Cho, "Relational Knowledge Distillation", 2019, arXiv 1904.05068.
  As in the authors' code, the gradient flows through the student's mean distance. Equal rows count in that mean at
  distance 0, where some implementations drop them.
  """
  of_student, of_teacher, pairs = compare(student, teacher, where, axis_name)

  def relative(side: Side) -> jax.Array:
    distance = safe_sqrt(_squared_distances(side, pairs, axis_name))
    mean = all_sum(distance.sum(), axis_name) / jnp.maximum(pairs.counted * (pairs.counted - 1), 1)
    return safe_divide(distance, mean)

  return pairs.mean_over_batch(huber(relative(of_student) - relative(of_teacher)))


def _half_cosines(side: Side, pairs: Pairs, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
  """`k = (cos + 1) / 2` and `1 - k`, `[b, B]`; 1/2 both with a zero row.

  `1 - k` comes from distances of unit vectors: a common offset, which takes all k close to 1, costs no digits.
  """
  nonzero = side.map(lambda features: features.any(axis=-1))
  known = pairs.valid & nonzero.local[:, None] & nonzero.everyone
  units = side.map(l2_normalize)
  apart = _squared_distances(units, pairs, axis_name) / 4
  opposed = known & (apart > 1 - 1 / 256)  # where k is the quarter of the squared length of a sum of unit vectors
  of_sums = lambda: sums_of_squared_differences(units.local, -units.everyone, apart) / 4
  alike = jax.lax.cond(anywhere(opposed), lambda: jnp.where(opposed, of_sums(), 1 - apart), lambda: 1 - apart)
  unknown = jnp.where(pairs.valid, 0.5, 0)
  return jnp.where(known, alike, unknown), jnp.where(known, apart, unknown)


def _shares(
  student: tuple[jax.Array, jax.Array], teacher: tuple[jax.Array, jax.Array], counted: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`p = k_t / sum k_t`, and `q - p` with its digits for `q = k_s / sum k_s`, from (k, 1 - k) of both."""
  (student_k, student_rest), (teacher_k, teacher_rest) = student, teacher
  total = lambda rest: counted - rest.sum(axis=-1, keepdims=True)
  p = teacher_k / total(teacher_rest)
  # Of k and 1 - k the smaller has the digits of the difference.
  less_alike = jnp.where((student_k < 0.5) & (teacher_k < 0.5), teacher_k - student_k, student_rest - teacher_rest)
  return p, (p * less_alike.sum(axis=-1, keepdims=True) - less_alike) / total(student_rest)


def _squared_distances(side: Side, pairs: Pairs, axis_name: AxisName) -> jax.Array:
  """Squared Euclidean distances `[b, B]` of the anchors to the batch, 0 where the two are not distinct."""
  squared, _ = squared_distances(*side, _mean(side, pairs, axis_name), pairs.distinct)
  return squared


def _mean(side: Side, pairs: Pairs, axis_name: AxisName) -> jax.Array:
  """Mean of the batch `[width]`; masked rows are zeros."""
  return all_sum(side.local.sum(0), axis_name) / jnp.maximum(pairs.counted, 1)


def rkd_angle(
  student: jax.Array,
  teacher: jax.Array,
  *,
  chunk: int | None = None,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Huber loss between the angles that pairs of examples make at an anchor.

  Matches the geometry of the batch up to translation, rotation and scale. 0 for a batch of two. An angle with a side
  of length 0 has cosine 0, with derivative 0.

    mean_jk huber(cos_s - cos_t)_ijk,   cos_ijk = <f_j - f_i, f_k - f_i> / (||f_j - f_i|| ||f_k - f_i||)

  Every angle follows from the Gram matrix, so the time is O(B^3 + B^2 width) and the memory O(chunk B^2), whatever
  the width. The derivative is in closed form: of all that it needs, only the movement of the Gram matrix takes a second
  pass over the angles, and that over half of them. Forward mode and higher derivatives work.

  Where a distinct row is closer to an anchor than about a twentieth of their length, after centring, the Gram matrix
  has lost the digits of the angle. Those anchors take differences row by row, O(B^2 width) for each.

  Args:
    student: `[batch, ...]`, trailing axes flattened.
    teacher: `[batch, ...]`, any width.
    chunk: examples j worked on at a time, for all anchors, static. None is 1 on a CPU, where that is fastest, and 16
      elsewhere.
    where: bool `[batch]`, which examples count, at all three corners.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors: the mean over all B * B pairs (j, k), degenerate ones at 0.

  Raises:
    ValueError: if the batches differ, an input is not floating, `where` does not fit, or `chunk` is not positive.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [0.5], [-1.0]])
    >>> print(f"{rkd_angle(student, teacher)[0]:.4f}")
    0.0012

  Reference: Wonpyo Park, Dongju Kim, Yan Lu and Minsu Cho, "Relational Knowledge Distillation", 2019, arXiv 1904.05068.
  """
  if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
    raise ValueError(f"chunk must be a positive int; got {chunk!r}")
  of_student, of_teacher, pairs = compare(student, teacher, where, axis_name)
  if not pairs.present.size:
    return of_student.local.sum(axis=1)  # of no example, over which no loop can run
  sides, close = zip(*(_sides(side, pairs, axis_name) for side in (of_student, of_teacher)), strict=True)
  by = lambda size: functools.partial(angle_sums, size)
  total = by(chunk)(*sides) if chunk else jax.lax.platform_dependent(*sides, cpu=by(1), default=by(16))
  total = _again_if_close(total, close[0] | close[1], of_student.everyone, of_teacher.everyone, pairs)
  return mask(total / jnp.maximum(pairs.counted, 1) ** 2, where)


def _sides(side: Side, pairs: Pairs, axis_name: AxisName) -> tuple[Sides, jax.Array]:
  """The sides of the angles, and which anchors have a row so close that their angles lose digits."""
  distinct = pairs.present[:, None] & pairs.present & ~jnp.eye(pairs.present.size, dtype=bool)
  squared, scale = squared_distances(side.everyone, side.everyone, _mean(side, pairs, axis_name), distinct)
  close = (squared > 0) & (squared < scale / 1024)
  length = safe_sqrt(squared)[:, pairs.anchors]
  sides = Sides(safe_divide(jnp.ones_like(length), length), length / 2, -squared / 2)
  return sides, close.any(axis=0)[pairs.anchors]


def _again_if_close(
  sums: jax.Array, close: jax.Array, student: jax.Array, teacher: jax.Array, pairs: Pairs
) -> jax.Array:
  """Sums over the angles `[b]`, taken from the rows themselves at the anchors that are too close to another row."""

  def by_differences(anchor):
    units = (l2_normalize(jnp.where(pairs.present[:, None], x - x[anchor], 0)) for x in (student, teacher))
    student_cosines, teacher_cosines = (inner_products(unit, unit) for unit in units)
    return huber(student_cosines - teacher_cosines).sum()

  @jax.checkpoint
  def of_anchor(row):
    anchor, too_close, by_gram = row
    return jax.lax.cond(anywhere(too_close), lambda: by_differences(anchor), lambda: by_gram)

  again = lambda: jax.lax.map(of_anchor, (pairs.anchors, close, sums))
  return jax.lax.cond(anywhere(close), again, lambda: sums)


def direction(
  student: jax.Array,
  teacher: jax.Array,
  *,
  ridge: float | jax.Array = 0.1,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Length of the difference of the similarities, measured by how these differences vary over the batch.

  Matches which examples activate alike, by the cosines between them, and divides an error by its spread among the
  anchors: what all anchors share counts as much as what is rare. A norm, so its gradient does not shrink near 0, and
  is 0 at 0. A zero row has cosine 0 with everything and gets no gradient.

    sqrt(d_i' C^-1 d_i),   d_i = row i of G_s - G_t,   G_ij = cos(f_i, f_j),   C = cov(d) + ridge I

  Args:
    student: `[batch, ...]`, logits or features, trailing axes flattened.
    teacher: `[batch, ...]`, any width.
    ridge: a number above 0, in units of the squared difference, may be traced.
    where: bool `[batch]`, which examples count, as anchors and as partners.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors. The gradient flows through C, whose covariance has n - 1 in the
    denominator; the time is O(B^3).

  Raises:
    ValueError: if the batches differ, an input is not floating, `where` does not fit, or `ridge` is not a number above
      0.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> print(f"{direction(student, teacher)[0]:.4f}")
    1.7078

  Reference: Yoshitomo Matsubara, "torchdistill: A Modular, Configuration-Driven Framework for Knowledge Distillation",
  2020, arXiv 2011.12913, whose version 1.1.5 has it as `SKDDirectionLoss`. This is the formula it goes back to: the
  code divides the Gram matrices by the number of classes, which makes the ridge larger by the square of that.
  """
  check_range("ridge", ridge, "above 0", lambda value: value > 0)
  of_student, of_teacher, pairs = compare(student, teacher, where, axis_name)
  (ridge,) = hyper_parameters((), None, of_student.local.dtype, ridge=ridge)
  if not pairs.present.size:
    return of_student.local.sum(axis=1)  # of no example
  similarity = lambda side: jnp.where(pairs.valid, side.map(l2_normalize).products(), 0)
  differences = similarity(of_student) - similarity(of_teacher)
  mean = all_sum(differences.sum(axis=0), axis_name) / jnp.maximum(pairs.counted, 1)
  centred = jnp.where(pairs.present[pairs.anchors, None], differences - mean, 0)
  covariance = all_sum(inner_products(centred.T, centred.T), axis_name) / jnp.maximum(pairs.counted - 1, 1)
  factor = jnp.linalg.cholesky(covariance + ridge * jnp.eye(len(covariance), dtype=covariance.dtype))
  whitened = jax.scipy.linalg.solve_triangular(factor, differences.T, lower=True)
  return mask(safe_sqrt(jnp.square(whitened).sum(axis=0)), where)
