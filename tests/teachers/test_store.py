"""Recorded teachers: what comes back is what was recorded, for the examples asked for, or an error."""

import errno
import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from kdflax import losses, models, teachers, training
from kdflax.objectives import Term, evaluate

INDEX = np.array([30, 10, 20, 40])


def _outputs(dtype=np.float32):
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=(len(INDEX), *shape)).astype(dtype)
  return {"logits": draw(3), "features": {"stage1": draw(2, 2, 5)}}


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16])
def test_a_record_comes_back_as_it_was(tmp_path, dtype):
  teachers.record(tmp_path / "new" / "record", _outputs(dtype), INDEX)
  _assert_same(teachers.read_record(tmp_path / "new" / "record"), _outputs(dtype))


def test_rows_come_in_the_order_asked_for(tmp_path):
  outputs = _outputs()
  teachers.record(tmp_path, outputs, INDEX)
  _assert_same(
    teachers.read_record(tmp_path, np.array([10, 40, 10])), jax.tree.map(lambda x: x[np.array([1, 3, 1])], outputs)
  )


@pytest.mark.parametrize("wanted", [[10, 15], [10, 99], [-1, 10]])
def test_missing_examples_are_named(tmp_path, wanted):
  teachers.record(tmp_path, _outputs(), INDEX)
  absent = next(i for i in wanted if i not in INDEX)
  with pytest.raises(ValueError, match=rf"lacks 1 of the examples, first \[{absent}\]"):
    teachers.read_record(tmp_path, np.array(wanted))


def test_arrays_in_any_memory_order_are_stored_by_their_values(tmp_path):
  """A file of the bytes as they lie in memory would come back transposed."""
  plain = _outputs()
  awkward = {
    "logits": np.asfortranarray(plain["logits"]),
    "features": {"stage1": np.moveaxis(np.moveaxis(plain["features"]["stage1"], 0, -1).copy(), -1, 0)},
  }
  assert not awkward["logits"].flags.c_contiguous and not awkward["features"]["stage1"].flags.c_contiguous
  teachers.record(tmp_path, awkward, INDEX)
  _assert_same(teachers.read_record(tmp_path), plain)


@pytest.mark.parametrize("position", [0.1, 0.5, 0.99])
def test_changed_content_is_refused(tmp_path, position):
  teachers.record(tmp_path, _outputs(), INDEX)
  path = tmp_path / "outputs.safetensors"
  content = bytearray(path.read_bytes())
  content[int(position * len(content))] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match="is not what was recorded"):
    teachers.read_record(tmp_path)


@pytest.mark.parametrize("manifest", ["", '{"sha256": "12', "{}", "[]", "null"])
def test_a_damaged_manifest_is_named(tmp_path, manifest):
  teachers.record(tmp_path, _outputs(), INDEX)
  (tmp_path / "manifest.json").write_text(manifest)
  with pytest.raises(ValueError, match=rf"{tmp_path}/manifest.json is damaged .*; record the teacher again"):
    teachers.read_record(tmp_path)


def test_shortened_content_is_refused(tmp_path):
  teachers.record(tmp_path, _outputs(), INDEX)
  path = tmp_path / "outputs.safetensors"
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match="is not what was recorded"):
    teachers.read_record(tmp_path)


@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("succeed", [0, 1], ids=["arrays", "manifest"])
def test_interrupted_writing_leaves_no_record(tmp_path, monkeypatch, before, succeed):
  """Half a record, or new arrays beside an old manifest, must not pass for a record."""
  if before:
    teachers.record(tmp_path, jax.tree.map(np.zeros_like, _outputs()), INDEX)
  calls = []

  def fail(_):
    calls.append(1)
    if len(calls) > succeed:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
    patch.setattr(os, "fsync", fail)
    teachers.record(tmp_path, _outputs(), INDEX)
  with pytest.raises(ValueError, match="no complete teacher record"):
    teachers.read_record(tmp_path)
  teachers.record(tmp_path, _outputs(), INDEX)
  _assert_same(teachers.read_record(tmp_path), _outputs())


def test_no_record_is_said_so(tmp_path):
  with pytest.raises(ValueError, match="no complete teacher record"):
    teachers.read_record(tmp_path / "nowhere")
  teachers.record(tmp_path, _outputs(), INDEX)
  (tmp_path / "outputs.safetensors").unlink()
  with pytest.raises(ValueError, match="no complete teacher record"):
    teachers.read_record(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda o: o["features"]["stage1"].__setitem__((2, 0, 0, 0), np.nan), "features.stage1 holds NaN"),
    (lambda o: o["logits"].__setitem__((0, 0), np.inf), "logits holds NaN or infinite"),
    (lambda o: o.update(logits=o["logits"][:3]), r"logits has shape \(3, 3\); expected 4 rows"),
    (lambda o: o.update(index=np.zeros(4, np.float32)), "'index' is the name"),
    (lambda o: o.update({"a.b": np.zeros(4, np.float32)}), "a.b"),
  ],
  ids=["nan", "inf", "rows", "index", "dot"],
)
def test_outputs_that_would_mislead_are_refused(tmp_path, change, message):
  outputs = _outputs()
  change(outputs)
  with pytest.raises(ValueError, match=message):
    teachers.record(tmp_path, outputs, INDEX)
  assert not list(tmp_path.iterdir())


def test_an_example_twice_is_refused(tmp_path):
  with pytest.raises(ValueError, match="names an example twice"):
    teachers.record(tmp_path, _outputs(), np.array([1, 2, 3, 1]))


def test_large_float64_values_are_finite(tmp_path):
  outputs = {"logits": np.full((4, 3), 1e300)}
  teachers.record(tmp_path, outputs, INDEX)
  _assert_same(teachers.read_record(tmp_path), outputs)


def test_a_live_teacher_and_its_record_serve_the_same_terms(tmp_path):
  """The same Terms, the same student: only where the teacher's outputs come from differs."""
  network, student = models.mlp((4,), num_classes=3), models.mlp((2,), num_classes=3)
  batch = {"image": np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)}
  teacher, pupil = network.init(jax.random.key(0), batch), student.init(jax.random.key(1), batch)
  outputs, _ = network.apply(*teacher, batch, train=False, key=None)
  teachers.record(tmp_path, outputs, INDEX)
  order = np.array([2, 0, 3, 1])
  batch = {"image": batch["image"][order]}
  pair = {"student": "student.embedding", "teacher": "teacher.embedding"}
  terms = {
    "soft": Term(losses.kl_soft_targets, {"student_logits": "student.logits", "teacher_logits": "teacher.logits"}),
    "relation": Term(losses.similarity_preserving, pair, 3.0),
  }
  live = training.apply_models({"student": student, "teacher": network}, {"student": pupil, "teacher": teacher}, batch)
  stored = training.apply_models(
    {"student": student, "teacher": teachers.recorded()},
    {"student": pupil, "teacher": ({}, {})},
    batch | {"teacher": teachers.read_record(tmp_path, INDEX[order])},
  )
  assert live["teacher"].keys() == stored["teacher"].keys()
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(compare, evaluate(terms, live), evaluate(terms, stored))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, np.complex64, jnp.int4])
def test_what_would_not_come_back_is_not_recorded(tmp_path, dtype):
  """The record may be the only copy of a teacher."""
  with pytest.raises(ValueError, match=r"logits is .*, which a safetensors file does not bring back"):
    teachers.record(tmp_path / "record", {"logits": np.ones((4, 3)).astype(dtype)}, INDEX)
  with pytest.raises(ValueError, match=r"params/w is .*, which a safetensors file does not bring back"):
    teachers.save_variables(tmp_path / "file", ({"w": jnp.ones(3).astype(dtype)}, {}))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64, np.int8, np.uint16, np.int64, np.bool_])
def test_every_other_dtype_comes_back(tmp_path, dtype):
  outputs = {"logits": np.ones((4, 3)).astype(dtype), "none": np.ones((4, 0)).astype(dtype)}
  teachers.record(tmp_path / "record", outputs, INDEX)
  _assert_same(teachers.read_record(tmp_path / "record"), outputs)
  teachers.save_variables(tmp_path / "file", (outputs, {}))
  _assert_same(teachers.load_variables(tmp_path / "file")[0], outputs)


def _forge(folder, arrays, examples):
  """A record whose manifest agrees with the content, whatever that is."""
  content = arrays if isinstance(arrays, bytes) else save(arrays)
  (folder / "outputs.safetensors").write_bytes(content)
  manifest = {"sha256": hashlib.sha256(content).hexdigest(), "examples": examples, "source": {}}
  (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"logits": np.ones((3, 2)), "index": np.array([1, 2, 1])}, "each of 3 examples once: the index .* repeats some"),
    ({"logits": np.ones((4, 2)), "index": np.array([1, 2, 3])}, r"once: logits has shape \[4, 2\]"),
    ({"logits": np.ones((3, 2)), "index": np.array([1, 2, 3, 4])}, r"once: index has shape \[4\]"),
    ({"logits": np.ones((3, 2)), "index": np.ones(3)}, r"the index float64\[3\]"),
    ({"logits": np.array(1.0), "index": np.arange(3)}, r"once: logits has shape \[\]"),
    ({"logits": np.ones((3, 2))}, "is no record .KeyError"),
    ({"a": np.ones(3), "a.b": np.ones(3), "index": np.arange(3)}, "once: a is the beginning of a"),
    (b"", "is no record"),
    (b"\xff" * 100, "is no record"),
  ],
  ids=["twice", "surplus", "index", "kind", "scalar", "no index", "names", "empty", "noise"],
)
def test_a_record_that_only_its_manifest_believes_is_refused(tmp_path, arrays, message):
  _forge(tmp_path, arrays, 3)
  with pytest.raises(ValueError, match=message):
    teachers.read_record(tmp_path, np.array([1, 2]))


def test_an_empty_record_lacks_every_example(tmp_path):
  teachers.record(tmp_path, {"logits": np.ones((0, 3))}, np.zeros(0, int))
  assert teachers.read_record(tmp_path)["logits"].shape == (0, 3)
  with pytest.raises(ValueError, match="lacks 2 of the examples"):
    teachers.read_record(tmp_path, np.array([1, 2]))


@pytest.mark.parametrize("manifest", ["[" * 100_000, '{"sha256": "12"}'], ids=["deep", "short"])
def test_a_manifest_of_another_form_is_named(tmp_path, manifest):
  teachers.record(tmp_path, _outputs(), INDEX)
  (tmp_path / "manifest.json").write_text(manifest)
  with pytest.raises(ValueError, match=r"manifest\.json is damaged .*; record the teacher again"):
    teachers.read_record(tmp_path)
