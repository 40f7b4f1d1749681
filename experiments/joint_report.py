"""The results, the table, the verdicts and the pictures of the joint-learning experiment."""

import functools
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import common, pictures
from kdflax import models, training
from kdflax.training import write_atomically

SHARING = ("independent", "hard", "feature", "L2 soft", "trace-norm soft")


def result(problem: str, method: str, found: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
  """One line of the results, JSON-able, with a number for each seed."""
  higher = {"accuracy": True, "absolute_error": False}
  relative = lambda tasks: {t: {n: v for n, v in metrics.items() if n in higher} for t, metrics in tasks.items()}
  new, old = relative(found["tasks"]), relative(baseline["tasks"])
  compare = functools.partial(training.metrics.multitask_improvement, higher_is_better=higher)
  params, seeds = found["params"], len(found["validation"])
  line = {
    "problem": problem,
    "method": method,
    **{name: found[name] for name in ("strength", "tasks", "validation", "seconds")},
    "improvement": compare(new, old).tolist(),
    "improvement_by_task": {task: compare({task: new[task]}, {task: old[task]}).tolist() for task in new},
    "delta_m": training.metrics.delta_m(new, old, higher_is_better=higher).tolist(),
    "parameters": models.count_parameters(params) // seeds,
  }
  return line | ({"spectrum": spectrum(params["stacked"])} if "stacked" in params else {})


def spectrum(stacked: Any) -> list[float]:
  """Singular values of the differences between the tasks' first kernels, mean over pairs and seeds."""
  kernels = np.asarray(stacked["hidden"]["0"]["kernel"])  # [seeds, tasks, in, out]
  pairs = [kernels[:, i] - kernels[:, j] for i, j in itertools.combinations(range(kernels.shape[1]), 2)]
  return np.linalg.svd(np.stack(pairs), compute_uv=False).mean((0, 1)).tolist()


def write(directory: pathlib.Path, results: Sequence[Mapping[str, Any]], seeds: int) -> str:
  """Writes `results.md`, `results.json` and the pictures; returns the Markdown."""
  lines = [f"# Joint learning: mean and 95% interval over {seeds} paired seeds\n"]
  for problem, found in _by_problem(results).items():
    lines += [f"## {problem}\n", common.markdown_table([_row(r) for r in found]), *verdicts(found)]
  text = "\n".join(lines) + "\n"
  write_atomically(directory / "results.md", text)
  write_atomically(directory / "results.json", json.dumps(results, indent=1) + "\n")
  for problem, found in _by_problem(results).items():
    pictures.task_trade_off(directory / f"trade_off-{problem}.png", _points(found), SHARING)
  pictures.difference_spectra(
    directory / "difference_spectra.png",
    {p: {r["method"]: r["spectrum"] for r in found if "spectrum" in r} for p, found in _by_problem(results).items()},
  )
  pictures.gradient_cosines(directory, highlight="hard")
  return text


def verdicts(results: Sequence[Mapping[str, Any]]) -> list[str]:
  """Says which methods are worse, and which better, than independent networks beyond their interval, by task.

  One in twenty such verdicts is expected by chance alone.
  """
  others = [r for r in results if r["method"] != "independent"]
  lines = []
  for task in results[0]["tasks"]:
    signs = {r["method"]: _sign(r["improvement_by_task"][task]) for r in others}
    worse = [method for method, sign in signs.items() if sign < 0]
    better = [method for method, sign in signs.items() if sign > 0]
    lines.append(f"- **{task}**: worse than an independent network with {_list(worse)}; better with {_list(better)}.")
  overall = [r["method"] for r in others if _sign(r["improvement"]) < 0]
  note = "95% intervals of paired differences, uncorrected: of so many, one in twenty would exclude 0 by chance."
  return [*lines, f"- **overall**: sharing hurts with {_list(overall)}.", f"\n{note}\n"]


def _sign(values: Sequence[float]) -> int:
  mean, width = common.interval(values)
  return int(np.sign(mean)) if abs(mean) > width else 0  # NaN, of one seed, is no verdict


def _list(names: Sequence[str]) -> str:
  return ", ".join(names) or "none"


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
  row: dict[str, Any] = {"method": result["method"]}
  for task, metrics in result["tasks"].items():
    if "accuracy" in metrics:
      row[f"{task}: accuracy (%)"] = common.plus_minus(metrics["accuracy"])
    else:
      row[f"{task}: absolute error"] = common.plus_minus(metrics["absolute_error"], scale=1, digits=3)
      row[f"{task}: R²"] = common.plus_minus(metrics["r_squared"], scale=1, digits=3)
  independent = result["method"] == "independent"
  row["improvement (%)"] = "" if independent else common.plus_minus(result["improvement"], digits=2, sign="+")
  row["coupling"] = f"{result['strength']:g}" if result["strength"] else ""
  row["parameters"] = result["parameters"]
  return row


def _by_problem(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
  problems: dict[str, list[Mapping[str, Any]]] = {}
  for result in results:
    problems.setdefault(result["problem"], []).append(result)
  return problems


def _points(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """Mean score by method and task, higher is better."""
  score = lambda metrics: np.mean(metrics["accuracy"] if "accuracy" in metrics else metrics["r_squared"])
  name = {"accuracy": "accuracy", "absolute_error": "R²"}
  return {
    r["method"]: {f"{task}: {name[next(iter(m))]}": float(score(m)) for task, m in r["tasks"].items()} for r in results
  }
