"""Complete: train, keep the best by validation, resume after a kill, test, export, and serve from a fresh process.

python -m examples.complete          exit code 75: it was told to stop, and the same command continues it
"""

import subprocess
import sys

import jax
import numpy as np
import optax

from kdflax import data, export, models, training
from kdflax.objectives import Term


def main(directory="runs/complete", *, steps=1000, stop=None):
  splits, student = data.load("digits"), models.mlp((32,))
  inputs = {"logits": "student.logits", "labels": "batch.label"}
  hard = Term(optax.softmax_cross_entropy_with_integer_labels, inputs)
  learner = training.make_learner({"student": student}, {"hard": hard}, optax.adam(3e-3))
  right = Term(training.metrics.accuracy, inputs | {"where": "batch.where"})
  evaluate = training.make_eval_step({"student": student}, {"accuracy": right})
  parts = {name: tuple(data.padded_batches(splits[name], 256)) for name in ("validation", "test")}
  variables = lambda state: {"student": (state.params["student"], state.model_state["student"])}
  score = lambda state, part: training.evaluate_dataset(evaluate, variables(state), parts[part])
  every, batches = max(steps // 10, 1), data.DeviceBatches(splits["train"], 64, jax.random.key(1))
  with (
    training.RunDirectory(directory, {"steps": steps}) as run,
    training.MetricsLog(run.path / "metrics.jsonl") as log,
    training.Checkpoints(run.path / "checkpoints", best=lambda scores: scores["accuracy"]) as checkpoints,
  ):
    state = training.fit(
      training.make_train_step(learner),
      learner.init(jax.random.key(0), next(batches)),
      batches,
      num_steps=steps,
      saving=training.Saving(checkpoints, save_every=every),
      logging=training.Logging(log, log_every=every),
      evaluation=training.Evaluation(lambda state: score(state, "validation"), evaluate_every=every),
      stop=stop,
    )
    best = checkpoints.restore({"state": state}, step="best")
    assert best is not None  # fit has saved the last state at least
  best_state, folder = best.arrays["state"], run.path / "student"
  found = score(best_state, "test")["accuracy"]
  export.export_model(folder, student, variables(best_state)["student"], {"image": splits["test"]["image"]})
  subprocess.run([sys.executable, "-m", "examples.complete", "serve", folder], check=True)
  print(f"{found:.1%} on the test set by the student of step {best.step} in {folder}")
  return best.step, found


def serve(folder):  # needs neither the training nor the model's code
  logits = export.load_exported(folder)({"image": data.load("digits")["test"]["image"]})["logits"]
  print(np.asarray(logits).argmax(-1).tolist())


if __name__ == "__main__":
  with training.main_guard() as stop:
    serve(sys.argv[2]) if sys.argv[1:2] == ["serve"] else main(*sys.argv[1:2], stop=stop)
