"""Text as rows of tokens: a byte-pair vocabulary, documents packed one after the other, Python's standard library."""

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kdflax.data.arrays import Arrays, check
from kdflax.extras import extra

if TYPE_CHECKING:
  from tokenizers import Tokenizer

END = "<|end|>"  # the token after a document; its number is 0
SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
_BYTES = 256
_LARGEST = 2**18
_NO_TEXT = ("test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo")


class Text(NamedTuple):
  """Rows of tokens, and the vocabulary that they are numbers of.

  Attributes:
    splits: `train`, `validation` and `test`, as `pack` makes them.
    tokenizer: of Hugging Face `tokenizers`; `tokenizer.save(file)` writes what `Tokenizer.from_file` and others read.
  """

  splits: dict[str, Arrays]
  tokenizer: "Tokenizer"


def standard_library(*, length: int = 256, vocabulary: int = 8192, most_bytes: int | None = None) -> Text:
  """Return the text of Python's standard library, the modules that this Python comes with, as rows of tokens.

  About 10 MB of code and English in 600 files that are no tests. Whole files are held out, chosen by their names, so
  that a file is in the same split whatever the version of Python; the vocabulary is made of the training files alone.
  Everything follows from the files: the same Python gives the same rows.

  Args:
    length: tokens in a row.
    vocabulary: tokens that there are, 257 to 262,144.
    most_bytes: of the training files, and for the others by their shares, for a small run: files in the order of their
      digests, until they are so many, but one at least.

  Raises:
    ValueError: `vocabulary` or `length` is out of range, or the text is too short for that many tokens.
    ImportError: `tokenizers` is not installed, or this Python has no source files.
  """
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  files = [path for path in root.rglob("*.py") if not set(path.relative_to(root).parts[:-1]) & set(_NO_TEXT)]
  if not files:
    raise ImportError(f"the standard library in {root} has no source files; install them, or read your own text")
  texts = {path.relative_to(root).as_posix(): path.read_text("utf-8", "replace") for path in files}
  parts = split_by_name(texts)
  if most_bytes is not None:
    most = {name: int(most_bytes * share / SPLITS["train"]) for name, share in SPLITS.items()}
    parts = {name: _first(part, most[name]) for name, part in parts.items()}
  tokenizer = byte_pairs(parts["train"].values(), vocabulary)
  return Text({name: pack(tokenizer, part.values(), length) for name, part in parts.items()}, tokenizer)


def split_by_name(texts: Mapping[str, str], shares: Mapping[str, float] = SPLITS) -> dict[str, dict[str, str]]:
  """Split documents by a digest of their names, which no other document changes.

  Args:
    texts: documents by name.
    shares: of the documents, by split; they add up to 1.

  Returns:
    For each split its documents in the order of their digests, which is no order of the alphabet.

  Raises:
    ValueError: the shares do not add up to 1, or a split has no document.

  Examples:
    >>> parts = split_by_name({f"file {number}": "text" for number in range(100)})
    >>> {name: len(part) for name, part in parts.items()}
    {'train': 75, 'validation': 8, 'test': 17}
  """
  if any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
    raise ValueError(f"shares must be positive and add up to 1; got {dict(shares)}")
  ends = dict(zip(shares, np.cumsum(list(shares.values())), strict=True))
  parts: dict[str, dict[str, str]] = {split: {} for split in shares}
  for name in sorted(texts, key=_place):
    split = next((split for split, end in ends.items() if _place(name) < end), list(shares)[-1])
    parts[split][name] = texts[name]
  if empty := [split for split, part in parts.items() if not part]:
    raise ValueError(f"no document falls into {', '.join(empty)}: there are only {len(texts)}")
  return parts


def byte_pairs(texts: Iterable[str], vocabulary: int = 8192) -> "Tokenizer":
  """Make a byte-pair vocabulary of texts: frequent sequences of bytes become tokens, and any text has tokens.

  `END` is token 0, then come the 256 bytes, then the pairs in the order in which they were joined.

  Args:
    texts: to count pairs in.
    vocabulary: tokens in all, 257 to 262,144.

  Raises:
    ValueError: `vocabulary` is out of range, or the texts have too few pairs for it.
    ImportError: `tokenizers` is not installed.

  Examples:
    >>> tokenizer = byte_pairs(["to be or not to be"], 259)
    >>> tokenizer.encode("to be").tokens  # Ġ is how a space is shown
    ['to', 'Ġ', 'be']
    >>> tokenizer.decode(tokenizer.encode("not to be, 甲").ids)
    'not to be, 甲'

  Reference: Rico Sennrich, Barry Haddow and Alexandra Birch, "Neural Machine Translation of Rare Words with Subword
  Units", 2016, arXiv 1508.07909. Of bytes instead of characters, as in GPT-2.
  """
  if not _BYTES + 1 <= vocabulary <= _LARGEST:
    raise ValueError(f"vocabulary={vocabulary} must be between {_BYTES + 1} (the bytes and the end) and {_LARGEST}")
  with extra("text", "a byte-pair vocabulary"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=1
  )
  tokenizer.train_from_iterator(texts, trainer)
  if tokenizer.get_vocab_size() < vocabulary:
    found = tokenizer.get_vocab_size()
    raise ValueError(f"the texts have pairs for {found} tokens only, not for vocabulary={vocabulary}; give more text")
  return tokenizer


def read_tokenizer(file: str | pathlib.Path) -> "Tokenizer":
  """Read a vocabulary of Hugging Face `tokenizers`, the `tokenizer.json` beside a checkpoint.

  Args:
    file: the JSON file.

  Raises:
    ValueError: it is no such file.
    ImportError: `tokenizers` is not installed.
  """
  with extra("text", "a tokenizer"):
    from tokenizers import Tokenizer
  try:
    return Tokenizer.from_str(pathlib.Path(file).read_text("utf-8"))
  except FileNotFoundError:
    raise
  except Exception as error:  # what tokenizers raises has no type of its own
    raise ValueError(f"{file} is no tokenizer.json of Hugging Face tokenizers: {error}") from error


def pack(tokenizer: "Tokenizer", texts: Iterable[str], length: int, *, end: int | None = None) -> Arrays:
  """Lay documents one after the other, an end token after each, and cut the line into rows.

  A document that does not fit goes on in the next row. The last row is filled up.

  Args:
    tokenizer: of Hugging Face `tokenizers`.
    texts: documents.
    length: tokens in a row, at least 2.
    end: number of the token after a document; by default that of `END`.

  Returns:
    `tokens` int32 `[rows, length]`; `segments` int32 `[rows, length]`, 1 for the first document of a row, 2 for the
    next, 0 where the row is filled up; `bytes` int32 `[rows, length]`, of the text that each token stands for (0 for
    the end), by which a loss in nats per token becomes bits per byte; `index` int32 `[rows]`.

  Raises:
    ValueError: `length` is below 2, there is no text, or the tokenizer has no end token and none is given.

  Examples:
    >>> rows = pack(byte_pairs(["abc"], 257), ["abc", "de"], 4)
    >>> rows["segments"].tolist(), rows["bytes"].tolist()
    ([[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 0], [1, 1, 0, 0]])
  """
  if length < 2:
    raise ValueError(f"length={length} must be at least 2: a token, and the one that it predicts")
  end = tokenizer.token_to_id(END) if end is None else end
  if end is None:
    raise ValueError(f"the tokenizer has no {END!r}; give the number of its end token as end")
  texts = list(texts)
  if not texts:
    raise ValueError("there is no text to pack")
  encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
  lines = [[*one.ids, end] for one in encoded]
  documents = _rows(np.repeat(np.arange(1, len(lines) + 1), [len(line) for line in lines]), length)
  packed = {
    "tokens": _rows(np.concatenate(lines), length),
    "segments": np.where(documents == 0, 0, documents - documents[:, :1] + 1),
    "bytes": _rows(np.concatenate([*map(_sizes, texts, encoded)]), length),
    "index": np.arange(len(documents), dtype=np.int32),
  }
  check(packed)
  return packed


def _place(name: str) -> float:
  """A number in [0, 1) that a name has for good."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _first(texts: Mapping[str, str], most_bytes: int) -> dict[str, str]:
  """The first documents whose sizes add up to no more than so many bytes, but one at least."""
  total = np.cumsum([len(text.encode()) for text in texts.values()])
  count = max(1, int(np.searchsorted(total, most_bytes, side="right")))
  return dict(list(texts.items())[:count])


def _sizes(text: str, encoding: Any) -> np.ndarray:
  """Bytes of the text that each token stands for, and last what no token does; they add up to those of the text.

  Offsets count characters. A character of several bytes may be in several tokens: it counts for the first of them.
  """
  codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
  before = np.cumsum([0, *(1 + (codes >= 0x80).astype(int) + (codes >= 0x800) + (codes >= 0x10000))])  # by character
  ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)[:, 1]
  reached = before[np.maximum.accumulate(np.concatenate([[0], ends, [len(text)]]))]
  return np.diff(reached).astype(np.int32)


def _rows(line: np.ndarray, length: int) -> np.ndarray:
  filled = np.pad(line, (0, -len(line) % length))
  return filled.reshape(-1, length).astype(np.int32)
