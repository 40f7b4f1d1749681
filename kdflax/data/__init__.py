"""Data sets as plain dicts of arrays, and batches whose position can be saved and restored."""

from kdflax.data.arrays import check, gather, num_examples, stratified_split, with_label_budget
from kdflax.data.augment import random_flip, random_shift
from kdflax.data.batches import (
  DeviceBatches,
  GrainBatches,
  MixedBatches,
  batch_indices,
  grain_batches,
  mix,
  padded_batches,
)
from kdflax.data.readers import cifar, idx, mnist, parquet
from kdflax.data.sources import digits, load, overlaid_digits, tabular

__all__ = [
  "DeviceBatches",
  "GrainBatches",
  "MixedBatches",
  "batch_indices",
  "check",
  "cifar",
  "digits",
  "gather",
  "grain_batches",
  "idx",
  "load",
  "mix",
  "mnist",
  "num_examples",
  "overlaid_digits",
  "padded_batches",
  "parquet",
  "random_flip",
  "random_shift",
  "stratified_split",
  "tabular",
  "with_label_budget",
]
