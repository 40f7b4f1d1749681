"""One learner for a classification, a regression, a dense prediction and a sequence, labels missing in all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import balancing, models, training
from kdflax.objectives import Term

EXAMPLES, SIDE, LENGTH, STEPS = 12, 4, 5, 40
TASKS = ("kind", "size", "part", "tag")
BALANCERS = {
  "none": None,
  "losses": balancing.uncertainty(optimizer=optax.sgd(0.1)),
  "gramian": balancing.from_weighting(balancing.upgrad),
  "combiner": balancing.moco(),
}


def _token_encoder(width):
  """Looks at each token by itself; the two networks of the learner share nothing."""

  def init(key, batch):
    return {"kernel": jax.random.normal(key, (batch["tokens"].shape[-1], width))}, {}

  def apply(params, state, batch, *, train, key):
    return {"embedding": jnp.tanh(batch["tokens"] @ params["kernel"])}, state

  return models.Model(init, apply)


NETWORK = {
  "image": models.hard_sharing(
    models.convnet((6, 8), None),
    {
      "kind": models.task_head(3),
      "size": models.task_head(),
      "part": models.task_head(2, reads="features.stage1"),
    },
  ),
  "text": models.hard_sharing(_token_encoder(8), {"tag": models.task_head(4)}),
}


def _term(task):
  model = "text" if task == "tag" else "image"
  logits, labels = f"{model}.logits.{task}", f"batch.label.{task}"
  where = {"where": f"batch.known.{task}"}
  if task == "size":
    return Term(optax.squared_error, {"predictions": logits, "targets": labels, **where})
  return Term(optax.softmax_cross_entropy_with_integer_labels, {"logits": logits, "labels": labels, **where})


def _batch():
  """Labels that can be learned, and which are known: [batch] twice, [batch, side, side], [batch, length]."""
  random = np.random.default_rng(0)
  image = random.normal(size=(EXAMPLES, SIDE, SIDE, 1)).astype(np.float32)
  tokens = random.normal(size=(EXAMPLES, LENGTH, 3)).astype(np.float32)
  label = {
    "kind": np.digitize(image.mean((1, 2, 3)), [-0.1, 0.1]),
    "size": image.std((1, 2, 3)),
    "part": (image[..., 0] > 0).astype(int),
    "tag": tokens.argmax(-1),
  }
  known = {
    "kind": np.arange(EXAMPLES) % 3 != 0,
    "size": np.arange(EXAMPLES) % 4 != 1,
    "part": random.random(label["part"].shape) < 0.7,
    "tag": np.arange(LENGTH) < random.integers(1, LENGTH + 1, size=(EXAMPLES, 1)),
  }
  return {"image": image, "tokens": tokens, "label": label, "known": known}


def _with_filler(batch, number, label):
  fill = lambda task: np.where(batch["known"][task], batch["label"][task], number if task == "size" else label)
  return batch | {"label": {task: fill(task).astype(batch["label"][task].dtype) for task in TASKS}}


def _make(balancer):
  shared = None if balancer == "none" else "/shared/"
  terms = {task: _term(task) for task in TASKS}
  learner = training.make_learner(NETWORK, terms, optax.adam(0.03), balancer=BALANCERS[balancer], shared=shared)
  return learner.init, training.make_train_step(learner)


def _run(init, step, batch, steps=STEPS):
  state, history = init(jax.random.key(0), batch), []
  for _ in range(steps):
    state, metrics = step(state, batch)
    history.append(training.metrics.means(metrics))
  return state, history


@pytest.mark.parametrize("balancer", BALANCERS)
def test_four_kinds_of_task_are_learned_whatever_stands_for_a_missing_label(balancer):
  init, step = _make(balancer)
  batch = _batch()
  state, history = _run(init, step, _with_filler(batch, np.nan, -1))
  for task in TASKS:
    assert history[-1][task] < 0.6 * history[0][task], task
  other, same = _run(init, step, _with_filler(batch, 3.0, 1))
  assert same == history
  assert training.digest(other) == training.digest(state)


def test_a_mean_is_over_what_is_known():
  init, step = _make("none")
  batch = _batch()
  _, metrics = step(init(jax.random.key(0), batch), batch)
  assert {task: int(metrics[task][1]) for task in TASKS} == {task: batch["known"][task].sum() for task in TASKS}


@pytest.mark.parametrize("absent", TASKS)
def test_a_task_without_labels_in_a_batch_leaves_its_head_where_it_is(absent):
  init, step = _make("gramian")
  batch = _batch()
  gone = batch | {"known": {**batch["known"], absent: np.zeros_like(batch["known"][absent])}}
  before = init(jax.random.key(0), batch)
  start = jax.tree.map(np.array, before.params)
  after, metrics = step(before, _with_filler(gone, np.nan, 999))
  for model, tasks in {"image": TASKS[:3], "text": TASKS[3:]}.items():
    for task in tasks:
      rests = jax.tree.map(np.array_equal, start[model]["task"][task], after.params[model]["task"][task])
      assert all(jax.tree.leaves(rests)) == (task == absent)
  assert metrics[f"weight/{absent}"][0] == 0 < metrics[f"weight/{TASKS[TASKS.index(absent) - 1]}"][0]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
