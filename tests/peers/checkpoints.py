"""Random checkpoints of each family, made by transformers, and a recording of some for the fast tests.

`python -m tests.peers.checkpoints` writes tests/models/checkpoints (by transformers 5.24): for each family a checkpoint
in its true format, in bfloat16, and the logits that transformers computes of it in float32.
"""

import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

RECORDED = pathlib.Path(__file__).parents[1] / "models" / "checkpoints"
SMALL = {
  "vocab_size": 29,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "initializer_range": 0.25,
  "max_position_embeddings": 64,
}
GEMMA = {**SMALL, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FULL, SLIDING = "full_attention", "sliding_attention"
LOCAL = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}
LAST = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}

CONFIGS = {
  "llama2": transformers.LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
  "llama3": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=6),
  "llama_biases": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
  "llama_linear": transformers.LlamaConfig(**SMALL, rope_parameters=LINEAR),
  "llama_dynamic": transformers.LlamaConfig(**SMALL | {"max_position_embeddings": 8}, rope_parameters=DYNAMIC),
  "qwen2": transformers.Qwen2Config(**SMALL, rope_parameters=YARN),
  "qwen2_sliding": transformers.Qwen2Config(**SMALL, **LAST, tie_word_embeddings=True),
  "qwen3": transformers.Qwen3Config(**SMALL, head_dim=10),
  "gemma2": transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
  "gemma3": transformers.Gemma3TextConfig(**GEMMA, layer_types=[SLIDING, SLIDING, FULL], rope_parameters=LOCAL),
}
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 13))


def made(config):
  """A random model; scales and biases are random as well."""
  torch.manual_seed(0)
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn(parameter.shape))
  return model


def opened(directory, **options):
  return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **options).eval()


def logits_of(peer, **inputs):
  with torch.no_grad():
    return peer(torch.tensor(TOKENS), **inputs).logits.float().numpy()


def main():
  for name in ("llama2", "llama3", "qwen2", "qwen3", "gemma2", "gemma3"):
    made(CONFIGS[name]).to(torch.bfloat16).save_pretrained(RECORDED / name)
    logits = logits_of(opened(RECORDED / name, dtype=torch.float32))
    save_file({"tokens": TOKENS.astype(np.int32), "logits": logits}, RECORDED / name / "expected.safetensors")
    (RECORDED / name / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
  main()
