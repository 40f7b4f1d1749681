"""Texts of a decoder: those that one pass after another over the whole text would give, and how they are drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import losses, models

CONFIG = models.DecoderConfig(vocabulary=13, width=8, depth=2, heads=2, mlp_width=12, window=4, sliding=(True, False))
MODEL = models.decoder(CONFIG)
PARAMS = jax.tree.map(
  lambda leaf: 4 * leaf if leaf.ndim == 2 else leaf,
  jax.jit(MODEL.init)(jax.random.key(5), {"tokens": np.ones((1, 1), int)})[0],
)
PROMPTS = jnp.array([[3, 4, 5, 6], [7, 8, 9, 9], [10, 2, 2, 2]])
LENGTHS = jnp.array([4, 2, 1])
KEY = jax.random.key(0)
LOGITS = jax.jit(lambda tokens: MODEL.apply(PARAMS, {}, {"tokens": tokens}, train=False)[0]["logits"])


@functools.cache
def sampler(**options):
  return models.make_sampler(CONFIG, **{"new_tokens": 5, **options})


def continued(prompt, count):
  """The likeliest tokens, one whole pass for each; causal, so what is filled up behind does not count."""
  text = list(prompt)
  for _ in range(count):
    filled = jnp.array([text + [0] * (9 - len(text))])
    text.append(int(jnp.argmax(LOGITS(filled)[0, len(text) - 1])))
  return text


def test_greedy_texts_are_those_of_whole_passes():
  """And a row ends with a stop token: here the second new one of the first row."""
  texts = [continued(prompt[:length], 5) for prompt, length in zip(PROMPTS.tolist(), LENGTHS.tolist(), strict=True)]
  stop = texts[0][5]
  sampled = sampler(temperature=0.0, stop_tokens=(stop,), pad_token=12)(PARAMS, PROMPTS, KEY, LENGTHS)
  counts = []
  for row, (text, length) in enumerate(zip(texts, LENGTHS.tolist(), strict=True)):
    new = text[length:]
    counts.append(new.index(stop) + 1 if stop in new else 5)
    end = length + counts[-1]
    assert sampled.tokens[row].tolist() == text[:end] + [12] * (9 - end)
    assert sampled.generated[row].tolist() == [length <= place < end for place in range(9)]
    assert sampled.lengths[row] == end
  assert 5 in counts and 2 in counts
  labels, where = losses.shift_labels(sampled.tokens, sampled.generated)
  assert where.sum() == sum(counts) and (labels[where] == sampled.tokens[sampled.generated]).all()


def test_a_row_depends_on_its_prompt_its_number_and_the_key_alone():
  whole = sampler()(PARAMS, PROMPTS, KEY, LENGTHS)
  np.testing.assert_array_equal(sampler()(PARAMS, PROMPTS, KEY, LENGTHS).tokens, whole.tokens)
  other = PROMPTS.at[0].set(11).at[1, 2:].set(1)
  changed = sampler()(PARAMS, other, KEY, LENGTHS)
  np.testing.assert_array_equal(changed.tokens[1:], whole.tokens[1:])
  assert (sampler()(PARAMS, PROMPTS, jax.random.key(1), LENGTHS).tokens != whole.tokens).any()
  same = sampler()(PARAMS, jnp.tile(PROMPTS[:1], (3, 1)), KEY)
  assert len({tuple(row) for row in same.tokens.tolist()}) > 1


def test_samples_have_the_probabilities_of_the_model():
  """Next tokens of 2,000 rows with one prompt, against the softmax of what is left of the logits."""
  prompt, count = [3, 4, 5, 6], 2000
  logits = np.asarray(LOGITS(jnp.array([prompt + [0] * 5]))[0, 3], np.float64) / 1.5
  softmax = lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum()
  order = np.argsort(-logits)
  only = lambda kept: softmax(np.where(np.isin(np.arange(13), kept), logits, -np.inf))
  of_eight = only(order[:8])
  kept = order[: np.searchsorted(np.cumsum(of_eight[order]), 0.7) + 1]  # the first to reach it is the last
  assert 1 < len(kept) < 8
  for options, expected in (({}, softmax(logits)), ({"top_k": 8, "top_p": 0.7}, only(kept))):
    sample = sampler(new_tokens=1, temperature=1.5, **options)
    drawn = sample(PARAMS, jnp.tile(jnp.array([prompt]), (count, 1)), KEY).tokens[:, 4]
    shares = np.bincount(drawn, minlength=13) / count
    assert (shares[expected == 0] == 0).all()
    assert (np.abs(shares - expected) < 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_a_sampler_may_be_part_of_a_program():
  program = jax.jit(lambda params, key, lengths: sampler()(params, PROMPTS, key, lengths).tokens)
  np.testing.assert_array_equal(program(PARAMS, KEY, LENGTHS), sampler()(PARAMS, PROMPTS, KEY, LENGTHS).tokens)


def test_float64_stays_and_the_texts_as_well():
  expected = sampler(temperature=0.0)(PARAMS, PROMPTS, KEY, LENGTHS)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMS)
    assert MODEL.apply(wide, {}, {"tokens": PROMPTS}, train=False)[0]["logits"].dtype == jnp.float64
    sampled = models.make_sampler(CONFIG, new_tokens=5, temperature=0.0)(wide, PROMPTS, KEY, LENGTHS)
  np.testing.assert_array_equal(sampled.tokens, expected.tokens)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"new_tokens": 0}, r"new_tokens must be at least 1, got \(0,\)"),
    ({"temperature": -1.0}, r"temperature must be at least 0, got -1.0"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"top_p": 1.5}, "top_p must be in"),
    ({"stop_tokens": (13, 2), "pad_token": -1}, r"tokens \[13, -1\] are not of the vocabulary of 13"),
  ],
)
def test_bad_settings(options, message):
  with pytest.raises(ValueError, match=message):
    models.make_sampler(CONFIG, **{"new_tokens": 5, **options})


@pytest.mark.parametrize(
  ("prompts", "lengths", "message"),
  [
    (PROMPTS[0], None, r"prompts must be integers of shape \[batch, length\], got int32 of \(4,\)"),
    (PROMPTS * 1.0, None, "got float32"),
    (PROMPTS[:, :0], None, r"of \(3, 0\)"),
    (PROMPTS, jnp.array([1, 2]), r"lengths must be integers of shape \(3,\), got int32 of \(2,\)"),
    (PROMPTS, jnp.array([1, 2, 5]), r"from 1 to that of the prompts, 4; got \[1 2 5\]"),
    (PROMPTS, jnp.array([0, 2, 4]), "lengths must be from 1"),
  ],
)
def test_bad_prompts(prompts, lengths, message):
  with pytest.raises(ValueError, match=message):
    sampler()(PARAMS, prompts, KEY, lengths)
