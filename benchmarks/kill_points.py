"""Kills a run with SIGKILL at many points, continues it with the same command, and compares what comes out.

    python -m benchmarks.kill_points --points 20

Half of the points are spread over the time of the run, half are in the middle of a save. A run counts as identical if
the last checkpoint of every phase has the same digest of every array (params, optimizer, keys), the teacher's record
has the same content and metrics.jsonl the same bytes as in a run that nothing interrupted.
"""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTINGS = {
  "dataset": ["digits"],
  "labels": ["16"],
  "methods": ["baseline", "all"],
  "seeds": ["2"],
  "student-hidden": ["4"],
  "teacher-hidden": ["8"],
  "student-steps": ["40"],
  "teacher-steps": ["40"],
  "batch-size": ["16"],
  "save-every": ["4"],
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the check."""

  points: int = 20
  """Kill points to try; each is a run that is killed once and continued to its end."""
  seed: int = 0
  """Of the points."""


def start(run: pathlib.Path, *options: str) -> subprocess.Popen:
  """Starts the experiment on a run directory; one device, and the compile cache that the environment names."""
  arguments = [word for name, values in SETTINGS.items() for word in (f"--{name}", *values)]
  command = [sys.executable, "-m", "experiments.distill", "--run", str(run), *arguments, *options]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  return subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def finish(process: subprocess.Popen, timeout: float = 600) -> str:
  """Waits for the end of a run and returns what it printed.

  Raises:
    RuntimeError: if it failed.
  """
  output, _ = process.communicate(timeout=timeout)
  if process.returncode != 0:
    raise RuntimeError(f"a run ended with code {process.returncode}:\n{output}")
  return output


def unfinished_saves(run: pathlib.Path) -> set[pathlib.Path]:
  """Directories of saves that are under way, or were when the run was killed."""
  return set(run.glob("checkpoints/*/*.orbax-checkpoint-tmp"))


def finished_saves(run: pathlib.Path) -> set[pathlib.Path]:
  """Directories of complete checkpoints."""
  return {path for path in run.glob("checkpoints/*/*") if path.name.isdigit()}


def kill_when(process: subprocess.Popen, ready: Callable[[], Any]) -> bool:
  """Kills the process as soon as `ready()`; returns False if it ended before."""
  while process.poll() is None:
    if ready():
      process.kill()
      process.communicate()
      return True
    time.sleep(2e-4)
  process.communicate()
  return False


def after(run: pathlib.Path, seconds: float) -> Callable[[], bool]:
  """True when so much time has gone since the run made its directory."""
  began: list[float] = []

  def ready() -> bool:
    if not began and (run / "config.json").exists():
      began.append(time.monotonic())
    return bool(began) and time.monotonic() - began[0] >= seconds

  return ready


def during_save(run: pathlib.Path, number: int) -> Callable[[], bool]:
  """True in the middle of a save, the first of which has the number 0."""
  seen: set[pathlib.Path] = set()

  def ready() -> bool:
    seen.update(unfinished_saves(run))
    return len(seen) > number

  return ready


def fingerprint(run: pathlib.Path) -> Mapping[str, Any]:
  """What must not depend on interruptions."""
  last: dict[str, pathlib.Path] = {}
  for checkpoint in finished_saves(run):
    phase = checkpoint.parent.name
    if phase not in last or int(checkpoint.name) > int(last[phase].name):
      last[phase] = checkpoint
  read = lambda path: json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["digests"]
  return {
    "checkpoints": {phase: (path.name, read(path)) for phase, path in sorted(last.items())},
    "teacher": json.loads((run / "teacher" / "manifest.json").read_text())["sha256"],
    "metrics": (run / "metrics.jsonl").read_bytes(),
  }


def main(config: Config) -> None:
  """Prints a line for each kill point and how many were identical."""
  with tempfile.TemporaryDirectory() as scratch:
    directory = pathlib.Path(scratch)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "cache")
    finish(start(directory / "first"))  # fills the compile cache, so that times below are of a run
    whole = directory / "whole"
    process = start(whole)
    while not (whole / "config.json").exists() and process.poll() is None:
      time.sleep(1e-3)
    clock = time.monotonic()
    finish(process)
    seconds, expected = time.monotonic() - clock, fingerprint(whole)
    assert expected == fingerprint(directory / "first"), "two uninterrupted runs differ"
    number_of_saves = len(expected["checkpoints"]) * int(SETTINGS["student-steps"][0]) // int(SETTINGS["save-every"][0])
    draw, identical, killed, in_save = random.Random(config.seed), 0, 0, 0
    for point in range(config.points):
      run = directory / f"point{point}"
      if point % 2:
        number = int((point // 2 + draw.random()) / (config.points // 2) * number_of_saves)
        ready, words = during_save(run, number), f"in save {number} of {number_of_saves}"
      else:
        moment = (point // 2 + draw.random()) / -(-config.points // 2) * seconds
        ready, words = after(run, moment), f"{moment:.2f} s of {seconds:.2f}"
      killed += kill_when(start(run), ready)
      half_done, complete = len(unfinished_saves(run)), len(finished_saves(run))
      in_save += bool(half_done)
      finish(start(run))
      same = fingerprint(run) == expected
      identical += same
      found = f"{complete} whole checkpoints, {half_done} half-written"
      print(f"killed {words}: {found}; {'identical' if same else 'DIFFERENT'}", flush=True)
    print(
      f"{identical} of {config.points} identical; {killed} killed before their end, {in_save} with a half-done save"
    )
    if identical < config.points:
      sys.exit(1)


if __name__ == "__main__":
  import tyro

  main(tyro.cli(Config, description=__doc__))
