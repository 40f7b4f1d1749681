"""An exported model gives the same outputs without kdflax's models, for every batch size."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import models
from kdflax.export import export_model, int8_weights, load_exported
from kdflax.models import Model

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "export.md"


def _images(size, seed=0):
  return np.random.default_rng(seed).normal(size=(size, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  model, directory = models.convnet((2, 3), 5, dropout=0.5), tmp_path_factory.mktemp("exported")
  variables = model.init(jax.random.key(0), {"image": _images(2)})
  _, state = model.apply(*variables, {"image": _images(4)}, train=True, key=jax.random.key(1))
  variables = variables[0], state  # with running statistics that are no longer 0 and 1
  digest = export_model(
    directory, model, variables, {"image": _images(2)}, outputs=("logits", "features.stage2"), platforms=("cpu", "cuda")
  )
  return model, variables, directory, digest


def test_outputs_are_those_of_the_model_for_every_batch_size(exported):
  model, variables, directory, digest = exported
  predict = load_exported(directory, digest=digest)
  for size in (1, 3):
    batch = {"image": _images(size, seed=size), "label": np.zeros(size, np.int32)}
    expected, _ = jax.jit(lambda v, b: model.apply(*v, b, train=False, key=None))(variables, batch)
    found = predict(batch)
    assert set(found) == {"logits", "features.stage2"}
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["features.stage2"], expected["features"]["stage2"], rtol=1e-5, atol=1e-6)


def test_weights_are_arguments_and_beside_the_program(exported):
  _, variables, directory, _ = exported
  manifest = json.loads((directory / "manifest.json").read_text())
  assert manifest["arguments"]["variables"][0]["head"]["kernel"] == "float32[3,5]"
  assert manifest["arguments"]["batch"] == {"image": "float32[batch,8,8,1]"}
  assert manifest["results"]["logits"] == "float32[batch,5]"
  assert manifest["platforms"] == ["cpu", "cuda"]
  content = (directory / "variables.safetensors").read_bytes()
  kernel = np.asarray(variables[0]["head"]["kernel"]).tobytes()
  assert kernel in content and kernel not in (directory / "model.stablehlo").read_bytes()


def test_only_what_was_exported_is_loaded(exported, tmp_path):
  _, _, directory, digest = exported
  with pytest.raises(ValueError, match="other variables"):
    load_exported(directory, digest="0" * 64)
  for file in directory.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  (tmp_path / "model.stablehlo").write_bytes((directory / "model.stablehlo").read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"model\.stablehlo is not what was exported"):
    load_exported(tmp_path, digest=digest)
  (tmp_path / "manifest.json").unlink()
  with pytest.raises(ValueError, match="no complete export"):
    load_exported(tmp_path)


def test_what_does_not_fit_is_refused(exported):
  predict = load_exported(exported[2])
  with pytest.raises(ValueError, match="the model reads"):
    predict({"pixels": _images(2)})
  with pytest.raises(ValueError, match="8"):
    predict({"image": _images(2)[:, :7]})


def _model(function):
  return Model(lambda key, example: ({}, {}), lambda p, s, batch, *, train, key: (function(batch["image"]), s))


@pytest.mark.parametrize(
  "function",
  [
    lambda x: {"logits": jnp.concatenate([x, x])},
    lambda x: {"logits": x if x.shape[0] > 3 else 2 * x},
    lambda x: {"logits": x / len(x)},
    lambda x: {"logits": jnp.stack([x[i] for i in range(x.shape[0])])},
    lambda x: {"logits": jnp.stack(list(x))},
    lambda x: {"logits": x + np.zeros(x.shape)},
  ],
  ids=["twice as many", "compared", "len", "range", "iterated", "NumPy"],
)
def test_a_model_that_depends_on_its_batch_size_stays(tmp_path, function):
  with pytest.raises(ValueError, match="depends on its batch size"):
    export_model(tmp_path, _model(function), ({}, {}), {"image": _images(2)})
  assert not list(tmp_path.iterdir())


def test_another_mistake_in_a_model_speaks_for_itself(tmp_path):
  with pytest.raises(TypeError, match="unsupported operand"):
    export_model(tmp_path, _model(lambda x: {"logits": x + "one"}), ({}, {}), {"image": _images(2)})
  with pytest.raises(ValueError, match="no 'logits' in the context"):
    export_model(tmp_path, _model(lambda x: {"scores": x}), ({}, {}), {"image": _images(2)})


def test_any_use_of_the_size_that_stays_open_is_welcome(tmp_path):
  centred = _model(lambda x: {"logits": x.reshape(x.shape[0], -1) - x.sum(0).reshape(-1) / x.shape[0]})
  export_model(tmp_path, centred, ({}, {}), {"image": _images(2)}, platforms=["cpu"])
  images = _images(5)
  expected = images.reshape(5, -1) - images.mean(0).reshape(-1)
  np.testing.assert_allclose(load_exported(tmp_path)({"image": images})["logits"], expected, rtol=1e-5, atol=1e-6)


def _in_a_fresh_process(code, directory):
  """Runs a program beside an export, and returns what it saves as `logits`."""
  np.save(directory / "images.npy", _images(3, seed=3))
  code = f"import numpy as np\nimages = np.load('images.npy')\n{code}\nnp.save('logits.npy', logits)"
  root = str(pathlib.Path(__file__).parents[1])
  subprocess.run([sys.executable, "-c", code], cwd=directory, env=os.environ | {"PYTHONPATH": root}, check=True)
  return np.load(directory / "logits.npy")


@pytest.mark.parametrize("reader", ["with kdflax", "without kdflax"])
def test_the_page_says_how_to_serve_it_and_neither_flax_nor_orbax_is_imported(exported, reader, tmp_path):
  model, variables, directory, _ = exported
  shutil.copytree(directory, tmp_path / "exported")
  writes, with_kdflax, without_kdflax = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
  assert "export_model" in writes
  code = with_kdflax if reader == "with kdflax" else f"import sys; sys.modules['kdflax'] = None\n{without_kdflax}"
  absent = ["flax", "orbax", "kdflax.models", *([] if reader == "with kdflax" else ["kdflax.export"])]
  code += f"\nimport sys\nassert not sys.modules.keys() & set({absent})"
  expected, _ = model.apply(*variables, {"image": _images(3, seed=3)}, train=False, key=None)
  np.testing.assert_allclose(_in_a_fresh_process(code, tmp_path), expected["logits"], rtol=1e-5, atol=1e-6)


def test_weights_are_named_in_the_order_of_the_program(tmp_path):
  """Names that sort otherwise as paths, and weights of several dtypes."""
  params = {"a": {"b": jnp.ones(2, jnp.bfloat16)}, "a-b": jnp.arange(2), "c": {}}
  state = {"10": jnp.float32(3), "9": jnp.float32(4)}
  forward = lambda p, s, batch, *, train, key: (
    {"logits": batch["image"] * p["a"]["b"][0] + p["a-b"][1] * s["10"] - s["9"]}, s)  # fmt: skip
  model = Model(lambda key, example: (params, state), forward)
  export_model(tmp_path / "exported", model, (params, state), {"image": _images(2)}, platforms=["cpu"])
  manifest = json.loads((tmp_path / "exported" / "manifest.json").read_text())
  assert manifest["weights"] == ["params/a/b", "params/a-b", "state/10", "state/9"]
  without_kdflax = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[-1]
  np.testing.assert_allclose(_in_a_fresh_process(without_kdflax, tmp_path), _images(3, seed=3) - 1, rtol=1e-5)


def test_a_connector_stays(tmp_path):
  with pytest.raises(ValueError, match=r"reads 'student.embedding'"):
    export_model(tmp_path, models.linear_connector("student.embedding", 3), ({}, {}), {"image": _images(2)})


def test_a_program_of_one_batch_size_takes_that_alone(tmp_path):
  model = models.mlp((4,), 3)
  variables = model.init(jax.random.key(0), {"image": _images(2)})
  export_model(tmp_path, model, variables, {"image": _images(5)}, batch_size=2, platforms=["cpu"])
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  assert manifest["arguments"]["batch"] == {"image": "float32[2,8,8,1]"}
  expected, _ = model.apply(*variables, {"image": _images(2)}, train=False, key=None)
  predict = load_exported(tmp_path)
  np.testing.assert_allclose(predict({"image": _images(2)})["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="2"):
    predict({"image": _images(3)})
  with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
    export_model(tmp_path, model, variables, {"image": _images(5)}, batch_size=0)


def test_eight_bits_lose_at_most_half_a_step_of_each_column(tmp_path):
  """The file is a quarter as large, and says what the rounded model says."""
  model = models.mlp((64, 64), 3)
  variables = model.init(jax.random.key(0), {"image": _images(2)})
  small, (params, state) = int8_weights(model, variables)
  before, after = variables[0]["hidden"]["0"]["kernel"], params["hidden"]["0"]["kernel"]
  assert after["int8"].dtype == np.int8 and set(params["head"]["bias"].shape) == {3}
  step = np.abs(before).max(0) / 127
  assert (np.abs(after["int8"] * after["scale"] - before) <= step * (0.5 + 1e-4)).all()
  assert np.abs(after["int8"]).max(0).min() == 127  # each column uses its range
  export_model(tmp_path / "large", model, variables, {"image": _images(2)}, platforms=["cpu"])
  export_model(tmp_path / "small", small, (params, state), {"image": _images(2)}, platforms=["cpu"])
  found = load_exported(tmp_path / "small")({"image": _images(4)})["logits"]
  expected, _ = small.apply(params, state, {"image": _images(4)}, train=False, key=None)
  exact, _ = model.apply(*variables, {"image": _images(4)}, train=False, key=None)
  np.testing.assert_allclose(found, expected["logits"], rtol=1e-5, atol=1e-5)
  assert 0 < np.abs(found - exact["logits"]).max() < 0.05 * np.abs(exact["logits"]).max()
  sizes = [(tmp_path / name / "variables.safetensors").stat().st_size for name in ("large", "small")]
  assert sizes[1] < 0.4 * sizes[0]


def test_a_column_of_zeros_and_whole_numbers_stay():
  model = Model(lambda key, example: ({}, {}), lambda p, s, batch, *, train, key=None: ({"w": p["w"]}, s))
  tree = {"w": np.zeros((2, 3), np.float32), "table": np.arange(4).reshape(2, 2), "bias": np.ones(3, np.float32)}
  small, (params, state) = int8_weights(model, (tree, {}))
  np.testing.assert_array_equal(small.apply(params, state, {}, train=False)[0]["w"], tree["w"])
  assert params["table"] is tree["table"] and params["bias"] is tree["bias"]
