"""The readers on small files in the true formats, and on files that are not."""

import gzip
import io
import math
import struct
import sys

import numpy as np
import pytest

from kdflax.data import cifar, idx, load, mnist, parquet
from kdflax.data.readers import _decoded

CIFAR10_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


def _cifar_bytes(labels, pixels):
  """Labels, then 1024 red, 1024 green and 1024 blue bytes in row-major order, record after record."""
  records = bytearray()
  for label, picture in zip(labels, pixels, strict=True):
    records += bytes(label)
    for channel in range(3):
      for row in range(32):
        records += bytes(picture[row, :, channel].tolist())
  return bytes(records)


def _write_cifar(folder, names, classes, count=4):
  random = np.random.default_rng(0)
  written = {}
  for name in names:
    pixels = random.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    fine = [(i * classes) // count for i in range(count)]
    labels = [(label,) if classes == 10 else (label % 20, label) for label in fine]
    (folder / name).write_bytes(_cifar_bytes(labels, pixels))
    written[name] = pixels, np.array(fine)
  return written


def test_cifar10_in_its_binary_format(tmp_path):
  written = _write_cifar(tmp_path, CIFAR10_FILES, 10)
  splits = cifar(tmp_path, classes=10)
  assert set(splits) == {"train", "test"}
  np.testing.assert_array_equal(splits["train"]["image"], np.concatenate([written[n][0] for n in CIFAR10_FILES[:5]]))
  np.testing.assert_array_equal(splits["train"]["label"], np.concatenate([written[n][1] for n in CIFAR10_FILES[:5]]))
  np.testing.assert_array_equal(splits["test"]["image"], written["test_batch.bin"][0])
  np.testing.assert_array_equal(splits["train"]["index"], np.arange(20))
  np.testing.assert_array_equal(splits["test"]["index"], np.arange(20, 24))
  assert splits["train"]["image"].dtype == np.uint8 and splits["train"]["label"].dtype == np.int32


def test_cifar100_has_the_coarse_label_first(tmp_path):
  written = _write_cifar(tmp_path, ["train.bin", "test.bin"], 100, count=8)
  splits = load("cifar100", path=tmp_path)
  pixels, fine = written["train.bin"]
  np.testing.assert_array_equal(splits["train"]["image"], pixels)
  np.testing.assert_array_equal(splits["train"]["label"], fine)
  np.testing.assert_array_equal(splits["train"]["coarse_label"], fine % 20)


def test_cifar_validation_is_held_out_of_training(tmp_path):
  _write_cifar(tmp_path, CIFAR10_FILES, 10)
  whole, splits = cifar(tmp_path)["train"], cifar(tmp_path, validation=8, seed=1)
  np.testing.assert_array_equal(np.bincount(splits["validation"]["label"], minlength=8), [2, 0, 2, 0, 0, 2, 0, 2])
  rows = np.concatenate([splits["train"]["index"], splits["validation"]["index"]])
  np.testing.assert_array_equal(np.sort(rows), np.arange(20))
  for arrays in (splits["train"], splits["validation"]):
    np.testing.assert_array_equal(arrays["image"], whole["image"][arrays["index"]])
  with pytest.raises(ValueError, match="validation=20 must be at least 0 and below the 20"):
    cifar(tmp_path, validation=20)


@pytest.mark.parametrize("size", [0, 3072, 3074, 3073 * 4 - 1, 3073 * 4 + 7])
def test_cifar_files_of_a_wrong_size_are_refused(tmp_path, size):
  _write_cifar(tmp_path, CIFAR10_FILES, 10)
  (tmp_path / "data_batch_3.bin").write_bytes(bytes(size))
  with pytest.raises(ValueError, match=rf"data_batch_3\.bin: expected a multiple of 3073 bytes .*saw {size},"):
    cifar(tmp_path)


def test_foreign_cifar_files_are_refused(tmp_path):
  written = _write_cifar(tmp_path, ["train.bin", "test.bin"], 100)
  wrong = _cifar_bytes([(3, 100)], written["train.bin"][0][:1])
  (tmp_path / "train.bin").write_bytes(wrong)
  with pytest.raises(ValueError, match=r"train\.bin: label up to 100, expected below 100"):
    cifar(tmp_path, classes=100)
  (tmp_path / "train.bin").write_bytes(_cifar_bytes([(20, 3)], written["train.bin"][0][:1]))
  with pytest.raises(ValueError, match=r"train\.bin: coarse_label up to 20, expected below 20"):
    cifar(tmp_path, classes=100)


@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_that_was_not_finished_is_refused(tmp_path, whole):
  written = _write_cifar(tmp_path, CIFAR10_FILES, 10)
  pixels, labels = written["data_batch_2.bin"]
  good = b"" if whole else _cifar_bytes([(label,) for label in labels], pixels)
  (tmp_path / "data_batch_2.bin").write_bytes(good + bytes(3 * 3073))
  first = 0 if whole else 4
  with pytest.raises(ValueError, match=rf"data_batch_2\.bin: 3 records are all zeros, the first is number {first}"):
    cifar(tmp_path)


def test_a_class_of_two_superclasses_is_refused(tmp_path):
  written = _write_cifar(tmp_path, ["train.bin", "test.bin"], 100)
  (tmp_path / "train.bin").write_bytes(_cifar_bytes([(3, 7), (4, 7)], written["train.bin"][0][:2]))
  with pytest.raises(ValueError, match=r"train\.bin: label 7 has the coarse labels \[3, 4\], expected one"):
    cifar(tmp_path, classes=100)


def test_missing_cifar_files_are_named(tmp_path):
  _write_cifar(tmp_path, CIFAR10_FILES[:4], 10)
  with pytest.raises(FileNotFoundError, match=r"no data_batch_5\.bin, test_batch\.bin; expected the binary version"):
    cifar(tmp_path)
  with pytest.raises(ValueError, match="classes=20"):
    cifar(tmp_path, classes=20)


def _idx_bytes(code, shape, values):
  letter = {0x08: "B", 0x09: "b", 0x0B: "h", 0x0C: "i", 0x0D: "f", 0x0E: "d"}[code]
  header = struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)
  return header + struct.pack(f">{math.prod(shape)}{letter}", *values)


@pytest.mark.parametrize(
  ("code", "dtype"),
  [(0x08, np.uint8), (0x09, np.int8), (0x0B, np.int16), (0x0C, np.int32), (0x0D, np.float32), (0x0E, np.float64)],
)
@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_idx_of_every_type(tmp_path, code, dtype, compress):
  low = 0 if code == 0x08 else -60
  values = list(range(low, low + 24))
  (tmp_path / "file").write_bytes(compress(_idx_bytes(code, (2, 3, 4), values)))
  array = idx(tmp_path / "file")
  assert array.dtype == dtype and array.dtype.isnative
  np.testing.assert_array_equal(array, np.reshape(values, (2, 3, 4)))


GOOD_IDX = _idx_bytes(0x08, (2, 3), range(6))
GOOD_GZIP = gzip.compress(GOOD_IDX, mtime=0)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (GOOD_IDX[:-1], r"expected 18 bytes for uint8 \(2, 3\), saw 17"),
    (GOOD_IDX + b"x", r"expected 18 bytes for uint8 \(2, 3\), saw 19"),
    (GOOD_IDX[:9], "expected a header of 12 bytes for 2 axes, saw 9"),
    (b"", "not an IDX file"),
    (b"\x89PNG\r\n", "not an IDX file"),
    (b"\0\0\x0a\x01\0\0\0\0", "not an IDX file"),
    (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), f"expected {(2**32 - 1) ** 3 + 16} bytes"),
    (GOOD_GZIP[:-9], "truncated or damaged gzip file"),
    (GOOD_GZIP[:10] + b"\xff" * 20, "truncated or damaged gzip file"),  # no such block type
    (GOOD_GZIP[:-8] + bytes(8), "truncated or damaged gzip file"),  # a wrong checksum
  ],
)
def test_truncated_and_foreign_idx_files_are_refused(tmp_path, data, message):
  (tmp_path / "file").write_bytes(data)
  with pytest.raises(ValueError, match=message) as error:
    idx(tmp_path / "file")
  assert str(tmp_path / "file") in str(error.value)


def _write_mnist(folder, count=20):
  for prefix in ("train", "t10k"):
    pixels = np.arange(count * 4) % 251
    images = _idx_bytes(0x08, (count, 2, 2), pixels.tolist())
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(_idx_bytes(0x08, (count,), [i % 5 for i in range(count)]))


def test_mnist_from_its_four_files(tmp_path):
  _write_mnist(tmp_path)
  splits = load("mnist", path=tmp_path, validation=5)
  assert {name: arrays["image"].shape for name, arrays in splits.items()} == {
    "train": (15, 2, 2, 1),
    "validation": (5, 2, 2, 1),
    "test": (20, 2, 2, 1),
  }
  train = splits["train"]
  assert train["image"].dtype == np.uint8
  np.testing.assert_array_equal(train["image"][:, 0, 0, 0], train["index"] * 4 % 251)
  np.testing.assert_array_equal(train["label"], train["index"] % 5)


def test_mnist_files_that_do_not_belong_together_are_refused(tmp_path):
  _write_mnist(tmp_path)
  (tmp_path / "train-labels-idx1-ubyte").write_bytes(_idx_bytes(0x08, (19,), [0] * 19))
  with pytest.raises(ValueError, match="image: 20, label: 19"):
    mnist(tmp_path)
  (tmp_path / "train-labels-idx1-ubyte").write_bytes(_idx_bytes(0x08, (20,), [10] * 20))
  with pytest.raises(ValueError, match=r"label: 20 of 20 entries .* outside \[0, 10\)"):
    mnist(tmp_path)
  (tmp_path / "train-labels-idx1-ubyte").write_bytes(GOOD_IDX)
  with pytest.raises(ValueError, match=r"labels \(2, 3\); expected"):
    mnist(tmp_path)
  (tmp_path / "train-labels-idx1-ubyte").unlink()
  with pytest.raises(FileNotFoundError, match=r"neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte\.gz"):
    mnist(tmp_path)


def _encoded(pixels, kind="PNG"):
  image = pytest.importorskip("PIL.Image")
  buffer = io.BytesIO()
  image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, kind)
  return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_image_cells_are_decoded_with_their_channels(channels):
  pixels = np.random.default_rng(0).integers(256, size=(5, 4, channels), dtype=np.uint8)
  decoded = _decoded({"bytes": _encoded(pixels), "path": "0.png"}, "here")
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize(
  ("cell", "message"),
  [
    ({"bytes": None, "path": "/etc/hostname"}, "with bytes, saw"),
    (7, "with bytes, saw 7"),
    ({"bytes": b"no image", "path": None}, "the image of 8 bytes does not decode"),
    ({"bytes": "truncated", "path": None}, "does not decode"),
    ({"bytes": "alpha", "path": None}, "mode RGBA"),
  ],
)
def test_image_cells_that_hold_no_image_are_refused(cell, message):
  pytest.importorskip("PIL")
  if cell == {"bytes": "truncated", "path": None}:
    cell = {"bytes": _encoded(np.random.default_rng(0).integers(256, size=(9, 9, 3), dtype=np.uint8))[:-60]}
  elif cell == {"bytes": "alpha", "path": None}:
    cell = {"bytes": _encoded(np.zeros((2, 2, 4), np.uint8))}
  with pytest.raises(ValueError, match=rf"file\.parquet, row 3: .*{message}"):
    _decoded(cell, "file.parquet, row 3")


def test_files_that_are_no_parquet_are_refused(tmp_path):
  (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(40))
  with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file; .* saw 44 bytes"):
    parquet(tmp_path)
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(FileNotFoundError, match=r"no \*\.parquet file"):
    parquet(empty)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
  with pytest.raises(ImportError, match=r"pip install \"kdflax\[parquet\]\""):
    parquet(tmp_path / "a.parquet")


def _write_parquet(file, pixels, **columns):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  cells = [{"bytes": _encoded(picture), "path": f"{i}.png"} for i, picture in enumerate(pixels)]
  struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  pq.write_table(pa.table({"img": pa.array(cells, struct_type), **columns}), file)


def test_parquet_shards_with_images(tmp_path):
  pixels = np.random.default_rng(0).integers(256, size=(6, 4, 4, 3), dtype=np.uint8)
  _write_parquet(tmp_path / "train-00000-of-00002.parquet", pixels[:4], fine=[0, 1, 2, 3], coarse=[0, 0, 1, 1])
  _write_parquet(tmp_path / "train-00001-of-00002.parquet", pixels[4:], fine=[4, 5], coarse=[0, 1])
  arrays = parquet(tmp_path, image="img", label="fine", num_classes=6)
  np.testing.assert_array_equal(arrays["image"], pixels)
  np.testing.assert_array_equal(arrays["label"], np.arange(6))
  np.testing.assert_array_equal(arrays["index"], np.arange(6))
  assert arrays["label"].dtype == np.int32
  tasks = parquet(tmp_path, image="img", label={"class": "fine", "group": "coarse"}, num_classes={"group": 2})
  np.testing.assert_array_equal(tasks["label"]["group"], [0, 0, 1, 1, 0, 1])


def test_parquet_files_that_do_not_fit_are_refused(tmp_path):
  pixels = np.zeros((2, 4, 4, 3), np.uint8)
  file = tmp_path / "a.parquet"
  _write_parquet(file, pixels, fine=[0, None], text=["a", "b"], good=[0, 9])
  with pytest.raises(ValueError, match=r"no column \['image', 'label'\]; there are \['img', 'fine', 'text', 'good'\]"):
    parquet(file)
  for column in ("fine", "text"):
    with pytest.raises(ValueError, match=f"column {column}: expected integers"):
      parquet(file, image="img", label=column)
  with pytest.raises(ValueError, match=r"label: 1 of 2 entries \(first at 1\) outside \[0, 9\)"):
    parquet(file, image="img", label="good", num_classes=9)
  data = file.read_bytes()
  file.write_bytes(data[:40] + data[80:])
  with pytest.raises(ValueError, match=r"a\.parquet"):
    parquet(file, image="img", label="good")
