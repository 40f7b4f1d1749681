"""Glosses of WordNet: 48,000 definitions of English words with what the dictionary says of them, in the package."""

import json
import lzma
import pathlib

import numpy as np

from kdflax.data.arrays import Arrays

_OF_NOUNS = (
  *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
  *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
  *("relation", "shape", "state", "substance", "time"),
)
_OF_VERBS = (
  *("body", "change", "cognition", "communication", "competition", "consumption", "contact", "creation", "emotion"),
  *("motion", "perception", "possession", "social", "stative", "weather"),
)
# The files that lexicographers wrote the dictionary in, in the order of their numbers.
LEXICOGRAPHERS = (
  *("adj.all", "adj.pert", "adv.all"),
  *(f"noun.{name}" for name in _OF_NOUNS),
  *(f"verb.{name}" for name in _OF_VERBS),
  "adj.ppl",
)
PARTS_OF_SPEECH = ("adj", "adv", "noun", "verb")
FILE = pathlib.Path(__file__).with_name("glosses.txt.xz")
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
SPLITS = ("train", "validation", "test")

_PART_OF = np.array([PARTS_OF_SPEECH.index(name.split(".")[0]) for name in LEXICOGRAPHERS], np.int32)


def glosses(*, file: str | pathlib.Path = FILE) -> dict[str, Arrays]:
  """Return definitions of WordNet 3.0, and three things that the dictionary says of what each defines.

  48,000 of its 117,659 definitions, without their examples. Of definitions that share six tenths of their words only
  one is kept ("in a round manner", "in a magical manner"), so none of the test has a near-duplicate in training.

  The text is under the licence of WordNet, in `glosses-licence.md` beside the file; scripts/make_glosses.py makes the
  file from Debian's package.

  Args:
    file: another file of the same form.

  Returns:
    `train`, `validation` and `test`, each with by gloss `[N]`

    - `text`: the definition, as NumPy's `StringDType`;
    - `lexicographer`: int32 in [0, 45), the position in `LEXICOGRAPHERS`: what kind of thing it is, such as
      `noun.animal` or `verb.motion`;
    - `part_of_speech`: int32 in [0, 4), the position in `PARTS_OF_SPEECH`;
    - `depth`: float32, hypernyms from there to the most general concept, and 0 where `has_depth` is False;
    - `has_depth`: bool, whether there is such a chain: nouns and verbs have one, adjectives and adverbs have none;
    - `index`: int32, the position in the whole set.

  Raises:
    ValueError: the file is damaged.

  Examples:
    >>> {name: len(split["index"]) for name, split in glosses().items()}
    {'train': 38000, 'validation': 4000, 'test': 6000}

  Reference: George A. Miller, "WordNet: A Lexical Database for English", Communications of the ACM 1995.
  """
  try:
    content = lzma.decompress(pathlib.Path(file).read_bytes(), format=lzma.FORMAT_XZ).decode()
    header, *texts = content.removesuffix("\n").split("\n")
    columns = {name: np.asarray(values, np.int32) for name, values in json.loads(header).items()}
    lexicographer, depth, split = (columns[name] for name in ("lexicographer", "depth", "split"))
    if any(len(column) != len(texts) for column in columns.values()):
      raise ValueError(f"{len(texts)} texts")
  except (lzma.LZMAError, LookupError, ValueError, TypeError) as error:
    raise ValueError(f"file={str(file)!r} is no whole file of glosses: {error}; install kdflax again") from error
  every = {
    "text": np.array(texts, np.dtypes.StringDType()),
    "lexicographer": lexicographer,
    "part_of_speech": _PART_OF[lexicographer],
    "depth": np.maximum(depth, 0).astype(np.float32),
    "has_depth": depth >= 0,
    "index": np.arange(len(texts), dtype=np.int32),
  }
  return {name: {key: x[split == number] for key, x in every.items()} for number, name in enumerate(SPLITS)}
