"""The config.json of published checkpoints."""

import jax
import numpy as np
import pytest

from kdflax import models
from kdflax.models.families import read_config, write_config

LLAMA2 = {
  "model_type": "llama",
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "max_position_embeddings": 4096,
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 32,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "vocab_size": 32000,
}
LLAMA31 = LLAMA2 | {
  "intermediate_size": 14336,
  "max_position_embeddings": 131072,
  "num_key_value_heads": 8,
  "rope_theta": 500000.0,
  "rope_scaling": {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "vocab_size": 128256,
}
QWEN25 = {
  "model_type": "qwen2",
  "hidden_act": "silu",
  "hidden_size": 896,
  "intermediate_size": 4864,
  "max_position_embeddings": 32768,
  "max_window_layers": 24,
  "num_attention_heads": 14,
  "num_hidden_layers": 24,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
QWEN3 = QWEN25 | {
  "model_type": "qwen3",
  "attention_bias": False,
  "head_dim": 128,
  "hidden_size": 1024,
  "intermediate_size": 3072,
  "num_attention_heads": 16,
  "num_hidden_layers": 28,
  "num_key_value_heads": 8,
  "rope_scaling": None,
}
GEMMA2 = {
  "model_type": "gemma2",
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
  "head_dim": 256,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "max_position_embeddings": 8192,
  "num_attention_heads": 8,
  "num_hidden_layers": 26,
  "num_key_value_heads": 4,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
  "vocab_size": 256000,
}
GEMMA3 = {
  "model_type": "gemma3_text",
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 1152,
  "intermediate_size": 6912,
  "max_position_embeddings": 32768,
  "num_attention_heads": 4,
  "num_hidden_layers": 26,
  "num_key_value_heads": 1,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_local_base_freq": 10000,
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 6,
  "vocab_size": 262144,
}
GEMMA3_IMAGES = {  # of 4 billion: what the text model does not say is left to the family
  "model_type": "gemma3",
  "text_config": {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  },
}


@pytest.mark.parametrize(
  ("entries", "published"),
  [
    (LLAMA2, 6_738_415_616),
    (LLAMA31, 8_030_261_248),
    (QWEN25, 494_032_768),
    (QWEN3, 596_049_920),
    (GEMMA2, 2_614_341_888),
    (GEMMA3, 999_885_952),
    (GEMMA3_IMAGES, 3_880_263_168),
  ],
  ids=["llama2", "llama3.1", "qwen2.5", "qwen3", "gemma2", "gemma3", "gemma3 with images"],
)
def test_configs_of_published_checkpoints(entries, published):
  """As they stand beside the weights, shortened: as many parameters, and the same again when written."""
  config = read_config(entries)
  params, _ = jax.eval_shape(models.decoder(config).init, jax.random.key(0), {"tokens": np.zeros((1, 1), int)})
  assert models.count_parameters(params) == published
  assert read_config(write_config(config)) == config


def test_what_published_configs_say():
  assert read_config(LLAMA31).rope.frequencies(128, 1, 1).min() < read_config(LLAMA2).rope.frequencies(128, 1, 1).min()
  assert read_config(QWEN25).window is None and read_config(QWEN25).qkv_bias and read_config(QWEN3).qk_norm
  gemma2, gemma3, images = map(read_config, (GEMMA2, GEMMA3, GEMMA3_IMAGES))
  assert gemma2.sliding == (True, False) * 13 and gemma2.window == 4096
  assert gemma3.sliding == ((True,) * 5 + (False,)) * 4 + (True, True)
  assert gemma3.rope == models.Rope(1e6) and gemma3.local_rope == models.Rope(1e4)
  assert images.rope == models.Rope(1e6, "linear", 8.0) and images.heads == 8 and images.vocabulary == 262_208
