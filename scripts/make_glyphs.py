"""Makes the data set of glyphs anew from Debian's font packages, bit for bit: `python -m scripts.make_glyphs`.

Wants a Debian 12 with its package lists (`apt-get update`), 2 GB of room in `--folder`, Pillow and fontTools as pinned
in requirements.txt, and about five minutes. Nothing is installed: packages are fetched in the versions of
scripts/glyph_packages.txt and read as archives. Writes kdflax/data/glyphs.bin.xz and glyphs-licences.md beside it.

    python -m scripts.make_glyphs                 makes the files; `git diff` shows nothing if they are as before
    python -m scripts.make_glyphs --folder DIR    keeps the packages there
"""

import argparse
import io
import json
import logging
import lzma
import pathlib
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from kdflax.data.glyphs import CHARACTERS, FILE, FILTERS, SIZE
from kdflax.training import write_atomically

PACKAGES = pathlib.Path(__file__).with_name("glyph_packages.txt")
NOTICE = FILE.with_name("glyphs-licences.md")
SEED = 0  # of the split
TEST, VALIDATION = 0.25, 0.1  # shares of the families

_ENLARGED = 4  # glyphs are drawn so much larger and averaged, so that no hinting bends their stems
_EM, _BASELINE = 0.8, 0.72  # of the size of an image
_MOST = 60  # faces of one family: a large one must not be the whole set
_ALIKE = 0.083  # of the ink; families with two faces that differ by less are one design under two names
# Designs that went by another name with more changes than that.
_SAME_DESIGN = (
  ("baskervillef", "libre"),
  ("carlito", "lato"),
  ("charis", "xcharter"),
  ("erewhon", "heuristica"),
  ("inconsolatan", "inconsolatazi4"),
  ("libertinus", "ponomar"),
  ("m", "mplus"),
  ("rasa", "yrsa"),
)


class Face(NamedTuple):
  """One style of a family, as its own tables describe it."""

  package: str
  family: str
  style: str
  licence: str  # OFL or Apache
  copyright: str
  italic: bool
  fixed_pitch: bool
  weight: float  # 100 to 900
  width: int  # 1 (ultra-condensed) to 9 (ultra-expanded)
  images: np.ndarray  # [62, 20, 20] uint8 of 0 to 15, the ink


def main(folder: pathlib.Path) -> None:
  """Downloads what is missing in the folder, and writes the data and the notice."""
  logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of thousands of marks that nobody asks for
  faces, ofl = [], ""
  for archive in download(folder):
    for content in font_files(archive):
      face, text = read_face(content, archive.name.split("_")[0])
      faces += [face] if face else []
      ofl = ofl or text
  faces = select(faces)
  families = family_numbers(faces)
  splits = split_of(families)
  write_atomically(FILE, pack(faces, families, splits))
  write_atomically(NOTICE, notice(faces, ofl))
  print(f"{len(faces)} faces of {max(families) + 1} families, {FILE.stat().st_size} bytes")


def download(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the pinned packages, fetched by apt-get where the folder lacks them, in the order of the list."""
  folder.mkdir(parents=True, exist_ok=True)
  pinned = [line.split() for line in PACKAGES.read_text().splitlines() if line and not line.startswith("#")]
  # apt-get writes the colon of an epoch as %3a.
  find = lambda name, version: next(folder.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"), None)
  if missing := [f"{name}={version}" for name, version in pinned if not find(name, version)]:
    subprocess.run(["apt-get", "download", *missing], cwd=folder, check=True)
  return [found for name, version in pinned if (found := find(name, version))]


def font_files(archive: pathlib.Path) -> Iterator[bytes]:
  """Yields the TrueType and OpenType files of a package, in the order of their paths."""
  content = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
  with tarfile.open(fileobj=content.stdout, mode="r|") as files:
    fonts = {
      file.name: files.extractfile(file).read()  # pyright: ignore[reportOptionalMemberAccess]
      for file in files
      if file.isfile() and file.name.lower().endswith((".otf", ".ttf"))
    }
  if content.wait():
    raise ValueError(f"{archive} is no whole package; remove it and run again")
  yield from (fonts[name] for name in sorted(fonts))


def read_face(content: bytes, package: str) -> tuple[Face | None, str]:
  """Reads a font; None unless it has all characters, a free licence in its tables and two cases of letters.

  Args:
    content: of a font file.
    package: that it came in.

  Returns:
    The face, and the text of the Open Font License if the font holds it whole.
  """
  try:
    font = TTFont(io.BytesIO(content), lazy=True)
    names, style_bits, cmap = font["name"], font["OS/2"], font.getBestCmap() or {}
    said = lambda *numbers: next((text for number in numbers if (text := names.getDebugName(number))), "").strip()
    family, style, terms = said(16, 1), said(17, 2), f"{said(13)}\n{said(14)}"
    licence = licence_of(terms)
    weight = style_bits.usWeightClass * (100 if style_bits.usWeightClass < 10 else 1)  # old fonts count 1 to 9
    # Some fonts mark an order there, as 701, 702 and so on.
    known_weight = 100 <= weight <= 900 and weight % 25 == 0
    if not (licence and family and known_weight and 1 <= style_bits.usWidthClass <= 9):
      return None, ""
    if any(ord(character) not in cmap for character in CHARACTERS):
      return None, ""
    advances = {font["hmtx"][cmap[ord(character)]][0] for character in CHARACTERS}
    stated = re.search(r"italic|oblique|slanted", f"{style} {said(4)}", re.I)
    italic = bool(stated) or bool(style_bits.fsSelection & 1 and font["post"].italicAngle)
  except Exception as error:  # what fontTools says of a broken file has many names
    print(f"{package}: a font that cannot be read is left out: {error!r}")
    return None, ""
  images = reduced(draw(content))
  if not usable(images) or small_capitals(images):
    return None, ""
  notes = said(0).splitlines()
  facts = (italic, len(advances) == 1, float(weight), int(style_bits.usWidthClass))
  terms = said(13).replace("\r\n", "\n")
  whole = "OPEN FONT LICENSE" in terms and "OF ANY KIND,\nEXPRESS" in terms  # and with its lines as they should be
  return Face(package, family, style, licence, notes[0] if notes else "", *facts, images), terms if whole else ""


def licence_of(terms: str) -> str:
  """`OFL` or `Apache` if the tables state it, else nothing."""
  if re.search(r"Open Font Licen[cs]e|\bOFL\b|openfontlicense\.org", terms, re.I):
    return "OFL"
  return "Apache" if re.search(r"Apache License|apache\.org/licenses", terms, re.I) else ""


def draw(content: bytes) -> np.ndarray:
  """Draws the characters, enlarged: uint8 `[62, size, size]`, 255 is ink."""
  side = SIZE * _ENLARGED
  font = ImageFont.truetype(io.BytesIO(content), round(_EM * side), layout_engine=ImageFont.Layout.BASIC)
  images = []
  for character in CHARACTERS:
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).text((side // 2, round(_BASELINE * side)), character, fill=255, font=font, anchor="ms")
    images.append(np.asarray(image))
  return np.stack(images)


def reduced(large: np.ndarray) -> np.ndarray:
  """Averages enlarged images down to their size, and to sixteen shades by integers, which round alike everywhere."""
  blocks = large.reshape(len(large), SIZE, _ENLARGED, SIZE, _ENLARGED).astype(np.int64).sum((2, 4))
  full = 255 * _ENLARGED**2
  return ((blocks * 30 + full) // (2 * full)).astype(np.uint8)


def usable(images: np.ndarray) -> bool:
  """No image is blank, and 55 or more of the 62 differ: not a font of symbols or of capitals alone."""
  return bool(images.any((1, 2)).all()) and len(np.unique(images.reshape(len(images), -1), axis=0)) >= 55


def small_capitals(images: np.ndarray) -> bool:
  """Whether lower-case letters are small capitals: those that should have a stem are not taller than the others."""
  top = lambda image: int(np.flatnonzero((2 * image >= image.max()).any(1))[0])
  tops = lambda letters: np.median([top(images[CHARACTERS.index(letter)]) for letter in letters])
  return bool(tops("acemnorsuvwxz") - tops("bdfhkl") < 1)


def select(faces: Sequence[Face]) -> list[Face]:
  """One face of each family and style and of each set of images, sorted; of large families evenly chosen ones."""
  plain = lambda text: re.sub(r"\W", "", text.lower())
  named: dict[Any, Face] = {}
  for face in faces:
    named.setdefault((plain(face.family), plain(face.style)), face)
  drawn = {face.images.tobytes(): named[key] for key, face in sorted(named.items(), reverse=True)}
  ordered = sorted(drawn.values(), key=lambda face: (first_word(face), plain(face.family), plain(face.style)))
  groups: dict[str, list[Face]] = {}
  for face in ordered:
    groups.setdefault(first_word(face), []).append(face)
  evenly = lambda group: [group[i * len(group) // min(len(group), _MOST)] for i in range(min(len(group), _MOST))]
  return [face for group in groups.values() for face in evenly(group)]


def first_word(face: Face) -> str:
  """What families of one design share: Noto Sans and Noto Serif are one family here."""
  return re.split(r"[\s_-]", face.family.strip())[0].lower()


def family_numbers(faces: Sequence[Face]) -> list[int]:
  """A number for each family: faces with one first word, or of one design under two names."""
  words = [first_word(face) for face in faces]
  root = {word: word for word in [*words, *sum(_SAME_DESIGN, ())]}

  def find(word: str) -> str:
    while root[word] != word:
      word = root[word]
    return word

  def join(one: str, other: str) -> None:
    first, second = sorted((find(one), find(other)))
    root[second] = first

  for one, other in _SAME_DESIGN:
    join(one, other)
  images = np.stack([face.images for face in faces])
  flat = images.reshape(len(faces), -1).astype(np.int16)
  # Sums over blocks never differ by more than their pixels do: a cheap bound that leaves few pairs to compare.
  blocks = (
    images.reshape(len(faces), -1, SIZE // 5, 5, SIZE // 5, 5).sum((3, 5), dtype=np.int16).reshape(len(faces), -1)
  )
  ink = flat.sum(-1, dtype=np.int64)
  for index in range(len(faces)):
    bound = _ALIKE * (ink[:index] + ink[index])
    near = np.flatnonzero(np.abs(blocks[:index] - blocks[index]).sum(-1) < bound)
    for other in near[np.abs(flat[near] - flat[index]).sum(-1) < bound[near]]:
      join(words[index], words[other])
  numbers = {name: number for number, name in enumerate(sorted({find(word) for word in words}))}
  return [numbers[find(word)] for word in words]


def split_of(families: Sequence[int]) -> list[int]:
  """0 (train), 1 (validation) or 2 (test) for each face: families are drawn, by NumPy's frozen `RandomState`."""
  order = np.random.RandomState(SEED).permutation(max(families) + 1)
  held_out, validating = round(TEST * len(order)), round(VALIDATION * len(order))
  splits = np.zeros(len(order), int)
  splits[order[:held_out]], splits[order[held_out : held_out + validating]] = 2, 1
  return splits[np.asarray(families)].tolist()


def pack(faces: Sequence[Face], families: Sequence[int], splits: Sequence[int]) -> bytes:
  """The bytes that `glyphs` reads: a line of JSON with a column for each fact, then two pixels in a byte; xz."""
  columns = {
    "name": [f"{face.family} {face.style}" for face in faces],
    "split": list(splits),
    "family": list(families),
    **{
      field: [getattr(face, field) * 1 for face in faces]  # a bool as 0 or 1
      for field in ("italic", "fixed_pitch", "weight", "width")
    },
  }
  # [62, faces, columns, rows]: alike ones are neighbours, which saves a twentieth, and so do columns.
  images = np.stack([face.images for face in faces], axis=1).swapaxes(2, 3)
  pixels = (images[..., ::2] << 4 | images[..., 1::2]).tobytes()
  header = json.dumps(columns, separators=(",", ":")) + "\n"
  return lzma.compress(header.encode() + pixels, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=FILTERS)


def notice(faces: Sequence[Face], ofl: str) -> str:
  """Who made the fonts, and under which terms their images are here."""
  lines = [
    "# Fonts of the data set of glyphs\n",
    "`glyphs.bin.xz` holds images of 62 characters of the faces of these families, made by scripts/make_glyphs.py from",
    "Debian's packages. The images are under the licence of their font: the SIL Open Font License 1.1 (OFL), of which",
    "the text ends this file, or the Apache License 2.0, of which the text is the LICENSE of kdflax. The names of the",
    "fonts are those of their makers, who do not endorse kdflax.\n",
    "| family | faces | licence | Debian package | copyright, as the font states it |",
    "|---|---|---|---|---|",
  ]
  families: dict[tuple[str, str, str], list[Face]] = {}
  for face in faces:
    families.setdefault((face.family, face.licence, face.package), []).append(face)
  for (family, licence, package), group in sorted(families.items()):
    note = group[0].copyright.replace("|", "/").strip()
    lines.append(f"| {family} | {len(group)} | {licence} | {package} | {note} |")
  text = "\n".join(line.rstrip() for line in ofl[ofl.find("SIL OPEN FONT LICENSE") :].splitlines())
  return "\n".join([*lines, "\n## The SIL Open Font License\n", text]) + "\n"


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/glyphs"), help="of the packages")
  main(parser.parse_args().folder.resolve())
