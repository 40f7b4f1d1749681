"""Around a loss on tokens: labels put beside their predictions, and one value per token reduced to one number."""

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import AxisName, all_sum, check_broadcasts, check_same, check_where, mask, masked_mean


def shift_labels(
  labels: jax.Array, where: jax.Array | None = None, *, segments: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Puts the label of each token where it is predicted: one position earlier.

  The last position of a sequence, and of each segment of a packed one, has nothing to predict and does not count; its
  label is -1.

  Args:
    labels: integer `[..., length]`, usually the tokens themselves.
    where: bool `[..., length]`, which labels count, such as those of the answer.
    segments: integer `[..., length]`, equal inside a segment.

  Returns:
    The labels and which of them count, both `[..., length]`: those of position t are of t + 1.

  Raises:
    ValueError: if there is no axis of positions, or `where` or `segments` does not have the shape of the labels.

  Examples:
    >>> shift_labels(jnp.array([5, 6, 7, 8]), segments=jnp.array([0, 0, 1, 1]))
    (Array([ 6,  7,  8, -1], dtype=int32), Array([ True, False,  True, False], dtype=bool))
  """
  labels = jnp.asarray(labels)
  if not labels.ndim or not jnp.issubdtype(labels.dtype, jnp.signedinteger):
    raise ValueError(f"labels must be signed integers [..., length]; got {labels.dtype}{list(labels.shape)}")
  check_where(where, labels.shape)
  counted = jnp.ones(labels.shape, bool) if where is None else jnp.asarray(where)
  if segments is not None:
    check_same("shape", labels=labels.shape, segments=jnp.shape(segments))
    segments = jnp.asarray(segments)
    counted = counted & (segments == jnp.roll(segments, 1, axis=-1))
  last = jnp.arange(labels.shape[-1]) == labels.shape[-1] - 1
  earlier = lambda x, end: jnp.where(last, end, jnp.roll(x, -1, axis=-1))
  return earlier(labels, -1), earlier(counted, False)


def normalize(
  values: jax.Array,
  where: jax.Array | None = None,
  by: str | float | jax.Array = "tokens",
  *,
  axis_name: AxisName = None,
) -> jax.Array:
  """Reduces one value per token to one number.

  For the same number and gradient from a batch, from its parts added up, and from its shards, give the count of the
  whole batch as `by`. A batch in which nothing counts gives 0.

  Args:
    values: `[..., length]`, one value per token.
    where: bool, the shape of `values`: which tokens count. None counts all.
    by: "tokens" is the mean over the tokens that count; "sequences" the mean over sequences (those with a token that
      counts) of the mean over their tokens; a number, which may be traced, divides the sum.
    axis_name: mapped axis or axes of `pmap` or `shard_map` over which the batch is spread: sums and counts are added
      over the devices before they are divided.

  Returns:
    A scalar in float32 or wider.

  Raises:
    ValueError: if `where` does not fit, or `by` is another word or not a single number.

  Examples:
    >>> values, where = jnp.array([[1.0, 2.0], [6.0, 9.0]]), jnp.array([[True, True], [True, False]])
    >>> [float(normalize(values, where, by)) for by in ("tokens", "sequences", 2)]
    [3.0, 3.75, 4.5]
  """
  values = jnp.asarray(values)
  values = values.astype(jnp.result_type(values.dtype, jnp.float32))
  check_where(where, values.shape)
  if isinstance(by, str) and by == "tokens":
    return masked_mean(values, where, axis_name)
  if isinstance(by, str) and by == "sequences" and values.ndim:
    counted = jnp.ones(values.shape, bool) if where is None else jnp.asarray(where)
    means = mask(values, counted).sum(axis=-1) / jnp.maximum(counted.sum(axis=-1), 1)
    return masked_mean(means, counted.any(axis=-1), axis_name)
  if isinstance(by, str):
    raise ValueError(f"by must be 'tokens', 'sequences' (of values [..., length]) or a number; got {by!r}")
  check_broadcasts("by", jnp.shape(by), "the result", ())
  count = jnp.asarray(by, values.dtype)
  return all_sum(mask(values, where).sum(), axis_name) / jnp.where(count == 0, 1, count)
