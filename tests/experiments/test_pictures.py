"""Pictures can be read: names stand apart, few curves have colours, no interval leaves what is possible."""

import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text

from experiments import pictures


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved, still open."""
  figures = []
  monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
  monkeypatch.setattr(plt, "close", lambda figure: None)
  yield figures
  monkeypatch.undo()
  plt.close("all")


def test_names_keep_their_order_and_a_gap():
  heights = [0.1, 0.5, 0.5, 0.51, 0.9]
  moved = pictures.spread(heights, gap=0.05)
  assert np.diff(moved).min() >= 0.05 - 1e-12
  np.testing.assert_allclose([moved[0], moved[-1]], [0.1, 0.9])  # what stands apart stays
  np.testing.assert_allclose(np.mean(moved[1:4]), 0.5, atol=0.01)


def test_intervals_stay_within_percent():
  np.testing.assert_allclose(pictures.bounded([5, 5, np.nan], [2, 98, 50]), [[2, 5, 0], [5, 2, 0]])


def test_thirty_curves_name_the_best_few_and_the_baseline(tmp_path, drawn):
  methods = [f"method {number}" for number in range(30)] + ["baseline"]
  rows = [
    {"phase": f"100 labels, {method}", "step": step, "validation/accuracy": [0.5 + 0.01 * rank]}
    for rank, method in enumerate(methods[::-1])
    for step in (10, 20)
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  pictures.learning_curves(tmp_path, "validation/accuracy", "baseline")
  (panel,) = drawn[0].axes
  assert [text.get_text() for text in panel.texts] == ["baseline", *(f"method {n}" for n in (4, 3, 2, 1, 0))]
  assert sum(line.get_color() == "lightgray" for line in panel.lines) == 25
  assert panel.get_ylabel() == "validation accuracy (%), mean of seeds"


def test_the_names_of_a_ranking_do_not_overlap(tmp_path, drawn):
  line = {"method": "baseline", "title": "baseline", "accuracy": [0.9, 0.91], "difference": None, "milliseconds": 1.0}
  results = [line]
  for number in range(12):
    gain = [0.03 + 1e-4 * number, 0.0301 + 1e-4 * number]
    name = f"m{number}"
    results.append(line | {"method": name, "title": name, "difference": gain})
  pictures.ranking(tmp_path, results, [0.97, 0.98])
  drawn[0].canvas.draw()
  boxes = sorted((Text.get_window_extent(text) for text in drawn[0].axes[1].texts), key=lambda box: box.y0)
  assert len(boxes) == 10  # of twelve
  assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))


def test_what_a_student_sets_right_is_shown_once_for_each_class(tmp_path, drawn):
  labels = np.array([0, 0, 1, 1, 2])
  confident = lambda classes, sure: np.where(np.eye(3)[classes] == 1, sure[:, None], (1 - sure[:, None]) / 2)
  softmax = {
    "baseline": confident([1, 2, 1, 0, 0], np.array([0.9, 0.8, 0.9, 0.6, 0.9])),
    "all": confident([0, 0, 1, 1, 1], np.array([0.6, 0.9, 0.9, 0.9, 0.9])),
  }
  split = {"image": np.zeros((5, 4, 4, 1), np.uint8), "label": labels}
  pictures.set_right(tmp_path, split, softmax, "all", "xyz")
  titles = [panel.get_title() for panel in drawn[0].axes if panel.get_title()]
  # The second of x is surest on both sides, the first y was right before, and z stays wrong.
  assert titles == ["x, not z", "y, not x"]
