"""A folder and a teacher's file become a student, and every mistake is named before anything is written."""

import json

import jax
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from experiments import networks, own, own_data
from kdflax import teachers
from kdflax.export import load_exported

CLASSES = ("dark", "grey", "light")
RANDOM = np.random.default_rng(0)
LEVELS = np.repeat([30, 120, 220], 40)
IMAGES = (LEVELS[:, None, None] + RANDOM.integers(-25, 26, size=(120, 6, 6))).astype(np.uint8)


def _folder(root, rows=None):
  for n in range(120) if rows is None else rows:
    place = root / CLASSES[n // 40]
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGES[n]).save(place / f"{n:03d}.png")
  return root


def _teacher(path, order=(0, 1, 2), softmax=False, shape=("n", 1, 4, 4)):
  """Scores by the distance of the mean brightness to that of each class."""
  slope = np.array([30, 120, 220], np.float32)[list(order)] / 255
  weights, bias = np.tile(40 * slope / 16, (16, 1)).astype(np.float32), (-20 * slope**2).astype(np.float32)
  nodes = [helper.make_node("Flatten", ["pixels"], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["scores"])]
  nodes += [helper.make_node("Softmax", ["scores"], ["probabilities"])] if softmax else []
  graph = helper.make_graph(
    nodes,
    "teacher",
    [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)],
    [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", len(order)])],
    [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
  )
  onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
  return str(path)


def _ask(config):
  opened = own_data.own_data(config)
  return opened, [own_data.ask(config, opened, name, file) for name, file in config.tasks().items()]


def _config(tmp_path, teacher=None, data=None, **settings):
  data = _folder(tmp_path / "data") if data is None else data
  teacher = (teacher or _teacher(tmp_path / "teacher.onnx"),)
  return own.Config(data=str(data), teacher=teacher, channels=1, student="mlp-4", run=str(tmp_path / "run"), **settings)


def test_each_class_keeps_its_share_in_every_split(tmp_path):
  opened, _ = _ask(_config(tmp_path, labels=10))
  assert opened.classes == CLASSES
  assert {name: np.bincount(opened.labels[rows]).tolist() for name, rows in opened.rows.items()} == {
    "train": [28, 28, 28], "validation": [6, 6, 6], "test": [6, 6, 6]
  }  # fmt: skip
  assert sorted(np.concatenate(list(opened.rows.values()))) == list(range(120))
  rows = np.array([70, 3, 119])
  np.testing.assert_array_equal(opened.arrays(None, rows)["image"][..., 0], IMAGES[rows])


def test_splits_of_the_folder_stay(tmp_path):
  _folder(tmp_path / "data" / "train", range(0, 120, 2))
  _folder(tmp_path / "data" / "test", range(1, 120, 4))
  opened, _ = _ask(_config(tmp_path, data=tmp_path / "data"))
  assert opened.rows["test"].tolist() == list(range(60, 90))
  np.testing.assert_array_equal(opened.arrays(None, np.array([60, 0]))["image"][..., 0], IMAGES[[1, 0]])


def test_a_teacher_sees_its_own_size_and_may_say_probabilities(tmp_path):
  """Of 6 x 6 images it wants 4 x 4; the soft targets of logits and of their softmax are the same."""
  said = []
  for softmax in (False, True):
    config = _config(tmp_path, _teacher(tmp_path / f"{softmax}.onnx", softmax=softmax))
    opened, (asked,) = _ask(config)
    assert asked.size == (4, 4)
    said.append(own_data.hear(config, opened, asked, tmp_path / "store" / str(softmax)).logits)
  shifted = said[0] - np.log(np.exp(said[0].astype(float)).sum(1, keepdims=True))
  np.testing.assert_allclose(said[1], np.maximum(shifted, np.log(1e-9)), rtol=1e-4, atol=1e-4)
  assert (said[0].argmax(1) == opened.labels).mean() > 0.95
  (tmp_path / "names.txt").write_text("light\ndark\ngrey\n")
  named = _config(tmp_path, _teacher(tmp_path / "other.onnx", (2, 0, 1)), teacher_classes=str(tmp_path / "names.txt"))
  opened, (asked,) = _ask(named)
  np.testing.assert_allclose(own_data.hear(named, opened, asked, tmp_path / "named").logits, said[0], rtol=1e-4)


def _empty_class(config, tmp_path):
  (tmp_path / "data" / "white").mkdir()


def _small_class(config, tmp_path):
  _folder(tmp_path / "data")
  (tmp_path / "data" / "white").mkdir()
  Image.fromarray(IMAGES[0]).save(tmp_path / "data" / "white" / "0.png")


def _odd_size(config, tmp_path):
  Image.fromarray(IMAGES[0][:5]).save(tmp_path / "data" / "dark" / "000.png")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (_empty_class, "no image .* in the class white"),
    (_small_class, r"too few images to hold some out, at least 3 of each class: \{'white': 1\}"),
    (_odd_size, r"pixels, others have .*; give a size"),
  ],
  ids=["empty", "small", "size"],
)
def test_data_that_are_not_in_order_are_named(tmp_path, change, message):
  config = _config(tmp_path)
  change(config, tmp_path)
  with pytest.raises(ValueError, match=message):
    own.main(config)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("make", "settings", "message"),
  [
    (lambda f: _teacher(f, (0, 1)), {}, "knows 2 classes, the data have 3: dark, grey, light; name those"),
    (lambda f: _teacher(f, (1, 2, 0)), {}, r"is right on 0.0% of 84 labelled images, a guess on 33.3%"),
    (lambda f: _teacher(f, shape=("n", 16)), {}, r"takes 'pixels' as float32\[None, 16\]; expected images with 1 or 3"),
    (lambda f: _teacher(f), {"teacher_output": "logits"}, r"has no tensor \['logits'\]; its outputs are \['scores'\]"),
    (lambda f: _teacher(f), {"teacher_classes": "a b"}, "names 2 classes, the teacher has 3"),
    (lambda f: _teacher(f), {"teacher_classes": "dark grey white"}, "the teacher knows no class light; it knows dark"),
    (
      lambda f: str(f.with_suffix(".pt")),
      {},
      "teacher.pt: expected an .onnx file, a .safetensors",
    ),
    (lambda f: str(f.with_suffix(".safetensors")), {}, "holds weights: say of which network by --teacher-network"),
  ],
  ids=["classes", "order", "inputs", "output", "names", "unknown", "kind", "network"],
)
def test_a_teacher_that_does_not_fit_is_named(tmp_path, make, settings, message):
  if "teacher_classes" in settings:
    (tmp_path / "names.txt").write_text(settings["teacher_classes"].replace(" ", "\n"))
    settings = {"teacher_classes": str(tmp_path / "names.txt")}
  with pytest.raises(ValueError, match=message):
    own.main(_config(tmp_path, make(tmp_path / "teacher.onnx"), **settings))
  assert not (tmp_path / "run").exists()


def test_folders_of_other_classes_are_named(tmp_path):
  _folder(tmp_path / "data" / "train")
  _folder(tmp_path / "data" / "test", range(80))
  with pytest.raises(ValueError, match=r"test has other classes than .*train: lacks \['light'\], and \[\] more"):
    own.main(_config(tmp_path, data=tmp_path / "data"))


def test_weights_that_changed_are_another_teacher(tmp_path):
  """In a file of the same name; what the teacher before it said is not taken for its words."""
  file, network = tmp_path / "teacher.safetensors", networks.network("mlp-4", 3)
  settings = {"teacher_network": "mlp-4", "size": 6, "trust_teacher": True}
  for seed in (0, 1):
    teachers.save_variables(file, network.init(jax.random.key(seed), {"image": IMAGES[:1, ..., None]}))
    config = _config(tmp_path, str(file), **settings)
    opened, (asked,) = _ask(config)
    if seed == 0:
      logits = own_data.hear(config, opened, asked, tmp_path / "record").logits
      assert logits.shape == (120, 3)
  with pytest.raises(ValueError, match="holds a record of another source"):
    own_data.hear(config, opened, asked, tmp_path / "record")


def test_a_record_of_other_images_is_refused(tmp_path):
  config = _config(tmp_path)
  opened, (asked,) = _ask(config)
  own_data.hear(config, opened, asked, tmp_path / "record")
  again = _config(tmp_path, str(tmp_path / "record"))
  _, (from_record,) = _ask(again)
  np.testing.assert_array_equal(
    own_data.hear(again, opened, from_record, tmp_path / "unused").logits,
    own_data.hear(config, opened, asked, tmp_path / "record").logits,
  )
  Image.fromarray(255 - IMAGES[0]).save(tmp_path / "data" / "dark" / "000.png")
  with pytest.raises(ValueError, match=r"have another 'image' than the teacher of .* saw"):
    _ask(again)
  (tmp_path / "data" / "dark" / "000.png").unlink()
  with pytest.raises(ValueError, match="is a record of 120 images, the data have 119"):
    _ask(again)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"teacher": ()}, "say --data"),
    ({"teacher": ("a.onnx", "b.onnx")}, "several teachers have names: --teacher left=a.onnx"),
    ({"teacher": ("a=a.onnx", "a=b.onnx")}, "several teachers have names"),
    ({"student": "vgg"}, "no network 'vgg'"),
    ({"held_out": 0.5}, "held_out=0.5 must be below 0.4"),
    ({"steps": 0}, "steps must be at least 1"),
  ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    own.Config(**{"data": "flowers", "teacher": ("a.onnx",)} | settings).checked()


def test_the_command_line_of_distill_knows_whose_data_it_is_about():
  assert own.asked(["--student", "mlp-4", "--data=flowers"]) and own.asked(["--data", "flowers"])
  assert not own.asked(["--dataset", "digits"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "table of two teachers"])
def test_from_a_folder_and_a_file_to_a_student(tmp_path, kind):
  """The exported student says what the table says of it."""
  teacher, data = _teacher(tmp_path / "teacher.onnx"), _folder(tmp_path / "data")
  if kind != "folder":
    data = tmp_path / "data.parquet"
    files = sorted((tmp_path / "data").rglob("*.png"))
    pq.write_table(pa.table({"image": [{"bytes": file.read_bytes(), "path": None} for file in files]}), data)
  names = (teacher,) if kind == "folder" else (f"left={teacher}", f"right={_teacher(tmp_path / 'b.onnx', (2, 1))}")
  config = own.Config(
    data=str(data), teacher=names, channels=1, student="mlp-8", run=str(tmp_path / "run"), smoke=True, label=""
  )
  with jax.default_matmul_precision("float32"):
    own.main(config)
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  who = [result["who"] for result in results]
  students = ["distilled", "labels alone"] if kind == "folder" else ["distilled"]
  assert who == [*(["teacher"] if kind == "folder" else []), *students, "exported", "exported, weights of 8 bits"]
  predict = load_exported(tmp_path / "run" / "student")
  opened = own_data.own_data(config)
  test = opened.arrays(None, opened.rows["test"])
  said = predict({"image": test["image"]})
  exported = results[who.index("exported")]
  if kind == "folder":
    right = (np.asarray(said["logits.class"]).argmax(1) == test["label"]).mean()
    np.testing.assert_allclose(exported["accuracy"], [right])
    assert json.loads((tmp_path / "run" / "student" / "about.json").read_text())["classes"] == list(CLASSES)
  else:
    stored = teachers.read_record(tmp_path / "run" / "teachers" / "right", test["index"])["logits"]
    agreed = (np.asarray(said["logits.right"]).argmax(1) == stored.argmax(1)).mean()
    np.testing.assert_allclose(exported["agreement/right"], [agreed])
