"""Both at once: a small student learns two tasks together, from labels and from a teacher of each task.

python -m examples.both
"""

import jax
import optax

from kdflax import balancing, data, losses, models, training
from kdflax.objectives import Term

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
TASKS = ("left", "right")


def train(networks, terms, arrays, steps, frozen=None, **options):
  """Trains what is not frozen; returns (params, state) of each model."""
  learner = training.make_learner(networks, terms, optax.adam(3e-3), **options)
  batches = data.DeviceBatches(arrays, 64, jax.random.key(1))
  state = learner.init(jax.random.key(0), next(batches), frozen)
  step = training.make_train_step(learner)
  for _ in range(steps):
    state, _ = step(state, next(batches), frozen)
  return {name: (state.params[name], state.model_state[name]) for name in state.params}


def main(steps=1000):
  splits = data.load("overlaid_digits")
  few = data.with_label_budget(splits["train"], 200, seed=0, task="left")  # teachers saw all labels, the student few
  teacher = models.mlp((256,))
  labels = lambda task: Term(cross_entropy, {"logits": "network.logits", "labels": f"batch.label.{task}"})
  teachers = {f"teacher_{task}": teacher for task in TASKS}
  frozen = {
    f"teacher_{task}": train({"network": teacher}, {"hard": labels(task)}, splits["train"], steps)["network"]
    for task in TASKS
  }

  student = models.hard_sharing(models.mlp((16,), None), {task: models.task_head(10) for task in TASKS})
  terms = {}
  for task in TASKS:
    logits, label = f"student.logits.{task}", f"batch.label.{task}"
    soft = {"student_logits": logits, "teacher_logits": f"teacher_{task}.logits", "temperature": 4.0}
    terms[f"hard/{task}"] = Term(cross_entropy, {"logits": logits, "labels": label, "where": "batch.labelled"})
    terms[f"soft/{task}"] = Term(losses.kl_soft_targets, soft)
  rows = {task: (f"hard/{task}", f"soft/{task}") for task in TASKS}  # what the balancer weighs: the tasks
  balancer = balancing.from_weighting(balancing.upgrad)
  found = train({"student": student, **teachers}, terms, few, steps, frozen, rows=rows, balancer=balancer)

  inputs = {task: {"logits": f"student.logits.{task}", "labels": f"batch.label.{task}"} for task in TASKS}
  accuracy = {task: Term(training.metrics.accuracy, inputs[task]) for task in TASKS}
  result = training.make_eval_step({"student": student}, accuracy)({"student": found["student"]}, splits["test"])
  print({task: f"{share:.1%}" for task, share in training.metrics.means(result).items()})
  return training.metrics.means(result)


if __name__ == "__main__":
  main()
