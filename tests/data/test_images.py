"""Folders and Parquet files of encoded images: what comes out is what went in, and what is wrong is named."""

import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kdflax import data

PIXELS = np.random.default_rng(0).integers(256, size=(7, 6, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 0, 0, 1, 1, 2, 2], np.int32)
CLASSES = ("ant", "bee", "cat")


def _encoded(pixels, kind="PNG"):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


@pytest.fixture
def folder(tmp_path):
  for n, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
    place = tmp_path / "flowers" / CLASSES[label] / ("deeper" if n == 1 else "")
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{n}.PNG").write_bytes(_encoded(pixels))
  (tmp_path / "flowers" / "ant" / "notes.txt").write_text("no image")
  (tmp_path / "flowers" / ".hidden").mkdir()
  return tmp_path / "flowers"


def _table(path, label=True, **metadata):
  columns = {"image": [{"bytes": _encoded(pixels), "path": None} for pixels in PIXELS]}
  table = pa.table(columns | ({"label": LABELS} if label else {}))
  pq.write_table(table.replace_schema_metadata(metadata or None), path)
  return path


def test_a_folder_of_classes_is_read_in_the_order_of_names(folder):
  images = data.image_folder(folder)
  assert images.classes == CLASSES and len(images) == 7
  arrays = images.arrays()
  order = [0, 2, 1, 3, 4, 5, 6]  # by path: 0.PNG, 2.PNG, deeper/1.PNG
  np.testing.assert_array_equal(arrays["image"], PIXELS[order])
  np.testing.assert_array_equal(arrays["label"], LABELS)
  np.testing.assert_array_equal(arrays["index"], np.arange(7))
  some = images.arrays(np.array([6, 0]))
  np.testing.assert_array_equal(some["image"], PIXELS[[6, 0]])
  np.testing.assert_array_equal(some["index"], [6, 0])


def test_images_without_folders_have_no_labels(tmp_path):
  for n in range(3):
    (tmp_path / f"{n}.bmp").write_bytes(_encoded(PIXELS[n], "BMP"))
  images = data.image_folder(tmp_path)
  assert images.labels is None and images.classes is None
  assert set(images.arrays()) == {"image", "index"}
  np.testing.assert_array_equal(images.arrays()["image"], PIXELS[:3])


@pytest.mark.parametrize("names", [True, False])
def test_a_table_is_the_same_images(tmp_path, names):
  info = {"huggingface": json.dumps({"info": {"features": {"label": {"names": CLASSES}}}})} if names else {}
  for path in (tmp_path / "b.parquet", tmp_path / "a.parquet"):
    _table(path, **info)
  images = data.image_table(tmp_path)
  assert len(images) == 14 and images.classes == (CLASSES if names else None)
  np.testing.assert_array_equal(images.arrays()["image"], np.concatenate([PIXELS, PIXELS]))
  np.testing.assert_array_equal(images.arrays()["label"], np.concatenate([LABELS, LABELS]))
  assert images.names[8].endswith("b.parquet, row 1")
  bare = _table(tmp_path / "bare", label=False)
  assert set(data.image_table(bare, label=None)[0]) == {"image", "index"}


def test_images_stream_in_another_order_each_epoch_and_resume(folder):
  """A position continues in another pipeline, with the same images and augmentation."""
  make = lambda: data.grain_batches(data.image_folder(folder), 2, seed=3, augment=data.random_flip)
  batches = make()
  seen = [next(batches) for _ in range(7)]
  counts = np.bincount(np.concatenate([batch["index"] for batch in seen]))
  np.testing.assert_array_equal(counts, np.full(7, 2))
  again = make()
  [next(again) for _ in range(3)]
  position = json.loads(json.dumps(again.get_state()))
  resumed = make()
  resumed.set_state(position)
  for batch, expected in zip(itertools.islice(resumed, 4), seen[3:], strict=True):
    assert set(batch) == {"image", "label", "index"}
    for name in batch:
      np.testing.assert_array_equal(batch[name], expected[name])
  other = data.grain_batches(data.image_folder(folder, channels=1), 2, seed=3)
  with pytest.raises(ValueError, match="is of other batches: content"):
    other.set_state(position)


def test_a_size_scales_and_cuts_evenly(tmp_path):
  """Three columns of one value each, twice as wide as high: the middle stays."""
  wide = np.repeat(np.array([10, 10, 200, 200, 200, 200, 90, 90], np.uint8)[None, :], 4, axis=0)
  (tmp_path / "wide.png").write_bytes(_encoded(wide))
  image = data.image_folder(tmp_path, size=4, channels=1)[0]["image"]
  np.testing.assert_array_equal(image, np.full((4, 4, 1), 200))
  colours = data.image_folder(tmp_path, size=(2, 4))[0]["image"]
  assert colours.shape == (2, 4, 3)
  np.testing.assert_array_equal(colours[..., 0], colours[..., 2])


def test_a_photo_is_turned_as_it_was_taken(tmp_path):
  picture, facts = Image.fromarray(PIXELS[0]), Image.Exif()
  facts[0x0112] = 6  # turned by 90 degrees
  picture.save(tmp_path / "photo.png", exif=facts)
  np.testing.assert_array_equal(data.image_folder(tmp_path)[0]["image"], np.rot90(PIXELS[0], -1))


def _odd_size(folder):
  (folder / "cat" / "5.PNG").write_bytes(_encoded(PIXELS[5][:4]))


def _broken(folder):
  (folder / "cat" / "5.PNG").write_bytes(_encoded(PIXELS[5])[:40])


def _transparent(folder):
  Image.fromarray(PIXELS[5]).convert("RGBA").save(folder / "cat" / "5.PNG", "PNG")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (_odd_size, r"cat/5.PNG: \[4, 5\] pixels, others have \[6, 5\]; give a size"),
    (_broken, r"cat/5.PNG: the image does not decode"),
    (_transparent, r"cat/5.PNG: an image of mode RGBA; grey, palette and RGB"),
    (lambda f: (f / "dog").mkdir(), r"flowers: no image \(.*\) in the class dog; add some or remove it"),
    (lambda f: (f / "a.png").write_bytes(b""), r"has 1 images beside the folders \['ant', 'bee', 'cat'\]"),
  ],
  ids=["size", "broken", "alpha", "empty class", "beside"],
)
def test_a_folder_that_is_not_in_order_is_named(folder, change, message):
  change(folder)
  with pytest.raises(ValueError, match=message):
    data.image_folder(folder).arrays()


def test_what_is_no_folder_or_table_of_images_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
    data.image_folder(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="has no image"):
    data.image_folder(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"has no \*\.parquet file"):
    data.image_table(tmp_path)
  (tmp_path / "noise.parquet").write_bytes(b"noise" * 10)
  with pytest.raises(ValueError, match="damaged Parquet file"):
    data.image_table(tmp_path / "noise.parquet")
  path = _table(tmp_path / "a.parquet")
  with pytest.raises(ValueError, match=r"has no column \['picture'\]; there are \['image', 'label'\]"):
    data.image_table(path, image="picture")
  with pytest.raises(ValueError, match="channels=4: images have 1"):
    data.image_table(path, channels=4)
  with pytest.raises(ValueError, match="size=0 must be at least one pixel"):
    data.image_table(path, size=0)
  pq.write_table(pa.table({"image": [_encoded(PIXELS[0])], "label": ["ant"]}), path)
  with pytest.raises(ValueError, match="column label: expected integers, saw string with 0 absent"):
    data.image_table(path)


def test_a_stream_wants_records():
  with pytest.raises(ValueError, match=r"a source needs len\(\) and \[i\]; generator has not"):
    data.grain_batches((n for n in range(3)), 2, seed=0)
  with pytest.raises(ValueError, match="a record must be a dict of arrays, got int; give parse="):
    data.grain_batches(list(range(3)), 2, seed=0)
  numbers = data.grain_batches([5, 6, 7], 3, seed=0, parse=lambda n: {"x": np.float32(n)})
  batch = next(numbers)
  np.testing.assert_array_equal(batch["x"], batch["index"] + 5)
