"""The BERT encoder beside that of transformers, on configurations drawn at random and on MiniLM (make peers brings it).

`python -m tests.peers.test_bert` writes tests/models/bert_fixture.safetensors anew, which the fast tests compare with.
"""

import json
import pathlib

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load, load_file, save

from experiments import glosses_teacher
from kdflax import models

FIXTURE = pathlib.Path(__file__).parents[1] / "models" / "bert_fixture.safetensors"
SIZES = {
  "vocab_size": 20,
  "hidden_size": 8,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 12,
  "max_position_embeddings": 9,
}


def drawn(seed, **sizes):
  """A BERT of transformers whose weights, norms and biases included, are drawn."""
  torch.manual_seed(seed)
  model = transformers.BertModel(transformers.BertConfig(**sizes, attn_implementation="eager")).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if "LayerNorm.weight" in name else 0))
  return model


def texts(seed, vocabulary, length, count=5):
  random = np.random.default_rng(seed)
  mask = np.arange(length) < random.integers(1, length + 1, size=(count, 1))
  return {"token_ids": np.where(mask, random.integers(1, vocabulary, mask.shape), 0).astype(np.int32), "mask": mask}


def said_by(model, batch):
  """The last states of transformers, their mean over the tokens, and its direction."""
  with torch.no_grad():
    ids, mask = (torch.tensor(batch[name]).long() for name in ("token_ids", "mask"))
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
  states = np.where(batch["mask"][..., None], states, 0)
  pooled = states.sum(1) / batch["mask"].sum(1, keepdims=True)
  return {"hidden": states, "pooled": pooled, "embedding": pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)}


def compare(model, variables, batch, expected):
  said, _ = model.apply(*variables, batch, train=False)
  hidden = np.where(batch["mask"][..., None], said["hidden"], 0)
  for name, mine in {**said, "hidden": hidden}.items():
    if name in expected:
      np.testing.assert_allclose(mine, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_that_of_transformers(tmp_path, seed):
  random = np.random.default_rng(seed)
  heads = int(random.integers(1, 5))
  sizes = {
    "vocab_size": int(random.integers(10, 60)),
    "hidden_size": heads * int(random.integers(2, 9)),
    "num_hidden_layers": int(random.integers(1, 4)),
    "num_attention_heads": heads,
    "intermediate_size": int(random.integers(4, 40)),
    "max_position_embeddings": int(random.integers(8, 20)),
    "type_vocab_size": int(random.integers(1, 4)),
    "layer_norm_eps": float(random.choice([1e-12, 1e-5])),
  }
  peer = drawn(seed, **sizes)
  peer.save_pretrained(tmp_path)
  model, variables = models.load_bert(tmp_path)
  batch = texts(seed, sizes["vocab_size"], sizes["max_position_embeddings"])
  compare(model, variables, batch, said_by(peer, batch))


def test_minilm_is_that_of_transformers():
  folder = glosses_teacher.folder()
  model, variables = models.load_bert(folder, sha256=glosses_teacher.SHA256)
  assert models.count_parameters(variables) == 22_713_216 - 384 * 385  # as published, without its pooler
  batch = texts(0, glosses_teacher.VOCABULARY, 24)
  compare(model, variables, batch, said_by(transformers.BertModel.from_pretrained(folder).eval(), batch))


def test_the_fixture_is_what_is_written_here():
  kept, now = load_file(FIXTURE), load(fixture())
  assert kept.keys() == now.keys()
  for name, array in now.items():
    # Weights and texts are drawn; what is said of them may differ in the last digit on another processor.
    np.testing.assert_allclose(kept[name], array, rtol=1e-6, atol=1e-6 if name.startswith("said.") else 0)


def fixture() -> bytes:
  """A small BERT, texts and what transformers says of them, as one file."""
  peer, batch = drawn(0, **SIZES), texts(0, SIZES["vocab_size"], SIZES["max_position_embeddings"])
  weights = {f"bert.{name}": np.ascontiguousarray(x.numpy()) for name, x in peer.state_dict().items()}
  arrays = {f"batch.{name}": x for name, x in batch.items()} | {f"said.{n}": x for n, x in said_by(peer, batch).items()}
  return save(weights | arrays, {"config": json.dumps(SIZES | {"type_vocab_size": 2, "layer_norm_eps": 1e-12})})


if __name__ == "__main__":
  FIXTURE.write_bytes(fixture())
