"""Encoders of text: BERT equals numbers recorded from transformers, and neither padding nor length matters."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kdflax import models

FIXTURE = pathlib.Path(__file__).with_name("bert_fixture.safetensors")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """A folder as of the hub, with what transformers said: written by tests/peers/test_bert.py."""
  folder = tmp_path_factory.mktemp("bert")
  with safe_open(FIXTURE, "np") as file:
    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (folder / "config.json").write_text(file.metadata()["config"])
  part = lambda prefix: {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
  save_file(part("bert."), folder / "model.safetensors")
  return folder, part("batch."), part("said.")


@pytest.fixture(scope="module")
def loaded(recorded):
  model, variables = models.load_bert(recorded[0])
  return jax.jit(lambda batch: model.apply(*variables, batch, train=False)[0])


def test_it_says_what_transformers_says(recorded, loaded):
  _, batch, expected = recorded
  said = loaded(batch)
  assert said["features"].keys() == {"embeddings", "layer1", "layer2"}
  np.testing.assert_array_equal(said["features"]["layer2"], said["hidden"])
  hidden = np.where(batch["mask"][..., None], said["hidden"], 0)
  for name, mine in {"hidden": hidden, "pooled": said["pooled"], "embedding": said["embedding"]}.items():
    np.testing.assert_allclose(mine, expected[name], rtol=1e-5, atol=1e-5)


def test_what_stands_at_padding_is_never_seen(recorded, loaded):
  _, batch, _ = recorded
  other = np.where(batch["mask"], batch["token_ids"], 7)
  np.testing.assert_array_equal(loaded(batch | {"token_ids": other})["embedding"], loaded(batch)["embedding"])


def test_a_text_without_tokens_is_zero_and_has_finite_gradients():
  model = models.bert(9, width=4, layers=1, heads=2, hidden=4, positions=3)
  batch = {"token_ids": jnp.zeros((2, 3), jnp.int32), "mask": jnp.array([[True, False, False], [False] * 3])}
  params, state = jax.jit(model.init)(KEY, batch)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(params):
    embedding = model.apply(params, state, batch, train=False)[0]["embedding"]
    return embedding[:, 0].sum(), embedding

  gradients, embedding = run(params)
  assert embedding[1].tolist() == [0.0] * 4 and embedding[0].any()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_sizes_are_those_of_minilm():
  example = {"token_ids": jax.ShapeDtypeStruct((1, 8), jnp.int32), "mask": jax.ShapeDtypeStruct((1, 8), jnp.bool_)}
  params, state = jax.eval_shape(lambda key: models.bert(30522).init(key, example), KEY)
  assert models.count_parameters(params) == 22_713_216 - 384 * 384 - 384 and not state  # published, with its pooler


def test_a_bag_is_the_mean_of_its_tokens():
  model = models.bag_of_tokens(6, width=3, hidden=(2,))
  batch = {"token_ids": jnp.array([[1, 4, 4, 0], [2, 0, 0, 0]]), "mask": jnp.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)}
  params, state = model.init(KEY, batch)
  table, (layer,) = np.asarray(params["tokens"]["embedding"], np.float64), params["hidden"].values()
  kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
  pooled = np.maximum(np.stack([(table[1] + 2 * table[4]) / 3, np.zeros(3)]) @ kernel + bias, 0)
  said, _ = model.apply(params, state, batch, train=True, key=KEY)
  np.testing.assert_allclose(said["pooled"], pooled, rtol=1e-5, atol=1e-7)
  norms = np.linalg.norm(pooled, axis=1, keepdims=True)
  np.testing.assert_allclose(said["embedding"], pooled / np.where(norms > 0, norms, 1), rtol=1e-5, atol=1e-7)


def test_dropout_needs_a_key_and_changes_the_states():
  for model in (
    models.bert(9, width=4, layers=1, heads=2, hidden=4, dropout=0.5),
    models.bag_of_tokens(9, width=4, hidden=(4,), dropout=0.5),
  ):
    batch = {"token_ids": jnp.ones((2, 3), jnp.int32), "mask": jnp.ones((2, 3), bool)}
    params, state = jax.jit(model.init)(KEY, batch)
    with pytest.raises(ValueError, match=r"apply\(train=True\) needs a key"):
      model.apply(params, state, batch, train=True)
    run: Any = jax.jit(functools.partial(model.apply, key=KEY), static_argnames="train")
    trained, evaluated = (run(params, state, batch, train=train)[0]["pooled"] for train in (True, False))
    assert not np.allclose(trained, evaluated)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"token_ids": jnp.ones((2, 3))}, "token_ids must be integers and mask bool; got float32 and bool"),
    ({"mask": jnp.ones((2, 4), bool)}, r"must both be \[batch, length\]; got \(2, 3\) and \(2, 4\)"),
    ({"mask": None}, r"but the batch has no \['mask'\]; it has \['token_ids'\]"),
    (
      {"token_ids": jnp.ones((1, 5), jnp.int32), "mask": jnp.ones((1, 5), bool)},
      "has length 5, more than positions=4; cut",
    ),
  ],
)
def test_inputs_that_do_not_fit_are_named(changes, message):
  batch = {"token_ids": jnp.ones((2, 3), jnp.int32), "mask": jnp.ones((2, 3), bool)} | changes
  batch = {name: x for name, x in batch.items() if x is not None}
  with pytest.raises(ValueError, match=message):
    models.bert(9, width=4, layers=1, heads=2, hidden=4, positions=4).init(KEY, batch)


def test_sizes_that_make_no_sense_are_named():
  with pytest.raises(ValueError, match="heads=3 must divide width=4"):
    models.bert(9, width=4, heads=3)
  with pytest.raises(ValueError, match="layers must be at least 1"):
    models.bert(9, layers=0)
  with pytest.raises(ValueError, match="vocabulary must be at least 1"):
    models.bag_of_tokens(0, width=3)


def test_another_kind_of_model_is_refused(recorded, tmp_path):
  said = json.loads((recorded[0] / "config.json").read_text())
  for change, message in (
    ({"hidden_act": "relu"}, r"has {'hidden_act': 'relu'}; load_bert knows {'hidden_act': 'gelu'}"),
    ({"model_type": "roberta"}, "'roberta'"),
  ):
    (tmp_path / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(ValueError, match=message):
      models.load_bert(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="does not describe a BERT: KeyError 'vocab_size'"):
    models.load_bert(tmp_path)


def test_another_file_of_weights_is_refused(recorded):
  with pytest.raises(ValueError, match="is not the file that is asked for"):
    models.load_bert(recorded[0], sha256="0" * 64)
