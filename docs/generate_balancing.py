"""Writes docs/balancing.md: `python -m docs.generate_balancing`.

The tables come from the catalogue, `kdflax.balancing.CATALOGUE`, and papers from the docstrings.
"""

import inspect
import pathlib

from kdflax import balancing
from kdflax.balancing.catalogue import CATALOGUE, TOOLS, Entry
from kdflax.methods import paper

PAGE = pathlib.Path(__file__).with_name("balancing.md")

INTRODUCTION = """\
# Balancing several tasks

T tasks share parameters. Their losses must become one update, and the tasks pull in different directions with different
strength. Every method here is one function, and all of them have one of three shapes:

| shape | signature | looks at |
|---|---|---|
| weighting | `gramian [T, T] -> weights [T]` | inner products of the task gradients |
| balancer | `update(losses, state, *, gramian, key, present) -> (weights, state)` | losses, and the Gramian if told |
| combiner | `update(losses, gradients, state, *, key, present) -> (direction, state)` | whole gradients |

A balancer's state comes from `init(num_tasks)`, a combiner's from `init(gradients)`; a weighting has none. A balancer
says by `needs_gramian` and `needs_key` what it must be told. Each can be used as the next: `from_weighting` makes a
balancer, `from_balancer` and `from_function` make a combiner. `Balancer` and `Combiner` are the NamedTuples.

```python
losses, gradients = balancing.task_gradients(losses_fn, shared)  # one forward pass, T pullbacks
weights = balancing.upgrad(balancing.gramian(gradients))
direction = balancing.combine(gradients, weights)
```

This page is generated from the catalogue and the docstrings, which say more: edit those, or
kdflax/balancing/catalogue.py, and run `python -m docs.generate_balancing`.

## Methods

Cost is in backward passes through the shared parameters for each step; every method takes one forward pass. "small" is
a few numbers for each task.

| method | function | what it minimises or solves | cost | state | when |
|---|---|---|---|---|---|
"""

SETTINGS = """
## Papers and settings

`CATALOGUE[method].build(num_tasks, num_steps)` makes the balancer or combiner of an `Entry` with the setting of its
paper, or, where that depends on the data, with the one named here.

| method | paper | setting |
|---|---|---|
"""

AROUND = """
## Around them

| function | what it does |
|---|---|
"""

ROWS = """
A learner goes from the losses of rows (a task, or some Terms) and their `Pullback` to a `RowsUpdate` by `update_rows`,
the one place that asks a balancer what it `needs`, and that says: a row that is not finite is absent.

"""

RULES = """\
## What holds for all

- **Scale.** T identical gradients g give g: sums elsewhere are means here. `cagrad` gives (1 + c) g; `nash_mtl` and
  `fair_grad` solve their equation; `db_mtl` works on gradients of log L. Gradients times a positive constant give the
  same direction; no absolute threshold turns a method into another one late in training (but for the epsilon of
  `pcd`).
- **Exact solves.** The quadratic programmes are solved by an active-set method on the cosines, in at most a few T
  steps. `upgrad` and `dual_projection` check their own result: a projection shorter than `2 sqrt(eps)` (7e-4 in
  float32) of the sum of its weights on unit gradients cannot be told from 0 and is exactly 0, and where the direction
  still conflicts, among gradients that nearly repeat, they solve again with a margin until it does not.
- **Precision of the Gramian.** Two gradients that cancel to a relative length r leave r^2 in the Gramian: below
  `sqrt(eps)` (3e-4 in float32) the direction is not determined by it. Compute it in float32 or wider; `gramian` does.
- **Zero gradients** take no part in a solve, and T counts them. `mgda` is 0 then: that task is stationary.
- **Absent tasks** (`present`) have weight 0 and leave the rest as if they were alone, under `jit`, without another
  compilation. A task whose loss or gradient is not finite counts as absent for every balancer and combiner. A
  weighting sees the Gramian alone, and NaN there gives NaN weights.
- **Positive losses.** `geometric`, `famo`, `smooth_tchebycheff` and `db_mtl` take logarithms. A loss that is not
  positive raises where its value is known, and inside `jit` counts as absent. Distillation losses that reach 0 belong
  elsewhere.
- **Accumulate first.** All but fixed and loss-only weights are non-linear: with gradient accumulation or data
  parallelism average the per-task gradients, then combine.
- **Heads.** Weights act on shared parameters. Whether the head of a task is trained with its weight is a choice of
  the training step.
"""


def entries() -> dict[str, Entry]:
  """The entries by method, checked against the public functions.

  Raises:
    ValueError: if a function has no entry.
  """
  named = {entry.function.__name__ for entry in CATALOGUE.values()} | TOOLS.keys()
  public = {name for name in balancing.__all__ if inspect.isfunction(getattr(balancing, name))}
  if unknown := public - named:
    raise ValueError(
      f"no entry for {', '.join(sorted(unknown))}: add one to CATALOGUE in kdflax/balancing/catalogue.py, or a line to"
      " its TOOLS"
    )
  return CATALOGUE


def row(name: str, entry: Entry) -> str:
  cost = "1" if entry.reads == "losses" else "T"
  return f"| {name} | `{entry.function.__name__}` | {entry.solves} | {cost} | {entry.state} | {entry.when} |"


def settings(name: str, entry: Entry) -> str:
  cited = paper(entry.function) if "Reference:" in (entry.function.__doc__ or "") else "-"
  return f"| {name} | {cited} | {entry.setting or '-'} |"


def page() -> str:
  """The whole page, in the order of the catalogue."""
  methods = {name: entry for name, entry in entries().items() if entry.function.__name__ not in TOOLS}
  lines = lambda rows: "\n".join(rows) + "\n"
  return "".join(
    [
      INTRODUCTION,
      lines(row(*item) for item in methods.items()),
      SETTINGS,
      lines(settings(*item) for item in entries().items()),
      AROUND,
      lines(f"| `{name}` | {what} |" for name, what in TOOLS.items()),
      ROWS,
      RULES,
    ]
  )


if __name__ == "__main__":
  PAGE.write_text(page())
