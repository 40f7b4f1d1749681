"""The bundled data sets: disjoint, stratified, seeded, and what their docstrings promise."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits, load_wine

from kdflax.data import digits, load, overlaid_digits, tabular

SIZES = {"train": 1000, "validation": 297, "test": 500}


def _all_equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_digits_are_the_original_ones_split_once():
  original = load_digits()
  splits = digits(3)
  assert {name: len(arrays["label"]) for name, arrays in splits.items()} == SIZES
  everything = np.concatenate([arrays["index"] for arrays in splits.values()])
  np.testing.assert_array_equal(np.sort(everything), np.arange(1797))
  for arrays in splits.values():
    assert arrays["image"].shape[1:] == (8, 8, 1)
    assert [arrays[name].dtype for name in ("image", "label", "index")] == [np.float32, np.int32, np.int32]
    np.testing.assert_array_equal(arrays["image"][..., 0] * 16, original.images[arrays["index"]])
    np.testing.assert_array_equal(arrays["label"], original.target[arrays["index"]])


def test_digits_are_stratified():
  share = np.bincount(load_digits().target) / 1797
  for arrays in digits(0).values():
    np.testing.assert_array_less(np.abs(np.bincount(arrays["label"]) - share * len(arrays["label"])), 2)


@pytest.mark.parametrize("source", [digits, overlaid_digits, tabular])
def test_a_seed_gives_the_same_data_and_another_seed_gives_other_data(source):
  assert _all_equal(source(1), source(1))
  assert not _all_equal(source(1)["train"], source(2)["train"])


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((1000, 500, 500), "ask for 2000 examples, but there are only 1797"),
    ((1000, 5, 500), "each of 10 classes"),
    ((1000, 500), "expected three, for train, validation, test"),
  ],
)
def test_sizes_of_digits_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    digits(sizes=sizes)


def test_overlaid_digits_share_no_digit_between_splits():
  splits = overlaid_digits(0)
  used = {
    name: set(np.concatenate([arrays["source"]["left"], arrays["source"]["right"]])) for name, arrays in splits.items()
  }
  assert not used["train"] & used["test"]
  assert not used["train"] & used["validation"]
  assert not used["validation"] & used["test"]
  everything = np.concatenate([arrays["index"] for arrays in splits.values()])
  np.testing.assert_array_equal(everything, np.arange(2000 + 500 + 1000))


@pytest.mark.parametrize("canvas", [9, 10, 15])
def test_overlaid_digits_are_the_pixelwise_maximum_of_their_sources(canvas):
  original = load_digits()
  test = overlaid_digits(4, sizes=(20, 20, 30), canvas=canvas)["test"]
  for image, left, right in zip(test["image"], test["source"]["left"], test["source"]["right"], strict=True):
    expected = np.zeros((canvas, canvas))
    expected[:8, :8] = original.images[left] / 16
    expected[-8:, -8:] = np.maximum(expected[-8:, -8:], original.images[right] / 16)
    np.testing.assert_array_equal(image[..., 0], expected)
  for side in ("left", "right"):
    np.testing.assert_array_equal(test["label"][side], original.target[test["source"][side]])
    assert test["label"][side].dtype == np.int32


def test_overlaid_pairs_are_distinct_and_their_labels_independent():
  train = overlaid_digits(0, sizes=(20_000, 10, 10))["train"]
  pairs = set(zip(train["source"]["left"].tolist(), train["source"]["right"].tolist(), strict=True))
  assert len(pairs) == 20_000
  table = np.zeros((10, 10))
  np.add.at(table, (train["label"]["left"], train["label"]["right"]), 1)
  expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / 20_000
  chi_square = ((table - expected) ** 2 / expected).sum()
  assert chi_square < 81 + 4 * np.sqrt(2 * 81)  # 81 degrees of freedom, four standard deviations


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"canvas": 8}, "canvas=8"),
    ({"canvas": 16}, "canvas=16"),
    ({"sizes": (10, 10)}, "expected three"),
    ({"sizes": (10, 10, 0)}, "test needs 1 to 250000 images"),
    ({"sizes": (401, 10, 10), "digit_sizes": (20, 20, 20)}, "train needs 1 to 400 images"),
  ],
)
def test_overlaid_digits_that_do_not_fit_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    overlaid_digits(**settings)


@pytest.mark.parametrize(
  ("problem", "rows", "columns", "regressions", "task", "classes"),
  [
    ("diabetes", 442, 8, ("progression", "glucose"), "sex", 2),
    ("wine", 178, 11, ("alcohol", "color_intensity"), "cultivar", 3),
  ],
)
def test_tabular_problems_are_standardised_on_the_training_rows(problem, rows, columns, regressions, task, classes):
  splits = tabular(2, problem=problem)
  train = splits["train"]
  assert set(train["label"]) == {*regressions, task}
  assert train["inputs"].shape[1] == columns
  everything = np.concatenate([arrays["index"] for arrays in splits.values()])
  np.testing.assert_array_equal(np.sort(everything), np.arange(rows))
  for values in (train["inputs"], *(train["label"][name][:, None] for name in regressions)):
    assert values.dtype == np.float32
    wide = values.astype(np.float64)
    np.testing.assert_allclose(wide.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(wide.std(0), 1, rtol=1e-6)
  # Statistics of all rows would centre the whole; those of the training rows do not.
  whole = np.concatenate([arrays["inputs"] for arrays in splits.values()]).mean(0)
  assert np.abs(whole).max() > 1e-3
  for arrays in splits.values():
    assert set(arrays["label"][task]) == set(range(classes))
    assert arrays["label"][task].dtype == np.int32


@pytest.mark.parametrize(
  ("problem", "columns", "target"),
  [
    ("diabetes", lambda: load_diabetes(scaled=False).data, {"glucose": 9, "sex": 1}),
    ("wine", lambda: load_wine().data, {"alcohol": 0, "color_intensity": 9}),
  ],
)
def test_tabular_tasks_are_the_named_columns_and_no_inputs(problem, columns, target):
  train = tabular(0, problem=problem)["train"]
  original = columns()[train["index"]]
  for name, column in target.items():
    labels = train["label"][name].astype(np.float64)
    assert np.corrcoef(labels, original[:, column])[0, 1] == pytest.approx(1, rel=1e-6)
    correlations = [np.corrcoef(labels, values)[0, 1] for values in train["inputs"].T]
    assert np.abs(correlations).max() < 0.9


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"problem": "linnerud"}, "unknown problem 'linnerud'; there are diabetes, wine"),
    ({"sizes": (400, 40, 40)}, "only 442"),
    ({"sizes": (400,)}, "expected three"),
  ],
)
def test_tabular_problems_that_do_not_fit_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    tabular(**settings)


def test_load_by_name():
  assert _all_equal(load("digits", seed=5), digits(5))
  assert _all_equal(load("wine", seed=5), tabular(5, problem="wine"))
  with pytest.raises(ValueError, match=r"unknown data set 'imagenet'; there are digits, overlaid_digits, .*cifar100"):
    load("imagenet")
