"""Losses of vocabulary heads equal those of the logits, hold no logits of all tokens, and refuse what does not fit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from kdflax import losses
from tests.compiled import Compiled
from tests.losses import family_divergences
from tests.losses.family_logits import log_softmax

compiled_losses = Compiled(losses)
BATCH, LENGTH, CLASSES, WIDTH, OTHER = 2, 5, 11, 3, 4
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "reverse_skew_kl", "total_variation")
NUMBERS = {"temperature": 2.0, "student_soft_cap": 2.5, "teacher_soft_cap": 3.0}
SHARES = {"jensen_shannon": {"beta": 0.3}, "skew_kl": {"alpha": 0.3}, "reverse_skew_kl": {"alpha": 0.3}}


def arrays_of(seed=0, batch=BATCH, length=LENGTH, classes=CLASSES):
  rng = np.random.default_rng(seed)
  return {
    "student_hidden": rng.normal(size=(batch, length, WIDTH)),
    "student_head": rng.normal(size=(classes, WIDTH)),
    "teacher_hidden": rng.normal(size=(batch, length, OTHER)),
    "teacher_head": rng.normal(size=(classes, OTHER)),
  }


def biases_of(classes=CLASSES):
  rng = np.random.default_rng(1)
  return {"student_bias": rng.normal(size=classes), "teacher_bias": rng.normal(size=classes)}


def labels_of(batch=BATCH, length=LENGTH, classes=CLASSES):
  return np.random.default_rng(2).integers(classes, size=(batch, length))


def where_of(batch=BATCH, length=LENGTH):
  return np.arange(batch * length).reshape(batch, length) % 3 != 1


def cast(tree, dtype):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype if np.asarray(x).dtype.kind == "f" else None), tree)


def logits_of(hidden, head, bias=None, soft_cap=None, xp=np):
  logits = hidden @ head.T + (0 if bias is None else bias)
  return logits if soft_cap is None else soft_cap * xp.tanh(logits / soft_cap)


def sides_of(x, xp=np):
  names = ("hidden", "head", "bias", "soft_cap")
  return [logits_of(*(x.get(f"{side}_{name}") for name in names), xp=xp) for side in ("student", "teacher")]


def assert_close(got, expected, tolerance=1e-9):
  """Of every leaf, relative to its largest entry expected."""

  def close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(initial=0), 1e-30))

  jax.tree.map(close, got, expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_and_all_its_gradients_are_those_of_the_logits(name):
  """Every input and number is differentiated; a chunk that does not divide the tokens, a mean over those that count."""
  numbers, where = NUMBERS | SHARES.get(name, {}), where_of()
  x = arrays_of() | biases_of() | numbers

  def fused(x):
    values = losses.fused_divergence(**x, divergence=name, where=where, chunk=4)
    return losses.masked_mean(values, where), values

  def plain(x):
    hyper = {key: x[key] for key in ("temperature", *SHARES.get(name, {}))}
    values = getattr(losses, name)(*sides_of(x, jnp), **hyper, where=where)
    return losses.masked_mean(values, where), values

  with jax.enable_x64(True):
    run = jax.jit(lambda x: [jax.value_and_grad(f, has_aux=True)(x) for f in (fused, plain)])
    ((_, values), gradients), (_, expected) = run(cast(x, "float64"))
  hyper = {"temperature": 2.0} | SHARES.get(name, {})
  assert_close(values, np.where(where, getattr(family_divergences, name)(*sides_of(x), **hyper), 0))
  assert_close(gradients, expected)


def cross_entropy(logits, labels, z_loss=0.0):
  own = np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]
  largest = logits.max(-1)
  normalizer = largest + np.log(np.exp(logits - largest[..., None]).sum(-1))
  return -own + z_loss * normalizer**2


def test_cross_entropy_and_all_its_gradients_are_those_of_the_logits():
  arrays, labels, where = arrays_of(), labels_of(), where_of()
  labels[0, 0] = -100
  counted = where & (labels != -100)
  x = {"hidden": arrays["student_hidden"], "head": arrays["student_head"], "bias": biases_of()["student_bias"]}
  x |= {"soft_cap": 2.5, "z_loss": 0.1}

  def fused(x):
    values = losses.fused_cross_entropy(labels=labels, **x, ignore_index=-100, where=where, chunk=3)
    return losses.masked_mean(values, counted), values

  def plain(x):
    logits = logits_of(x["hidden"], x["head"], x["bias"], x["soft_cap"], jnp)
    log_q = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_q, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return losses.masked_mean(-own + x["z_loss"] * jax.nn.logsumexp(logits, axis=-1) ** 2, counted), ()

  with jax.enable_x64(True):
    run = jax.jit(lambda x: [jax.value_and_grad(f, has_aux=True)(x) for f in (fused, plain)])
    ((_, values), gradients), (_, expected) = run(cast(x, "float64"))
  logits = logits_of(*(x[name] for name in ("hidden", "head", "bias", "soft_cap")))
  assert_close(values, np.where(counted, cross_entropy(logits, np.maximum(labels, 0), 0.1), 0))
  assert_close(gradients, expected)


def both(x, labels, where, **options):
  return losses.fused_distillation(
    **x, labels=labels, divergence="reverse_kl", temperature=2.0, where=where, chunk=4, **options
  )


def both_apart(x, labels, where):
  soft = losses.reverse_kl(*sides_of(x, jnp), temperature=2.0, where=where)
  own = jnp.take_along_axis(jax.nn.log_softmax(sides_of(x, jnp)[0]), labels[..., None], -1)[..., 0]
  return soft, jnp.where(where, -own, 0)


@pytest.mark.parametrize("expected", [(1.0, 1.0), (0.9, 0.1), None])
def test_both_values_may_be_weighted_in_any_way(expected):
  """Right or wrong about their proportion, whatever becomes of the tokens; `None` has two gradients to put together."""
  labels, where = labels_of(), where_of()
  tokens = np.linspace(0.5, 2, BATCH * LENGTH).reshape(BATCH, LENGTH)
  weights = [(1.0, 1.0), (0.9, 0.1), (0.0, 1.0), (tokens, 1.0), (0.0, 0.0)]

  def pulled(function, x):
    values, pull = jax.vjp(function, x)
    return values, [pull(tuple(jnp.broadcast_to(w, where.shape) * 1.0 for w in pair)) for pair in weights]

  with jax.enable_x64(True):
    fused, plain = jax.jit(
      lambda x: (
        pulled(lambda x: both(x, labels, where, expected_weights=expected), x),
        pulled(lambda x: both_apart(x, labels, where), x),
      )
    )(cast(arrays_of(), "float64"))
  assert_close(fused, plain)


def test_several_cotangents_at_once_are_each_as_alone():
  """A balancer's rows: of a divergence they cost no product, even where another row takes a second pass."""
  where, x = where_of(), arrays_of()
  rows = np.stack([np.ones((BATCH, LENGTH)), 3 * where, np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)])

  def pulled(x, rows):
    student = {name: x[name] for name in ("student_hidden", "student_head")}
    function = lambda student: losses.fused_divergence(**(x | student), where=where, chunk=4)
    _, pull = jax.vjp(function, student)
    return jax.vmap(pull)(rows), [pull(row) for row in rows]

  with jax.enable_x64(True):
    together, alone = jax.jit(pulled)(cast(x, "float64"), jnp.asarray(rows, jnp.float64))
  assert_close(together, jax.tree.map(lambda *rows: jnp.stack(rows), *alone))


def test_derivatives_match_finite_differences():
  labels, where = labels_of(), where_of()
  with jax.enable_x64(True):
    x = cast(arrays_of(), "float64")
    run = jax.jit(lambda x: both(x, labels, where))
    check_grads(run, (x,), order=1, modes=["rev"], rtol=1e-5)


def test_chunks_change_no_number_and_defaults_are_those_of_the_divergences():
  with jax.enable_x64(True):
    x = cast(arrays_of(), "float64")
    fused_divergence = compiled_losses.fused_divergence
    whole = fused_divergence(**x)
    for chunk in (1, 10, 4, 1000):
      assert_close(fused_divergence(**x, chunk=chunk), whole)
    for name in DIVERGENCES:
      assert_close(fused_divergence(**x, divergence=name), getattr(compiled_losses, name)(*sides_of(x, jnp)))
    for end, name in ((0, "forward_kl"), (1.0, "reverse_kl")):
      value = fused_divergence(**x, divergence="jensen_shannon", beta=end)
      assert_close(value, getattr(compiled_losses, name)(*sides_of(x, jnp)))


def computations_of(program):
  """The text of each computation of a compiled program by its name, and the name of the first."""
  found, entry = {}, ""
  for block in re.split(r"\n(?=(?:ENTRY )?%)", program):
    if header := re.match(r"(ENTRY )?%([\w.\-]+) ", block):
      found[header[2]] = block
      entry = header[2] if header[1] else entry
  return found, entry


def products_of(program, *, second_pass=False):
  """How many matrix products a compiled program runs, each loop's counted once; `second_pass`: where it takes one."""
  found, entry = computations_of(program)
  reached, ways = [], [entry]
  while ways:
    block = found[ways.pop()]
    reached.append(block)
    for line in block.splitlines():
      called = re.findall(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)", line)
      branches = re.findall(r"branch_computations=\{([^}]*)\}", line)
      names = [name.strip().lstrip("%") for group in branches for name in group.split(",")]
      if " conditional(" in line:
        # `cond` is given its predicate as a number or a bool: the branch with more text is the second pass.
        names = sorted(names or called, key=lambda name: len(found[name]))
        called, names = [], names[-1:] if second_pass else names[:1]
      ways += called + names
  return sum(len(re.findall(r" dot\(", block)) for block in reached)


def compiled(function, *arrays, **options):
  return jax.jit(jax.value_and_grad(function, **options)).lower(*arrays).compile().as_text()


def test_a_step_holds_no_logits_of_all_tokens_and_runs_four_products():
  """48 tokens and 101 classes: no array has both; three products for a student alone, two without a gradient."""
  x = cast(arrays_of(batch=4, length=12, classes=101), "float32")
  where, labels = where_of(4, 12), labels_of(4, 12, 101)
  teacher = {name: x[name] for name in ("teacher_hidden", "teacher_head")}
  student = [x["student_hidden"], x["student_head"]]

  def soft(hidden, head, where, **options):
    values = losses.fused_divergence(hidden, head, **teacher, divergence="jensen_shannon", where=where, chunk=16)
    return losses.masked_mean(values, where)

  def soft_and_hard(hidden, head, where, expected_weights):
    pair = losses.fused_distillation(
      hidden, head, **teacher, labels=labels, where=where, chunk=16, expected_weights=expected_weights
    )
    return sum(losses.masked_mean(values, where) for values in pair)

  def hard(hidden, head, where):
    return losses.masked_mean(losses.fused_cross_entropy(hidden, head, labels, where=where, chunk=16), where)

  step = compiled(soft, *student, where, argnums=(0, 1))
  together = compiled(functools.partial(soft_and_hard, expected_weights=(1.0, 1.0)), *student, where, argnums=(0, 1))
  apart = compiled(functools.partial(soft_and_hard, expected_weights=None), *student, where, argnums=(0, 1))
  alone = compiled(hard, *student, where, argnums=(0, 1))
  frozen = compiled(soft, *student, where)
  plain = compiled(
    lambda *student: losses.forward_kl(student[0] @ student[1].T, x["teacher_hidden"] @ x["teacher_head"].T).sum(),
    *student,
    argnums=(0, 1),
  )
  of_all = r"\[(?:4,12|48|3,16),101\]|\[101,(?:4,12|48|3,16)\]"
  assert re.search(of_all, plain)
  for program in (step, together, apart, alone, frozen):
    assert not re.search(of_all, program) and re.search(r"\[16,101\]", program)
  assert [products_of(program) for program in (step, together, apart, alone, frozen)] == [4, 4, 6, 3, 3]
  assert products_of(step, second_pass=True) == 8
  values = jax.jit(soft).lower(*student, where).compile().as_text()
  assert products_of(values) == 2


def test_the_head_of_a_large_vocabulary_has_no_second_gradient():
  """Its gradient is added up by blocks of rows; a whole product beside it would be an array of the same size."""
  rng = np.random.default_rng(0)
  hidden, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 16), (1027, 16)))
  labels = jnp.arange(8)
  step = jax.jit(jax.value_and_grad(lambda head: losses.fused_cross_entropy(hidden, head, labels, chunk=4).sum()))
  program = step.lower(head).compile()
  assert program.memory_analysis().temp_size_in_bytes < 2.2 * head.nbytes
  plain = jax.grad(lambda head: -jax.nn.log_softmax(hidden @ head.T)[jnp.arange(8), labels].sum())
  assert_close(step(head)[1], plain(head), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_is_summed_in_float32(dtype):
  """Nearly equal heads, whose divergence a sum in bfloat16 gives as 0 or more than it is."""
  rng = np.random.default_rng(3)
  head, hidden = rng.normal(size=(300, 16)), rng.normal(size=(40, 16))
  arrays = cast([hidden, head, hidden + 0.1 * rng.normal(size=hidden.shape), head], dtype)

  def total(hidden, head, *teacher):
    values = losses.fused_divergence(hidden, head, *teacher, chunk=16)
    return values.mean(), values

  (_, values), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*arrays)
  assert values.dtype == "float32" and {gradient.dtype for gradient in gradients} == {jnp.dtype(dtype)}
  with jax.enable_x64(True):
    exact = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
    (_, expected), slopes = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*exact)
  assert_close(values, expected, 1e-5)
  assert_close(gradients, slopes, {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-5}[dtype])


def test_rows_that_only_fill_up_a_head_have_no_probability():
  """As many on either side: neither value nor gradient of the others sees them, and they get none."""
  x, labels = arrays_of(), labels_of()
  filled = x | {"student_head": np.concatenate([x["student_head"], np.ones((5, WIDTH))])}
  both_filled = filled | {"teacher_head": np.concatenate([x["teacher_head"], np.zeros((2, OTHER))])}
  with jax.enable_x64(True):
    total = lambda head, x, **more: losses.fused_divergence(**(x | {"student_head": head}), **more).sum()
    run = lambda x, **more: jax.value_and_grad(total)(x["student_head"], x, **more)
    value, gradient = run(cast(x, "float64"))
    for x, more in ((filled, {}), (both_filled, {"num_classes": CLASSES})):
      padded_value, padded = run(cast(x, "float64"), **more)
      assert_close(padded_value, value)
      assert_close(padded[:CLASSES], gradient)
      assert not padded[CLASSES:].any()
    shorter = losses.fused_divergence(**cast(both_filled, "float64"))
    assert_close(shorter, losses.forward_kl(*(z[..., : CLASSES + 2] for z in sides_of(both_filled))))
    # The cross-entropy is the student's own, over all its rows.
    _, hard = losses.fused_distillation(**cast(filled, "float64"), labels=labels)
    assert_close(hard, cross_entropy(sides_of(filled)[0], labels))


def test_masked_tokens_reach_nothing():
  where, labels = where_of(), labels_of()
  x = arrays_of()
  poisoned = {
    name: np.where(where[..., None], array, np.nan) if "hidden" in name else array for name, array in x.items()
  }
  numbers = {"temperature": np.where(where, 2.0, np.nan)}

  @jax.jit
  def run(x, labels, where):
    def total(x):
      pair = losses.fused_distillation(**x, **numbers, labels=labels, where=where, chunk=4)
      return sum(map(jnp.sum, pair)), pair

    return jax.value_and_grad(total, has_aux=True)(x)

  clean = run(cast(x, "float32"), labels, where)
  assert_close(run(cast(poisoned, "float32"), np.where(where, labels, -7), where), clean, 0)
  for values in clean[0][1]:
    assert not values[~where].any()
  nothing = run(cast(poisoned, "float32"), labels, np.zeros_like(where))
  assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))
  # One that counts is seen, and a label that does not exist as well.
  assert np.isnan(run(cast(poisoned, "float32"), labels, np.ones_like(where))[0][1][0][~where]).all()
  assert np.isnan(run(cast(x, "float32"), np.full_like(labels, CLASSES), where)[0][1][1][where]).all()
  assert losses.fused_divergence(**cast(arrays_of(length=0), "float32")).shape == (BATCH, 0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_degenerate_inputs_stay_finite_and_equal_models_are_at_0(name):
  where = np.ones((BATCH, LENGTH), bool)

  @jax.jit
  def run(x):
    total = lambda x: losses.fused_divergence(**x, divergence=name, where=where, chunk=4).sum()
    return jax.value_and_grad(total)(x)

  x = cast(arrays_of(), "float32")
  large = x | {"student_head": 1e4 * jnp.sign(x["student_head"])}
  opposed = large | {"teacher_head": -1e4 * jnp.sign(x["teacher_head"])}
  zeros = jax.tree.map(jnp.zeros_like, x)
  for found in map(run, (large, opposed, zeros, x | {"student_hidden": zeros["student_hidden"]})):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  equal = {**x, "teacher_hidden": x["student_hidden"], "teacher_head": x["student_head"]}
  value, gradient = jax.value_and_grad(lambda x: losses.fused_divergence(**x, divergence=name, chunk=4).sum())(equal)
  assert abs(float(value)) < 1e-5 and np.abs(gradient["student_head"]).max() < 1e-5


DEVICES = ("data", "model")


def spread_arguments():
  x = cast(arrays_of(batch=4, length=3, classes=16) | biases_of(16), "float32")
  on = lambda name: P("data") if name.endswith("hidden") else P("model")
  return x, {name: on(name) for name in x}, labels_of(4, 3, 16), where_of(4, 3)


def total_of(x, labels, where, rows=None, tokens=None):
  """Mean of both losses; `rows` and `tokens` are the mapped axes that the rows and the tokens are spread over."""
  options = {"divergence": "jensen_shannon", "temperature": 2.0, "z_loss": 0.1, "num_classes": 13, "chunk": 2}
  pair = losses.fused_distillation(**x, labels=labels, where=where, axis_name=rows, **options)
  return sum(losses.masked_mean(values, where, tokens) for values in pair)


@pytest.mark.parametrize("way", ["jit", "shard_map", "shard_map, gradient inside"])
def test_heads_spread_over_devices_equal_one(way):
  """Rows over the model axis, tokens over the data axis; no device gathers a head or its gradient."""
  x, specs, labels, where = spread_arguments()
  mesh = jax.make_mesh((2, 4), DEVICES, axis_types=(AxisType.Auto,) * 2)
  one = jax.jit(jax.value_and_grad(total_of))(x, labels, where)
  spread = {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in x.items()}
  labels, where = (jax.device_put(array, NamedSharding(mesh, P("data"))) for array in (labels, where))
  local = functools.partial(total_of, rows="model", tokens="data")
  inputs = (specs, P("data"), P("data"))
  if way == "jit":
    step = jax.value_and_grad(total_of)
  elif way == "shard_map":
    step = jax.value_and_grad(jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=P()))
  else:
    step = jax.shard_map(jax.value_and_grad(local), mesh=mesh, in_specs=inputs, out_specs=(P(), specs))
  program = jax.jit(step).lower(spread, labels, where).compile()
  assert_close(program(spread, labels, where), one, 1e-5)
  gathers = [line for line in program.as_text().splitlines() if re.search(r" all-gather(-start)?\(", line)]
  heads = rf"\[16,(?:{WIDTH}|{OTHER})\]|\[(?:{WIDTH}|{OTHER}),16\]"
  assert not [line for line in gathers if re.search(heads, line.split(" all-gather")[0])]


def test_forward_mode_and_second_derivatives_are_errors():
  x = cast(arrays_of(), "float32")
  total = lambda hidden: losses.fused_divergence(**(x | {"student_hidden": hidden})).sum()
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(total, (x["student_hidden"],), (x["student_hidden"],))
  with pytest.raises(NotImplementedError, match="fused heads have no second derivatives"):
    jax.grad(lambda hidden: jnp.square(jax.grad(total)(hidden)).sum())(x["student_hidden"])


def test_fused_linear_takes_functions_and_labels():
  x, labels = cast(arrays_of(), "float32"), labels_of()
  expected = losses.fused_distillation(**x, labels=labels, divergence="reverse_kl")
  assert_close(losses.fused_linear(**x, divergence=losses.reverse_kl), expected[0], 1e-6)
  assert_close(losses.fused_linear(**x, divergence="reverse_kl", labels=labels), expected, 1e-6)
  with pytest.raises(ValueError, match=r"divergence must be one of forward_kl.*got 'hint'"):
    losses.fused_linear(**x, divergence=losses.hint)


MISTAKES = {
  r"student_hidden \[..., width\] and student_head .* same width; got \(2, 5, 3\) and \(11, 4\)$": {
    "student_head": np.ones((CLASSES, OTHER))
  },
  r"teacher_head \[vocabulary, width\].*got \(2, 5, 4\) and \(4, 11\). Transpose the head": {
    "teacher_head": np.ones((OTHER, CLASSES))
  },
  r"same leading \(token\) axes; got student_hidden \(2, 5\), teacher_hidden \(2, 4\)": {
    "teacher_hidden": np.ones((BATCH, LENGTH - 1, OTHER))
  },
  r"teacher_head must have rows and a width; got \(0, 4\)": {"teacher_head": np.ones((0, OTHER))},
  r"student_bias must have one number for each row of student_head; got \(3,\) for \(11, 3\)": {
    "student_bias": np.ones(3)
  },
  r"student_hidden must be floating; got int\d+\[2, 5, 3\]": {"student_hidden": np.ones((BATCH, LENGTH, WIDTH), int)},
  r"where must be bool of the result's shape \(2, 5\)": {"where": np.ones(LENGTH, bool)},
  "temperature must be above 0; got 0": {"temperature": 0},
  "student_soft_cap must be above 0, or None for no cap; got 0.0": {"student_soft_cap": 0.0},
  r"chunk must be a whole number of tokens, at least 1, or None; got 0": {"chunk": 0},
  "alpha must be at least 0 and below 1; got 1.5": {"divergence": "skew_kl", "alpha": 1.5},
  "beta must be between 0 and 1; got -1": {"divergence": "jensen_shannon", "beta": -1},
  "divergence must be one of forward_kl, .*; got 'kl'": {"divergence": "kl"},
  r"num_classes.* must be in 1 .. 11; got 0 for student_head \(11, 3\) and teacher_head \(11, 4\)": {"num_classes": 0},
  r"expected_weights must be a number or broadcast .*\(2, 5\); got shape \(5, 2\)": {
    "expected_weights": np.ones((LENGTH, BATCH))
  },
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_before_anything_runs(message):
  with pytest.raises(ValueError, match=message):
    losses.fused_divergence(**(arrays_of() | MISTAKES[message]))


def test_labels_that_do_not_fit_are_named():
  hidden, head = arrays_of()["student_hidden"], arrays_of()["student_head"]
  labels = np.full((BATCH, LENGTH), -100)
  labels[0] = CLASSES
  with pytest.raises(ValueError, match=r"labels of shape \(2, 5\) must be in 0 .. 10; got 11. Say by ignore_index"):
    losses.fused_cross_entropy(hidden, head, labels, ignore_index=-100)
  with pytest.raises(ValueError, match=r"labels must be integers; got float"):
    losses.fused_cross_entropy(hidden, head, labels * 1.0)
  with pytest.raises(ValueError, match=r"same leading \(token\) axes; got hidden \(2, 5\), labels \(5,\)"):
    losses.fused_cross_entropy(hidden, head, labels[0])
  with pytest.raises(ValueError, match=r"hidden \[..., width\] and head .*Transpose the head"):
    losses.fused_cross_entropy(hidden, head.T, labels)
