"""Losses on products of feature maps: Gram matrices of channels, of two layers, and their singular vectors."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from kdflax.losses.maps import check_channels, check_maps, in_a_row, map_pair
from kdflax.numerics.examples import as_features, examples_of, mask, positions_counted
from kdflax.numerics.pooling import pool_to_common_size
from kdflax.numerics.products import gram_difference
from kdflax.numerics.safe import l2_normalize, not_before, safe_divide

_product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def fsp(
  student_first: jax.Array,
  student_last: jax.Array,
  teacher_first: jax.Array,
  teacher_last: jax.Array,
  *,
  where: jax.Array | None = None,
) -> jax.Array:
  """Mean squared difference of the flow of the solution procedure between two layers.

  Matches how the channels of an early layer go with those of a later one, averaged over positions: channels must agree
  between student and teacher, sizes need not. Within a model the larger map is adaptive-average-pooled to the smaller.
  The value is of the fourth degree in the features: in float32 that holds for features of 1e-8 to 1e9.

    mean_cd (G_s - G_t)_cd^2,   G_cd = mean_n first_nc last_nd

  Args:
    student_first: `[batch, ..., first channels]`.
    student_last: `[batch, ..., last channels]`, as many axes.
    teacher_first: `[batch, ..., first channels]`.
    teacher_last: `[batch, ..., last channels]`.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the batches, the numbers of axes or the channels differ, an input is not floating, or `where` does
      not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [2.0, 1.0]]]), jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    >>> print(f"{fsp(student, student, teacher, teacher)[0]:.4f}")
    1.1875

  Reference: Junho Yim, Donggyu Joo, Jihoon Bae and Junmo Kim, "A Gift from Knowledge Distillation: Fast Optimization,
  Network Minimization and Transfer Learning", CVPR 2017, not on arXiv. The paper max-pools the larger map, as
  torchdistill does; this averages, as RepDistiller does.
  """
  student, teacher = _layer_pairs(where, student_first, student_last, teacher_first, teacher_last)

  (student_first, student_last), (teacher_first, teacher_last) = (
    [in_a_row(features) for features in pool_to_common_size(*layers)] for layers in (student, teacher)
  )

  def flow(block, last):
    counted = positions_counted(where, last.shape[1], last.dtype)
    return _product("bnc,bnd->bcd", block, last) / counted.reshape(-1, 1, 1)

  def distance(student_block, teacher_block):
    return jnp.square(flow(student_block, student_last) - flow(teacher_block, teacher_last)).sum(axis=(1, 2))

  channels = student_last.shape[-1]
  total = _sum_over_channels(distance, (student_first, teacher_first), _size(*student, *teacher) // (2 * channels))
  return mask(total / (student_first.shape[-1] * channels), examples_of(where))


def nst(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
  """Squared maximum mean discrepancy between the two sets of channel patterns.

  Matches the distribution of what the channels respond to, with the polynomial kernel of order 2: widths may differ,
  and the larger map is adaptive-average-pooled to the smaller. 0 also where the channels are permuted or change sign. A
  zero channel stays zero and gets no gradient.

    mean_cc' (a_c . a_c')^2 + mean_dd' (b_d . b_d')^2 - 2 mean_cd (a_c . b_d)^2,   a, b channels of L2 norm 1

  The means are squared norms of Gram matrices over channels or over positions, whichever is less work; nothing larger
  than such a matrix is held.

  Args:
    student: `[batch, ..., channels]`, for images `[batch, height, width, channels]`.
    teacher: `[batch, ..., channels]`, as many axes.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the batch or the number of axes differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [2.0, 1.0]]]), jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    >>> print(f"{nst(student, teacher)[0]:.4f}")
    0.0500

  Reference: Zehao Huang and Naiyan Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
  arXiv 1707.01219. Common implementations hold an array of batch x channels x channels x positions.
  """
  student, teacher = (l2_normalize(in_a_row(f), axis=1) for f in map_pair(student, teacher, where))
  (_, positions, s), (_, _, t) = student.shape, teacher.shape
  if positions * (s + t) <= s * s + t * t + s * t:
    # The mean of (a . b)^2 is the inner product of the mean outer products, so the three terms are one square. Channels
    # of zero, which add nothing to an outer product, make the widths equal.
    share = lambda unit, width: jnp.pad(unit / math.sqrt(width), ((0, 0), (0, 0), (0, max(s, t) - width)))
    outer_difference = jax.vmap(gram_difference)(share(student, s), share(teacher, t))
    return mask(jnp.square(outer_difference).sum(axis=(1, 2)), examples_of(where))
  between = lambda a, b: _product("bnc,bnd->bcd", a, b)
  if s == t:
    # The same square by channels, from AA' - BB' = (P'D + D'P) / 2 with P = A + B and D = A - B: with the three terms
    # written out, all digits would cancel where student and teacher are close.
    total, difference = student + teacher, student - teacher
    mixed = between(total, difference)
    squares = between(total, total) * between(difference, difference) + mixed * jnp.swapaxes(mixed, 1, 2)
    return mask(squares.mean(axis=(1, 2)) / 2, examples_of(where))
  kernel = lambda a, b: jnp.square(between(a, b)).mean(axis=(1, 2))
  return mask(kernel(student, student) + kernel(teacher, teacher) - 2 * kernel(student, teacher), examples_of(where))


def inter_channel_correlation(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
  """Squared difference of the row-normalised correlation matrices of the channels.

  Matches which channels respond together, up to a factor for each; channels must agree, sizes need not. A zero channel
  stays zero and gets no gradient.

    sum_cd (G_s - G_t)_cd^2 / channels,   G = rows of F' F divided by their L2 norm, F [positions, channels]

  Args:
    student: `[batch, ..., channels]`, through a connector where widths differ.
    teacher: `[batch, ..., channels]`, as many axes.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the batch, the number of axes or the channels differ, an input is not floating, or `where` does not
      fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [2.0, 1.0]]]), jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    >>> print(f"{inter_channel_correlation(student, teacher)[0]:.4f}")
    0.2809

  Reference: Li Liu, Qingle Huang, Sihao Lin, Hongwei Xie, Bing Wang, Xiaojun Chang and Xiaodan Liang, "Exploring
  Inter-Channel Correlation for Diversity-preserved Knowledge Distillation", 2021, arXiv 2202.03680. torchdistill
  divides by the batch once more.
  """
  check_maps(student=student, teacher=teacher)
  check_channels(student=student, teacher=teacher)
  student, teacher = as_features(where, student=student, teacher=teacher)

  maps = in_a_row(student), in_a_row(teacher)
  channels, allowed = student.shape[-1], min(x.size for x in maps) // 4

  def of_example(of_maps):
    def distance(*blocks):
      rows, targets = (l2_normalize(_product("nc,nd->cd", block, x)) for block, x in zip(blocks, of_maps, strict=True))
      return jnp.square(rows - targets).sum()

    return _sum_over_channels(distance, of_maps, allowed // channels) / channels

  # A few examples at a time and once more in the backward pass: Gram matrices of them all may dwarf the maps.
  at_once = max(1, allowed // channels**2)
  return mask(jax.lax.map(jax.checkpoint(of_example), maps, batch_size=at_once), examples_of(where))


def kdsvd(
  student_first: jax.Array,
  student_last: jax.Array,
  teacher_first: jax.Array,
  teacher_last: jax.Array,
  *,
  k: int = 1,
  where: jax.Array | None = None,
) -> jax.Array:
  """Squared difference of how the leading singular vectors change between two layers.

  Matches the principal directions of the channels: channels must agree between student and teacher, sizes need not.

    sum_cdi (h_s - h_t)_cdi^2,   h_cdi = exp(-(last_ci - first_di)^2 / 8)

  where column i is the teacher's i-th right singular vector of `[positions, channels]`, or the vector of largest
  |cosine| with it among the student's top k + 3, turned to its side; both times the teacher's i-th singular value, of
  which the k have L2 norm 1.

  A singular vector may be turned around, and the method leaves open which way: the teacher's signs are those that the
  decomposition returns, so other hardware or another precision can give another value for the same maps.

  The derivative is the exact one as long as singular values differ. A pair of equal ones (to rounding) leaves its
  directions undefined and adds nothing to it, and a vector of singular value 0 counts as 0, so value and gradient are
  finite for every finite input. Forward and reverse mode work, to any order.

  Args:
    student_first: `[batch, ..., first channels]`.
    student_last: `[batch, ..., last channels]`, as many axes.
    teacher_first: `[batch, ..., first channels]`.
    teacher_last: `[batch, ..., last channels]`.
    k: number of singular vectors, static; at most the positions and the channels of each teacher map.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, a sum over channel pairs; 0 for masked examples.

  Raises:
    ValueError: if the batches, the numbers of axes or the channels differ, an input is not floating, `where` does not
      fit or `k` is out of range.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [2.0, 1.0]]]), jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    >>> print(f"{kdsvd(student, student, teacher, teacher)[0]:.4f}")
    0.0010

  Reference: Seung Hyun Lee, Dae Ha Kim and Byung Cheol Song, "Self-supervised Knowledge Distillation Using Singular
  Value Decomposition", 2018, arXiv 1807.06819. The derivative of the decomposition is NaN at equal singular values in
  common implementations, and mdistiller decomposes over the width instead of the channels.
  """
  student, teacher = _layer_pairs(where, student_first, student_last, teacher_first, teacher_last)
  smallest = min(min(in_a_row(features).shape[1:]) for features in teacher)
  if not isinstance(k, int) or not 1 <= k <= smallest:
    raise ValueError(f"k must be an int from 1 to {smallest}, the rank of the teacher's maps; got {k!r}")
  first = _paired_vectors(student[0], teacher[0], k)
  last = _paired_vectors(student[1], teacher[1], k, done=first[0][:, :1, :1])
  student_first, teacher_first = (vectors.mT for vectors in first)

  def distance(student_block, teacher_block):
    # exp(x) - 1, because the kernels are close to 1 and only their difference counts.
    kernel = lambda later, earlier: jnp.expm1(-jnp.square(later[..., None] - earlier[..., None, :]) / 8)
    return jnp.square(kernel(student_block, student_first) - kernel(teacher_block, teacher_first)).sum(axis=(1, 2, 3))

  last = tuple(vectors.mT for vectors in last)
  total = _sum_over_channels(distance, last, _size(*student, *teacher) // (2 * _size(student_first)))
  return mask(total, examples_of(where))


def _paired_vectors(
  student: jax.Array, teacher: jax.Array, k: int, done: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Weighted singular vectors `[batch, channels, k]` of the student and the teacher, pair by pair, after `done`."""
  values, vectors = _right_singular(teacher, k, jnp.asarray(done))
  _, candidates = _right_singular(student, k + 3, values[:, :1, None])
  cosines = _product("bcs,bct->bst", candidates, vectors)
  closest = jnp.argmax(jnp.abs(cosines), axis=1, keepdims=True)
  side = jnp.sign(jnp.take_along_axis(cosines, closest, axis=1))
  weights = l2_normalize(values)[:, None]
  return weights * side * jnp.take_along_axis(candidates, closest, axis=2), weights * vectors


def _right_singular(features: jax.Array, count: int, done: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The largest singular values `[batch, count]` and their vectors `[batch, channels, count]`, as far as they exist."""
  _, values, vectors = _svd(not_before(in_a_row(features), done))
  vanish = values <= _rounding(values)
  return values[:, :count], jnp.where(vanish[:, None], 0, vectors)[..., :count]


def _rounding(values: jax.Array) -> jax.Array:
  """The size below which singular values, and differences of them, are rounding errors."""
  return values.shape[-1] * jnp.finfo(values.dtype).eps * values[..., :1]


@jax.custom_jvp
def _svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Thin decomposition `x = u diag(s) v'` with a derivative that is finite at equal and at zero singular values."""
  u, s, vh = jnp.linalg.svd(x, full_matrices=False)
  return u, s, jnp.swapaxes(vh, -1, -2)


@_svd.defjvp
def _svd_jvp(primals, tangents):
  u, s, v = _svd(*primals)
  (dx,) = tangents
  # The vectors do not depend on the scale, and relative to it no square under- or overflows.
  scale = jax.lax.stop_gradient(jnp.where(s[..., :1] > 0, s[..., :1], 1))
  relative, dx = s / scale, dx / scale[..., None]
  own, other = relative[..., None, :], relative[..., :, None]
  apart = jnp.abs(own - other) > _rounding(relative)[..., None]
  inverse_gap = safe_divide(jnp.ones_like(apart, s.dtype), jnp.where(apart, (own - other) * (own + other), 0))
  inverse = safe_divide(jnp.ones_like(s), jnp.where(relative > _rounding(relative), relative, 0))[..., None, :]

  dx_v, dxt_u = _product("...nc,...ci->...ni", dx, v), _product("...nc,...ni->...ci", dx, u)
  inner = _product("...nj,...ni->...ji", u, dx_v)  # u_j' dx v_i
  transposed = jnp.swapaxes(inner, -1, -2)

  def tangent(basis, moved, rotation):
    outside = moved - _product("...nj,...ji->...ni", basis, _product("...nj,...ni->...ji", basis, moved))
    return _product("...nj,...ji->...ni", basis, rotation * inverse_gap) + outside * inverse

  du = tangent(u, dx_v, own * inner + other * transposed)
  dv = tangent(v, dxt_u, other * inner + own * transposed)
  return (u, s, v), (du, jnp.diagonal(inner, axis1=-2, axis2=-1) * scale, dv)


def _sum_over_channels(distance: Callable[..., jax.Array], maps: tuple[jax.Array, ...], at_once: int) -> jax.Array:
  """Adds up a distance over the channels, a few at a time and once more in the backward pass.

  So products of all channels with all channels, which may be many times the maps, are never held.

  Args:
    distance: of blocks `[..., n, some channels]` of all maps, gives an array.
    maps: `[..., n, channels]`.
    at_once: so many channels at most, but one at least; those of a block divide the channels.

  Returns:
    The sum of those arrays.
  """
  channels = maps[0].shape[-1]
  if at_once >= channels:
    return distance(*maps)
  fewest = -(-channels // max(at_once, 1))
  blocks = next(count for count in range(fewest, channels + 1) if channels % count == 0)
  split = lambda features: jnp.moveaxis(features.reshape(*features.shape[:-1], blocks, -1), -2, 0)
  step = jax.checkpoint(lambda block: distance(*block))
  return jax.lax.map(step, tuple(split(features) for features in maps)).sum(axis=0)


def _size(*arrays: jax.Array) -> int:
  """Numbers of an example `[batch, ...]`."""
  return sum(math.prod(x.shape[1:]) for x in arrays)


def _layer_pairs(
  where: jax.Array | None,
  student_first: jax.Array,
  student_last: jax.Array,
  teacher_first: jax.Array,
  teacher_last: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  maps = {
    "student_first": student_first,
    "student_last": student_last,
    "teacher_first": teacher_first,
    "teacher_last": teacher_last,
  }
  check_maps(**maps)
  check_channels(student_first=student_first, teacher_first=teacher_first)
  check_channels(student_last=student_last, teacher_last=teacher_last)
  student_first, student_last, teacher_first, teacher_last = as_features(where, **maps)
  return (student_first, student_last), (teacher_first, teacher_last)
