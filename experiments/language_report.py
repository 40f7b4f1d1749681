"""The table, the verdicts, the pictures and the samples of text of the language experiment."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import common, phases, pictures
from experiments.language_text import few, samples, scorer
from kdflax import models
from kdflax.training import write_atomically

METRICS = ("bits per byte", "forward KL", "reverse KL", "acceptance")
_PROMPTS = 3


def write(session: phases.Session, splits: Any, pair: Any, teacher: Any, students: Any, tokenizer: Any) -> None:
  """Scores all students on the test split and writes what came out.

  Args:
    session: of the run.
    splits: rows by split.
    pair: the models.
    teacher: its params.
    students: by method, what `train_student` returned.
    tokenizer: of the rows.
  """
  config = session.config
  rows = few(splits["test"], config.test_rows)
  score = scorer(pair.student, pair.teacher, rows)
  of_one_seed = jax.tree.map(lambda leaf: leaf[None], teacher)
  own = scorer(pair.teacher, pair.teacher, rows)(of_one_seed, teacher)["bits per byte"][0]
  results = {name: score(trained.params, teacher) for name, trained in students.items()}
  tokens = config.batch_size * config.length
  for name, trained in students.items():
    results[name]["tokens per second"] = 1e3 * tokens / trained.milliseconds
  first = phases.one_seed(next(iter(students.values())).params)
  sizes = {"student": models.count_parameters(first), "teacher": models.count_parameters(teacher)}
  everything = {"teacher": {"bits per byte": own}, "parameters": sizes, "students": results}
  title = (
    f"Students of {sizes['student']:,} parameters, a teacher of {sizes['teacher']:,} that has {own:.3f} bits per byte;"
    f" {config.student_steps} updates of {tokens:,} tokens; mean and 95% interval over {config.seeds} paired seeds"
  )
  rows_shown = [_row(name, results) for name in results]
  table = common.write_table(session.directory, "results", title, rows_shown, everything, verdicts(results))
  print(f"# {title}\n\n{table}")
  pictures.by_metric(session.directory / "metrics.png", results, METRICS, {"bits per byte": own})
  pictures.learning_curves(session.directory, "validation/bits per byte", "alone", is_share=False)
  writers = {"teacher": (pair.teacher, teacher)}
  writers |= {name: (pair.student, phases.one_seed(trained.params)) for name, trained in students.items()}
  chosen = np.linspace(0, len(rows["tokens"]) - 1, _PROMPTS + 2).astype(int)[1:-1].tolist()
  page = samples(writers, rows, config.prompt, tokenizer, chosen)
  write_atomically(session.directory / "samples.md", page)


def _row(name: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
  found, alone = results[name], results["alone"]
  bits = np.subtract(found["bits per byte"], alone["bits per byte"])
  shown = {"bits per byte": common.plus_minus(found["bits per byte"], 1, 3)}
  shown["against alone"] = "" if name == "alone" else common.plus_minus(bits, 1, 3, "+")
  shown["beyond noise"] = "" if name == "alone" else common.beyond_noise(bits)
  shown |= {f"{metric} (nats)": common.plus_minus(found[metric], 1, 3) for metric in ("forward KL", "reverse KL")}
  shown["acceptance (%)"] = common.plus_minus(found["acceptance"], 100, 2)
  return {"method": name, **shown, "tokens per second": f"{found['tokens per second']:,.0f}"}


def verdicts(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Which methods are beyond noise better or worse than the student alone, by metric; which are not."""
  lines = []
  for metric in METRICS:
    higher, kinds = metric == "acceptance", {"better": [], "worse": [], "not beyond noise": []}
    for name in results.keys() - {"alone"}:
      change = np.subtract(results[name][metric], results["alone"][metric])
      verdict = common.beyond_noise(change)
      kind = "better" if (change.mean() > 0) == higher else "worse"
      kinds[kind if verdict == "yes" else "not beyond noise"].append(name)
    order = list(results)
    said = [f"{kind}: {', '.join(sorted(names, key=order.index))}" for kind, names in kinds.items() if names]
    if said:
      lines.append(f"- {metric}, against alone: {'; '.join(said)}.")
  return lines
