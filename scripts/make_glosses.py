"""Makes the data set of glosses anew from Debian's package of WordNet, bit for bit: `python -m scripts.make_glosses`.

Wants a Debian with its package lists (`apt-get update`) and a minute. Nothing is installed: the package is fetched in
the version below and read as an archive. Writes kdflax/data/glosses.txt.xz and glosses-licence.md beside it.

    python -m scripts.make_glosses                 makes the files; `git diff` shows nothing if they are as before
    python -m scripts.make_glosses --folder DIR    keeps the package there
"""

import argparse
import collections
import hashlib
import io
import json
import lzma
import pathlib
import re
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from kdflax.data.glosses import FILE, FILTERS, SPLITS
from kdflax.training import write_atomically

NAME, VERSION = "wordnet-base", "1:3.0-37"
SHA256 = "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"  # of the package
NOTICE = FILE.with_name("glosses-licence.md")
SEED = 0  # of the order in which glosses are taken
SIZES = dict(zip(SPLITS, (38_000, 4_000, 6_000), strict=True))
ALIKE = (6, 10)  # glosses that share this part of all words in either are near-duplicates

_PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
_HYPERNYMS = ("@", "@i")  # of a kind and of an instance


class Synset(NamedTuple):
  """One concept of the dictionary."""

  lexicographer: int
  gloss: str
  hypernyms: tuple[str, ...]  # keys of other synsets


def main(folder: pathlib.Path) -> None:
  """Downloads the package if it is not in the folder, and writes the data and the notice."""
  files = read_package(download(folder))
  synsets = {
    key: synset
    for part in _PARTS
    for key, synset in read_synsets(files[f"usr/share/wordnet/data.{part}"], part).items()
  }
  depth = depths(synsets)
  order = np.random.RandomState(SEED).permutation(len(synsets))
  chosen = without_near_duplicates([synset.gloss for synset in synsets.values()], order, sum(SIZES.values()))
  split = dict(zip(chosen, np.repeat(range(len(SIZES)), list(SIZES.values())).tolist(), strict=True))
  keys, rows = list(synsets), sorted(chosen)  # in the order of the dictionary, alike ones are neighbours
  write_atomically(FILE, pack([(synsets[keys[r]], depth.get(keys[r], -1), split[r]) for r in rows]))
  write_atomically(NOTICE, notice(files["usr/share/doc/wordnet-base/copyright"]))
  print(f"{len(rows)} glosses, {FILE.stat().st_size} bytes")


def download(folder: pathlib.Path) -> pathlib.Path:
  """Returns the pinned package, fetched by apt-get if the folder lacks it.

  Raises:
    ValueError: if it is another one.
  """
  folder.mkdir(parents=True, exist_ok=True)
  package = folder / f"{NAME}_{VERSION.replace(':', '%3a')}_all.deb"
  if not package.is_file():
    subprocess.run(["apt-get", "download", f"{NAME}={VERSION}"], cwd=folder, check=True)
  if (found := hashlib.sha256(package.read_bytes()).hexdigest()) != SHA256:
    raise ValueError(f"{package} is not the package that the data were made from: its SHA-256 is {found}")
  return package


def read_package(package: pathlib.Path) -> dict[str, str]:
  """Returns the text files of a Debian package by path."""
  content = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, check=True).stdout
  with tarfile.open(fileobj=io.BytesIO(content)) as files:
    return {
      file.name.removeprefix("./"): files.extractfile(file).read().decode()  # pyright: ignore[reportOptionalMemberAccess]
      for file in files
      if file.isfile() and not file.name.endswith(".gz")
    }


def read_synsets(text: str, part: str) -> dict[str, Synset]:
  """Reads a data file of WordNet, whose format is in wndb(5), by keys of a part of speech and a position.

  Args:
    text: of the file; its licence has lines that begin with spaces.
    part: of speech, as in the name of the file.

  Returns:
    The synsets by key, in the order of the file.
  """
  synsets = {}
  for line in text.splitlines():
    if line.startswith(" "):
      continue
    facts, gloss = line.split(" | ", 1)
    position, lexicographer, _, words, *rest = facts.split()
    # Pairs of a word and its sense, the number of pointers, then four fields for each: kind, position, part, words.
    count, *pointers = rest[2 * int(words, 16) :]
    fields = [pointers[i : i + 3] for i in range(0, 4 * int(count), 4)]
    hypernyms = tuple(f"{of} {where}" for kind, where, of in fields if kind in _HYPERNYMS)
    synsets[f"{_PARTS[part]} {position}"] = Synset(int(lexicographer), definition(gloss), hypernyms)
  return synsets


def definition(gloss: str) -> str:
  """A gloss up to its first example, which is quoted."""
  return re.split(r';\s*"', gloss)[0].strip()


def depths(synsets: dict[str, Synset]) -> dict[str, int]:
  """The fewest hypernyms from each noun and verb to one that has none."""
  depth = {key: 0 for key, synset in synsets.items() if key[0] in "nv" and not synset.hypernyms}
  below = collections.defaultdict(list)
  for key, synset in synsets.items():
    for hypernym in synset.hypernyms:
      below[hypernym].append(key)
  edge = list(depth)
  while edge:
    edge = [key for above in edge for key in below[above] if depth.setdefault(key, depth[above] + 1) > depth[above]]
    edge = list(dict.fromkeys(edge))
  return depth


def without_near_duplicates(texts: Sequence[str], order: Iterable[int], count: int) -> list[int]:
  """Takes texts in an order, each unless one like it was taken before, until there are enough.

  Two texts of which the sets of words have a Jaccard index of t share one of the n - ceil(t n) + 1 rarest words of
  each, so that few pairs are compared.

  Args:
    texts: to choose from.
    order: rows of the texts.
    count: to take.

  Returns:
    The rows taken, in their order.
  """
  words = [frozenset(re.findall(r"[a-z0-9]+", text.lower())) for text in texts]
  frequency = collections.Counter(word for row in words for word in row)
  with_word: dict[str, list[int]] = collections.defaultdict(list)
  part, whole = ALIKE
  taken: list[int] = []
  for row in map(int, order):
    mine = words[row]
    rarest = sorted(mine, key=lambda word: (frequency[word], word))[: len(mine) - -(-part * len(mine) // whole) + 1]
    others = {other for word in rarest for other in with_word[word]}
    if len(mine) > 1 and not any(alike(mine, words[other]) for other in others):
      taken.append(row)
      for word in rarest:
        with_word[word].append(row)
    if len(taken) == count:
      break
  return taken


def alike(one: frozenset[str], other: frozenset[str]) -> bool:
  """Whether two sets of words are those of near-duplicates."""
  shared, (part, whole) = len(one & other), ALIKE
  return whole * shared >= part * (len(one) + len(other) - shared)


def pack(rows: Sequence[tuple[Synset, int, int]]) -> bytes:
  """The bytes that `glosses` reads: a line of JSON with a column for each fact, then a line for each text; xz.

  Args:
    rows: synset, depth or -1, and number of the split.
  """
  columns = {
    "lexicographer": [synset.lexicographer for synset, _, _ in rows],
    "depth": [depth for _, depth, _ in rows],
    "split": [split for _, _, split in rows],
  }
  lines = [json.dumps(columns, separators=(",", ":")), *(synset.gloss for synset, _, _ in rows)]
  content = "".join(f"{line}\n" for line in lines).encode()
  return lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=FILTERS)


def notice(copyright_file: str) -> str:
  """The terms of WordNet, as Debian's package states them."""
  text = copyright_file[copyright_file.index("This software and database") : copyright_file.index("Files: debian")]
  paragraphs = "\n".join("" if line.strip() == "." else line.strip() for line in text.splitlines()).strip()
  return (
    "# Licence of the glosses\n\n`glosses.txt.xz` holds definitions of WordNet 3.0 and facts of the dictionary, made by"
    f" scripts/make_glosses.py from\nDebian's package {NAME} {VERSION}. They are under this licence.\n\n{paragraphs}\n"
  )


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--folder", type=pathlib.Path, default=pathlib.Path("runs/glosses-package"), help="of the package"
  )
  main(parser.parse_args().folder.resolve())
