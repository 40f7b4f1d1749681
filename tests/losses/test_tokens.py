"""Labels beside their predictions, and one number from values on tokens."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kdflax import losses

VALUES = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
WHERE = np.random.default_rng(1).random((8, 5)) < 0.6
WHERE[3] = False  # a sequence in which nothing counts


def expected(by):
  if by == "tokens":
    return VALUES[WHERE].mean()
  if by == "sequences":
    return np.mean([values[where].mean() for values, where in zip(VALUES, WHERE, strict=True) if where.any()])
  return VALUES[WHERE].sum() / by


@pytest.mark.parametrize("by", ["tokens", "sequences", 17])
def test_one_number_from_a_batch_and_from_its_shards(by):
  poisoned = np.where(WHERE, VALUES, np.nan)
  np.testing.assert_allclose(losses.normalize(poisoned, WHERE, by), expected(by), rtol=1e-6)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  local = lambda values, where: losses.normalize(values, where, by, axis_name="data")
  spread = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
  np.testing.assert_allclose(jax.jit(spread)(poisoned, WHERE), expected(by), rtol=1e-6)
  assert losses.normalize(poisoned, np.zeros_like(WHERE), by) == 0


def test_parts_of_a_batch_add_up_by_its_count():
  count = WHERE.sum()
  parts = [losses.normalize(VALUES[part], WHERE[part], count) for part in np.split(np.arange(8), 4)]
  np.testing.assert_allclose(sum(parts), expected("tokens"), rtol=1e-6)
  assert losses.normalize(VALUES[:1], np.zeros((1, 5), bool), 0) == 0
  assert losses.normalize(jnp.ones(3, jnp.bfloat16)).dtype == "float32"


def test_labels_move_one_position_earlier():
  labels, where = np.array([[5, 6, 7, 8], [1, 2, 3, 4]]), np.array([[False, False, True, True], [True] * 4])
  moved, counted = losses.shift_labels(labels, where, segments=np.array([[0, 0, 0, 0], [0, 0, 1, 1]]))
  np.testing.assert_array_equal(moved, [[6, 7, 8, -1], [2, 3, 4, -1]])
  np.testing.assert_array_equal(counted, [[False, True, True, False], [True, False, True, False]])


def test_mistakes_are_named():
  with pytest.raises(ValueError, match=r"by must be 'tokens', 'sequences' .* or a number; got 'mean'"):
    losses.normalize(VALUES, WHERE, "mean")
  with pytest.raises(ValueError, match=r"by must be a single number; got shape \(8,\)"):
    losses.normalize(VALUES, WHERE, np.ones(8))
  with pytest.raises(ValueError, match="where must be bool"):
    losses.normalize(VALUES, WHERE[0])
  with pytest.raises(ValueError, match=r"labels must be signed integers \[..., length\]; got float"):
    losses.shift_labels(VALUES)
  with pytest.raises(ValueError, match=r"same shape; got labels \(4,\), segments \(3,\)"):
    losses.shift_labels(np.arange(4), segments=np.arange(3))


def test_the_program_of_the_language_page_runs():
  page = (pathlib.Path(__file__).parents[2] / "docs" / "language.md").read_text()
  names = {}
  exec(page.split("```python\n")[1].split("```")[0], names)
  soft = losses.jensen_shannon(
    *(side["hidden"] @ side["head"].T for side in (names["student"], names["teacher"])),
    temperature=2.0,
    where=names["where"],
  )
  hard = losses.fused_cross_entropy(*names["student"].values(), names["labels"], where=names["where"])
  plain = 0.9 * losses.masked_mean(soft, names["where"]) + 0.1 * losses.masked_mean(hard, names["where"])
  np.testing.assert_allclose(names["value"], plain, rtol=1e-4)
  assert all(np.isfinite(gradient).all() and gradient.any() for gradient in names["gradients"].values())
