"""A batch that is worked through in parts makes the update of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import balancing, losses, models, training
from kdflax.objectives import Term

CLASSES, SIZE = 3, 16
NETWORK = {
  "student": models.mlp((4,), num_classes=CLASSES),
  "teacher": models.mlp((5,), num_classes=CLASSES),
  "mean": models.mlp((4,), num_classes=CLASSES),
  "connector": models.linear_connector("student.embedding", 5),
  "chosen": models.Model(  # a mask that a model makes
    lambda key, logits: ({}, {}), lambda p, s, logits, *, train, key: ({"where": logits[:, 0] > 0}, s), "teacher.logits"
  ),
}
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
TERMS = {
  "hard": Term(CROSS_ENTROPY, {"logits": "student.logits", "labels": "batch.label", "where": "batch.where"}),
  "soft": Term(
    losses.kl_soft_targets,
    {
      "student_logits": "student.logits",
      "teacher_logits": "teacher.logits",
      "temperature": optax.linear_schedule(1.0, 5.0, 4),
      "where": "chosen.where",
    },
    optax.linear_schedule(0.5, 1.0, 4),
  ),
  "mean": Term(losses.kl_soft_targets, {"student_logits": "student.logits", "teacher_logits": "mean.logits"}),
  "hint": Term(losses.hint, {"student": "connector.output", "teacher": "teacher.embedding"}, 2.0),
  "decay": Term(lambda kernel: 0.1 * jnp.square(kernel).sum(), {"kernel": "params.student.head.kernel"}),
  "watched": Term(training.metrics.accuracy, {"logits": "student.logits", "labels": "batch.label"}, 0.0),
}
BALANCERS = {
  "none": None,
  "losses": balancing.uncertainty(optimizer=optax.sgd(0.1)),
  "gramian": balancing.from_weighting(balancing.conflict_free),
  "combiner": balancing.db_mtl(),
}


def _batch(seed=0):
  """Masks that leave the parts unequal counts, and one part none."""
  random = np.random.default_rng(seed)
  return {
    "image": random.normal(size=(SIZE, 6)).astype(np.float32),
    "label": random.integers(CLASSES, size=SIZE),
    "where": (np.arange(SIZE) % 4 != 1) & (np.arange(SIZE) < 11),
  }


def _make(terms=TERMS, network=NETWORK, **options):
  penalties = {"small": training.Penalty(lambda params: jnp.square(params["student"]["head"]["bias"]).sum(), 0.5)}
  return training.make_learner(
    network,
    terms,
    optax.adam(0.05),
    averages={"mean": training.Average("student", optax.linear_schedule(0.5, 0.9, 2))},
    penalties=penalties,
    **options,
  )


def _assert_close(a, b, rtol=1e-5):
  compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(np.abs(np.asarray(y)).max(), 1e-6))
  jax.tree.map(compare, a, b)


@pytest.fixture(scope="module")
def frozen():
  return {"teacher": NETWORK["teacher"].init(jax.random.key(7), _batch())}


@pytest.mark.parametrize("name", BALANCERS)
def test_parts_make_the_update_of_the_whole(frozen, name):
  """Params, optimizer, balancer, averages and metrics, after two steps."""
  options = {"balancer": BALANCERS[name], "shared": None if name == "none" else "student/hidden"}
  state = _make(**options).init(jax.random.key(0), _batch(), frozen)
  ends = []
  for parts in (1, 4):
    learner = _make(accumulate=parts, **options)
    step, after = jax.jit(learner.step), state
    for seed in range(2):
      after, metrics = step(after, _batch(seed), frozen)
    ends.append((after._replace(key=0), training.metrics.means(metrics)))
  _assert_close(ends[1], ends[0], rtol=1e-4 if name == "gramian" else 2e-5)


@pytest.mark.parametrize("name", ["none", "gramian"])
def test_cached_outputs_make_the_update_of_the_whole_for_every_loss(frozen, name):
  """With relations between all examples, a Term on params, a mask that a model makes, and an output of no example."""
  pair = {"student": "student.embedding", "teacher": "teacher.embedding", "where": "batch.where"}
  pair["student"], soft = "connector.output", {"student_logits": "student.logits", "teacher_logits": "teacher.logits"}
  terms = TERMS | {
    "relation": Term(losses.rkd_distance, pair),
    "dist": Term(losses.dist, soft | {"temperature": "temperature.temperature"}),
  }
  network = NETWORK | {"temperature": models.temperature()}
  options = {"balancer": BALANCERS[name], "shared": None if name == "none" else "student/hidden"}
  state = _make(terms, network, **options).init(jax.random.key(0), _batch(), frozen)
  ends = []
  for parts in (1, 4):
    learner = _make(terms, network, accumulate=parts, cache_outputs=True, **options)
    step, after = jax.jit(learner.step), state
    for seed in range(2):
      after, metrics = step(after, _batch(seed), frozen)
    ends.append((after._replace(key=0), training.metrics.means(metrics)))
  _assert_close(ends[1], ends[0], rtol=1e-4 if name == "gramian" else 2e-5)


def test_what_is_random_is_the_same_in_both_passes():
  """A part whose dropout were drawn anew on the way back would have another gradient."""
  network = {"student": models.mlp((8,), CLASSES, dropout=0.5)}
  make = lambda cached: training.make_learner(
    network, {"hard": TERMS["hard"]}, optax.sgd(0.1), accumulate=4, cache_outputs=cached
  )
  state = make(False).init(jax.random.key(0), _batch())
  plain, cached = (jax.jit(make(cached).step)(state, _batch())[0] for cached in (False, True))
  _assert_close(cached.params, plain.params)
  assert not np.allclose(
    plain.params["student"]["hidden"]["0"]["kernel"], state.params["student"]["hidden"]["0"]["kernel"]
  )


def test_a_part_has_the_memory_of_a_part_and_only_masks_are_looked_at_beforehand(frozen):
  """Without a balancer, the pass that counts does not run what no mask depends on."""
  terms = {name: TERMS[name] for name in ("hard", "mean", "hint")}
  state = _make(terms).init(jax.random.key(0), _batch(), frozen)

  def flops(parts):
    compiled = jax.jit(_make(terms, accumulate=parts).step).lower(state, _batch(), frozen).compile()
    return compiled.as_text().count(" dot(")

  assert flops(4) == flops(1)


@pytest.mark.parametrize("parts", [2, 8])
def test_states_go_from_part_to_part(parts):
  """A counter counts the parts; what is drawn is drawn for each."""
  counter = models.Model(
    lambda key, x: ({}, {"count": jnp.int32(0), "mean": jnp.zeros(())}),
    lambda p, s, x, *, train, key: (
      {"drawn": jax.random.uniform(key, (len(x),)) if train else x[:, 0]},
      {"count": s["count"] + 1, "mean": 0.5 * s["mean"] + 0.5 * x.mean()},
    ),
    "student.logits",
  )
  network = {"student": NETWORK["student"], "counter": counter}
  drawn = Term(lambda x: jnp.square(x), {"x": "counter.drawn"}, 0.0)
  terms = {"hard": TERMS["hard"], "drawn": drawn}
  learner = training.make_learner(network, terms, optax.sgd(0.1), accumulate=parts)
  state = learner.init(jax.random.key(0), _batch())
  after, metrics = jax.jit(learner.step)(state, _batch())
  assert after.model_state["counter"]["count"] == parts
  logits = NETWORK["student"].apply(state.params["student"], {}, _batch(), train=False, key=None)[0]["logits"]
  mean = functools.reduce(lambda m, k: 0.5 * m + 0.5 * np.mean(logits[k::parts]), range(parts), 0.0)
  np.testing.assert_allclose(after.model_state["counter"]["mean"], mean, rtol=1e-5)
  assert metrics["drawn"][1] == SIZE


def test_gradients_in_half_precision_are_added_in_float32():
  """256 parts of 1 each: added in bfloat16 they would stop at 256 of 511."""
  init = lambda key, batch: ({"x": jnp.zeros((), jnp.bfloat16)}, {})
  apply = lambda params, state, batch, *, train, key: ({"x": params["x"] * batch["slope"]}, state)
  network = {"point": models.Model(init, apply)}
  terms = {"sum": Term(lambda x: x, {"x": "point.x"}, 512.0)}
  batch = {"slope": jnp.ones(512, jnp.bfloat16).at[0].set(0)}
  learner = training.make_learner(network, terms, optax.sgd(1.0), accumulate=512)
  after, _ = jax.jit(learner.step)(learner.init(jax.random.key(0), batch), batch)
  np.testing.assert_allclose(after.params["point"]["x"].astype(float), -512, rtol=1e-2)


def test_losses_that_compare_examples_are_refused_by_name():
  pair = {"student": "student.embedding", "teacher": "teacher.embedding"}
  terms = TERMS | {"relation": Term(losses.rkd_distance, pair), "dist": Term(functools.partial(losses.dist, beta=2.0),
           {"student_logits": "student.logits", "teacher_logits": "teacher.logits"})}  # fmt: skip
  with pytest.raises(ValueError, match=r"terms \['relation', 'dist'\] compare the examples.*accumulate=2"):
    _make(terms, accumulate=2)
  _make(terms, accumulate=1)
  with pytest.raises(ValueError, match=r"accumulate must be at least 1.*got 0"):
    _make(accumulate=0)


@pytest.mark.parametrize("batch", [_batch() | {"label": np.zeros(8, int)}, _batch() | {"scalar": np.float32(1)}, None])
def test_a_batch_that_does_not_split_is_refused(frozen, batch):
  learner = _make(accumulate=5 if batch is None else 4)
  with pytest.raises(ValueError, match=r"accumulate=. splits a batch by its first axis.*'image'\]\": \(16, 6\)"):
    learner.init(jax.random.key(0), batch or _batch(), frozen)


def test_parts_of_a_batch_over_eight_devices(frozen):
  """Each device works through its own part of each part."""
  mesh, batch = training.make_mesh(), _batch()
  options = {"balancer": BALANCERS["gramian"], "accumulate": 2}
  state = _make(**options).init(jax.random.key(0), batch, frozen)
  expected, _ = jax.jit(_make(**options).step)(state, batch, frozen)
  place = lambda tree: jax.device_put(tree, training.replicated(mesh))
  step = training.make_train_step(_make(**options), mesh=mesh)
  after, _ = step(place(state), training.place_batch(batch, mesh), place(frozen))
  _assert_close(after.params, expected.params, rtol=1e-4)
