"""Merging by what tuning changed: the differences of several tuned models from the base they started from.

All are sums of differences that differ in which entries they keep. Everything is elementwise or counts entries, and no
leaf is flattened, so sharded leaves stay as they are.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kdflax.merging._trees import Aligned, align, check_alike, per_model, several
from kdflax.model import PyTree, named_key

Scale = float | Sequence[float] | jax.Array


def task_arithmetic(base: PyTree, tuned: Sequence[PyTree], scale: Scale) -> PyTree:
  """Add what every tuned model has learned to the base.

  With scale 1 and one model it is that model; a negative scale makes the base forget a task.

      base + sum_i scale_i (tuned_i - base)

  Args:
    base: a pytree of floating arrays, the params that all were tuned from.
    tuned: one pytree like it for each model.
    scale: a number, or one for each model; may be traced. Around 0.3 to 0.5 for a few tasks.

  Returns:
    A pytree like the base, in its dtypes; computed in float32 or wider.

  Raises:
    ValueError: if the trees differ (the leaf and both shapes are named), a leaf is not floating, or the scale is
      neither a number nor one for each model.

  Examples:
    >>> base, tuned = {"kernel": jnp.array([1.0, 2.0])}, [{"kernel": jnp.array([3.0, 2.0])}, {"kernel": jnp.zeros(2)}]
    >>> task_arithmetic(base, tuned, 0.5)
    {'kernel': Array([1.5, 1. ], dtype=float32)}

  Reference: Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, Hannaneh
  Hajishirzi and Ali Farhadi, "Editing models with task arithmetic", 2022, arXiv 2212.04089.
  """
  aligned, differences = _differences(base, tuned)
  return _added(aligned, [_scaled(leaves, scale) for leaves in differences])


def ties(base: PyTree, tuned: Sequence[PyTree], density: float, scale: float | jax.Array) -> PyTree:
  """Add what tuning changed most, where the models agree on the direction.

  Small changes are noise and opposed ones cancel each other. Each model keeps the `density n` of its n differences that
  are largest in magnitude (trim); the sign of their sum decides for each entry (elect); the mean of those of that sign,
  zeros not counted, is added (disjoint merge).

      base + scale mean over {i: sign d_i = s} of d_i,   s = sign(sum_i d_i),   d_i = trim(tuned_i - base)

  Args:
    base: a pytree of floating arrays, the params that all were tuned from.
    tuned: one pytree like it for each model.
    density: in [0, 1], the share of entries kept, `floor(density n)` of the n entries of the whole tree; static. Where
      several have the smallest magnitude kept, the first of them in the order of the leaves stay.
    scale: a number, may be traced.

  Returns:
    A pytree like the base, in its dtypes; computed in float32 or wider.

  Raises:
    ValueError: if the trees differ (the leaf and both shapes are named), a leaf is not floating, the density is not in
      [0, 1], the scale is no number, or there are 2^31 entries or more and no 64-bit integers to count them.

  Examples:
    >>> base = {"kernel": jnp.zeros(4)}
    >>> tuned = [{"kernel": jnp.array([4.0, 3.0, 0.1, 0.0])}, {"kernel": jnp.array([2.0, -5.0, 0.1, 0.2])}]
    >>> ties(base, tuned, density=0.5, scale=1.0)
    {'kernel': Array([ 3., -5.,  0.,  0.], dtype=float32)}

  Reference: Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel and Mohit Bansal, "TIES-Merging: Resolving
  Interference When Merging Models", 2023, arXiv 2306.01708. Its code keeps one entry more, and all that tie with the
  smallest; mergekit trims every tensor by itself.
  """
  if not 0 <= density <= 1:
    raise ValueError(f"density must be in [0, 1]; got {density}")
  if jnp.ndim(scale):
    raise ValueError(f"scale must be a number; got shape {jnp.shape(scale)}")
  aligned, differences = _differences(base, tuned)
  size = sum(leaf.size for leaf, *_ in differences)
  if size > jnp.iinfo(_count_dtype()).max:
    raise ValueError(f"ties counts {size} entries with 64-bit integers; call it under jax.enable_x64(True)")
  count = jnp.asarray(math.floor(density * size), _count_dtype())
  kept = [_kept(jax.lax.stop_gradient(list(of_model)), count) for of_model in zip(*differences, strict=True)]
  trimmed = _masked(zip(*kept, strict=True), differences)
  return _added(aligned, [_scaled([_mean_of_agreeing(leaves)], scale) for leaves in trimmed])


def dare(
  base: PyTree,
  tuned: Sequence[PyTree],
  *,
  drop_rate: float | jax.Array,
  scale: Scale,
  key: jax.Array | None = None,
  masks: Sequence[PyTree] | None = None,
) -> PyTree:
  """Drop most of what tuning changed at random, and add the rest, scaled up.

  Differences are redundant: a tenth of them, ten times as large, does the same, and those of several models meet less
  often. The expected result is that of `task_arithmetic`. To trim and elect signs afterwards (DARE with TIES) hand each
  model's `dare(base, [model], drop_rate=..., scale=1.0, key=...)` to `ties`.

      base + sum_i scale_i m_i (tuned_i - base) / (1 - drop_rate),   m_i = 1 with probability 1 - drop_rate, else 0

  Args:
    base: a pytree of floating arrays, the params that all were tuned from.
    tuned: one pytree like it for each model.
    drop_rate: in [0, 1), the probability of dropping an entry; may be traced.
    scale: a number, or one for each model; may be traced.
    key: draws the entries to keep, for every model and leaf its own.
    masks: in place of a key, for each model a pytree like it of bool arrays, True where an entry is kept.

  Returns:
    A pytree like the base, in its dtypes; computed in float32 or wider.

  Raises:
    ValueError: if the trees differ (the leaf and both shapes are named), a leaf is not floating, a mask is not bool,
      there is not either a key or a mask for each model, the drop rate is not in [0, 1), or the scale is neither a
      number nor one for each model.

  Examples:
    >>> masks = [{"kernel": jnp.array([True, False])}]
    >>> dare({"kernel": jnp.ones(2)}, [{"kernel": jnp.array([2.0, 3.0])}], drop_rate=0.5, scale=1.0, masks=masks)
    {'kernel': Array([3., 1.], dtype=float32)}

  Reference: Le Yu, Bowen Yu, Haiyang Yu, Fei Huang and Yongbin Li, "Language Models are Super Mario: Absorbing
  Abilities from Homologous Models as a Free Lunch", 2023, arXiv 2311.03099.
  """
  if jnp.ndim(drop_rate):
    raise ValueError(f"drop_rate must be a number; got shape {jnp.shape(drop_rate)}")
  if not isinstance(drop_rate, Tracer) and not 0 <= drop_rate < 1:
    raise ValueError(f"drop_rate must be in [0, 1), so that something is left; got {drop_rate}")
  if (key is None) == (masks is None):
    given = "neither" if key is None else "both"
    raise ValueError(f"dare takes either a key to draw masks from or the masks, one for each model; got {given}")
  aligned, differences = _differences(base, tuned)
  kept = _drawn(key, aligned, len(tuned), drop_rate) if masks is None else _given(masks, base, len(tuned))
  return _added(aligned, [_scaled(leaves, scale) / (1 - drop_rate) for leaves in _masked(kept, differences)])


def _differences(base: PyTree, tuned: Sequence[PyTree]) -> tuple[Aligned, list[list[jax.Array]]]:
  """The base and for every leaf the differences of all models from it."""
  aligned = align({"base": base} | several("tuned", tuned))
  return aligned, [[leaf - start for leaf in leaves] for start, *leaves in aligned.versions]


def _scaled(differences: Sequence[jax.Array], scale: Any) -> jax.Array:
  scales = per_model("scale", scale, len(differences)).astype(differences[0].dtype)
  first, *others = (scales[index] * leaf for index, leaf in enumerate(differences))
  return sum(others, first)


def _added(aligned: Aligned, sums: Sequence[jax.Array]) -> PyTree:
  return aligned.rebuild([versions[0] + change for versions, change in zip(aligned.versions, sums, strict=True)])


def _masked(kept: Iterable[Sequence[jax.Array]], differences: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
  """0 where an entry is not kept."""
  pairs = [zip(masks, leaves, strict=True) for masks, leaves in zip(kept, differences, strict=True)]
  return [[jnp.where(mask, leaf, 0) for mask, leaf in of_leaf] for of_leaf in pairs]


def _mean_of_agreeing(trimmed: Sequence[jax.Array]) -> jax.Array:
  """The mean of the entries that have the sign of their sum; 0 where there is none."""
  stacked = jnp.stack(trimmed)
  sign = jnp.sign(stacked.sum(0))
  agree = (jnp.sign(stacked) == sign) & (sign != 0)
  mean = jnp.where(agree, stacked, 0).sum(0) / jnp.maximum(agree.sum(0), 1)
  return jnp.where(jnp.isnan(sign), sign, mean)


def _drawn(key: Any, aligned: Aligned, models: int, drop_rate: Any) -> list[list[jax.Array]]:
  """For every leaf the masks of all models, True where an entry is kept."""
  keys = [jax.random.fold_in(key, model) for model in range(models)]
  draw = lambda key, name, leaf: jax.random.bernoulli(named_key(key, name), 1 - drop_rate, leaf.shape)
  leaves = zip(aligned.names, aligned.versions, strict=True)
  return [[draw(own, name, versions[0]) for own in keys] for name, versions in leaves]


def _given(masks: Sequence[PyTree], base: PyTree, models: int) -> list[list[jax.Array]]:
  """For every leaf the masks of all models, checked."""
  if len(several("masks", masks)) != models:
    raise ValueError(f"masks must be one for each of {models} models; got {len(masks)}")
  trees = several("masks", masks)
  names = check_alike({"base": base} | trees)
  found = [list(leaves) for leaves in zip(*map(jax.tree.leaves, trees.values()), strict=True)]
  for name, leaves in zip(names, found, strict=True):
    for where, leaf in zip(trees, leaves, strict=True):
      if jnp.result_type(leaf) != jnp.bool_:
        raise ValueError(f"leaf {name!r} of {where} must be bool, True where kept; got {jnp.result_type(leaf)}")
  return found


# The largest entries of a tree. The bits of a float, read as an integer, are in the order of its magnitude, and the
# threshold is found bit by bit by counting the entries that reach it: nothing is sorted, gathered or flattened.


@jax.jit
def _kept(differences: list[jax.Array], count: jax.Array) -> list[jax.Array]:
  """True at the `count` entries of largest magnitude, and of equal ones at the first in the order of the leaves."""
  magnitudes = _magnitudes(differences)
  reached = lambda threshold: _count([bits >= threshold for bits in magnitudes]).sum()
  threshold = _largest(magnitudes[0].dtype, (), lambda candidate: reached(candidate) >= count)
  above, tied = [bits > threshold for bits in magnitudes], [bits == threshold for bits in magnitudes]
  room, ties = count - _count(above).sum(), _count(tied)
  quotas = jnp.clip(room - (jnp.cumsum(ties) - ties), 0, ties)  # of each leaf, those before it first
  positions = [_positions(leaf.shape) for leaf in tied]
  before = lambda ends: [same & (place < end) for same, place, end in zip(tied, positions, ends, strict=True)]
  search = lambda: _largest(positions[0].dtype, (len(tied),), lambda ends: _count(before(ends)) <= quotas)
  everything = lambda: jnp.full(len(tied), jnp.iinfo(positions[0].dtype).max, positions[0].dtype)
  ends = jax.lax.cond(ties.sum() > room, search, everything)
  return [more | same for more, same in zip(above, before(ends), strict=True)]


def _largest(dtype: Any, shape: tuple[int, ...], accepts: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """The largest unsigned integers that are accepted, as 0 and all below an accepted one are."""
  bits = jnp.iinfo(dtype).bits

  def set_bit(index: jax.Array, found: jax.Array) -> jax.Array:
    candidate = found | (jnp.ones((), dtype) << (bits - 1 - index).astype(dtype))
    return jnp.where(accepts(candidate), candidate, found)

  return jax.lax.fori_loop(0, bits, set_bit, jnp.zeros(shape, dtype))


def _magnitudes(leaves: Sequence[jax.Array]) -> list[jax.Array]:
  """|leaf| as unsigned integers in the same order, NaN above all."""
  dtype = jnp.result_type(*leaves)
  unsigned = {4: jnp.uint32, 8: jnp.uint64}[dtype.itemsize]
  return [jax.lax.bitcast_convert_type(jnp.abs(leaf.astype(dtype)), unsigned) for leaf in leaves]


def _count(masks: Sequence[jax.Array]) -> jax.Array:
  """How many are True in each."""
  return jnp.stack([mask.sum(dtype=_count_dtype()) for mask in masks])


def _count_dtype() -> Any:
  return jax.dtypes.canonicalize_dtype(jnp.int64)


def _positions(shape: tuple[int, ...]) -> jax.Array:
  """The place of every entry in the order of a flattened array."""
  dtype = jax.dtypes.canonicalize_dtype(jnp.uint64)
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  places = [stride * jax.lax.broadcasted_iota(dtype, shape, axis) for axis, stride in enumerate(strides)]
  return sum(places, jnp.zeros(shape, dtype))
