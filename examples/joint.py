"""Joint learning: two tasks share an encoder, and a balancer turns their losses into one update.

python -m examples.joint
"""

import jax
import optax

from kdflax import balancing, data, models, training
from kdflax.objectives import Term

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def main(steps=1000):
  splits = data.load("overlaid_digits")  # two digits in each image; `label` is {"left": ..., "right": ...}
  tasks = ("left", "right")
  network = models.hard_sharing(models.mlp((64, 32), None), {task: models.task_head(10) for task in tasks})
  inputs = {task: {"logits": f"network.logits.{task}", "labels": f"batch.label.{task}"} for task in tasks}
  learner = training.make_learner(
    {"network": network},
    {task: Term(cross_entropy, inputs[task]) for task in tasks},
    optax.adam(3e-3),
    balancer=balancing.from_weighting(balancing.upgrad),  # no task is made worse by the step of the others
    shared="^network/shared/",  # a task's own head learns from its own loss alone
  )
  batches = data.DeviceBatches(splits["train"], 64, jax.random.key(1))
  state = learner.init(jax.random.key(0), next(batches))
  step = training.make_train_step(learner)
  for _ in range(steps):
    state, _ = step(state, next(batches))

  test = training.make_eval_step(
    {"network": network}, {task: Term(training.metrics.accuracy, inputs[task]) for task in tasks}
  )
  variables = {"network": (state.params["network"], state.model_state["network"])}
  found = training.metrics.means(test(variables, splits["test"]))
  print({task: f"{accuracy:.1%}" for task, accuracy in found.items()})
  return found


if __name__ == "__main__":
  main()
