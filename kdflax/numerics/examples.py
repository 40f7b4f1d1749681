"""What every loss does with its examples: check, upcast, mask, gather, reduce.

The contract of a loss is kept here once: arrays come in by name, so that an error can name them; masked examples are
replaced by zeros before anything is computed, so that neither their values nor a NaN in them can reach a result.
"""

import math
from collections.abc import Callable
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

AxisName = str | tuple[str, ...] | None


def as_examples(where: jax.Array | None, *, lead: int | None = None, **arrays: jax.Array) -> list[jax.Array]:
  """Returns the arrays in float32 or wider, with zeros in place of masked examples.

  Args:
    where: bool, the shape of the leading axes, or None.
    lead: number of leading axes that count examples; None means all but the last.
    **arrays: the arguments of a loss by name; their leading axes must agree.

  Returns:
    The arrays in the order given, all of one dtype.

  Raises:
    ValueError: if an array is not floating or the leading axes or `where` do not fit.
  """
  converted = {name: jnp.asarray(array) for name, array in arrays.items()}
  for name, array in converted.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating; got {array.dtype}{list(array.shape)}; cast it, e.g. to float32")
    if array.ndim < (1 if lead is None else lead):
      raise ValueError(f"{name} needs at least {lead or 1} axes; got shape {array.shape}")
    if 0 in array.shape[-1 if lead is None else lead :]:
      raise ValueError(f"only axes that count examples may be empty in {name}; got shape {array.shape}")
  shapes = {name: array.shape[: array.ndim - 1 if lead is None else lead] for name, array in converted.items()}
  check_same("leading (example) axes", **shapes)
  examples = next(iter(shapes.values()))
  dtype = jnp.result_type(jnp.float32, *(array.dtype for array in converted.values()))
  check_where(where, examples)
  return [mask(array.astype(dtype), where) for array in converted.values()]


def as_features(where: jax.Array | None, **features: jax.Array) -> list[jax.Array]:
  """As `as_examples` for features `[batch, ..., width]`, of which each example gets one value.

  Their `where` is `[batch]`, or counts the positions between: `[batch, length]` of tokens, `[batch, height, width]` of
  a map. A masked position is zeros afterwards; `example_means`, `example_sums` and `positions_counted` keep it out of
  what zeros would change.

  Raises:
    ValueError: as `as_examples`, or if `where` is over positions that the features do not share.
  """
  if not _is_over_positions(where):
    return as_examples(where, lead=1, **features)
  shapes = {name: jnp.shape(array)[:-1] for name, array in features.items()}
  check_same("positions, since `where` counts them (or one `where` for each example)", **shapes)
  return as_examples(where, lead=None, **features)


def _is_over_positions(where: jax.Array | None) -> TypeGuard[jax.Array]:
  return getattr(where, "ndim", 1) > 1


def examples_of(where: jax.Array | None, ndim: int = 1) -> jax.Array | None:
  """Which examples count: those with a position that does; `where` with no more axes than `ndim`."""
  if where is None or jnp.ndim(where) <= ndim:
    return where
  return jnp.asarray(where).any(axis=tuple(range(ndim, jnp.ndim(where))))


def positions_counted(where: jax.Array | None, size: int, dtype: jnp.dtype) -> jax.Array:
  """How many of `size` positions count, at least 1: `[batch]`, or a number where that is all of them in each."""
  if not _is_over_positions(where):
    return jnp.asarray(size, dtype)
  return jnp.maximum(flatten(jnp.asarray(where)).sum(axis=1), 1).astype(dtype)


def example_means(values: jax.Array, where: jax.Array | None) -> jax.Array:
  """`[batch, ...] -> [batch]`: the mean of each example over all that counts, 0 where nothing does."""
  if not _is_over_positions(where):
    return mask(values.mean(axis=tuple(range(1, values.ndim))), where)
  of_position = math.prod(values.shape[jnp.ndim(where) :])
  positions = math.prod(values.shape[1 : jnp.ndim(where)])
  return example_sums(values, where) / (of_position * positions_counted(where, positions, values.dtype))


def example_sums(values: jax.Array, where: jax.Array | None) -> jax.Array:
  """`[batch, ...] -> [batch]`: the sum of each example over all that counts."""
  if _is_over_positions(where):
    values, where = mask(values, where), None
  return mask(values.sum(axis=tuple(range(1, values.ndim))), where)


def hyper_parameters(
  examples: tuple[int, ...], where: jax.Array | None, dtype: jnp.dtype, **hyper: float | jax.Array
) -> list[jax.Array]:
  """Returns hyper-parameters as arrays of a dtype: numbers, or one for each example and 1/2 where that is masked.

  Raises:
    ValueError: if one does not broadcast to the examples, since broadcasting the other way would pair every example
      with every value, or if one called temperature is known to be 0 or less or NaN.
  """
  checked = []
  for name, value in hyper.items():
    if value is None or isinstance(value, str):
      raise ValueError(f"{name} must be a number or an array; got {value!r}")
    check_broadcasts(name, jnp.shape(value), "the examples", examples)
    if name.endswith("temperature"):
      check_range(name, value, "above 0", lambda numbers: numbers > 0, where)
    value = jnp.asarray(value, dtype)
    checked.append(value if where is None or not value.ndim else jnp.where(jnp.asarray(where), value, 0.5))
  return checked


def check_range(
  name: str,
  value: float | jax.Array | np.ndarray,
  allowed: str,
  inside: Callable[[np.ndarray], np.ndarray],
  where: jax.Array | None = None,
) -> None:
  """Raises a ValueError unless a hyper-parameter that is a Python or NumPy number lies inside a range.

  A JAX array passes: it may be traced, and reading one that is not would wait for the device.

  Args:
    name: of the hyper-parameter.
    value: a number, or one for each example.
    allowed: the range in words, such as "above 0".
    inside: which numbers lie in it; NaN must not.
    where: bool, which examples count; the values of others may be anything.
  """
  if isinstance(value, jax.Array):
    return
  fits = np.asarray(inside(np.asarray(value)))
  if where is not None and fits.ndim:
    if isinstance(where, Tracer):
      return
    fits = fits | ~np.asarray(where)
  if not fits.all():
    raise ValueError(f"{name} must be {allowed}; got {value}")


def check_classes(name: str, classes: jax.Array, num_classes: int, counted: jax.Array, fix: str) -> None:
  """Raises a ValueError if classes that are known before tracing are out of range where counted."""
  if isinstance(classes, Tracer) or isinstance(counted, Tracer):
    return
  known = np.asarray(classes)
  wrong = known[np.asarray(counted) & ((known < 0) | (known >= num_classes))]
  if wrong.size:
    shown = ", ".join(map(str, np.unique(wrong)[:5]))
    raise ValueError(f"{name} of shape {known.shape} must be in 0 .. {num_classes - 1}; got {shown}. {fix}")


def check_broadcasts(name: str, shape: tuple[int, ...], what: str, wanted: tuple[int, ...]) -> None:
  """Raises a ValueError unless a shape broadcasts to the one wanted."""
  sizes = zip(reversed(shape), reversed(wanted), strict=False)
  if len(shape) > len(wanted) or any(size not in (1, want) for size, want in sizes):
    may = f"a number or broadcast to the shape of {what}, {wanted}" if wanted else "a single number"
    raise ValueError(f"{name} must be {may}; got shape {shape}")


def check_same(what: str, **shapes: tuple[int, ...]) -> None:
  """Raises a ValueError that shows every shape by name unless they all agree."""
  if len(set(shapes.values())) > 1:
    shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(f"{' and '.join(shapes)} must have the same {what}; got {shown}")


def check_where(where: jax.Array | None, examples: tuple[int, ...]) -> None:
  """Raises a ValueError unless `where` is None or bool of the shape of the result."""
  if where is None:
    return
  if not hasattr(where, "shape"):
    raise ValueError(f"where must be a bool array of the result's shape {examples}; got a {type(where).__name__}")
  if jnp.shape(where) != examples or jnp.result_type(where) != jnp.bool_:
    raise ValueError(
      f"where must be bool of the result's shape {examples}; got {jnp.result_type(where)}{list(jnp.shape(where))}"
    )


def mask(values: jax.Array, where: jax.Array | None) -> jax.Array:
  """Zeros in place of masked examples; `where` covers the leading axes of `values`."""
  if where is None:
    return values
  where = jnp.asarray(where)
  return jnp.where(where.reshape(where.shape + (1,) * (values.ndim - where.ndim)), values, 0)


def flatten(examples: jax.Array) -> jax.Array:
  """`[batch, ...] -> [batch, width]`, also where the batch is empty."""
  return examples.reshape(examples.shape[0], math.prod(examples.shape[1:]))


def masked_mean(values: jax.Array, where: jax.Array | None = None, axis_name: AxisName = None) -> jax.Array:
  """Averages per-example values over the examples that count.

  Args:
    values: one value per example, `[...]`.
    where: bool, the shape of `values`: which examples count. None counts all.
    axis_name: mapped axis or axes of `pmap` or `shard_map` to average over as well: sums and counts are added over
      the devices before they are divided, so uneven masks do not bias the mean.

  Returns:
    A scalar in float32 or wider; 0 if no example counts.

  Raises:
    ValueError: if `where` is not bool of the shape of `values`.
  """
  values = jnp.asarray(values)
  check_where(where, values.shape)
  total, count = masked_sum(values, where, axis_name)
  return total / jnp.maximum(count, 1)


def masked_sum(
  values: jax.Array, where: jax.Array | None = None, axis_name: AxisName = None
) -> tuple[jax.Array, jax.Array]:
  """Returns (sum, count) of the examples that count, over the devices of `axis_name` as well."""
  dtype = jnp.result_type(values.dtype, jnp.float32)
  total = mask(values.astype(dtype), where).sum()
  count = jnp.asarray(values.size if where is None else jnp.asarray(where).sum(), dtype)
  return all_sum(total, axis_name), all_sum(count, axis_name)


def all_sum(value: jax.Array, axis_name: AxisName) -> jax.Array:
  """Sum over the devices of a mapped axis; the value itself without one."""
  return value if axis_name is None else jax.lax.psum(value, axis_name)


def all_max(value: jax.Array, axis_name: AxisName) -> jax.Array:
  """The largest over the devices of a mapped axis; without a derivative."""
  return value if axis_name is None else jax.lax.pmax(value, axis_name)


def positions(local: int, axis_name: AxisName) -> jax.Array:
  """Where this device's examples lie among those of all devices, `[local]`."""
  first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local
  return first + jnp.arange(local)


def all_rows(rows: jax.Array, axis_name: AxisName) -> jax.Array:
  """The rows of every device, stacked on the first axis in device order."""
  return rows if axis_name is None else jax.lax.all_gather(rows, axis_name, tiled=True)
