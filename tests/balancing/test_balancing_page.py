"""The page of balancers is generated; its table of methods is complete and names only what exists."""

import inspect
import pathlib
import re
import runpy

from kdflax import balancing

DOCS = pathlib.Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "balancing.md").read_text()
TOOLS = {"combine", "conflict_count", "from_balancer", "from_function", "from_weighting", "gradient_cosines", "gramian"}
TOOLS |= {"joint_loss", "per_group", "random_order", "representation_gradients", "smoothed", "task_gradients"}
TOOLS |= {"init_rows", "update_rows", "from_loss_weighting", "group_tasks", "task_affinity", "task_gramian"}


def test_every_method_is_in_the_table():
  table = [line for line in TEXT.splitlines() if line.startswith("|")]
  functions = {
    re.search(r"`(\w+)`", line.split("|")[2]).group(1) for line in table if line.count("|") == 7 and "`" in line
  }
  public = {name for name in balancing.__all__ if inspect.isfunction(getattr(balancing, name))}
  assert functions == public - TOOLS


def test_every_public_name_is_explained():
  for name in balancing.__all__:
    assert re.search(rf"\b{name}\b", TEXT), name
    assert inspect.getdoc(getattr(balancing, name)), name


def test_the_page_is_current():
  assert runpy.run_path(str(DOCS / "generate_balancing.py"))["page"]() == TEXT, (
    "run `python -m docs.generate_balancing`"
  )


def test_every_entry_can_be_built_and_says_what_it_reads():
  """The table of costs and states is that of what `build` makes, under the names of this page."""
  reads = {name: entry.reads for name, entry in balancing.CATALOGUE.items()}
  assert {reads[name] for name in ("constant weights", "FAMO", "UW-SO")} == {"losses"}
  assert {reads[name] for name in ("GradNorm", "MGDA", "PCD", "smoothed UPGrad")} == {"gramian"}
  assert {reads[name] for name in ("DB-MTL", "GradDrop")} == {"gradients"}
  states = {name: balancing.CATALOGUE[name].state for name in ("MGDA", "FAMO", "GradVac", "MoCo")}
  assert states == {"MGDA": "none", "FAMO": "small", "GradVac": "`[T, T]`", "MoCo": "T gradients"}
