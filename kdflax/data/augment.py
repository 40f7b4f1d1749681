"""Augmentations of small images: NumPy functions `(record, generator) -> record` for `grain_batches`."""

from collections.abc import Callable

import numpy as np

from kdflax.data.arrays import Arrays


def random_shift(max_pixels: int) -> Callable[[Arrays, np.random.Generator], Arrays]:
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
