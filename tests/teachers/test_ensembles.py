"""Ensembles against their formulas, alone and inside a training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from kdflax import losses, models, teachers, training
from kdflax.objectives import Term

LOGITS = np.random.default_rng(0).normal(size=(3, 5, 4)) * 3  # [teachers, batch, classes]
LABELS = np.array([0, 3, -1, 2, 1])
PATHS = ("a.logits", "b.logits", "c.logits")
WEIGHTS = np.array([0.5, 0.0, 1.5])


def _run(model, *inputs, train=False, key=None):
  with jax.enable_x64(True):
    apply = jax.jit(functools.partial(model.apply, train=train))
    outputs, state = apply({}, {}, tuple(map(jnp.asarray, inputs)), key=key)
  assert state == {} and model.init(jax.random.key(0), None) == ({}, {})
  return jax.tree.map(np.asarray, outputs)


def _close(a, b, rtol=1e-9):
  np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b[np.isfinite(b)]).max())


@pytest.mark.parametrize("weights", [None, WEIGHTS, lambda step: jnp.asarray(WEIGHTS) * (step + 1)])
def test_average_logits_is_the_weighted_mean(weights):
  model = teachers.average_logits(PATHS, weights=weights)
  assert model.inputs == (PATHS if not callable(weights) else (*PATHS, "step"))
  outputs = _run(model, *LOGITS, *([3] if callable(weights) else []))
  _close(outputs["logits"], np.average(LOGITS, axis=0, weights=None if weights is None else WEIGHTS))
  _close(outputs["weights"][0], np.full(3, 1 / 3) if weights is None else WEIGHTS / 2)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("make", [teachers.average_logits, teachers.average_probabilities, teachers.random_teacher])
def test_weights_that_are_all_zero_at_a_step_are_equal(make, train):
  """A schedule that ran out: one_hot of a class that there is not is all zeros, whose shares would be NaN."""
  model = make(PATHS, weights=lambda step: jax.nn.one_hot(step // 3, 3))
  keys = jax.random.split(jax.random.key(0), 200)
  drawn = lambda key, step: model.apply({}, {}, (*LOGITS.astype(np.float32), step), train=train, key=key)[0]
  draw = jax.jit(jax.vmap(drawn, (0, None)))
  at = lambda step: draw(keys, jnp.int32(step))
  np.testing.assert_array_equal(at(8)["weights"], np.broadcast_to([0.0, 0.0, 1.0], (200, 5, 3)))
  after = at(9)
  np.testing.assert_allclose(after["weights"].mean((0, 1)), np.full(3, 1 / 3), atol=0.06)
  assert np.isfinite(after["logits"]).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_average_probabilities_is_the_mixture_at_its_temperature(temperature):
  outputs = _run(teachers.average_probabilities(PATHS, temperature=temperature, weights=WEIGHTS), *LOGITS)
  mixture = np.average(softmax(LOGITS / temperature, axis=-1), axis=0, weights=WEIGHTS)
  _close(softmax(outputs["logits"] / temperature, axis=-1), mixture)


@pytest.mark.parametrize(
  "make",
  [
    lambda temperature: teachers.average_probabilities(PATHS, temperature=temperature),
    lambda temperature: teachers.confidence_weighted(PATHS, temperature=temperature),
    lambda temperature: teachers.subset_teachers(
      PATHS, [range(4), range(4, 8), range(8, 12)], 12, temperature=temperature
    ),
  ],
)
def test_a_temperature_may_follow_a_schedule_or_be_learned(make):
  labels = [LABELS] if "batch.label" in make(1.0).inputs else []
  expected = _run(make(2.5), *LOGITS, *labels)
  scheduled, learned = make(lambda step: 0.5 + step), make("curriculum.temperature")
  assert scheduled.inputs == (*make(1.0).inputs, "step")
  assert learned.inputs == (*make(1.0).inputs, "curriculum.temperature")
  for model, value in ((scheduled, 2), (learned, 2.5)):
    jax.tree.map(_close, _run(model, *LOGITS, *labels, value), expected)


def test_what_all_teachers_find_unlikely_keeps_its_digits():
  logits = np.array([[[0.0, -800.0]], [[0.0, -801.0]]])
  outputs = _run(teachers.average_probabilities(PATHS[:2]), *logits)
  _close(outputs["logits"], np.array([[0.0, np.log((1 + np.exp(-1)) / 2) - 800]]))


def _confidence(logits, labels):
  """Equation 2 of the paper, example by example."""
  ce = -np.stack([log_softmax(z, axis=-1)[np.arange(len(labels)), labels] for z in logits])
  return ((1 - np.exp(ce) / np.exp(ce).sum(0)) / (len(logits) - 1)).T


def test_confidence_weights_follow_the_paper():
  outputs = _run(teachers.confidence_weighted(PATHS, temperature=4.0), *LOGITS, LABELS)
  weights = np.where((LABELS < 0)[:, None], 1 / 3, _confidence(LOGITS, LABELS))
  _close(outputs["weights"], weights)
  _close(outputs["weights"].sum(1), np.ones(5))
  mixture = np.einsum("bk,kbc->bc", weights, softmax(LOGITS / 4.0, axis=-1))
  _close(softmax(outputs["logits"] / 4.0, axis=-1), mixture)


def test_gradient_through_the_confidence_weighted_mixture_is_that_of_the_papers_sum():
  labels = np.abs(LABELS)
  outputs = _run(teachers.confidence_weighted(PATHS, temperature=4.0), *LOGITS, labels)
  with jax.enable_x64(True):
    student, weights = jnp.asarray(LOGITS[0] - 1.0 * LOGITS[1]), _confidence(LOGITS, labels)
    kl = lambda s, t: losses.kl_soft_targets(s, jnp.asarray(t), temperature=4.0)
    mixed = jax.jit(jax.grad(lambda s: kl(s, outputs["logits"]).mean()))(student)
    each = jax.jit(jax.grad(lambda s: sum((weights[:, k] * kl(s, LOGITS[k])).mean() for k in range(3))))(student)
  _close(np.asarray(mixed), np.asarray(each))


def test_a_teacher_that_excludes_the_label_gets_no_confidence():
  logits = LOGITS.copy()
  logits[0, 0, 0] = -np.inf  # teacher 0 excludes the label of example 0
  logits[:2, 1, 3] = -np.inf  # two teachers that of example 1
  outputs = _run(teachers.confidence_weighted(PATHS), *logits, LABELS)
  _close(outputs["weights"][0, 0], np.array(0.0))
  _close(outputs["weights"][1], np.array([0.25, 0.25, 0.5]))
  assert np.isfinite(outputs["logits"][:, :3]).all()


@pytest.mark.parametrize("per", ["example", "batch"])
def test_random_teacher_draws_teachers_with_their_probabilities(per):
  model = teachers.random_teacher(PATHS, per=per, weights=[1, 0, 3])
  keys = jax.random.split(jax.random.key(0), 400)
  logits = tuple(jnp.asarray(z) for z in LOGITS.astype(np.float32))
  outputs = jax.vmap(lambda key: model.apply({}, {}, logits, train=True, key=key)[0])(keys)
  choice = np.asarray(outputs["weights"]).argmax(-1)  # [draws, batch]
  assert np.array_equal(np.asarray(outputs["logits"]), np.stack(logits)[choice, np.arange(5)])
  assert (choice == choice[:, :1]).all() == (per == "batch")
  draws = choice[:, 0]  # binomial: standard deviation 9 of 400
  assert set(np.unique(draws)) == {0, 2} and abs((draws == 2).sum() - 300) < 45
  mixture = _run(model, *LOGITS)
  _close(softmax(mixture["logits"], axis=-1), np.average(softmax(LOGITS, axis=-1), axis=0, weights=[1, 0, 3]))
  with pytest.raises(ValueError, match="needs a key"):
    model.apply({}, {}, logits, train=True, key=None)


def test_a_label_map_places_classes_and_says_which_examples_are_of_them():
  outputs = _run(teachers.label_map("a.logits", [5, 0, 2, 3], 6, labels="batch.label"), LOGITS[0], LABELS)
  _close(outputs["logits"][:, [5, 0, 2, 3]], LOGITS[0])
  assert (outputs["logits"][:, [1, 4]] == -np.inf).all()
  assert outputs["known"].tolist() == [True, True, False, True, False]


def test_subsets_mix_with_the_weights_of_their_teachers():
  classes = [[0, 1, 2, 3], [4, 2, 5, 6]]
  model = teachers.subset_teachers(PATHS[:2], classes, 7, weights=[1, 3], temperature=2.0, overlap=True)
  by_hand = np.zeros((5, 7))
  for share, own, logits in zip([0.25, 0.75], classes, LOGITS[:2], strict=True):
    by_hand[:, own] += share * softmax(logits / 2, axis=-1)
  _close(softmax(_run(model, *LOGITS[:2])["logits"] / 2, axis=-1), by_hand)


def test_average_logits_leaves_out_teachers_that_do_not_know_a_class():
  logits = LOGITS.copy()
  logits[0, :, :2], logits[1, :, 1:], logits[2, :, 1] = -np.inf, -np.inf, -np.inf
  outputs = _run(teachers.average_logits(PATHS), *logits)
  _close(outputs["logits"][:, 0], (LOGITS[1] + LOGITS[2])[:, 0] / 2)
  _close(outputs["logits"][:, 2:], (LOGITS[0] + LOGITS[2])[:, 2:] / 2)
  assert (outputs["logits"][:, 1] == -np.inf).all()


@pytest.mark.parametrize("make", [teachers.average_logits, teachers.average_probabilities, teachers.random_teacher])
def test_gradients_are_finite_where_a_class_is_impossible(make):
  logits = jnp.asarray(LOGITS, jnp.float32).at[0, :, 1].set(-jnp.inf).at[:, :, 2].set(-jnp.inf)
  model = make(PATHS, weights=[1, 0, 2])

  def value(z):
    found = model.apply({}, {}, tuple(z), train=True, key=jax.random.key(0))[0]["logits"]
    return jnp.where(jnp.isfinite(found), found, 0).sum()

  assert np.isfinite(jax.jit(jax.grad(value))(logits)).all()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: teachers.label_map("a.logits", [0, 6], 6), r"\[6\] of 'a.logits' are not among .* 0 to 5"),
    (lambda: teachers.label_map("a.logits", [0, -1], 6), r"\[-1\] of 'a.logits' are not among"),
    (lambda: teachers.label_map("a.logits", [3, 1, 3], 6), r"two of its classes to the same one: \[3\]"),
    (lambda: teachers.label_map("a.logits", [], 6), "must be a sequence of integers"),
    (lambda: teachers.label_map("a.logits", {0: 2, 1: 3}, 6), r"must be a sequence .* got \{0: 2, 1: 3\}"),
    (
      lambda: teachers.subset_teachers(PATHS[:2], [[0, 1], [1, 2]], 3),
      r"know the classes \[1\] \(1: \['a.logits', 'b.logits'\]\)",
    ),
    (lambda: teachers.subset_teachers(PATHS[:2], [[0], [2]], 3), r"no teacher knows the classes \[1\]"),
    (lambda: teachers.subset_teachers(PATHS[:2], [[0]], 1), "2 paths, 1 lists"),
    (lambda: teachers.average_logits(()), "at least one path"),
    (lambda: teachers.average_logits(PATHS, weights=[1, -1, 1]), "one number >= 0 for each"),
    (lambda: teachers.average_logits(PATHS, weights=[1, 1]), "one number >= 0 for each"),
    (lambda: teachers.average_probabilities(PATHS, temperature=0.0), "temperature must be positive"),
    (lambda: teachers.confidence_weighted(PATHS[:1]), "two or more"),
    (lambda: teachers.random_teacher(PATHS, per="epoch"), "'epoch'"),
  ],
)
def test_mistakes_in_a_configuration_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_mistakes_in_shapes_are_named():
  with pytest.raises(ValueError, match=r"'a.logits': \(5, 4\), 'b.logits': \(5, 3\).*label_map"):
    _run(teachers.average_logits(PATHS[:2]), LOGITS[0], LOGITS[1, :, :3])
  with pytest.raises(ValueError, match=r"'a.logits' has 4 classes, and 2 are mapped"):
    _run(teachers.label_map("a.logits", [0, 1], 6, labels="batch.label"), LOGITS[0], LABELS)
  with pytest.raises(ValueError, match=r"'batch.label' must be integers"):
    _run(teachers.confidence_weighted(PATHS[:2]), LOGITS[0], LOGITS[1], LABELS[:4])


def test_a_random_teacher_works_inside_a_step_and_follows_its_schedule():
  network = {
    "student": models.mlp((), 4),
    "a": models.mlp((), 4),
    "b": models.mlp((), 4),
    "teacher": teachers.random_teacher(PATHS[:2], weights=lambda step: jax.nn.one_hot(step, 2)),
  }
  batch = {"image": np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)}
  frozen = {name: network[name].init(jax.random.key(i), batch) for i, name in enumerate("ab")}
  terms = {"soft": Term(losses.kl_soft_targets, {f"{m}_logits": f"{m}.logits" for m in ("student", "teacher")})}
  learner = training.make_learner(network, terms, optax.sgd(1.0))
  state = learner.init(jax.random.key(2), batch, frozen)
  assert state.params["teacher"] == {}
  step = jax.jit(learner.step)
  for name in "ab":  # the schedule gives a at step 0 and b at step 1
    kl = lambda p, name=name: losses.kl_soft_targets(
      *(
        network[m].apply(p if m == "student" else frozen[m][0], {}, batch, train=False)[0]["logits"]
        for m in ("student", name)
      )
    ).mean()
    expected = jax.tree.map(lambda p, g: p - g, state.params["student"], jax.grad(kl)(state.params["student"]))
    state, _ = step(state, batch, frozen)
    jax.tree.map(lambda a, b: _close(np.asarray(a), np.asarray(b), 1e-5), state.params["student"], expected)


_BROKEN = {
  "average_logits": lambda paths: teachers.average_logits(paths),
  "average_probabilities": lambda paths: teachers.average_probabilities(paths, temperature=2.0),
  "confidence_weighted": lambda paths: teachers.confidence_weighted(paths),
  "random_teacher": lambda paths: teachers.random_teacher(paths),
  "subset_teachers": lambda paths: teachers.subset_teachers(paths, [range(4), range(4)], 4, overlap=True),
}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", _BROKEN)
def test_what_a_broken_teacher_says_stays_nan(name, value):
  first = np.array([[2.0, 1, 0, -1]] * 2, np.float32)
  second = np.array([[0.0, 3, 1, 1]] * 2, np.float32)
  second[1, 2] = value
  inputs = [first, second, np.array([1, 1])] if name == "confidence_weighted" else [first, second]
  outputs, _ = _BROKEN[name](["a.logits", "b.logits"]).apply({}, {}, inputs, train=False, key=None)
  probabilities = jax.nn.softmax(outputs["logits"])
  assert np.isfinite(probabilities[0]).all() and np.isnan(probabilities[1]).all()


def test_a_broken_teacher_of_weight_0_takes_no_part():
  first, second = np.array([[2.0, 1, 0, -1]], np.float32), np.array([[0.0, np.nan, np.inf, 1]], np.float32)
  for make in (teachers.average_logits, teachers.average_probabilities):
    outputs, _ = make(["a.logits", "b.logits"], weights=[1, 0]).apply({}, {}, [first, second], train=False, key=None)
    np.testing.assert_allclose(jax.nn.softmax(outputs["logits"]), jax.nn.softmax(first), rtol=1e-6)
    broken, _ = make(["a.logits", "b.logits"], weights=lambda step: jnp.full(2, jnp.nan)).apply(
      {}, {}, [first, first, jnp.int32(1)], train=False, key=None
    )
    assert np.isnan(jax.nn.softmax(broken["logits"])).all()
