"""The tables and pictures of the fusion experiment, and which of its differences are beyond noise."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import common, phases, pictures
from kdflax import data, models
from kdflax.training import metrics

BASES = ("independent", "joint", "composite")  # what the others are compared with


def write(session: phases.Session, students: Mapping[str, Any], splits: Any) -> str:
  """Writes the tables, of the methods and of their differences, and the pictures; returns them as Markdown.

  Args:
    session: of the run.
    students: by method, each with `model` and `variables`.
    splits: of the data set, by task.
  """
  config = session.config
  results = {name: result(session, name, student, splits["test"]) for name, student in students.items()}
  note = (
    f"{config.labels} of {len(splits['train']['index'])} labels for the students, all for the teachers;"
    f" mean and 95% interval over {config.seeds} paired seeds"
  )
  rows = [row(name, result, config.tasks) for name, result in results.items()]
  title = f"Students of {len(config.tasks)} tasks on {config.dataset}: {note}"
  tables = [common.write_table(session.directory, "results", title, rows, results)]
  compared = [(name, base) for base in BASES if base in results for name in results if meaningful(name, base)]
  if {"multi-task teacher", "single-task teachers"} <= set(results):
    compared.append(("multi-task teacher", "single-task teachers"))
  if compared:
    differing = [difference(name, base, results) for name, base in compared]
    title = f"Which differences are beyond noise (the 95% interval of the paired difference excludes 0): {note}"
    tables.append(common.write_table(session.directory, "differences", title, differing, differing))
  pictures.by_task(session.directory, results, titles(config.tasks), BASES[0])
  if "validation" in splits:
    pictures.learning_curves(session.directory, "validation/accuracy", BASES[0])
  return "\n".join(tables)


def titles(tasks: Mapping[str, data.Task]) -> dict[str, str]:
  """What the score of a task is called; both are shown in hundredths, so that their differences are points."""
  return {name: f"{name}: {'accuracy (%)' if task.classes else 'R² (%)'}" for name, task in tasks.items()}


def meaningful(name: str, base: str) -> bool:
  """Whether a difference answers a question: what sharing, a teacher, or balancing is worth."""
  if base == "composite" or name.startswith("composite "):
    return name.startswith(f"{base} ")
  return name not in (base, "independent")


def result(session: phases.Session, name: str, student: Any, split: Any) -> dict[str, Any]:
  """What is known of a method, with a number for each seed: the score of a task is its accuracy, or R^2."""
  seeds = session.config.seeds
  said = phases.outputs(student.model, student.variables, split, names=("logits",))["logits"]
  found: dict[str, Any] = {"score": {}, "nll": {}, "ece": {}}
  for task, known in session.config.tasks.items():
    labels = split["label"][task]
    found["score"][task] = common.scores(said[task], labels, known.classes).tolist()
    if known.classes is None:
      continue
    every = jnp.broadcast_to(labels, said[task].shape[:-1])
    found["nll"][task] = np.asarray(metrics.negative_log_likelihood(said[task], every)).mean(-1).tolist()
    found["ece"][task] = [metrics.expected_calibration_error(of_seed, labels) for of_seed in said[task]]
  one = phases.one_seed(student.variables)
  return found | {
    "parameters": models.count_parameters(student.variables[0]) // seeds,
    "bytes": models.count_bytes(student.variables[0]) // seeds,
    "microseconds": phases.latency(session, student.model, one, split, name),
  }


def over_tasks(values: dict[str, list[float]]) -> np.ndarray:
  """Mean over the tasks, [seeds]."""
  return np.mean(list(values.values()), axis=0)


def row(name: str, result: dict[str, Any], tasks: Mapping[str, data.Task]) -> dict[str, Any]:
  """One line of the table of methods; negative log-likelihood and calibration are means over the tasks with classes."""
  return {
    "method": name,
    **{title: common.plus_minus(result["score"][task]) for task, title in titles(tasks).items()},
    "NLL": common.plus_minus(over_tasks(result["nll"]), scale=1, digits=3),
    "ECE (%)": common.plus_minus(over_tasks(result["ece"])),
    "parameters": result["parameters"],
    "bytes": result["bytes"],
    **{f"µs for {images} images": f"{time:.0f}" for images, time in result["microseconds"].items()},
  }


def difference(name: str, base: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """One line of the table of differences."""
  line = {"method": name, "against": base}
  for task in results[name]["score"]:
    gain = np.subtract(results[name]["score"][task], results[base]["score"][task])
    line |= {f"{task} (points)": common.plus_minus(gain, sign="+"), f"{task} beyond noise": common.beyond_noise(gain)}
  for metric, scale, digits in (("nll", 1, 3), ("ece", 100, 1)):
    change = over_tasks(results[name][metric]) - over_tasks(results[base][metric])
    line[metric.upper()] = common.plus_minus(change, scale=scale, digits=digits, sign="+")
    line[f"{metric.upper()} beyond noise"] = common.beyond_noise(change)
  return line
