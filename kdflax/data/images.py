"""Encoded images in folders and in Parquet files, decoded where they are asked for: one at a time, or all at once."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kdflax.data.arrays import Arrays
from kdflax.extras import extra

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


class Images:
  """Images that stay encoded until they are asked for: a source for `grain_batches`, or arrays at once.

  `images[i]` is the record of one example: `image`, uint8 `[height, width, channels]`, `label`, int32, unless there are
  none, and `index`, int32. `image_folder` and `image_table` make it.

  Attributes:
    labels: int32 `[N]`, or None.
    classes: their names, or None if there are no labels or no names.
    names: where each image is, for messages.
  """

  def __init__(
    self,
    encoded: Sequence[Any],
    names: Sequence[str],
    labels: np.ndarray | None,
    classes: Sequence[str] | None,
    *,
    size: int | tuple[int, int] | None,
    channels: int,
  ):
    """Keeps paths, or the bytes of encoded images, with their labels; see `image_folder`."""
    if channels not in (1, 3):
      raise ValueError(f"channels={channels}: images have 1 (grey) or 3 (colours)")
    if min((size,) if isinstance(size, int) else size or (1,)) < 1:
      raise ValueError(f"size={size} must be at least one pixel")
    with extra("images", "reading images"):
      import PIL  # noqa: F401
    self.labels: np.ndarray | None = labels
    self.classes: tuple[str, ...] | None = None if classes is None else tuple(classes)
    self.names: Sequence[str] = names
    self._encoded, self._channels = encoded, channels
    self._size = (size, size) if isinstance(size, int) else size
    self._shape: tuple[int, ...] | None = None  # of the first image read, where they must agree

  def __len__(self) -> int:
    return len(self._encoded)

  def __getitem__(self, row: int) -> Arrays:
    row = range(len(self))[row]
    image = decoded(self._encoded[row], self.names[row], size=self._size, channels=self._channels)
    self._shape = self._shape or image.shape
    if image.shape != self._shape:
      raise ValueError(
        f"{self.names[row]}: {list(image.shape[:2])} pixels, others have {list(self._shape[:2])}; give a size to bring"
        " them to"
      )
    label = {} if self.labels is None else {"label": self.labels[row]}
    return {"image": image, **label, "index": np.int32(row)}

  def arrays(self, rows: np.ndarray | None = None) -> Arrays:
    """Decodes some images, or all, in threads.

    Args:
      rows: which; by default all.

    Returns:
      `image` uint8 `[N, height, width, channels]`, `label` int32 `[N]` if there are labels, `index` int32 `[N]`.

    Raises:
      ValueError: an image does not decode or differs in size; its name is given.
    """
    rows = np.arange(len(self)) if rows is None else np.asarray(rows)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      images = list(pool.map(lambda row: self[int(row)]["image"], rows))
    label = {} if self.labels is None else {"label": self.labels[rows]}
    return {"image": np.stack(images), **label, "index": rows.astype(np.int32)}


def image_folder(
  directory: str | os.PathLike[str], *, size: int | tuple[int, int] | None = None, channels: int = 3
) -> Images:
  """Open a folder of images: one subfolder for each class, or all images in it and no labels.

  Needs `pip install "kdflax[images]"`. Classes are numbered in the order of their names, images in the order of classes
  and file names. Only PNG, JPEG, WebP and BMP files are looked at, also in folders below that of their class.

  Args:
    directory: the folder.
    size: height and width, or one number for both: images are scaled and what is beyond is cut off evenly. None
      leaves them, and then they must agree.
    channels: 3, or 1 for grey.

  Returns:
    The images; nothing is decoded yet.

  Raises:
    ImportError: Pillow is missing.
    FileNotFoundError: there is no such folder.
    ValueError: there is no image, a class has none, or some lie beside the folders of the classes.

  Examples:
    images = data.image_folder("flowers", size=64)
    batches = data.grain_batches(images, 32, seed=0, augment=data.random_flip)
  """
  root = Path(directory)
  if not root.is_dir():
    raise FileNotFoundError(f"{root} is no folder")
  beside = [file for file in sorted(root.iterdir()) if _is_image(file)]
  folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
  by_class = {folder.name: [f for f in sorted(folder.rglob("*")) if _is_image(f)] for folder in folders}
  if beside and any(by_class.values()):
    raise ValueError(f"{root} has {len(beside)} images beside the folders {list(by_class)[:5]}; move them into one")
  empty = [name for name, files in by_class.items() if not files]
  if empty and not beside:
    raise ValueError(f"{root}: no image ({', '.join(SUFFIXES)}) in the class {', '.join(empty)}; add some or remove it")
  files = beside or [file for several in by_class.values() for file in several]
  if not files:
    raise ValueError(f"{root} has no image ({', '.join(SUFFIXES)}), and no folder with some")
  labels = None if beside else np.repeat(np.arange(len(by_class)), [len(f) for f in by_class.values()]).astype(np.int32)
  classes = None if beside else list(by_class)
  return Images(files, [str(file) for file in files], labels, classes, size=size, channels=channels)


def image_table(
  path: str | os.PathLike[str],
  *,
  image: str = "image",
  label: str | None = "label",
  size: int | tuple[int, int] | None = None,
  channels: int = 3,
) -> Images:
  """Open Parquet files with encoded images, as Hugging Face writes them; they stay encoded in memory.

  Needs `pip install "kdflax[parquet]"`.

  Args:
    path: a Parquet file, or a folder whose `*.parquet` files are read in the order of names.
    image: the column of images: `struct<bytes, path>` with the bytes, or binary.
    label: the column of integer classes; None if there are no labels. Names of classes that Hugging Face has stored in
      the file are kept.
    size: as for `image_folder`.
    channels: as for `image_folder`.

  Returns:
    The images; nothing is decoded yet.

  Raises:
    ImportError: pyarrow or Pillow is missing.
    FileNotFoundError: there is no such file.
    ValueError: a file is damaged, a column is missing, or a label is absent.
  """
  with extra("parquet", "reading Parquet"):
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
  root = Path(path)
  files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
  if not files:
    raise FileNotFoundError(f"{root} has no *.parquet file")
  columns = [image] if label is None else [image, label]
  tables = []
  for file in files:
    try:
      there = pq.read_schema(file).names
      missing = set(columns) - set(there)
      if missing:
        raise ValueError(f"{file} has no column {sorted(missing)}; there are {there}")
      tables.append(pq.read_table(file, columns=columns))
    except pa.ArrowException as error:
      raise ValueError(f"{file}: damaged Parquet file ({error})") from error
  table = pa.concat_tables(tables)
  if not table.num_rows:
    raise ValueError(f"{root} has no rows")
  labels = None if label is None else integers(table[label], f"{root}, column {label}")
  names = [f"{file}, row {row}" for file, part in zip(files, tables, strict=True) for row in range(part.num_rows)]
  return Images(_Cells(table[image]), names, labels, _class_names(table, label), size=size, channels=channels)


def decoded(encoded: Any, name: str, *, size: tuple[int, int] | None = None, channels: int | None = None) -> np.ndarray:
  """Decode an image, a path or the bytes of a file.

  Args:
    encoded: the path or the bytes.
    name: where it is, for the message.
    size: scaled and cut to; None leaves it.
    channels: 1 or 3; None keeps what it has, a palette becoming colours.

  Returns:
    uint8 `[height, width, channels]`.

  Raises:
    ValueError: it does not decode, or is neither grey, nor has a palette, nor RGB.
  """
  from PIL import Image, ImageOps, UnidentifiedImageError

  try:
    picture = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_FORMATS)
    picture.load()
  except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
    length = f"the image of {len(encoded)} bytes" if isinstance(encoded, bytes) else "the image"
    raise ValueError(f"{name}: {length} does not decode ({error})") from error
  if picture.mode not in ("1", "L", "P", "RGB"):
    raise ValueError(f"{name}: an image of mode {picture.mode}; grey, palette and RGB images are read")
  mode = ("L" if picture.mode in ("1", "L") else "RGB") if channels is None else ("L" if channels == 1 else "RGB")
  picture = ImageOps.exif_transpose(picture).convert(mode)
  if size is not None and picture.size != (size[1], size[0]):
    picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BILINEAR)
  return np.atleast_3d(np.asarray(picture))


class _Cells(Sequence[bytes]):
  """The bytes of a Parquet column by row; at module level so that Grain's workers can be given it."""

  def __init__(self, column: Any):
    self._column = column

  def __len__(self) -> int:
    return len(self._column)

  def __getitem__(self, row: Any) -> Any:
    cell = self._column[row].as_py()
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(content, bytes):
      raise ValueError(f"row {row}: expected the bytes of an image, saw {cell!r}")
    return content


def _is_image(file: Path) -> bool:
  return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def integers(column: Any, where: str) -> np.ndarray:
  """A Parquet column of classes, int32; refused if one is absent."""
  values = column.to_numpy()
  if column.null_count or not np.issubdtype(values.dtype, np.integer):
    raise ValueError(f"{where}: expected integers, saw {column.type} with {column.null_count} absent")
  return values.astype(np.int32)


def _class_names(table: Any, label: str | None) -> list[str] | None:
  """The names that Hugging Face keeps in the metadata of a schema, if they are there."""
  try:
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    return [str(name) for name in features[label]["names"]]
  except (TypeError, LookupError, ValueError):
    return None
