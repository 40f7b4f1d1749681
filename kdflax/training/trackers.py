"""Where the rows of a log go beside its file: TensorBoard, Weights & Biases, trackio, or five lines of your own.

A tracker is a function of a row with a `close`. Rows that a resumed run makes again are sent again: they are the same
numbers at the same steps.
"""

import importlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from kdflax.extras import extra


class Tracker(Protocol):
  """Takes each row of a `MetricsLog`: `phase`, `step`, and numbers by name, a list of them where seeds are counted."""

  def __call__(self, row: Mapping[str, Any], /) -> None: ...

  def close(self) -> None:
    """Sends what is left."""
    ...


class TensorBoard:
  """Scalars for TensorBoard, a run for each phase; needs `pip install "kdflax[tensorboard]"`.

  Args:
    directory: of the run; event files go to `tensorboard` in it.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    with extra("tensorboard", "the TensorBoard tracker"):
      from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    self._open = lambda phase: SummaryWriter(str(pathlib.Path(directory) / "tensorboard" / phase), flush_secs=30)
    self._writers: dict[str, Any] = {}

  def __call__(self, row: Mapping[str, Any], /) -> None:
    phase = str(row.get("phase", "")).replace("/", "-")
    if phase not in self._writers:
      self._writers[phase] = self._open(phase)
    for name, value in numbers(row).items():
      self._writers[phase].add_scalar(name, value, row.get("step", 0))

  def close(self) -> None:
    """Writes what is left."""
    for writer in self._writers.values():
      writer.close()


class WandB:
  """A run of Weights & Biases, kept on disk unless WANDB_MODE says otherwise (`wandb sync` sends it later).

  Needs `pip install "kdflax[wandb]"`. Each phase counts its own steps, so metrics are called `phase/name`.

  Args:
    directory: of the run; wandb writes into it.
  """

  package: str = "wandb"
  keywords: tuple[str, ...] = ("dir",)  # of its `init`, that take the directory

  def __init__(self, directory: str | os.PathLike[str]):
    directory = pathlib.Path(directory).absolute()
    with extra(self.package, f"the {self.package} tracker"):
      module = importlib.import_module(self.package)
    os.environ.setdefault("WANDB_MODE", "offline")
    where = {name: str(directory) for name in self.keywords}
    self._module, self._run = module, module.init(project="kdflax", name=directory.name, **where)

  def __call__(self, row: Mapping[str, Any], /) -> None:
    phase = str(row.get("phase", ""))
    self._module.log({f"{phase}/{name}": value for name, value in {**numbers(row), "step": row.get("step", 0)}.items()})

  def close(self) -> None:
    """Sends what is left."""
    self._module.finish()


class Trackio(WandB):
  """A run of trackio, which is called as wandb is and stays on this machine; needs `pip install "kdflax[trackio]"`.

  Args:
    directory: of the run, after which it is named.
  """

  package: str = "trackio"
  keywords: tuple[str, ...] = ()


TRACKERS: Mapping[str, Callable[[str | os.PathLike[str]], Tracker]] = {
  "tensorboard": TensorBoard,
  "wandb": WandB,
  "trackio": Trackio,
}


def tracker(name: str, directory: str | os.PathLike[str]) -> Tracker:
  """Open a tracker by its name, for command lines.

  Args:
    name: `tensorboard`, `wandb` or `trackio`.
    directory: of the run.

  Raises:
    ImportError: its package is missing.
    ValueError: an unknown name.
  """
  if name not in TRACKERS:
    raise ValueError(f"unknown tracker {name!r}; there are {', '.join(TRACKERS)}")
  return TRACKERS[name](directory)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a row by name; of several seeds their mean.

  Examples:
    >>> numbers({"phase": "student", "step": 3, "loss": 0.5, "accuracy": [0.25, 0.75]})
    {'loss': 0.5, 'accuracy': 0.5}
  """
  found = {name: np.asarray(value) for name, value in row.items() if name not in ("phase", "step")}
  return {name: float(value.mean()) for name, value in found.items() if value.dtype.kind in "fiub" and value.size}
