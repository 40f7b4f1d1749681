"""A PyTorch module teaches, live and recorded, what it says in PyTorch itself."""

import copy

import jax
import numpy as np
import pytest
import torch  # pyright: ignore[reportMissingImports]

from kdflax import data, teachers

IMAGES = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
ARRAYS = {"image": IMAGES, "index": np.arange(6)}
NORMAL = teachers.image_input(mean=[0.4, 0.5, 0.6], deviation=[0.2, 0.3, 0.4])


class Two(torch.nn.Module):
  """Returns its classes and its embedding by name."""

  def __init__(self):
    super().__init__()
    self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    self.drop, self.head = torch.nn.Dropout(0.5), torch.nn.Linear(144, 5)

  def forward(self, image):
    embedding = self.body(image).flatten(1)
    return {"scores": self.head(self.drop(embedding)), "embedding": embedding}


@pytest.fixture(scope="module")
def module():
  torch.manual_seed(0)
  made = Two()
  made.train()(torch.randn(20, 3, 8, 8))  # statistics of BatchNorm that are no longer 0 and 1
  return made


def _expected(module, images=IMAGES):
  pixels = (images / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
  with torch.no_grad():
    said = copy.deepcopy(module).eval().double()(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
  return {name: value.numpy() for name, value in said.items()}


def _close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_outputs_come_by_name_from_the_result_and_from_inside(module, tmp_path):
  outputs = {"logits": "scores", "features.body": "body"}
  teacher = teachers.from_torch(module, outputs=outputs, inputs={"image": NORMAL})
  expected = _expected(module)
  for said in (
    teacher(ARRAYS),
    jax.jit(lambda batch: teacher.model.apply({}, {}, batch, train=True, key=None)[0])(ARRAYS),
    teachers.record_from(teacher, data.padded_batches(ARRAYS, 4), tmp_path, source=teacher.source).read(),
  ):
    _close(said["logits"], expected["scores"])
    assert said["features"]["body"].shape == (6, 4, 6, 6)
    _close(said["features"]["body"].reshape(6, -1), expected["embedding"])


def test_names_may_be_left_out(module):
  assert set(teachers.from_torch(module, inputs={"image": NORMAL})(ARRAYS)) == {"scores", "embedding"}
  plain = torch.nn.Linear(3, 2)
  said = teachers.from_torch(plain)({"image": np.ones((4, 3), np.float32)})
  _close(said["logits"], np.tile(plain(torch.ones(3)).detach().numpy(), (4, 1)))


def test_a_teacher_is_known_by_its_weights(module):
  digest = lambda m: teachers.from_torch(m).source["weights"]
  other = copy.deepcopy(module)
  assert digest(module) == digest(other)
  with torch.no_grad():
    other.head.bias[0] += 1
  assert digest(module) != digest(other)


def test_bfloat16_comes_as_float32():
  module = torch.nn.Linear(3, 2).to(torch.bfloat16)
  to_half = lambda batch: batch["image"]
  teacher = teachers.from_torch(torch.nn.Sequential(_Cast(), module), inputs={"": to_half})
  said = teacher({"image": np.ones((4, 3), np.float32)})
  assert said["logits"].dtype == np.float32


class _Cast(torch.nn.Module):
  def forward(self, x):
    return x.to(torch.bfloat16)


@pytest.mark.parametrize(
  ("make", "outputs", "message"),
  [
    (Two, {"logits": "absent"}, r"returns no 'absent' .*; it returns \['embedding', 'scores'\]"),
    (lambda: torch.nn.LSTM(3, 2), None, r"returns 2 things; name them"),
    (lambda: torch.nn.Linear(3, 2), {"logits": "absent"}, "returns no 'absent' .* it returns Tensor"),
  ],
  ids=["key", "tuple", "tensor"],
)
def test_outputs_that_are_not_there_are_refused(make, outputs, message):
  module = make()
  image = NORMAL if isinstance(module, Two) else (lambda batch: np.ones((2, 3), np.float32))
  name = "image" if isinstance(module, Two) else ""
  with pytest.raises(ValueError, match=message):
    teachers.from_torch(module, outputs=outputs, inputs={name: image})(ARRAYS)
