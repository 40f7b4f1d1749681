"""`crd`: values, gradients and memory against a NumPy version of the paper's formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from kdflax import losses
from tests.compiled import compiled

BATCH, NEGATIVES, ROWS, WIDTH = 4, 5, 9, 3
HYPER = {"temperature": 0.3, "momentum": 0.6}


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(norms=(-1.0, -1.0), seed=0):
  """(student, teacher, indices, memory) in float64."""
  rng = np.random.default_rng(seed)
  student, teacher = unit(rng.normal(size=(2, BATCH, WIDTH)))
  own = np.array([7, 2, 0, 4])
  indices = np.stack([[i, *rng.choice(np.delete(np.arange(ROWS), i), NEGATIVES)] for i in own])
  banks = unit(rng.normal(size=(2, ROWS, WIDTH)))
  return student, teacher, indices, losses.CRDMemory(*banks, *np.array(norms))


def reference(student, teacher, indices, memory, *, temperature, momentum):
  def one_way(anchors, bank, norm):
    scores = np.array(
      [[np.exp(v @ bank[j] / temperature) for j in row] for v, row in zip(anchors, indices, strict=True)]
    )
    norm = scores.mean() * ROWS if norm < 0 else norm
    p, noise = scores / norm, NEGATIVES / ROWS
    own = -np.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
    return own - np.log(noise / (p[:, 1:] + noise + 1e-7)).sum(1), norm

  student_values, student_norm = one_way(student, memory.teacher, memory.student_norm)
  teacher_values, teacher_norm = one_way(teacher, memory.student, memory.teacher_norm)
  banks = memory.student.copy(), memory.teacher.copy()
  for bank, embeddings in zip(banks, (student, teacher), strict=True):
    for i, v in zip(indices[:, 0], embeddings, strict=True):
      bank[i] = unit(momentum * bank[i] + (1 - momentum) * v)
  return student_values + teacher_values, losses.CRDMemory(*banks, student_norm, teacher_norm)


@pytest.mark.parametrize("norms", [(-1.0, -1.0), (11.0, 8.0)], ids=["first-call", "later"])
def test_values_and_memory_match_the_formula(norms):
  inputs = make(norms)
  with jax.enable_x64(True):
    got = jax.jit(losses.crd)(*jax.tree.map(jnp.asarray, inputs), **HYPER)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(reference(*inputs, **HYPER)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9)


def test_derivatives_match_finite_differences():
  with jax.enable_x64(True):
    student, teacher, indices, memory = jax.tree.map(jnp.asarray, make((11.0, 8.0)))
    values = jax.jit(lambda s, t: losses.crd(s, t, indices, memory, **HYPER)[0])
    check_grads(values, (student, teacher), order=2, modes=["fwd", "rev"], rtol=1e-5)


def test_first_normaliser_gets_no_gradient():
  """The first call has the gradient of a later one with the same normalisers."""
  with jax.enable_x64(True):
    student, teacher, indices, memory = jax.tree.map(jnp.asarray, make())
    total = lambda s, t, memory: losses.crd(s, t, indices, memory, **HYPER)[0].sum()
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    _, after = compiled(losses.crd)(student, teacher, indices, memory, **HYPER)
    later = memory._replace(student_norm=after.student_norm, teacher_norm=after.teacher_norm)
    for a, b in zip(gradients(student, teacher, memory), gradients(student, teacher, later), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9)
    of_memory = jax.grad(lambda s: sum(jnp.sum(x) for x in losses.crd(s, teacher, indices, memory, **HYPER)[1]))
    np.testing.assert_array_equal(of_memory(student), 0)


def test_last_occurrence_in_a_batch_is_remembered():
  student, teacher, indices, memory = make()
  indices[3, 0] = indices[0, 0]
  _, after = jax.jit(losses.crd)(
    *jax.tree.map(jnp.float32, (student, teacher)), indices, jax.tree.map(jnp.float32, memory)
  )
  row = indices[0, 0]
  np.testing.assert_allclose(after.student[row], unit((memory.student[row] + student[3]) / 2), rtol=1e-5)
  np.testing.assert_allclose(after.teacher[row], unit((memory.teacher[row] + teacher[3]) / 2), rtol=1e-5)


@pytest.mark.parametrize("nowhere", [ROWS, -1])
def test_row_that_does_not_exist_gives_nan_and_is_not_written(nowhere):
  student, teacher, indices, memory = make((11.0, 8.0))
  indices[1, 0], indices[2, 3] = nowhere, nowhere
  memory = jax.tree.map(jnp.float32, memory)
  values, after = jax.jit(losses.crd)(jnp.float32(student), jnp.float32(teacher), indices, memory)
  np.testing.assert_array_equal(np.isnan(values), [False, True, True, False])
  changed = (np.asarray(after.student) != np.asarray(memory.student)).any(axis=1)
  np.testing.assert_array_equal(np.flatnonzero(changed), sorted(indices[[0, 3], 0]))


@pytest.mark.parametrize("temperature", [0.01, 0.02])
def test_small_temperatures_stay_finite(temperature):
  """`exp(1 / 0.01)` is beyond float32."""
  student, _, indices, _ = make()
  banks = [unit(np.random.default_rng(0).normal(size=(ROWS, WIDTH)))] * 2
  banks[0][indices[:, 0]] = student
  memory = losses.CRDMemory(*map(jnp.float32, banks), jnp.float32(-1), jnp.float32(-1))

  def total(student, memory):
    values, after = losses.crd(student, student, indices, memory, temperature=temperature)
    return values.sum(), after

  gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
  for _ in range(2):
    (value, memory), slope = gradient(jnp.float32(student), memory)
    assert np.isfinite(value) and np.isfinite(slope).all() and all(np.isfinite(x).all() for x in memory)


@pytest.mark.parametrize("way", ["jit", "shard_map", "pmap"])
def test_eight_devices_equal_one(way):
  """Values, gradient, normalisers and the whole memory after; one example comes twice, on two devices."""
  rng = np.random.default_rng(0)
  student, teacher = jnp.float32(unit(rng.normal(size=(2, 16, WIDTH))))
  indices = rng.integers(40, size=(16, 1 + NEGATIVES))
  indices[13, 0] = indices[2, 0]
  memory = losses.crd_memory(jax.random.key(0), 40, WIDTH)

  def mean(scale, student, teacher, indices, memory, axis_name=None):
    values, after = losses.crd(student * scale, teacher, indices, memory, axis_name=axis_name)
    return losses.masked_mean(values, None, axis_name), after

  def gradient(*arguments, axis_name=None):
    return jax.value_and_grad(functools.partial(mean, axis_name=axis_name), has_aux=True)(*arguments)

  scale = jnp.linspace(0.5, 1.5, WIDTH)
  (expected, remembered), slope = jax.jit(gradient)(scale, student, teacher, indices, memory)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  local = functools.partial(gradient, axis_name="data")
  if way == "jit":
    spread = jax.device_put((student, teacher, indices), NamedSharding(mesh, P("data")))
    (value, after), got = jax.jit(gradient)(scale, *spread, memory)
  elif way == "shard_map":
    specs = (P(), P("data"), P("data"), P("data"), P())
    step = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=((P(), P()), P()))
    (value, after), got = jax.jit(step)(scale, student, teacher, indices, memory)
  else:
    split = [x.reshape(8, 2, -1) for x in (student, teacher, indices)]
    mapped = jax.pmap(local, "data", in_axes=(None, 0, 0, 0, None))(scale, *split, memory)
    for leaf in jax.tree.leaves(mapped[0][1]):
      np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))  # every device remembers the same
    (value, after), got = jax.tree.map(lambda x: x[0], mapped)
    got = mapped[1].mean(0)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-5)
  for a, b in zip(after, remembered, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_donated_memory_is_updated_in_place():
  memory = losses.crd_memory(jax.random.key(0), 20_000, WIDTH)
  np.testing.assert_allclose(jnp.linalg.norm(memory.student, axis=-1), 1, rtol=1e-5)
  assert not np.allclose(memory.student, memory.teacher)
  student, teacher, indices, _ = make()
  student, teacher = jnp.float32(student), jnp.float32(teacher)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(student, memory):
    total = lambda student: (lambda values, after: (values.sum(), after))(
      *losses.crd(student, teacher, indices, memory)
    )
    return jax.value_and_grad(total, has_aux=True)(student)

  analysis = step.lower(student, memory).compile().memory_analysis()
  assert analysis.alias_size_in_bytes >= 2 * memory.student.nbytes
  assert analysis.temp_size_in_bytes < memory.student.nbytes / 10
  (_, after), _ = step(student, memory)
  assert memory.student.is_deleted() and after.student.shape == (20_000, WIDTH)
  assert float(after.student_norm) > 0


def test_bfloat16_embeddings_and_zero_rows_stay_finite():
  student, teacher, indices, memory = make()
  memory = jax.tree.map(jnp.float32, memory)
  student, teacher = jnp.bfloat16(student), jnp.bfloat16(np.zeros_like(teacher))
  (total, after), gradient = jax.value_and_grad(
    lambda s: (lambda values, after: (values.sum(), after))(*losses.crd(s, teacher, indices, memory)), has_aux=True
  )(student)
  assert total.dtype == jnp.float32 and np.isfinite(total) and np.isfinite(np.float32(gradient)).all()
  assert after.student.dtype == jnp.float32 and all(np.isfinite(x).all() for x in after)


def test_an_empty_batch_leaves_the_memory_as_it_is():
  student, teacher, indices, memory = jax.tree.map(jnp.asarray, make())
  values, after = losses.crd(student[:0], teacher[:0], indices[:0], memory)
  assert values.shape == (0,)
  jax.tree.map(np.testing.assert_array_equal, after, memory)


def test_mistakes_are_named():
  student, teacher, indices, memory = jax.tree.map(jnp.asarray, make())
  with pytest.raises(ValueError, match=r"student_embeddings.*teacher_embeddings.*shape"):
    losses.crd(student, teacher[:, :2], indices, memory)
  with pytest.raises(ValueError, match=r"indices must be integers.*float32"):
    losses.crd(student, teacher, indices.astype("float32"), memory)
  with pytest.raises(ValueError, match=r"student_embeddings.*indices.*batch"):
    losses.crd(student, teacher, indices[:2], memory)
  with pytest.raises(ValueError, match=r"student_embeddings.*memory.*width"):
    losses.crd(student[:, :2], teacher[:, :2], indices, memory)
  with pytest.raises(ValueError, match=r"\[batch, width\]; got shape \(4, 3, 1\)"):
    losses.crd(student[..., None], teacher[..., None], indices, memory)
  with pytest.raises(ValueError, match=r"memory must be a CRDMemory.*tuple"):
    losses.crd(student, teacher, indices, tuple(memory))
  with pytest.raises(ValueError, match="num_examples and width must be positive; got 0 and 5"):
    losses.crd_memory(jax.random.key(0), 0, 5)
