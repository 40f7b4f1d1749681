"""Streams of any source by Grain: shuffled, augmented and batched on the host, with a position."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kdflax.data.arrays import Arrays, gather, num_examples
from kdflax.data.batches import check_batch_size, check_position
from kdflax.extras import extra
from kdflax.files import digest


def grain_batches(
  source: Arrays | Any,
  batch_size: int,
  *,
  seed: int,
  parse: Callable[[Any], Arrays] | None = None,
  augment: Callable[[Arrays, np.random.Generator], Arrays] | None = None,
  num_workers: int = 0,
) -> "GrainBatches":
  """Iterate without end over NumPy batches from a Grain pipeline: shuffle, repeat, augment, batch.

  Every epoch has its own order, and every visit of an example its own random generator, both functions of the seed and
  the position alone. Unlike `batch_indices` nothing is dropped at the end of an epoch: a batch may reach into the next.

  Args:
    source: dict of NumPy arrays `[examples, ...]`, possibly nested; or anything with `len(source)` and `source[i]`, the
      record of an example: `image_folder`, an ArrayRecord file, a Hugging Face data set.
    batch_size: examples per batch.
    seed: of order and augmentation.
    parse: `source[i] -> record`, a dict of NumPy arrays, where the source has something else. A record without `index`
      is given its place in the source.
    augment: `(record, generator) -> record`, where a record is the dict of one example's rows. The rows are views of
      the data and read-only: return new arrays.
    num_workers: processes; 0 reads in threads of this one. The batches are the same with any number, positions are
      not. Workers import the main script again, so guard it with `if __name__ == "__main__"`.

  Returns:
    An iterator with a position, a dict that JSON can hold.

  Raises:
    ValueError: `batch_size` is not positive or larger than the data.
  """
  with extra("data", "a Grain pipeline"):
    import grain  # takes two seconds, which users of DeviceBatches need not pay
  records = _Records(source) if isinstance(source, dict) else _Parsed(source, parse)
  check_batch_size(batch_size, len(records))
  data = grain.MapDataset.source(records).seed(seed).shuffle().repeat(None)
  if augment is not None:
    data = data.random_map(augment)
  stream = data.batch(batch_size, drop_remainder=True).to_iter_dataset(
    grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  )
  if num_workers:
    _mark_flags_as_parsed()
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
  return GrainBatches(
    iter(stream),
    {
      "num_examples": len(records),
      "batch_size": batch_size,
      "seed": seed,
      "num_workers": num_workers,
      "content": records.content(),
    },
  )


class GrainBatches:
  """What `grain_batches` returns: a Grain iterator whose position also says which batches it is of.

  Grain's own position is a counter, which any other pipeline would take and continue with other examples.

  Args:
    iterator: of Grain, kept under this name for what else Grain can do with it.
    identity: what the batches depend on, as JSON.
  """

  def __init__(self, iterator: Any, identity: dict[str, Any]):
    self.iterator = iterator
    self._identity = identity

  def __iter__(self) -> "GrainBatches":
    return self

  def __next__(self) -> Arrays:
    return next(self.iterator)

  def get_state(self) -> dict[str, Any]:
    """Return the position: Grain's own, and what the batches depend on besides the augmentation."""
    return self._identity | {"grain": self.iterator.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continue at a position that `get_state` returned.

    Args:
      state: the position.

    Raises:
      ValueError: it belongs to other batches, which no position could continue; the differing fields are named. The
        content of a data set is known by its names, types, shapes and 64 of its examples.
    """
    check_position("a Grain pipeline", state, self.get_state(), counter="grain")
    self.iterator.set_state(state["grain"])


class _Records:
  """Random access to single examples, as Grain wants it; at module level so that workers can unpickle it."""

  def __init__(self, arrays: Arrays):
    self._arrays = jax.tree.map(_read_only, arrays)
    self._length = num_examples(arrays)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Arrays:
    return jax.tree.map(lambda values: values[index], self._arrays)

  def content(self) -> str:
    """A short name for what the data set holds, from a few of its examples: it may be larger than memory."""
    return digest(gather(self._arrays, _few_rows(len(self), 64)))[:16]


class _Parsed:
  """The records of a source of any kind; at module level so that workers can unpickle it."""

  def __init__(self, source: Any, parse: Callable[[Any], Arrays] | None):
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
      raise ValueError(f"a source needs len() and [i]; {type(source).__name__} has not: read it into arrays")
    self._source, self._parse = source, parse

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Arrays:
    record = self._source[index] if self._parse is None else self._parse(self._source[index])
    if not isinstance(record, Mapping):
      raise ValueError(f"a record must be a dict of arrays, got {type(record).__name__}; give parse=")
    return jax.tree.map(np.asarray, {"index": np.int32(index), **record})

  def content(self) -> str:
    """As of arrays; fewer examples, since each is read and decoded."""
    return digest({str(row): self[int(row)] for row in _few_rows(len(self), 4)})[:16]


def _few_rows(total: int, count: int) -> np.ndarray:
  return np.unique(np.linspace(0, total - 1, count).astype(int))


def _read_only(values: np.ndarray) -> np.ndarray:
  """Return a view in which an augmentation that writes in place fails instead of changing the data."""
  view = np.asarray(values).view()
  view.setflags(write=False)
  return view


def _mark_flags_as_parsed() -> None:
  """Let Grain read its absl flags in a program that is no absl application; without this its workers fail to start."""
  with extra("data", "a Grain pipeline"):
    from absl import flags
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
