"""Distil: a student learns from a few labels, and from a teacher's logits and embedding about all images.

python -m examples.distil
"""

import jax
import optax

from kdflax import data, losses, models, training
from kdflax.objectives import Term

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def train(networks, terms, arrays, steps, frozen=None):
  """Trains what is not frozen; returns (params, state) of each model."""
  learner = training.make_learner(networks, terms, optax.adam(3e-3))
  batches = data.DeviceBatches(arrays, 64, jax.random.key(1))
  state = learner.init(jax.random.key(0), next(batches), frozen)
  step = training.make_train_step(learner)
  for _ in range(steps):
    state, _ = step(state, next(batches), frozen)
  return {name: (state.params[name], state.model_state[name]) for name in state.params}


def main(steps=1000):
  splits = data.load("digits")
  network = models.mlp((128,))
  hard = Term(cross_entropy, {"logits": "network.logits", "labels": "batch.label"})
  frozen = {"teacher": train({"network": network}, {"hard": hard}, splits["train"], steps)["network"]}

  student = models.mlp((8,))
  labels = {"logits": "student.logits", "labels": "batch.label", "where": "batch.labelled"}
  logits = {"student_logits": "student.logits", "teacher_logits": "teacher.logits", "temperature": 4.0}
  hard = {"hard": Term(cross_entropy, labels)}  # of the labelled images
  knowledge = {
    "soft": Term(losses.kl_soft_targets, logits),  # of all images
    "hint": Term(losses.hint, {"student": "connector.output", "teacher": "teacher.embedding"}),
  }
  connector = models.linear_connector("student.embedding", 128)  # from the student's 8 units to the teacher's
  pair = {"student": student, "teacher": network, "connector": connector}

  few = data.with_label_budget(splits["train"], 100, seed=0)
  students = {
    "labels alone": train({"student": student}, hard, few, steps)["student"],
    "with the teacher": train(pair, hard | knowledge, few, steps, frozen)["student"],
  }
  right = Term(training.metrics.accuracy, {"logits": "student.logits", "labels": "batch.label"})
  test = training.make_eval_step({"student": student}, {"accuracy": right})
  found = {
    name: training.metrics.means(test({"student": variables}, splits["test"]))["accuracy"]
    for name, variables in students.items()
  }
  print({name: f"{accuracy:.1%}" for name, accuracy in found.items()})
  return found


if __name__ == "__main__":
  main()
