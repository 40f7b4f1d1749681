"""A byte-pair vocabulary, documents in rows, and the standard library in splits."""

import pathlib

import numpy as np
import pytest

from kdflax.data import byte_pairs, pack, read_tokenizer, split_by_name, standard_library

TEXTS = ["def low(lower):\n  return lower\n", "naïve 甲乙 😀\n\ttail ", ""]


@pytest.fixture(scope="module")
def tokenizer():
  return byte_pairs(TEXTS, 280)


def test_any_text_comes_back_from_its_tokens(tokenizer):
  for text in (*TEXTS, "never seen: ß€𝄞\x00", "  \n"):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_pairs_are_joined_in_the_order_of_their_counts():
  """The pair ab occurs 3 times and bc twice; once ab is joined, ab + c occurs twice."""
  tokens = byte_pairs(["abc", "abc", "ab"], 259)
  assert tokens.get_vocab()["<|end|>"] == 0
  assert [tokens.id_to_token(257), tokens.id_to_token(258)] == ["ab", "abc"]


def test_the_same_texts_give_the_same_vocabulary(tokenizer):
  assert byte_pairs(TEXTS, 280).to_str() == tokenizer.to_str()


def test_a_written_vocabulary_is_read_again(tokenizer, tmp_path):
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  assert read_tokenizer(tmp_path / "tokenizer.json").to_str() == tokenizer.to_str()
  (tmp_path / "other.json").write_text('{"model": 1}')
  with pytest.raises(ValueError, match=r"other.json is no tokenizer.json of Hugging Face tokenizers"):
    read_tokenizer(tmp_path / "other.json")


@pytest.mark.parametrize("length", [2, 7, 300])
def test_rows_are_the_documents_one_after_the_other(tokenizer, length):
  packed = pack(tokenizer, TEXTS, length)
  line, sizes, segments = (packed[name].ravel() for name in ("tokens", "bytes", "segments"))
  expected = [token for text in TEXTS for token in [*tokenizer.encode(text).ids, 0]]
  assert line[: len(expected)].tolist() == expected and not line[len(expected) :].any()
  assert packed["tokens"].shape == (-(-len(expected) // length), length)
  assert (segments > 0).sum() == len(expected) and sizes.sum() == sum(len(text.encode()) for text in TEXTS)


def test_segments_count_from_1_in_each_row(tokenizer):
  packed = pack(tokenizer, ["a", "b", "c"], 4)
  assert packed["segments"].tolist() == [[1, 1, 2, 2], [1, 1, 0, 0]]


def test_a_token_counts_the_bytes_that_it_stands_for():
  """Without pairs a token is a byte; the bytes of one character count for its first token."""
  packed = pack(byte_pairs(["x"], 257), ["a甲b"], 6)
  assert packed["bytes"].tolist() == [[1, 3, 0, 0, 1, 0]]


def test_a_document_stays_in_its_split_whatever_else_there_is():
  few = {f"{number}.py": str(number) for number in range(60)}
  more = split_by_name(few | {f"other {number}": "" for number in range(40)})
  for split, part in split_by_name(few).items():
    assert part.items() <= more[split].items()


def test_the_standard_library_is_split_by_file():
  text = standard_library(length=64, vocabulary=300, most_bytes=30_000)
  again = standard_library(length=64, vocabulary=300, most_bytes=30_000)
  assert text.splits["train"]["bytes"].sum() <= 30_000
  for split, arrays in text.splits.items():
    assert arrays["tokens"].shape[1] == 64 and arrays["tokens"].max() < 300
    assert all(np.array_equal(arrays[name], again.splits[split][name]) for name in arrays)
  source = pathlib.Path(pathlib.__file__).read_text()[:200]
  lines = [text.tokenizer.decode(arrays["tokens"].ravel().tolist()) for arrays in text.splits.values()]
  assert sum(source in line for line in lines) <= 1


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: byte_pairs(TEXTS, 256), r"vocabulary=256 must be between 257 .* and 262144"),
    (lambda: byte_pairs(TEXTS, 5000), r"the texts have pairs for \d+ tokens only, not for vocabulary=5000"),
    (lambda: pack(byte_pairs(TEXTS, 257), TEXTS, 1), r"length=1 must be at least 2"),
    (lambda: pack(byte_pairs(TEXTS, 257), [], 8), r"there is no text to pack"),
    (lambda: split_by_name({"one": ""}), r"no document falls into .*: there are only 1"),
    (lambda: split_by_name({}, {"train": 0.5, "test": 0.4}), r"shares must be positive and add up to 1"),
  ],
)
def test_mistakes_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
