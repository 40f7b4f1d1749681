"""Pictures that experiments share; every one is drawn from files or arrays, none is shown."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no screen
import matplotlib.pyplot as plt
import numpy as np

from experiments.common import interval, save_figure

_NAMED = 5  # curves or methods that a picture names; more colours than that cannot be told apart


def learning_curves(directory: pathlib.Path, metric: str, baseline: str, *, is_share: bool = True) -> None:
  """Draws a metric of `metrics.jsonl` against the step, a panel for each group of phases (`group, method`).

  The best few methods and the baseline are named where their curves end, the others are grey.

  Args:
    directory: of the log and of the picture, `learning_curves.png`.
    metric: its name in the log.
    baseline: the method to compare with.
    is_share: whether it is a share that is drawn in percent, of which more is better; else less is.
  """
  scale, better = (100, -1) if is_share else (1, 1)
  groups: dict[str, dict[str, list[tuple[int, float]]]] = {}
  for line in (directory / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    if metric in row:
      group, _, method = row["phase"].rpartition(", ")
      groups.setdefault(group, {}).setdefault(method, []).append((row["step"], scale * np.mean(row[metric])))
  groups.pop("", None)  # the teacher's own phase
  figure, panels = plt.subplots(1, len(groups), figsize=(6.5 * len(groups), 4), squeeze=False)
  for panel, (group, methods) in zip(panels[0], groups.items(), strict=True):
    best_first = sorted(methods, key=lambda method: better * methods[method][-1][1])
    named = [method for method in best_first if method != baseline][:_NAMED]
    for method in methods.keys() - {*named, baseline}:
      panel.plot(*zip(*methods[method], strict=True), color="lightgray", linewidth=0.8, zorder=1)
    ends = {}
    for method in named:
      ends[method] = (*methods[method][-1], panel.plot(*zip(*methods[method], strict=True), zorder=2)[0].get_color())
    if baseline in methods:
      panel.plot(*zip(*methods[baseline], strict=True), color="black", linestyle="--", zorder=3)
      ends[baseline] = (*methods[baseline][-1], "black")
    panel.set(
      title=group, xlabel="training step", ylabel=f"{metric.replace('/', ' ')}{' (%)' * is_share}, mean of seeds"
    )
    label_beside(panel, ends)
  figure.tight_layout()
  save_figure(figure, directory / "learning_curves.png")
  plt.close(figure)


def label_beside(panel: Any, points: Mapping[str, tuple[float, float, str]]) -> None:
  """Writes names right of a panel, at the heights of their points but never on top of each other.

  Args:
    panel: whose limits are final.
    points: (x, y, colour) by name; a thin line leads from the name to the point.
  """
  low, high = panel.get_ylim()
  names = sorted(points, key=lambda name: points[name][1])
  heights = [(points[name][1] - low) / (high - low) for name in names]
  gap = 0.15 / (panel.get_position().height * panel.figure.get_figheight())  # inches; a line of small print
  for name, height in zip(names, spread(heights, gap), strict=True):
    x, y, color = points[name]
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
    place = {"xytext": (1.04, height), "textcoords": "axes fraction", "va": "center", "fontsize": 8}
    panel.annotate(name, (x, y), color=color, arrowprops=line, annotation_clip=False, **place)


def spread(heights: Sequence[float], gap: float) -> list[float]:
  """Moves sorted numbers apart until neighbours differ by the gap, around where they were."""
  index = np.arange(len(heights))
  pushed_up = np.maximum.accumulate(np.asarray(heights) - gap * index) + gap * index
  pushed_down = np.minimum.accumulate((np.asarray(heights) - gap * index)[::-1])[::-1] + gap * index
  return ((pushed_up + pushed_down) / 2).tolist()


def bounded(widths: Sequence[float], means: Sequence[float]) -> np.ndarray:
  """Half widths of intervals `[2, n]`, down and up, that leave neither 0 nor 100 percent."""
  middle, half = np.asarray(means), np.nan_to_num(widths)
  return np.stack([np.minimum(half, middle), np.minimum(half, 100 - middle)])


def accuracy_by_method(directory: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  """Draws accuracy by method with 95% intervals, a panel for each number of labels; teacher and baseline are lines."""
  teacher = 100 * np.mean(next(r for r in results if r["method"] == "teacher")["accuracy"])
  budgets = list(dict.fromkeys(r["labels"] for r in results if r["method"] != "teacher"))
  figure, panels = plt.subplots(1, len(budgets), figsize=(5.5 * len(budgets), 3.5), squeeze=False)
  for panel, budget in zip(panels[0], budgets, strict=True):
    chosen = [r for r in results if r["labels"] == budget and r["method"] != "teacher"]
    means, widths = zip(*(interval(100 * np.asarray(r["accuracy"])) for r in chosen), strict=True)
    panel.errorbar(means, range(len(chosen)), xerr=bounded(widths, means), fmt="o", capsize=4)
    panel.axvline(teacher, color="gray", linestyle=":", label="teacher")
    panel.axvline(
      means[[r["method"] for r in chosen].index("baseline")], color="black", linestyle="--", label="baseline"
    )
    panel.set(title=f"{budget} labels", xlabel="test accuracy (%), 95% interval")
    panel.set_yticks(range(len(chosen)), [r["method"] for r in chosen])
    panel.invert_yaxis()
    panel.legend()
  figure.tight_layout()
  save_figure(figure, directory / "accuracy.png")
  plt.close(figure)


def confused_digits(directory: pathlib.Path, split: Mapping[str, Any], softmax: Mapping[str, np.ndarray]) -> None:
  """Draws the images on which the teacher hesitates most, and what each model makes of them."""
  ordered = np.sort(softmax["teacher"], axis=-1)
  images = np.argsort(ordered[:, -1] - ordered[:, -2])[:4]
  figure, panels = plt.subplots(len(images), 1 + len(softmax), figsize=(2.3 * (1 + len(softmax)), 1.9 * len(images)))
  for line, image in zip(panels, images, strict=True):
    line[0].imshow(split["image"][image].squeeze(-1 if split["image"].shape[-1] == 1 else ()), cmap="gray_r")
    line[0].set(title=f"a {split['label'][image]}", xticks=[], yticks=[])
    for panel, (name, probabilities) in zip(line[1:], softmax.items(), strict=True):
      panel.bar(range(probabilities.shape[1]), probabilities[image])
      panel.set(title=name, ylim=(0, 1), xticks=range(probabilities.shape[1]))
  figure.tight_layout()
  save_figure(figure, directory / "confused_digits.png")
  plt.close(figure)


def set_right(
  directory: pathlib.Path, split: Mapping[str, Any], softmax: Mapping[str, np.ndarray], student: str, names: str
) -> None:
  """Draws images that a student reads rightly and surely while the baseline takes them for something else.

  Those on which both are surest, no two of one class; `set_right.png`.

  Args:
    directory: of the picture.
    split: with `image` and `label`.
    softmax: probabilities `[images, classes]` by method.
    student: the method beside the baseline.
    names: of the classes, a character for each.
  """
  labels, rows = np.asarray(split["label"]), np.arange(len(split["label"]))
  wrong = softmax["baseline"].argmax(-1)
  sure = softmax[student][rows, labels] * softmax["baseline"].max(-1)
  sure[(wrong == labels) | (softmax[student].argmax(-1) != labels)] = 0
  surest_first = rows[np.argsort(-sure, kind="stable")][: np.count_nonzero(sure)]
  _, first = np.unique(labels[surest_first], return_index=True)
  chosen = surest_first[np.sort(first)[:32]]
  figure, panels = plt.subplots(4, 8, figsize=(12, 7))
  for panel in panels.flat:
    panel.set_axis_off()
  for panel, image in zip(panels.flat, chosen, strict=False):
    panel.imshow(split["image"][image, ..., 0], cmap="gray_r")
    panel.set_title(f"{names[labels[image]]}, not {names[wrong[image]]}")
  figure.suptitle(f'Characters of unseen fonts that the student of "{student}" reads and the baseline mistakes')
  figure.tight_layout()
  save_figure(figure, directory / "set_right.png")
  plt.close(figure)


def task_trade_off(path: pathlib.Path, points: Mapping[str, Mapping[str, float]], named: Sequence[str]) -> None:
  """Draws methods as points, a panel for each pair of tasks (higher is better), and the Pareto front among them.

  Methods far below the others are left out of the picture, and counted in its title.

  Args:
    path: of the picture.
    points: mean score by method and task.
    named: methods to tell apart; the first is the reference.
  """
  pairs = list(itertools.combinations(next(iter(points.values())), 2))
  figure, panels = plt.subplots(1, len(pairs), figsize=(6 * len(pairs), 5), squeeze=False)
  for panel, (first, second) in zip(panels[0], pairs, strict=True):
    values = {method: (scores[first], scores[second]) for method, scores in points.items()}
    array = np.asarray(list(values.values()))
    low = np.median(array, axis=0) - 6 * np.subtract(*np.percentile(array, [75, 25], axis=0))
    shown = {method: point for method, point in values.items() if np.all(point >= low)}
    front = [method for method in pareto_front(values) if method in shown]
    panel.step(*zip(*(values[method] for method in front), strict=True), where="post", color="k", label="Pareto front")
    others = [point for method, point in shown.items() if method not in named]
    if others:
      panel.scatter(*zip(*others, strict=True), color="lightgray", label="balancers")
    for method in (method for method in named if method in shown):
      panel.scatter(*values[method], label=method, zorder=3)
    if named[0] in values:
      panel.axvline(values[named[0]][0], color="gray", linestyle=":")
      panel.axhline(values[named[0]][1], color="gray", linestyle=":")
    hidden = len(values) - len(shown)
    panel.set(
      xlabel=f"test score of {first}",
      ylabel=f"test score of {second}",
      title=f"{hidden} methods below the picture" if hidden else "",
    )
    panel.legend(fontsize=8)
  figure.tight_layout()
  save_figure(figure, path)
  plt.close(figure)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
  """Names of the points that no other beats in both coordinates, from left to right."""
  front: list[str] = []
  for name, (_, y) in sorted(points.items(), key=lambda item: (-item[1][0], -item[1][1])):
    if not front or y > points[front[-1]][1]:
      front.append(name)
  return front[::-1]


def difference_spectra(path: pathlib.Path, spectra: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
  """Draws the singular values of the difference of two tasks' kernels by method, a panel for each problem."""
  figure, panels = plt.subplots(1, len(spectra), figsize=(5.5 * len(spectra), 4), squeeze=False)
  for panel, (problem, methods) in zip(panels[0], spectra.items(), strict=True):
    for method, values in methods.items():
      panel.semilogy(range(1, len(values) + 1), np.maximum(values, 1e-6), marker=".", label=method)
    panel.set(title=problem, xlabel="index", ylabel="singular value of the difference, first layer")
    panel.legend()
  figure.tight_layout()
  save_figure(figure, path)
  plt.close(figure)


def gradient_cosines(directory: pathlib.Path, highlight: str) -> None:
  """Draws the cosines of `metrics.jsonl` between tasks' gradients against the step, one panel for each pair of tasks.

  One method (phases are called `problem, method`) is drawn in colour with the range of its seeds.
  """
  curves: dict[str, dict[str, list[tuple[int, np.ndarray]]]] = {}
  for line in (directory / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    problem, _, method = row["phase"].partition(", ")
    for name, values in row.items():
      if name.startswith("cosine/"):
        panel = f"{problem}: {name.removeprefix('cosine/')}"
        curves.setdefault(panel, {}).setdefault(method, []).append((row["step"], np.ravel(values)))
  figure, panels = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.5), squeeze=False)
  for panel, (title, methods) in zip(panels[0], curves.items(), strict=True):
    for method, points in methods.items():
      steps, cosines = [step for step, _ in points], np.stack([values for _, values in points])
      if method == highlight:
        panel.fill_between(steps, cosines.min(1), cosines.max(1), alpha=0.3, zorder=2)
        panel.plot(steps, cosines.mean(1), label=f"{method}, range of seeds", zorder=3)
      else:
        panel.plot(steps, cosines.mean(1), color="lightgray", linewidth=0.8, zorder=1)
    panel.axhline(0, color="black", linewidth=0.5)
    panel.set(title=title, xlabel="step", ylabel="cosine of the tasks' gradients", ylim=(-1, 1))
    panel.legend(fontsize=8)
  figure.tight_layout()
  save_figure(figure, directory / "gradient_cosines.png")
  plt.close(figure)


def ranking(directory: pathlib.Path, results: Sequence[Mapping[str, Any]], teacher: Sequence[float]) -> None:
  """Draws ranked methods: accuracy with 95% intervals, and the paired gain against the time of a step."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(15, max(3.5, 0.26 * len(results))))
  means, widths = zip(*(interval(100 * np.asarray(r["accuracy"])) for r in results), strict=True)
  left.errorbar(means, range(len(results)), xerr=bounded(widths, means), fmt="o", markersize=4, capsize=3)
  left.axvline(100 * np.mean(teacher), color="gray", linestyle=":", label="teacher")
  left.axvline(means[[r["method"] for r in results].index("baseline")], color="black", linestyle="--", label="baseline")
  left.set_yticks(range(len(results)), [r["title"] for r in results], fontsize=8)
  left.set(xlabel="test accuracy (%), 95% interval")
  left.invert_yaxis()
  left.legend()
  usual, named = np.median([result["milliseconds"] for result in results]), {}
  for result in (result for result in results if result["difference"] is not None):
    gain, width = interval(100 * np.asarray(result["difference"]))
    matters = abs(gain) > width or result["milliseconds"] > 2 * usual
    color = ("tab:blue" if gain > 0 else "tab:red") if matters else "lightgray"
    right.errorbar(result["milliseconds"], gain, yerr=np.nan_to_num(width), fmt="o", color=color, zorder=1 + matters)
    if matters:
      named[result["title"]] = result["milliseconds"], gain, color
  right.axhline(0, color="black", linestyle="--")
  most = sorted(named, key=lambda title: -abs(named[title][1]))[: 2 * _NAMED]
  right.set(xscale="log", xlabel="time of a step (ms for each seed)", ylabel="gain over the baseline (points)")
  right.set_title("blue and red: beyond noise, or slow; the largest are named", fontsize=9)
  label_beside(right, {title: named[title] for title in most})
  figure.tight_layout()
  save_figure(figure, directory / "ranking.png")
  plt.close(figure)


def sweeps(directory: pathlib.Path, scores: Mapping[str, Sequence[Mapping[str, float]]], baseline: str) -> None:
  """Draws validation accuracy against the weight, a panel for each method; `sweeps.png`.

  A line for each temperature and learning rate; the best that the baseline reaches at any rate is dashed. What is far
  below it is cut off.

  Args:
    directory: of the picture.
    scores: by method, a row for each setting with `accuracy` and what it sets.
    baseline: the method that has learning rates alone.
  """
  methods = [name for name in scores if name != baseline]
  columns = min(5, len(methods))
  lines = -(-len(methods) // columns)
  figure, panels = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.6 * lines), squeeze=False, sharey=True)
  rates = sorted({row["rate"] for rows in scores.values() for row in rows})
  reached = 100 * max(row["accuracy"] for row in scores[baseline])
  highest = 100 * max(row["accuracy"] for rows in scores.values() for row in rows)
  panels[0][0].set_ylim(reached - 6, highest + 0.5)
  for panel in panels.flat[len(methods) :]:
    panel.set_axis_off()
  for panel, method in zip(panels.flat, methods, strict=False):
    curves: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for row in scores[method]:
      curves.setdefault((row.get("temperature", 0.0), row["rate"]), []).append((row["weight"], 100 * row["accuracy"]))
    coldest = min(temperature for temperature, _ in curves)
    for (temperature, rate), points in curves.items():
      style = "-" if temperature == coldest else ":"
      panel.semilogx(*zip(*points, strict=True), style, color=f"C{rates.index(rate)}", marker=".")
    panel.axhline(reached, color="black", linestyle="--", linewidth=0.8)
    panel.set_title(method, fontsize=9)
  for rate in rates:
    panels[0][0].plot([], [], color=f"C{rates.index(rate)}", label=f"rate {rate:g}")
  panels[0][0].plot([], [], "k:", label="higher temperature")
  panels[0][0].legend(fontsize=6)
  figure.supxlabel("weight")
  figure.supylabel("validation accuracy (%)")
  figure.tight_layout()
  save_figure(figure, directory / "sweeps.png")
  plt.close(figure)


def by_task(
  directory: pathlib.Path, results: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], baseline: str
) -> None:
  """Draws the score by method with 95% intervals, a panel for each task, the baseline as a line; `accuracy.png`."""
  figure, panels = plt.subplots(
    1, len(titles), figsize=(5 * len(titles), 0.4 * len(results) + 1.2), sharey=True, squeeze=False
  )
  for panel, (task, title) in zip(panels[0], titles.items(), strict=True):
    means, widths = zip(*(interval(100 * np.asarray(r["score"][task])) for r in results.values()), strict=True)
    panel.errorbar(means, range(len(results)), xerr=bounded(widths, means), fmt="o", capsize=4)
    if baseline in results:
      panel.axvline(means[list(results).index(baseline)], color="black", linestyle="--", label=baseline)
      panel.legend()
    panel.set(xlabel=f"{title} of the test, 95% interval")
    panel.set_yticks(range(len(results)), list(results))
  panels[0][0].invert_yaxis()
  figure.tight_layout()
  save_figure(figure, directory / "accuracy.png")
  plt.close(figure)


def by_metric(
  path: pathlib.Path,
  results: Mapping[str, Mapping[str, Any]],
  metrics: Sequence[str],
  teacher: Mapping[str, float],
) -> None:
  """Draws every metric by method with 95% intervals, a panel for each, the first method as a line.

  Args:
    path: of the picture.
    results: by method and metric, one number for each seed.
    metrics: to draw.
    teacher: the teacher's own, where it has one.
  """
  figure, panels = plt.subplots(
    1, len(metrics), figsize=(4 * len(metrics), 0.4 * len(results) + 1.2), sharey=True, squeeze=False
  )
  for panel, metric in zip(panels[0], metrics, strict=True):
    means, widths = zip(*(interval(found[metric]) for found in results.values()), strict=True)
    panel.errorbar(means, range(len(results)), xerr=np.nan_to_num(widths), fmt="o", capsize=4)
    panel.axvline(means[0], color="black", linestyle="--", label=next(iter(results)))
    if metric in teacher:
      panel.axvline(teacher[metric], color="gray", linestyle=":", label="teacher")
    panel.set(xlabel=metric)
    panel.set_yticks(range(len(results)), list(results))
  panels[0][0].invert_yaxis()
  panels[0][0].legend(fontsize=8)
  figure.tight_layout()
  save_figure(figure, path)
  plt.close(figure)
