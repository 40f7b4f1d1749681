"""Connectors: shapes and names, values against the papers' formulas in NumPy, and their place in a context."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import models
from kdflax.models.deep_connectors import _nearest
from kdflax.numerics.pooling import pool_to_at_most
from kdflax.numerics.safe import l2_normalize

KEY = jax.random.key(0)
VECTORS = jax.random.normal(jax.random.key(1), (4, 6))
MAPS = jax.random.normal(jax.random.key(2), (4, 6, 6, 3))
DEEP = jax.random.normal(jax.random.key(3), (4, 3, 3, 8))
HEAD = {"kernel": jax.random.normal(jax.random.key(4), (6, 5)), "bias": jnp.arange(5.0)}

CONNECTORS = {
  "linear": (models.linear_connector("s.e", 5), VECTORS, {"output": (4, 5)}),
  "linear on a map": (models.linear_connector("s.e", 5), MAPS, {"output": (4, 6, 6, 5)}),
  "conv": (models.conv_connector("s.f", 5), MAPS, {"output": (4, 6, 6, 5)}),
  "conv regressor": (
    models.conv_connector("s.f", 5, kernel=3, stride=2, batch_norm=True, activation=jax.nn.relu),
    MAPS,
    {"output": (4, 3, 3, 5)},
  ),
  "embedding": (models.embedding_connector("s.f", 7), MAPS, {"output": (4, 7)}),
  "vid": (models.vid_connector("s.f", 5), MAPS, {"output": (4, 6, 6, 5), "variance": (5,)}),
  "temperature": (models.temperature(), {}, {"temperature": ()}),
  "paraphraser": (
    models.paraphraser("t.f", rate=0.7),
    MAPS,
    {"output": (4, 6, 6, 2), "reconstruction": (4, 6, 6, 3)},
  ),
  "translator": (models.translator("s.f", 2), MAPS, {"output": (4, 6, 6, 2)}),
  "reused head": (
    models.reused_head("s.f", HEAD, size=(4, 2)),
    MAPS,
    {"output": (4, 4, 2, 6), "embedding": (4, 6), "logits": (4, 5)},
  ),
  "review": (
    models.review_fusion(
      ("s.embedding", "s.f.stage2", "s.f.stage1"), (9, 7, 5), sizes=((1, 1), (3, 3), (8, 8)), width=4
    ),
    (VECTORS, DEEP, MAPS),
    {"features": {"embedding": (4, 9), "stage2": (4, 3, 3, 7), "stage1": (4, 8, 8, 5)}},
  ),
}


@functools.cache
def built(name):
  model, x, _ = CONNECTORS[name]
  return model, x, *jax.jit(model.init)(KEY, x)


@pytest.mark.parametrize("name", CONNECTORS)
def test_outputs_and_gradients(name):
  model, x, params, state = built(name)

  def loss(params, x):
    outputs, new = model.apply(params, state, x, train=True, key=None)
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs)), (outputs, new)

  grads, (outputs, new) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
  assert jax.tree.map(jnp.shape, outputs) == CONNECTORS[name][2]
  chex.assert_trees_all_equal_shapes_and_dtypes((grads, new), ((params, x), state))
  chex.assert_tree_all_finite((grads, outputs, new))
  assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads[1]))


@pytest.mark.parametrize("name", ["conv regressor", "vid", "temperature"])
def test_seeds_under_vmap(name):
  model, x, _, _ = built(name)
  keys = jax.random.split(KEY, 2)
  params, state = jax.vmap(model.init, in_axes=(0, None))(keys, x)
  apply = functools.partial(model.apply, train=True, key=None)
  outputs, _ = jax.vmap(apply, in_axes=(0, 0, None))(params, state, x)
  second = jax.tree.map(lambda leaf: leaf[1], (params, state, outputs))
  chex.assert_trees_all_close(apply(*second[:2], x)[0], second[2], rtol=1e-5, atol=1e-6)


def test_a_connector_names_its_place_in_the_context():
  assert models.linear_connector("student.embedding", 3).inputs == "student.embedding"
  assert CONNECTORS["review"][0].inputs == ("s.embedding", "s.f.stage2", "s.f.stage1")
  assert models.temperature().inputs == "batch"
  assert models.temperature(reversal="batch.reversal").inputs == "batch.reversal"


def test_linear_and_1x1_convolution_are_the_same_map():
  model, x, params, state = built("conv")
  outputs, _ = model.apply(params, state, x, train=False)
  (kernel, bias) = (params["layers"]["0"]["conv"][name] for name in ("kernel", "bias"))
  np.testing.assert_allclose(outputs["output"], np.asarray(x) @ np.asarray(kernel[0, 0]) + bias, rtol=1e-5, atol=1e-6)
  linear, _ = models.linear_connector("s.f", 5).apply(
    {"linear": {"kernel": kernel[0, 0], "bias": bias}}, {}, x, train=False
  )
  np.testing.assert_allclose(linear["output"], outputs["output"], rtol=1e-5, atol=1e-6)


def test_embeddings_lie_on_the_sphere():
  model, x, params, state = built("embedding")
  outputs, _ = model.apply(params, state, x, train=False)
  np.testing.assert_allclose(jnp.linalg.norm(outputs["output"], axis=-1), np.ones(4), rtol=1e-6)
  flat = np.asarray(x, np.float64).reshape(4, -1) @ np.asarray(params["linear"]["kernel"], np.float64)
  expected = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
  np.testing.assert_allclose(outputs["output"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_normalize_does_not_depend_on_the_scale(scale):
  row = jnp.array([[3.0, -4.0, 0.0]]) * scale
  np.testing.assert_allclose(l2_normalize(row), [[0.6, -0.8, 0.0]], rtol=1e-6)
  gradient = jax.grad(lambda x: l2_normalize(x)[0, 0])(row) * scale
  # (e_0 - y_0 y) / |x|, with |x| = 5 in units of the scale
  np.testing.assert_allclose(gradient, [[(1 - 0.36) / 5, 0.6 * 0.8 / 5, 0.0]], rtol=1e-5, atol=1e-8)


def test_normalize_of_zero_is_zero_without_gradient():
  rows = jnp.array([[0.0, 0.0], [1.0, 2.0]])
  value, gradient = jax.value_and_grad(lambda x: jnp.sum(l2_normalize(x)[:, 0]))(rows)
  assert jnp.isfinite(value)
  np.testing.assert_array_equal(l2_normalize(rows)[0], [0.0, 0.0])
  np.testing.assert_array_equal(gradient[0], [0.0, 0.0])
  assert jnp.all(gradient[1] != 0) and l2_normalize(rows.astype(jnp.bfloat16)).dtype == jnp.float32


def test_vid_is_three_convolutions_and_a_variance_of_five():
  model, x, params, state = built("vid")
  outputs, _ = model.apply(params, state, x, train=False)
  kernels = [np.asarray(params["layers"][i]["kernel"], np.float64) for i in "012"]
  assert models.count_parameters(params) == 3 * 5 + 5 * 5 + 5 * 5 + 5
  hidden = np.maximum(np.maximum(np.asarray(x, np.float64) @ kernels[0], 0) @ kernels[1], 0)
  np.testing.assert_allclose(outputs["output"], hidden @ kernels[2], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(outputs["variance"], np.full(5, 5.0), rtol=1e-6)
  for rho, expected in ((0.0, np.log(2) + 1e-5), (200.0, 200 + 1e-5), (-200.0, 1e-5)):
    variance = model.apply(params | {"rho": jnp.full(5, rho)}, state, x, train=False)[0]["variance"]
    np.testing.assert_allclose(variance, np.full(5, expected), rtol=1e-6)


@pytest.mark.parametrize("reversal", [0.0, 0.3, 1.0, -1.0])
def test_temperature_reverses_the_gradient_and_not_the_value(reversal):
  params, state = models.temperature().init(KEY, {})
  model, scheduled = models.temperature(reversal=reversal), models.temperature(reversal="batch.reversal")

  def fixed(params):
    return model.apply(params, state, {}, train=True, key=None)[0]["temperature"]

  def from_context(params):
    return scheduled.apply(params, state, jnp.asarray(reversal), train=True, key=None)[0]["temperature"]

  s = 1 / (1 + np.exp(-1.0))
  for function in (fixed, from_context):
    value, grads = jax.jit(jax.value_and_grad(function))(params)
    np.testing.assert_allclose(value, 1 + 20 * s, rtol=1e-6)
    np.testing.assert_allclose(grads["theta"], -reversal * 20 * s * (1 - s), rtol=1e-5)


def test_reused_head_is_the_teachers_and_stays():
  model, x, params, state = built("reused head")
  np.testing.assert_array_equal(state["head"]["kernel"], HEAD["kernel"])
  assert "head" not in params
  outputs, new = model.apply(params, state, x, train=True, key=None)
  chex.assert_trees_all_equal(new["head"], HEAD)
  embedding = np.asarray(outputs["output"]).mean((1, 2))
  np.testing.assert_allclose(outputs["embedding"], embedding, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(outputs["logits"], embedding @ HEAD["kernel"] + HEAD["bias"], rtol=1e-4, atol=1e-5)
  without = models.reused_head("s.f", {"kernel": HEAD["kernel"]})
  assert set(jax.eval_shape(without.init, KEY, x)[1]["head"]) == {"kernel"}


@pytest.mark.parametrize("size", [(4, 2), (6, 6), (1, 5), (9, 9)])
def test_pooling_averages_the_windows_of_a_larger_map(size):
  x = np.asarray(MAPS, np.float64)
  rows, columns = (min(6, m) for m in size)
  expected = np.stack(
    [
      np.stack(
        [
          x[:, i * 6 // rows : -(-(i + 1) * 6 // rows), j * 6 // columns : -(-(j + 1) * 6 // columns)].mean((1, 2))
          for j in range(columns)
        ],
        axis=1,
      )
      for i in range(rows)
    ],
    axis=1,
  )
  np.testing.assert_allclose(pool_to_at_most(MAPS, size), expected, rtol=1e-5, atol=1e-6)


def test_nearest_takes_the_position_rounded_down():
  row = jnp.arange(3.0).reshape(1, 1, 3, 1)
  np.testing.assert_array_equal(_nearest(row, (1, 6))[0, 0, :, 0], [0, 0, 1, 1, 2, 2])
  np.testing.assert_array_equal(_nearest(row, (1, 5))[0, 0, :, 0], [0, 0, 1, 1, 2])
  np.testing.assert_array_equal(_nearest(row, (2, 2))[0, :, :, 0], [[0, 1], [0, 1]])


def test_review_blends_each_level_with_the_one_below():
  """Follow the paper in NumPy; in evaluation, untrained BatchNorm only divides by sqrt(1 + 1e-5)."""
  model, x, params, state = built("review")
  outputs, _ = model.apply(params, state, x, train=False)
  to_numpy = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf, np.float64))
  levels, norm = to_numpy(params)["levels"], np.sqrt(1 + 1e-5)

  def convolve(x, kernel):
    h, w = x.shape[1:3]
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3)) / norm

  below = to_numpy(VECTORS)[:, None, None] @ levels["0"]["enter"]["conv"]["kernel"][0, 0] / norm
  deepest = convolve(below, levels["0"]["leave"]["conv"]["kernel"])
  np.testing.assert_allclose(outputs["features"]["embedding"], deepest[:, 0, 0], rtol=1e-4, atol=1e-5)
  own = to_numpy(DEEP) @ levels["1"]["enter"]["conv"]["kernel"][0, 0] / norm
  below = np.broadcast_to(below, own.shape)
  gates = np.concatenate([own, below], -1) @ levels["1"]["gates"]["kernel"] + levels["1"]["gates"]["bias"]
  gates = 1 / (1 + np.exp(-gates))
  blended = own * gates[..., :1] + below * gates[..., 1:]
  expected = convolve(blended, levels["1"]["leave"]["conv"]["kernel"])
  np.testing.assert_allclose(outputs["features"]["stage2"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("model", "x", "message"),
  [
    (models.conv_connector("s.f", 3), VECTORS, r"conv_connector\('s\.f'\) takes.*got \(4, 6\)"),
    (models.linear_connector("s.f", 3), VECTORS[0], r"linear_connector\('s\.f'\) takes.*got \(6,\)"),
    (models.embedding_connector("s.f", 3), VECTORS[0], r"got \(6,\)"),
    (models.vid_connector("s.f", 3), VECTORS, r"got \(4, 6\)"),
    (models.translator("s.f", 3), VECTORS, r"got \(4, 6\)"),
    (models.paraphraser("t.f"), VECTORS, r"got \(4, 6\)"),
    (models.paraphraser("t.f", rate=0.1), MAPS, "leaves no factor; raise it to 0.333333"),
    (models.reused_head("s.f", HEAD), VECTORS, r"got \(4, 6\)"),
    (models.review_fusion(("s.f",), (3,)), (MAPS[0],), r"'s\.f' is \(6, 6, 3\)"),
  ],
)
def test_wrong_inputs(model, x, message):
  with pytest.raises(ValueError, match=message):
    model.init(KEY, x)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: models.linear_connector("s.e", 0), "width must be at least 1"),
    (lambda: models.conv_connector("s.f", 3, stride=0), "stride must be at least 1"),
    (lambda: models.review_fusion(("a.x", "b.x"), (1, 2)), r"must differ: \('x', 'x'\)"),
    (lambda: models.review_fusion(("a.x",), (1, 2)), "one entry per path"),
    (lambda: models.reused_head("s.f", {"weight": HEAD["kernel"]}), r"needs a kernel.*weight"),
    (lambda: models.reused_head("s.f", HEAD, factor=7), "factor 7 leaves no channel"),
    (lambda: models.temperature(start=0.0), "must be positive, got 0.0"),
    (lambda: models.paraphraser("t.f", rate=0.0), "rate must be positive"),
  ],
)
def test_bad_settings(make, message):
  with pytest.raises(ValueError, match=message):
    make()
