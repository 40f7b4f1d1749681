"""The whole road of a user's script: trained, told to stop, continued, tested, exported and served."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from examples import complete
from kdflax import data, training

ROOT = pathlib.Path(__file__).parents[2]


def test_told_to_stop_and_continued_it_ends_as_if_nothing_had_happened(tmp_path, capfd, monkeypatch):
  stop = threading.Event()
  stop.set()  # it makes one step and saves
  with pytest.raises(training.Preempted, match="the same command continues it"):
    complete.main(tmp_path / "broken", steps=60, stop=stop)
  step, accuracy = complete.main(tmp_path / "broken", steps=60)
  served = json.loads(capfd.readouterr().out.splitlines()[0])  # by a process of its own
  assert np.mean(np.array(served) == data.load("digits")["test"]["label"]) == pytest.approx(accuracy)
  assert accuracy > 0.3 and step % 6 == 0
  monkeypatch.setattr(complete.subprocess, "run", lambda *_, **__: None)  # serving once is enough
  complete.main(tmp_path / "whole", steps=60)
  logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("broken", "whole")]
  assert logs[0] == logs[1] and '"accuracy"' in logs[0]
  rows = [json.loads(line) for line in logs[0].splitlines()]
  best = max((row["accuracy"], row["step"]) for row in rows if "accuracy" in row)
  assert step == best[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_as_a_command_it_ends_with_75_when_it_is_told_to_stop(tmp_path, number):
  process = subprocess.Popen(
    [sys.executable, "-m", "examples.complete", tmp_path / "run"],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
  )
  while process.poll() is None and not list((tmp_path / "run" / "checkpoints").glob("*/_CHECKPOINT_METADATA")):
    pass
  process.send_signal(number)
  _, said = process.communicate(timeout=60)
  assert process.returncode == training.ExitCode.PREEMPTED, said
  assert said.splitlines()[-1].startswith("stopped: train stopped at step ") and "Traceback" not in said
