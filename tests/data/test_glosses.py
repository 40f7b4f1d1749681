"""The glosses that come with kdflax: what is in them, and that the script which made them packs the same bytes."""

import collections
import hashlib
import re

import numpy as np
import pytest

from kdflax.data.glosses import FILE, LEXICOGRAPHERS, PARTS_OF_SPEECH, glosses
from scripts import make_glosses
from scripts.make_glosses import Synset

DATA = """\
  1 This software and database is being provided to you
00000010 03 n 02 entity 0 thing 1 003 ~ 00000020 n 0000 @ 00000090 v 0000 + 00000030 v 0101 | that which is; "it is"
00000020 05 n 01 dog 0 001 @ 00000010 n 0000 | a "good" animal; barks; "the dog barked"; "a good dog"
00000040 18 n 01 rex 0 002 @i 00000020 n 0000 ~ 00000010 n 0000 | one dog
"""


@pytest.fixture(scope="module")
def splits():
  return glosses()


def words_of(texts):
  return [frozenset(re.findall(r"[a-z0-9]+", text.lower())) for text in texts.tolist()]


def test_the_file_is_the_one_that_was_made():
  content = FILE.read_bytes()
  assert hashlib.sha256(content).hexdigest() == "b659f489d2ee54652474913a9ac7114c7841754cd9d1c7ad5e6f35ef0782e82d"
  assert len(content) < 850_000


def test_shapes_dtypes_and_ranges(splits):
  assert {name: len(arrays["index"]) for name, arrays in splits.items()} == make_glosses.SIZES
  dtypes = {
    "text": np.dtypes.StringDType(),
    "lexicographer": np.int32,
    "part_of_speech": np.int32,
    "depth": np.float32,
    "has_depth": np.bool_,
    "index": np.int32,
  }
  for arrays in splits.values():
    assert {name: array.dtype for name, array in arrays.items()} == dtypes
    assert len({len(array) for array in arrays.values()}) == 1
    assert all(arrays["text"] != "") and arrays["depth"].min() == 0 and arrays["depth"].max() < 20
    assert set(arrays["part_of_speech"].tolist()) == set(range(4))
  for name in ("train", "test"):
    assert set(splits[name]["lexicographer"].tolist()) == set(range(45))
  positions = np.concatenate([arrays["index"] for arrays in splits.values()])
  assert np.array_equal(np.sort(positions), np.arange(48_000))


def test_facts_fit_each_other(splits):
  assert len(LEXICOGRAPHERS) == 45 and LEXICOGRAPHERS[5] == "noun.animal" and LEXICOGRAPHERS[38] == "verb.motion"
  for arrays in splits.values():
    parts = [LEXICOGRAPHERS[number].split(".")[0] for number in arrays["lexicographer"]]
    assert parts == [PARTS_OF_SPEECH[number] for number in arrays["part_of_speech"]]
    np.testing.assert_array_equal(arrays["has_depth"], np.isin(parts, ["noun", "verb"]))
    assert not arrays["depth"][~arrays["has_depth"]].any()


def test_words_fit_their_labels(splits):
  """By the words of the training glosses alone, unseen ones are labelled far above chance: labels fit texts."""
  words, labels = words_of(splits["train"]["text"]), splits["train"]["lexicographer"]
  common = collections.Counter(word for row in words for word in row).most_common(2000)
  column = {word: number for number, (word, _) in enumerate(common)}
  places = lambda row: [column[word] for word in row if word in column]
  counts = np.zeros((45, 2000))
  for row, label in zip(words, labels.tolist(), strict=True):
    counts[label, places(row)] += 1
  frequency = np.bincount(labels)[:, None]
  scores = np.log((counts + 10 * counts.sum(0) / len(labels)) / (frequency + 10))  # naive Bayes
  guesses = [
    np.argmax(np.log(frequency[:, 0]) + scores[:, places(row)].sum(1)) for row in words_of(splits["test"]["text"][::12])
  ]
  assert np.mean(guesses == splits["test"]["lexicographer"][::12]) > 0.4  # the largest class is an eighth


def test_no_gloss_of_the_test_is_like_one_of_training(splits):
  seen = words_of(splits["train"]["text"])
  with_word = collections.defaultdict(list)
  for row, words in enumerate(seen):
    for word in words:
      with_word[word].append(row)
  for words in words_of(splits["test"]["text"][::40]):
    shared = collections.Counter(row for word in words for row in with_word[word])
    assert not any(make_glosses.alike(words, seen[row]) for row, count in shared.items() if count > len(words) / 2)


def test_a_damaged_file_is_named(tmp_path):
  damaged = tmp_path / "glosses.txt.xz"
  damaged.write_bytes(FILE.read_bytes()[:1000])
  with pytest.raises(ValueError, match=r"glosses\.txt\.xz' is no whole file of glosses: .*install kdflax again$"):
    glosses(file=damaged)


def test_the_files_of_wordnet_are_read():
  synsets = make_glosses.read_synsets(DATA, "noun")
  assert synsets == {
    "n 00000010": Synset(3, "that which is", ("v 00000090",)),
    "n 00000020": Synset(5, 'a "good" animal; barks', ("n 00000010",)),
    "n 00000040": Synset(18, "one dog", ("n 00000020",)),
  }


def test_depth_is_the_shortest_way_up():
  above = {"n a": (), "n b": ("n a",), "n c": ("n b", "n a"), "n d": ("n c",), "a e": (), "v f": ()}
  synsets = {key: Synset(0, "", hypernyms) for key, hypernyms in above.items()}
  assert make_glosses.depths(synsets) == {"n a": 0, "v f": 0, "n b": 1, "n c": 1, "n d": 2}


def test_of_near_duplicates_the_first_stays():
  texts = [
    "in a round manner",
    "of or by the sea",
    "in a magical manner",
    "a round of the sea",
    "In a round, manner",
    "x",
  ]
  assert make_glosses.without_near_duplicates(texts, range(6), 9) == [0, 1, 3]
  assert make_glosses.without_near_duplicates(texts, [2, 3, 1, 0], 9) == [2, 3, 1]
  assert make_glosses.without_near_duplicates(texts, range(6), 1) == [0]
  assert make_glosses.alike(frozenset("abc"), frozenset("abcde")) and not make_glosses.alike(
    frozenset("abc"), frozenset("abcdef")
  )


def test_packing_twice_gives_the_same_bytes_and_they_are_read(tmp_path):
  rows = [(Synset(5, "a dog", ()), 8, 0), (Synset(0, "“good”", ()), -1, 2), (Synset(38, "to walk", ()), 0, 1)]
  assert make_glosses.pack(rows) == make_glosses.pack(rows)
  file = tmp_path / "glosses.txt.xz"
  file.write_bytes(make_glosses.pack(rows))
  read = glosses(file=file)
  assert {name: arrays["text"].tolist() for name, arrays in read.items()} == {
    "train": ["a dog"],
    "validation": ["to walk"],
    "test": ["“good”"],
  }
  assert read["train"]["depth"].tolist() == [8.0] and read["test"]["has_depth"].tolist() == [False]


def test_the_notice_has_the_terms():
  text = make_glosses.NOTICE.read_text()
  assert "WordNet 3.0 Copyright 2006 by Princeton University" in text and "ALL copies of the software" in text


def test_another_package_is_refused(tmp_path):
  (tmp_path / "wordnet-base_1%3a3.0-37_all.deb").write_bytes(b"other")
  with pytest.raises(ValueError, match="is not the package that the data were made from"):
    make_glosses.download(tmp_path)
