"""Batches whose position is a small dict: gathered on the device, mixed, or padded for evaluation."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.data.arrays import Arrays, gather, num_examples
from kdflax.data.orders import ORDER, order_at


def batch_indices(key: jax.Array, step: jax.Array | int, *, num_examples: int, batch_size: int) -> jax.Array:
  """Return the examples of one training batch as a pure function of the step.

  Epoch `e` is an order by `fold_in(key, e)`, cut into whole batches; the rest of an epoch is dropped. Nothing is
  carried from step to step, so any step can be computed first, under `jit`, `scan` or `vmap` over keys; and only the
  examples of the batch are worked out, so that a step costs the same whatever the size of the data.

  Args:
    key: a random key; the same key gives the same batches.
    step: training step counted from 0, may be traced.
    num_examples: of the data set, static.
    batch_size: examples per batch, static, at most `num_examples`.

  Returns:
    int32 `[batch_size]`, no example twice.

  Raises:
    ValueError: `batch_size` is not positive or larger than `num_examples`.
  """
  check_batch_size(batch_size, num_examples)
  epoch, position = jnp.divmod(jnp.asarray(step), num_examples // batch_size)
  positions = position * batch_size + jnp.arange(batch_size)
  return order_at(jax.random.fold_in(key, epoch), positions, num_examples)


class DeviceBatches:
  """Iterate without end over batches gathered on the device, the examples being those of `batch_indices`.

  The arrays go to the device once; JAX arrays stay where they are, sharded or not. The position is a dict for a
  checkpoint: after `set_state` the batches continue as if uninterrupted, in this or another process. One that was saved
  by version 0.1, whose epochs had another order, is refused.

  Args:
    arrays: dict of arrays `[examples, ...]`, possibly nested.
    batch_size: examples per batch.
    key: a random key.

  Raises:
    ValueError: `batch_size` is not positive or larger than the data.
  """

  def __init__(self, arrays: Arrays, batch_size: int, key: jax.Array):
    self._num_examples = num_examples(arrays)
    check_batch_size(batch_size, self._num_examples)
    self._arrays = jax.tree.map(jnp.asarray, arrays)
    self._batch_size = batch_size
    self._key = key
    self._step = 0

  def __iter__(self) -> "DeviceBatches":
    return self

  def __next__(self) -> Arrays:
    self._step += 1
    return _draw(self._arrays, self._key, self._step - 1, size=self._batch_size)

  def get_state(self) -> dict[str, Any]:
    """Return the position: the step of the next batch, and what the batches depend on besides the arrays."""
    return {
      "step": self._step,
      "order": ORDER,
      "num_examples": self._num_examples,
      "batch_size": self._batch_size,
      "key": np.asarray(jax.random.key_data(self._key)).tolist(),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Continue at a position that `get_state` returned.

    Args:
      state: the position.

    Raises:
      ValueError: it belongs to other batches, which no position could continue; the differing fields are named.
    """
    check_position("DeviceBatches", state, self.get_state(), counter="step")
    if state["step"] < 0:
      raise ValueError(f"a position counts steps from 0, got step {state['step']}")
    self._step = int(state["step"])


def sample(arrays: Arrays, key: jax.Array, step: jax.Array | int, *, size: int) -> Arrays:
  """Draw the batch of a step from arrays that stay on the device, each example once an epoch: for `make_learner`.

      make_learner(..., sample=functools.partial(data.sample, size=64))

  Args:
    arrays: dict of arrays `[examples, ...]`, possibly nested.
    key: of the data; the order of an epoch depends on it and on the number of the epoch alone.
    step: training step.
    size: examples per batch.

  Returns:
    A dict of arrays `[size, ...]`.

  Raises:
    ValueError: `size` is not between 1 and the number of examples.
  """
  return gather(arrays, batch_indices(key, step, num_examples=num_examples(arrays), batch_size=size))


_draw = jax.jit(sample, static_argnames="size")


def padded_batches(arrays: Arrays, batch_size: int) -> Iterator[Arrays]:
  """Iterate once over every example in order, all batches of one size, for evaluation.

  The last batch is filled up with copies of example 0 where `where` is False: one compiled function serves all
  batches, and sums under the mask count every example exactly once.

  Args:
    arrays: dict of arrays `[examples, ...]`, possibly nested.
    batch_size: examples per batch; may exceed the data.

  Returns:
    An iterator over dicts with arrays `[batch_size, ...]` and `where`, bool `[batch_size]`.

  Raises:
    ValueError: `batch_size` is not positive, or there is an array named `where` already.
  """
  total = num_examples(arrays)
  if batch_size <= 0:
    raise ValueError(f"batch_size={batch_size} must be positive")
  if "where" in arrays:
    raise ValueError("padded_batches adds 'where', but the data has an array of that name; rename it")
  return _padded(arrays, batch_size, total)


def _padded(arrays: Arrays, batch_size: int, total: int) -> Iterator[Arrays]:
  for start in range(0, total, batch_size):
    rows = np.arange(start, start + batch_size)
    where = rows < total
    yield gather(arrays, np.where(where, rows, 0)) | {"where": where}


def mix(labelled: Arrays, unlabelled: Arrays) -> Arrays:
  """Put a labelled and an unlabelled batch into one, the labelled examples first.

  Args:
    labelled: dict of arrays `[labelled examples, ...]`, possibly nested.
    unlabelled: dict of the same names with arrays `[unlabelled examples, ...]`; labels in it are carried, not used.

  Returns:
    The rows of both, with `labelled`, bool: the mask of the terms that need a label. Of the labelled examples those
    count that have the mask already, where there is one (a label budget, a batch that was mixed before).

  Raises:
    ValueError: the two have different names, or rows of different shape or kind (integers, floats); each is listed.
  """
  first, rest = num_examples(labelled), num_examples(unlabelled)
  marked = labelled.get("labelled", jnp.ones(first, bool))
  labelled, unlabelled = (
    {name: arrays for name, arrays in batch.items() if name != "labelled"} for batch in (labelled, unlabelled)
  )
  rows, others = (
    {jax.tree_util.keystr(path, simple=True, separator="."): _row(x) for path, x in jax.tree.leaves_with_path(batch)}
    for batch in (labelled, unlabelled)
  )
  differing = [
    f"{name}: {rows.get(name, 'absent')} labelled, {others.get(name, 'absent')} unlabelled"
    for name in sorted(rows.keys() | others.keys())
    if rows.get(name) != others.get(name)
  ]
  if differing:
    raise ValueError(
      "labelled and unlabelled batches must have the same names and rows of one shape and kind; put any number where"
      " there is no label (-1, NaN):\n  " + "\n  ".join(differing)
    )
  together = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), labelled, unlabelled)
  return together | {"labelled": jnp.concatenate([marked, jnp.zeros(rest, bool)])}


def _row(values: Any) -> str:
  """Kind and shape of an array's rows; images as integers and as floats do not belong into one batch."""
  kinds = {"floats": jnp.floating, "integers": jnp.integer, "bools": jnp.bool_}
  kind = next((name for name, scalar in kinds.items() if jnp.issubdtype(values.dtype, scalar)), str(values.dtype))
  return f"{kind} {list(jnp.shape(values)[1:])}"


class MixedBatches:
  """Iterate over two streams at once, as `mix` puts them together; the position is that of both.

  Args:
    labelled: iterator of labelled batches with `get_state` and `set_state`.
    unlabelled: iterator of unlabelled batches with the same names.
  """

  def __init__(self, labelled: Any, unlabelled: Any):
    self._streams = {"labelled": labelled, "unlabelled": unlabelled}

  def __iter__(self) -> "MixedBatches":
    return self

  def __next__(self) -> Arrays:
    return mix(**{name: next(stream) for name, stream in self._streams.items()})

  def get_state(self) -> dict[str, Any]:
    """Return the positions of both streams."""
    return {name: stream.get_state() for name, stream in self._streams.items()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continue at a position that `get_state` returned."""
    for name, stream in self._streams.items():
      stream.set_state(state[name])


def check_position(kind: str, state: dict[str, Any], own: dict[str, Any], *, counter: str) -> None:
  """Raise a ValueError unless two positions differ in nothing but their counter."""
  if set(state) != set(own):
    raise ValueError(f"a position of {kind} has the fields {sorted(own)}, got {sorted(state)}")
  differing = [
    f"{name} {state[name]} (here {own[name]})" for name in own if name != counter and state[name] != own[name]
  ]
  if differing:
    raise ValueError(f"the position at {counter} {state[counter]} is of other batches: {', '.join(differing)}")


def check_batch_size(batch_size: int, total: int) -> None:
  """Raises a ValueError for a batch that the data cannot fill."""
  if batch_size <= 0:
    raise ValueError(f"batch_size={batch_size} must be positive")
  if batch_size > total:
    raise ValueError(f"batch_size={batch_size} is larger than the data: {total} examples")
