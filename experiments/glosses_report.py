"""What `experiments.glosses` writes: the tables, the picture and the nearest glosses."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from experiments import common, phases, pictures

matplotlib.use("Agg")  # before pyplot: there may be no screen
import matplotlib.pyplot as plt

NEAREST = 10  # neighbours that count
SERVED = 64  # texts at a time
_EVERY = 6  # of the test glosses one in so many is a query
_SHOWN = 6  # queries in the list of nearest glosses


def write(
  session: phases.Session,
  results: Mapping[Any, Any],
  taught: Mapping[int, Mapping[str, Sequence[float]]],
  costs: Mapping[str, Mapping[str, float]],
  test: Mapping[str, Any],
  texts: np.ndarray,
) -> None:
  """Writes everything into the run directory, and prints the tables.

  Args:
    session: of the run.
    results: by student, how it ended.
    taught: the scores of the teacher's heads by number of labels and task.
    costs: of serving by network; empty in a smoke run.
    test: the test glosses.
    texts: theirs.
  """
  single = {student: trained for student, trained in results.items() if student.tasks == ("lexicographer",)}
  parts = [distillation_table(session, single, taught), joint_table(session, results, taught)]
  if costs:
    parts.append(serving_table(session, costs))
  print("\n".join(part for part in parts if part))
  pictures.learning_curves(session.directory, "validation/lexicographer", "alone")
  picture(session, single, taught)
  nearest(session, single, test, texts)


def distillation_table(session: phases.Session, results: Mapping[Any, Any], taught: Mapping[int, Any]) -> str:
  """The students of the lexicographer files, each beside the one that had the labels alone."""
  rows, numbers = [], []
  for labels in sorted({student.labels for student in results}):
    scores = taught[labels]["lexicographer"]
    rows.append(_row(labels, "teacher", "its heads alone", scores, None, None, None))
    numbers.append({"labels": labels, "network": "teacher", "method": "", "accuracy": scores})
    for student, trained in results.items():
      if student.labels == labels:
        scores = trained.scores["lexicographer"]
        alone = results[student._replace(method="alone")].scores["lexicographer"]
        soft = results[student._replace(method="soft targets")].scores["lexicographer"]
        gained = None if student.method == "alone" else np.subtract(scores, alone)
        added = None if student.method in ("alone", "soft targets") else np.subtract(scores, soft)
        rows.append(_row(labels, student.network, student.method, scores, gained, added, trained))
        numbers.append(
          {"labels": labels, "network": student.network, "method": student.method, "accuracy": scores}
          | {"found": trained.found, "parameters": trained.parameters, "seconds": trained.seconds}
        )
  title = f"Kinds of glosses: mean and 95% interval over {session.config.seeds} paired seeds"
  return common.write_table(session.directory, "results", title, rows, numbers)


def _row(labels: int, network: str, method: str, scores: Any, gained: Any, added: Any, trained: Any) -> dict[str, Any]:
  difference = lambda values: "" if values is None else common.plus_minus(values, sign="+")
  return {
    "labels": labels,
    "network": network,
    "learns from": method,
    "test accuracy (%)": common.plus_minus(scores),
    "over the labels alone": difference(gained),
    "over soft targets": difference(added),
    f"teacher's {NEAREST} nearest found (%)": "100" if trained is None else common.plus_minus(trained.found),
  }


def joint_table(session: phases.Session, results: Mapping[Any, Any], taught: Mapping[int, Any]) -> str:
  """The bag on three tasks: a network for each or one for all, from the labels or from the teacher as well."""
  labels = session.config.labels[-1]
  mine = {s: t for s, t in results.items() if s.network == "bag" and s.labels == labels}
  joint = next((student.tasks for student in mine if len(student.tasks) > 1), None)
  if joint is None:
    return ""
  scores = {}
  for method in ("alone", "soft targets"):
    student = next(iter(mine))._replace(method=method)
    scores["one network for each", method] = {
      task: mine[student._replace(tasks=(task,))].scores[task] for task in joint
    }
    scores["one for all", method] = mine[student._replace(tasks=joint)].scores
  baseline = scores["one network for each", "alone"]
  teacher = {"tasks": "teacher", "learns from": "its heads alone"}
  rows = [teacher | {_title(task): common.plus_minus(taught[labels][task]) for task in joint}]
  rows[0] |= {f"{_title(task)}: difference": "" for task in joint}
  for (tasks, method), found in scores.items():
    row = {"tasks": tasks, "learns from": method}
    row |= {_title(task): common.plus_minus(found[task]) for task in joint}
    for task in joint:
      difference = np.subtract(found[task], baseline[task])
      row[f"{_title(task)}: difference"] = "" if found is baseline else common.plus_minus(difference, sign="+")
    rows.append(row)
  numbers = [{"tasks": tasks, "method": method, "scores": found} for (tasks, method), found in scores.items()]
  title = f"Three tasks from {labels} labels: the bag, mean and 95% interval over {session.config.seeds} paired seeds"
  return common.write_table(session.directory, "joint", title, rows, numbers)


def _title(task: str) -> str:
  return "depth (R^2, %)" if task == "depth" else f"{task.replace('_', ' ')} (%)"


def serving_table(session: phases.Session, costs: Mapping[str, Mapping[str, float]]) -> str:
  """Sizes and processor time of the students beside the teacher."""
  milliseconds = lambda cost, size: f"{1e3 * cost[str(size)]:.3f}"
  rows = [
    {
      "network": name,
      "parameters": f"{cost['parameters']:,}",
      "megabytes": f"{cost['bytes'] / 1e6:.1f}",
      "one text alone (ms)": milliseconds(cost, 1),
      f"a text of {SERVED} at a time (ms)": milliseconds(cost, SERVED),
      "teacher's time over it": f"{costs['teacher'][str(SERVED)] / cost[str(SERVED)]:,.0f}",
    }
    for name, cost in costs.items()
  ]
  title = f"Processor time of a text of {session.config.length} word pieces, tokenised, on this CPU"
  return common.write_table(session.directory, "serving", title, rows, costs)


def neighbours_found(student: np.ndarray, teacher: np.ndarray) -> float:
  """Of the glosses that are nearest by the teacher, the part that is among as many by the student; means over queries.

  Args:
    student: `[glosses, width]`, L2-normalised.
    teacher: `[glosses, another width]`, L2-normalised.
  """
  queries = np.arange(0, len(student), _EVERY)
  mine, wanted = (nearest_rows(x, queries) for x in (student, teacher))
  return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(mine, wanted, strict=True)]))


def nearest_rows(embedding: np.ndarray, queries: np.ndarray, count: int = NEAREST) -> np.ndarray:
  """The rows nearest to each query by the cosine, itself left out, nearest first: `[queries, count]`."""
  similarity = embedding[queries] @ embedding.T
  similarity[np.arange(len(queries)), queries] = -np.inf
  rows = np.argpartition(-similarity, count, axis=1)[:, :count]
  order = np.argsort(-np.take_along_axis(similarity, rows, 1), axis=1, kind="stable")
  return np.take_along_axis(rows, order, 1)


def nearest(session: phases.Session, results: Mapping[Any, Any], test: Mapping[str, Any], texts: np.ndarray) -> None:
  """Writes the glosses nearest to a few: by the teacher, by a student of all terms, and by one of labels alone."""
  queries = np.linspace(0, len(texts) - 1, _SHOWN + 2).astype(int)[1:-1]
  labels = session.config.labels[-1]
  network = session.config.networks[0]
  mine = {s.method: t.embedding for s, t in results.items() if s.labels == labels and s.network == network}
  last = session.config.methods[-1]
  embeddings = {
    "teacher": test["embedding"],
    f"{network}, {last}": mine.get(last),
    f"{network}, alone": mine.get("alone"),
  }
  found = {name: nearest_rows(x, queries, 2) for name, x in embeddings.items() if x is not None}
  lines = [f"# The two nearest test glosses, by {', by '.join(found)} ({labels} labels)"]
  for place, query in enumerate(queries):
    lines += [f"\n**{texts[query]}**\n"]
    lines += [f"- {name}: {'; '.join(texts[rows[place]].tolist())}" for name, rows in found.items()]
  common.write_atomically(session.directory / "nearest.md", "\n".join(lines) + "\n")


def picture(session: phases.Session, results: Mapping[Any, Any], taught: Mapping[int, Any]) -> None:
  """Draws the accuracy of each network by method, a panel for each number of labels, with the teacher as a line."""
  budgets = sorted({student.labels for student in results})
  figure, panels = plt.subplots(1, len(budgets), figsize=(5 * len(budgets), 3.6), squeeze=False, sharey=True)
  methods = list(session.config.methods)[::-1]
  for panel, labels in zip(panels[0], budgets, strict=True):
    for offset, network in enumerate(session.config.networks):
      mine = {
        s.method: t.scores["lexicographer"] for s, t in results.items() if (s.network, s.labels) == (network, labels)
      }
      if not mine:
        continue  # the transformer has the most labels only
      means, widths = zip(*(common.interval(100 * np.asarray(values)) for values in mine.values()), strict=True)
      heights = [methods.index(method) - 0.15 * offset for method in mine]
      panel.errorbar(means, heights, xerr=pictures.bounded(widths, means), fmt="os"[offset], capsize=2, label=network)
    teacher = 100 * np.mean(taught[labels]["lexicographer"])
    panel.axvline(teacher, color="black", linestyle="--", label="teacher, 22.7 million parameters")
    panel.set(title=f"{labels} labels", xlabel="test accuracy (%)", yticks=range(len(methods)), yticklabels=methods)
  panels[0][-1].legend(fontsize=7, loc="upper right")
  figure.tight_layout()
  common.save_figure(figure, session.directory / "accuracy.png")
  plt.close(figure)
