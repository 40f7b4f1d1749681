"""The rows of a log reach those who watch."""

import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from kdflax import training

ROWS = [
  {"phase": "620 labels, soft", "step": 10, "loss": 2.0, "accuracy": [0.25, 0.75]},
  {"phase": "620 labels, soft", "step": 20, "loss": 1.0, "note": "no number"},
  {"phase": "teacher", "step": 5, "loss": 3.0},
]


def _events(folder):
  """(tag, step, value) of the scalars in an event file: records of length, CRC, content, CRC."""
  (file,) = folder.glob("events*")
  content, found = file.read_bytes(), []
  while content:
    length = int.from_bytes(content[:8], "little")
    event = Event.FromString(content[12 : 12 + length])
    found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    content = content[16 + length :]
  return found


def test_tensorboard_has_a_run_for_each_phase(tmp_path):
  with training.MetricsLog(tmp_path / "metrics.jsonl", [training.tracker("tensorboard", tmp_path)]) as log:
    for row in ROWS:
      log.append(row)
    assert log.rows("teacher") == 1
  runs = tmp_path / "tensorboard"
  assert _events(runs / "620 labels, soft") == [("loss", 10, 2.0), ("accuracy", 10, 0.5), ("loss", 20, 1.0)]
  assert _events(runs / "teacher") == [("loss", 5, 3.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_phase_counts_its_own_steps(tmp_path, monkeypatch, name):
  """With a stand-in that has the three functions; tests/peers has wandb itself."""
  said = []
  module = types.ModuleType(name)
  module.init = lambda **given: said.append(given)
  module.log = said.append
  module.finish = lambda: said.append("closed")
  monkeypatch.setitem(sys.modules, name, module)
  monkeypatch.setenv("WANDB_MODE", "offline")
  with training.MetricsLog(tmp_path / "metrics.jsonl", [training.tracker(name, tmp_path / "run")]) as log:
    log.append(ROWS[2])
  where = {"dir": str(tmp_path / "run")} if name == "wandb" else {}
  assert said == [{"project": "kdflax", "name": "run", **where}, {"teacher/loss": 3.0, "teacher/step": 5}, "closed"]


def test_five_lines_make_a_tracker(tmp_path):
  class Kept(list):
    __call__ = list.append

    def close(self):
      self.append("closed")

  kept = Kept()
  with training.MetricsLog(tmp_path / "metrics.jsonl", [kept]) as log:
    log.append(ROWS[0])
  assert kept == [ROWS[0], "closed"]


def test_an_unknown_tracker_is_refused(tmp_path):
  with pytest.raises(ValueError, match="unknown tracker 'paper'; there are tensorboard, wandb, trackio"):
    training.tracker("paper", tmp_path)
