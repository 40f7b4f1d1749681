# %% [markdown]
# # Distillation: what a teacher says about images without labels
#
# A teacher has seen 1,000 labelled digits. A small student gets 100 of the labels, and for the other 900 images only what
# the teacher says. How much of what it lacks does it get back?

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from kdflax import data, losses, models, training
from kdflax.objectives import Term

splits = data.load("digits")
few = data.with_label_budget(splits["train"], 100, seed=0)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
{name: len(split["label"]) for name, split in splits.items()} | {"labelled": int(few["labelled"].sum())}

# %% [markdown]
# ## Two networks and one function that trains
#
# What is trained and what is frozen is said by the dictionary `frozen`; what is learned, by the terms.


# %%
def train(networks, terms, arrays, steps=600, frozen=None):
  learner = training.make_learner(networks, terms, optax.adam(3e-3))
  batches = data.DeviceBatches(arrays, 64, jax.random.key(1))
  state = learner.init(jax.random.key(0), next(batches), frozen)
  step, curve = training.make_train_step(learner), []
  for _ in range(steps):
    state, metrics = step(state, next(batches), frozen)
    curve.append(training.metrics.means(metrics))
  return {name: (state.params[name], state.model_state[name]) for name in state.params}, curve


teacher, student = models.mlp((128,)), models.mlp((8,))
own = Term(cross_entropy, {"logits": "teacher.logits", "labels": "batch.label"}, stop_gradient=())
frozen, _ = train({"teacher": teacher}, {"hard": own}, splits["train"])

# %% [markdown]
# ## With and without the teacher
#
# `hard` reads the 100 labels: `where` leaves out the others, as if they were not in the batch. `soft` reads all images.

# %%
hard = Term(cross_entropy, {"logits": "student.logits", "labels": "batch.label", "where": "batch.labelled"})
soft = Term(
  losses.kl_soft_targets,
  {"student_logits": "student.logits", "teacher_logits": "teacher.logits", "temperature": 4.0},
)
alone, curve_alone = train({"student": student}, {"hard": hard}, few)
taught, curve_taught = train({"student": student, "teacher": teacher}, {"hard": hard, "soft": soft}, few, frozen=frozen)

figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axis, curve, title in zip(axes, (curve_alone, curve_taught), ("100 labels alone", "with the teacher"), strict=True):
  for name in curve[0]:
    axis.semilogy([row[name] for row in curve], label=name)
  axis.set(title=title, xlabel="step", ylabel="value of the term")
  axis.legend()
plt.show()

# %% [markdown]
# ## On the test set

# %%
test = splits["test"]


def logits(model, variables):
  return np.asarray(model.apply(*variables, test, train=False, key=None)[0]["logits"])


said = {
  "teacher": logits(teacher, frozen["teacher"]),
  "100 labels alone": logits(student, alone["student"]),
  "with the teacher": logits(student, taught["student"]),
}
accuracy = {name: float((z.argmax(-1) == test["label"]).mean()) for name, z in said.items()}
figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
bars = axis.barh(
  list(accuracy), [100 * value for value in accuracy.values()], color=["tab:gray", "tab:orange", "tab:blue"]
)
axis.bar_label(bars, fmt="%.1f %%", padding=3)
axis.set(xlim=(60, 108), xlabel="test accuracy (%)")
plt.show()

# %% [markdown]
# ## What it was told
#
# Images that the student gets right only with the teacher, and what the teacher thought of them. The second choice is what a
# label does not say.

# %%
gained = (said["with the teacher"].argmax(-1) == test["label"]) & (said["100 labels alone"].argmax(-1) != test["label"])
figure, axes = plt.subplots(2, 6, figsize=(9, 3.2), layout="constrained")
softened = np.asarray(jax.nn.softmax(said["teacher"] / 4.0))
for column, index in enumerate(np.flatnonzero(gained)[:6]):
  axes[0, column].imshow(test["image"][index].squeeze(), cmap="gray_r")
  axes[0, column].set_axis_off()
  axes[0, column].set_title(f"a {test['label'][index]}")
  axes[1, column].bar(range(10), softened[index])
  axes[1, column].set(xticks=range(0, 10, 3), yticks=[], ylim=(0, 1))
plt.show()

# %% [markdown]
# One seed shows what happens and not how much it is: `make distill` repeats it over seeds and says what exceeds the noise
# ([results](../distill/results.md)).
