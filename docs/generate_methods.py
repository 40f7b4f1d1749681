"""Writes docs/methods.md: `python -m docs.generate_methods`.

Formulas and papers come from the docstrings, so the page cannot disagree with them; what a docstring does not say comes
from the catalogue, `kdflax.methods.CATALOGUE`.
"""

import importlib
import inspect
import pathlib
import re
import textwrap
from collections.abc import Callable

from kdflax import losses, models
from kdflax.methods import CATALOGUE, SOURCES, TOOLS, Entry, paper

PAGE = pathlib.Path(__file__).with_name("methods.md")

INTRODUCTION = """\
# Methods

Every distillation loss of `kdflax.losses`, and the function of `kdflax.methods` that makes it a method for a student
and a teacher. This page is generated from the docstrings, which say more, and the catalogue: edit those, or
kdflax/methods/catalogue, and run `python -m docs.generate_methods`.
"""

WEIGHTS = textwrap.fill(
  "A weight multiplies the mean over the examples, next to a cross-entropy of weight 1 unless it says otherwise. It"
  " goes with the scale of the formula here and was chosen by others, for small CIFAR-100 networks unless it says"
  " otherwise: a start for a search, no more. Sources:"
  f" {', '.join(f'[{letter}] {source}' for letter, source in SOURCES.items())}."
  ' "None recorded" says that no weight is known that goes with the formula here; `experiments.zoo --tune` finds one'
  " for your pair.",
  width=120,
)

MORE = """\
## More than one loss, or none of its own

Methods that put losses together, or need more than a loss.
"""

DEGENERATE = """\
## Degenerate inputs

Value and gradient of every loss are finite, in float32 and bfloat16, for: duplicate rows, zero rows, a collapsed
student, collapsed student and teacher, zeros, constant inputs, a common offset of 1e3, a batch of 1, a batch of 2, and
for losses on logits large logits of 1e4, logits a hundred apart, opposed large logits, a class masked by -inf on both
sides. The contract suite tries each (`degenerate_inputs` in tests/losses/test_contract.py); `crd` has tests of its own.
"""

LEARNABLE = """\
## Learnable parts

Models of `kdflax.models` that are trained with the student, under names of their own, and stay behind when it leaves
(`kdflax.export` writes only the student). The exception is the reused head, which is part of the student.

| part | model | paper |
| --- | --- | --- |
"""

PARTS = {
  "Connector to the teacher's width": "linear_connector",
  "FitNets regressor": "conv_connector",
  "CRD projection onto the sphere": "embedding_connector",
  "VID mean and learned variance": "vid_connector",
  "ReviewKD fusion of stages (ABF)": "review_fusion",
  "FT paraphraser": "paraphraser",
  "FT translator": "translator",
  "SimKD projector and reused classifier": "reused_head",
  "CTKD temperature with gradient reversal": "temperature",
}

SCHEMES = """\
## Schemes without a loss of their own

Mutual learning (DML), online ensembles, mean teacher, born-again generations, teacher assistants, self-distillation
between exits and across augmentations and multi-teacher weights (CA-MKD, AEKD) are configurations of the losses above:
[recipes](recipes.md).
"""


def entries() -> dict[str, Entry]:
  """The public losses by name, in the order of the catalogue.

  Raises:
    ValueError: if one has no entry.
  """
  public = {name for name in losses.__all__ if name not in TOOLS}
  if unknown := public - CATALOGUE.keys():
    raise ValueError(
      f"no entry for {', '.join(sorted(unknown))}: add one to CATALOGUE in kdflax/methods/catalogue, or a line to"
      " its TOOLS"
    )
  return {name: entry for name, entry in CATALOGUE.items() if name in public}


def formula(loss: Callable) -> list[str]:
  """The indented lines before the arguments."""
  description = (inspect.getdoc(loss) or "").split("\nArgs:")[0]
  lines = [line.strip() for line in description.splitlines() if line.startswith("  ")]
  if not lines:
    raise ValueError(f"the docstring of {loss.__name__} has no formula: indent it, before the arguments")
  return lines


def paper_of_part(name: str) -> str:
  """The reference of a model, "-" without one."""
  text = " ".join((inspect.getdoc(getattr(models, name)) or "").split())
  found = re.search(r"Reference: (.+?, \d{4}(?:, arXiv \d{4}\.\d{4,5})?)", text)
  return found.group(1) if found else "-"


def code(text: str) -> str:
  """A code span inside a table, where a bar would start a new cell."""
  return f"`{text}`".replace("|", "\\|")


def row(name: str, entry: Entry) -> str:
  paper(entry.loss)  # which every loss must name, also where the method says it with full names
  cells = [
    entry.title,
    code(name),
    entry.paper,
    "<br>".join(map(code, formula(entry.loss))),
    entry.needs,
    entry.published,
    set_up(entry),
  ]
  return f"| {' | '.join(cells)} |"


def set_up(entry: Entry) -> str:
  """The call that makes it a method."""
  if entry.function is None:
    return "-"
  given = [f"losses.{entry.loss.__name__}"] if "loss" in inspect.signature(entry.function).parameters else []
  arguments = ["pair", *given, *(f"{name}=" for name in entry.takes)]
  return code(f"{entry.function.__name__}({', '.join(arguments)})")


def section(module: str) -> str:
  about = (importlib.import_module(module).__doc__ or "").splitlines()[0]
  lines = [
    f"## {module.rsplit('.', 1)[1].replace('_', ' ').capitalize()}",
    "",
    about,
    "",
    "| method | loss | paper | formula | needs | weight | set up by |",
    "| --- | --- | --- | --- | --- | --- | --- |",
    *(row(name, entry) for name, entry in entries().items() if entry.loss.__module__ == module),
  ]
  return "\n".join(lines) + "\n"


def more() -> str:
  """What is a method and no loss of its own."""
  lines = ["| method | paper | needs | weight | set up by |", "| --- | --- | --- | --- | --- |"]
  for entry in (entry for name, entry in CATALOGUE.items() if name not in losses.__all__):
    lines.append(f"| {entry.title} | {entry.paper} | {entry.needs} | {entry.published} | {set_up(entry)} |")
  return "\n".join(lines) + "\n"


def page() -> str:
  """The whole page; losses are in the order of the catalogue."""
  modules = dict.fromkeys(entry.loss.__module__ for entry in entries().values())
  parts = "\n".join(f"| {part} | {code(name)} | {paper_of_part(name)} |" for part, name in PARTS.items())
  return "\n".join(
    [INTRODUCTION, f"{WEIGHTS}\n", *map(section, modules), MORE, more(), DEGENERATE, f"{LEARNABLE}{parts}\n", SCHEMES]
  )


if __name__ == "__main__":
  PAGE.write_text(page())
