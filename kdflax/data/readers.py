"""Readers of published files: CIFAR binary, MNIST IDX, Parquet with images. Nothing is unpickled.

Pixels stay uint8, channels last; turning them into floats is the pipeline's business.
"""

import gzip
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdflax.data.arrays import Arrays, check, gather, stratified_split
from kdflax.data.images import decoded, integers
from kdflax.extras import extra

_CIFAR_PIXELS = 3 * 32 * 32
_CIFAR_FILES = {
  10: {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
  100: {"train": ["train.bin"], "test": ["test.bin"]},
}
_MNIST_FILES = {"train": "train", "test": "t10k"}
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def cifar(path: str | os.PathLike[str], *, classes: int = 10, validation: int = 0, seed: int = 0) -> dict[str, Arrays]:
  """Read CIFAR-10 or CIFAR-100 from its binary files.

  Any number of whole records per file is accepted, not only the published 10,000 or 50,000.

  Args:
    path: folder with `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`, or with `train.bin` and
      `test.bin`.
    classes: 10 or 100.
    validation: training examples to hold out as a stratified validation split; 0 leaves the published two splits.
    seed: of the held-out examples.

  Returns:
    `train`, `test` and, where asked for, `validation`, each with `image` uint8 `[N, 32, 32, 3]`, `label` int32 `[N]`,
    for CIFAR-100 also `coarse_label` int32 `[N]` in [0, 20), and `index` int32 `[N]`, the position in the files read
    in order, training first.

  Raises:
    FileNotFoundError: naming the files that are missing.
    ValueError: a file is truncated or of another format; its expected and seen sizes are named. An image of zeros with
      a label of 0 tells a copy that was not finished, and two superclasses of one class a file that is not CIFAR-100.

  Reference: Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", University of Toronto 2009.
  """
  if classes not in _CIFAR_FILES:
    raise ValueError(f"classes={classes}: CIFAR comes with 10 or 100")
  folder = Path(path)
  names = _CIFAR_FILES[classes]
  missing = [name for files in names.values() for name in files if not (folder / name).is_file()]
  if missing:
    raise FileNotFoundError(
      f"{folder} has no {', '.join(missing)}; expected the binary version of CIFAR-{classes}, unpacked "
      f"(the Python version is pickled and never read)"
    )
  splits = {split: _joined([_cifar_file(folder / name, classes) for name in files]) for split, files in names.items()}
  return _indexed(splits, validation, seed)


def mnist(path: str | os.PathLike[str], *, validation: int = 0, seed: int = 0) -> dict[str, Arrays]:
  """Read MNIST, or a set in its format such as Fashion-MNIST, from its four IDX files.

  Args:
    path: folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two `t10k` files, gzipped (`.gz`)
      or not.
    validation: training examples to hold out as a stratified validation split; 0 leaves the published two splits.
    seed: of the held-out examples.

  Returns:
    `train`, `test` and, where asked for, `validation`, each with `image` uint8 `[N, height, width, 1]`, `label` int32
    `[N]` and `index` int32 `[N]`, the position in the files, training first.

  Raises:
    FileNotFoundError: naming the file that is missing.
    ValueError: a file is truncated or of another format.

  Reference: Yann LeCun, Léon Bottou, Yoshua Bengio and Patrick Haffner, "Gradient-Based Learning Applied to Document
  Recognition", Proceedings of the IEEE 86, 1998.
  """
  splits = {}
  for split, prefix in _MNIST_FILES.items():
    images = idx(_gzipped_or_not(Path(path) / f"{prefix}-images-idx3-ubyte"))
    labels = idx(_gzipped_or_not(Path(path) / f"{prefix}-labels-idx1-ubyte"))
    if images.ndim != 3 or images.dtype != np.uint8 or labels.ndim != 1:
      raise ValueError(
        f"{path}: {prefix} images are {images.dtype} {images.shape} and labels {labels.shape}; "
        f"expected uint8 [N, height, width] and [N]"
      )
    splits[split] = {"image": images[..., None], "label": labels.astype(np.int32)}
    check(splits[split], num_classes=10)
  return _indexed(splits, validation, seed)


def idx(path: str | os.PathLike[str]) -> np.ndarray:
  """Read one array from an IDX file, the format of MNIST.

  The file is two zero bytes, one byte for the type, one for the number of axes, a big-endian uint32 per axis, then the
  big-endian values.

  Args:
    path: the file, gzipped or not; the content tells.

  Returns:
    The array in native byte order.

  Raises:
    ValueError: the file is truncated, too long, or not IDX; its expected and seen sizes are named.
  """
  data = _decompressed(Path(path))
  if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
    raise ValueError(f"{path}: not an IDX file; expected it to start with 0 0 TYPE AXES, saw {data[:4].hex(' ')!r}")
  dtype, axes = np.dtype(_IDX_TYPES[data[2]]), data[3]
  header = 4 + 4 * axes
  if len(data) < header:
    raise ValueError(f"{path}: truncated; expected a header of {header} bytes for {axes} axes, saw {len(data)} bytes")
  shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=axes, offset=4))
  expected = header + math.prod(shape) * dtype.itemsize
  if len(data) != expected:
    raise ValueError(
      f"{path}: expected {expected} bytes for {dtype.name} {shape}, saw {len(data)}; truncated or foreign"
    )
  return np.frombuffer(data, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="))


def parquet(
  path: str | os.PathLike[str],
  *,
  image: str = "image",
  label: str | Mapping[str, str] = "label",
  num_classes: int | Mapping[str, Any] | None = None,
) -> Arrays:
  """Read one split of an image classification set from Parquet files as Hugging Face writes them.

  Needs `pip install "kdflax[parquet]"`. Images are read from the bytes in the file; one that is only a path to
  another file is refused.

  Args:
    path: a Parquet file, or a folder whose `*.parquet` files are the shards of one split, read in the order of names.
    image: the column with `struct<bytes, path>`, the bytes an encoded PNG, JPEG, WebP or BMP. All of one size.
    label: the column with integer classes, or a dict from task to column.
    num_classes: as in `check`; not checked unless given.

  Returns:
    `image` uint8 `[N, height, width, channels]`, 1 channel if all images are grey, else 3; `label` int32 `[N]` or a
    dict of them; `index` int32 `[N]`, the row.

  Raises:
    ImportError: pyarrow or Pillow is missing.
    ValueError: a file is truncated or foreign, a column is missing, a label is absent, an image does not decode or
      differs in size; the file and row are named.
  """
  root = Path(path)
  files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
  if not files:
    raise FileNotFoundError(f"{root} has no *.parquet file")
  columns = dict(label) if isinstance(label, Mapping) else {"": label}
  shards = [_parquet_file(file, image, list(columns.values())) for file in files]
  images = [pixels for shard in shards for pixels in shard[0]]
  shapes = {pixels.shape for pixels in images}
  if len(shapes) > 1:
    raise ValueError(f"{root}: images differ in shape: {sorted(shapes)}; resize them before")
  by_column = {column: np.concatenate([shard[1][column] for shard in shards]) for column in columns.values()}
  labels = {task: by_column[column] for task, column in columns.items()}
  arrays = {
    "image": np.stack(images) if images else np.zeros((0, 0, 0, 0), np.uint8),
    "label": labels if isinstance(label, Mapping) else labels[""],
    "index": np.arange(len(images), dtype=np.int32),
  }
  check(arrays, num_classes=num_classes)
  return arrays


def _cifar_file(file: Path, classes: int) -> Arrays:
  num_labels = 1 if classes == 10 else 2
  record = num_labels + _CIFAR_PIXELS
  size = file.stat().st_size
  if size == 0 or size % record:
    raise ValueError(
      f"{file}: expected a multiple of {record} bytes (CIFAR-{classes} records), saw {size}, which is "
      f"{size // record} records and {size % record} bytes; truncated or foreign"
    )
  records = np.fromfile(file, np.uint8).reshape(-1, record)
  if blank := np.flatnonzero(~records.any(axis=1)).tolist():
    raise ValueError(f"{file}: {len(blank)} records are all zeros, the first is number {blank[0]}; an unfinished copy")
  images = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  # CIFAR-100 has the superclass first and the class last.
  labels = {"label": (num_labels - 1, classes)} | ({"coarse_label": (0, 20)} if classes == 100 else {})
  arrays: Arrays = {"image": np.ascontiguousarray(images)}
  for name, (column, limit) in labels.items():
    arrays[name] = records[:, column].astype(np.int32)
    if arrays[name].max() >= limit:
      raise ValueError(f"{file}: {name} up to {arrays[name].max()}, expected below {limit}; not a CIFAR-{classes} file")
  if classes == 100:
    _check_superclasses(file, arrays["label"], arrays["coarse_label"])
  return arrays


def _check_superclasses(file: Path, fine: np.ndarray, coarse: np.ndarray) -> None:
  found = np.unique(np.stack([fine, coarse]), axis=1)
  names, counts = np.unique(found[0], return_counts=True)
  if (counts > 1).any():
    name = names[counts > 1][0]
    several = found[1][found[0] == name].tolist()
    raise ValueError(f"{file}: label {name} has the coarse labels {several}, expected one; not a CIFAR-100 file")


def _joined(parts: list[Arrays]) -> Arrays:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _indexed(splits: dict[str, Arrays], validation: int, seed: int) -> dict[str, Arrays]:
  """Number the examples through all splits, then hold out `validation` of the training examples."""
  start = 0
  for arrays in splits.values():
    end = start + len(arrays["label"])
    arrays["index"] = np.arange(start, end, dtype=np.int32)
    start = end
  if not validation:
    return splits
  train = splits["train"]
  kept = len(train["label"]) - validation
  if validation < 0 or kept <= 0:
    raise ValueError(
      f"validation={validation} must be at least 0 and below the {len(train['label'])} training examples"
    )
  rows, held_out = stratified_split(train["label"], (kept, validation), seed=seed)
  return {"train": gather(train, rows), "validation": gather(train, held_out), "test": splits["test"]}


def _gzipped_or_not(file: Path) -> Path:
  gzipped = file.with_name(file.name + ".gz")
  for candidate in (file, gzipped):
    if candidate.is_file():
      return candidate
  raise FileNotFoundError(f"{file.parent} has neither {file.name} nor {gzipped.name}")


def _decompressed(file: Path) -> bytes:
  data = file.read_bytes()
  if data[:2] != b"\x1f\x8b":
    return data
  try:
    return gzip.decompress(data)
  except (EOFError, OSError, zlib.error) as error:
    raise ValueError(f"{file}: truncated or damaged gzip file of {len(data)} bytes ({error})") from error


def _parquet_file(file: Path, image: str, labels: list[str]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
  data = file.read_bytes()
  if len(data) < 12 or data[:4] != b"PAR1" or data[-4:] != b"PAR1":
    raise ValueError(f"{file}: not a whole Parquet file; expected PAR1 at both ends, saw {len(data)} bytes without")
  with extra("parquet", "reading Parquet"):
    import PIL  # noqa: F401
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
  try:
    parquet_file = pq.ParquetFile(pa.BufferReader(data))
    missing = {image, *labels} - set(parquet_file.schema_arrow.names)
    if missing:
      raise ValueError(f"{file} has no column {sorted(missing)}; there are {parquet_file.schema_arrow.names}")
    table = parquet_file.read(columns=[image, *labels])
  except (pa.ArrowException, OSError) as error:
    raise ValueError(f"{file}: damaged Parquet file of {len(data)} bytes ({error})") from error
  images = [_decoded(cell, f"{file}, row {row}") for row, cell in enumerate(table[image].to_pylist())]
  return images, {column: integers(table[column], f"{file}, column {column}") for column in labels}


def _decoded(cell: Any, where: str) -> np.ndarray:
  """Decode one `struct<bytes, path>` cell to uint8 `[height, width, channels]`."""
  if not isinstance(cell, Mapping) or not cell.get("bytes"):
    raise ValueError(f"{where}: expected struct<bytes, path> with bytes, saw {cell!r}")
  return decoded(cell["bytes"], where)
