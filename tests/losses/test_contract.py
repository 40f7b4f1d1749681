"""The contract of docs/contract.md, tried on every public loss."""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_jvp, check_vjp

from kdflax import losses
from tests.losses import (
  family_contrastive,
  family_divergences,
  family_features,
  family_logits,
  family_relations,
  family_sequence,
  family_similarity,
  family_targets,
)

FAMILIES = (
  family_contrastive,
  family_divergences,
  family_features,
  family_logits,
  family_relations,
  family_sequence,
  family_similarity,
  family_targets,
)
CASES = [case for family in FAMILIES for case in family.CASES]
# Public, but not a loss of this form; `crd` returns its memory as well and is tested in test_crd.py, heads are no
# examples and are tested in test_fused.py, what surrounds a loss on tokens in test_tokens.py.
NOT_PER_EXAMPLE = {
  *("masked_mean", "masked_sum", "ofd_margin", "standardize_logits", "standardized", "crd", "crd_memory"),
  *("fused_cross_entropy", "fused_distillation", "fused_divergence", "fused_linear", "normalize", "shift_labels"),
}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 1e-2}
SQUARES_BEFORE_IT_NORMALIZES = {
  "similarity_preserving",
  "attention_transfer",
  "factor_transfer",
  "inter_channel_correlation",
}
BATCH = 6


def for_each(cases):
  """Parametrizes over cases; one worker of a parallel run takes all tests of a case and compiles it once."""
  marked = [pytest.param(case, marks=pytest.mark.xdist_group(str(case))) for case in cases]
  return pytest.mark.parametrize("case", marked, ids=str)


each_case = for_each(CASES)


def rng_of(case):
  return np.random.default_rng(sum(map(ord, str(case))))


def inputs_of(case, batch=BATCH):
  return case.inputs(rng_of(case), batch)


def cast(arrays, dtype):
  return [jnp.asarray(a, dtype if a.dtype.kind == "f" else jnp.int32) for a in arrays]


def assert_close(got, expected, dtype):
  """Relative to the largest entry expected."""
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  assert got.shape == expected.shape
  np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * max(np.abs(expected).max(initial=0), 1e-30))


@functools.cache
def _loss(label):
  """The loss of a case, traced once for all programs that stand on it; hyper-parameters are traced."""
  case = next(case for case in CASES if str(case) == label)
  return jax.jit(lambda arrays, hyper, where: case.loss(*arrays, **hyper, **case.static, where=where))


@functools.cache
def _compiled(label):
  def run(arrays, hyper, where):
    floats = {i: a for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)}

    def total(floats):
      values = _loss(label)([floats.get(i, a) for i, a in enumerate(arrays)], hyper, where)
      return jnp.sum(values * jnp.cos(jnp.arange(values.size, dtype=values.dtype)).reshape(values.shape)), values

    (_, values), gradients = jax.value_and_grad(total, has_aux=True)(floats)
    return values, list(gradients.values())

  return jax.jit(run)


def run(case, arrays, where=None):
  """(values, gradients of a fixed combination of them) of the jitted loss, with traced hyper-parameters."""
  where = np.ones(len(arrays[0]), bool) if where is None else where
  values, gradients = _compiled(str(case))(list(arrays), dict(case.hyper), where)
  return np.asarray(values), [np.asarray(g) for g in gradients]


def test_every_public_loss_has_a_case():
  public = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))} - NOT_PER_EXAMPLE
  assert public == {case.loss.__name__ for case in CASES}


@each_case
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_matches_the_reference(case, dtype):
  with jax.enable_x64(dtype == "float64"):
    arrays = cast(inputs_of(case), dtype)
    values, _ = run(case, arrays)
    rounded = [np.asarray(a, np.float64 if a.dtype != jnp.int32 else np.int64) for a in arrays]
  assert values.dtype == ("float64" if dtype == "float64" else "float32")
  # Inside, everything is float32 or wider: bfloat16 inputs lose nothing beyond their own rounding.
  assert_close(values, case.reference(*rounded, **case.hyper, **case.static), dtype.replace("bfloat16", "float32"))


@for_each([case for case in CASES if not case.label])
def test_defaults_are_those_of_the_reference(case):
  """The references write them a second time, so that none can change unseen."""
  required = {name for name, p in inspect.signature(case.loss).parameters.items() if p.default is p.empty}
  hyper = {name: value for name, value in {**case.hyper, **case.static}.items() if name in required}
  with jax.enable_x64(True):
    values = case.loss(*cast(inputs_of(case), "float64"), **hyper)
  assert_close(values, case.reference(*inputs_of(case), **hyper), "float64")


@each_case
def test_derivatives_match_finite_differences(case):
  """Forward, reverse, and forward over reverse where there are second derivatives: one program for all of them."""
  with jax.enable_x64(True):
    arrays = cast(inputs_of(case), "float64")
    inputs = tuple(a for a in arrays if a.dtype != jnp.int32)

    @jax.jit
    def derivatives(inputs, tangents, cotangent):
      def loss(*floats):
        it = iter(floats)
        return _loss(str(case))([a if a.dtype == jnp.int32 else next(it) for a in arrays], dict(case.hyper), where)

      pull = lambda *floats: jax.vjp(loss, *floats)[1](cotangent)
      forward = jax.jvp(loss, inputs, tangents)
      return forward, jax.jvp(pull, inputs, tangents) if case.hessian else (pull(*inputs), None)

    where = np.ones(BATCH, bool)
    still, ones = tuple(jnp.zeros_like(a) for a in inputs), jnp.ones(BATCH)
    value = lambda *inputs: derivatives(inputs, still, ones)[0][0]
    pull = lambda inputs, cotangent: derivatives(inputs, still, cotangent)[1][0]
    check_jvp(value, lambda inputs, tangents: derivatives(inputs, tangents, ones)[0], inputs, rtol=1e-5)
    check_vjp(value, lambda *inputs: (value(*inputs), functools.partial(pull, inputs)), inputs, rtol=1e-5)
    if case.hessian:
      along = lambda inputs, tangents: derivatives(inputs, tangents, ones)[1]
      check_jvp(lambda *inputs: pull(inputs, ones), along, inputs, rtol=1e-4)


@each_case
def test_eager_equals_jit(case):
  with jax.enable_x64(True):  # whose operations the test of the defaults has compiled
    arrays = cast(inputs_of(case), "float64")
    assert_close(case.loss(*arrays, **case.hyper, **case.static), run(case, arrays)[0], "float64")


@each_case
def test_where_equals_dropping(case):
  where = np.array([True, False, True, True, False, True])
  arrays = inputs_of(case)
  poisoned = [a.copy() for a in arrays]
  for a in poisoned:
    a[~where] = np.nan if a.dtype.kind == "f" else -1
  with jax.enable_x64(True):
    values, gradients = run(case, cast(poisoned, "float64"), where)
    np.testing.assert_array_equal(values[~where], 0)
    for gradient in gradients:
      np.testing.assert_array_equal(gradient[~where], 0)
    # The combination of values in `run` weighs by position: the kept rows go first in both.
    kept = [a[where] for a in arrays]
    padded = [np.concatenate([a, p[~where]]) for a, p in zip(kept, poisoned, strict=True)]
    first = np.arange(BATCH) < where.sum()
    moved_values, moved_gradients = run(case, cast(padded, "float64"), first)
    alone_values, alone_gradients = run(case, cast(kept, "float64"))
  assert_close(values[where], moved_values[first], "float64")
  assert_close(moved_values[first], alone_values, "float64")
  for moved, alone in zip(moved_gradients, alone_gradients, strict=True):
    assert_close(moved[first], alone, "float64")
  with jax.enable_x64(True):
    nothing, gradients = run(case, cast(poisoned, "float64"), np.zeros(BATCH, bool))
  assert not nothing.any() and not any(g.any() for g in gradients)


def degenerate_inputs(case, arrays):
  """Inputs at which a careless implementation is NaN, by name; floats are changed, integers stay."""

  def changed(change, sides=(*case.students, *case.teachers)):
    return [change(a.copy()) if i in sides and a.dtype.kind == "f" else a for i, a in enumerate(arrays)]

  def first_everywhere(a):
    a[:] = a[:1]
    return a

  def duplicate(a):
    a[1] = a[0]
    return a

  def zero_row(a):
    a[2] = 0
    return a

  yield "duplicate rows", changed(duplicate)
  yield "zero rows", changed(zero_row)
  yield "a collapsed student", changed(first_everywhere, case.students)
  yield "collapsed student and teacher", changed(first_everywhere)
  yield "zeros", changed(np.zeros_like)
  yield "constant inputs", changed(np.ones_like)
  yield "a common offset of 1e3", changed(lambda a: a + 1e3)
  yield "a batch of 1", [a[:1] for a in arrays]
  yield "a batch of 2", [a[:2] for a in arrays]
  if case.kind == "logits":
    yield "large logits of 1e4", changed(lambda a: 1e4 * np.sign(a))
    yield "logits a hundred apart", changed(lambda a: 40 * a)
    opposed = -1e4 * np.sign(arrays[0]) if case.teachers else arrays[1]
    yield "opposed large logits", [1e4 * np.sign(arrays[0]), opposed, *arrays[2:]]

    def without_last_class(a):
      a[..., -1] = -np.inf
      return a

    yield "a class masked by -inf on both sides", changed(without_last_class)


def test_degenerate_inputs_are_those_of_the_methods_page():
  page = (pathlib.Path(__file__).parents[2] / "docs" / "methods.md").read_text()
  listed = " ".join(page.split("## Degenerate inputs")[1].split("\n## ")[0].split())
  logits = next(case for case in CASES if case.kind == "logits")
  names = [name for name, _ in degenerate_inputs(logits, inputs_of(logits))]
  assert len(names) == 13 and all(name in listed for name in names)


@each_case
def test_degenerate_inputs_stay_finite(case):
  for name, arrays in degenerate_inputs(case, inputs_of(case)):
    for dtype in ("float32", "bfloat16") if len(arrays[0]) == BATCH else ("float32",):
      values, gradients = run(case, cast(arrays, dtype))
      assert np.isfinite(values).all(), (name, dtype, values)
      assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients), (name, dtype)


@for_each([case for case in CASES if case.kind == "features"])
def test_scales_of_the_features(case):
  """Squares and their derivatives leave float32 long before the features do."""
  least, largest = case.scales
  for scale in (least, 1e-12, 1e-9, 1e-6, 1e6, 1e9, 1e12, largest):
    if least <= scale <= largest:
      arrays = [np.float32(scale * a) if a.dtype.kind == "f" else a for a in inputs_of(case)]
      values, gradients = run(case, cast(arrays, "float32"))
      with jax.enable_x64(True):
        exact_values, exact_gradients = run(case, cast(arrays, "float64"))
      for got, exact in zip([values, *gradients], [exact_values, *exact_gradients], strict=True):
        error = np.abs(got - exact).max()
        assert error <= 1e-4 * np.abs(exact).max(), (scale, error, np.abs(exact).max())


@for_each([case for case in CASES if case.loss.__name__ in SQUARES_BEFORE_IT_NORMALIZES])
def test_scales_of_the_features_outside_of_jit(case):
  total = lambda first, *rest: case.loss(first, *rest, **case.hyper, **case.static).sum()
  for scale in (1e-15, 1e15):
    arrays = cast([scale * a for a in inputs_of(case)], "float32")
    gradient = np.asarray(jax.grad(total)(*arrays))
    with jax.enable_x64(True):
      exact = np.asarray(jax.grad(total)(*cast(arrays, "float64")))
    assert np.abs(gradient - exact).max() <= 1e-4 * np.abs(exact).max(), scale


@each_case
def test_nan_in_an_example_is_nan_in_its_value(case):
  """A run that has diverged must be seen; a value that passes for one would hide a gradient of NaN."""
  for i, array in enumerate(inputs_of(case)):
    if array.dtype.kind == "f":
      arrays = cast(inputs_of(case), "float32")
      arrays[i] = arrays[i].at[(2, *[0] * (array.ndim - 1))].set(jnp.nan)
      assert np.isnan(run(case, arrays)[0][2]), i


@each_case
def test_an_empty_batch_has_no_values(case):
  values, gradients = jax.eval_shape(_compiled(str(case)), cast(inputs_of(case, 0), "float32"), dict(case.hyper), None)
  assert values.shape == (0,) and all(len(gradient) == 0 for gradient in gradients)


@each_case
def test_equal_student_and_teacher(case):
  if not case.zero_at_equality:
    pytest.skip("not zero by definition")
  arrays = cast(inputs_of(case), "float32")
  for student, teacher in zip(case.students, case.teachers, strict=True):
    arrays[teacher] = arrays[student]
  values, gradients = run(case, arrays)
  scale = max(1.0, *(float(jnp.abs(arrays[student]).max()) for student in case.students))
  np.testing.assert_allclose(values, 0, atol=1e-6 * scale)
  for student in case.students:
    np.testing.assert_allclose(gradients[student], 0, atol=1e-6 * scale)


PER_EXAMPLE = [case for case in CASES if case.kind == "logits" and case.hyper]


@for_each(PER_EXAMPLE)
def test_hyper_parameters_are_numbers_or_one_for_each_example(case):
  """A shape like `[batch, 1]` must not pair every example with every value and return `[batch, batch]`."""
  arrays = cast(inputs_of(case), "float32")
  each = {name: jnp.full(BATCH, value) for name, value in case.hyper.items()}
  of_each = jax.jit(lambda each: case.loss(*arrays, **each, **case.static))
  assert_close(of_each(each), run(case, arrays)[0], "float32")
  for name in case.hyper:
    for shape in ((BATCH, 1), (BATCH - 1,)):
      with pytest.raises(ValueError, match=rf"{name} must be a number or broadcast.*{BATCH},.*{shape[0]},"):
        jax.eval_shape(of_each, each | {name: jnp.ones(shape)})


@for_each(PER_EXAMPLE)
def test_a_masked_example_may_have_any_hyper_parameter(case):
  arrays, where = cast(inputs_of(case), "float32"), np.arange(BATCH) != 1
  each = {name: jnp.full(BATCH, value) for name, value in case.hyper.items()}

  @jax.jit
  def gradient(each):
    total = lambda first, each: case.loss(first, *arrays[1:], **each, **case.static, where=where).sum()
    return jax.grad(total, argnums=(0, 1))(arrays[0], each)

  got, of_each = gradient(jax.tree.map(lambda x: x.at[1].set(jnp.nan), each))
  assert_close(got, gradient(each)[0], "float32")
  for slope in of_each.values():
    assert np.isfinite(slope).all() and slope[1] == 0


@functools.cache
def _on_devices(label, pmapped):
  """{way: (mean, its gradient)} of one device and of eight."""
  case = next(case for case in CASES if str(case) == label)
  batch = 16
  arrays = cast(inputs_of(case, batch), "float32")
  where = (np.arange(batch) % 5 != 0) & (np.arange(batch) // 2 != 3)  # devices have two examples, one, or none
  scale = jnp.linspace(0.5, 1.5, arrays[0][0].size).reshape(arrays[0].shape[1:])

  def mean(scale, where, first, *rest, axis_name=None):
    values = case.loss(first * scale, *rest, **case.hyper, **case.static, where=where, axis_name=axis_name)
    return losses.masked_mean(values, where, axis_name)

  if pmapped:
    local = functools.partial(mean, axis_name="data")
    step = lambda *inputs: jax.lax.pmean(jax.value_and_grad(local)(*inputs), "data")
    split = [a.reshape(8, 2, *a.shape[1:]) for a in (where, *arrays)]
    return [x[0] for x in jax.pmap(step, "data", in_axes=(None, *[0] * len(split)))(scale, *split)]

  axes = ("host", "chip")  # the batch may be spread over several axes of a mesh
  mesh = jax.make_mesh((2, 4), axes, axis_types=(AxisType.Auto,) * 2)
  local = jax.jit(functools.partial(mean, axis_name=axes))  # traced once for both uses of shard_map
  whole = jax.jit(jax.value_and_grad(mean))
  specs = (P(), *[P(axes)] * (1 + len(arrays)))

  @jax.jit
  def spread(*inputs):
    return {
      "jit": whole(*inputs),
      "shard_map": jax.value_and_grad(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))(*inputs),
      "shard_map, gradient inside": jax.shard_map(
        jax.value_and_grad(local), mesh=mesh, in_specs=specs, out_specs=(P(), P())
      )(*inputs),
    }

  one = whole(scale, where, *arrays)
  return {"one": one} | spread(scale, *jax.device_put((where, *arrays), NamedSharding(mesh, P(axes))))


@pytest.mark.parametrize("way", ["jit", "shard_map", "shard_map, gradient inside", "pmap"])
@for_each([case for case in CASES if case.compares])
def test_eight_devices_equal_one(case, way):
  ways = _on_devices(str(case), False)
  value, gradient = _on_devices(str(case), True) if way == "pmap" else ways[way]
  assert_close(value, ways["one"][0], "float32")
  assert_close(gradient, ways["one"][1], "float32")


@each_case
def test_mistakes_are_named(case):
  arrays = cast(inputs_of(case), "float32")
  names = list(inspect.signature(case.loss).parameters)
  call = functools.partial(case.loss, **case.hyper, **case.static)
  with pytest.raises(ValueError, match=rf"(?s){names[1]}.*{arrays[0].shape[0]}.*{BATCH - 1}"):
    call(arrays[0], arrays[1][:-1], *arrays[2:])
  with pytest.raises(ValueError, match=rf"{names[0]}.*floating.*int32"):
    call(arrays[0].astype("int32"), *arrays[1:])
  with pytest.raises(ValueError, match="where must be bool"):
    call(*arrays, where=jnp.ones(BATCH + 1, bool))
  with pytest.raises(ValueError, match="where must be bool"):
    call(*arrays, where=jnp.ones(BATCH))
