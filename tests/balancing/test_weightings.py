"""Weightings: promises over adversarial Gramians, closed forms, independent references, `present`, vmap, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from kdflax import balancing
from tests.balancing.cases import SIZES, WEIGHTINGS, adversarial, assert_close, cosines, jitted, many, pcgrad, random

METHODS = tuple(WEIGHTINGS)
EPS32 = np.finfo(np.float32).eps


def solve(name, gradients, **kwargs):
  """Weights as float64, computed in the dtype of the gradients."""
  if name == "krum" and len(gradients) == 2:
    pytest.skip("krum has no neighbours to compare for two tasks")
  return np.asarray(jitted(name)(jnp.asarray(gradients @ gradients.T), **kwargs), np.float64)


def float64():
  return jax.enable_x64(True)


# --- finite, no conflict, in the hull ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", (1, 3, 64))
@pytest.mark.parametrize("name", METHODS)
def test_weights_are_finite(name, tasks):
  for label, gradients in adversarial(tasks):
    weights = solve(name, gradients.astype(np.float32))
    assert weights.shape == (tasks,) and np.isfinite(weights).all(), label


CONES = {"upgrad": np.eye, "dual_projection": lambda tasks: np.full((1, tasks), 1 / tasks)}


@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("name", CONES)
def test_no_task_conflicts(name, tasks):
  """Neither does a direction of zero: it is one only where the Gramian does not tell it from zero."""
  for label, gradients in adversarial(tasks):
    with float64():
      weights = solve(name, gradients)
      exact = weights @ gradients
      assert cosines(exact, gradients).min() >= -1e-9, label
    gradients = gradients.astype(np.float32)
    direction = solve(name, gradients).astype(np.float32) @ gradients
    assert cosines(direction.astype(np.float64), gradients.astype(np.float64)).min() >= -1e-5, label
    told = np.abs(weights) @ np.linalg.norm(gradients, axis=1) * 4 * np.sqrt(EPS32)
    assert direction.any() or np.linalg.norm(exact) <= told, label


@pytest.mark.parametrize("tasks", (32, 64))
@pytest.mark.parametrize("name", CONES)
def test_projections_of_many_tasks_in_float32(name, tasks):
  for label, gradients in many(tasks):
    gradients = gradients.astype(np.float32)
    direction = (solve(name, gradients).astype(np.float32) @ gradients).astype(np.float64)
    gradients = gradients.astype(np.float64)
    mixtures = CONES[name](tasks) @ gradients
    expected = sum(nnls_projection(gradients, row) for row in mixtures) / len(mixtures)
    assert_close(direction, expected, 2e-2 if label.startswith("conflict") else 1e-3)  # 1e-3 of the gradients is left
    assert cosines(direction, gradients).min() >= -1e-5, label
    assert direction.any(), label


def test_cagrad_of_many_opposed_tasks_in_float32():
  """The inner gradient is 0.2 % of the gradients here, and it is not 0."""
  gradients = random(1, 130) * (-1.0) ** np.arange(32)[:, None] + 1e-2 * random(32, 130)
  direction = solve("cagrad", gradients.astype(np.float32)) @ gradients
  with float64():
    exact = solve("cagrad", gradients) @ gradients
  assert_close(direction, exact, 0.1)
  assert cosines(direction, gradients).min() > -1e-3 and cosines(gradients.mean(0), gradients).min() < -0.1


@pytest.mark.parametrize("tasks", SIZES)
def test_mgda_is_in_the_hull_and_optimal(tasks):
  with float64():
    for label, gradients in adversarial(tasks):
      weights = solve("mgda", gradients)
      assert weights.min() >= 0 and abs(weights.sum() - 1) < 1e-9, label
      shortest = weights @ gradients
      norms = np.linalg.norm(gradients, axis=1)
      if not norms.all():
        assert not shortest.any(), label
      elif np.linalg.norm(shortest) > 1e-6 * norms.min():  # below that only its zero is determined
        gap = (shortest @ shortest - gradients @ shortest) / (norms * np.linalg.norm(shortest))
        assert gap.max() < 1e-7, label


@pytest.mark.parametrize("tasks", SIZES)
def test_cagrad_reaches_its_dual_bound(tasks):
  """The worst task's progress along the direction equals the minimum over the simplex: no duality gap."""
  c = 0.5
  with float64():
    for label, gradients in adversarial(tasks):
      weights = solve("cagrad", gradients)
      mean = gradients.mean(0)
      rows = gradients[np.linalg.norm(gradients, axis=1) > 0]
      inner = weights - 1 / tasks
      assert inner.min() >= -1e-9 * max(1, np.abs(weights).max()), label
      radius = np.linalg.norm(inner @ gradients)
      if (
        radius > 1e-3 * np.linalg.norm(mean) and "nearly" not in label
      ):  # there the Gramian has lost half of its digits
        assert abs(radius - c * np.linalg.norm(mean)) < 1e-7 * radius, label
        hull = inner / inner.sum() @ gradients
        bound = hull @ mean + c * np.linalg.norm(mean) * np.linalg.norm(hull)
        gap = (bound - rows @ (weights @ gradients)) / (np.linalg.norm(rows, axis=1) * np.linalg.norm(mean))
        assert gap.max() < 1e-5, label


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-9)])
@pytest.mark.parametrize("tasks", (3, 8, 32))
def test_cagrad_of_conflicting_tasks_of_any_scale_reaches_its_dual_bound(tasks, dtype, tolerance):
  """Independent rows that oppose each other, of lengths over four orders: g_w is never 0, so the mean is no answer."""
  draw = np.random.default_rng(tasks)
  signs, scales = np.sign(draw.normal(size=(100, tasks, 1))), 10 ** draw.uniform(-2, 2, size=(100, tasks, 1))
  gradients = scales * (draw.normal(size=(100, tasks, 100)) + 2 * signs * draw.normal(size=(100, 1, 100)))
  gradients = gradients.astype(np.float32).astype(np.float64)
  products = gradients @ gradients.mT
  length = lambda x: np.linalg.norm(x, axis=-1)
  mean = gradients.mean(1)
  with float64():
    weigh = jax.jit(jax.vmap(lambda g, c: balancing.cagrad(g, c=c), (0, None)))
    for c in (0.2, 0.5):
      weights, exact = (np.asarray(weigh(products.astype(d), d(c)), np.float64) for d in (dtype, np.float64))
      inner = np.maximum(exact - 1 / tasks, 0)  # the difference has too few digits in float32
      direction, hull = (np.einsum("nt,ntp->np", w, gradients) for w in (weights, inner / inner.sum(1, keepdims=True)))
      bound = np.sum(hull * mean, -1) + c * length(mean) * length(hull)
      missing = bound[:, None] - np.einsum("ntp,np->nt", gradients, direction)
      assert (missing / (length(gradients) * length(direction)[:, None])).max() < tolerance
      np.testing.assert_allclose(length(direction - mean), c * length(mean), rtol=tolerance)


def test_cagrad_is_the_same_eager_jitted_vmapped_and_rescaled():
  gradients = np.array([[40, 10, 40], [4, -4, -3], [-9, -7, -2]], np.float32)
  products = gradients @ gradients.T
  expected = [1 / 3, 1 / 3, 1.0461339]
  compiled = jax.jit(balancing.cagrad)
  for scale in (1, 2, 3, 0.1):
    for weights in (balancing.cagrad(scale * products), compiled(scale * products)):
      assert_close(weights, expected, 1e-5)
  assert_close(jax.vmap(balancing.cagrad)(products[None])[0], expected, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-9)])
@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0, 8.0, 30.0])
def test_fair_grad_solves_its_equation(alpha, dtype, tolerance):
  """Task by task, against what its own sum adds up: a large row hides no other."""
  with float64():
    weigh = jax.jit(balancing.fair_grad)
    for tasks in SIZES:
      for reach in (0, 2, 4):
        gradients = random(tasks, 4 * tasks + 2) * 10.0 ** np.linspace(-reach, reach, tasks)[:, None]
        products = gradients @ gradients.T
        exact = np.asarray(weigh(jnp.asarray(products), alpha=alpha))
        kept = exact > np.finfo(dtype).tiny  # alpha = 8 leaves a large row a weight of 1e-50
        products = products.astype(dtype)
        weights = np.asarray(weigh(jnp.asarray(products), alpha=alpha), np.float64)
        assert (weights > 0)[kept].all(), (tasks, reach)
        power = weights[kept] ** (-1 / alpha)
        products = products[kept][:, kept]
        error = np.abs(products @ weights[kept] - power) / (np.abs(products) @ weights[kept] + power)
        assert error.max() <= tolerance, (tasks, reach)


@pytest.mark.parametrize("name", ["imtl_g", "conflict_free"])
def test_equal_cosines(name):
  with float64():
    for label, gradients in adversarial(8):
      if not label.endswith(("34",)) or "opposed" in label or "zero" in label:
        continue
      found = cosines(solve(name, gradients) @ gradients, gradients)
      assert np.ptp(found) < 1e-6 * np.abs(found).max(), label
      assert name == "imtl_g" or found.min() > 0, label


THREE_WAYS = [[np.cos(angle), np.sin(angle)] for angle in 2 * np.pi / 3 * np.arange(3)]  # their sum is 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
  ("name", "rows"),
  [
    ("conflict_free", THREE_WAYS),
    ("imtl_g", THREE_WAYS),
    ("conflict_free", [[1, 2], [-3, -6]]),
    ("imtl_g", [[1, 2], [-3, -6]]),
  ],
)
def test_no_direction_has_equal_cosines(name, rows, dtype):
  """Also when the rows are stretched and turned, so that products that should be 0 are rounding."""
  rng = np.random.default_rng(0)
  with float64():
    for _ in range(20):
      turn, _ = np.linalg.qr(rng.normal(size=(6, 2)))
      gradients = (rng.uniform(0.1, 10, (len(rows), 1)) * rows @ turn.T).astype(dtype)
      np.testing.assert_array_equal(solve(name, gradients), np.zeros(len(rows)))
    np.testing.assert_array_equal(solve(name, np.array(rows, dtype)), np.zeros(len(rows)))


def test_conflict_free_of_dependent_rows_is_the_least_squares_direction():
  rows = np.array([[1.0, 2.0], [-1.0, -2.0], [0.5, 1.0]])
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  best = np.linalg.pinv(unit) @ np.ones(3)  # nearest to equal products with the unit rows
  best /= np.linalg.norm(best)
  with float64():
    assert_close(solve("conflict_free", rows) @ rows, (rows @ best).mean() * best, 1e-9)


@pytest.mark.parametrize("tasks", SIZES)
def test_conflict_free_is_free_of_conflict(tasks):
  for label, gradients in adversarial(tasks):
    gradients = gradients.astype(np.float32)
    direction = solve("conflict_free", gradients) @ gradients.astype(np.float64)
    # Rows that depend on each other may have no such direction; near that the Gramian has lost half of its digits.
    if not label.startswith(("nearly opposed", "exactly opposed")) and gradients.shape[1] >= tasks:
      assert cosines(direction, gradients.astype(np.float64)).min() >= -1e-5, label
    assert direction.any() or "zero" in label or "opposed" in label or gradients.shape[1] < tasks, label


def test_aligned_mtl_makes_the_system_orthogonal():
  """With "min" the aligned gradients have all singular values equal to the smallest."""
  with float64():
    gradients = random(4, 9)
    values, vectors = np.linalg.eigh(gradients @ gradients.T)
    aligned = vectors @ np.diag(np.sqrt(values[0] / values)) @ vectors.T @ gradients
    assert_close(np.linalg.svd(aligned, compute_uv=False), np.full(4, np.sqrt(values[0])), 1e-9)
    assert_close(solve("aligned_mtl", gradients) @ gradients, aligned.mean(0), 1e-9)


# --- independent references -------------------------------------------------------------------------------------------


def nnls_projection(gradients, vector):
  """The projection onto the dual cone of the rows, by scipy's non-negative least squares on unit rows."""
  norms = np.linalg.norm(gradients, axis=1)
  if not norms.any():
    return vector  # scipy aborts on a matrix without columns
  rows = gradients[norms > 0] / norms[norms > 0, None]
  coefficients, _ = scipy.optimize.nnls(-rows.T, vector, maxiter=1000)
  return vector + coefficients @ rows


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_projections_against_nnls(tasks):
  with float64():
    for label, gradients in adversarial(tasks):
      if "nearly opposed" in label:
        continue  # the projection is 1e-5 of the gradients: the Gramian holds only half of its digits
      size = np.linalg.norm(gradients)
      expected = sum(nnls_projection(gradients, row) for row in gradients) / tasks
      assert np.linalg.norm(solve("upgrad", gradients) @ gradients - expected) <= 1e-7 * size, label
      expected = nnls_projection(gradients, gradients.mean(0))
      assert np.linalg.norm(solve("dual_projection", gradients) @ gradients - expected) <= 1e-7 * size, label


def test_upgrad_of_64_tasks_against_nnls():
  with float64():
    gradients = random(64, 100) + random(1, 100) * np.where(np.arange(64) % 2, 1, -0.5)[:, None]
    expected = sum(nnls_projection(gradients, row) for row in gradients) / 64
    assert_close(solve("upgrad", gradients) @ gradients, expected, 1e-8)


def test_preference():
  with float64():
    gradients, preference = random(3, 4), np.array([0.1, 2.0, 0.0])
    products = jnp.asarray(gradients @ gradients.T)
    expected = sum(u * nnls_projection(gradients, row) for u, row in zip(preference, gradients, strict=True))
    got = jax.jit(balancing.upgrad)(products, preference=jnp.asarray(preference))
    assert_close(got @ gradients, expected, 1e-9)
    got = jax.jit(balancing.dual_projection)(products, preference=jnp.asarray(preference))
    assert_close(got @ gradients, nnls_projection(gradients, preference @ gradients), 1e-9)


def test_two_tasks_in_closed_form():
  with float64():
    a, b = np.array([2.0, 0.0]), np.array([-1.0, 1.0])
    gradients = np.stack([a, b])
    share = (b @ b - a @ b) / ((a - b) @ (a - b))
    assert_close(solve("mgda", gradients), [share, 1 - share], 1e-9)
    cosine = a @ b / np.sqrt(a @ a * b @ b)
    expected = 1 / np.sqrt(np.array([a @ a, b @ b]) * (1 + cosine))
    assert_close(solve("nash_mtl", gradients), expected, 1e-9)
    projected_a, projected_b = a - a @ b / (b @ b) * b, b - a @ b / (a @ a) * a
    for name in ("upgrad", "pcgrad"):
      assert_close(solve(name, gradients) @ gradients, (projected_a + projected_b) / 2, 1e-9)
    # Bisector of the unit gradients; IMTL-G ends on the line through a and b.
    bisector = a / np.linalg.norm(a) + b / np.linalg.norm(b)
    bisector /= np.linalg.norm(bisector)
    assert_close(solve("conflict_free", gradients) @ gradients, (a + b) @ bisector / 2 * bisector, 1e-9)
    impartial = solve("imtl_g", gradients)
    impartial_direction = impartial @ gradients
    assert_close([impartial.sum(), np.linalg.det([impartial_direction, bisector])], [1, 0], 1e-9)

    def objective(w, c=0.5):
      hull, mean = w * a + (1 - w) * b, (a + b) / 2
      return hull @ mean + c * np.linalg.norm(mean) * np.linalg.norm(hull)

    w = scipy.optimize.minimize_scalar(objective, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}).x
    hull, mean = w * a + (1 - w) * b, (a + b) / 2
    expected = mean + 0.5 * np.linalg.norm(mean) * hull / np.linalg.norm(hull)
    assert_close(solve("cagrad", gradients) @ gradients, expected, 1e-6)


def test_cagrad_extremes():
  with float64():
    gradients = random(3, 10)
    products = jnp.asarray(gradients @ gradients.T)
    assert_close(jax.jit(balancing.cagrad)(products, c=0.0), np.full(3, 1 / 3), 1e-12)
    # The first two meet at 0, and no other combination is below: the inner gradient is 0 and the direction the mean.
    assert_close(solve("cagrad", np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])), np.full(3, 1 / 3), 1e-12)


def test_pcgrad_against_vectors():
  gradients = random(5, 4)
  order = np.stack([np.random.default_rng(i).permutation(5) for i in range(5)])
  expected = np.zeros(4)
  for i, row in enumerate(gradients):
    for j in order[i]:
      if i != j and row @ gradients[j] < 0:
        row = row - row @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
    expected += row / 5
  with float64():
    products = jnp.asarray(gradients @ gradients.T)
    assert_close(balancing.pcgrad(products, order) @ gradients, expected, 1e-9)
    without_own = np.stack([row[row != i] for i, row in enumerate(order)])
    assert_close(balancing.pcgrad(products, without_own) @ gradients, expected, 1e-9)


def test_krum_squares_the_distances():
  """Scores by distances and by squared distances name different rows here."""
  points = np.array([[0.0, 0.0], [3.0, 0.0], [-2.9, 0.1], [0.0, 4.4], [9.0, 9.0]])
  squared = ((points[:, None] - points) ** 2).sum(-1)
  scores = np.sort(squared, axis=1)[:, 1:4].sum(1)
  weights = balancing.krum(jnp.asarray(points @ points.T), num_byzantine=0, num_selected=2)
  expected = np.zeros(5)
  expected[np.argsort(scores)[:2]] = 0.5
  np.testing.assert_array_equal(weights, expected)


# --- rules that hold for all ------------------------------------------------------------------------------------------


def expected_for_one(name):
  return 1.5 if name == "cagrad" else None if name in ("nash_mtl", "fair_grad") else 1.0


@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_identical_gradients(name, tasks):
  """T identical gradients g give g, and T = 1 is the identity; (1 + c) g for cagrad, an equation for nash and fair."""
  row = random(1, 6).astype(np.float32)
  weights = solve(name, np.repeat(row, tasks, axis=0))
  if name in ("nash_mtl", "fair_grad"):
    power = 1 if name == "nash_mtl" else 0.5
    total = (weights.sum() * (row**2).sum() - weights ** (-power)) * weights**power
    assert np.abs(total).max() < 1e-4
  else:
    assert weights.sum() == pytest.approx(expected_for_one(name), rel=1e-5)


@pytest.mark.parametrize("factor", [2.0**-17, 2.0**17])  # exact in binary: rounding is that of the method alone
@pytest.mark.parametrize("name", METHODS)
def test_scale_equivariance(name, factor):
  cases = {"three": random(3, 20), "scaled three": random(3, 20) * [[1e-2], [1], [1e2]], **dict(adversarial(8))}
  for label, gradients in cases.items():
    gradients = gradients.astype(np.float32)
    weights, scaled_weights = solve(name, gradients), solve(name, np.float32(factor) * gradients)
    one, other = (w / np.abs(w).max() if w.any() else w for w in (weights, scaled_weights))
    # Only fair_grad takes a power of the scale, which rounds, and opposed rows without a solution multiply that.
    tolerance = 2e-4 if name in ("nash_mtl", "fair_grad") else 1e-6
    reach = np.abs(one) @ np.linalg.norm(gradients, axis=1)
    assert np.linalg.norm((other - one) @ gradients) <= tolerance * reach, label


@pytest.mark.parametrize("name", METHODS)
def test_permutation_equivariance(name):
  with float64():
    for label, gradients in adversarial(8):
      if "nearly opposed" in label or name == "pcgrad":
        continue
      if name.startswith("aligned") and "scaled" in label:
        continue  # the eigenvalues span all digits
      if name in ("nash_mtl", "fair_grad") and (label.endswith(" 4") or "exactly" in label):
        continue  # the equation has no solution
      order = np.random.default_rng(0).permutation(8)
      one, other = solve(name, gradients), solve(name, gradients[order])
      if name != "krum":  # ties between duplicates go to the first
        reach = (np.abs(one) + np.abs(other[order.argsort()]) + 1e-6) @ np.linalg.norm(gradients, axis=1)
        assert np.linalg.norm(other @ gradients[order] - one @ gradients) <= 1e-6 * reach, label
  order = np.roll(np.arange(8), 3)
  gradients = random(8, 5).astype(np.float32)
  assert_close(solve(name, gradients[order]), solve(name, gradients)[order], 2e-4)


@pytest.mark.parametrize("name", METHODS)
def test_float32_is_close_to_float64(name):
  scaled = random(8, 40) * 10.0 ** np.linspace(-2, 2, 8)[:, None]
  # Aligned-MTL depends on the norms, and its rank tolerance on the dtype.
  for gradients in (random(3, 20), random(8, 40), *([] if name.startswith("aligned") else [scaled])):
    got = solve(name, gradients.astype(np.float32))
    with float64():
      expected = solve(name, gradients)
    assert_close(got @ gradients, expected @ gradients, 2e-4)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_gives_float32(name):
  products = jnp.asarray(random(3, 5) @ random(3, 5).T, jnp.bfloat16)
  assert jax.eval_shape(WEIGHTINGS[name], products).dtype == jnp.float32


@pytest.mark.parametrize("name", METHODS)
def test_present_equals_dropping(name):
  """Also for a NaN row of an absent task, and one compilation serves all masks."""
  gradients = random(8, 40)
  with float64():
    traces = []

    @jax.jit
    def weigh(products, present):
      traces.append(1)
      return WEIGHTINGS[name](products, present=present)

    for seed in range(4):
      present = np.random.default_rng(seed).permutation(8) < 5
      products = gradients @ gradients.T
      products[~present] = np.nan
      products[:, ~present] = np.nan
      weights = np.asarray(weigh(jnp.asarray(products), jnp.asarray(present)))
      assert (weights[~present] == 0).all() and np.isfinite(weights).all()
      kept = gradients[present]
      products = jnp.asarray(kept @ kept.T)
      if name == "pcgrad":
        index = np.flatnonzero(present)
        visits = [[j for j in np.roll(np.arange(8), -i - 1) if present[j]] for i in index]
        expected = jax.jit(balancing.pcgrad)(products, jnp.asarray(np.searchsorted(index, np.array(visits))))
      else:
        expected = jitted(name)(products)
      assert_close(weights[present] @ kept, expected @ kept, 1e-7)
    assert len(traces) == 1


@pytest.mark.parametrize("name", METHODS)
def test_no_task_present(name):
  weights = jitted(name)(jnp.eye(8, dtype=jnp.float32), present=jnp.zeros(8, bool))
  np.testing.assert_array_equal(weights, np.zeros(8))


@pytest.mark.parametrize("name", METHODS)
def test_nan_is_not_hidden(name):
  products = jnp.asarray(random(8, 9) @ random(8, 9).T, jnp.float32).at[2, 2].set(jnp.nan)
  assert np.isnan(jitted(name)(products)).all()


@pytest.mark.parametrize("name", METHODS)
def test_vmap_equals_a_loop(name):
  gradients = np.stack([rows for _, rows in adversarial(8) if rows.shape[1] == 34]).astype(np.float32)
  products = jnp.einsum("gtp,gsp->gts", gradients, gradients)
  batched = np.asarray(jax.jit(jax.vmap(WEIGHTINGS[name]))(products))
  for weights, one, rows in zip(batched, products, gradients, strict=True):
    expected = np.asarray(jitted(name)(one))
    reach = np.abs(expected) @ np.linalg.norm(rows, axis=1)
    assert np.linalg.norm((weights - expected) @ rows) <= 1e-4 * reach


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_shapes_are_checked(name):
  weighting = WEIGHTINGS[name] if name != "pcgrad" else pcgrad
  for shape in ((3, 4), (9,), (2, 3, 3), (0, 0)):
    with pytest.raises(ValueError, match="gramian must be square"):
      weighting(jnp.ones(shape))
  for present in (jnp.ones(3), jnp.ones(2, bool), jnp.ones((3, 1), bool)):
    with pytest.raises(ValueError, match="present must be bool"):
      weighting(jnp.eye(3), present=present)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda g: balancing.upgrad(g, preference=jnp.ones(2)), "preference must have shape"),
    (lambda g: balancing.dual_projection(g, preference=jnp.ones((3, 1))), "preference must have shape"),
    (lambda g: balancing.pcgrad(g, jnp.zeros((3, 4), int)), "permutations must have shape"),
    (lambda g: balancing.pcgrad(g, jnp.zeros((3, 3))), "permutations must be integers"),
    (lambda g: balancing.krum(g, num_byzantine=1), "num_byzantine must be in"),
    (lambda g: balancing.krum(g, num_byzantine=-1), "num_byzantine must be in"),
    (lambda g: balancing.krum(g, num_byzantine=0, num_selected=4), "num_selected must be in"),
    (lambda g: balancing.aligned_mtl(g, scale="max"), "scale must be"),
    (lambda g: balancing.fair_grad(g, alpha=0.0), "alpha must be positive"),
    (lambda g: balancing.cagrad(g, c=-1), "c must be at least 0; got -1"),
    (lambda g: balancing.cagrad(g, c=float("nan")), "c must be at least 0; got nan"),
    (lambda g: balancing.mgda(g.astype(complex)), "must be real"),
  ],
)
def test_arguments_are_checked(call, message):
  with pytest.raises(ValueError, match=message):
    jax.jit(call)(jnp.eye(3))


def test_hyperparameters_may_be_traced():
  products = jnp.asarray(random(3, 5) @ random(3, 5).T, jnp.float32)
  for weighting, given in ((balancing.cagrad, {"c": 0.3}), (balancing.fair_grad, {"alpha": 3.0})):
    static = jax.jit(functools.partial(weighting, **given))(products)
    assert_close(jax.jit(weighting)(products, **given), static, 1e-5)


def test_diagnostics():
  gradients = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [1.0, -1.0], [0.0, 0.0]])
  products = jnp.asarray(gradients @ gradients.T)
  expected = np.stack([cosines(row, gradients) for row in gradients])
  assert_close(balancing.gradient_cosines(products), expected, 1e-6)
  assert balancing.conflict_count(products) == 3  # 0-1, 1-3, 2-3
  assert balancing.conflict_count(products, present=jnp.array([True, True, True, False, True])) == 1


def test_random_order_is_a_permutation_of_each_row():
  order = np.asarray(balancing.random_order(jax.random.key(0), 5))
  np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(5), (5, 1)))
  assert len({tuple(row) for row in order}) > 1
  weights = jax.jit(functools.partial(balancing.pcgrad, permutations=order))(jnp.eye(5))
  assert_close(weights, np.full(5, 0.2), 1e-6)
