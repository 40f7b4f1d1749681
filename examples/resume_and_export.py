"""Resume and export: the same command continues a run to the same bits; its student leaves kdflax as StableHLO.

python -m examples.resume_and_export          stop it at any moment and start it again
"""

import pathlib

import jax
import numpy as np
import optax

from kdflax import data, export, models, training
from kdflax.objectives import Term


def main(directory="runs/example", steps=1000):
  splits = data.load("digits")
  student = models.mlp((32,))
  hard = Term(optax.softmax_cross_entropy_with_integer_labels, {"logits": "student.logits", "labels": "batch.label"})
  learner = training.make_learner({"student": student}, {"hard": hard}, optax.adam(3e-3))
  batches = data.DeviceBatches(splits["train"], 64, jax.random.key(1))
  config = {"steps": steps, "learning_rate": 3e-3}  # a run does not continue with other settings
  with (
    training.RunDirectory(directory, config) as run,  # locked: no second writer
    training.MetricsLog(run.path / "metrics.jsonl") as log,
    training.Checkpoints(run.path / "checkpoints") as checkpoints,
    training.stop_on_sigterm() as stop,
  ):
    state = training.fit(
      training.make_train_step(learner),
      learner.init(jax.random.key(0), next(batches)),
      batches,
      num_steps=steps,
      checkpoints=checkpoints,
      save_every=max(steps // 4, 1),
      log=log,
      log_every=max(steps // 10, 1),
      stop=stop,
    )

  variables = (state.params["student"], state.model_state["student"])
  folder = pathlib.Path(directory) / "student"
  export.export_model(folder, student, variables, {"image": splits["test"]["image"]})
  predict = export.load_exported(folder)  # needs neither the model's code nor its teachers; any batch size
  logits = np.asarray(predict({"image": splits["test"]["image"]})["logits"])
  found = float((logits.argmax(-1) == splits["test"]["label"]).mean())
  print(f"{found:.1%} by the exported student in {folder}")
  return found


if __name__ == "__main__":
  main()
