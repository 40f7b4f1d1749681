"""A teacher recorded as it speaks: what is there after a kill, what a student gets back, and what is refused."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from kdflax import data, teachers
from kdflax.teachers.recording import progress_line

IMAGES = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4, 1)
ARRAYS = {"image": IMAGES, "index": np.arange(10, dtype=np.int32) * 3}


def _teacher(batch):
  """Two numbers of each image, and a map."""
  image = batch["image"].astype(np.float32)
  return {"logits": np.stack([image.sum((1, 2, 3)), image[:, 0, 0, 0]], 1), "features": {"last": image * 2}}


def _batches(size=4, arrays=ARRAYS):
  return list(data.padded_batches(arrays, size))


def _assert_is_what_the_teacher_says(record, index=ARRAYS["index"], images=IMAGES):
  found, expected = record.read(index), _teacher({"image": images})
  np.testing.assert_array_equal(found["logits"], expected["logits"])
  np.testing.assert_array_equal(found["features"]["last"], expected["features"]["last"])


@pytest.mark.parametrize("part_bytes", [1, 300, 1 << 20], ids=["a part a batch", "several", "one"])
def test_each_example_comes_back_once_from_any_number_of_parts(tmp_path, part_bytes):
  record = teachers.record_from(_teacher, _batches(), tmp_path / "left", part_bytes=part_bytes)
  assert len(record) == 10 and record.views == [0]
  assert record.outputs == {"logits": "float32[2]", "features.last": "float32[4,4,1]"}
  _assert_is_what_the_teacher_says(teachers.open_record(tmp_path / "left"))
  order = np.array([9, 0, 27, 9])
  np.testing.assert_array_equal(record.read(order)["logits"], _teacher({"image": IMAGES[order // 3]})["logits"])
  np.testing.assert_array_equal(teachers.read_record(tmp_path / "left", order)["logits"], record.read(order)["logits"])


def test_a_killed_recording_continues_where_it_was(tmp_path):
  """The first process is killed in its third batch; the second asks the teacher for the rest only."""
  program = f"""if True:
    import os, signal, sys
    sys.path.insert(0, {str(pathlib.Path(__file__).parents[2])!r})
    from tests.teachers import test_recording as here
    said = []
    def teacher(batch):
      said.append(1)
      if len(said) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
      return here._teacher(batch)
    here.teachers.record_from(teacher, here._batches(), {str(tmp_path)!r}, part_bytes=1, inputs="image")
  """
  assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
  with pytest.raises(ValueError, match="it was interrupted"):
    teachers.open_record(tmp_path)
  assert teachers.inspect(tmp_path)[tmp_path.name]["rows"] == 8
  asked = []
  record = teachers.record_from(lambda b: asked.append(b["index"]) or _teacher(b), _batches(), tmp_path, inputs="image")
  assert [index.tolist() for index in asked] == [[24, 27, 0, 0]]
  _assert_is_what_the_teacher_says(record)


def test_a_complete_record_is_not_computed_again(tmp_path):
  before = teachers.record_from(_teacher, _batches(), tmp_path, source={"model": "sums"})
  refuse = lambda batch: pytest.fail("asked again")
  again = teachers.record_from(refuse, _batches(size=3), tmp_path, source={"model": "sums"})
  assert again.digest == before.digest


def test_a_mistake_of_the_teacher_costs_no_rows(tmp_path):
  def fails(batch):
    if 24 in batch["index"]:
      raise RuntimeError("the server is gone")
    return _teacher(batch)

  with pytest.raises(RuntimeError, match="the server is gone"):
    teachers.record_from(fails, _batches(), tmp_path)
  assert teachers.inspect(tmp_path)[tmp_path.name]["rows"] == 8


@pytest.mark.parametrize("succeed", range(4), ids=["first part", "its manifest", "second part", "its manifest again"])
def test_a_full_disk_leaves_what_was_written_before(tmp_path, monkeypatch, succeed):
  calls = []

  def fail(_):
    calls.append(1)
    if len(calls) > succeed:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
    patch.setattr(os, "fsync", fail)
    teachers.record_from(_teacher, _batches(), tmp_path, part_bytes=1)
  with contextlib.suppress(ValueError):
    assert teachers.inspect(tmp_path)[tmp_path.name]["rows"] == 4 * (succeed // 2)
  _assert_is_what_the_teacher_says(teachers.record_from(_teacher, _batches(), tmp_path, part_bytes=1))


def test_a_student_sees_the_views_that_the_teacher_saw(tmp_path):
  """Random shifts in three views: each batch of the student's own pipeline finds the rows of its views."""
  augment = data.random_shift(2)
  record = teachers.record_from(_teacher, data.views(ARRAYS, augment, 3, 7), tmp_path, inputs="image", num_rows=30)
  assert len(record) == 30 and record.views == [0, 1, 2]
  stream = data.grain_batches(ARRAYS, 8, seed=5, augment=data.random_view(augment, 3))
  batches = teachers.RecordedBatches(stream, {"teacher": record})
  position = batches.get_state()
  first = next(batches)
  assert len(set(first["view"].tolist())) > 1
  for batch in (first, next(batches)):
    np.testing.assert_array_equal(batch["teacher"]["logits"], _teacher(batch)["logits"])
  batches.set_state(position)
  np.testing.assert_array_equal(next(batches)["image"], first["image"])
  with pytest.raises(ValueError, match="the position is of other records"):
    batches.set_state(position | {"records": {}})


def test_what_the_teacher_did_not_see_is_refused(tmp_path):
  augment = data.random_shift(2)
  record = teachers.record_from(_teacher, data.views(ARRAYS, augment, 2, 10), tmp_path, inputs="image")
  batch = next(data.views(ARRAYS, augment, 2, 10))
  record.of(batch)
  other = batch | {"image": batch["image"].copy()}
  other["image"][3, 0, 0, 0] += 1
  with pytest.raises(ValueError, match=r"1 of 10 examples have another 'image' .* first \[9\]"):
    record.of(other)
  with pytest.raises(ValueError, match="10 of 10 examples have another 'image'"):
    record.of(batch | {"image": batch["image"].astype(np.float32)})
  with pytest.raises(ValueError, match=r"lacks 10 of the examples, first \[0, 3, .* in the view 2 \(it has 0, 1\)"):
    record.of(batch | {"view": np.full(10, 2)})
  with pytest.raises(ValueError, match=r"has the views 0, 1 of its examples; say which"):
    record.of({"index": batch["index"]})
  with pytest.raises(ValueError, match="a batch needs 'index'"):
    record.of({"image": batch["image"]})
  with pytest.raises(ValueError, match=r"10 examples have another 'image' than when .* was begun, first"):
    teachers.record_from(_teacher, data.views(ARRAYS, data.random_flip, 2, 10), tmp_path, inputs="image")


def test_several_teachers_share_a_store(tmp_path):
  double = lambda batch: {"logits": 2 * _teacher(batch)["logits"]}
  teachers.record_from(_teacher, _batches(), tmp_path / "one", source={"of": 1})
  teachers.record_from(double, _batches(), tmp_path / "two", dtype=np.float16)
  teachers.record(tmp_path / "three", {"logits": np.zeros((10, 2))}, ARRAYS["index"])
  found = teachers.open_records(tmp_path)
  assert list(found) == ["one", "three", "two"]
  batch = next(teachers.RecordedBatches(iter(_batches()), found))
  np.testing.assert_array_equal(batch["two"]["logits"], (2 * batch["one"]["logits"]).astype(np.float16))
  summary = teachers.inspect(tmp_path)
  assert summary["one"] == {
    "rows": 10, "examples": 10, "views": [0], "outputs": found["one"].outputs, "complete": True, "source": {"of": 1},
    "bytes": (tmp_path / "one" / "part-00000.safetensors").stat().st_size,
  }  # fmt: skip
  assert summary["two"]["outputs"] == {"logits": "float16[2]"}
  for ask in (teachers.open_records, teachers.inspect):
    with pytest.raises(ValueError, match="holds no record"):
      ask(tmp_path / "one" / "nowhere")


def test_a_record_stays_on_disk_when_it_is_opened(tmp_path):
  """Outputs are views of the mapped file; what is read is a copy of the rows asked for."""
  record = teachers.record_from(_teacher, _batches(), tmp_path)
  stored, read = record._parts[0]["logits"], record.read(np.array([0]))["logits"]
  assert isinstance(_root(stored), np.memmap)
  assert read.flags.owndata and read.flags.writeable


def _root(array):
  while not isinstance(array, np.memmap) and isinstance(array, np.ndarray | memoryview):
    array = array.obj if isinstance(array, memoryview) else array.base
  return array


@pytest.mark.parametrize(
  ("function", "message"),
  [
    (lambda b: {"logits": np.zeros((3, 2))}, r"logits has shape \(3, 2\); expected 4 rows"),
    (lambda b: {"logits": np.full((4, 2), np.nan)}, "logits holds NaN"),
    (lambda b: {"logits": np.zeros((4, 2 + (24 in b["index"])))}, r"the outputs changed: .*float64\[2\].*float64\[3\]"),
    (lambda b: {"view": np.zeros((4, 2))}, "'view' is the name of an output"),
    (lambda b: {"logits": np.full((4, 2), 1e5)}, "logits reaches 100000, which float16 does not hold"),
  ],
  ids=["rows", "nan", "changed", "name", "float16"],
)
def test_outputs_that_would_mislead_are_refused(tmp_path, function, message):
  with pytest.raises(ValueError, match=message):
    teachers.record_from(function, _batches(), tmp_path, dtype=np.float16 if "float16" in message else None)


@pytest.mark.parametrize("change", [{"source": {"model": "other"}}, {"inputs": "image"}], ids=["source", "inputs"])
def test_another_record_is_not_continued(tmp_path, change):
  teachers.record_from(_teacher, _batches(), tmp_path, source={"model": "one"})
  with pytest.raises(ValueError, match=f"holds a record of another {next(iter(change))}: .*; choose another directory"):
    teachers.record_from(_teacher, _batches(), tmp_path, **{"source": {"model": "one"}, **change})


def test_two_writers_are_kept_apart(tmp_path):
  with open(tmp_path / "lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match="another process is recording into"):
      teachers.record_from(_teacher, _batches(), tmp_path)


def test_a_batch_says_which_examples_it_holds(tmp_path):
  with pytest.raises(ValueError, match="a batch needs 'index'"):
    teachers.record_from(_teacher, [{"image": IMAGES}], tmp_path)
  with pytest.raises(ValueError, match=r"integers \[batch\]; got float32\[10\]"):
    teachers.record_from(_teacher, [{"image": IMAGES, "index": np.zeros(10, np.float32)}], tmp_path)


def test_damage_is_noticed(tmp_path):
  teachers.record_from(_teacher, _batches(), tmp_path, part_bytes=1)
  part = tmp_path / "part-00001.safetensors"
  content = part.read_bytes()
  part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(ValueError, match=r"part-00001.safetensors is not what was recorded"):
    teachers.open_record(tmp_path)
  part.unlink()
  with pytest.raises(ValueError, match=r"part-00001.safetensors is missing"):
    teachers.open_record(tmp_path, verify=False)
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  manifest["parts"][1] = manifest["parts"][0]
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match="a row of an example is there twice"):
    teachers.open_record(tmp_path)


def test_progress_says_how_long_the_rest_takes(tmp_path, monkeypatch):
  assert progress_line("t", 250, 1000, 10.0) == "t: 250 of 1,000 rows, 10.0 a second, 1 min 15 s left"
  assert progress_line("t", 0, 72_000, 10.0) == "t: 0 of 72,000 rows, 10.0 a second, 2 h 00 min left"
  assert progress_line("t", 250, None, 10.0) == "t: 250 rows, 10.0 a second"
  monkeypatch.setattr("kdflax.teachers.recording._SECONDS_A_LINE", 0)
  lines = []
  teachers.record_from(_teacher, _batches(), tmp_path / "a", num_rows=10, progress=lines.append)
  assert [line.split(" rows")[0] for line in lines] == ["a: 4 of 10", "a: 8 of 10", "a: 10 of 10"]


def test_an_augmentation_that_makes_no_sense_is_refused():
  with pytest.raises(ValueError, match="num_views=0 must be at least 1"):
    data.random_view(data.random_flip, 0)
  with pytest.raises(ValueError, match="batch_size=0 must be positive"):
    data.views(ARRAYS, data.random_flip, 1, 0)
