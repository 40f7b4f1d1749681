"""Teachers of other runtimes say the same live in the jitted step, recorded, and in NumPy."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import optax
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdflax import data, losses, models, teachers, training
from kdflax.objectives import Term

RANDOM = np.random.default_rng(0)
FIRST, SECOND = RANDOM.normal(size=(16, 5)).astype(np.float32), RANDOM.normal(size=(5, 3)).astype(np.float32)
IMAGES = RANDOM.integers(256, size=(10, 4, 4, 1), dtype=np.uint8)
ARRAYS = {"image": IMAGES, "index": np.arange(10, dtype=np.int32), "label": np.arange(10, dtype=np.int32) % 3}
NORMAL = teachers.image_input(mean=[0.5], deviation=[0.25])


def _reference(images=IMAGES):
  """What the file below computes, in float64; the logits and the hidden layer."""
  pixels = (images.reshape(-1, 16) / 255 - 0.5) / 0.25
  hidden = np.maximum(pixels @ FIRST.astype(float), 0)
  return hidden @ SECOND.astype(float), hidden


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  return _write(tmp_path_factory.mktemp("onnx") / "teacher.onnx", "n")


def _write(path, batch):
  graph = helper.make_graph(
    [
      helper.make_node("Flatten", ["pixels"], ["flat"]),
      helper.make_node("MatMul", ["flat", "first"], ["before"]),
      helper.make_node("Relu", ["before"], ["/net/hidden.0"]),
      helper.make_node("MatMul", ["/net/hidden.0", "second"], ["scores"]),
    ],
    "teacher",
    [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 1, 4, 4])],
    [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 3])],
    [numpy_helper.from_array(FIRST, "first"), numpy_helper.from_array(SECOND, "second")],
  )
  opsets = [helper.make_opsetid("", 17)]
  onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
  return path


def _close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_onnx_file_says_its_outputs_and_what_is_inside_by_name(file):
  outputs = {"logits": "scores", "features.hidden": "/net/hidden.0"}
  teacher = teachers.from_onnx(file, outputs=outputs, inputs={"pixels": NORMAL})
  said = teacher({"image": IMAGES})
  logits, hidden = _reference()
  _close(said["logits"], logits)
  _close(said["features"]["hidden"], hidden)
  assert teacher.source["onnx"] == "teacher.onnx" and teacher.source["outputs"] == outputs


def test_an_only_input_and_output_need_no_names(file):
  pixels = NORMAL({"image": IMAGES})
  for batch in ({"pixels": pixels, "label": np.zeros(10)}, {"image": pixels}):
    _close(teachers.from_onnx(file)(batch)["logits"], _reference()[0])


@pytest.mark.parametrize("size", [1, 4, 10, 16])
def test_a_file_of_one_batch_size_takes_any(tmp_path, size):
  teacher = teachers.from_onnx(_write(tmp_path / "fixed.onnx", size), inputs={"pixels": NORMAL})
  _close(teacher({"image": IMAGES})["logits"], _reference()[0])


def test_a_live_teacher_and_its_record_train_the_same_student(file, tmp_path):
  """A whole training step: losses, update and all, with the teacher called back and with its record."""
  teacher = teachers.from_onnx(file, inputs={"pixels": NORMAL})
  record = teachers.record_from(
    teacher, data.padded_batches(ARRAYS, 4), tmp_path, inputs="image", source=teacher.source
  )
  student = models.mlp((4,), 3)
  terms = {
    "hard": Term(
      optax.softmax_cross_entropy_with_integer_labels, {"logits": "student.logits", "labels": "batch.label"}
    ),
    "soft": Term(losses.kl_soft_targets, {"student_logits": "student.logits", "teacher_logits": "teacher.logits"}),
  }
  batch, frozen = jax.tree.map(jnp.asarray, ARRAYS), {"teacher": ({}, {})}
  updated = []
  for model, seen in [(teacher.model, batch), (teachers.recorded(), batch | {"teacher": record.of(ARRAYS)})]:
    learner = training.make_learner({"teacher": model, "student": student}, terms, optax.sgd(0.1))
    state = learner.init(jax.random.key(0), seen, frozen)
    step = training.make_train_step(learner, mesh=training.make_mesh())
    state, metrics = step(state, seen, frozen)
    updated.append((state.params, metrics))
  jax.tree.map(_close, *updated)


def test_a_live_teacher_may_be_mapped_over(file):
  teacher = teachers.from_onnx(file, inputs={"pixels": NORMAL}).model
  several = jnp.asarray(IMAGES.reshape(2, 5, 4, 4, 1))
  said = jax.jit(jax.vmap(lambda image: teacher.apply({}, {}, {"image": image}, train=False)[0]["logits"]))(several)
  _close(said.reshape(10, 3), _reference()[0])


def test_only_what_a_function_reads_is_brought_to_the_host():
  seen = []
  teacher = teachers.live(lambda batch: seen.append(sorted(batch)) or {"logits": batch["image"] * 2.0}, ["image"])
  batch = {"image": np.ones((2, 3), np.float32), "label": np.zeros(2)}
  said, _ = jax.jit(lambda b: teacher.apply({}, {}, b, train=True, key=None))(batch)
  np.testing.assert_array_equal(said["logits"], np.full((2, 3), 2.0))
  assert seen == [["image"], ["image"]]  # once for the shapes


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"outputs": {"logits": "probabilities"}},
      r"has no tensor \['probabilities'\]; its outputs are \['scores'\], inside",
    ),
    ({"inputs": {"image": "image"}}, r"inputs=\['image'\], but .*teacher.onnx has \['pixels'\]"),
  ],
  ids=["output", "input"],
)
def test_names_that_a_file_does_not_have_are_refused(file, options, message):
  with pytest.raises(ValueError, match=message):
    teachers.from_onnx(file, **options)


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    (
      {"image": IMAGES},
      r"wants 'pixels' as float32\['n', 1, 4, 4\], the batch has uint8\[10, 4, 4, 1\]; .*image_input",
    ),
    ({"image": np.zeros((10, 1, 4), np.float32)}, r"the batch has float32\[10, 1, 4\]"),
    ({"words": IMAGES}, r"none of the teacher's inputs; it has \['words'\]"),
  ],
  ids=["bytes", "axes", "absent"],
)
def test_a_batch_that_does_not_fit_is_named(file, batch, message):
  with pytest.raises(ValueError, match=message):
    teachers.from_onnx(file)(batch)


def test_a_file_says_what_it_takes(file):
  assert teachers.onnx_inputs(file) == {"pixels": ("float32", [None, 1, 4, 4])}


def test_another_file_is_refused(tmp_path):
  (tmp_path / "noise.onnx").write_bytes(b"noise")
  with pytest.raises(ValueError, match=r"noise\.onnx is no ONNX file that ONNX Runtime .* reads"):
    teachers.from_onnx(tmp_path / "noise.onnx")
  with pytest.raises(FileNotFoundError):
    teachers.from_onnx(tmp_path / "absent.onnx")


def test_images_are_prepared_as_a_teacher_wants_them():
  """By hand: a step in brightness keeps its halves when it is made twice as large."""
  image = np.zeros((1, 2, 2, 1), np.uint8)
  image[:, :, 1] = 255
  made = teachers.image_input(4, channels=3, mean=[0, 0.5, 1], deviation=[1, 0.5, 2])({"image": image})
  assert made.shape == (1, 3, 4, 4) and made.dtype == np.float32
  np.testing.assert_allclose(made[0, :, 0, 0], [0, -1, -0.5])
  np.testing.assert_allclose(made[0, :, 0, 3], [1, 1, 0])
  colour = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
  grey = teachers.image_input(channels=1, channels_first=False, path="photo")({"photo": colour})
  np.testing.assert_allclose(grey[0, :, :, 0], [[1, 4], [7, 10]])
  with pytest.raises(ValueError, match=r"images of float32 with \[2, 2\] pixels; to be made \[4, 4\], give bytes"):
    teachers.image_input(4)({"image": colour})


def test_a_live_teacher_answers_on_one_core(tmp_path):
  """A callback that waits for a copy, which the only thread is to make, never ends: JAX issue 24255."""
  program = """if True:
    import os
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax, jax.numpy as jnp, numpy as np
    from kdflax import teachers
    head = np.ones((224 * 224 * 3, 16), np.float32)
    flat = lambda images: images.reshape(len(images), -1)
    teacher = teachers.live(lambda batch: {"logits": flat(batch["image"]) @ head}, ["image"])

    @jax.jit
    def step(weights, images):
      said, _ = teacher.apply({}, {}, {"image": images}, train=False)
      return weights - jax.grad(lambda w: jnp.square(flat(images) @ w - said["logits"]).mean())(weights)

    weights = jnp.zeros(head.shape)
    for seed in range(2):
      images = np.random.default_rng(seed).normal(size=(64, 224, 224, 3)).astype(np.float32)
      weights = step(weights, jnp.asarray(images))
    jax.block_until_ready(weights)
  """
  root = pathlib.Path(__file__).parents[2]
  one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # eight have eight threads
  subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=root, env=one_device)
