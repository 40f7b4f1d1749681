"""What every experiment does around its question: the command line, progress, intervals, tables, pictures."""

import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments.quick import compile_quickly
from kdflax import training
from kdflax.extras import extra
from kdflax.training import DiskFull, ExitCode, main_guard, write_atomically

with extra("experiments", "an experiment"):
  import tyro
  from scipy import stats
  from tqdm import tqdm

BAD_INPUT = ExitCode.BAD_INPUT
_ROOM = 100 * 2**20  # bytes that a run wants free on the disk


def run_command_line(main: Callable[[Any], None], config_type: type) -> None:
  """Parses the arguments into a config and runs; mistakes end in one clear line and an exit code of their own."""
  config = tyro.cli(config_type, description=sys.modules[main.__module__].__doc__)
  with main_guard():
    if config.smoke:
      compile_quickly()
    main(config)
    print(f"results are in {pathlib.Path(config.checked().run).absolute()}", file=sys.stderr)


def check_numbers(config: Any, *, at_least_one: Sequence[str], positive: Sequence[str] = ()) -> None:
  """Raises a ValueError that names the first setting of a config that is too small."""
  for name in at_least_one:
    if getattr(config, name) < 1:
      raise ValueError(f"{name} must be at least 1; got {getattr(config, name)}")
  for name in positive:
    if not getattr(config, name) > 0:
      raise ValueError(f"{name} must be positive; got {getattr(config, name)}")


def filled(config: Any, recipe: Any) -> Any:
  """Returns a config whose settings that are None have the values of the recipe, a NamedTuple."""
  unset = [name for name in recipe._fields if getattr(config, name, 0) is None]
  return dataclasses.replace(config, **{name: getattr(recipe, name) for name in unset})


def check_room(path: str | pathlib.Path) -> None:
  """Raises `DiskFull` while there is still nothing to lose if the disk is nearly full."""
  existing = next(p for p in [pathlib.Path(path).absolute(), *pathlib.Path(path).absolute().parents] if p.exists())
  free = shutil.disk_usage(existing).free
  if free < _ROOM:
    raise DiskFull(f"only {free / 2**20:.0f} MiB are free at {existing}, a run wants {_ROOM / 2**20:.0f}; make room")


@dataclasses.dataclass(frozen=True)
class Devices:
  """What an experiment runs on and who watches: where numbers lie, and nothing of the results."""

  mesh: str | None = None
  """Devices by axis, as data=8 or data=4,model=2: examples are spread over data, outputs of kernels over model."""
  fsdp: str | None = None
  """Axis of the mesh over which every large array of the training state is cut; whole everywhere if not given."""

  log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
  """Where the numbers of metrics.jsonl go as well: tensorboard, wandb (kept on disk), trackio."""

  def layout(self, leading: int) -> training.Layout | None:
    """The layout that is asked for, or None for the plain one: a copy of everything on every device.

    Args:
      leading: axes of each array that count trainings.
    """
    if self.mesh is None and self.fsdp is None:
      return None
    axes = dict(_axis(entry) for entry in self.mesh.split(",")) if self.mesh else None
    mesh = training.make_mesh(axes)
    rules = [training.tensor_parallel("model")] if "model" in mesh.shape else []
    rules += [training.fsdp(self.fsdp)] if self.fsdp else []
    return training.Layout(mesh, rules, leading=leading)


def _axis(entry: str) -> tuple[str, int]:
  name, _, size = entry.strip().partition("=")
  if not name or not size.lstrip("-").isdigit():
    raise ValueError(f"mesh is written as data=4,model=2; got {entry!r}")
  return name, int(size)


class Progress:
  """Progress of one phase: a bar with its ETA on a terminal, a line every ten seconds elsewhere."""

  def __init__(self, label: str, total: int):
    self._label, self._total, self._start, self._said = label, total, time.monotonic(), time.monotonic()
    self._bar = tqdm(total=total, desc=label, file=sys.stderr) if sys.stderr.isatty() else None

  def __call__(self, done: int, row: Mapping[str, Any]) -> None:
    if self._bar is not None:
      self._bar.update(done - self._bar.n)
      if done == self._total:
        self._bar.close()
    elif done == self._total:
      print(f"{self._label}: {done} steps, {time.monotonic() - self._start:.1f} s", file=sys.stderr, flush=True)
    elif time.monotonic() - self._said > 10:
      self._said = time.monotonic()
      print(f"{self._label}: step {done} of {self._total}", file=sys.stderr, flush=True)


def peek(batches: Any) -> Any:
  """The next batch, without moving the position."""
  position = batches.get_state() if hasattr(batches, "get_state") else None
  batch = next(batches)
  if position is not None:
    batches.set_state(position)
  return batch


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """Mean and half width of its Student t interval; the width is NaN for one value."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return float(values.mean()), float("nan")
  width = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(width)


def plus_minus(values: Sequence[float] | np.ndarray, scale: float = 100, digits: int = 1, sign: str = "") -> str:
  """`mean +- half width`, in percent by default."""
  mean, width = interval(values)
  return f"{scale * mean:{sign}.{digits}f} ± {scale * width:.{digits}f}"


def beyond_noise(differences: Sequence[float] | np.ndarray) -> str:
  """ "yes" where the 95% interval of paired differences excludes 0, else "no"; of one pair nothing can be said."""
  mean, width = interval(differences)
  return "?" if np.isnan(width) else "yes" if abs(mean) > width else "no"


def scores(said: np.ndarray, labels: np.ndarray, classes: int | None) -> np.ndarray:
  """The score of a task for each seed: accuracy of logits `[..., examples, classes]`, or R^2 of `[..., examples]`."""
  return training.metrics.r_squared(said, labels) if classes is None else (said.argmax(-1) == labels).mean(-1)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows of equal keys as a Markdown table."""
  header = list(rows[0])
  lines = [header, ["---"] * len(header), *([str(row[key]) for key in header] for row in rows)]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_table(
  directory: pathlib.Path,
  name: str,
  title: str,
  rows: Sequence[Mapping[str, Any]],
  data: Any,
  notes: Sequence[str] = (),
) -> str:
  """Writes `<name>.md` for people and `<name>.json` with every number; returns the Markdown below the title."""
  table = markdown_table(rows) + "".join(f"{line}\n" for line in ("", *notes) if notes)
  write_atomically(directory / f"{name}.md", f"# {title}\n\n{table}")
  write_atomically(directory / f"{name}.json", json.dumps(data, indent=1) + "\n")
  return table


def save_figure(figure: Any, path: pathlib.Path) -> None:
  """Writes a matplotlib figure as PNG, whole or not at all."""
  import io

  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
  write_atomically(path, buffer.getvalue())
