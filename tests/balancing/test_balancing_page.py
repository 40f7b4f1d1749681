"""The table of methods is complete and names only what exists."""

import inspect
import pathlib
import re

from kdflax import balancing

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "balancing.md").read_text()
TOOLS = {"combine", "conflict_count", "from_balancer", "from_function", "from_weighting", "gradient_cosines", "gramian"}
TOOLS |= {"joint_loss", "per_group", "random_order", "representation_gradients", "smoothed", "task_gradients"}
TOOLS |= {"init_rows", "update_rows"}


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
