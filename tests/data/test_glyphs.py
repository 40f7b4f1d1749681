"""The glyphs that come with kdflax: what is in them, and that the script which made them packs the same bytes."""

import hashlib
import io
import json
import lzma

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from kdflax import data
from kdflax.data.glyphs import CHARACTERS, FILE, glyphs
from scripts import make_glyphs

FACTS = ("italic", "fixed_pitch", "weight", "width", "family")
LICENCE = "Licensed under the SIL Open Font License, Version 1.1"


@pytest.fixture(scope="module")
def splits():
  return glyphs()


def test_the_file_is_the_one_that_was_made():
  content = FILE.read_bytes()
  assert hashlib.sha256(content).hexdigest() == "3a1a286cbfc88e029d95585921381babdd4d075e991f6114a1eb858b140bb890"
  assert len(content) < 2_600_000


def test_shapes_dtypes_and_ranges(splits):
  assert list(splits) == ["train", "validation", "test"]
  for arrays in splits.values():
    count = len(arrays["index"])
    assert arrays["image"].shape == (count, 20, 20, 1) and arrays["image"].dtype == np.uint8
    assert set(np.unique(arrays["image"])) == set(range(0, 256, 17))
    assert arrays["image"].any((1, 2, 3)).all()
    for name in ("character", "index", *FACTS):
      assert arrays[name].shape == (count,)
      assert arrays[name].dtype == (np.float32 if name in ("weight", "width") else np.int32)
    assert np.bincount(arrays["character"], minlength=62).tolist() == [count // 62] * 62
    for name in ("italic", "fixed_pitch"):
      assert set(arrays[name].tolist()) == {0, 1}
    assert 100 <= arrays["weight"].min() < arrays["weight"].max() <= 900
    assert 1 <= arrays["width"].min() < arrays["width"].max() <= 9


def test_families_are_split_and_none_twice(splits):
  families = {name: set(arrays["family"].tolist()) for name, arrays in splits.items()}
  numbers = set().union(*families.values())
  assert sum(map(len, families.values())) == len(numbers) and numbers == set(range(len(numbers)))
  assert len(families["test"]) == round(len(numbers) / 4)
  assert len(families["validation"]) == round(len(numbers) / 10)
  positions = np.concatenate([arrays["index"] for arrays in splits.values()])
  assert np.array_equal(np.sort(positions), np.arange(len(positions)))


def test_large_families_can_be_thinned_evenly(splits):
  few = glyphs(faces_per_family=4)
  for name, arrays in few.items():
    before, after = (np.bincount(part["family"], minlength=200) // 62 for part in (splits[name], arrays))
    np.testing.assert_array_equal(after, np.minimum(before, 4))
    rows = np.searchsorted(splits[name]["index"], arrays["index"])
    np.testing.assert_array_equal(splits[name]["image"][rows], arrays["image"])
  with pytest.raises(ValueError, match="faces_per_family=0 must be at least 1, or None"):
    glyphs(faces_per_family=0)


def test_no_design_is_in_two_splits(splits):
  """The nearest test face of another family differs by more than the script calls one design."""
  faces = {name: arrays["image"].reshape(-1, 62 * 400).astype(np.float32) / 17 for name, arrays in splits.items()}
  seen = faces["train"]
  for name in ("validation", "test"):
    for face in faces[name][::25]:
      differences = np.abs(seen - face).sum(-1) / (seen.sum(-1) + face.sum())
      assert differences.min() >= make_glyphs._ALIKE


def test_facts_are_those_of_a_face(splits):
  for arrays in splits.values():
    for name in FACTS:
      assert (np.ptp(arrays[name].reshape(-1, 62), axis=1) == 0).all()


def test_pictures_look_like_their_character(splits):
  """By the nearest mean image of the training faces, unseen families are read far above chance: labels fit images."""
  flat = {name: splits[name]["image"].reshape(-1, 62, 400)[:200].astype(np.float32) for name in ("train", "test")}
  means = flat["train"].mean(0)
  distances = ((flat["test"][:, :, None] - means) ** 2).sum(-1)
  assert (distances.argmin(-1) == np.arange(62)).mean() > 0.6
  upright = [CHARACTERS.index(character) for character in "IlTH"]
  slanted = splits["train"]["italic"].reshape(-1, 62)[:, 0] == 1
  lean = _lean(splits["train"]["image"].reshape(-1, 62, 20, 20)[:, upright].sum(1, dtype=np.int64))
  assert lean[slanted].mean() > lean[~slanted].mean() + 0.5  # six degrees, over five rows


def _lean(images):
  """How much further right the upper half is than the lower one, in pixels."""
  at = lambda part: (part * np.arange(20)).sum((1, 2)) / part.sum((1, 2))
  return at(images[:, 4:9]) - at(images[:, 9:14])


def test_a_damaged_file_is_named(tmp_path):
  damaged = tmp_path / "glyphs.bin.xz"
  damaged.write_bytes(FILE.read_bytes()[:1000])
  with pytest.raises(ValueError, match=r"glyphs\.bin\.xz' is no whole file of glyphs: .*install kdflax again$"):
    glyphs(file=damaged)


def font(*, family="Test Sans", style="Regular", licence=LICENCE, weight=400, ascender=700, left_out=""):
  """The bytes of a font whose characters are bars of different widths; `b`, `d`, `f`, `h`, `k`, `l` have ascenders."""
  characters = [character for character in CHARACTERS if character not in left_out]
  names = [".notdef", *(f"glyph{ord(character)}" for character in characters)]
  builder = FontBuilder(1000, isTTF=True)
  builder.setupGlyphOrder(names)
  builder.setupCharacterMap({ord(character): f"glyph{ord(character)}" for character in characters})
  builder.setupGlyf({name: _bar(name, weight, ascender) for name in names})
  builder.setupHorizontalMetrics({name: (600, 50) for name in names})
  builder.setupHorizontalHeader(ascent=800, descent=-200)
  builder.setupNameTable({"familyName": family, "styleName": style, "licenseDescription": licence})
  builder.setupOS2(usWeightClass=weight, usWidthClass=5, fsSelection=64)
  builder.setupPost()
  content = io.BytesIO()
  builder.save(content)
  return content.getvalue()


def _bar(name, weight, ascender):
  character = chr(int(name.removeprefix("glyph"))) if name.startswith("glyph") else " "
  height = ascender if character in "bdfhkl" else 700 if character.isupper() else 450
  pen = TTGlyphPen(None)
  for left, right, top in ((50, 100 + weight // 4, height), (50, 340 + 9 * CHARACTERS.find(character), 100)):
    pen.moveTo((left, 0))
    for point in ((left, top), (right, top), (right, 0)):
      pen.lineTo(point)
    pen.closePath()
  return pen.glyph()


def test_a_font_is_read_by_its_own_tables():
  face, _ = make_glyphs.read_face(font(style="Bold Italic", weight=700), "fonts-test")
  assert face[:4] == ("fonts-test", "Test Sans", "Bold Italic", "OFL")
  assert (face.italic, face.fixed_pitch, face.weight, face.width) == (True, True, 700.0, 5)
  assert face.images.shape == (62, 20, 20) and face.images.max() == 15


@pytest.mark.parametrize(
  "changes",
  [{"licence": "All rights reserved"}, {"left_out": "q"}, {"ascender": 450}, {"weight": 703}],
  ids=["licence", "character", "small capitals", "weight"],
)
def test_what_does_not_fit_is_left_out(changes):
  assert make_glyphs.read_face(font(), "fonts-test")[0] is not None
  assert make_glyphs.read_face(font(**changes), "fonts-test")[0] is None


def test_packing_twice_gives_the_same_bytes_and_they_are_read(tmp_path):
  weights = (300, 500, 700, 900)
  faces = [
    make_glyphs.read_face(font(family=f"{name} Sans", weight=weight), "fonts-test")[0]
    for name, weight in zip(("Dusk", "Apex", "Cove", "Bolt"), weights, strict=True)
  ]
  made = []
  for order in (faces, faces[::-1]):
    chosen = make_glyphs.select([*order, *order])  # the second of a family and style is left out
    made.append(make_glyphs.pack(chosen, [0, 1, 2, 3], [0, 0, 1, 2]))
  assert made[0] == made[1]
  file = tmp_path / "glyphs.bin.xz"
  file.write_bytes(made[0])
  read = glyphs(file=file)
  assert [len(read[name]["index"]) for name in read] == [124, 62, 62]
  assert read["validation"]["weight"].tolist() == [700.0] * 62
  np.testing.assert_array_equal(read["test"]["image"][..., 0], 17 * chosen[3].images)
  names = json.loads(lzma.decompress(made[0]).split(b"\n", 1)[0])["name"]
  assert names == ["Apex Sans Regular", "Bolt Sans Regular", "Cove Sans Regular", "Dusk Sans Regular"]


def test_one_design_under_two_names_is_one_family():
  faces = [
    make_glyphs.read_face(font(family=name, weight=weight), "fonts-test")[0]
    for name, weight in (("Apex", 400), ("Bolt Serif", 425), ("Bolt Sans", 900), ("Cove", 900), ("Dusk", 100))
  ]
  assert make_glyphs.family_numbers(faces) == [0, 0, 0, 0, 1]


def test_the_split_is_by_family_and_always_the_same():
  families = [0, 0, 1, *range(2, 20), 7]
  splits = make_glyphs.split_of(families)
  assert splits == make_glyphs.split_of(families) and splits[0] == splits[1] and splits[8] == splits[-1]
  of_family = dict(zip(families, splits, strict=True))
  assert [list(of_family.values()).count(number) for number in (0, 1, 2)] == [13, 2, 5]


def test_the_notice_names_every_family():
  text = make_glyphs.NOTICE.read_text()
  rows = [line.split("|") for line in text.splitlines() if line.count("|") == 6]
  faces = sum(int(row[2]) for row in rows if row[2].strip().isdigit())
  assert faces == sum(len(arrays["index"]) for arrays in data.glyphs().values()) // 62
  assert "PERMISSION & CONDITIONS" in text and "TERMINATION" in text
