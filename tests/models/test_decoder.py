"""The decoder: what a token sees, one pass against many, settings that change no number, and mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import models

PLAIN = models.DecoderConfig(vocabulary=19, width=8, depth=2, heads=4, kv_heads=2, mlp_width=12)
# Everything that a family brings at once.
RICH = dataclasses.replace(
  PLAIN,
  head_width=6,
  activation="gelu_tanh",
  unit_offset=True,
  post_norms=True,
  qk_norm=True,
  qkv_bias=True,
  embedding_scale=8**0.5,
  query_scale=0.3,
  attention_soft_cap=2.0,
  logit_soft_cap=3.0,
  local_rope=models.Rope(base=100.0),
  window=3,
  sliding=(True, False),
  tied=True,
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 7), 0, 19)


@functools.cache
def variables(config):
  config = dataclasses.replace(config, remat=None, scan=True)
  params, state = jax.jit(models.decoder(config).init)(jax.random.key(1), {"tokens": TOKENS})
  assert state == {}
  draw = np.random.default_rng(2)  # biases and scales start at numbers that hide mistakes
  return jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32), params)


@functools.cache
def compiled(config, head=True):
  model = models.decoder(config, head=head, features=head)
  return jax.jit(lambda params, batch: model.apply(params, {}, batch, train=False)[0])


def run(config, batch, head=True):
  return compiled(config, head)(variables(config), batch)


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_outputs_and_params():
  outputs = run(PLAIN, {"tokens": TOKENS})
  assert jax.tree.map(jnp.shape, outputs) == {
    "hidden": (2, 7, 8),
    "logits": (2, 7, 19),
    "features": {f"layer{n}": (2, 7, 8) for n in (1, 2)},
  }
  params = variables(PLAIN)
  attention = 8 * (8 + 4 + 4) + 8 * 8  # queries, keys and values, output
  assert models.count_parameters(params) == 2 * 19 * 8 + 8 + 2 * (attention + 3 * 8 * 12 + 2 * 8)
  close(outputs["logits"], outputs["hidden"] @ params["head"].T)
  without = run(PLAIN, {"tokens": TOKENS}, head=False)
  assert set(without) == {"hidden"}
  close(without["hidden"], outputs["hidden"])
  tied = run(RICH, {"tokens": TOKENS})
  assert "head" not in variables(RICH)
  close(tied["logits"], 3 * np.tanh(tied["hidden"] @ variables(RICH)["embedding"].T / 3))


@pytest.mark.parametrize("config", [PLAIN, RICH], ids=["plain", "rich"])
def test_a_token_sees_only_those_before_it(config):
  """And within the windows of its layers; every token sees itself."""
  hidden = run(config, {"tokens": TOKENS})["hidden"]
  changed = run(config, {"tokens": TOKENS.at[:, 3].add(1)})["hidden"]
  close(changed[:, :3], hidden[:, :3])
  assert (np.abs(changed[:, 3:] - hidden[:, 3:]).max(-1) > 1e-4).all()


def test_a_window_ends():
  config = dataclasses.replace(PLAIN, window=2)  # of all layers
  hidden = run(config, {"tokens": TOKENS})["hidden"]
  changed = run(config, {"tokens": TOKENS.at[:, 0].add(1)})["hidden"]
  moved = np.abs(changed - hidden).max(-1) > 1e-6
  np.testing.assert_array_equal(moved, [[True] * 3 + [False] * 4] * 2)  # one token further in each of two layers


@pytest.mark.parametrize("config", [PLAIN, RICH], ids=["plain", "rich"])
def test_a_cache_changes_nothing(config):
  whole = run(config, {"tokens": TOKENS})
  cache, parts = models.make_cache(config, 2, 9), []
  for part in (TOKENS[:, :4], TOKENS[:, 4:5], TOKENS[:, 5:]):
    outputs = run(config, {"tokens": part, "cache": cache})
    cache = outputs["cache"]
    parts.append(outputs["logits"])
  close(jnp.concatenate(parts, 1), whole["logits"])
  assert cache["index"] == 7 and cache["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 0]] * 2


@pytest.mark.parametrize("config", [PLAIN, RICH], ids=["plain", "rich"])
def test_texts_of_one_row_do_not_see_each_other(config):
  together = run(config, {"tokens": TOKENS[:1], "segments": jnp.array([[1, 1, 1, 2, 2, 2, 2]])})["hidden"]
  close(together[:, :3], run(config, {"tokens": TOKENS[:1, :3]})["hidden"])
  close(together[:, 3:], run(config, {"tokens": TOKENS[:1, 3:]})["hidden"])
  padded = run(config, {"tokens": TOKENS, "segments": jnp.arange(7)[None] >= jnp.array([[2], [0]])})["hidden"]
  close(padded[:1, 2:], run(config, {"tokens": TOKENS[:1, 2:]})["hidden"])
  close(padded[1:], run(config, {"tokens": TOKENS})["hidden"][1:])


def test_layers_are_rows_of_the_params():
  """So a student may start from some of its teacher's, under a config that is its teacher's but for the depth."""
  params = variables(PLAIN)
  params = {**params, "layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
  student, _ = models.decoder(dataclasses.replace(PLAIN, depth=1)).apply(params, {}, {"tokens": TOKENS}, train=False)
  first = run(PLAIN, {"tokens": TOKENS})["features"]["layer1"]
  mean_square = np.square(first).mean(-1, keepdims=True)
  close(student["hidden"], first / np.sqrt(mean_square + 1e-6) * params["norm"]["scale"])


def test_only_the_distance_of_positions_counts():
  shifted = run(PLAIN, {"tokens": TOKENS, "positions": jnp.arange(7) + jnp.array([[100], [3]])})["hidden"]
  close(shifted, run(PLAIN, {"tokens": TOKENS})["hidden"])


def test_selected_tokens():
  batch, select = {"tokens": TOKENS}, jnp.array([[6, 0], [2, 2]])
  whole, selected = run(RICH, batch), run(RICH, {**batch, "select": select})
  for name in ("hidden", "logits"):
    close(selected[name], jnp.take_along_axis(whole[name], select[..., None], axis=1))


@pytest.mark.parametrize("changes", [{"remat": "layer"}, {"remat": "products", "scan": False}])
def test_settings_of_speed_and_memory_change_no_number(changes):
  def loss(params, config):
    outputs, _ = models.decoder(config).apply(params, {}, {"tokens": TOKENS}, train=True)
    return jnp.square(outputs["logits"]).mean()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  expected = gradient(variables(RICH), RICH)
  jax.tree.map(close, gradient(variables(RICH), dataclasses.replace(RICH, **changes)), expected)


def test_bfloat16_params_compute_in_it_and_logits_do_not():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables(PLAIN))
  outputs = compiled(PLAIN)(params, {"tokens": TOKENS})
  assert outputs["hidden"].dtype == jnp.bfloat16 and outputs["logits"].dtype == jnp.float32
  np.testing.assert_allclose(outputs["logits"], run(PLAIN, {"tokens": TOKENS})["logits"], atol=0.05)
  mixed = compiled(dataclasses.replace(PLAIN, dtype=jnp.bfloat16))(variables(PLAIN), {"tokens": TOKENS})
  assert mixed["hidden"].dtype == jnp.bfloat16


def test_a_token_that_does_not_exist_is_seen():
  hidden = run(PLAIN, {"tokens": TOKENS.at[0, 4].set(19)})["hidden"]
  assert jnp.isnan(hidden[0]).all() and jnp.isfinite(hidden[1]).all()


def test_frequencies():
  """Wave lengths by the formulas of each scaling, at width 8: 2 pi times 1, 10, 100 and 1,000 tokens."""
  plain = np.array([1, 0.1, 0.01, 0.001])
  frequencies = lambda length=10, **options: models.Rope(**options).frequencies(8, length, 16)
  close(frequencies(), plain)
  close(frequencies(scaling="linear", factor=4.0), plain / 4)
  close(frequencies(scaling="dynamic", factor=4.0), plain)  # no longer than the 16 tokens it is made for
  stretched = 10_000 * (4 * 32 / 16 - 3) ** (8 / 6)
  close(frequencies(32, scaling="dynamic", factor=4.0), stretched ** (-np.arange(4) / 4))
  # Over 200 tokens they turn 31.8, 3.18, 0.318 and 0.0318 times; from 4 turns on they stay, below 1 they are divided.
  ramp = (200 * 0.1 / (2 * np.pi) - 1) / 3
  expected = plain * [1, ramp + (1 - ramp) / 8, 1 / 8, 1 / 8]
  np.testing.assert_allclose(frequencies(scaling="llama3", factor=8.0, original_length=200), expected, rtol=1e-9)
  # 32 turns are at dimension -0.003, one is at 1.50: the ramp goes from 0 to 2.
  expected = plain * [1, (1 + 1 / 8) / 2, 1 / 8, 1 / 8]
  yarn = models.Rope(scaling="yarn", factor=8.0, original_length=200)
  np.testing.assert_allclose(yarn.frequencies(8, 10, 16), expected, rtol=1e-9)
  close(yarn.magnitude(), 0.1 * np.log(8) + 1)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"heads": 3}, "heads must be a multiple of kv_heads.*got 3, 2 and 2"),
    ({"head_width": 3}, "head_width even"),
    ({"width": 0}, r"width must be at least 1, got \(0,\)"),
    ({"head_width": 0, "width": 9}, "width 9 is no multiple of heads 4"),
    ({"activation": "relu"}, r"activation must be one of \('silu', 'gelu', 'gelu_tanh'\), got 'relu'"),
    ({"logit_soft_cap": 0.0}, "logit_soft_cap must be above 0, got 0.0; leave it out for none"),
    ({"attention_soft_cap": -1.0}, "attention_soft_cap must be above 0"),
    ({"window": 3, "sliding": (False, False)}, r"limited to the window, 3; got \(False, False\)"),
    ({"window": 3, "sliding": (True,)}, r"each of 2 layers.*window, 3; got \(True,\)"),
    ({"sliding": (True, False)}, "window, None"),
    ({"remat": True}, "remat must be one of"),
    ({"attention": "cudnn", "attention_soft_cap": 5.0}, "no attention_soft_cap"),
  ],
)
def test_bad_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"scaling": "longrope"}, "scaling must be.*'longrope'"),
    ({"scaling": "linear", "factor": 0.5}, "factor at least 1"),
    ({"scaling": "yarn", "factor": 2.0}, "needs original_length"),
  ],
)
def test_bad_rotary_positions(options, message):
  with pytest.raises(ValueError, match=message):
    models.Rope(**options)


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    ({"image": TOKENS}, r"reads the entry 'tokens' of the batch; got \['image'\]"),
    ({"tokens": TOKENS.astype(float)}, r"tokens must be integers of shape.*float32 of \(2, 7\)"),
    ({"tokens": TOKENS[0]}, r"tokens must be integers.*\(7,\)"),
    (
      {"tokens": TOKENS, "segments": jnp.ones((2, 6))},
      r"segments must have the shape of tokens \(2, 7\), got \(2, 6\)",
    ),
    ({"tokens": TOKENS, "positions": jnp.arange(7)}, "positions must have the shape"),
    ({"tokens": TOKENS, "select": jnp.arange(2)}, r"select must have the shape \[2, n\], got \(2,\)"),
    ({"tokens": TOKENS, "cache": models.make_cache(PLAIN, 2, 5)}, "7 tokens do not fit a cache of 5"),
    ({"tokens": TOKENS, "cache": models.make_cache(PLAIN, 3, 9)}, "the cache must be of"),
  ],
)
def test_bad_batches(batch, message):
  with pytest.raises(ValueError, match=message):
    models.decoder(PLAIN).apply(variables(PLAIN), {}, batch, train=False)
