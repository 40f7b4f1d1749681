"""`where` over the positions of features: masked tokens and pixels reach nothing, in every loss on features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import losses
from kdflax.objectives import Term, evaluate
from tests.losses import family_features as reference
from tests.losses import family_similarity
from tests.losses.case import pairs_of
from tests.losses.family_similarity import with_classes
from tests.losses.test_contract import CASES, assert_close, cast, inputs_of

# On whole examples, whose trailing axes they flatten: features of one axis, or relations between examples.
OF_WHOLE_EXAMPLES = {
  "correlation_congruence",
  "direction",
  "info_nce",
  "pkt",
  "rkd_angle",
  "rkd_distance",
  "similarity_distribution",
  "similarity_preserving",
}
# Inputs with the same positions on all sides, where those of the case differ in size.
OF_ONE_SIZE = {
  "fsp": reference.layers_of((3, 4, 2), (3, 4, 3), (3, 4, 2), (3, 4, 3)),
  "inter_channel_correlation": pairs_of(3, 4, 5),
  "class_attention_transfer": pairs_of(5, 4, 3),
  "channel_wise": pairs_of(3, 4, 5),
  "prototype_similarity": with_classes((3, 3, 4), (3, 3, 5), 2),
  "wkd_features": pairs_of(3, 4, 2),
  "nst": pairs_of(3, 4, 2, teacher=(3, 4, 3)),
  "kdsvd": lambda rng, batch: reference.subspaces(rng, batch, *[(3, 4, 3)] * 4),
}


def of_pooled(value):
  """The reference of a loss on one size of pools, from maps of which only some positions count."""

  def masked_pool(x, where, sizes):
    share = reference.pool(where[..., None].astype(float), sizes)
    pooled = reference.pool(np.where(where[..., None], x, 0), sizes)
    return np.divide(pooled, share, out=np.zeros_like(pooled), where=share > 0), share[..., 0] > 0

  return lambda s, t, where: value(lambda x, sizes: masked_pool(x, where, sizes), s, t, where)


def hierarchical_context(pool, s, t, where):
  difference = lambda d, where: (d**2 * where[..., None]).sum((1, 2, 3)) / (where.sum((1, 2)) * d.shape[-1])
  levels = [difference(*pool(s - t, (level, level))) for level in (4, 2, 1)]
  return (difference(s - t, where) + levels[0] / 2 + levels[1] / 4 + levels[2] / 8) / (1 + 1 / 2 + 1 / 4 + 1 / 8)


def class_attention_transfer(pool, s, t, where):
  unit = lambda x: x / np.linalg.norm(x, axis=(1, 2), keepdims=True)
  (s, windows), (t, _) = pool(s, (2, 2)), pool(t, (2, 2))
  return ((unit(s) - unit(t)) ** 2).sum((1, 2, 3)) / (windows.sum((1, 2)) * s.shape[-1])


# They know where a position lies, so that dropping it is not the same.
OF_GRIDS = {
  "hierarchical_context": of_pooled(hierarchical_context),
  "class_attention_transfer": of_pooled(class_attention_transfer),
}


def cases():
  """One case for each loss on features, with inputs that have positions, the same ones on all sides."""
  chosen = {}
  for case in CASES:
    name = case.loss.__name__
    inputs = OF_ONE_SIZE.get(name, case.inputs)
    floats = [x for x in inputs(np.random.default_rng(0), 2) if x.dtype.kind == "f"]
    if case.kind == "features" and name not in OF_WHOLE_EXAMPLES and floats[0].ndim > 2:
      chosen.setdefault(name, dataclasses.replace(case, inputs=inputs))
  return list(chosen.values())


def test_every_loss_on_features_is_swept():
  assert {case.loss.__name__ for case in CASES if case.kind == "features"} - OF_WHOLE_EXAMPLES == {
    case.loss.__name__ for case in cases()
  }


def poisoned(case):
  """Arrays of 4 examples, and which positions count: a few, all, none and one half."""
  arrays = inputs_of(case, 4)
  between = arrays[0].shape[1:-1]
  where = np.random.default_rng(1).random((4, *between)) < 0.7
  where.reshape(4, -1)[:, -2:] = [[True, False], [True, True], [False, False], [True, True]]
  where[1], where[2] = True, False
  masked = [a.copy() for a in arrays]
  for a in masked:
    a[~where] = np.nan if a.dtype.kind == "f" else -1
  return arrays, masked, where


def run(case, arrays, where):
  floats = {i: a for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)}

  @jax.jit
  def gradient(floats):
    def total(floats):
      inputs = [floats.get(i, a) for i, a in enumerate(arrays)]
      values = case.loss(*inputs, **case.hyper, **case.static, where=where)
      return values @ jnp.cos(jnp.arange(len(values), dtype=values.dtype)), values

    return jax.value_and_grad(total, has_aux=True)(floats)

  (_, values), gradients = gradient(floats)
  return np.asarray(values), [np.asarray(g) for g in gradients.values()]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_masked_positions_reach_nothing(case):
  arrays, masked, where = poisoned(case)
  with jax.enable_x64(True):
    values, gradients = run(case, cast(masked, "float64"), where)
  assert values.shape == (4,)
  np.testing.assert_array_equal(values[2], 0)
  for gradient in gradients:
    assert np.isfinite(gradient).all() and not gradient[~where].any()
  assert gradients[0][0].any()
  if case.loss.__name__ in OF_GRIDS:
    counted = [i for i in range(4) if where[i].any()]
    expected = OF_GRIDS[case.loss.__name__](*(a[counted] for a in arrays), where[counted])
    assert_close(values[counted], expected, "float64")
  elif not case.compares:
    for i in (0, 1, 3):
      kept = [a[i][where[i]][None, :, None] for a in arrays]  # the positions that are left, in a column
      assert_close(values[i : i + 1], case.reference(*kept, **case.hyper, **case.static), "float64")


def test_channels_are_standardised_over_the_positions_that_count():
  case = next(case for case in cases() if case.loss is losses.channel_correlation)
  (s, t), (student, teacher), where = poisoned(case)
  with jax.enable_x64(True):
    values, _ = run(case, cast([student, teacher], "float64"), where)
  rows = [f[where][None] for f in (s, t)]  # all that count, as those of one example
  expected = family_similarity.channel_correlation(*rows)
  counted = where.any((1, 2))
  np.testing.assert_allclose(values[counted].mean(), expected[0], rtol=1e-9)


def test_a_grid_of_statistics_takes_the_positions_that_count():
  s, t = pairs_of(4, 4, 3)(np.random.default_rng(0), 2)
  where = np.ones((2, 4, 4), bool)
  where[0, :2, :2], where[1, 2:] = False, False
  where[0, 3, 3] = False
  with jax.enable_x64(True):
    values = losses.wkd_features(*(np.where(where[..., None], f, np.nan) for f in (s, t)), grid=2, where=where)
  for i in range(2):
    cells = []
    for rows in (slice(0, 2), slice(2, 4)):
      for columns in (slice(0, 2), slice(2, 4)):
        if (keep := where[i, rows, columns]).any():
          pair = (f[i, rows, columns][keep][None, :, None] for f in (s, t))
          cells.append(family_similarity.wkd_features(*pair)[0])
    np.testing.assert_allclose(values[i], np.mean(cells), rtol=1e-9)


def test_a_term_counts_the_examples_that_have_a_position():
  features = {"hidden": jnp.arange(12.0).reshape(3, 2, 2)}
  where = np.array([[True, False], [True, True], [False, False]])
  context = {"student": features, "teacher": {"hidden": jnp.zeros((3, 2, 2))}, "batch": {"where": where}}
  inputs = {"student": "student.hidden", "teacher": "teacher.hidden", "where": "batch.where"}
  values, metrics = evaluate({"hint": Term(losses.hint, inputs)}, context)
  expected = [1 / 2, (16 + 25 + 36 + 49) / 4]
  np.testing.assert_allclose(values["hint"], np.mean(expected))
  np.testing.assert_allclose(metrics["hint"], (sum(expected), 2))


def test_a_mask_that_does_not_fit_is_refused():
  student, teacher = (jnp.ones((2, 3, 4, 5)) for _ in range(2))
  with pytest.raises(ValueError, match=r"same positions.*student \(2, 3, 4\), teacher \(2, 1, 4\)"):
    losses.attention_transfer(student, teacher[:, :1], where=np.ones((2, 3, 4), bool))
  with pytest.raises(ValueError, match=r"where must be bool of.*\(2, 3, 4\); got bool\[2, 4, 3\]"):
    losses.hint(student, teacher, where=np.ones((2, 4, 3), bool))
