# %% [markdown]
# # Joint learning: two tasks, one network, and who decides
#
# Two digits lie over each other in one image; one task is to read the left one, the other the right one. They share an encoder,
# so their gradients meet. A balancer makes one update of both.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from kdflax import balancing, data, models, training
from kdflax.objectives import Term

splits, random = data.load("digits"), np.random.default_rng(0)


def overlay(split, count):
  """Pairs of images, the second moved to the right and down."""
  image = np.asarray(split["image"], np.float32).reshape(len(split["label"]), 8, 8)
  a, b = random.integers(len(image), size=(2, count))
  both = np.zeros((count, 11, 11), np.float32)
  both[:, :8, :8] = image[a]
  both[:, 3:, 3:] = np.maximum(both[:, 3:, 3:], image[b])
  return {"image": both[..., None], "left": split["label"][a], "right": split["label"][b], "index": np.arange(count)}


train_set, test_set = overlay(splits["train"], 2000), overlay(splits["test"], 500)
figure, axes = plt.subplots(1, 6, figsize=(9, 1.8), layout="constrained")
for i, axis in enumerate(axes):
  axis.imshow(train_set["image"][i].squeeze(), cmap="gray_r")
  axis.set_title(f"{train_set['left'][i]} and {train_set['right'][i]}")
  axis.set_axis_off()
plt.show()

# %% [markdown]
# ## One encoder, two heads
#
# The right task is made ten times as loud, as tasks of different units are.

# %%
tasks = ("left", "right")
network = models.hard_sharing(models.mlp((64,), None), {task: models.task_head(10) for task in tasks})
terms = {
  task: Term(
    optax.softmax_cross_entropy_with_integer_labels,
    {"logits": f"net.logits.{task}", "labels": f"batch.{task}"},
    weight={"left": 1.0, "right": 10.0}[task],
  )
  for task in tasks
}


def train(balancer, steps=400):
  learner = training.make_learner({"net": network}, terms, optax.adam(2e-3), balancer=balancer, shared="/shared/")
  batches = data.DeviceBatches(train_set, 64, jax.random.key(1))
  state = learner.init(jax.random.key(0), next(batches))
  step, curve = training.make_train_step(learner), []
  for _ in range(steps):
    state, metrics = step(state, next(batches))
    found = training.metrics.means(metrics)
    curve.append([found["left"], found["right"] / 10])
  outputs, _ = network.apply(state.params["net"], state.model_state["net"], test_set, train=False, key=None)
  right = {task: float((outputs["logits"][task].argmax(-1) == test_set[task]).mean()) for task in tasks}
  return np.array(curve), right


balancers = {
  "the sum": balancing.fixed(1.0),
  "geometric": balancing.geometric(),
  "IMTL-G": balancing.from_weighting(balancing.imtl_g),
  "UPGrad": balancing.from_weighting(balancing.upgrad),
}
found = {name: train(balancer) for name, balancer in balancers.items()}

# %% [markdown]
# ## What each balancer trades
#
# Towards the upper right is better. With the sum the loud task decides; `geometric` and `IMTL-G` do not see the loudness, by
# construction; `UPGrad` sees it, and promises only that no task rises.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for name, (curve, accuracy) in found.items():
  left.plot(100 * accuracy["left"], 100 * accuracy["right"], "o", label=name)
  smooth = np.convolve(curve[:, 0], np.ones(20) / 20, "valid")
  right.plot(smooth, label=name)
left.set(xlabel="left digit, test accuracy (%)", ylabel="right digit, test accuracy (%)")
left.legend()
right.set(xlabel="step", ylabel="loss of the quiet task", yscale="log")
right.legend()
plt.show()

# %% [markdown]
# ## Why: two gradients and their combinations
#
# The same on a plane. The mean follows the longer gradient; each balancer says what it does about it.

# %%
gradients = jnp.array([[3.0, 0.3], [-0.8, 0.7]])
weightings = {
  "mean": lambda gramian: jnp.full(2, 0.5),
  "UPGrad": balancing.upgrad,
  "MGDA": balancing.mgda,
  "CAGrad": functools.partial(balancing.cagrad, c=0.5),
  "IMTL-G": balancing.imtl_g,
}
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for gradient, name in zip(gradients, ("gradient of task 1", "gradient of task 2"), strict=True):
  axis.annotate("", gradient, (0, 0), arrowprops={"arrowstyle": "-|>", "lw": 2, "color": "black"})
  axis.text(*(gradient + 0.05), name, ha="right" if gradient[0] > 0 else "left")
for i, (name, weighting) in enumerate(weightings.items()):
  direction = weighting(balancing.gramian(gradients)) @ gradients
  axis.plot([0, direction[0]], [0, direction[1]], color=f"C{i}", label=name)
axis.set(xlim=(-1.2, 3.8), ylim=(-0.1, 1.6))
axis.legend()
plt.show()

# %% [markdown]
# [All balancers](../balancing.md) and what they solve; [measured over seeds](../joint/results.md): most differences between
# balancers are below the noise, so run constant weights first.
