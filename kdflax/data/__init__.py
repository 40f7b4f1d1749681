"""Data sets as plain dicts of arrays, and batches whose position can be saved and restored."""

from kdflax.data.arrays import Arrays, check, gather, num_examples, stratified_split, with_label_budget
from kdflax.data.augment import random_flip, random_shift, random_view, views
from kdflax.data.batches import (
  DeviceBatches,
  MixedBatches,
  batch_indices,
  mix,
  padded_batches,
  sample,
)
from kdflax.data.glosses import glosses
from kdflax.data.glyphs import glyphs
from kdflax.data.images import Images, image_folder, image_table
from kdflax.data.readers import cifar, idx, mnist, parquet
from kdflax.data.sets import DATASETS, Dataset, Normalisation, Task, by_task, dataset, load, normalize
from kdflax.data.sources import digits, overlaid_digits, tabular
from kdflax.data.streams import GrainBatches, grain_batches
from kdflax.data.text import Text, byte_pairs, pack, read_tokenizer, split_by_name, standard_library

__all__ = [
  "DATASETS",
  "Arrays",
  "Dataset",
  "DeviceBatches",
  "GrainBatches",
  "Images",
  "MixedBatches",
  "Normalisation",
  "Task",
  "Text",
  "batch_indices",
  "by_task",
  "byte_pairs",
  "check",
  "cifar",
  "dataset",
  "digits",
  "gather",
  "glosses",
  "glyphs",
  "grain_batches",
  "idx",
  "image_folder",
  "image_table",
  "load",
  "mix",
  "mnist",
  "normalize",
  "num_examples",
  "overlaid_digits",
  "pack",
  "padded_batches",
  "parquet",
  "random_flip",
  "random_shift",
  "random_view",
  "read_tokenizer",
  "sample",
  "split_by_name",
  "standard_library",
  "stratified_split",
  "tabular",
  "views",
  "with_label_budget",
]
