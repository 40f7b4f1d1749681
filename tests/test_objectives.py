"""Terms find their mistakes when they are made, and objectives are the weighted means that a reader would write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kdflax import losses
from kdflax.objectives import Term, evaluate, lookup, stopped_arguments
from kdflax.training import make_mesh

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
HARD = {"logits": "student.logits", "labels": "batch.label"}
SOFT = {"student_logits": "student.logits", "teacher_logits": "teacher.logits"}
BATCH, CLASSES = 6, 3


def _context(seed=0, batch=BATCH):
  random = np.random.default_rng(seed)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  return {
    "student": {"logits": draw(batch, CLASSES), "embedding": draw(batch, 4), "features": {"stage1": draw(batch, 2)}},
    "teacher": {"logits": draw(batch, CLASSES), "embedding": draw(batch, 5)},
    "batch": {"label": random.integers(CLASSES, size=batch), "where": np.arange(batch) % 3 != 1},
  }


def _log_softmax(logits):
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _cross_entropy(context):
  log_probs = _log_softmax(np.asarray(context["student"]["logits"], np.float64))
  return -log_probs[np.arange(len(log_probs)), context["batch"]["label"]]


def _kl(context, temperature):
  log_p = _log_softmax(np.asarray(context["teacher"]["logits"], np.float64) / temperature)
  log_q = _log_softmax(np.asarray(context["student"]["logits"], np.float64) / temperature)
  return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"inputs": {**SOFT, "temprature": 4.0}}, r"kl_soft_targets has no argument \['temprature'\].*'temperature'"),
    ({"inputs": {"student_logits": "student.logits"}}, r"kl_soft_targets needs \['teacher_logits'\]"),
    ({"inputs": SOFT, "weight": -0.5}, r"weight of kl_soft_targets must be at least 0; got -0.5"),
    ({"inputs": SOFT, "weight": float("nan")}, r"must be at least 0; got nan"),
    ({"inputs": SOFT, "stop_gradient": "teacher"}, r"write \('teacher',\)"),
    (
      {"inputs": SOFT, "stop_gradient": ("techer.logits",)},
      r"names \['techer.logits'\], where none of its inputs lies",
    ),
    ({"inputs": SOFT, "stop_gradient": ("teacher", "teach")}, r"names \['teach'\]"),
    ({"inputs": SOFT, "stop_gradient": ("teacher.logits.left",)}, r"names \['teacher.logits.left'\]"),
    ({"inputs": SOFT, "examples": ("logits",)}, r"examples of kl_soft_targets must be among its inputs .*'logits'"),
  ],
)
def test_a_mistaken_term_fails_when_it_is_written(arguments, message):
  with pytest.raises(ValueError, match=message):
    Term(losses.kl_soft_targets, **arguments)


def test_a_mistake_in_a_partial_names_the_function():
  with pytest.raises(ValueError, match="kl_soft_targets has no argument"):
    Term(functools.partial(losses.kl_soft_targets, temperature=2.0), {**SOFT, "logits": "student.logits"})


def test_a_tuple_may_add_to_the_default_where_no_input_is_the_teachers():
  inputs = {"student_logits": "student.logits", "teacher_logits": "mean.logits"}
  assert Term(losses.kl_soft_targets, inputs, stop_gradient=("teacher", "mean")).stop_gradient == ("teacher", "mean")


def test_what_the_loss_has_beyond_its_names_is_allowed():
  Term(lambda student, **rest: student, {"student": "student.logits", "anything": 1})
  Term(cross_entropy, {**HARD, "where": "batch.where"})


def test_values_are_weighted_means_and_metrics_are_unweighted_sums():
  context, where = _context(), _context()["batch"]["where"]
  terms = {
    "hard": Term(cross_entropy, {**HARD, "where": "batch.where"}, 0.25),
    "soft": Term(losses.kl_soft_targets, {**SOFT, "temperature": 4.0}, 2.0),
  }
  values, metrics = evaluate(terms, context)
  hard, soft = _cross_entropy(context), _kl(context, 4.0)
  np.testing.assert_allclose(values["hard"], 0.25 * hard[where].mean(), rtol=1e-5)
  np.testing.assert_allclose(values["soft"], 2 * soft.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["hard"], (hard[where].sum(), where.sum()), rtol=1e-5)
  np.testing.assert_allclose(metrics["soft"], (soft.sum(), BATCH), rtol=1e-5)


def test_weights_and_arguments_follow_schedules_of_a_traced_step():
  context = _context()
  weight, temperature = optax.linear_schedule(0.0, 1.0, 10), optax.linear_schedule(1.0, 5.0, 4)
  terms = {"soft": Term(losses.kl_soft_targets, {**SOFT, "temperature": temperature}, weight)}
  value = jax.jit(lambda step: evaluate(terms, context, step)[0]["soft"])
  for step in (0, 2, 4, 20):
    expected = min(step / 10, 1) * _kl(context, 1 + min(step, 4)).mean()
    np.testing.assert_allclose(value(jnp.int32(step)), expected, rtol=1e-5)


def _gradients(terms, context, compiled=jax.jit):
  """Of the objective, by the floating arrays of the context."""

  def objective(models):
    return sum(evaluate(terms, {**models, "batch": context["batch"]})[0].values())

  return compiled(jax.grad(objective))({name: context[name] for name in ("student", "teacher")})


def test_the_teacher_gets_no_gradient_unless_it_is_asked_for():
  stopped = _gradients({"soft": Term(losses.kl_soft_targets, SOFT)}, _context())
  flows = _gradients({"soft": Term(losses.kl_soft_targets, SOFT, stop_gradient=())}, _context())
  assert not np.any(stopped["teacher"]["logits"])
  assert np.all(np.abs(flows["teacher"]["logits"]).sum(-1) > 0)
  np.testing.assert_array_equal(stopped["student"]["logits"], flows["student"]["logits"])


def test_a_stopped_path_covers_what_lies_below_it_and_no_longer_name():
  assert not np.any(_gradients({"t": _hint("student.features.stage1", ("student.features",))}, _context())["student"]
      ["features"]["stage1"])  # fmt: skip
  shorter = {"feat": jnp.ones((BATCH, 2)), **_context()["student"]}
  flowing = _gradients(
    {"t": _hint("student.features.stage1", ("student.feat",), "student.feat")}, _context() | {"student": shorter}
  )
  assert np.any(flowing["student"]["features"]["stage1"]) and not np.any(flowing["student"]["feat"])


@pytest.mark.parametrize(
  ("loss", "inputs", "stop", "expected"),
  [
    (losses.kl_soft_targets, {**SOFT, "teacher_logits": "mean.logits"}, ("teacher",), {"teacher_logits"}),
    (losses.hint, {"student": "teacher.a", "teacher": "student.a"}, ("teacher",), {"teacher"}),
    (losses.hint, {"student": "one.early", "teacher": "one.final"}, ("teacher",), {"teacher"}),
    (cross_entropy, {"logits": "teacher.logits", "labels": "batch.label"}, ("teacher",), set()),
    (optax.kl_divergence, {"log_predictions": "a.x", "targets": "teacher.x"}, ("teacher",), {"targets"}),
    (optax.l2_loss, {"predictions": "a.x", "targets": "params.teacher.x"}, ("teacher",), {"targets"}),
    (optax.l2_loss, {"predictions": "a.x", "targets": "params.mean.x"}, ("mean",), {"targets"}),
    (optax.l2_loss, {"predictions": "a.x", "targets": "params.a.x"}, ("a.x",), {"predictions"}),
    (losses.kl_soft_targets, SOFT, (), set()),
  ],
)
def test_a_term_says_who_its_teacher_is_and_no_name_does(loss, inputs, stop, expected):
  assert stopped_arguments(Term(loss, inputs, stop_gradient=stop)) == expected


def _hint(path, stop_gradient, teacher=None):
  teacher = jnp.zeros((BATCH, 2)) if teacher is None else teacher
  return Term(losses.hint, {"student": path, "teacher": teacher}, stop_gradient=stop_gradient)


@pytest.mark.parametrize("wrap", [lambda loss: loss, functools.partial], ids=["plain", "partial"])
def test_where_goes_to_losses_that_know_it_and_stays_away_from_optax(wrap):
  """Relations between the rows of a batch need the mask inside; Optax's `where` would mean classes."""
  context = _context()
  where = context["batch"]["where"]
  pair = {"student": "student.embedding", "teacher": "teacher.embedding", "where": "batch.where"}
  targets = {"log_predictions": "student.logits", "targets": "teacher.logits", "where": "batch.where"}
  values, metrics = evaluate(
    {"relation": Term(wrap(losses.rkd_distance), pair), "optax": Term(wrap(optax.kl_divergence), targets)}, context
  )
  kept = losses.rkd_distance(context["student"]["embedding"][where], context["teacher"]["embedding"][where])
  np.testing.assert_allclose(values["relation"], kept.mean(), rtol=1e-5)
  rows = optax.kl_divergence(context["student"]["logits"], context["teacher"]["logits"])
  np.testing.assert_allclose(values["optax"], rows[where].mean(), rtol=1e-5)
  assert float(metrics["relation"][1]) == where.sum()


def test_a_partial_that_fixes_a_hyper_parameter_is_that_loss():
  context = _context()
  terms = {"soft": Term(functools.partial(losses.kl_soft_targets, temperature=3.0), {**SOFT, "where": "batch.where"})}
  expected = _kl(context, 3.0)[context["batch"]["where"]].mean()
  np.testing.assert_allclose(evaluate(terms, context)[0]["soft"], expected, rtol=1e-5)


def test_nan_in_masked_rows_reaches_no_value_and_no_gradient():
  clean, broken = _context(), _context()
  for name in ("student", "teacher"):
    broken[name] = jax.tree.map(lambda x: np.where(broken["batch"]["where"][:, None], x, np.nan), broken[name])
  pair = {"student": "student.embedding", "teacher": "teacher.embedding", "where": "batch.where"}
  terms = {
    "soft": Term(losses.kl_soft_targets, {**SOFT, "where": "batch.where"}),
    "relation": Term(losses.rkd_distance, pair),
  }
  values, gradients = (jax.jit(functools.partial(f, terms)) for f in (evaluate, _gradients))
  jax.tree.map(np.testing.assert_array_equal, values(clean), values(broken))
  jax.tree.map(np.testing.assert_array_equal, gradients(clean), gradients(broken))
  assert np.any(gradients(broken)["student"]["embedding"])


def test_a_guarded_term_that_is_not_finite_gives_no_gradient_and_is_evaluated_once():
  context, calls = _context(), []

  def hard(logits, labels):
    calls.append(None)
    return cross_entropy(logits, labels)

  terms = {"soft": Term(losses.kl_soft_targets, SOFT), "hard": Term(hard, HARD), "spoilt": Term(_infinite, HARD)}
  total = lambda student: sum(evaluate(terms, {**context, "student": student}, guard=True)[0].values())
  gradient = jax.grad(total)(context["student"])
  assert len(calls) == 1
  # To the bit, so neither is compiled as a whole.
  expected = _gradients({name: terms[name] for name in ("soft", "hard")}, context, lambda eager: eager)["student"]
  jax.tree.map(np.testing.assert_array_equal, gradient, expected)


def _infinite(logits, labels):
  return jnp.inf * cross_entropy(logits, labels)


@pytest.mark.parametrize("filler", [np.nan, np.inf, 1e38])
def test_a_missing_number_reaches_nothing_through_a_loss_that_knows_no_mask(filler):
  where = np.array([True, False, True])
  context = {"student": {"y": jnp.array([1.0, 2.0, 4.0])}, "batch": {"y": np.array([0, filler, 1], "f"), "has": where}}
  inputs = {"predictions": "student.y", "targets": "batch.y", "where": "batch.has"}
  terms = {"regression": Term(optax.squared_error, inputs)}
  loss = lambda y: evaluate(terms, {**context, "student": {"y": y}})[0]["regression"]
  value, gradient = jax.value_and_grad(loss)(context["student"]["y"])
  assert value == (1 + 9) / 2
  np.testing.assert_array_equal(gradient, [1, 0, 3])


@pytest.mark.parametrize("filler", [-1, 999])
def test_a_missing_class_reaches_nothing_through_a_loss_that_knows_no_mask(filler):
  context = _context()
  where = context["batch"]["where"]
  broken = context | {"batch": {"label": np.where(where, context["batch"]["label"], filler), "where": where}}
  terms = {"hard": Term(cross_entropy, {**HARD, "where": "batch.where"})}
  jax.tree.map(np.testing.assert_array_equal, evaluate(terms, broken), evaluate(terms, context))
  jax.tree.map(np.testing.assert_array_equal, _gradients(terms, broken), _gradients(terms, context))


def test_only_what_counts_examples_is_masked():
  """Not a constant that happens to be as long as the batch, nor an array of another length; a mask of steps covers
  all that lies below a step."""
  where = jnp.arange(6).reshape(2, 3) % 2 == 0
  seen = {}

  def loss(steps, flags, classes, table, nested):
    seen.update(steps=steps, flags=flags, classes=classes, table=table, nested=nested)
    return steps.sum(-1)

  batch = {"steps": jnp.ones((2, 3, 4)), "flags": ~where, "table": jnp.ones((3, 3)), "where": where}
  inputs = {name: f"batch.{name}" for name in ("steps", "flags", "table", "where")}
  inputs |= {"classes": jnp.ones((2, 3)), "nested": "model.features"}
  evaluate({"t": Term(loss, inputs)}, {"batch": batch, "model": {"features": {"a": jnp.ones((2, 3))}}})
  np.testing.assert_array_equal(seen["steps"], np.where(where[..., None], np.ones((2, 3, 4)), 0))
  np.testing.assert_array_equal(seen["nested"]["a"], where)
  assert seen["flags"].dtype == bool and not seen["flags"].any()
  assert np.all(seen["classes"] == 1) and np.all(seen["table"] == 1)


def _weighted_cross_entropy(logits, labels, class_weights):
  return class_weights[labels] * cross_entropy(logits, labels)


CLASS_WEIGHTS = {**HARD, "class_weights": "batch.class_weights", "where": "batch.where"}


def _as_many_classes_as_examples():
  random = np.random.default_rng(0)
  batch = {"label": np.arange(8)[::-1].copy(), "class_weights": np.arange(1.0, 9.0, dtype=np.float32)}
  return {
    "student": {"logits": random.normal(size=(8, 8)).astype(np.float32)},
    "batch": batch | {"where": np.arange(8) % 3 != 1},
  }


@pytest.mark.parametrize("examples", [None, ("logits", "labels")], ids=["found", "named"])
def test_class_weights_as_many_as_examples_are_not_masked(examples):
  context = _as_many_classes_as_examples()
  batch, where = context["batch"], context["batch"]["where"]
  expected = (batch["class_weights"][batch["label"]] * _cross_entropy(context))[where].mean()
  broken = batch | {"label": np.where(where, batch["label"], 99)}
  terms = {"t": Term(_weighted_cross_entropy, CLASS_WEIGHTS, examples=examples)}
  for seen in (batch, broken):
    np.testing.assert_allclose(evaluate(terms, context | {"batch": seen})[0]["t"], expected, rtol=1e-5)


@pytest.mark.parametrize("classes", [8, 3])
def test_losses_that_index_rows_are_masked(classes):
  """An index past the end is no error in JAX: that a shorter array of logits fits says nothing."""

  def indexed(logits, labels, class_weights):
    chosen = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
    return -class_weights[labels] * chosen

  context = _as_many_classes_as_examples()
  where, logits = context["batch"]["where"], context["student"]["logits"][:, :classes]
  batch = context["batch"] | {"label": context["batch"]["label"] % classes}
  batch["class_weights"] = batch["class_weights"][:classes]
  expected = _cross_entropy({"student": {"logits": logits}, "batch": batch}) * batch["class_weights"][batch["label"]]
  broken = np.where(where[:, None], logits, np.nan)
  total = lambda logits: evaluate({"t": Term(indexed, CLASS_WEIGHTS)}, {"student": {"logits": logits}, "batch": batch})[
    0
  ]["t"]
  value, gradient = jax.value_and_grad(total)(broken)
  np.testing.assert_allclose(value, expected[where].mean(), rtol=1e-5)
  assert np.isfinite(gradient).all() and not np.any(gradient[~where])


def test_weights_of_examples_are_masked():
  """They must grow with the batch, as what they weigh."""
  context = _as_many_classes_as_examples()
  where = context["batch"]["where"]
  context["batch"]["weights"] = np.where(where, 2, np.nan).astype(np.float32)
  weighted = lambda logits, labels, weights: weights * cross_entropy(logits, labels)
  terms = {"t": Term(weighted, {**HARD, "weights": "batch.weights", "where": "batch.where"})}
  expected = 2 * _cross_entropy(context)[where].mean()
  np.testing.assert_allclose(evaluate(terms, context)[0]["t"], expected, rtol=1e-5)


def test_params_do_not_count_examples():
  context = _as_many_classes_as_examples()
  where, values = context["batch"]["where"], np.arange(1.0, 9.0, dtype=np.float32)
  terms = {"t": Term(lambda x, w: x * w.sum(), {"x": "batch.class_weights", "w": "params.a.w", "where": "batch.where"})}
  found = evaluate(terms, context | {"params": {"a": {"w": values}}})[0]["t"]
  np.testing.assert_allclose(found, values.sum() * values[where].mean(), rtol=1e-5)


def test_what_is_said_to_count_examples_must():
  terms = {"t": Term(_weighted_cross_entropy, CLASS_WEIGHTS, examples=("logits", "class_weights"))}
  context = _as_many_classes_as_examples()
  context["batch"]["class_weights"] = np.ones(9, np.float32)
  with pytest.raises(ValueError, match=r"class_weights counts examples.*shape of where \(8,\); got \(9,\)"):
    evaluate(terms, context)


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize(
  "weight", [0, 0.0, jnp.zeros(()), lambda step: 0.0 * step], ids=["int", "0", "array", "schedule"]
)
def test_a_weight_of_zero_is_zero_whatever_it_multiplies(weight, guard):
  """Neither 0 times inf nor 0 times the derivative of a root at 0."""
  context = _context()
  terms = {
    "soft": Term(losses.kl_soft_targets, SOFT),
    "infinite": Term(_infinite, HARD, weight),
    "root": Term(
      lambda x: jnp.sqrt(jnp.square(x - jax.lax.stop_gradient(x)).sum(-1)), {"x": SOFT["student_logits"]}, weight
    ),
  }

  def total(student, step):
    return sum(evaluate(terms, {**context, "student": student}, step, guard=guard)[0].values())

  value, gradient = jax.jit(jax.value_and_grad(total))(context["student"], jnp.float32(3))
  np.testing.assert_allclose(value, _kl(context, 1.0).mean(), rtol=1e-5)
  expected = _gradients({"soft": terms["soft"]}, context)["student"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradient, expected)


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("student.logit", r"no 'student.logit' in the context: student has \['embedding', 'features', 'logits'\]"),
    ("assistant.logits", r"the context has \['batch', 'student', 'teacher'\]"),
    ("student.logits.left", r"student.logits is an array of shape \(6, 3\)"),
  ],
)
def test_a_wrong_path_lists_what_exists_and_names_the_term(path, message):
  terms = {"soft targets": Term(losses.kl_soft_targets, {**SOFT, "student_logits": path})}
  with pytest.raises(ValueError, match=message) as caught:
    evaluate(terms, _context())
  assert caught.value.__notes__ == ["in term 'soft targets'"]


def test_a_path_may_end_at_a_dict():
  assert lookup(_context(), "student.features").keys() == {"stage1"}


def test_arrays_that_do_not_fit_name_the_term_and_both_shapes():
  context = _context()
  context["teacher"]["logits"] = np.zeros((BATCH, 5), np.float32)
  with pytest.raises(ValueError, match=r"\(6, 3\).*\(6, 5\)") as caught:
    evaluate({"soft targets": Term(losses.kl_soft_targets, SOFT)}, context)
  assert "in term 'soft targets'" in caught.value.__notes__


def test_weights_that_are_all_zero_are_refused_and_one_zero_is_not():
  zero = Term(losses.kl_soft_targets, SOFT, 0.0)
  with pytest.raises(ValueError, match=r"all weights are 0: \['a', 'b'\]"):
    evaluate({"a": zero, "b": zero}, _context())
  values, _ = evaluate({"a": zero, "b": Term(losses.kl_soft_targets, SOFT)}, _context())
  assert values["a"] == 0 < values["b"]


def test_metrics_add_up_over_uneven_batches_to_the_mean_over_all():
  """A mean of means would weigh the examples of the small batch more."""
  terms = {"hard": Term(cross_entropy, {**HARD, "where": "batch.where"}, 7.0)}
  contexts = [_context(0, 6), _context(1, 3)]
  total, count = np.sum([evaluate(terms, context)[1]["hard"] for context in contexts], axis=0)
  rows = np.concatenate([_cross_entropy(context)[context["batch"]["where"]] for context in contexts])
  np.testing.assert_allclose(total / count, rows.mean(), rtol=1e-5)
  assert count == len(rows)


def test_a_relational_objective_over_a_mapped_axis_is_that_of_one_device():
  """The relations span the devices, and so do the means, although the masks leave them unequal numbers of rows."""
  context = _context(batch=16)
  terms = {
    "relation": Term(losses.rkd_distance, {"student": "student.embedding", "teacher": "teacher.embedding",
                                           "where": "batch.where"}),
    "hard": Term(cross_entropy, {**HARD, "where": "batch.where"}, 0.5),
  }  # fmt: skip
  spread = jax.jit(
    jax.shard_map(
      lambda context: evaluate(terms, context, axis_name="data"), mesh=make_mesh(), in_specs=P("data"), out_specs=P()
    )
  )
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(compare, spread(context), evaluate(terms, context))
