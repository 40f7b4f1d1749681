"""The memory of CRD as a model: which negatives it draws, and what it computes with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import losses, methods
from tests.methods.case import BATCH, LABELS, pair

KEY = jax.random.key(3)


def memory_of(**settings):
  """The memory model, its state, and embeddings of a batch."""
  method = methods.crd(pair(), num_examples=len(LABELS), negatives=200, width=4, **settings)
  model = method.models["crd"]
  rows = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
  student, teacher = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
  inputs = student, teacher, jnp.asarray([7, 0, 11, 3, 4])
  return model, model.init(jax.random.key(1), inputs)[1], inputs


def indices_of(monkeypatch, **settings):
  """The rows that `losses.crd` is asked about, what it returns, and what the model returns."""
  model, state, inputs = memory_of(**settings)
  asked, original = [], losses.crd

  def spy(student, teacher, indices, memory, **arguments):
    asked.append((indices, arguments))
    return original(student, teacher, indices, memory, **arguments)

  monkeypatch.setattr(losses, "crd", spy)
  outputs, after = model.apply({}, state, inputs, train=True, key=KEY)
  ((indices, arguments),) = asked
  np.testing.assert_array_equal(indices[:, 0], inputs[2])
  values, memory = original(*inputs[:2], indices, losses.CRDMemory(**state), **arguments)
  np.testing.assert_array_equal(outputs["values"], values)
  jax.tree.map(np.testing.assert_array_equal, after, memory._asdict())
  return np.asarray(indices), arguments


def test_negatives_come_from_all_examples_of_other_classes(monkeypatch):
  indices, _ = indices_of(monkeypatch, labels=LABELS)
  for row in indices:
    others = np.flatnonzero(LABELS[row[0]] != LABELS)
    assert set(row[1:]) == set(others)  # 200 draws of at most 12


def test_without_labels_negatives_are_all_other_examples(monkeypatch):
  indices, arguments = indices_of(monkeypatch, temperature=0.2, momentum=0.9)
  for row in indices:
    assert set(row[1:]) == set(range(len(LABELS))) - {row[0]}
  assert (arguments["temperature"], arguments["momentum"]) == (0.2, 0.9)


def test_it_draws_what_the_zoo_has_always_drawn(monkeypatch):
  """As experiments.zoo did before the method was part of the package, on the same key."""
  indices, _ = indices_of(monkeypatch, labels=LABELS)
  order, counts = np.argsort(LABELS, kind="stable"), np.bincount(LABELS)
  own = LABELS[indices[:, 0]][:, None]
  drawn = np.asarray(jax.random.randint(KEY, (5, 200), 0, len(LABELS) - jnp.asarray(counts)[own]))
  starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
  for row, label, positions in zip(indices, own[:, 0], drawn, strict=True):
    others = np.concatenate([order[: starts[label]], order[starts[label] + counts[label] :]])
    np.testing.assert_array_equal(row[1:], others[positions])


def test_evaluation_leaves_the_memory_alone_and_needs_no_key():
  model, state, inputs = memory_of()
  outputs, after = model.apply({}, state, inputs, train=False)
  assert after is state
  again, _ = model.apply({}, state, inputs, train=False, key=None)
  np.testing.assert_array_equal(outputs["values"], again["values"])


def test_the_index_may_lie_elsewhere():
  model = methods.crd(pair(), num_examples=9, index="batch.row").models["crd"]
  assert model.inputs == ("crd_student.output", "crd_teacher.output", "batch.row")
  with pytest.raises(ValueError, match="num_examples must be at least 2 and negatives at least 1; got 9 and 0"):
    methods.crd(pair(), num_examples=9, negatives=0)
  assert BATCH["index"].shape == (5,)
