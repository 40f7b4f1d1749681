"""Sums over all angles of a batch at memory of its Gram matrix, and their derivative in closed form."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero


class Sides(NamedTuple):
  """What the angles at the anchors i need to know of the examples j. By the law of cosines, with d the distances,

  `cos_ijk = (d_ji^2 + d_ki^2 - d_jk^2) / (2 d_ji d_ki) = inverse_ji (gram_jk inverse_ki + shift_ki) + shift_ji
  inverse_ki`.
  """

  inverse: jax.Array  # [B, b]: 1 / d_ji, 0 where the side does not exist or has length 0
  shift: jax.Array  # [B, b]: d_ji / 2
  gram: jax.Array  # [B, B]: -d_jk^2 / 2, the Gram matrix up to what the anchors add


def _cosines(one: Sides, sides: Sides) -> jax.Array:
  """Cosines `[k, b]` at the anchors between their sides to one example j (a row of `Sides`) and to examples k."""
  return one.inverse * (one.gram[:, None] * sides.inverse + sides.shift) + one.shift * sides.inverse


def angle_sums(chunk: int, student: Sides, teacher: Sides) -> jax.Array:
  """`sum_jk huber(cos_s - cos_t)_ijk` `[b]` for each anchor i."""
  return _angle_sums(chunk, student, teacher)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _angle_sums(chunk: int, student: Sides, teacher: Sides) -> jax.Array:
  def values(rows):
    return optax.huber_loss(_cosines(rows[0], student), _cosines(rows[1], teacher))

  # Everything is added up over j and stays [k, b]: no reduction inside the loop, so it is one element-wise operation.
  return _add_up(chunk, values, (student, teacher), student.inverse).sum(axis=0)


@functools.partial(_angle_sums.defjvp, symbolic_zeros=True)
def _angle_sums_jvp(chunk, primals, tangents):
  moving = [index for index, tangent in enumerate(tangents) if not isinstance(tangent.gram, SymbolicZero)]

  def values_and_slopes(rows):
    difference = _cosines(rows[0], primals[0]) - _cosines(rows[1], primals[1])
    slope = jnp.clip(difference, -1, 1)
    # An angle is the same from j to k as from k to j: what moves it at k, summed over j, counts for both.
    of_inverse = [slope * (rows[m].gram[:, None] * rows[m].inverse + rows[m].shift) for m in moving]
    return optax.huber_loss(difference), of_inverse, [slope * rows[m].inverse for m in moving]

  values, of_inverse, of_shift = _add_up(chunk, values_and_slopes, primals, primals[0].inverse)
  moved = _moved_by_gram(chunk, primals, {m: _half(tangents[m].gram, 2.0) for m in moving})
  for m, inverse_slope, shift_slope in zip(moving, of_inverse, of_shift, strict=True):
    by_sides = 2 * (tangents[m].inverse * inverse_slope + tangents[m].shift * shift_slope).sum(axis=0)
    moved = moved + (-by_sides if m else by_sides)  # the teacher's cosines are subtracted
  return values.sum(axis=0), moved


def _moved_by_gram(chunk: int, models: tuple[Sides, Sides], tangents: dict[int, jax.Array]) -> jax.Array:
  """`sum_jk slope_ijk inverse_ji inverse_ki dgram_jk` `[b]`, the teacher's subtracted, from halves of each `dgram`."""
  twice = [jax.tree.map(lambda x: jnp.concatenate([x, x]), model._replace(gram=None)) for model in models]
  halves = [model._replace(gram=_half(model.gram)) for model in models]
  length = halves[0].gram.shape[1]

  def moved(rows):
    j, ones, moves = rows
    after_j = lambda x: jax.lax.dynamic_slice_in_dim(x, j + 1, length)  # the examples k after j, around the end
    others = [jax.tree.map(after_j, model) for model in twice]
    slope = jnp.clip(_cosines(ones[0], others[0]) - _cosines(ones[1], others[1]), -1, 1)
    by = {
      m: ones[m].inverse * jnp.matmul(move, slope * others[m].inverse, precision=jax.lax.Precision.HIGHEST)
      for m, move in moves.items()
    }
    return by.get(0, 0.0) - by.get(1, 0.0)

  rows = jnp.arange(models[0].inverse.shape[0]), halves, tangents
  return _add_up(chunk, moved, rows, models[0].inverse[0])


def _half(gram: jax.Array, weight: float = 1.0) -> jax.Array:
  """`[B, B] -> [B, B // 2]`: from each row j the columns after j, around the end, so that each pair comes once.

  For an even B the pairs that lie B / 2 apart come twice; with a weight they count half.
  """
  size, length = gram.shape[0], gram.shape[0] // 2
  after = jnp.arange(1, length + 1)
  half = jnp.take_along_axis(gram, (jnp.arange(size)[:, None] + after) % size, axis=1)
  return half if weight == 1 else half * jnp.where(2 * after == size, weight / 2, weight)


def _add_up(chunk: int, function: Callable, rows, like: jax.Array):
  """Sum of `function(row)` over the leading axis of the rows, `chunk` at a time; to rows of zeros it must give zeros.

  Args:
    chunk: rows at a time.
    function: of one row; its results have the shape of `like`.
    rows: a pytree of arrays.
    like: finite; zeros made of it vary over the same mapped axes as the results.
  """
  count = jax.tree.leaves(rows)[0].shape[0]
  missing = -count % chunk
  blocks = jax.tree.map(
    lambda x: jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))).reshape(-(-count // chunk), chunk, *x.shape[1:]),
    rows,
  )
  shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], rows))

  def add(total, block):
    # Recomputing the angles in the backward pass is what keeps all [B, B, b] of them out of memory.
    return jax.tree.map(lambda t, x: t + x.sum(axis=0), total, jax.checkpoint(jax.vmap(function))(block)), None

  return jax.lax.scan(add, jax.tree.map(lambda _: 0 * like, shapes), blocks)[0]
