"""Augmentations of small images: NumPy functions `(record, generator) -> record` for `grain_batches`.

A teacher that is recorded sees each example in a few views, each an augmentation by a seed of its own: the number of
the view. `views` makes all of them for the record, `random_view` draws one of them for the student.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from kdflax.data.arrays import Arrays, gather, num_examples

Augmentation = Callable[[Arrays, np.random.Generator], Arrays]


def random_shift(max_pixels: int) -> Augmentation:
  """Make an augmentation that moves the image by up to `max_pixels` in each direction, zeros moving in.

  For a padding of `max_pixels` this is the random crop of the CIFAR literature.

  Args:
    max_pixels: largest shift, in pixels; both shifts are uniform over the whole numbers up to it.

  Returns:
    A function of a record with `image` `[height, width, channels]` and a generator, which returns a new record.

  Raises:
    ValueError: `max_pixels` is negative.
  """
  if max_pixels < 0:
    raise ValueError(f"max_pixels={max_pixels} must not be negative")

  def shift(record: Arrays, generator: np.random.Generator) -> Arrays:
    image = record["image"]
    height, width = image.shape[:2]
    top, left = generator.integers(2 * max_pixels + 1, size=2)
    padded = np.pad(image, ((max_pixels, max_pixels), (max_pixels, max_pixels), (0, 0)))
    return record | {"image": padded[top : top + height, left : left + width]}

  return shift


def random_flip(record: Arrays, generator: np.random.Generator) -> Arrays:
  """Mirror the image left to right in half of the cases. Not for digits: a mirrored digit is no digit.

  Args:
    record: with `image` `[height, width, channels]`.
    generator: decides.

  Returns:
    A new record.
  """
  return record | {"image": record["image"][:, ::-1]} if generator.random() < 0.5 else record


def random_view(augment: Augmentation, num_views: int) -> Augmentation:
  """Make an augmentation that draws one of a few views of the example, those that `views` lists.

  Args:
    augment: of one record; it gets the generator of the view.
    num_views: how many views an example has.

  Returns:
    A function of a record with `index` and a generator, which returns a new record with `view`, the number of the view:
    `teachers.RecordedBatches` finds what the teacher said about it.

  Raises:
    ValueError: `num_views` is less than 1.
  """
  _check_views(num_views)
  return lambda record, generator: _view(record, augment, int(generator.integers(num_views)))


def views(arrays: Arrays, augment: Augmentation, num_views: int, batch_size: int) -> Iterator[Arrays]:
  """Iterate once over every view of every example, for `teachers.record_from`.

  Args:
    arrays: dict of NumPy arrays `[examples, ...]` with `index`, possibly nested.
    augment: `(record, generator) -> record`, as `random_view` gets it.
    num_views: how many views each example has.
    batch_size: rows of a batch; the last one may be smaller.

  Returns:
    An iterator over batches with `view`, int32 `[batch]`.

  Raises:
    ValueError: `num_views` or `batch_size` is less than 1.
  """
  _check_views(num_views)
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be positive")
  return _views(arrays, augment, num_views, batch_size)


def _views(arrays: Arrays, augment: Augmentation, num_views: int, batch_size: int) -> Iterator[Arrays]:
  rows = [(view, row) for view in range(num_views) for row in range(num_examples(arrays))]
  for start in range(0, len(rows), batch_size):
    records = [_view(gather(arrays, np.array(row)), augment, view) for view, row in rows[start : start + batch_size]]
    yield jax.tree.map(lambda *leaves: np.stack(leaves), *records)


def _view(record: Arrays, augment: Augmentation, view: int) -> Arrays:
  """The same for every program: a generator of the view and of the example, not of when it is drawn."""
  generator = np.random.default_rng([view, int(record["index"])])
  return augment(record, generator) | {"view": np.int32(view)}


def _check_views(num_views: int) -> None:
  if num_views < 1:
    raise ValueError(f"num_views={num_views} must be at least 1")
