"""Real data that comes with scikit-learn, as seeded splits of plain NumPy arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdflax.data.arrays import Arrays, check, stratified_split
from kdflax.extras import extra

SPLITS = ("train", "validation", "test")


def digits(seed: int = 0, *, sizes: Sequence[int] = (1000, 297, 500)) -> dict[str, Arrays]:
  """Return scikit-learn's 1,797 scanned handwritten digits of 8 x 8 pixels.

  Args:
    seed: of the stratified split.
    sizes: training, validation and test examples.

  Returns:
    `train`, `validation` and `test`, each with `image` float32 `[N, 8, 8, 1]` in [0, 1], `label` int32 `[N]` in
    [0, 10) and `index` int32 `[N]`: the position in the original data, the same whatever the split, so that
    recorded teacher outputs can be matched.

  Raises:
    ValueError: the sizes are not three, or do not fit the data.

  Reference: Ethem Alpaydin and Cenk Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
  Repository 1998 (the test part of it is what scikit-learn bundles).
  """
  _check_three(sizes)
  images, labels = _bundled("digits")
  images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
  indices = stratified_split(labels, sizes, seed=seed)
  splits = {
    name: {"image": images[rows], "label": labels[rows].astype(np.int32), "index": rows}
    for name, rows in zip(SPLITS, indices, strict=True)
  }
  return _checked(splits, num_classes=10)


def overlaid_digits(
  seed: int = 0,
  *,
  sizes: Sequence[int] = (2000, 500, 1000),
  digit_sizes: Sequence[int] = (1000, 297, 500),
  canvas: int = 10,
) -> dict[str, Arrays]:
  """Return images of two overlaid digits, one task for each: the MultiMNIST construction on scikit-learn's digits.

  One digit lies in the upper left corner of the canvas and one in the lower right; where they overlap the brighter
  pixel wins. The digits are split first and paired within their split, so no digit of a test image was seen in
  training. Pairs are drawn uniformly without replacement: the two labels are independent, which makes the chance of
  either task given the other 1/10 (the original excludes pairs of one class, so there one label tells about the other).

  Args:
    seed: of the split and of the pairs.
    sizes: training, validation and test images.
    digit_sizes: digits of which the images of each split are made.
    canvas: height and width in pixels, 9 to 15. Digits overlap in `16 - canvas` rows and columns; 10 is as much, for
      digits of this size, as in the original.

  Returns:
    `train`, `validation` and `test`, each with `image` float32 `[N, canvas, canvas, 1]` in [0, 1], `label` with
    `left` and `right` int32 `[N]` in [0, 10), `source` with `left` and `right` int32 `[N]`, the digits' positions in
    the original data, and `index` int32 `[N]`, counted through the three splits.

  Raises:
    ValueError: sizes that do not fit, or a canvas on which the digits do not overlap.

  Reference: Sara Sabour, Nicholas Frosst and Geoffrey Hinton, "Dynamic Routing Between Capsules", 2017, arXiv
  1710.09829.
  """
  _check_three(sizes)
  if not 9 <= canvas <= 15:
    raise ValueError(f"canvas={canvas}: two 8 x 8 digits in opposite corners overlap on 9 to 15 pixels")
  random = np.random.RandomState(seed)
  splits, start = {}, 0
  for (name, singles), size in zip(digits(seed, sizes=digit_sizes).items(), sizes, strict=True):
    count = len(singles["index"])
    if not 1 <= size <= count**2:
      raise ValueError(f"sizes={tuple(sizes)}: {name} needs 1 to {count**2} images, the pairs of its {count} digits")
    left, right = np.divmod(random.choice(count**2, size, replace=False), count)
    splits[name] = {
      "image": _overlay(singles["image"][left], singles["image"][right], canvas),
      "label": {"left": singles["label"][left], "right": singles["label"][right]},
      "source": {"left": singles["index"][left], "right": singles["index"][right]},
      "index": np.arange(start, start + size, dtype=np.int32),
    }
    start += size
  return _checked(splits, num_classes=10)


def tabular(seed: int = 0, *, problem: str = "diabetes", sizes: Sequence[int] | None = None) -> dict[str, Arrays]:
  """Return a regression and a classification problem over the same measured inputs.

  Inputs and regression targets are standardised with the mean and deviation of the training split alone, so a mean
  squared error of 1 is what predicting the training mean gets. A column that is a task is not an input.

  - `diabetes`, 442 patients. Inputs: age, body mass index, blood pressure, five blood values (s1 to s5). Tasks:
    `progression` of the disease after one year (the set's own target), `glucose` (the blood sugar, s6) and `sex`
    (2 classes, coded 0 and 1 in the set's order). Noisy: a linear model explains a little less than half of the
    variance of the first and a third of the second, and finds the third in seven of ten; sharing may well hurt.
  - `wine`, 178 wines. Inputs: eleven chemical measurements. Tasks: `cultivar` (3 classes, the set's own target),
    `alcohol` and `color_intensity`. The classes are nearly linear in the inputs; of the others a linear model
    explains under half of the variance.

  The other bundled sets give no honest pair: linnerud has 20 rows, and the measurements of breast_cancer that could
  be a target are functions of the inputs.

  Args:
    seed: of the split, stratified by the classes.
    problem: `diabetes` or `wine`.
    sizes: training, validation and test rows; about 60, 20 and 20 percent unless given.

  Returns:
    `train`, `validation` and `test`, each with `inputs` float32 `[N, columns]`, `label` a dict by task, float32 `[N]`
    for a regression and int32 `[N]` for classes, and `index` int32 `[N]`, the row in the original data.

  Raises:
    ValueError: an unknown problem, or sizes that do not fit.

  Reference: Bradley Efron, Trevor Hastie, Iain Johnstone and Robert Tibshirani, "Least Angle Regression", The Annals of
  Statistics 32, 2004 (diabetes); Stefan Aeberhard and Michele Forina, "Wine", UCI Machine Learning Repository 1991.
  """
  problems = {"diabetes": _diabetes, "wine": _wine}
  if problem not in problems:
    raise ValueError(f"unknown problem {problem!r}; there are {', '.join(problems)}")
  inputs, regressions, classes = problems[problem]()
  (task, labels), total = next(iter(classes.items())), len(inputs)
  sizes = (total - 2 * (total // 5), total // 5, total // 5) if sizes is None else sizes
  _check_three(sizes)
  indices = stratified_split(labels, sizes, seed=seed)
  inputs = _standardized(inputs, indices[0])
  regressions = {name: _standardized(target, indices[0]) for name, target in regressions.items()}
  splits = {
    name: {
      "inputs": inputs[rows],
      "label": {name: target[rows] for name, target in regressions.items()} | {task: labels[rows].astype(np.int32)},
      "index": rows,
    }
    for name, rows in zip(SPLITS, indices, strict=True)
  }
  return _checked(splits, num_classes={task: int(labels.max()) + 1})


def _check_three(sizes: Sequence[int]) -> None:
  if len(sizes) != 3:
    raise ValueError(f"sizes={tuple(sizes)}: expected three, for {', '.join(SPLITS)}")


def _checked(splits: dict[str, Arrays], **ranges: Any) -> dict[str, Arrays]:
  for arrays in splits.values():
    check(arrays, **ranges)
  return splits


def _overlay(left: np.ndarray, right: np.ndarray, canvas: int) -> np.ndarray:
  margin = canvas - left.shape[1]
  upper_left = np.pad(left, ((0, 0), (0, margin), (0, margin), (0, 0)))
  lower_right = np.pad(right, ((0, 0), (margin, 0), (margin, 0), (0, 0)))
  return np.maximum(upper_left, lower_right)


def _standardized(values: np.ndarray, train: np.ndarray) -> np.ndarray:
  return ((values - values[train].mean(axis=0)) / values[train].std(axis=0)).astype(np.float32)


def _bundled(name: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
  """Inputs and targets of a set that comes with scikit-learn."""
  with extra("data", f"the data set {name!r}"):
    from sklearn import datasets  # takes a second, which users of other data need not pay
  inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True, **options)
  return np.asarray(inputs), np.asarray(targets)


def _diabetes() -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
  columns, progression = _bundled("diabetes", scaled=False)
  sex, glucose = 1, 9
  inputs = np.delete(columns, [sex, glucose], axis=1)
  # Sex is written as 1 and 2.
  return (
    inputs,
    {"progression": progression, "glucose": columns[:, glucose]},
    {"sex": columns[:, sex].astype(np.int32) - 1},
  )


def _wine() -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
  columns, cultivar = _bundled("wine")
  alcohol, color = 0, 9
  inputs = np.delete(columns, [alcohol, color], axis=1)
  return inputs, {"alcohol": columns[:, alcohol], "color_intensity": columns[:, color]}, {"cultivar": cultivar}
