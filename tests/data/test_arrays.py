"""Checks, rows by index, stratified splits and label budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax.data import check, gather, num_examples, stratified_split, with_label_budget


def _arrays():
  return {
    "image": np.linspace(0, 1, 6 * 4, dtype=np.float32).reshape(6, 2, 2, 1),
    "label": {"left": np.array([0, 1, 2, 0, 1, 2]), "right": np.array([2, 2, 1, 1, 0, 0])},
    "teacher": {"logits": np.ones((6, 3), np.float32)},
  }


def test_a_good_data_set_passes():
  check(_arrays(), num_classes=3)
  check(_arrays(), num_classes={"left": 3})
  check(jax.tree.map(jnp.asarray, _arrays()), num_classes={"left": 3, "right": 3})
  assert num_examples(_arrays()) == 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_non_finite_values_are_named_counted_and_placed(bad, dtype):
  arrays = _arrays()
  logits = np.arange(18.0).reshape(6, 3)
  logits[2, 1], logits[4, 0] = bad, bad
  arrays["teacher"]["logits"] = (
    np.asarray(jnp.asarray(logits, "bfloat16")) if dtype == "bfloat16" else logits.astype(dtype)
  )
  with pytest.raises(ValueError) as error:
    check(arrays)
  message = str(error.value)
  assert "teacher.logits: 2 of 18 entries (first at (2, 1))" in message
  assert "[0" in message and "17" in message


def test_an_array_of_nothing_but_nan_is_refused():
  with pytest.raises(ValueError, match="no other"):
    check({"x": np.full(3, np.nan)})


@pytest.mark.parametrize("value", [-1, 3])
@pytest.mark.parametrize("num_classes", [3, {"right": 3}])
def test_labels_out_of_range_are_named_counted_and_placed(value, num_classes):
  arrays = _arrays()
  arrays["label"]["right"][[1, 4]] = value
  low, high = min(value, 0), max(value, 2)
  with pytest.raises(ValueError) as error:
    check(arrays, num_classes=num_classes)
  assert f"label.right: 2 of 6 entries (first at 1) outside [0, 3); labels are in [{low}, {high}]" in str(error.value)
  check(arrays, num_classes={"left": 3})


@pytest.mark.parametrize(
  ("arrays", "num_classes", "message"),
  [
    ({}, None, "no arrays"),
    ({"x": np.zeros((0, 3))}, None, r"x holds no examples: its shape is \(0, 3\)"),
    ({"a": {"x": np.float32(1)}}, None, r"a\.x holds no examples"),
    ({"x": np.zeros(3), "y": {"z": np.zeros(4)}}, None, r"x: 3, y\.z: 4"),
    ({"x": [1, 2, 3]}, None, "x is a list"),
    ({"x": np.array([None, 1])}, None, "objects"),
    ({"x": np.zeros(3)}, 2, "needs an array named 'label'"),
    ({"label": np.zeros(3)}, 2, "label has dtype float64"),
    ({"label": {"a": np.zeros(3, int)}}, {"b": 2}, r"tasks \['b'\], but label holds \['a'\]"),
    ({"label": np.zeros(3, int)}, {"b": 2}, "one array"),
  ],
)
def test_what_is_no_data_set_is_refused(arrays, num_classes, message):
  with pytest.raises(ValueError, match=message):
    check(arrays, num_classes=num_classes)


def test_gather_stays_where_the_arrays_are():
  arrays, rows = _arrays(), np.array([4, 0, 4])
  on_host = gather(arrays, rows)
  on_device = jax.jit(gather)(arrays, rows)
  assert isinstance(on_host["label"]["left"], np.ndarray)
  assert isinstance(gather(arrays, jnp.asarray(rows))["image"], jax.Array)
  np.testing.assert_array_equal(on_host["label"]["left"], [1, 0, 1])
  jax.tree.map(np.testing.assert_array_equal, on_host, on_device)


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_disjoint_and_every_class_keeps_its_share(seed):
  random = np.random.default_rng(seed)
  labels = random.choice(4, p=[0.5, 0.3, 0.15, 0.05], size=400)
  sizes = (200, 80, 100)
  splits = stratified_split(labels, sizes, seed=seed)
  assert [len(rows) for rows in splits] == list(sizes)
  assert len(set(np.concatenate(splits))) == sum(sizes)
  for rows, size in zip(splits, sizes, strict=True):
    np.testing.assert_array_less(np.abs(np.bincount(labels[rows]) - np.bincount(labels) * size / 400), 2)
    assert rows.dtype == np.int32 and (np.diff(rows) > 0).all()


def test_splits_are_the_same_in_every_numpy_version():
  train, test = stratified_split(np.array([0, 1] * 6), (6, 4), seed=7)
  assert (train.tolist(), test.tolist()) == ([0, 1, 2, 5, 7, 10], [3, 6, 8, 11])


@pytest.mark.parametrize(
  ("labels", "sizes", "message"),
  [
    (np.zeros(10, int), (8, 4), r"ask for 12 examples, but there are only 10"),
    (np.arange(10) % 3, (5, 2), "at least one example of each of 3 classes"),
    (np.arange(10) % 3, (8, -3), "at least one"),
    (np.zeros(10), (5, 5), "integer classes"),
  ],
)
def test_splits_that_do_not_fit_are_refused(labels, sizes, message):
  with pytest.raises(ValueError, match=message):
    stratified_split(labels, sizes, seed=0)


def test_a_label_budget_is_balanced_nested_and_seeded():
  labels = np.repeat([0, 1, 2], [50, 30, 4])
  arrays = {"label": labels}
  marked = {n: with_label_budget(arrays, n, seed=1)["labelled"] for n in (3, 10, 12, 40)}
  counts = {n: np.bincount(labels[mask], minlength=3).tolist() for n, mask in marked.items()}
  assert counts[3] == [1, 1, 1] and counts[12] == [4, 4, 4]
  assert sorted(counts[10]) == [3, 3, 4]
  assert counts[40] == [18, 18, 4]  # the third class runs out
  assert (marked[12] <= marked[40]).all() and (marked[3] <= marked[10]).all()
  np.testing.assert_array_equal(marked[12], with_label_budget(arrays, 12, seed=1)["labelled"])
  assert (marked[12] != with_label_budget(arrays, 12, seed=2)["labelled"]).any()
  assert "labelled" not in arrays


def test_a_label_budget_for_one_of_several_tasks():
  mask = with_label_budget(_arrays(), 3, seed=0, task="right")["labelled"]
  assert sorted(_arrays()["label"]["right"][mask]) == [0, 1, 2]


@pytest.mark.parametrize(
  ("arrays", "num_labelled", "task", "message"),
  [
    (_arrays(), 2, "left", r"num_labelled=2 must be between 3 \(the classes\) and 6 \(the examples\)"),
    (_arrays(), 7, "left", "num_labelled=7"),
    (_arrays(), 3, None, r"task=None is no label; there are \['left', 'right'\]"),
    (_arrays(), 3, "top", "task='top'"),
    ({"label": np.arange(3)}, 3, "left", "one array"),
    ({"image": np.arange(3)}, 3, None, "named 'label'"),
    ({"label": np.arange(3.0)}, 3, None, "integer classes"),
  ],
)
def test_a_label_budget_that_does_not_fit_is_refused(arrays, num_labelled, task, message):
  with pytest.raises(ValueError, match=message):
    with_label_budget(arrays, num_labelled, seed=0, task=task)
