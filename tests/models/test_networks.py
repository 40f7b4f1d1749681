"""The networks: outputs by name and shape, published parameter counts, numerics and mistakes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import models
from kdflax.models.layers import convolve

KEY = jax.random.key(0)


def images(*shape):
  return {"image": jax.random.normal(jax.random.key(1), shape)}


def shapes_of(model, batch):
  def run(key):
    params, state = model.init(key, batch)
    return model.apply(params, state, batch, train=True, key=key)[0]

  return jax.tree.map(lambda x: x.shape, jax.eval_shape(run, KEY))


def counted(model, batch):
  params, state = jax.eval_shape(lambda key: model.init(key, batch), KEY)
  return models.count_parameters(params), models.count_parameters(state)


def test_mlp_outputs():
  assert shapes_of(models.mlp((8, 4), 3), images(2, 5, 5, 1)) == {
    "logits": (2, 3),
    "embedding": (2, 4),
    "features": {"hidden1": (2, 8), "hidden1_pre": (2, 8), "hidden2": (2, 4), "hidden2_pre": (2, 4)},
  }
  linear = shapes_of(models.mlp((), 3), images(2, 5, 5, 1))
  assert linear == {"logits": (2, 3), "embedding": (2, 25), "features": {}}


def test_convnet_outputs():
  assert shapes_of(models.convnet((4, 6, 8), 3), images(2, 9, 8, 1)) == {
    "logits": (2, 3),
    "embedding": (2, 8),
    "features": {
      "stage1": (2, 9, 8, 4),
      "stage1_pre": (2, 9, 8, 4),
      "stage2": (2, 5, 4, 6),
      "stage2_pre": (2, 5, 4, 6),
      "stage3": (2, 3, 2, 8),
      "stage3_pre": (2, 3, 2, 8),
    },
  }


def test_a_convnet_that_does_not_pool_keeps_the_positions_of_its_last_map():
  flat = shapes_of(models.convnet((4, 6, 8), 3, pool=False), images(2, 9, 8, 1))
  assert flat["embedding"] == (2, 3 * 2 * 8) and flat["features"]["stage3"] == (2, 3, 2, 8)
  model, batch = models.convnet((2,), None, pool=False), images(1, 3, 3, 1)
  outputs, _ = model.apply(*model.init(KEY, batch), batch, train=False, key=None)
  np.testing.assert_array_equal(outputs["embedding"][0], outputs["features"]["stage1"][0].ravel())


def test_resnet_outputs():
  outputs = shapes_of(models.resnet("resnet8x4"), images(2, 32, 32, 3))
  maps = {"stem": (2, 32, 32, 32), "stage1": (2, 32, 32, 64), "stage2": (2, 16, 16, 128), "stage3": (2, 8, 8, 256)}
  assert outputs["features"] == maps | {f"{name}_pre": shape for name, shape in maps.items()}
  assert outputs["logits"] == (2, 100) and outputs["embedding"] == (2, 256)


def resnet_parameters(blocks, widths, classes):
  """Count convolutions, BatchNorm scales and biases, 1x1 shortcuts where the shape changes, and the classifier."""
  conv = lambda a, b, k: k * k * a * b + 2 * b
  total = conv(3, widths[0], 3)
  for index, (a, b) in enumerate(itertools.pairwise(widths)):
    total += conv(a, b, 3) + (2 * blocks - 1) * conv(b, b, 3)
    total += conv(a, b, 1) if index > 0 or a != b else 0
  return total + (widths[-1] + 1) * classes


@pytest.mark.parametrize(
  ("name", "published"),
  [
    ("resnet8x4", 1_233_540),
    ("resnet20", 278_324),
    ("resnet56", 861_620),
    ("resnet32x4", 7_433_860),
  ],
)
def test_resnet_parameters(name, published):
  depth, widths = models.RESNETS[name]
  assert resnet_parameters((depth - 2) // 6, widths, 100) == published
  count, statistics = counted(models.resnet(name), images(1, 32, 32, 3))
  assert count == published
  assert statistics > 0


def test_small_network_parameters():
  assert counted(models.mlp((8, 4), 3), images(1, 5, 5, 1)) == ((25 + 1) * 8 + (8 + 1) * 4 + (4 + 1) * 3, 0)
  assert counted(models.convnet((4, 6), 3), images(1, 8, 8, 2)) == (
    9 * 2 * 4 + 2 * 4 + 9 * 4 * 6 + 2 * 6 + (6 + 1) * 3,
    2 * (4 + 6),
  )


def test_features_after_the_relu_are_those_before_it_rectified():
  model = models.resnet(8, 3, widths=(2, 2, 3, 4))
  batch = images(2, 8, 8, 3)
  params, state = jax.jit(model.init)(KEY, batch)
  outputs, _ = jax.jit(lambda p, s: model.apply(p, s, batch, train=True))(params, state)
  for name in ("stem", "stage1", "stage2", "stage3"):
    before = outputs["features"][f"{name}_pre"]
    assert jnp.any(before < 0)
    np.testing.assert_array_equal(outputs["features"][name], np.maximum(before, 0))
  np.testing.assert_allclose(outputs["embedding"], outputs["features"]["stage3"].mean((1, 2)), rtol=1e-6)
  head = params["head"]
  np.testing.assert_allclose(outputs["logits"], outputs["embedding"] @ head["kernel"] + head["bias"], rtol=1e-5)


def test_a_strided_block_pads_both_sides():
  """A 3x3 window with stride 2 must start one pixel outside the image, as weights trained elsewhere expect."""
  model = models.convnet((1, 1), 2)
  batch = {"image": jnp.arange(64.0).reshape(1, 8, 8, 1)}
  params, state = model.init(KEY, batch)
  corner = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
  centre = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
  params["stages"]["0"]["conv"]["kernel"], params["stages"]["1"]["conv"]["kernel"] = centre, corner
  outputs, _ = model.apply(params, state, batch, train=False)
  expected = np.pad(np.arange(64.0).reshape(8, 8), ((1, 0), (1, 0)))[:-1:2, :-1:2]
  np.testing.assert_allclose(outputs["features"]["stage2"][0, :, :, 0], expected, rtol=1e-4)


def test_initial_scales():
  params, _ = jax.jit(models.resnet(8, 50, widths=(16, 64, 64, 64)).init)(KEY, images(1, 8, 8, 3))
  kernel = params["stages"]["1"]["0"]["second"]["conv"]["kernel"]
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.03)  # 36,864 draws: 8 standard errors
  assert np.max(np.abs(kernel)) > 3 * np.std(kernel)  # normal, not truncated
  head = params["head"]["kernel"]
  assert 0.95 / 8 < np.max(np.abs(head)) <= 1 / 8 and not np.any(params["head"]["bias"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_computes_in_it_and_keeps_float32_parameters(dtype):
  model = models.convnet((3, 4), 5, dtype=dtype)
  batch = images(4, 6, 6, 2)
  params, state = model.init(KEY, batch)
  outputs, new = model.apply(params, state, batch, train=True)
  assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
  assert {x.dtype for x in jax.tree.leaves((params, new))} == {jnp.dtype(jnp.float32)}
  full, _ = models.convnet((3, 4), 5).apply(params, state, batch, train=True)
  np.testing.assert_allclose(outputs["logits"].astype(jnp.float32), full["logits"], atol=3e-2)


def test_float64_stays():
  with jax.enable_x64(True):
    model = models.mlp((4,), 3)
    batch = {"image": jnp.ones((2, 5), jnp.float64)}
    params, state = model.init(jax.random.key(0), batch)
    outputs, _ = model.apply(jax.tree.map(lambda x: x.astype(jnp.float64), params), state, batch, train=False)
    assert outputs["logits"].dtype == jnp.float64


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: models.resnet(21), r"6 n \+ 2.*got 21"),
    (lambda: models.resnet(2), r"6 n \+ 2.*got 2"),
    (lambda: models.resnet("resnet18"), r"unknown resnet 'resnet18'; the names are resnet8, .*resnet32x4"),
    (lambda: models.resnet("resnet20", widths=(1, 2, 3, 4)), "fixes the widths"),
    (lambda: models.resnet(20, widths=(1, 2, 3)), r"four numbers.*\(1, 2, 3\)"),
    (lambda: models.resnet(20, num_classes=0), r"num_classes must be at least 1, got \(0,\)"),
    (lambda: models.mlp((4, 0)), r"hidden must be at least 1, got \(4, 0\)"),
    (lambda: models.mlp((-3,)), r"hidden must be at least 1, got \(-3,\)"),
    (lambda: models.mlp((8.0,)), r"hidden must be whole numbers, got \(8.0,\)"),
    (lambda: models.mlp((True,)), r"hidden must be whole numbers, got \(True,\)"),
    (lambda: models.task_head(3, hidden=(4, 0)), r"hidden must be at least 1, got \(4, 0\)"),
    (lambda: models.convnet((8, -1)), r"widths must be at least 1, got \(8, -1\)"),
    (lambda: models.mlp(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    (lambda: models.convnet(()), "at least one stage"),
    (lambda: models.convnet(dropout=-0.1), "dropout"),
  ],
)
def test_bad_settings(make, message):
  with pytest.raises(ValueError, match=message) as caught:
    make()
  assert not str(caught.value).endswith(".")


@pytest.mark.parametrize(
  ("model", "shape"),
  [(models.convnet(), (8, 8, 1)), (models.resnet(8), (2, 3, 8, 8, 3)), (models.mlp(), (5,))],
)
def test_wrong_rank(model, shape):
  with pytest.raises(ValueError, match=r"takes an input of shape \[batch"):
    model.init(KEY, {"image": jnp.ones(shape)})


@pytest.mark.parametrize(("channels", "stride", "size"), [(1, 1, (6, 5)), (3, 2, (7, 8)), (4, 2, (5, 5))])
def test_a_convolution_of_few_channels_is_the_convolution_that_it_replaces(channels, stride, size):
  """Value and both derivatives in float64, alone and with a kernel for each of two networks."""
  with jax.enable_x64(True):
    keys = jax.random.split(KEY, 3)
    x = jax.random.normal(keys[0], (2, 3, *size, channels), jnp.float64)
    kernel = jax.random.normal(keys[1], (2, 3, 3, channels, 2), jnp.float64)
    given = {"window_strides": (stride, stride), "padding": ((1, 1), (1, 1))}
    order = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": None}
    plain = lambda x, k: jax.lax.conv_general_dilated(x, k, **given, **order)
    ours = lambda x, k: convolve(x, k, given["window_strides"], given["padding"], **order)
    weigh = lambda f: lambda x, k: jnp.sum(jnp.sin(f(x, k)))
    for f, g in ((ours, plain), *((jax.grad(weigh(ours), i), jax.grad(weigh(plain), i)) for i in (0, 1))):
      np.testing.assert_allclose(f(x[0], kernel[0]), g(x[0], kernel[0]), rtol=1e-9, atol=1e-12)
      np.testing.assert_allclose(jax.vmap(f)(x, kernel), jax.vmap(g)(x, kernel), rtol=1e-9, atol=1e-12)


def test_kernels_of_many_networks_make_a_product_and_no_grouped_convolution():
  apply = lambda k, x: convolve(
    x, k, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=None
  )
  x, kernels = jnp.zeros((2, 5, 5, 1)), jnp.zeros((3, 3, 3, 1, 2))
  text = jax.jit(jax.vmap(apply, (0, None))).trace(kernels, x).lower(lowering_platforms=("cpu",)).as_text()
  assert "dot_general" in text and "stablehlo.convolution" not in text
