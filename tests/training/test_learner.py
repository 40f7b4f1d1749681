"""The training step is the one that a reader would write by hand, whatever surrounds it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kdflax import balancing, losses, models, training
from kdflax.objectives import Term

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
CLASSES, RATE = 3, 0.5
NETWORK = {
  "student": models.mlp((4,), num_classes=CLASSES),
  "teacher": models.mlp((5,), num_classes=CLASSES),
  "connector": models.linear_connector("student.embedding", 5),
}
HARD = Term(cross_entropy, {"logits": "student.logits", "labels": "batch.label", "where": "batch.where"})
SOFT = Term(
  losses.kl_soft_targets,
  {"student_logits": "student.logits", "teacher_logits": "teacher.logits", "temperature": 2.0},
  0.5,
)
HINT = Term(losses.hint, {"student": "connector.output", "teacher": "teacher.embedding"}, 2.0)
RELATION = Term(losses.rkd_distance, {"student": "student.embedding", "teacher": "teacher.embedding"}, 3.0)
TERMS = {"hard": HARD, "soft": SOFT, "hint": HINT}
SHARED = "student/hidden"


def _batch(size=8, seed=0):
  random = np.random.default_rng(seed)
  return {
    "image": random.normal(size=(size, 6)).astype(np.float32),
    "label": random.integers(CLASSES, size=size),
    "where": np.arange(size) % 4 != 1,
  }


@pytest.fixture(scope="module")
def frozen():
  return {"teacher": NETWORK["teacher"].init(jax.random.key(7), _batch())}


@functools.cache
def _learner(**options):
  return training.make_learner(NETWORK, TERMS, optax.sgd(RATE), **options)


def _init(learner, frozen):
  return learner.init(jax.random.key(0), _batch(), frozen)


def _rows(params, batch, frozen):
  """The objective's terms, from the outputs of the models."""
  student = NETWORK["student"].apply(params["student"], {}, batch, train=True, key=jax.random.key(0))[0]
  teacher = NETWORK["teacher"].apply(*frozen["teacher"], batch, train=False, key=None)[0]
  projected = NETWORK["connector"].apply(
    params["connector"], {}, student["embedding"], train=True, key=jax.random.key(0)
  )[0]["output"]
  hard = cross_entropy(student["logits"], batch["label"])
  log_p, log_q = (jax.nn.log_softmax(outputs["logits"] / 2) for outputs in (teacher, student))
  soft = 4 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  hint = jnp.square(projected - teacher["embedding"]).mean(-1)
  hard = jnp.where(batch["where"], hard, 0).sum() / jnp.maximum(batch["where"].sum(), 1)
  return jnp.stack([hard, 0.5 * soft.mean(), 2.0 * hint.mean()])


@pytest.fixture(scope="module")
def by_hand(frozen):
  """Parameters at the start, losses [3] and gradients with a leading axis of 3."""
  params, batch = _init(_learner(), frozen).params, _batch()
  rows = lambda p: _rows(p, batch, frozen)
  return params, jax.jit(rows)(params), jax.jit(jax.jacrev(rows))(params)


def _assert_close(a, b, rtol=1e-5):
  """Relative to the largest entry of each array: gradients have entries that cancel to nearly 0."""
  compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(np.asarray(y)).max())
  jax.tree.map(compare, a, b)


def _directions(before, after):
  return jax.tree.map(lambda a, b: (a - b) / RATE, before, after)


def _weighted(jacobian, weights):
  return jax.tree.map(lambda rows: jnp.tensordot(jnp.asarray(weights), rows, 1), jacobian)


def _step(frozen, batch=None, **options):
  learner = _learner(**options)
  state = _init(learner, frozen)
  return state, *jax.jit(learner.step)(state, _batch() if batch is None else batch, frozen)


def test_one_step_of_sgd_is_the_gradient_of_the_objective(frozen, by_hand):
  _, values, jacobian = by_hand
  before, after, metrics = _step(frozen)
  assert before.params.keys() == {"student", "connector"}
  _assert_close(_directions(before.params, after.params), _weighted(jacobian, np.ones(3)))
  means = training.metrics.means(metrics)
  _assert_close([means["hard"], 0.5 * means["soft"], 2.0 * means["hint"]], list(values))
  assert metrics["hard"][1] == _batch()["where"].sum()
  assert after.step == 1


def test_a_frozen_model_is_no_part_of_the_state(frozen):
  before = jax.tree.map(np.array, frozen)
  _, after, _ = _step(frozen)
  jax.tree.map(np.testing.assert_array_equal, before, frozen)
  assert not {"teacher"} & (after.params.keys() | after.model_state.keys())


def test_averages_follow_exactly(frozen):
  """A mean teacher with a decay that changes, from the student's own parameters."""
  network = {"student": NETWORK["student"], "mean": NETWORK["student"], "copy": NETWORK["student"]}
  decay = optax.linear_schedule(0.5, 0.9, 2)
  averages = {"mean": training.Average("student", decay), "copy": training.Average("student", 0.0)}
  soft = Term(losses.kl_soft_targets, {"student_logits": "student.logits", "teacher_logits": "mean.logits"})
  learner = training.make_learner(network, {"hard": HARD, "soft": soft}, optax.sgd(RATE), averages=averages)
  state, step = learner.init(jax.random.key(0), _batch()), jax.jit(learner.step)
  expected = jax.tree.map(np.asarray, state.params["student"])
  jax.tree.map(np.testing.assert_array_equal, expected, state.averages["mean"])
  for index in range(3):
    state, _ = step(state, _batch(seed=index))
    share = min(0.5 + 0.2 * index, 0.9)
    expected = jax.tree.map(lambda a, b, d=share: d * a + (1 - d) * b, expected, state.params["student"])
  _assert_close(state.averages["mean"], expected)
  jax.tree.map(np.testing.assert_array_equal, state.averages["copy"], state.params["student"])
  assert state.params.keys() == {"student"}


def _partition(tree):
  """(shared, own) by the path, as nested dicts flattened to names."""
  flat = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in jax.tree.leaves_with_path(tree)}
  shared = {name: leaf for name, leaf in flat.items() if name.startswith(SHARED)}
  assert shared and len(shared) < len(flat)
  return shared, {name: leaf for name, leaf in flat.items() if name not in shared}


@pytest.mark.parametrize(
  ("name", "weigh_own"),
  [("fixed", True), ("fixed", False), ("conflict_free", True), ("upgrad", False), ("db_mtl", True)],
)
def test_balancers_combine_rows_as_by_hand(frozen, by_hand, name, weigh_own):
  """Shared params get the combination of the rows; others the same weights or, if asked for, the plain sum."""
  _, values, jacobian = by_hand
  shared, own = _partition(jacobian)
  if name == "fixed":
    balancer, weights = balancing.fixed(jnp.array([0.2, 3.0, 0.7])), np.array([0.2, 3.0, 0.7], np.float32)
    direction = _weighted(shared, weights)
  elif name in ("conflict_free", "upgrad"):
    weighting = getattr(balancing, name)
    balancer, weights = balancing.from_weighting(weighting), weighting(balancing.gramian(shared))
    direction = _weighted(shared, weights)
  else:
    balancer, weights = balancing.db_mtl(), np.ones(3)  # a combiner gives no weights: others get the plain sum
    logs = jax.tree.map(lambda g: g / values.reshape(3, *(1,) * (g.ndim - 1)), shared)
    norms = np.sqrt(sum(np.square(g).sum(tuple(range(1, g.ndim))) for g in jax.tree.leaves(logs)))
    direction = _weighted(logs, norms.max() / norms / 3)
  learner = training.make_learner(
    NETWORK, TERMS, optax.sgd(RATE), balancer=balancer, shared=SHARED, weigh_own=weigh_own
  )
  state = _init(learner, frozen)
  after, metrics = jax.jit(learner.step)(state, _batch(), frozen)
  moved_shared, moved_own = _partition(_directions(state.params, after.params))
  _assert_close(moved_shared, direction, rtol=1e-4)  # upgrad solves a quadratic programme in float32
  _assert_close(moved_own, _weighted(own, weights if weigh_own else np.ones(3)), rtol=1e-4)
  # The plain sum is something else.
  assert not np.allclose(direction[next(iter(direction))], _weighted(shared, np.ones(3))[next(iter(direction))])
  if name != "db_mtl":
    shown = [training.metrics.means(metrics)[f"weight/{term}"] for term in TERMS]
    np.testing.assert_allclose(shown, weights, rtol=1e-4)


def test_rows_add_terms_before_the_balancer(frozen, by_hand):
  jacobian = by_hand[2]
  rows = {"labels": ("hard",), "teacher": ("soft", "hint")}
  learner = training.make_learner(
    NETWORK, TERMS, optax.sgd(RATE), balancer=balancing.fixed(jnp.array([1.0, 0.25])), rows=rows
  )
  state = _init(learner, frozen)
  after, metrics = jax.jit(learner.step)(state, _batch(), frozen)
  _assert_close(_directions(state.params, after.params), _weighted(jacobian, np.array([1.0, 0.25, 0.25])))
  assert {"weight/labels", "weight/teacher"} <= metrics.keys() and "weight/hard" not in metrics


def test_a_row_without_examples_takes_no_part(frozen, by_hand):
  """All labels masked: the update is that of the other terms alone."""
  jacobian = by_hand[2]
  batch = _batch() | {"where": np.zeros(8, bool)}
  balancer = balancing.from_weighting(balancing.conflict_free)
  learner = training.make_learner(NETWORK, TERMS, optax.sgd(RATE), balancer=balancer)
  state = _init(learner, frozen)
  after, metrics = jax.jit(learner.step)(state, batch, frozen)
  others = jax.tree.map(lambda rows: rows[1:], jacobian)
  weights = balancing.conflict_free(balancing.gramian(others))
  _assert_close(_directions(state.params, after.params), _weighted(others, weights), rtol=1e-4)
  assert training.metrics.means(metrics)["weight/hard"] == 0


@pytest.mark.parametrize("balancer", [None, balancing.from_weighting(balancing.conflict_free), balancing.db_mtl()])
def test_what_stands_for_a_missing_label_does_not_matter(balancer):
  """NaN for a number and -1 for a class, in masked rows, give the update of any other filler: losses without a mask."""
  network = {"student": models.mlp((4,), CLASSES), "line": models.linear_connector("student.embedding", 1)}
  flat = lambda predictions, targets: optax.squared_error(predictions[:, 0], targets)
  number = {"predictions": "line.output", "targets": "batch.number", "where": "batch.where"}
  learner = training.make_learner(
    network, {"hard": HARD, "number": Term(flat, number)}, optax.sgd(RATE), balancer=balancer
  )
  batch = _batch()
  number = np.arange(8, dtype=np.float32)
  missing = batch | {
    "label": np.where(batch["where"], batch["label"], -1),
    "number": np.where(batch["where"], number, np.nan).astype(np.float32),
  }
  state, step = learner.init(jax.random.key(0), missing), jax.jit(learner.step)
  after, expected = step(state, missing), step(state, batch | {"number": number})
  jax.tree.map(np.testing.assert_array_equal, after[0].params, expected[0].params)
  jax.tree.map(np.testing.assert_array_equal, after[1], expected[1])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after[0].params))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rows": {"all": ("hard", "soft")}}, "rows must name every term once"),
    ({"averages": {"mean": training.Average("student", 0.9)}}, "average 'mean' of 'student': models are"),
    (
      {"averages": {"teacher": training.Average("student", 0.9), "connector": training.Average("teacher", 0.9)}},
      "'connector' of 'teacher', which is an average itself",
    ),
    *(
      ({"averages": {"teacher": training.Average("student", decay)}}, f"decay of average 'teacher'.*got {decay}")
      for decay in (99, -1, float("nan"))
    ),
    ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ({"batch_size": 1, "hold_gradients": False}, "batch_size=1 holds the gradients"),
  ],
)
def test_mistakes_in_the_settings_are_found_when_they_are_made(options, message):
  with pytest.raises(ValueError, match=message):
    training.make_learner(NETWORK, TERMS, optax.sgd(RATE), **options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"terms": {"hint": Term(losses.hint, {"student": "conector.output", "teacher": "teacher.embedding"})}},
      r"no 'conector.output' in the context: "
      r"the context has \['batch', 'connector', 'params', 'step', 'student', 'teacher'\]",
    ),
    (
      {"models": NETWORK | {"teacher": models.mlp((5,), num_classes=4)}},
      r"student_logits \(8, 3\), teacher_logits \(8, 4\)",
    ),
    ({"shared": "student/encoder", "balancer": balancing.db_mtl()}, "shared='student/encoder' matches none of"),
  ],
  ids=["path", "classes", "shared"],
)
def test_mistakes_are_found_before_the_first_step(options, message):
  settings = {"models": NETWORK, "terms": TERMS, "optimizer": optax.sgd(RATE)} | options
  with pytest.raises(ValueError, match=message):
    training.make_learner(**settings).init(jax.random.key(0), _batch())


def test_frozen_models_are_checked(frozen):
  with pytest.raises(ValueError, match=r"frozen \['assistant'\] are not among the models"):
    _learner().init(jax.random.key(0), _batch(), {"assistant": frozen["teacher"]})
  network = {**NETWORK, "mean": NETWORK["teacher"]}
  learner = training.make_learner(network, TERMS, optax.sgd(RATE), averages={"mean": training.Average("teacher", 0.9)})
  with pytest.raises(ValueError, match="average 'mean' of 'teacher' follows nothing"):
    learner.init(jax.random.key(0), _batch(), frozen)


def test_an_average_of_another_network_is_refused():
  learner = training.make_learner(
    NETWORK, TERMS, optax.sgd(RATE), averages={"teacher": training.Average("student", decay=0.9)}
  )
  with pytest.raises(
    ValueError, match=r"'teacher' must be the network of 'student'.*kernel'\] has shape \(5, 3\).*\(4, 3\) in the other"
  ):
    learner.init(jax.random.key(0), _batch())


@pytest.mark.parametrize("how", ["frozen", "average"])
def test_what_runs_first_reads_nothing_trained(frozen, how):
  network = {**NETWORK, "head": models.linear_connector("student.embedding", CLASSES), "copy": NETWORK["connector"]}
  averages = {"copy": training.Average("connector", 0.9)} if how == "average" else {}
  frozen = frozen | ({"head": network["head"].init(jax.random.key(3), np.ones((8, 4)))} if how == "frozen" else {})
  name = "head" if how == "frozen" else "copy"
  learner = training.make_learner(network, TERMS, optax.sgd(RATE), averages=averages)
  with pytest.raises(
    ValueError, match=rf"'{name}' is frozen or an average.*\['student.embedding'\] of a trained model"
  ):
    learner.init(jax.random.key(0), _batch(), frozen)


def test_a_step_wants_the_frozen_models_of_init(frozen):
  """Otherwise a fresh copy would be trained under the teacher's name, and the teacher ignored."""
  mutual = training.make_learner(
    NETWORK, TERMS | {"soft": dataclasses.replace(SOFT, stop_gradient=())}, optax.sgd(RATE)
  )
  with pytest.raises(ValueError, match=r"\['teacher'\] are given as frozen, but this state trains them"):
    jax.eval_shape(mutual.step, mutual.init(jax.random.key(0), _batch()), _batch(), frozen)
  learner = _learner()
  with pytest.raises(ValueError, match=r"\['teacher'\] are neither in this state nor given as frozen"):
    jax.eval_shape(learner.step, _init(learner, frozen), _batch())


BALANCERS = {
  "loss only": balancing.geometric(),
  "gramian": balancing.from_weighting(balancing.conflict_free),
  "combiner": balancing.db_mtl(),
}


@pytest.mark.parametrize("weigh_own", [True, False])
@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("filler", [np.nan, 1e38])
def test_a_loss_that_is_not_finite_is_that_of_an_absent_task(name, weigh_own, filler):
  """A regression gone wrong in one batch: the update is that of a batch without it, its own params rest."""
  network = {"student": models.mlp((4,), CLASSES), "line": models.linear_connector("student.embedding", 1)}
  flat = lambda predictions, targets: optax.squared_error(predictions[:, 0], targets)
  inputs = {"predictions": "line.output", "targets": "batch.number", "where": "batch.has_number"}
  embedding = Term(lambda x: jnp.square(x).mean(-1), {"x": "student.embedding"})
  learner = training.make_learner(
    network,
    {"hard": HARD, "number": Term(flat, inputs), "small": embedding},
    optax.sgd(RATE),
    balancer=BALANCERS[name],
    shared=SHARED,
    weigh_own=weigh_own,
  )
  numbers = {"number": np.full(8, 0.5, np.float32), "has_number": np.ones(8, bool)}
  whole = _batch() | numbers
  bad = whole | {"number": np.where(np.arange(8) == 2, filler, numbers["number"]).astype(np.float32)}
  absent = whole | {"has_number": np.zeros(8, bool)}
  state, step = learner.init(jax.random.key(0), whole), jax.jit(learner.step)
  spoilt, expected, good = (step(state, batch)[0] for batch in (bad, absent, whole))
  _assert_close(spoilt.params, expected.params, rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, spoilt.params["line"], state.params["line"])
  _assert_close(spoilt.balancer_state, expected.balancer_state)
  assert not np.allclose(*(s.params["line"]["linear"]["kernel"] for s in (good, state)))


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("weight", [0.0, optax.piecewise_constant_schedule(1.0, {1: 0.0})])
def test_a_term_of_weight_0_is_no_task_of_a_balancer(name, weight):
  """Only watched, or switched off by its schedule: the update is that of an objective without it."""
  network, count = {"student": models.mlp((4,), CLASSES)}, training.metrics.accuracy
  terms = {"hard": HARD, "small": Term(lambda x: jnp.square(x).mean(-1), {"x": "student.embedding"})}
  watch = Term(lambda logits, labels: jnp.float32(count(logits, labels)) + logits[:, 0], HARD.inputs, weight)
  updated = []
  for objective in (terms, terms | {"watch": watch}):
    learner = training.make_learner(network, objective, optax.sgd(RATE), balancer=BALANCERS[name])
    state, step = learner.init(jax.random.key(0), _batch()), jax.jit(learner.step)
    state, _ = step(state._replace(step=jnp.int32(2)), _batch())
    updated.append(state.params)
  _assert_close(updated[1], updated[0], rtol=1e-5)


def test_rows_need_not_name_what_is_only_watched():
  watch = Term(training.metrics.accuracy, HARD.inputs, 0.0)
  network = {"student": models.mlp((4,), CLASSES)}
  make = functools.partial(training.make_learner, network, {"hard": HARD, "watch": watch}, optax.sgd(RATE))
  for rows in (None, {"all": ("hard",)}, {"all": ("hard", "watch")}):
    assert len(make(rows=rows, balancer=balancing.fixed(jnp.ones(1))).init(jax.random.key(0), _batch()).params)
  with pytest.raises(ValueError, match="rows must name every term once"):
    make(rows={"all": ("watch",)})


def test_a_model_that_no_term_trains_is_refused():
  """As a teacher that was forgotten among the frozen ones: the student would learn from a random network."""
  network = NETWORK | {"idle": models.linear_connector("student.embedding", 3)}
  learner = training.make_learner(NETWORK, TERMS, optax.sgd(RATE))
  with pytest.raises(ValueError, match=r"no term trains \['teacher'\]; give init and step .* \{'teacher': \(params"):
    learner.init(jax.random.key(0), _batch())
  learner = training.make_learner(network, TERMS, optax.sgd(RATE))
  with pytest.raises(ValueError, match=r"no term trains \['teacher', 'idle'\]"):
    learner.init(jax.random.key(0), _batch())


def test_without_a_balancer_a_loss_that_is_not_finite_shows():
  learner = training.make_learner({"student": NETWORK["student"]}, {"hard": HARD}, optax.sgd(RATE))
  batch = _batch() | {"image": np.full((8, 6), np.nan, np.float32)}
  _, metrics = learner.step(learner.init(jax.random.key(0), batch), batch)
  assert np.isnan(metrics["hard"][0])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["gramian", "combiner"])
def test_rows_that_go_back_a_few_at_a_time_give_the_same_update(frozen, name, size):
  make = functools.partial(
    training.make_learner, NETWORK, TERMS, optax.sgd(RATE), balancer=BALANCERS[name], shared=SHARED
  )
  state = _init(make(), frozen)
  together, apart = make(), make(batch_size=size)
  expected, metrics = jax.jit(together.step)(state, _batch(), frozen)
  after, same = jax.jit(apart.step)(state, _batch(), frozen)
  _assert_close((after.params, same), (expected.params, metrics), rtol=1e-4)
  loops = lambda learner: str(jax.make_jaxpr(learner.step)(state, _batch(), frozen)).count("scan[")
  assert (loops(apart) > loops(together)) == (size < len(TERMS))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_are_not_held_give_the_same_update(frozen, accumulate):
  make = functools.partial(
    training.make_learner,
    NETWORK,
    TERMS,
    optax.sgd(RATE),
    balancer=BALANCERS["gramian"],
    shared=SHARED,
    accumulate=accumulate,
  )
  held, passed = make(), make(hold_gradients=False)
  state = _init(held, frozen)
  expected, metrics = jax.jit(held.step)(state, _batch(), frozen)
  after, same = jax.jit(passed.step)(state, _batch(), frozen)
  _assert_close((after.params, same), (expected.params, metrics), rtol=1e-4)


def _counting():
  """A model with a running mean, a counter and a key for state."""
  init = lambda key, x: ({}, {"mean": jnp.zeros(()), "count": jnp.int32(0), "key": key})

  def apply(params, state, x, *, train, key):
    return {"output": x}, {**state, "mean": x.mean(), "count": state["count"] + 1}

  return models.Model(init, apply, "student.logits")


def test_statistics_are_averaged_over_devices_and_counters_are_not():
  network, batch = {"student": NETWORK["student"], "counter": _counting()}, _batch(16)
  make = functools.partial(training.make_learner, network, {"hard": HARD}, optax.sgd(RATE))
  state = make().init(jax.random.key(0), batch)
  one = jax.jit(make().step)(state, batch)[0]
  spread = jax.shard_map(
    make(axis_name="data").step, mesh=training.make_mesh(), in_specs=(P(), P("data")), out_specs=P()
  )
  many = jax.jit(spread)(state, batch)[0]
  counter = many.model_state["counter"]
  assert counter["count"] == 1 and counter["count"].dtype == jnp.int32
  assert counter["key"] == one.model_state["counter"]["key"]
  np.testing.assert_allclose(counter["mean"], one.model_state["counter"]["mean"], rtol=1e-5)


def _sample(data, key, step):
  return data | {"image": data["image"] + jax.random.normal(jax.random.fold_in(key, step), data["image"].shape)}


@pytest.fixture(scope="module")
def stochastic():
  """Dropout, drawn batches and momentum: whatever may differ between two ways to run a program."""
  network = {"student": models.mlp((4,), num_classes=CLASSES, dropout=0.5), "teacher": NETWORK["teacher"]}
  return training.make_learner(network, {"hard": HARD, "relation": RELATION}, optax.adam(0.05), sample=_sample)


def test_seeds_trained_together_are_those_trained_apart(stochastic, frozen):
  keys = jax.random.split(jax.random.key(3), 3)
  together = training.Learner(jax.vmap(stochastic.init, (0, None, None)), jax.vmap(stochastic.step, (0, None, None)))
  states, step, one = jax.jit(together.init)(keys, _batch(), frozen), jax.jit(together.step), jax.jit(stochastic.step)
  apart = [stochastic.init(key, _batch(), frozen) for key in keys]
  for _ in range(2):
    states, _ = step(states, _batch(), frozen)
    apart = [one(state, _batch(), frozen)[0] for state in apart]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state.params for state in apart))
  _assert_close(states.params, stacked)
  assert not np.allclose(*jax.tree.leaves(stacked)[-1][:2])


def test_steps_in_one_call_are_those_steps(stochastic, frozen):
  init = lambda: stochastic.init(jax.random.key(1), _batch(), frozen)
  state, step, sums = init(), training.make_train_step(stochastic), None
  for _ in range(3):
    state, metrics = step(state, _batch(), frozen)
    sums = training.metrics.add(sums, metrics)
  scanned, metrics = training.make_train_step(stochastic, steps_per_call=3)(init(), _batch(), frozen)
  _assert_close(scanned.params, state.params)
  _assert_close(metrics, sums)
  assert scanned.step == 3


def test_metrics_of_many_steps_in_one_call_are_not_rounded_at_each_step():
  """Beside 2^24 a float32 has no room for a 1, but for the hundred of them that the other steps bring."""
  step = lambda state, data: (state + 1, {"seen": (jnp.where(state == 0, 2.0**24, 1.0), jnp.ones(()))})
  counting = training.Learner(init=None, step=step)
  _, metrics = training.make_train_step(counting, steps_per_call=101)(jnp.zeros((), int), None)
  np.testing.assert_array_equal(metrics["seen"], (2**24 + 100, 101))


@pytest.mark.parametrize("how", ["mesh", "shard_map"])
def test_eight_devices_are_one_device(frozen, how):
  """With relations across the batch, masks that leave devices unequal counts, and gradients combined by rows."""
  terms, batch, mesh = {"hard": HARD, "hint": HINT, "relation": RELATION}, _batch(16), training.make_mesh()
  balancer = balancing.from_weighting(balancing.conflict_free)
  make = functools.partial(training.make_learner, NETWORK, terms, optax.sgd(RATE), balancer=balancer)
  state = _init(make(), frozen)
  start = jax.tree.map(np.array, state.params)  # a donated state takes its copies on other devices with it
  expected, sums = jax.jit(make().step)(state, batch, frozen)
  if how == "mesh":
    place = lambda tree: jax.device_put(tree, training.replicated(mesh))
    step = training.make_train_step(make(), mesh=mesh)
    result, metrics = step(place(state), training.place_batch(batch, mesh), place(frozen))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(result))
  else:
    spread = jax.shard_map(make(axis_name="data").step, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
    result, metrics = jax.jit(spread)(state, batch, frozen)
  _assert_close(_directions(start, result.params), _directions(start, expected.params), rtol=1e-4)
  _assert_close(metrics, sums, rtol=1e-4)


def test_the_state_is_donated_and_survives_it(frozen):
  """Averages start at the student's params and optimizers may keep copies: no buffer may be given away twice."""
  network = {**NETWORK, "mean": NETWORK["student"]}
  optimizer = optax.chain(optax.sgd(RATE, momentum=0.9), _remembering_start())
  learner = training.make_learner(network, TERMS, optimizer, averages={"mean": training.Average("student", 0.9)})
  key = jax.random.key(0)
  state, step = learner.init(key, _batch(), frozen), training.make_train_step(learner)
  start = jax.tree.map(np.array, state.params["student"])
  for _ in range(2):
    before = state
    state, _ = step(state, _batch(), frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state, before.averages)))
  assert not key.is_deleted() and not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
  jax.tree.map(np.testing.assert_array_equal, state.opt_state[1]["student"], start)


def _remembering_start():
  return optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))


def test_evaluation_leaves_out_the_padding(frozen):
  variables = {"student": NETWORK["student"].init(jax.random.key(1), _batch())}
  evaluate = training.make_eval_step({"student": NETWORK["student"]}, {"hard": HARD})
  batch = _batch(8)
  whole = evaluate(variables, batch)["hard"]
  batch["image"][~batch["where"]] = 1e6
  np.testing.assert_allclose(evaluate(variables, batch)["hard"], whole, rtol=1e-5)
  logits = training.apply_models({"student": NETWORK["student"]}, variables, batch)["student"]["logits"]
  expected = cross_entropy(logits, batch["label"])[batch["where"]]
  np.testing.assert_allclose(whole, (expected.sum(), len(expected)), rtol=1e-5)


def test_evaluation_follows_schedules_and_models_that_change():
  """Without a step they stand where they start."""
  student = NETWORK["student"]
  clock = models.Model(lambda key, x: ({}, {}), lambda p, s, step, *, train, key: ({"now": step}, s), "step")
  variables = {"student": student.init(jax.random.key(1), _batch()), "clock": ({}, {})}
  inputs = {"logits": "student.logits", "now": "clock.now", "half": optax.linear_schedule(0.0, 5.0, 10)}
  evaluate = training.make_eval_step(
    {"student": student, "clock": clock}, {"t": Term(lambda logits, now, half: now + half + 0 * logits[:, 0], inputs)}
  )
  seen = [training.metrics.means(evaluate(variables, _batch(), *step))["t"] for step in ((), (4,), (jnp.int32(8),))]
  assert seen == [0, 6, 12]


def test_evaluation_names_the_models_that_it_lacks():
  evaluate = training.make_eval_step(NETWORK, TERMS)
  with pytest.raises(ValueError, match=r"no variables for the models \['teacher', 'connector'\].*\['student'\]"):
    evaluate({"student": NETWORK["student"].init(jax.random.key(1), _batch())}, _batch())


def test_a_term_that_trains_nothing_is_refused():
  """What it reads of trained models is all stopped, as it says; that a model is called "teacher" says nothing."""
  network = {"teacher": NETWORK["student"]}
  inputs = {"logits": "teacher.logits", "labels": "batch.label"}
  stopped, trained = (
    {"hard": Term(cross_entropy, inputs, **stop)} for stop in ({"stop_gradient": ("teacher.logits",)}, {})
  )
  with pytest.raises(ValueError, match=r"term 'hard' trains nothing.*teacher\.logits.*stop_gradient=\(\)"):
    training.make_learner(network, stopped, optax.sgd(RATE)).init(jax.random.key(0), _batch())
  training.make_learner(network, trained, optax.sgd(RATE)).init(jax.random.key(0), _batch())


def _head(model):
  return f"params.{model}.head.kernel"


def test_a_term_reads_params_by_path_with_their_gradient():
  """The student's head is drawn to the teacher's, frozen, an average, or trained beside it."""
  network = {"student": NETWORK["student"], "teacher": NETWORK["student"]}
  pull = Term(losses.hint, {"student": _head("student"), "teacher": _head("teacher")}, 3.0)
  teacher = network["teacher"].init(jax.random.key(7), _batch())
  options = {
    "frozen": ({}, {"teacher": teacher}, {}),
    "average": ({}, {}, {"averages": {"teacher": training.Average("student", 0.5)}}),
    "trained": ({"teach": dataclasses.replace(HARD, inputs=HARD.inputs | {"logits": "teacher.logits"})}, {}, {}),
  }
  for name, (more, frozen, averages) in options.items():
    moved = {}
    for pulled in ({}, {"pull": pull}):
      learner = training.make_learner(network, {"hard": HARD, **more, **pulled}, optax.sgd(RATE), **averages)
      state = learner.init(jax.random.key(0), _batch(), frozen)
      if averages:
        state = state._replace(averages=jax.tree.map(lambda x: x + 0.25, state.averages))
      after, metrics = jax.jit(learner.step)(state, _batch(), frozen)
      moved[bool(pulled)] = _directions(state.params, after.params)
    follows = {"frozen": teacher[0], "average": state.averages.get("teacher")}.get(name) or state.params["teacher"]
    kernel, goal = state.params["student"]["head"]["kernel"], follows["head"]["kernel"]
    slope = 3.0 * 2 * (kernel - goal) / kernel.size
    _assert_close(
      moved[True]["student"]["head"]["kernel"], moved[False]["student"]["head"]["kernel"] + slope, rtol=1e-4
    )
    _assert_close(metrics["pull"][0], np.square(kernel - goal).mean(-1).sum())
    if name == "trained":
      _assert_close(moved[True]["teacher"], moved[False]["teacher"])


def test_a_model_reads_params_by_path_and_evaluation_finds_them():
  """A classifier over the student's own head, with the teacher's; no model that only returns its params."""
  reuse = models.Model(
    lambda key, inputs: ({}, {}),
    lambda params, state, inputs, *, train, key: ({"logits": inputs[0] @ inputs[1]}, state),
    ("student.embedding", _head("student")),
  )
  network = {"student": NETWORK["student"], "reuse": reuse}
  terms = {"hard": dataclasses.replace(HARD, inputs=HARD.inputs | {"logits": "reuse.logits"})}
  learner = training.make_learner(network, terms, optax.sgd(RATE))
  state = learner.init(jax.random.key(0), _batch())
  after, _ = jax.jit(learner.step)(state, _batch())
  assert np.any(after.params["student"]["head"]["kernel"] != state.params["student"]["head"]["kernel"])
  variables = {name: (after.params[name], after.model_state[name]) for name in network}
  said = training.apply_models(network, variables, _batch())
  head = after.params["student"]["head"]
  _assert_close(said["reuse"]["logits"] + head["bias"], said["student"]["logits"])
  frozen = {"reuse": ({}, {})}
  with pytest.raises(ValueError, match=r"'reuse' is frozen.*'params.student.head.kernel'\] of a trained model"):
    learner.init(jax.random.key(0), _batch(), frozen)


@pytest.mark.parametrize("name", ["batch", "step", "params", "a.b"])
def test_a_model_has_a_name_that_a_path_can_hold(name):
  with pytest.raises(ValueError, match=f"'{name}' cannot be the name of a model"):
    training.make_learner({name: NETWORK["student"]}, {"hard": HARD}, optax.sgd(RATE))


def test_the_old_name_makes_the_same_learner_and_says_so():
  with pytest.warns(FutureWarning, match="make_learner"):
    old = training.learner({"student": NETWORK["student"]}, {"hard": HARD}, optax.sgd(RATE))
  state = old.init(jax.random.key(0), _batch())
  assert state.params.keys() == {"student"}
