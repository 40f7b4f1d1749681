"""The vision transformer: outputs by name, published sizes, an independent forward pass, and mistakes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import models

KEY = jax.random.key(0)
SMALL = {"patch": 2, "width": 8, "depth": 2, "heads": 2, "mlp_ratio": 2}


def images(*shape):
  return {"image": jax.random.normal(jax.random.key(1), shape)}


def made(model, batch):
  """The model's params, moved so that no norm, bias or position is what it starts as; and its outputs."""
  params, state = model.init(KEY, batch)
  params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype), params)
  return params, model.apply(params, state, batch, train=False)[0]


@pytest.mark.parametrize(
  ("width", "heads", "published"), [(192, 3, 5_717_416), (384, 6, 22_050_664), (768, 12, 86_567_656)]
)
def test_published_sizes(width, heads, published):
  """ViT-Ti/16, S/16 and B/16 for ImageNet, less the position of the class token."""
  model = models.vit(1000, patch=16, width=width, depth=12, heads=heads)
  params, state = jax.eval_shape(model.init, KEY, images(1, 224, 224, 3))
  assert models.count_parameters(params) == published - width
  assert not state


def test_forward_pass():
  """Against the equations of the paper in float64."""
  batch = images(3, 4, 6, 2)
  params, outputs = made(models.vit(5, registers=1, **SMALL), batch)
  w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  linear = lambda x, p: x @ p["kernel"] + p["bias"]
  norm = lambda x, p: (
    (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
  )
  gelu = lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  image = np.asarray(batch["image"], np.float64)
  tokens = [np.broadcast_to(token, (3, 8)) for token in w["others"]]
  for row in range(2):
    for column in range(3):
      cut = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(3, -1)
      tokens.append(linear(cut, w["patches"]) + w["positions"][row, column])
  x = np.stack(tokens, axis=1)
  behind = []
  for index in range(2):
    layer = jax.tree.map(lambda p, index=index: p[index], w["layers"])
    query, key, value = np.split(linear(norm(x, layer["attention_norm"]), layer["query_key_value"]), 3, axis=-1)
    mixed = []
    for head in (slice(0, 4), slice(4, 8)):
      scores = np.exp(np.einsum("bqd,bkd->bqk", query[..., head], key[..., head]) / 2)
      mixed.append(scores / scores.sum(-1, keepdims=True) @ value[..., head])
    x = x + linear(np.concatenate(mixed, -1), layer["mixed"])
    x = x + linear(gelu(linear(norm(x, layer["mlp_norm"]), layer["up"])), layer["down"])
    behind.append(x)
  last = norm(x, w["norm"])
  expected = {
    "embedding": last[:, 0],
    "registers": last[:, 1:2],
    "patches": last[:, 2:].reshape(3, 2, 3, 8),
    "logits": linear(last[:, 0], w["head"]),
    "features": {f"layer{n}": y[:, 2:].reshape(3, 2, 3, 8) for n, y in enumerate(behind, 1)}
    | {f"layer{n}_class": y[:, 0] for n, y in enumerate(behind, 1)},
  }
  assert jax.tree.structure(expected) == jax.tree.structure(outputs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), outputs, expected)


def test_scan_and_remat_change_no_number():
  batch = images(2, 4, 4, 1)
  plain = models.vit(3, **SMALL)
  params, _ = made(plain, batch)

  def gradient(model):
    loss = lambda p: model.apply(p, {}, batch, train=False)[0]["logits"].var()
    return jax.jit(jax.grad(loss))(params)

  expected = gradient(plain)
  for change in ({"scan": False}, {"remat": True}):
    other = gradient(models.vit(3, **SMALL, **change))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other, expected)


def test_dropout_acts_in_training_only_and_differs_between_layers():
  batch, model = images(2, 4, 4, 1), models.vit(**SMALL, dropout=0.5)
  params, state = model.init(KEY, batch)
  still = jax.tree.map(jnp.zeros_like, params)
  still["layers"]["mixed"]["bias"] += 1  # every layer adds 1 to each entry, doubled or dropped
  still["layers"]["down"]["bias"] += 0.25
  run = lambda key, train: model.apply(still, state, batch, train=train, key=key)[0]["features"]
  np.testing.assert_array_equal(run(KEY, False)["layer2"], 2.5)
  one, other = run(KEY, True), run(jax.random.key(5), True)
  assert {*np.unique(one["layer1"])} == {0, 0.5, 2, 2.5}
  second = one["layer2"] - one["layer1"]
  assert {*np.unique(second)} == {0, 0.5, 2, 2.5}
  assert not (second == one["layer1"]).all()
  assert not (one["layer1"] == other["layer1"]).all()


def test_half_precision_keeps_the_tokens_wide():
  outputs = made(models.vit(3, **SMALL, dtype=jnp.bfloat16), images(2, 4, 4, 1))[1]
  assert outputs["patches"].dtype == outputs["embedding"].dtype == jnp.float32


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"patch": 0}, r"patch must be at least 1, got \(0,\)"),
    ({"heads": 3}, "heads must divide the width, got heads=3 and width=8"),
    ({"registers": -1}, "registers must be at least 1"),
    ({"num_classes": 0}, "num_classes must be at least 1"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"patch": 3}, r"patch=3 must divide height and width of the image, got \(2, 4, 4, 1\)"),
  ],
)
def test_mistakes(settings, message):
  with pytest.raises(ValueError, match=message):
    models.vit(**{**SMALL, **settings}).init(KEY, images(2, 4, 4, 1))


def test_another_rank():
  with pytest.raises(ValueError, match="vit takes an input of shape"):
    models.vit(**SMALL).init(KEY, images(2, 16))
