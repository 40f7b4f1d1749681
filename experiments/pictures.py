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


def learning_curves(directory: pathlib.Path, metric: str) -> None:
  """Draws a metric of `metrics.jsonl` against the step, a panel for each group of phases (`group, method`)."""
  groups: dict[str, dict[str, list[tuple[int, float]]]] = {}
  for line in (directory / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    if metric in row:
      group, _, method = row["phase"].rpartition(", ")
      groups.setdefault(group, {}).setdefault(method, []).append((row["step"], 100 * np.mean(row[metric])))
  groups.pop("", None)  # the teacher's own phase
  figure, panels = plt.subplots(1, len(groups), figsize=(5.5 * len(groups), 4), squeeze=False)
  for panel, (group, methods) in zip(panels[0], groups.items(), strict=True):
    for method, points in methods.items():
      panel.plot(*zip(*points, strict=True), label=method)
    panel.set(title=group, xlabel="step", ylabel=f"{metric} (%), mean of seeds")
    if len(methods) > 12:  # beside the curves, which it would hide
      panel.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, ncols=-(-len(methods) // 20))
    else:
      panel.legend()
  save_figure(figure, directory / "learning_curves.png")
  plt.close(figure)


def accuracy_by_method(directory: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  """Draws accuracy by method with 95% intervals, a panel for each number of labels, the teacher as a line."""
  teacher = 100 * np.mean(next(r for r in results if r["method"] == "teacher")["accuracy"])
  budgets = list(dict.fromkeys(r["labels"] for r in results if r["method"] != "teacher"))
  figure, panels = plt.subplots(1, len(budgets), figsize=(5.5 * len(budgets), 3.5), squeeze=False)
  for panel, budget in zip(panels[0], budgets, strict=True):
    chosen = [r for r in results if r["labels"] == budget and r["method"] != "teacher"]
    means, widths = zip(*(interval(100 * np.asarray(r["accuracy"])) for r in chosen), strict=True)
    panel.errorbar(means, range(len(chosen)), xerr=np.nan_to_num(widths), fmt="o", capsize=4)
    panel.axvline(teacher, color="gray", linestyle=":", label="teacher")
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
    line[0].imshow(split["image"][image, ..., 0], cmap="gray_r")
    line[0].set(title=f"a {split['label'][image]}", xticks=[], yticks=[])
    for panel, (name, probabilities) in zip(line[1:], softmax.items(), strict=True):
      panel.bar(range(probabilities.shape[1]), probabilities[image])
      panel.set(title=name, ylim=(0, 1), xticks=range(probabilities.shape[1]))
  figure.tight_layout()
  save_figure(figure, directory / "confused_digits.png")
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
    panel.set(xlabel=first, ylabel=second, title=f"{hidden} methods below the picture" if hidden else "")
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
  figure, (left, right) = plt.subplots(1, 2, figsize=(13, max(3.5, 0.26 * len(results))))
  means, widths = zip(*(interval(100 * np.asarray(r["accuracy"])) for r in results), strict=True)
  left.errorbar(means, range(len(results)), xerr=np.nan_to_num(widths), fmt="o", markersize=4, capsize=3)
  left.axvline(100 * np.mean(teacher), color="gray", linestyle=":", label="teacher")
  left.axvline(means[[r["method"] for r in results].index("baseline")], color="tab:red", label="baseline")
  left.set_yticks(range(len(results)), [r["title"] for r in results], fontsize=8)
  left.set(xlabel="test accuracy (%), 95% interval")
  left.invert_yaxis()
  left.legend()
  usual = np.median([result["milliseconds"] for result in results])
  for result in results:
    if result["difference"] is None:
      continue
    gain, width = interval(100 * np.asarray(result["difference"]))
    right.errorbar(result["milliseconds"], gain, yerr=np.nan_to_num(width), fmt="o", color="tab:blue", alpha=0.6)
    if abs(gain) > width or result["milliseconds"] > 2 * usual:  # the others lie on top of each other
      place = result["milliseconds"], gain
      right.annotate(result["title"], place, fontsize=7, xytext=(4, 3), textcoords="offset points")
  right.axhline(0, color="tab:red")
  right.set(xscale="log", xlabel="time of a step (ms for each seed)", ylabel="gain over the baseline (points)")
  right.set_title("named: gain beyond noise, or slow", fontsize=9)
  figure.tight_layout()
  save_figure(figure, directory / "ranking.png")
  plt.close(figure)


def by_task(directory: pathlib.Path, results: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> None:
  """Draws accuracy by method with 95% intervals, a panel for each task; `accuracy.png`."""
  figure, panels = plt.subplots(
    1, len(tasks), figsize=(5 * len(tasks), 0.4 * len(results) + 1.2), sharey=True, squeeze=False
  )
  for panel, task in zip(panels[0], tasks, strict=True):
    means, widths = zip(*(interval(100 * np.asarray(r["accuracy"][task])) for r in results.values()), strict=True)
    panel.errorbar(means, range(len(results)), xerr=np.nan_to_num(widths), fmt="o", capsize=4)
    panel.set(title=task, xlabel="test accuracy (%), 95% interval")
    panel.set_yticks(range(len(results)), list(results))
  panels[0][0].invert_yaxis()
  figure.tight_layout()
  save_figure(figure, directory / "accuracy.png")
  plt.close(figure)
