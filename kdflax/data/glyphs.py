"""Glyphs of free fonts: 62 characters in 1,300 faces, which come with kdflax."""

import json
import lzma
import pathlib
import string

import numpy as np

from kdflax.data.arrays import Arrays, check

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIZE = 20  # height and width of an image in pixels
FILE = pathlib.Path(__file__).with_name("glyphs.bin.xz")
# Of the compressor, in scripts/make_glyphs.py: bytes of two pixels are aligned to nothing.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]

_SPLITS = ("train", "validation", "test")
_FACTS = {"italic": np.int32, "fixed_pitch": np.int32, "weight": np.float32, "width": np.float32, "family": np.int32}


def glyphs(*, faces_per_family: int | None = None, file: str | pathlib.Path = FILE) -> dict[str, Arrays]:
  """Return images of 62 characters in the faces of free fonts, with what the fonts' own tables say of each face.

  Faces are split by family, once and for all: a quarter of the families is for the test and a tenth for validation.
  Families that are one design under two names count as one, and so do all whose names begin with the same word. So
  the test asks what a model makes of fonts that it has never seen. A family has up to 60 faces: seeds, not faces, are
  what intervals should be taken over, and the accuracy on one family says little about another.

  The images are under the licences of their fonts, the SIL Open Font License or the Apache License;
  `glyphs-licences.md` beside the file names them all, and scripts/make_glyphs.py makes the file from Debian's packages.

  Args:
    faces_per_family: of a family with more faces, only so many, evenly chosen; then families weigh nearly alike.
    file: another file of the same form.

  Returns:
    `train`, `validation` and `test`, each with `image` uint8 `[N, 20, 20, 1]`, where ink is 255, and by image `[N]`

    - `character`: int32 in [0, 62), the position in the digits, the capitals and the lower-case letters;
    - `italic`, `fixed_pitch`: int32, 0 or 1 (slanted by the name of the style or its tables; one advance for all 62);
    - `weight`: float32, 100 (thin) to 900 (black), 400 is regular;
    - `width`: float32, 1 (ultra-condensed) to 9 (ultra-expanded), 5 is normal;
    - `family`: int32, the number of the family, and `index`: int32, the position in the whole set.

  Raises:
    ValueError: the file is damaged, or `faces_per_family` is below 1.

  Examples:
    >>> {name: len(split["index"]) for name, split in glyphs().items()}
    {'train': 49910, 'validation': 12338, 'test': 17794}
  """
  if faces_per_family is not None and faces_per_family < 1:
    raise ValueError(f"faces_per_family={faces_per_family} must be at least 1, or None for all faces")
  try:
    content = lzma.decompress(pathlib.Path(file).read_bytes(), format=lzma.FORMAT_XZ)
  except lzma.LZMAError as error:
    raise ValueError(f"file={str(file)!r} is no whole file of glyphs: {error}; install kdflax again") from error
  header, pixels = content.split(b"\n", 1)
  columns = json.loads(header)
  faces, characters = len(columns["split"]), len(CHARACTERS)
  packed = np.frombuffer(pixels, np.uint8).reshape(characters, faces, SIZE, SIZE // 2)
  shades = np.stack([packed >> 4, packed & 15], axis=-1).reshape(characters, faces, SIZE, SIZE)
  image = np.uint8(17) * shades.transpose(1, 0, 3, 2)  # the file goes by columns of pixels
  every = {
    "image": image.reshape(-1, SIZE, SIZE, 1),
    "character": np.tile(np.arange(characters, dtype=np.int32), faces),
    **{name: np.repeat(np.asarray(columns[name], dtype), characters) for name, dtype in _FACTS.items()},
    "index": np.arange(faces * characters, dtype=np.int32),
  }
  kept = _evenly(np.asarray(columns["family"]), faces_per_family)
  split = np.repeat(np.where(kept, columns["split"], -1), characters)
  splits = {name: {key: x[split == number] for key, x in every.items()} for number, name in enumerate(_SPLITS)}
  for arrays in splits.values():
    check(arrays)
  return splits


def _evenly(families: np.ndarray, most: int | None) -> np.ndarray:
  """Whether each face is one of the at most so many of its family, at equal distances in the order of its faces."""
  kept = np.ones(len(families), bool)
  if most is None:
    return kept
  for family in np.unique(families):
    rows = np.flatnonzero(families == family)
    if len(rows) > most:
      kept[rows] = False
      kept[rows[np.arange(most) * len(rows) // most]] = True
  return kept
