"""A frozen model comes back from its file as it was, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdflax import models, teachers, training

VARIABLES = (
  {
    "layer": {"kernel": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)), "bias": np.float32(0.5)},
    "half": jnp.arange(4, dtype=jnp.bfloat16) / 3,
    "wide": np.arange(3, dtype=np.float64).reshape(3, 1)[::-1],
    "nothing": {},
  },
  {"count": np.int32(3), "mask": np.array([True, False]), "empty": np.zeros((0, 2), np.float32)},
)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "folder" / "teacher.safetensors"


def test_round_trip_keeps_bits_dtypes_and_structure(path):
  digest = teachers.save_variables(path, VARIABLES)
  loaded = teachers.load_variables(path, digest=digest)
  assert jax.tree.structure(loaded) == jax.tree.structure(VARIABLES)
  for (name, a), b in zip(jax.tree.leaves_with_path(VARIABLES), jax.tree.leaves(loaded), strict=True):
    assert a.dtype == b.dtype and np.shape(a) == np.shape(b), name
    assert np.array_equal(np.asarray(a), b), name
  assert digest == training.digest(VARIABLES) == training.digest(loaded)


def test_a_model_without_state(path):
  model, batch = models.mlp((3,), 2), {"image": np.ones((2, 4), np.float32)}
  variables = model.init(jax.random.key(0), batch)
  digest = teachers.save_variables(path, variables)
  again = teachers.load_variables(path, digest=digest)
  out, same = (model.apply(*v, batch, train=False, key=None)[0]["logits"] for v in (variables, again))
  assert np.array_equal(out, same)


def test_changed_content_is_refused(path):
  digest = teachers.save_variables(path, VARIABLES)
  other = teachers.save_variables(path, (VARIABLES[0] | {"half": jnp.ones(4, jnp.bfloat16)}, VARIABLES[1]))
  assert other != digest
  with pytest.raises(ValueError, match=f"other variables than those referenced: digest {other}, expected {digest}"):
    teachers.load_variables(path, digest=digest)


@pytest.mark.parametrize("where", ["array", "digest"])
def test_a_flipped_bit_is_noticed_without_a_digest(path, where):
  digest = teachers.save_variables(path, VARIABLES)
  content = bytearray(path.read_bytes())
  content[-1 if where == "array" else content.index(digest.encode())] ^= 1
  path.write_bytes(bytes(content))
  with pytest.raises(ValueError, match="damaged"):
    teachers.load_variables(path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(path, size):
  teachers.save_variables(path, VARIABLES)
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(ValueError, match="damaged"):
    teachers.load_variables(path)


@pytest.mark.parametrize(
  ("names", "metadata"),
  [
    (["x"], None),
    (["x"], {"digest": "x", "empty": "[]"}),
    (["params/a"], {"digest": "x", "empty": "[]"}),
    (["params", "params/a"], {"digest": "x", "empty": '["state"]'}),
    (["params/a"], {"digest": "x", "empty": "[1]"}),
  ],
)
def test_a_safetensors_file_of_others_is_named(tmp_path, names, metadata):
  path = tmp_path / "other.safetensors"
  save_file({name: np.ones(2, np.float32) for name in names}, path, metadata)
  with pytest.raises(ValueError, match=f"{path} is (not a file of save_variables.*save the teacher again|damaged)"):
    teachers.load_variables(path)


@pytest.mark.parametrize(
  ("params", "named"),
  [({"a/b": np.ones(2)}, "'a/b'"), ({"a": [np.ones(2)]}, "params/a is a list"), ({"a": 1.0}, "float")],
)
def test_what_cannot_be_kept_is_refused(path, params, named):
  with pytest.raises(ValueError, match=named):
    teachers.save_variables(path, (params, {}))
  assert not path.exists()
