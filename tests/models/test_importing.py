"""Weights from elsewhere: names, transpositions, cuts and reshapes, and every mistake named before anything is used."""

import hashlib
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdflax import models
from kdflax.models import Rule, import_variables

RULES = (
  Rule(r"block\.(\d+)\.attention\.weight", tuple(rf"params/blocks/\1/{n}" for n in "qkv"), (1, 0), (3, 2, -1)),
  Rule(r"block\.(\d+)\.norm\.mean", r"state/blocks/\1/mean"),
  Rule(r"head\.(weight)", "params/head/kernel", axes=(1, 0)),
  Rule(r"head\.bias", "params/head/bias"),
  Rule(r".*position_ids", None),
)
LIKE = (
  {
    "blocks": {"0": {name: jax.ShapeDtypeStruct((3, 2, 2), jnp.float32) for name in "qkv"}},
    "head": {"kernel": np.zeros((3, 5), np.float32), "bias": np.zeros(5, jnp.bfloat16)},
    "empty": {},
  },
  {"blocks": {"0": {"mean": np.zeros(3, np.float32)}}},
)


def tensors(**changes):
  made = {
    "block.0.attention.weight": np.arange(36, dtype=np.float32).reshape(12, 3),
    "block.0.norm.mean": np.ones(3, np.float16),
    "head.weight": np.arange(15, dtype=np.float64).reshape(5, 3),
    "head.bias": np.full(5, 0.5, ml_dtypes.bfloat16),
    "position_ids": np.arange(4),
  }
  changed = made | {name.replace("__", "."): value for name, value in changes.items()}
  return {name: value for name, value in changed.items() if value is not None}


@pytest.fixture
def saved(tmp_path):
  def save(**changes):
    save_file(tensors(**changes), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"

  return save


def test_tensors_are_transposed_cut_reshaped_and_cast(saved):
  params, state = import_variables(saved(), RULES, like=LIKE)
  weight = tensors()["block.0.attention.weight"]
  for index, name in enumerate("qkv"):
    expected = weight[4 * index : 4 * index + 4].T.reshape(3, 2, 2)
    np.testing.assert_array_equal(params["blocks"]["0"][name], expected)
  np.testing.assert_array_equal(params["head"]["kernel"], np.arange(15).reshape(5, 3).T)
  assert jax.tree.map(lambda x: x.dtype, (params, state)) == jax.tree.map(lambda x: np.dtype(x.dtype), LIKE)
  assert params["empty"] == {} and state["blocks"]["0"]["mean"].tolist() == [1.0] * 3


def test_parts_of_a_file_are_read_as_one(tmp_path):
  names = list(tensors())
  for part in (0, 1):
    save_file({name: tensors()[name] for name in names[part::2]}, tmp_path / f"{part}.safetensors")
  params, _ = import_variables([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], RULES, like=LIKE)
  assert params["head"]["kernel"].shape == (3, 5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pooler": np.zeros((2, 2))}, r"tensors that no rule names: pooler \[2, 2\]$"),
    ({"head__bias": None}, r"paths without a tensor: params/head/bias \[5\]$"),
    ({"head__weight": np.zeros((3, 5))}, r"wrong shapes: params/head/kernel is \[3, 5\], head.weight gives \[5, 3\]$"),
    ({"head__weight": np.zeros(3)}, r"rules that do not fit their tensor: head.weight \[3\]: axes don't match array"),
    ({"block__0__attention__weight": np.zeros((4, 3))}, r"weight \[4, 3\]: array split does not result in an equal"),
    ({"block__1__norm__mean": np.zeros(3)}, r"paths that the model does not have: state/blocks/1/mean \(of block.1"),
    ({"head__bias": np.zeros(5, np.int32)}, "wrong kinds of numbers: params/head/bias is bfloat16, head.bias is int32"),
  ],
)
def test_what_does_not_fit_is_named(saved, changes, message):
  with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model: .*" + message):
    import_variables(saved(**changes), RULES, like=LIKE)


def test_two_tensors_for_one_leaf_are_named(saved):
  rules = [Rule(r"(x|y)", "params/w")]
  file = saved(**dict.fromkeys(tensors(), None), x=np.zeros(2), y=np.zeros(2))
  with pytest.raises(ValueError, match=r"paths with two tensors: params/w \(of x and y\)$"):
    import_variables(file, rules, like=({"w": np.zeros(2)}, {}))


def test_integers_are_cast_where_no_value_changes(saved):
  file = saved(**dict.fromkeys(tensors(), None), x=np.array([1, 300]))
  read = lambda dtype: import_variables(file, [Rule("x", "state/x")], like=({}, {"x": np.zeros(2, dtype)}))
  assert read(np.int32)[1]["x"].dtype == np.int32
  with pytest.raises(ValueError, match="state/x is uint8, x is int64"):
    read(np.uint8)


def test_all_is_named_at_once_and_long_lists_are_cut(saved):
  file = saved(**{f"extra{i}": np.zeros(1) for i in range(8)}, head__bias=None)
  with pytest.raises(ValueError, match=r"extra4 \[1\] and 3 more; paths without a tensor: params/head/bias"):
    import_variables(file, RULES, like=LIKE)


def test_another_file_is_refused_by_its_digest(saved):
  file = saved()
  digest = hashlib.sha256(file.read_bytes()).hexdigest()
  import_variables(file, RULES, like=LIKE, sha256=digest)
  with pytest.raises(ValueError, match=rf"not the file that is asked for: its SHA-256 is {digest}, not 00; get it"):
    import_variables(file, RULES, like=LIKE, sha256="00")
  with pytest.raises(ValueError, match="sha256 must name each of the 1 files; got "):
    import_variables(file, RULES, like=LIKE, sha256=[digest, digest])


def test_a_pickle_is_never_read(tmp_path):
  file = tmp_path / "pytorch_model.bin"
  file.write_bytes(pickle.dumps({"head.weight": np.zeros(3)}))
  with pytest.raises(ValueError, match=r"no safetensors file, or is damaged: .*kdflax reads no pickle"):
    import_variables(file, RULES, like=LIKE)


def test_a_rule_that_is_no_regular_expression_is_named(saved):
  with pytest.raises(ValueError, match=r"rules: '\(' is no regular expression"):
    import_variables(saved(), [Rule("(", None)], like=LIKE)


def test_a_model_is_filled_by_the_names_of_torch(tmp_path):
  model, batch = models.mlp((4,), 3), {"image": np.zeros((1, 2), np.float32)}
  like = jax.eval_shape(model.init, jax.random.key(0), batch)
  rng = np.random.default_rng(0)
  file = tmp_path / "mlp.safetensors"
  weights = {"0.weight": rng.normal(size=(4, 2)), "0.bias": rng.normal(size=4)}
  save_file(weights | {"2.weight": rng.normal(size=(3, 4)), "2.bias": rng.normal(size=3)}, file)
  rules = [
    Rule(r"0\.weight", "params/hidden/0/kernel", (1, 0)),
    Rule(r"0\.bias", "params/hidden/0/bias"),
    Rule(r"2\.weight", "params/head/kernel", (1, 0)),
    Rule(r"2\.bias", "params/head/bias"),
  ]
  params, state = import_variables(file, rules, like=like)
  said = model.apply(params, state, batch, train=False)[0]["embedding"]
  np.testing.assert_allclose(said[0], np.maximum(weights["0.bias"], 0), rtol=1e-6)
