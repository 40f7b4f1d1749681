"""From a gradient to the next state: averages, updates that are left out, and optimizers that want more or less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import balancing, losses, models, training
from kdflax.objectives import Term

NETWORK = {"student": models.mlp((3,), 2)}
BATCH = {"image": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "label": np.array([0, 1, 1, 0])}
HARD = Term(optax.softmax_cross_entropy_with_integer_labels, {"logits": "student.logits", "labels": "batch.label"})
MASKED = Term(HARD.loss, {**HARD.inputs, "where": "batch.where"})
RELATION = Term(losses.rkd_distance, {"student": "student.embedding", "teacher": "student.logits"})
MEAN = {"averages": {"mean": training.Average("student", 0.9)}}


def _point(value, dtype=jnp.float32):
  """A model of one param, which it returns for every example."""

  def apply(params, state, batch, *, train, key):
    return {"x": jnp.broadcast_to(params["x"], len(batch["goal"]))}, state

  return models.Model(lambda key, batch: ({"x": jnp.full((), value, dtype)}, {}), apply)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_averages_are_those_of_float64_whatever_the_params_are(dtype):
  """The params go from 1 to 2 at once; in bfloat16 itself, an average with decay 0.999 would stay at 1 for ever."""
  decays = {"a": 0.9, "b": 0.99, "c": 0.999, "d": 0.9999}
  network = {"point": _point(1, dtype)} | {name: _point(0, dtype) for name in decays}
  terms = {"to 2": Term(lambda x, goal: 0.5 * jnp.square(x - goal), {"x": "point.x", "goal": "batch.goal"})}
  terms |= {f"seen {name}": Term(lambda x: x, {"x": f"{name}.x"}, 0.0) for name in decays}
  averages = {name: training.Average("point", decay) for name, decay in decays.items()}
  learner = training.make_learner(network, terms, optax.sgd(1.0), averages=averages)
  batch = {"goal": jnp.full(2, 2, dtype)}
  steps = 3000

  @jax.jit
  def run(state):
    return jax.lax.scan(lambda s, _: learner.step(s, batch), state, length=steps)

  state, metrics = run(learner.init(jax.random.key(0), batch))
  for name, decay in decays.items():
    expected = 2 - float(decay) ** steps
    assert state.averages[name]["x"].dtype == jnp.float32
    np.testing.assert_allclose(state.averages[name]["x"], expected, rtol=1e-4)
    before = 2 - decay ** (steps - 1)  # what the last step saw, in the params' own dtype
    np.testing.assert_allclose(metrics[f"seen {name}"][0][-1] / 2, jnp.asarray(before, dtype).astype(float), rtol=1e-2)
  assert state.params["point"]["x"].dtype == dtype


def test_an_average_that_has_arrived_stays():
  state = training.TrainState(jnp.int32(0), {}, {}, (), (), {"mean": jnp.float32([1 / 3, 7e-5])}, jax.random.key(0))
  for decay in (0.9, 0.999, 0.9999):
    followed = training.update.followed({"mean": training.Average("a", decay)}, state, {"a": state.averages["mean"]})
    np.testing.assert_array_equal(followed["mean"], state.averages["mean"])


def _normed():
  """A network with running statistics: a NaN in a batch reaches them first."""
  return models.convnet((2,), 2)


def _images(value=0.5):
  image = np.random.default_rng(0).normal(size=(4, 4, 4, 1)).astype(np.float32)
  image[1, 2, 2, 0] = value
  return {"image": image, "label": BATCH["label"]}


@pytest.mark.parametrize("balanced", [False, True])
def test_an_update_that_is_not_finite_is_skipped_and_counted(balanced):
  """One NaN pixel: whatever training changes stays as it is, but for the number of steps."""
  network = {"student": _normed(), "mean": _normed()}
  options = {"balancer": balancing.uncertainty(optimizer=optax.adam(0.1))} if balanced else {}
  make = functools.partial(training.make_learner, network, {"hard": HARD}, optax.adam(0.1), **MEAN, **options)
  learner = make(skip_not_finite=True)
  state, step = learner.init(jax.random.key(0), _images()), jax.jit(learner.step)
  state, metrics = step(state, _images())
  assert metrics["skipped"] == (0, 1) and metrics["hard"][1] == 4
  skipped, metrics = step(state, _images(np.nan))
  assert skipped.step == 2
  assert training.digest(skipped._replace(step=state.step)) == training.digest(state)
  assert metrics.pop("skipped") == (1, 1)
  assert all(pair == (0, 0) for pair in metrics.values())
  after, metrics = step(skipped, _images())
  assert metrics["skipped"] == (0, 1)
  moved = jax.tree.map(lambda a, b: np.any(a != b), after.params, skipped.params)
  assert any(jax.tree.leaves(moved)) and all(np.isfinite(x).all() for x in jax.tree.leaves(after._replace(key=0)))


def test_a_skipped_update_is_one_of_which_something_becomes_infinite():
  """Also where the gradient is finite: the params overflow. What is infinite from the start does not count."""
  point = {"point": _point(1)}
  terms = {"far": Term(lambda x, goal: goal * x, {"x": "point.x", "goal": "batch.goal"})}
  infinite = optax.GradientTransformation(lambda params: jnp.float32(jnp.inf), lambda g, s, params=None: (g, s))
  optimizer = optax.chain(infinite, optax.sgd(1e10))
  learner = training.make_learner(point, terms, optimizer, skip_not_finite=True)
  batch = {"goal": jnp.ones(2)}
  state, step = learner.init(jax.random.key(0), batch), jax.jit(learner.step)
  for goal, skips in ((1.0, 0), (1e30, 1)):
    after, metrics = step(state, {"goal": jnp.full(2, goal)})
    assert metrics["skipped"][0] == skips
    assert (after.params["point"]["x"] == 1) == bool(skips)


def test_rows_that_take_part_show_in_the_metrics():
  """A teacher that is broken for ever is absent for ever, and says so."""
  broken = Term(lambda x, goal: x * jnp.nan * goal, {"x": "point.x", "goal": "batch.goal"})
  healthy = Term(lambda x, goal: jnp.square(x - goal), {"x": "point.x", "goal": "batch.goal"})
  terms, batch = {"broken": broken, "healthy": healthy}, {"goal": jnp.zeros(2)}
  for balancer in (balancing.from_weighting(balancing.upgrad), balancing.db_mtl(), balancing.fixed(1.0)):
    learner = training.make_learner({"point": _point(1)}, terms, optax.sgd(0.1), balancer=balancer)
    state, metrics = jax.jit(learner.step)(learner.init(jax.random.key(0), batch), batch)
    assert metrics["present/broken"] == (0, 1) and metrics["present/healthy"] == (1, 1)
    assert state.params["point"]["x"] < 1
  learner = training.make_learner({"point": _point(1)}, terms, optax.sgd(0.1))
  _, metrics = learner.step(learner.init(jax.random.key(0), batch), batch)
  assert not [name for name in metrics if name.startswith("present/")]  # without a balancer nothing is left out


@pytest.mark.parametrize(
  ("terms", "options", "named"),
  [
    ({"hard": MASKED}, {}, r"masks of the terms \['hard'\]"),
    ({"hard": HARD, "relation": RELATION}, {}, r"relations of the terms \['relation'\]"),
    ({"hard": HARD}, {"balancer": balancing.fixed(1.0)}, r"the balancer of the terms \['hard'\]"),
    ({"hard": HARD}, MEAN, r"averages \['mean'\]"),
  ],
  ids=["masks", "relations", "balancer", "averages"],
)
def test_accumulation_by_optax_is_refused_where_it_is_another_update(terms, options, named):
  network = NETWORK | ({"mean": NETWORK["student"]} if "averages" in options else {})
  batch = BATCH | {"where": np.array([True, False, True, True])}
  optimizer = optax.MultiSteps(optax.adam(0.1), 2)
  wrapped = {
    "MultiSteps": [optimizer, optax.chain(optax.clip(1.0), optimizer.gradient_transformation())],
    "apply_every": [optax.chain(optax.apply_every(2), optax.sgd(0.1))],
  }
  for name, optimizers in wrapped.items():
    for accumulating in optimizers:
      learner = training.make_learner(network, terms, accumulating, **options)
      with pytest.raises(ValueError, match=rf"optax.{name} gives another update.*{named}.*large batch.*accumulate=n"):
        learner.init(jax.random.key(0), batch)


@pytest.mark.parametrize(
  ("network", "terms", "warns"),
  [
    ({"student": models.convnet((2,), 2)}, {"hard": MASKED}, True),
    ({"student": models.convnet((2,), 2)}, {"hard": MASKED, "all": HARD}, False),
    (NETWORK, {"hard": MASKED}, False),
  ],
  ids=["padding", "missing labels", "no statistics"],
)
def test_padding_that_enters_statistics_is_warned_of(network, terms, warns, caplog):
  batch = _images() | {"where": np.array([True, True, True, False])}
  training.make_learner(network, terms, optax.sgd(0.1)).init(jax.random.key(0), batch)
  assert ("every term leaves out what batch.where masks" in caplog.text) == warns


def test_accumulation_by_optax_is_fine_for_means_over_examples():
  """Two halves of a batch are the batch; a mask that is only watched does not count."""
  watched = {"hard": HARD, "watched": Term(MASKED.loss, MASKED.inputs, 0.0)}
  batch = BATCH | {"where": np.ones(4, bool)}
  halves = [jax.tree.map(lambda x, p=part: x[p], batch) for part in (slice(2), slice(2, 4))]
  small = training.make_learner(NETWORK, watched, optax.MultiSteps(optax.sgd(0.1), 2))
  large = training.make_learner(NETWORK, watched, optax.sgd(0.1))
  state, step = small.init(jax.random.key(0), halves[0]), jax.jit(small.step)
  expected, _ = large.step(large.init(jax.random.key(0), batch), batch)
  for half in halves:
    state, _ = step(state, half)
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  jax.tree.map(compare, state.params, expected.params)


def test_an_optimizer_is_given_the_value_of_the_objective():
  """Polyak's step on 2 (x - 3)^2, a penalty of 3 x^2 and a watched Term: value over squared gradient."""
  inputs = {"x": "point.x", "goal": "batch.goal"}
  terms = {
    "near": Term(lambda x, goal: jnp.square(x - goal), inputs, 2.0),
    "watched": Term(lambda x, goal: x + goal, inputs, 0.0),
  }
  penalties = {"small": training.Penalty(lambda params: jnp.square(params["point"]["x"]), 3.0)}
  batch = {"goal": jnp.full(4, 3.0)}
  learner = training.make_learner(
    {"point": _point(1)}, terms, optax.polyak_sgd(max_learning_rate=10.0), penalties=penalties
  )
  state = learner.init(jax.random.key(0), batch)
  after, _ = jax.jit(learner.step)(state, batch)
  value, slope = 2 * 4 + 3 * 1, 2 * 2 * (1 - 3) + 3 * 2
  np.testing.assert_allclose(after.params["point"]["x"], 1 - value / slope**2 * slope, rtol=1e-5)


def test_a_rate_falls_on_a_plateau():
  terms = {"flat": Term(lambda x, goal: 0 * x + goal, {"x": "point.x", "goal": "batch.goal"})}
  optimizer = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
  learner = training.make_learner({"point": _point(1)}, terms, optimizer)
  batch = {"goal": jnp.ones(2)}
  state, step = learner.init(jax.random.key(0), batch), jax.jit(learner.step)
  for _ in range(4):
    state, _ = step(state, batch)
  assert state.opt_state[1].scale < 1


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.chain(optax.clip(1.0), optax.lbfgs())])
def test_an_optimizer_that_evaluates_the_objective_itself_is_refused_by_name(optimizer):
  learner = training.make_learner(NETWORK, {"hard": HARD}, optimizer)
  with pytest.raises(ValueError, match=r"linesearch.*value_fn.*linesearch=None"):
    learner.init(jax.random.key(0), BATCH)
  without = training.make_learner(NETWORK, {"hard": HARD}, optax.lbfgs(0.1, linesearch=None))
  without.init(jax.random.key(0), BATCH)
