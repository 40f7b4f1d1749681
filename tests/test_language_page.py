"""The program of docs/language.md distils checkpoints, here random small ones of two families."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as kinds

from kdflax import models

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "language.md"
BLOCK = PAGE.read_text().split("## A checkpoint that you have")[1].split("```python\n")[1].split("```")[0]


def checkpoint(name, seed, **fields):
  """Writes a random model, and the vocabulary of the page."""
  config = models.DecoderConfig(**{"depth": 2, "heads": 2, "kv_heads": 1, "width": 16, "mlp_width": 24} | fields)
  params, _ = jax.jit(models.decoder(config).init)(jax.random.key(seed), {"tokens": jnp.zeros((1, 1), int)})
  models.save_pretrained(name, config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_the_program_for_checkpoints_is_short_and_runs(tmp_path, monkeypatch):
  assert len(BLOCK.splitlines()) <= 40
  monkeypatch.chdir(tmp_path)
  text = PAGE.read_text()
  pathlib.Path("text.txt").write_text(text)
  tokenizer = Tokenizer(kinds.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
  tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, show_progress=False))
  size = tokenizer.get_vocab_size()
  checkpoint("teacher", 0, vocabulary=size, width=24, qk_norm=True)
  checkpoint("student", 1, vocabulary=size + 4, qkv_bias=True, tied=True)
  for folder in ("teacher", "student"):
    tokenizer.save(f"{folder}/tokenizer.json")
  names = {}
  exec(compile(BLOCK, "docs/language.md", "exec"), names)
  state = names["state"]
  distilled = models.load_pretrained("distilled")
  jax.tree.map(np.testing.assert_array_equal, distilled.variables[0], state.params["student"])
  assert pathlib.Path("distilled/tokenizer.json").read_bytes() == pathlib.Path("teacher/tokenizer.json").read_bytes()

  def objective(params):
    """Of the first rows, as the program defines it."""
    batch = {name: names[name][:8] for name in ("labels", "where")}
    for name, side, own in (("student", names["student"], params), ("teacher", names["teacher"], None)):
      variables = side.variables if own is None else (own, {})
      outputs, _ = side.model.apply(*variables, {"tokens": names["rows"][:8]}, train=False)
      batch |= {f"{name}_hidden": outputs["hidden"], f"{name}_head": variables[0][side.config.head_name]}
    return float(names["distillation"](**batch).sum() / batch["where"].sum())

  assert objective(state.params["student"]) < 0.98 * objective(names["student"].variables[0])
