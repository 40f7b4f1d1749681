"""A student in other formats says in their runtimes what it says in JAX."""

import iree.compiler
import iree.runtime
import jax
import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter

from kdflax import export, models
from kdflax.models import Model

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
NETWORKS = {
  "mlp": models.mlp((8,), 3, dropout=0.5),
  "convnet": models.convnet((2, 3), 3, dropout=0.5),
  "resnet": models.resnet(8, num_classes=3),
}


def _trained(model, images=IMAGES):
  """Variables whose running statistics are no longer 0 and 1."""
  params, state = model.init(jax.random.key(0), {"image": images})
  return params, model.apply(params, state, {"image": images}, train=True, key=jax.random.key(1))[1]


def _expected(model, variables, batch):
  return jax.jit(lambda v, b: model.apply(*v, b, train=False, key=None)[0])(variables, batch)


def _onnx(path, batch):
  session = onnxruntime.InferenceSession(str(path))
  assert {i.name for i in session.get_inputs()} == set(batch)
  return dict(zip([o.name for o in session.get_outputs()], session.run(None, batch), strict=True))


def _litert(path, batch):
  return Interpreter(model_path=str(path)).get_signature_runner()(**batch)


def _close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_says_the_same_for_any_batch_size(tmp_path, name):
  model, path = NETWORKS[name], tmp_path / "student.onnx"
  variables = _trained(model)
  export.export_onnx(path, model, variables, {"image": IMAGES}, outputs=("logits", "embedding"))
  for size in (1, 6):
    found, expected = _onnx(path, {"image": IMAGES[:size]}), _expected(model, variables, {"image": IMAGES[:size]})
    assert set(found) == {"logits", "embedding"}
    for output in found:
      _close(found[output], expected[output])


@pytest.mark.parametrize("name", NETWORKS)
def test_litert_says_the_same(tmp_path, name):
  model, path = NETWORKS[name], tmp_path / "student.tflite"
  variables = _trained(model)
  export.export_litert(path, model, variables, {"image": IMAGES}, outputs=("logits", "embedding"), batch_size=2)
  found, expected = _litert(path, {"image": IMAGES[:2]}), _expected(model, variables, {"image": IMAGES[:2]})
  for output in ("logits", "embedding"):
    _close(found[output], expected[output])


def test_iree_runs_the_program_of_one_batch_size(tmp_path):
  model = NETWORKS["convnet"]
  variables = _trained(model)
  export.export_model(tmp_path, model, variables, {"image": IMAGES}, batch_size=2, platforms=["cpu"])
  compiled = iree.compiler.compile_str(
    (tmp_path / "model.stablehlo").read_bytes(), target_backends=["llvm-cpu"], input_type="stablehlo",
    extra_args=["--iree-llvmcpu-target-cpu=host"],
  )  # fmt: skip
  module = iree.runtime.load_vm_flatbuffer(compiled, driver="local-task")
  said = module.main(*map(np.asarray, jax.tree.leaves(variables)), IMAGES[:2])
  _close(np.asarray(said), _expected(model, variables, {"image": IMAGES[:2]})["logits"])
  _close(
    export.load_exported(tmp_path)({"image": IMAGES[:2]})["logits"],
    _expected(model, variables, {"image": IMAGES[:2]})["logits"],
  )


@pytest.mark.parametrize(("kind", "runtime"), [("onnx", _onnx), ("litert", _litert)])
def test_bytes_and_whole_numbers_may_come_in(tmp_path, kind, runtime):
  """A network that normalises its pixels and looks tokens up."""
  table = np.random.default_rng(1).normal(size=(10, 4)).astype(np.float32)

  def apply(params, state, batch, *, train, key=None):
    pixels, words = batch["image"].astype(np.float32) / 255, params["table"][batch["token"]]
    return {"logits": pixels.mean((1, 2)) + words.mean(1)[:, :3]}, state

  model, path = Model(lambda key, example: ({"table": table}, {}), apply), tmp_path / "student"
  batch = {"image": np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), "token": np.int32([[1, 2], [9, 0]])}
  options = {} if kind == "onnx" else {"batch_size": 2}
  getattr(export, f"export_{kind}")(path, model, ({"table": table}, {}), batch, **options)
  _close(runtime(path, batch)["logits"], _expected(model, ({"table": table}, {}), batch)["logits"])


@pytest.mark.parametrize(("kind", "runtime"), [("onnx", _onnx), ("litert", _litert)])
def test_eight_bits_make_a_smaller_file(tmp_path, kind, runtime):
  model = models.mlp((300, 300), 3)
  variables, sizes = _trained(model), []
  for wrapped, weights in ((model, variables), export.int8_weights(model, variables)):
    path = tmp_path / "student"
    options = {} if kind == "onnx" else {"batch_size": 6}
    getattr(export, f"export_{kind}")(path, wrapped, weights, {"image": IMAGES}, **options)
    _close(runtime(path, {"image": IMAGES})["logits"], _expected(wrapped, weights, {"image": IMAGES})["logits"])
    sizes.append(path.stat().st_size)
  assert sizes[1] < 0.3 * sizes[0]


def test_a_model_without_the_output_is_refused(tmp_path):
  for to in (export.export_onnx, export.export_litert):
    with pytest.raises(ValueError, match="no 'scores' in the context"):
      to(tmp_path / "student", NETWORKS["mlp"], _trained(NETWORKS["mlp"]), {"image": IMAGES}, outputs=("scores",))
  assert not list(tmp_path.iterdir())
