"""Stages run in order; what they train goes on, stands still, or is left behind."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import losses, methods, models, training
from kdflax.model import Model
from kdflax.objectives import Term

BATCH = {"image": np.random.default_rng(0).normal(size=(4, 6, 6, 1)).astype(np.float32), "label": np.arange(4) % 3}
STUDENT, TEACHER = models.convnet((3, 4), 3), models.convnet((4, 6), 3)
PAIR = methods.pair(STUDENT, TEACHER, BATCH)
HARD = {
  "hard": Term(optax.softmax_cross_entropy_with_integer_labels, {"logits": "student.logits", "labels": "batch.label"})
}


@pytest.fixture(scope="module")
def teacher():
  return jax.jit(TEACHER.init)(jax.random.key(1), BATCH)


def trainer(seen, num_steps=2):
  """`train` of two steps, which keeps what it was asked and what came of it."""

  def train(name, network, terms, frozen):
    learner = training.make_learner(network, terms, optax.sgd(0.01))
    state = start = learner.init(jax.random.key(0), BATCH, frozen)
    step = jax.jit(learner.step)
    for _ in range(num_steps):
      state, _ = step(state, BATCH, frozen)
    seen.append((name, set(network), set(terms), set(frozen), start, state))
    return state

  return train


def equal(a, b):
  return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(scope="module")
def run(teacher):
  """FT after FitNets, then the student's own training."""
  method = methods.fitnets(PAIR) | methods.factor_transfer(PAIR)
  seen = []
  networks = {"student": STUDENT, "teacher": TEACHER} | method.models
  networks, frozen = training.train_stages(method.stages, networks, trainer(seen), {"teacher": teacher})
  trainer(seen)("student", networks, HARD | method.terms, frozen)
  return seen


def test_stages_run_in_order_on_what_they_read(run):
  paraphraser, translator = "factor_transfer_paraphraser", "factor_transfer_translator"
  assert [(name, models, terms, frozen) for name, models, terms, frozen, *_ in run] == [
    ("fitnets", {"student", "teacher", "fitnets_regressor"}, {"fitnets"}, {"teacher"}),
    (paraphraser, {"teacher", paraphraser}, {"factor_transfer/rebuild"}, {"teacher"}),
    (
      "student",
      {"student", "teacher", paraphraser, translator},
      {"hard", "factor_transfer"},
      {"teacher", paraphraser},
    ),
  ]


def test_the_student_goes_on_where_its_stage_ended(run):
  (*_, before, after), _, (*_, start, end) = run
  assert not equal(before.params["student"], after.params["student"])
  assert equal(after.params["student"], start.params["student"])
  assert equal(after.model_state["student"], start.model_state["student"])
  assert not equal(start.params["student"], end.params["student"])


def test_what_is_frozen_is_what_the_stage_made_of_it(run, teacher):
  """The paraphraser has learned, and its factors are what the student's training compares with."""
  _, (*_, before, after), (*_, end) = run
  name = "factor_transfer_paraphraser"
  assert not equal(before.params[name], after.params[name])
  assert name not in end.params and set(end.params) == {"student", "factor_transfer_translator"}


def test_a_stage_that_hands_on_what_nobody_reads_is_an_error(teacher):
  method = methods.factor_transfer(PAIR)
  train = lambda name, network, terms, frozen: training.TrainState(
    jnp.int32(0),
    {"factor_transfer_paraphraser": {}},
    {"factor_transfer_paraphraser": {}},
    (),
    (),
    {},
    jax.random.key(0),
  )
  networks = {"student": STUDENT, "teacher": TEACHER}
  with pytest.raises(
    ValueError, match=r"hands on \['factor_transfer_paraphraser'\] as frozen; it trains .* give the mo"
  ):
    training.train_stages(method.stages, networks, train, {"teacher": teacher})
  frozen = training.train_stages(method.stages, networks | method.models, train, {"teacher": teacher})[1]
  assert set(frozen) == {"teacher", "factor_transfer_paraphraser"}
  stage = methods.Stage(
    {}, {"hint": Term(losses.hint, {"student": "student.logits", "teacher": "teacher.logits"})}, ("x",)
  )
  with pytest.raises(ValueError, match=r"stage 'odd' hands on \['x'\] as frozen"):
    training.train_stages({"odd": stage}, networks, train, {"teacher": teacher})


def test_without_stages_nothing_changes(teacher):
  networks, frozen = training.train_stages({}, {"student": STUDENT}, trainer([]), {"teacher": teacher})
  assert networks == {"student": STUDENT} and frozen == {"teacher": teacher}


def test_a_model_starts_from_variables():
  variables = {"kernel": jnp.ones(3)}, {}
  model = Model(lambda key, example: ({"kernel": jnp.zeros(3)}, {}), lambda *_, **__: ({}, {}), "student.embedding")
  started = training.starting_from(model, variables)
  assert started.init(jax.random.key(0), BATCH) is variables
  assert (started.apply, started.inputs) == (model.apply, model.inputs)


def test_methods_with_stages_go_together():
  every = [methods.fitnets(PAIR), methods.fsp(PAIR), methods.activation_boundary(PAIR), methods.factor_transfer(PAIR)]
  names = ["fitnets", "fsp", "activation_boundary", "factor_transfer_paraphraser"]
  assert list(functools.reduce(operator.or_, every).stages) == names
