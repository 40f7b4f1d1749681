"""Every recipe of docs/recipes.md makes the update that a reader would derive by hand.

A block is run as it stands, with a `run` that keeps the state before and after; then its update, by gradient descent at
rate 1, is compared with the gradient of the sum written out here.
"""

import functools
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import balancing, losses, models, training

TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
BLOCKS = dict(re.findall(r"^##+ ([^\n]*)\n(?:(?!^#)[^\n]*\n)*?^```python\n(.*?)^```$", TEXT, re.M | re.S))
PREAMBLE = re.search(r"^```python\n(.*?)^```$", TEXT, re.M | re.S).group(1)
STEP = 3  # of the update, so that schedules are under way
STEPS = {"A random or a scheduled choice": (0, 2, 3, 5, 8), "Freezing and unfreezing by path": (3, 99, 100, 101)}


class Call(NamedTuple):
  """One `run` of a recipe."""

  network: Any
  frozen: Any
  before: training.TrainState
  after: training.TrainState


def _execute(title, step=STEP):
  """Names that a recipe defines, and its runs.

  The update is that of a later step: all counters stand there, and averages are no longer what they follow.
  """
  names: dict[str, Any] = {}
  exec(compile(PREAMBLE, "docs/recipes.md", "exec"), names)
  calls = []

  def run(network, terms, frozen=None, optimizer=None, **options):
    learner = training.make_learner(network, terms, optimizer or optax.sgd(1.0), **options)
    batch, frozen = _wide(names["batch"]), _wide(frozen or {})
    start = _wide(jax.jit(learner.init)(jax.random.key(0), batch, frozen))
    counted = jax.tree.map(lambda x: x + step if jnp.issubdtype(x.dtype, jnp.integer) else x, start.opt_state)
    moved = jax.tree.map(lambda x: 0.8 * x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), start.averages)
    before = start._replace(step=jnp.int32(step), opt_state=counted, averages=moved)
    calls.append(Call(network, frozen, before, jax.jit(learner.step)(before, batch, frozen)[0]))
    return calls[-1].after

  names["run"] = run
  exec(compile(BLOCKS[title], f"docs/recipes.md: {title}", "exec"), names)
  return names, calls


def _outputs(call, params, names, batch):
  """Outputs of networks, frozen or not."""
  return [
    call.network[n].apply(*(call.frozen[n] if n in call.frozen else (params[n], {})), batch, train=False, key=None)[0]
    for n in names
  ]


def _project(params, x):
  return x @ params["linear"]["kernel"] + params["linear"].get("bias", 0)


def _ce(logits, labels):
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def _kl(student, teacher, temperature=2.0):
  """To the teacher's logits, which get no gradient."""
  log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (jax.lax.stop_gradient(teacher), student))
  return temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _mean_square(a, b):
  return jnp.square(a - b).mean(-1)


def _unit(x):
  square = jnp.square(x).sum(-1, keepdims=True)
  return x / jnp.sqrt(jnp.where(square > 0, square, 1))


def _wide(tree):
  """In float64, where two ways to the same number agree to nine digits."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x), tree
  )


def into_single_task_students(call, params, batch):
  teacher, left, right = _outputs(call, params, ("teacher", "left", "right"), batch)
  total = 0
  for task, student in {"left": left, "right": right}.items():
    total += _ce(student["logits"], batch[task]).mean() + _kl(student["logits"], teacher["logits"][task]).mean()
    projected = _project(params[f"{task}_hint"], student["embedding"])
    total += 0.5 * _mean_square(projected, teacher["embedding"]).mean()
    total += losses.rkd_distance(student["embedding"], teacher["embedding"]).mean()
  return total


def into_one_multi_task_student(call, params, batch):
  teacher, student = _outputs(call, params, ("teacher", "student"), batch)
  hint = _mean_square(_project(params["hint"], student["embedding"]), teacher["embedding"])
  total = 0.5 * hint.mean() + losses.rkd_distance(student["embedding"], teacher["embedding"]).mean()
  for task in ("left", "right"):
    total += (_ce(student["logits"][task], batch[task]) + _kl(student["logits"][task], teacher["logits"][task])).mean()
  return total


def soft_sharing(call, params, batch):
  (student,) = _outputs(call, params, ("student",), batch)
  return sum(_ce(student["logits"][task], batch[task]).mean() for task in ("left", "right"))


def average_of_logits(call, params, batch):
  a, b, student = _outputs(call, params, ("a", "b", "student"), batch)
  return (_ce(student["logits"], batch["label"]) + _kl(student["logits"], (a["logits"] + b["logits"]) / 2)).mean()


def average_of_probabilities(call, params, batch):
  a, b, student = (o["logits"] for o in _outputs(call, params, ("a", "b", "student"), batch))
  mixture = (jax.nn.softmax(a / 2) + 3 * jax.nn.softmax(b / 2)) / 4
  return (4 * (mixture * (jnp.log(mixture) - jax.nn.log_softmax(student / 2))).sum(-1)).mean()


def confidence_weights(call, params, batch):
  a, b, student = _outputs(call, params, ("a", "b", "student"), batch)
  wrong = [jnp.exp(_ce(t["logits"], batch["label"])) for t in (a, b)]
  weights = [1 - w / sum(wrong) for w in wrong]
  soft = sum(w * _kl(student["logits"], t["logits"]) for w, t in zip(weights, (a, b), strict=True))
  return (soft + weights[1] * _mean_square(_project(params["hint_b"], student["embedding"]), b["embedding"])).mean()


def random_or_scheduled(call, params, batch):
  """The teacher b is drawn from step 3 on; the weight of a falls to 0 there, that of b rises all the time."""
  a, b, student = (o["logits"] for o in _outputs(call, params, ("a", "b", "student"), batch))
  step = int(call.before.step)
  early = _kl(student, a) * (2 if step < 3 else 0)
  return (early + _kl(student, b) * ((step >= 3) + min(step / 8, 1))).mean()


def class_subsets(call, params, batch):
  a, b, student = (o["logits"] for o in _outputs(call, params, ("a", "b", "student"), batch))
  mixture = jnp.zeros((8, 4)).at[:, [0, 2]].set(jax.nn.softmax(a / 2) / 2).at[:, [1, 3]].set(jax.nn.softmax(b / 2) / 2)
  of_all = 4 * (mixture * (jnp.log(mixture) - jax.nn.log_softmax(student / 2))).sum(-1).mean()
  own = (jax.nn.softmax(b) * (jax.nn.log_softmax(b) - jax.nn.log_softmax(student)[:, [1, 3]])).sum(-1)
  return of_all + own.sum(where=batch["label"] % 2 == 1) / (batch["label"] % 2 == 1).sum()


def gradients_of_teachers(call, params, batch):
  a, b, student = (o["logits"] for o in _outputs(call, params, ("a", "b", "student"), batch))
  return jnp.stack([_kl(student, a).mean(), _kl(student, b).mean()])


def single_task_teachers(call, params, batch):
  left, right, student = _outputs(call, params, ("left", "right", "student"), batch)
  rows = []
  for task, teacher in {"left": left, "right": right}.items():
    apart = _unit(_project(params[f"to_{task}"], student["embedding"])) - _unit(teacher["embedding"])
    feature = jnp.square(apart).sum(-1)
    logits = student["logits"][task]
    rows.append((_ce(logits, batch[task]) + _kl(logits, teacher["logits"]) + feature).mean())
  return jnp.stack(rows)


def merged_by_distillation(call, params, batch):
  """Layer by layer, in the order of the leaves: each head is a layer, and so is the one that they share."""
  base, *tuned = (call.frozen[name][0] for name in ("base", "left", "right"))
  layers = [("shared", "hidden", "0"), ("task", "left", "head", "linear"), ("task", "right", "head", "linear")]
  at = lambda tree, path: functools.reduce(lambda node, name: node[name], path, tree)
  said = jax.tree.map(lambda leaf: leaf, base)
  for i, path in enumerate(layers):
    for name, leaf in at(base, path).items():
      more = [params["merged"]["coefficients"][t, i] * (at(tuned[t], path)[name] - leaf) for t in range(2)]
      at(said, path)[name] = leaf + sum(more)
  student, _ = call.network["left"].apply(said, {}, batch, train=False, key=None)
  teachers = _outputs(call, params, ("left", "right"), batch)
  logits = lambda outputs, task: outputs["logits"][task]
  pairs = [(logits(student, t), logits(o, t)) for t, o in zip(("left", "right"), teachers, strict=True)]
  return sum(_kl(*pair, 1.0).mean() for pair in pairs)


def mutual(call, params, batch):
  students = [o["logits"] for o in _outputs(call, params, list(call.network), batch)]
  total = sum(_ce(z, batch["label"]) for z in students)
  for i, student in enumerate(students):
    others = [z for j, z in enumerate(students) if j != i]
    total += sum(_kl(student, z, 1.0) for z in others) / len(others)
  return total.mean()


def online_ensemble(call, params, batch):
  one, two = (o["logits"] for o in _outputs(call, params, ("one", "two"), batch))
  return sum(_ce(z, batch["label"]) + _kl(z, (one + two) / 2) for z in (one, two)).mean()


def one_teacher(call, params, batch, *, temperature=2.0):
  teacher, student = (o["logits"] for o in _outputs(call, params, ("teacher", "student"), batch))
  return (_ce(student, batch["label"]) + _kl(student, teacher, temperature)).mean()


def mean_teacher(call, params, batch):
  return one_teacher(call._replace(frozen={"teacher": (call.before.averages["teacher"], {})}), params, batch)


def momentum_encoder(call, params, batch):
  slow, slow_point = call.before.averages["slow"], call.before.averages["slow_point"]
  teacher, _ = call.network["slow"].apply(slow, {}, batch, train=False, key=None)
  (student,) = _outputs(call, params, ("student",), batch)
  points = _unit(_project(params["point"], student["embedding"])) @ _unit(_project(slow_point, teacher["embedding"])).T
  return (_ce(student["logits"], batch["label"]) + _ce(points / 0.07, jnp.arange(8))).mean()


def between_exits(call, params, batch):
  (student,) = (o["logits"] for o in _outputs(call, params, ("student",), batch))
  return (sum(_ce(z, batch["label"]) for z in student.values()) + _kl(student["early"], student["final"])).mean()


def across_augmentations(call, params, batch):
  network = models.mlp((5,), 4)
  weak, strong = (
    network.apply(params["student"], {}, {"image": batch[view]}, train=False, key=None)[0]["logits"]
    for view in ("image", "other")
  )
  return (_ce(weak, batch["label"]) + _kl(strong, weak)).mean()


def unlabelled(call, params, batch):
  teacher, student = (o["logits"] for o in _outputs(call, params, ("teacher", "student"), batch))
  return _ce(student, batch["label"])[:4].mean() + _kl(student, teacher).mean()


def mixed_batches(call, params, batch):
  assert batch["image"].shape == (11, 6) and (np.asarray(batch["label"])[3:] == -1).all()
  teacher, student = (o["logits"] for o in _outputs(call, params, ("teacher", "student"), batch))
  return _ce(student[:3], batch["label"][:3]).mean() + _kl(student, teacher).mean()


def batches_of_their_own(call, params, batch):
  assert batch["image"].shape == (13, 6)
  (student,) = (o["logits"] for o in _outputs(call, params, ("student",), batch))
  return jnp.stack([
    _ce(student["left"][:8], batch["label"][:8]).mean(), _ce(student["right"][8:], batch["label"][8:]).mean()
  ])  # fmt: skip


def four_kinds(call, params, batch):
  """The mean over what is known, of each task by itself."""
  shared, heads = params["student"]["shared"], params["student"]["task"]
  grid = jnp.tanh(batch["image"] @ shared["kernel"])
  reads = {"kind": grid.mean((1, 2)), "size": grid.mean((1, 2)), "part": grid, "tag": grid.mean(2)}
  rows = []
  for task in ("kind", "size", "part", "tag"):
    label = np.asarray(batch["label"][task])
    known = np.nonzero(np.isfinite(label) if task == "size" else label >= 0)
    assert 0 < len(known[0]) < label.size
    said = _project(heads[task]["head"], reads[task])[known]
    rows.append((jnp.square(said[:, 0] - label[known]) if task == "size" else _ce(said, label[known])).mean())
  return jnp.stack(rows)


def soft_tasks(call, params, batch):
  teacher, student = (o["logits"] for o in _outputs(call, params, ("teacher", "student"), batch))
  return sum(_kl(student[task], teacher[task]).mean() for task in ("left", "right"))


def schedules(call, params, batch):
  teacher, student = (o["logits"] for o in _outputs(call, params, ("teacher", "student"), batch))
  return (_ce(student, batch["label"]) + STEP / 16 * _kl(student, teacher, 8 - STEP / 2)).mean()


def soft_only(call, params, batch):
  teacher, student = (o["logits"] for o in _outputs(call, params, ("teacher", "student"), batch))
  return _kl(student, teacher).mean()


def curriculum(call, params, batch):
  teacher, student = (o["logits"] for o in _outputs(call, params, ("teacher", "student"), batch))
  theta = params["ctkd_temperature"]["theta"]
  fixed = jax.lax.stop_gradient(theta)
  temperature = 1 + 20 * jax.nn.sigmoid(fixed - STEP / 8 * (theta - fixed))
  return _kl(student, teacher, temperature).mean()


def hard_only(call, params, batch):
  (student,) = _outputs(call, params, ("student",), batch)
  return _ce(student["logits"], batch["label"]).mean()


def in_parts(call, params, batch):
  """The sum over the whole batch: half of it has labels."""
  teacher, student = (o["logits"] for o in _outputs(call, params, ("teacher", "student"), batch))
  return _ce(student, batch["label"])[:4].mean() + _kl(student, teacher).mean()


def near_the_start(call, params, batch):
  (student,) = _outputs(call, params, ("student",), batch)
  moved = jax.tree.map(lambda a, b: jnp.square(a - b).sum(), params["student"], call.frozen["start"][0])
  all_params = sum(jax.tree.leaves(moved))
  return _ce(student["logits"], batch["label"]).mean() + 0.3 * moved["head"]["kernel"] + 0.1 * all_params


def contrastive(call, params, batch):
  teacher, student = _outputs(call, params, ("teacher", "student"), batch)
  key = training.named_key(jax.random.fold_in(call.before.key, STEP), "crd")
  indices = (batch["index"][:, None] + jnp.pad(jax.random.randint(key, (8, 4), 1, 20), ((0, 0), (1, 0)))) % 20
  embeddings = [
    _unit(_project(params[f"crd_{name}"], outputs["embedding"]))
    for name, outputs in {"student": student, "teacher": teacher}.items()
  ]
  values, _ = losses.crd(*embeddings, indices, losses.CRDMemory(**call.before.model_state["crd"]))
  return _ce(student["logits"], batch["label"]).mean() + 0.8 * values.mean()


def factor_transfer(call, params, batch):
  """First the map rebuilt, then the factors: those of the paraphraser as it then stands, in evaluation mode."""
  (teacher,) = (o["features"]["stage2"] for o in _outputs(call, params, ("teacher",), batch))
  says = lambda name, x: call.network[name].apply(params[name], call.before.model_state[name], x, train=True, key=None)[
    0
  ]
  paraphraser = "factor_transfer_paraphraser"
  if paraphraser in params:
    return jnp.square(says(paraphraser, teacher)["reconstruction"] - teacher).mean()
  student = says("student", batch)
  factors = call.network[paraphraser].apply(*call.frozen[paraphraser], teacher, train=False, key=None)[0]["output"]
  translated = says("factor_transfer_translator", student["features"]["stage2"])["output"]
  maps = [_unit(jnp.square(f).mean(-1).reshape(8, -1)) for f in (translated, factors)]
  return _ce(student["logits"], batch["label"]).mean() + 200 * jnp.abs(maps[0] - maps[1]).mean()


def reused_classifier(call, params, batch):
  (teacher,) = _outputs(call, params, ("teacher",), batch)
  own, states = params["student"], call.before.model_state["student"]
  encoder, head = models.convnet((2, 3), None), call.frozen["teacher"][0]["head"]
  outputs, _ = encoder.apply(own["encoder"], states["encoder"], batch, train=True, key=None)
  reused = models.reused_head("map", head)
  projected, _ = reused.apply(own["reused"], states["reused"], outputs["features"]["stage2"], train=True, key=None)
  return jnp.square(projected["output"] - teacher["features"]["stage2"]).mean()


SCHEMES = {
  "Into single-task students": into_single_task_students,
  "Into one multi-task student": into_one_multi_task_student,
  "Soft sharing of exactly low rank": soft_sharing,
  "Average of logits": average_of_logits,
  "Average of probabilities": average_of_probabilities,
  "Confidence weights for each example": confidence_weights,
  "A random or a scheduled choice": random_or_scheduled,
  "Teachers that know some of the classes": class_subsets,
  "Gradients of the teachers, balanced": gradients_of_teachers,
  "Single-task teachers into one multi-task student": single_task_teachers,
  "Merged by formula": soft_only,
  "Merged by distillation": merged_by_distillation,
  "Mutual learning": mutual,
  "Online ensemble": online_ensemble,
  "Mean teacher": mean_teacher,
  "Momentum encoder": momentum_encoder,
  "Born again": functools.partial(one_teacher, temperature=1.0),
  "Teacher assistants": one_teacher,
  "Self-distillation between exits": between_exits,
  "Self-distillation across augmentations": across_augmentations,
  "Unlabelled examples": unlabelled,
  "Labelled and unlabelled batches in one": mixed_batches,
  "A source of any kind": hard_only,
  "Tasks with batches of their own": batches_of_their_own,
  "Four kinds of task in one learner": four_kinds,
  "Metrics for each task": soft_tasks,
  "Schedules of weights and temperatures": schedules,
  "Curriculum temperature": curriculum,
  "A training before the student's": factor_transfer,
  "A large batch in parts": in_parts,
  "Params in the objective": near_the_start,
  "Freezing and unfreezing by path": hard_only,
  "Contrastive distillation with its memory": contrastive,
  "A teacher known by its content": soft_only,
  "The student leaves": hard_only,
  "A reused teacher classifier": reused_classifier,
}
IN_SHARED = lambda path: "student/shared/" in path
WEIGHTINGS = {
  "Gradients of the teachers, balanced": (balancing.mgda, lambda path: True),
  "Single-task teachers into one multi-task student": (balancing.imtl_g, IN_SHARED),
  "Tasks with batches of their own": (balancing.imtl_g, IN_SHARED),
  "Four kinds of task in one learner": (balancing.aligned_mtl, IN_SHARED),
}
MOVES = {  # which params the update moves, where it is not all of them, by path and step
  "Freezing and unfreezing by path": lambda path, step: "head" in path or (step >= 100 and "hidden/0/bias" in path),
}


def _path(path):
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_hand(title, call, batch):
  objective = lambda params: SCHEMES[title](call, params, batch)
  if title not in WEIGHTINGS:
    return jax.jit(jax.grad(objective))(call.before.params)
  weighting, is_shared = WEIGHTINGS[title]
  rows = jax.jit(jax.jacrev(objective))(call.before.params)
  flat = np.concatenate(
    [
      np.asarray(g, np.float64).reshape(len(g), -1)
      for path, g in jax.tree.leaves_with_path(rows)
      if is_shared(_path(path))
    ],
    axis=1,
  )
  weights = weighting(jnp.asarray(flat @ flat.T))
  return jax.tree.map(lambda g: jnp.einsum("t,t...->...", weights, g), rows)


def _low_rank(path, leaf):
  """The proximal point of what is stacked, tasks first."""
  if "stacked" not in path:
    return leaf
  u, s, vt = np.linalg.svd(leaf.reshape(len(leaf), -1), full_matrices=False)
  assert (s > 3.4).sum() <= 1
  return (u * np.maximum(s - 3.4, 0) @ vt).reshape(leaf.shape)


ENDS = {"Soft sharing of exactly low rank": _low_rank}  # what an optimizer does beyond the gradient step


def _assert_descends(call, gradient, moves, end):
  assert sum(np.abs(g).sum() for g in jax.tree.leaves(gradient)) > 0.1
  leaves = jax.tree.leaves_with_path(call.before.params)
  for (path, before), after, g in zip(
    leaves, jax.tree.leaves(call.after.params), jax.tree.leaves(gradient), strict=True
  ):
    expected = end(_path(path), np.subtract(before, g)) if moves(_path(path)) else np.asarray(before)
    np.testing.assert_allclose(after, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(), err_msg=_path(path))


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("title", "step"), [(title, step) for title in BLOCKS for step in STEPS.get(title, (STEP,))])
def test_the_update_of_a_recipe_is_the_gradient_of_the_sum_by_hand(title, step):
  names, calls = _execute(title, step)
  assert calls
  end = ENDS.get(title, lambda path, leaf: leaf)
  for call in calls:
    moves = functools.partial(MOVES[title], step=step) if title in MOVES else lambda path: True
    _assert_descends(call, _by_hand(title, call, _wide(names["batch"])), moves, end)
  if title in CHECKS:
    CHECKS[title](names, calls)


def _averages_follow(decay, sources, calls):
  (call,) = calls
  for name, source in sources.items():
    for path, leaf in jax.tree.leaves_with_path(call.after.averages[name]):
      at = lambda tree, path=path: functools.reduce(lambda branch, key: branch[key.key], path, tree)
      before, student = at(call.before.averages[name]), at(call.after.params[source])
      np.testing.assert_allclose(leaf, decay * before + (1 - decay) * student, rtol=1e-5, atol=1e-6)
      assert not np.allclose(before, leaf)


def _each_teaches_the_next(names, calls):
  taught, learned = calls[1].frozen["teacher"][0], calls[0].after.params["student"]
  assert all(map(np.array_equal, jax.tree.leaves(taught), jax.tree.leaves(learned)))


def _the_rows_of_the_batch_are_remembered(names, calls):
  before, after = (state.model_state["crd"] for state in (calls[0].before, calls[0].after))
  changed = np.any(np.asarray(before["student"]) != np.asarray(after["student"]), axis=1)
  assert np.array_equal(np.flatnonzero(changed), names["batch"]["index"])


def _the_stage_is_handed_on(names, calls):
  """The paraphraser as its stage left it is what the student's training reads, and no longer learns."""
  name = "factor_transfer_paraphraser"
  learned, read = (calls[0].after.params[name], calls[0].after.model_state[name]), calls[1].frozen[name]
  assert name not in calls[1].after.params and "student" not in calls[0].after.params
  jax.tree.map(np.testing.assert_array_equal, learned, read)


def _the_exported_student_says_the_same(names, calls):
  expected = _outputs(calls[0], calls[0].after.params, ("student",), names["batch"])[0]["logits"]
  np.testing.assert_allclose(names["logits"], expected, rtol=1e-9)


def _the_teachers_classifier_leaves_with_the_student(names, calls):
  (call,) = calls
  variables = call.after.params["student"], call.after.model_state["student"]
  outputs, _ = call.network["student"].apply(*variables, _wide(names["batch"]), train=False, key=None)
  head = call.frozen["teacher"][0]["head"]
  by_hand = outputs["output"].mean((1, 2)) @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(names["logits"], by_hand, rtol=1e-5, atol=1e-6)


def _the_metrics_are_those_of_numpy(names, calls):
  """Over the whole set at once, of the student after its update and its teacher."""
  (call,) = calls
  batch, results = names["batch"], names["results"]
  teacher, student = (o["logits"] for o in _outputs(call, call.after.params, ("teacher", "student"), batch))
  assert len(results) == 12
  for task in ("left", "right"):
    p, q = (np.asarray(jax.nn.softmax(logits[task])) for logits in (teacher, student))
    label, right = batch[task], q.argmax(-1) == batch[task]
    bins = np.minimum((q.max(-1) * 15).astype(int), 14)
    expected = {
      "accuracy": right.mean(),
      "negative log-likelihood": -np.log(q[np.arange(8), label]).mean(),
      "Brier score": ((q - np.eye(4)[label]) ** 2).sum(-1).mean(),
      "agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
      "KL": (p * np.log(p / q)).sum(-1).mean(),
      "ECE": sum(abs((q.max(-1) - right)[bins == b].sum()) for b in range(15)) / 8,
    }
    for name, value in expected.items():
      np.testing.assert_allclose(results[f"{task} {name}"], value, rtol=1e-5, err_msg=name)


def _a_fifth_of_each_difference_is_added(names, calls):
  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
  base, *tuned = (flat(names[name]) for name in ("base", "first", "second"))
  differences = [np.where(np.abs(d) >= np.sort(np.abs(d))[-int(0.2 * d.size)], d, 0) for d in (t - base for t in tuned)]
  sign = np.sign(sum(differences))
  agreeing = np.where(np.sign(differences) == sign, differences, 0)
  expected = base + agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)
  np.testing.assert_allclose(flat(calls[0].frozen["teacher"][0]), expected, rtol=1e-5, atol=1e-6)


def _the_merged_params_are_those_of_the_network(names, calls):
  (call,) = calls
  originals = [call.frozen[name][0] for name in ("base", "left", "right")]
  reads = (*originals, _wide(names["batch"]))
  merged, _ = call.network["merged"].apply(call.after.params["merged"], {}, reads, train=False, key=None)
  alone, _ = call.network["left"].apply(names["params"], {}, names["batch"], train=False, key=None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, alone)


CHECKS = {
  "Merged by formula": _a_fifth_of_each_difference_is_added,
  "Merged by distillation": _the_merged_params_are_those_of_the_network,
  "Mean teacher": lambda names, calls: _averages_follow(0.9, {"teacher": "student"}, calls),
  "Momentum encoder": lambda names, calls: _averages_follow(0.99, {"slow": "student", "slow_point": "point"}, calls),
  "Born again": _each_teaches_the_next,
  "Teacher assistants": _each_teaches_the_next,
  "A training before the student's": _the_stage_is_handed_on,
  "Contrastive distillation with its memory": _the_rows_of_the_batch_are_remembered,
  "The student leaves": _the_exported_student_says_the_same,
  "A reused teacher classifier": _the_teachers_classifier_leaves_with_the_student,
  "Metrics for each task": _the_metrics_are_those_of_numpy,
}


@pytest.mark.usefixtures("float64")
def test_two_views_share_statistics_and_no_dropout():
  """The second view finds the state that the first left; a random network says two things about one image."""
  two_views = _execute("Self-distillation across augmentations")[0]["two_views"]
  network = models.convnet((2, 3), 4, dropout=0.5)
  random = np.random.default_rng(0)
  batch = {name: random.normal(size=(4, 5, 5, 1)).astype(np.float32) for name in ("image", "other")}
  params, state = network.init(jax.random.key(0), batch)
  _, after = two_views(network).apply(params, state, batch, train=True, key=jax.random.key(1))
  expected = state
  for view in ("image", "other"):
    _, expected = network.apply(params, expected, {"image": batch[view]}, train=True, key=jax.random.key(2))
  assert jax.tree.leaves(expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after, expected)
  same = batch | {"other": batch["image"]}
  says = lambda train, key: two_views(network).apply(params, state, same, train=train, key=key)[0]
  assert not np.allclose(
    says(True, jax.random.key(1))["weak"]["logits"], says(True, jax.random.key(1))["strong"]["logits"]
  )
  np.testing.assert_array_equal(says(False, None)["weak"]["logits"], says(False, None)["strong"]["logits"])


# What the audit of these tests changed in the recipes; each must be noticed.
MUTATIONS = [
  ("Merged by formula", "density=0.2", "density=0.3"),
  ("Mean teacher", ', "soft": soft("student.logits", "teacher.logits")', ""),
  ("Momentum encoder", 'Average("point", decay=0.99)', 'Average("point", decay=0.5)'),
  ("Single-task teachers into one multi-task student", "from_weighting(balancing.imtl_g)", "fixed(0.5)"),
  ("Single-task teachers into one multi-task student", 'shared="student/shared/"', 'shared="student"'),
  ("Freezing and unfreezing by path", "jnp.where(step < 100, 0.0, 1.0)", "0.0"),
  ("A random or a scheduled choice", "jax.nn.one_hot(jnp.minimum(step // 3, 1), 2)", "jnp.array([0.0, 1.0])"),
  ("Self-distillation across augmentations", 'batch["other"]', 'batch["image"]'),
  ("Tasks with batches of their own", '"right": ~both', '"right": both'),
  ("Four kinds of task in one learner", "from_weighting(balancing.aligned_mtl)", "fixed(0.5)"),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("title", "old", "new"), MUTATIONS, ids=[f"{title}-{new}" for title, _, new in MUTATIONS])
def test_a_recipe_that_says_something_else_is_noticed(title, old, new, monkeypatch):
  assert old in BLOCKS[title]
  monkeypatch.setitem(BLOCKS, title, BLOCKS[title].replace(old, new))
  with pytest.raises(AssertionError):
    for step in STEPS.get(title, (STEP,)):
      test_the_update_of_a_recipe_is_the_gradient_of_the_sum_by_hand(title, step)


def test_every_scheme_is_on_the_page():
  assert set(BLOCKS) == set(SCHEMES)
  assert TEXT.count("```python") == len(BLOCKS) + 1
