# %% [markdown]
# # Both: two teachers, one student of two tasks
#
# Each task has a teacher that learned from all labels. The student has both tasks and few labels. Its objective has four
# terms; a balancer keeps peace between the tasks.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from kdflax import balancing, data, losses, models, training
from kdflax.objectives import Term

splits = data.load("digits")
tasks = {"digit": 10, "odd": 2}


def with_tasks(split):
  return {"image": split["image"], "digit": split["label"], "odd": split["label"] % 2, "index": split["index"]}


train_set, test_set = with_tasks(splits["train"]), with_tasks(splits["test"])
train_set["labelled"] = np.random.default_rng(0).permutation(len(train_set["digit"])) < 60
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
{"images": len(train_set["digit"]), "labelled": int(train_set["labelled"].sum())}


# %%
def train(networks, terms, frozen=None, steps=400, **options):
  learner = training.make_learner(networks, terms, optax.adam(3e-3), **options)
  batches = data.DeviceBatches(train_set, 64, jax.random.key(1))
  state = learner.init(jax.random.key(0), next(batches), frozen)
  step = training.make_train_step(learner)
  for _ in range(steps):
    state, _ = step(state, next(batches), frozen)
  return {name: (state.params[name], state.model_state[name]) for name in state.params}


def accuracy(outputs, task):
  return float((np.asarray(outputs).argmax(-1) == test_set[task]).mean())


# %% [markdown]
# ## A teacher of each task

# %%
teachers = {task: models.mlp((96,), classes) for task, classes in tasks.items()}
frozen = {}
for task, model in teachers.items():
  name = f"{task}_teacher"
  hard = Term(cross_entropy, {"logits": f"{name}.logits", "labels": f"batch.{task}"})
  frozen |= train({name: model}, {"hard": hard})
said = {task: teachers[task].apply(*frozen[f"{task}_teacher"], test_set, train=False, key=None)[0] for task in tasks}
{task: f"{accuracy(said[task]['logits'], task):.1%}" for task in tasks}

# %% [markdown]
# ## Four students
#
# Labels alone; with what the teachers say; with a balancer between the tasks; and with relations of the embeddings, which
# need no connector although the widths differ.

# %%
student = models.hard_sharing(models.mlp((12,), None), {task: models.task_head(n) for task, n in tasks.items()})
everyone = {"student": student} | {f"{task}_teacher": model for task, model in teachers.items()}


def terms_of(*kinds):
  terms = {}
  for task in tasks:
    ours, theirs = f"student.logits.{task}", f"{task}_teacher"
    made = {
      "hard": Term(cross_entropy, {"logits": ours, "labels": f"batch.{task}", "where": "batch.labelled"}),
      "soft": Term(
        losses.kl_soft_targets, {"student_logits": ours, "teacher_logits": f"{theirs}.logits", "temperature": 2.0}
      ),
      "relations": Term(
        losses.rkd_distance, {"student": "student.embedding", "teacher": f"{theirs}.embedding"}, weight=5.0
      ),
    }
    terms |= {f"{task} {kind}": made[kind] for kind in kinds}
  return terms


def balanced(*kinds):
  rows = {task: [f"{task} {kind}" for kind in kinds] for task in tasks}
  return {"balancer": balancing.from_weighting(balancing.upgrad), "rows": rows, "shared": "student/shared/"}


students = {
  "60 labels alone": train({"student": student}, terms_of("hard")),
  "and the teachers": train(everyone, terms_of("hard", "soft"), frozen),
  "balanced by UPGrad": train(everyone, terms_of("hard", "soft"), frozen, **balanced("hard", "soft")),
  "and relations": train(
    everyone, terms_of("hard", "soft", "relations"), frozen, **balanced("hard", "soft", "relations")
  ),
}

# %%
found = {}
for name, variables in students.items():
  outputs, _ = student.apply(*variables["student"], test_set, train=False, key=None)
  found[name] = {task: accuracy(outputs["logits"][task], task) for task in tasks}
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for offset, task in ((-0.2, "digit"), (0.2, "odd")):
  bars = axis.bar(np.arange(len(found)) + offset, [100 * row[task] for row in found.values()], 0.38, label=task)
  axis.bar_label(bars, fmt="%.1f")
  axis.axhline(100 * accuracy(said[task]["logits"], task), ls=":", color=bars[0].get_facecolor())
axis.set(xticks=range(len(found)), xticklabels=list(found), ylim=(60, 104), ylabel="test accuracy (%)")
axis.legend(title="task\n(dotted: its teacher)", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## Do the tasks agree?
#
# The cosines between the gradients of the four terms at the student's start, with respect to what the tasks share.

# %%
batch = {name: array[:256] for name, array in train_set.items()}
params, state = student.init(jax.random.key(0), batch)
teachers_say = {
  task: teachers[task].apply(*frozen[f"{task}_teacher"], batch, train=False, key=None)[0] for task in tasks
}


def objective(shared):
  outputs, _ = student.apply(params | {"shared": shared}, state, batch, train=False, key=None)
  values = []
  for task in tasks:
    values.append(losses.masked_mean(cross_entropy(outputs["logits"][task], batch[task]), batch["labelled"]))
    values.append(losses.kl_soft_targets(outputs["logits"][task], teachers_say[task]["logits"], temperature=2.0).mean())
  return jax.numpy.stack(values)


_, gradients = balancing.task_gradients(objective, params["shared"])
gramian = np.asarray(balancing.gramian(gradients))
cosines = gramian / np.sqrt(np.outer(np.diag(gramian), np.diag(gramian)))
names = [f"{task} {kind}" for task in tasks for kind in ("hard", "soft")]
figure, axis = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
drawn = axis.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
for i, row in enumerate(cosines):
  for j, value in enumerate(row):
    axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
axis.set(xticks=range(4), yticks=range(4), yticklabels=names)
axis.set_xticklabels(names, rotation=30)
figure.colorbar(drawn, label="cosine")
plt.show()

# %% [markdown]
# One seed; the study is [experiments.fuse](../fuse/results.md). The configuration in a few lines is in the
# [recipes](../recipes.md).
