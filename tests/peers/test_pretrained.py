"""Random small checkpoints of each family, made and run by transformers: the same logits here, and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from kdflax import models
from tests.peers.checkpoints import CONFIGS, TOKENS, logits_of, made, opened


def logits_here(read, **inputs):
  call = jax.jit(lambda params, batch: read.model.apply(params, {}, batch, train=False)[0]["logits"])
  return call(read.variables[0], {"tokens": TOKENS, **inputs})


def close(actual, expected):
  assert np.abs(expected).max() > 0.5  # numbers of a size at which 1e-5 says something
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_logits_here_and_back(name, tmp_path):
  peer = made(CONFIGS[name])
  expected = logits_of(peer)
  peer.save_pretrained(tmp_path / "theirs")
  read = models.load_pretrained(tmp_path / "theirs")
  close(logits_here(read), expected)
  models.save_pretrained(tmp_path / "ours", read.config, read.variables[0])
  _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(report.values()), report
  back = opened(tmp_path / "ours")
  assert type(back) is type(peer)
  np.testing.assert_array_equal(logits_of(back), expected)
  again = models.load_pretrained(tmp_path / "ours")
  assert again.config == read.config
  jax.tree.map(np.testing.assert_array_equal, again.variables, read.variables)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_padding_on_the_left(name, tmp_path):
  peer = made(CONFIGS[name])
  peer.save_pretrained(tmp_path)
  mask = np.arange(13) >= np.array([[4], [0]])
  expected = logits_of(
    peer, attention_mask=torch.tensor(mask), position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
  )
  actual = logits_here(models.load_pretrained(tmp_path), segments=mask)
  close(actual[mask], expected[mask])


def test_bfloat16_in_several_files(tmp_path):
  peer = made(CONFIGS["qwen2"]).to(torch.bfloat16)
  peer.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
  assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
  read = models.load_pretrained(tmp_path / "theirs")
  assert {leaf.dtype for leaf in jax.tree.leaves(read.variables)} == {jnp.dtype(jnp.bfloat16)}
  models.save_pretrained(tmp_path / "ours", read.config, read.variables[0], like=tmp_path / "theirs", shard_bytes=5_000)
  assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
  back = opened(tmp_path / "ours", dtype="auto")
  assert back.dtype == torch.bfloat16
  for name, tensor in back.state_dict().items():
    assert torch.equal(tensor, peer.state_dict()[name]), name
  wide = models.load_pretrained(tmp_path / "ours", param_dtype=jnp.float32)
  close(logits_here(wide), logits_of(opened(tmp_path / "ours", dtype=torch.float32)))


def test_the_language_model_of_one_with_images(tmp_path):
  text = CONFIGS["gemma3"].to_dict()
  vision = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
  }
  config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
  torch.manual_seed(0)
  peer = transformers.Gemma3ForConditionalGeneration(config).eval()
  peer.save_pretrained(tmp_path)
  read = models.load_pretrained(tmp_path)
  close(logits_here(read), logits_of(peer))


def test_entries_of_the_other_config_are_kept(tmp_path):
  config = CONFIGS["qwen3"].__class__(**CONFIGS["qwen3"].to_dict() | {"eos_token_id": 7, "bos_token_id": 5})
  made(config).save_pretrained(tmp_path / "theirs")
  (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
  read = models.load_pretrained(tmp_path / "theirs")
  models.save_pretrained(tmp_path / "ours", read.config, read.variables[0], like=tmp_path / "theirs")
  entries = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert entries["eos_token_id"] == 7 and entries["initializer_range"] == 0.25
  assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").eos_token_id == 7
  assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["llama3", "qwen2_sliding", "gemma2", "gemma3"])
def test_the_likeliest_texts_are_the_same(name, tmp_path):
  """Prompts of different lengths, padded on the left there and on the right here; windows and stop tokens count."""
  peer, lengths = made(CONFIGS[name]), np.array([13, 6])
  peer.save_pretrained(tmp_path)
  read = models.load_pretrained(tmp_path)
  ours = np.where(np.arange(13) < lengths[:, None], TOKENS, 0)
  mask = np.arange(13) >= 13 - lengths[:, None]
  theirs = np.zeros_like(TOKENS)
  theirs[mask] = np.concatenate([row[:length] for row, length in zip(TOKENS, lengths, strict=True)])
  sample = models.make_sampler(read.config, new_tokens=9, temperature=0.0)
  sampled = sample(read.variables[0], ours, jax.random.key(0), lengths)
  text = peer.generate(
    torch.tensor(theirs),
    attention_mask=torch.tensor(mask),
    max_new_tokens=9,
    min_new_tokens=9,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  )
  for row, length in enumerate(lengths):
    assert sampled.tokens[row, length : length + 9].tolist() == text[row, 13:].tolist()
