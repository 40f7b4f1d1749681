"""Weights & Biases takes the rows of a log, offline."""

from kdflax import training


def test_an_offline_run_is_on_disk(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  with training.MetricsLog(tmp_path / "metrics.jsonl", [training.tracker("wandb", tmp_path)]) as log:
    for step in (1, 2):
      log.append({"phase": "student", "step": step, "loss": [1.0 / step, 3.0 / step]})
  (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
  content = file.read_bytes()
  assert b"student/loss" in content and b"student/step" in content
