"""The nuclear norm, its derivatives and its proximal operator against a float64 SVD."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdflax.coupling import nuclear_norm, singular_value_threshold

METHODS = ("auto", "svd", "gram", "newton_schulz")
DISTINCT = ("svd", "gram", "newton_schulz")
M, N = 12, 7


def with_spectrum(singular_values, m=M, seed=0):
  """A float64 matrix `[m, n]` with the given n singular values."""
  rng = np.random.default_rng(seed)
  left, _ = np.linalg.qr(rng.normal(size=(m, len(singular_values))))
  right, _ = np.linalg.qr(rng.normal(size=(len(singular_values),) * 2))
  return left * np.asarray(singular_values) @ right.T


def reference(matrix, smoothing=0.0):
  """Value, without cancellation, and gradient of least norm, in float64."""
  u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
  if smoothing:
    h = np.hypot(s, smoothing)
    return np.sum(s**2 / (h + smoothing)), u * (s / h) @ vt
  return s.sum(), u @ (vt * (s > 1e-6 * max(s[0], 1e-300))[:, None])


@functools.cache
def _compiled(method):
  norm = lambda x, mu: nuclear_norm(x, smoothing=mu, method=method)
  return jax.jit(jax.value_and_grad(norm, argnums=(0, 1)))


@functools.cache
def value_and_grad(method, traced=False):
  """One compilation for each shape and dtype; without smoothing, or with one of 0 that is traced, as of a schedule."""
  if traced:
    return lambda x: (lambda value, gradients: (value, gradients[0]))(*_compiled(method)(x, 0.0))
  return jax.jit(jax.value_and_grad(lambda x: nuclear_norm(x, method=method)))


def error(got, expected):
  expected = np.asarray(expected, np.float64)
  return np.linalg.norm(np.asarray(got, np.float64) - expected) / max(np.linalg.norm(expected), 1e-300)


DUPLICATED = np.tile(np.random.default_rng(3).normal(size=(3, N)), (4, 1))
WELL_POSED = {
  "random": np.random.default_rng(0).normal(size=(M, N)),
  "repeated": with_spectrum(np.full(N, 2.0)),
  "clustered": with_spectrum([1, 1, 1, 1e-1, 1e-1, 1e-1, 1e-2]),
  "identity": np.eye(M, N),
  "spike": with_spectrum([1.0, *[1e-2] * 6]),
  "tiny scale": 1e-20 * np.random.default_rng(1).normal(size=(M, N)),
  "huge scale": 1e20 * np.random.default_rng(2).normal(size=(M, N)),
}
DEFICIENT = {
  "zero": np.zeros((M, N)),
  "rank 2": with_spectrum([1, 0.7, 0, 0, 0, 0, 0]),
  "duplicated rows": DUPLICATED,
  "one entry": np.pad([[3.0]], ((2, M - 3), (4, N - 5))),
}
EVERY = {**WELL_POSED, **DEFICIENT}


def decides_on_the_rank(method):
  """Newton-Schulz does not: rounding in the null space is lifted by up to eps^-0.6. On accelerators `auto` is that."""
  return method != "newton_schulz" and (method != "auto" or jax.default_backend() == "cpu")


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_value_and_least_norm_gradient_in_float32(method, traced):
  compute = value_and_grad(method, traced)
  for name, matrix in EVERY.items():
    x = matrix.astype(np.float32)
    value, gradient = compute(x)
    expected, expected_gradient = reference(x)
    tolerance = 1e-5 if name in WELL_POSED or decides_on_the_rank(method) else 1e-2
    assert error(value, expected) <= 1e-5, name
    assert error(gradient, expected_gradient) <= tolerance, name
    assert np.linalg.norm(np.asarray(gradient, np.float64), 2) <= 1 + 1e-5, name
    assert error(np.vdot(np.asarray(gradient, np.float64), x.astype(np.float64)), expected) <= 1e-5, name
  assert not np.any(compute(np.zeros((M, N), np.float32))[1])


@pytest.mark.parametrize("deficient", [False, True])
def test_square_matrices_get_the_least_norm_gradient_whether_or_not_the_rank_is_full(deficient):
  """On a CPU `auto` has two ways there; a batch takes the careful one as soon as one of its matrices needs it."""
  spectra = [[1, 0.5, 0.2, 0.05, 1e-2, 2e-3, 1e-3], [3, 2, 2, 2, 1, *([0, 0] if deficient else [1, 1])]]
  batch = np.stack([with_spectrum(spectrum, m=N) for spectrum in spectra]).astype(np.float32)
  tolerance = 1e-4 if decides_on_the_rank("auto") or not deficient else 1e-2
  values, gradients = jax.vmap(value_and_grad("auto"))(batch)
  for x, value, gradient in zip(batch, values, gradients, strict=True):
    expected, expected_gradient = reference(x)
    assert error(value, expected) <= 1e-5
    assert error(gradient, expected_gradient) <= tolerance


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("largest", [1.6e38, 1.8e38, 3e38])
def test_entries_up_to_the_largest_float32(method, largest, traced):
  x = (1e35 * WELL_POSED["random"]).astype(np.float32)
  x[0, 0] = largest
  value, gradient = value_and_grad(method, traced)(x)
  expected, expected_gradient = reference(x)
  assert error(value, expected) <= 1e-5
  assert error(gradient, expected_gradient) <= 1e-3  # the condition is 1e4


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_value_and_least_norm_gradient_in_float64(method, traced):
  with jax.enable_x64(True):
    compute = value_and_grad(method, traced)
    for name, matrix in EVERY.items():
      value, gradient = compute(matrix)
      expected, expected_gradient = reference(matrix)
      assert value.dtype == gradient.dtype == np.float64
      assert error(value, expected) <= 1e-9, name
      tolerance = 1e-9 if name in WELL_POSED or decides_on_the_rank(method) else 1e-5
      assert error(gradient, expected_gradient) <= tolerance, name


@pytest.mark.parametrize("method", DISTINCT)
@pytest.mark.parametrize(("condition", "tolerance"), [(1e2, 1e-5), (1e3, 1e-4), (1e4, 1e-3)])
def test_float32_gradient_keeps_the_accuracy_of_an_svd(method, condition, tolerance):
  x = with_spectrum(np.geomspace(1, 1 / condition, 32), m=96).astype(np.float32)
  value, gradient = value_and_grad(method)(x)
  expected, expected_gradient = reference(x)
  assert error(value, expected) <= 1e-5
  assert error(gradient, expected_gradient) <= tolerance


@pytest.mark.parametrize("method", DISTINCT)
def test_condition_beyond_the_precision_stays_a_subgradient(method):
  x = with_spectrum(np.geomspace(1, 1e-12, 32), m=96).astype(np.float32)
  value, gradient = value_and_grad(method)(x)
  gradient = np.asarray(gradient, np.float64)
  expected, _ = reference(x)
  assert error(value, expected) <= 1e-5
  assert np.linalg.norm(gradient, 2) <= 1 + 1e-5
  assert error(np.vdot(gradient, x.astype(np.float64)), expected) <= 1e-5


@pytest.mark.parametrize("method", DISTINCT)
def test_orthogonal_invariance_transpose_and_scale(method):
  with jax.enable_x64(True):
    rng = np.random.default_rng(5)
    x, left, right = rng.normal(size=(M, N)), *(np.linalg.qr(rng.normal(size=(k, k)))[0] for k in (M, N))
    norm = lambda x: value_and_grad(method)(x)[0]
    assert error(norm(left @ x @ right), norm(x)) <= 1e-9
    assert error(norm(x.T), norm(x)) <= 1e-9
    assert error(norm(-3.7 * x), 3.7 * norm(x)) <= 1e-9
    assert error(value_and_grad(method)(x.T)[1], reference(x.T)[1]) <= 1e-9


@pytest.mark.parametrize(("shape", "method"), [((12, 8), "gram"), ((8, 12), "gram"), ((8, 8), "newton_schulz")])
def test_auto_on_a_cpu_goes_by_the_shape(shape, method):
  x = jax.device_put(np.random.default_rng(0).normal(size=shape).astype(np.float32), jax.devices("cpu")[0])
  np.testing.assert_array_equal(value_and_grad("auto")(x)[1], value_and_grad(method)(x)[1])


def test_a_vector_has_its_l2_norm():
  x = np.random.default_rng(0).normal(size=(9, 1)).astype(np.float32)
  for matrix in (x, x.T):
    value, gradient = value_and_grad("auto")(matrix)
    assert error(value, np.linalg.norm(x)) <= 1e-6
    assert error(gradient, matrix / np.linalg.norm(x)) <= 1e-6
  assert not np.any(value_and_grad("auto")(np.zeros((9, 1), np.float32))[1])


@pytest.mark.parametrize("method", DISTINCT)
def test_smoothed_value_gradient_and_slope(method):
  with jax.enable_x64(True):
    compute = _compiled(method)
    for mu in (1e-3, 0.5, 1e4):
      for name in ("random", "clustered", "rank 2", "zero", "repeated"):
        value, (gradient, slope) = compute(EVERY[name], mu)
        expected, expected_gradient = reference(EVERY[name], mu)
        s = np.linalg.svd(EVERY[name])[1]
        assert error(value, expected) <= 1e-9, (name, mu)
        assert error(gradient, expected_gradient) <= 1e-9, (name, mu)
        assert abs(slope - np.sum(mu / np.hypot(s, mu) - 1)) <= 1e-9 * N, (name, mu)


def test_derivatives_up_to_the_second_in_both_modes_when_smoothed():
  # Beyond the value and the gradient, which all methods are compared in, the rules do not depend on the method.
  with jax.enable_x64(True):
    norm = jax.jit(lambda x, mu: nuclear_norm(x, smoothing=mu, method="svd"))
    for matrix in (np.eye(4, 3), WELL_POSED["random"][:4, :3]):
      check_grads(norm, (jnp.asarray(matrix), jnp.asarray(0.3)), order=2, modes=["fwd", "rev"], rtol=1e-5, atol=1e-6)


def test_hessian_is_symmetric_positive_and_of_the_formula_at_zero():
  with jax.enable_x64(True):
    hessian = jax.jit(jax.hessian(lambda x: nuclear_norm(x, smoothing=0.25)))
    # At 0 the norm is |X|_F^2 / (2 mu) to second order.
    assert error(hessian(jnp.zeros((4, 3))).reshape(12, 12), np.eye(12) / 0.25) <= 1e-9
    at_random = np.asarray(hessian(WELL_POSED["random"][:4, :3])).reshape(12, 12)
    assert error(at_random, at_random.T) <= 1e-9
    assert np.linalg.eigvalsh(at_random).min() > 0
    bare = jax.jit(jax.hessian(lambda x: nuclear_norm(x, method="svd")))
    assert np.isfinite(bare(DEFICIENT["rank 2"])).all()


def test_third_derivatives_say_that_they_are_missing():
  norm = lambda t: nuclear_norm(t * jnp.eye(3, 2), smoothing=1.0, method="svd")
  with pytest.raises(NotImplementedError, match="first and second derivatives"):
    jax.grad(jax.grad(jax.grad(norm)))(1.0)


@pytest.mark.parametrize("method", DISTINCT)
def test_vmap_and_leading_axes_equal_a_loop(method):
  batch = np.stack([EVERY[name] for name in ("random", "clustered", "zero", "duplicated rows")]).astype(np.float32)
  batch = np.stack([batch, 2 * batch])
  single = value_and_grad(method)
  values, gradients = jax.jit(jax.vmap(jax.vmap(single)))(batch)
  leading_values = jax.jit(lambda x: nuclear_norm(x, method=method))(batch)
  leading = jax.jit(jax.grad(lambda x: nuclear_norm(x, method=method).sum()))(batch)
  for index in np.ndindex(2, 4):
    value, gradient = single(batch[index])
    assert error(values[index], np.asarray(value)) <= 1e-5
    assert error(leading_values[index], np.asarray(value)) <= 1e-5
    # Without a rank decision, rounding of the null space is free to differ.
    tolerance = 1e-2 if method == "newton_schulz" and index[1] > 1 else 1e-5
    assert np.abs(gradients[index] - gradient).max() <= tolerance
    assert np.abs(leading[index] - gradient).max() <= tolerance


def test_a_batch_of_any_size_equals_a_loop():
  """On a CPU the eigenbases of up to 64 matrices are calls of their own, those of more are one."""
  batch = np.random.default_rng(0).normal(size=(65, 5, 3)).astype(np.float32)
  single = value_and_grad("gram")
  for count in (64, 65):
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(lambda x: nuclear_norm(x, method="gram"))))(batch[:count])
    for index in (0, count - 1):
      value, gradient = single(batch[index])
      assert error(values[index], value) <= 1e-5 and error(gradients[index], gradient) <= 1e-5


def test_a_vmapped_branch_stays_a_branch():
  text = str(jax.make_jaxpr(jax.vmap(lambda x: nuclear_norm(x, method="gram")))(jnp.ones((2, 4, 3))))
  assert "cond[" in text


def test_forward_mode_and_eager_equal_jitted_reverse_mode():
  x = WELL_POSED["random"].astype(np.float32)
  direction = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
  value, tangent = jax.jvp(nuclear_norm, (x,), (direction,))
  expected, gradient = value_and_grad("auto")(x)
  assert error(value, np.asarray(expected)) <= 1e-6
  assert error(tangent, np.vdot(gradient, direction)) <= 1e-5


def test_bfloat16_is_computed_in_float32():
  x = jnp.asarray(WELL_POSED["random"], jnp.bfloat16)
  value, gradient = value_and_grad("auto")(x)
  assert value.dtype == jnp.float32
  assert gradient.dtype == jnp.bfloat16
  expected, expected_gradient = reference(x)
  assert error(value, expected) <= 1e-5
  assert error(gradient.astype(jnp.float32), expected_gradient) <= 1e-2


def test_smoothing_may_differ_over_the_batch():
  x = np.stack([WELL_POSED["random"]] * 3).astype(np.float32)
  mus = np.array([0.0, 0.5, 2.0], np.float32)
  for value, matrix, mu in zip(nuclear_norm(x, smoothing=mus), x, mus, strict=True):
    assert error(value, reference(matrix, float(mu))[0]) <= 1e-5


def test_empty_sides_give_zero():
  assert nuclear_norm(jnp.zeros((3, 0, 4))).tolist() == [0, 0, 0]
  assert singular_value_threshold(jnp.zeros((0, 4)), 1.0).shape == (0, 4)


def test_bad_arguments_are_named():
  x = jnp.ones((3, 2))
  with pytest.raises(ValueError, match=r"unknown method 'qr'; choose one of auto, svd, gram, newton_schulz"):
    nuclear_norm(x, method="qr")
  with pytest.raises(ValueError, match=r"got shape \(3,\)"):
    nuclear_norm(x[:, 0])
  with pytest.raises(ValueError, match="int32"):
    nuclear_norm(jnp.ones((3, 2), jnp.int32))
  with pytest.raises(ValueError, match=r"smoothing must be at least 0, got -1"):
    nuclear_norm(x, smoothing=-1)
  with pytest.raises(ValueError, match=r"smoothing of shape \(3,\) does not broadcast to the batch \(2,\)"):
    nuclear_norm(jnp.ones((2, 3, 2)), smoothing=jnp.ones(3))
  with pytest.raises(ValueError, match=r"threshold must be at least 0, got -1"):
    singular_value_threshold(x, -1)


@pytest.mark.parametrize("name", ["random", "clustered", "repeated", "rank 2", "zero"])
def test_threshold_meets_the_optimality_conditions(name):
  x = EVERY[name]
  with jax.enable_x64(True):
    for tau in (0.0, 0.055, 0.66, 100.0):  # no singular value lies there, to the rounding of an SVD
      z = np.asarray(singular_value_threshold(x, tau))
      s = np.linalg.svd(x)[1]
      assert np.linalg.matrix_rank(z, tol=1e-12) == np.sum(s > max(tau, 1e-12))
      # X - Z is in tau times the sub-differential of the nuclear norm at Z.
      assert np.linalg.norm(x - z, 2) <= tau + 1e-12
      assert abs(np.vdot(x - z, z) - tau * np.linalg.svd(z)[1].sum()) <= 1e-9 * (1 + tau) * N


def test_threshold_derivative_batch_and_wide_matrices():
  with jax.enable_x64(True):
    x = jnp.asarray(with_spectrum([3.0, 2.0, 2.0, 0.5, 0.5], m=6))
    threshold = jax.jit(singular_value_threshold)
    check_grads(threshold, (x, jnp.asarray(1.0)), order=1, modes=["fwd", "rev"], rtol=1e-6)
    batch = threshold(jnp.stack([x.T, 2 * x.T]), jnp.asarray([0.5, 1.0]))
    assert error(batch[1], np.asarray(threshold(2 * x, 1.0)).T) <= 1e-9
    assert np.isfinite(jax.grad(lambda x: threshold(x, 0.0).sum())(jnp.zeros((4, 3)))).all()
