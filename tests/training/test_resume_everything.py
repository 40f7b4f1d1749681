"""The richest training there is, stopped anywhere, ends with the same bits.

Two students with dropout that teach each other, a frozen teacher, a moving average of a student, a contrastive memory,
a learned temperature, a teacher drawn at random, a balancer with a learned state, and batches with a position.
"""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import balancing, data, losses, models, teachers, training
from kdflax.models import Model
from kdflax.objectives import Term

NUM_STEPS, EXAMPLES = 6, 12
EMBEDDINGS = ("one_embedding.output", "teacher_embedding.output")


def _arrays():
  random = np.random.default_rng(0)
  return {
    "image": random.normal(size=(EXAMPLES, 5)).astype(np.float32),
    "label": random.integers(3, size=EXAMPLES).astype(np.int32),
    "index": np.arange(EXAMPLES, dtype=np.int32),
  }


def _contrast():
  def apply(params, state, inputs, *, train, key):
    student, teacher, index = inputs
    shift = jax.random.randint(jax.random.key(0) if key is None else key, (len(index), 3), 1, EXAMPLES)
    indices = jnp.concatenate([index[:, None], (index[:, None] + shift) % EXAMPLES], axis=1)
    values, memory = losses.crd(student, teacher, indices, state["memory"])
    return {"values": values}, {"memory": memory} if train else state

  init = lambda key, example: ({}, {"memory": losses.crd_memory(key, EXAMPLES, 4)})
  return Model(init, apply, (*EMBEDDINGS, "batch.index"))


NETWORK = {
  "teacher": models.mlp((6,), 3),
  "mean": models.mlp((4,), 3, dropout=0.3),
  "one": models.mlp((4,), 3, dropout=0.3),
  "two": models.mlp((4,), 3, dropout=0.3),
  "drawn": teachers.random_teacher(["teacher.logits", "mean.logits"]),
  "temperature": models.temperature(),
  "one_embedding": models.embedding_connector("one.embedding", 4),
  "teacher_embedding": models.embedding_connector("teacher.embedding", 4),
  "contrast": _contrast(),
}


def _soft(student, teacher, temperature=2.0):
  inputs = {"student_logits": f"{student}.logits", "teacher_logits": f"{teacher}.logits", "temperature": temperature}
  return Term(losses.kl_soft_targets, inputs, stop_gradient=(teacher,))


TERMS = {
  f"hard {name}": Term(
    optax.softmax_cross_entropy_with_integer_labels, {"logits": f"{name}.logits", "labels": "batch.label"}
  )
  for name in ("one", "two")
} | {
  "drawn": _soft("one", "drawn", "temperature.temperature"),
  "mutual": _soft("one", "two"),
  "mutual back": _soft("two", "one"),
  "contrast": Term(lambda values: values, {"values": "contrast.values"}, optax.linear_schedule(0.0, 1.0, 4)),
}
LEARNER = training.make_learner(
  NETWORK,
  TERMS,
  optax.adam(0.01),
  averages={"mean": training.Average("one", decay=0.9)},
  balancer=balancing.grad_norm(optimizer=optax.adam(0.1)),
  rows={"one": ["hard one", "drawn", "mutual"], "two": ["hard two", "mutual back"], "contrast": ["contrast"]},
)


class StopAfter:
  """An event that is set after so many looks at it."""

  def __init__(self, steps):
    self._left = steps

  def is_set(self):
    self._left -= 1
    return self._left <= 0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
  digest = teachers.save_variables(path, NETWORK["teacher"].init(jax.random.key(1), _arrays()))
  return path, digest


@pytest.fixture(scope="module")
def compiled():
  return training.make_train_step(LEARNER)


def _train(folder, compiled, teacher, stop_after=None):
  """One process: everything is made anew but what is compiled."""
  path, digest = teacher
  frozen = {"teacher": teachers.load_variables(path, digest=digest)}
  batches = data.DeviceBatches(_arrays(), 4, key=jax.random.key(2))
  state = LEARNER.init(jax.random.key(0), data.gather(_arrays(), np.arange(4)), frozen)
  folder.mkdir(exist_ok=True)
  with (
    training.Checkpoints(folder / "checkpoints") as checkpoints,
    contextlib.closing(training.MetricsLog(folder / "metrics.jsonl")) as log,
  ):
    return training.fit(
      lambda state, batch: compiled(state, batch, frozen),
      state,
      batches,
      num_steps=NUM_STEPS,
      checkpoints=checkpoints,
      bound={name: training.digest(variables) for name, variables in frozen.items()},
      save_every=2,
      log=log,
      log_every=4,
      stop=None if stop_after is None else StopAfter(stop_after),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, compiled, teacher):
  folder = tmp_path_factory.mktemp("uninterrupted")
  return _train(folder, compiled, teacher), (folder / "metrics.jsonl").read_text()


def test_every_part_of_the_state_moves(uninterrupted, teacher):
  path, digest = teacher
  frozen = {"teacher": teachers.load_variables(path, digest=digest)}
  start = LEARNER.init(jax.random.key(0), data.gather(_arrays(), np.arange(4)), frozen)
  end, _ = uninterrupted
  assert "teacher" not in end.params and "teacher" not in end.model_state
  parts = {
    f"params/{name}": (start.params[name], end.params[name]) for name in end.params if name not in ("drawn", "contrast")
  }
  parts |= {name: (getattr(start, name), getattr(end, name)) for name in ("opt_state", "balancer_state", "averages")}
  parts["memory"] = start.model_state["contrast"], end.model_state["contrast"]
  for name, (before, after) in parts.items():
    assert training.digest(before) != training.digest(after), name


def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(uninterrupted, compiled, teacher, tmp_path):
  state, log = uninterrupted
  for stops in [(1, 2), (3,), (2, 1, 1, 1)]:
    folder = tmp_path / "-".join(map(str, stops))
    for stop_after in stops:
      with pytest.raises(training.Preempted):
        _train(folder, compiled, teacher, stop_after)
    resumed = _train(folder, compiled, teacher)
    assert training.digest(resumed) == training.digest(state)
    assert (folder / "metrics.jsonl").read_text() == log
  assert {"weight/one", "weight/two", "weight/contrast"} <= set(json.loads(log.splitlines()[0]))


def test_another_teacher_is_refused(compiled, teacher, tmp_path):
  """The state has its shapes and the settings may name its new digest: only the checkpoint knows the old one."""
  other = tmp_path / "teacher.safetensors"
  digest = teachers.save_variables(other, NETWORK["teacher"].init(jax.random.key(5), _arrays()))
  with pytest.raises(ValueError, match="other variables than those referenced"):
    _train(tmp_path / "run", compiled, (other, teacher[1]))
  with pytest.raises(training.Preempted):
    _train(tmp_path / "run", compiled, teacher, 3)
  with pytest.raises(ValueError, match=rf"teacher: {teacher[1]} in the checkpoint, {digest} now") as caught:
    _train(tmp_path / "run", compiled, (other, digest))
  assert "delete the checkpoints of this phase" in str(caught.value)
  _train(tmp_path / "run", compiled, teacher)
  with pytest.raises(ValueError, match="bound to other content"):  # a training that is complete, too
    _train(tmp_path / "run", compiled, (other, digest))
