"""What the feature losses must leave unchanged, their closed forms, and inputs at which the usual code fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from kdflax import losses as eager
from tests.compiled import Compiled
from tests.losses import family_features
from tests.losses.case import in_float32_and_float64

losses = Compiled(eager)  # the formulas; what they refuse is tried on the functions themselves


def maps(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


STUDENT, TEACHER = maps(2, 4, 3, 5, seed=1), maps(2, 4, 3, 5, seed=2)


def on_layers(loss):
  """A loss of two layers with the two maps as first layers and fixed last ones."""
  return lambda student, teacher: loss(student, maps(2, 4, 3, 6, seed=3), teacher, maps(2, 4, 3, 6, seed=4))


@pytest.mark.parametrize(
  "loss",
  ["cosine", "attention_transfer", "class_attention_transfer", "factor_transfer", "nst", "inter_channel_correlation"],
)
@pytest.mark.parametrize("scale", [3, 1e-12, 1e12])
def test_scale_of_a_side_does_not_matter(loss, scale):
  loss = getattr(losses, loss)
  np.testing.assert_allclose(loss(scale * STUDENT, TEACHER / scale), loss(STUDENT, TEACHER), rtol=1e-5)


@pytest.mark.parametrize("loss", ["attention_transfer", "factor_transfer", "nst"])
def test_order_of_the_channels_does_not_matter(loss):
  loss = getattr(losses, loss)
  np.testing.assert_allclose(loss(STUDENT[..., ::-1], TEACHER), loss(STUDENT, TEACHER), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.inter_channel_correlation, on_layers(losses.kdsvd)])
def test_rotation_of_the_positions_does_not_matter(loss):
  rotation, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(12, 12)))
  rotated = np.einsum("nm,bmc->bnc", rotation, STUDENT.reshape(2, 12, 5)).astype(np.float32).reshape(STUDENT.shape)
  np.testing.assert_allclose(loss(rotated, TEACHER), loss(STUDENT, TEACHER), rtol=1e-4)


def test_fsp_depends_on_both_layers_at_the_same_position():
  last = maps(2, 4, 3, 6, seed=3)
  flow = lambda first, last: losses.fsp(first, last, TEACHER, maps(2, 4, 3, 6, seed=4))
  np.testing.assert_allclose(flow(STUDENT[:, ::-1], last[:, ::-1]), flow(STUDENT, last), rtol=1e-5)
  assert (jnp.abs(flow(STUDENT[:, ::-1], last) - flow(STUDENT, last)) > 1e-3).all()


def test_cosine_of_zero_and_of_nearly_parallel_vectors():
  vector = jnp.array([[3.0, 4.0]])
  np.testing.assert_array_equal(losses.cosine(jnp.zeros((1, 2)), vector), 1)
  np.testing.assert_array_equal(jax.grad(lambda s: losses.cosine(s, vector).sum())(jnp.zeros((1, 2))), 0)
  np.testing.assert_array_equal(losses.cosine(vector, -vector), 2)
  turned = jnp.array([[3.0 - 4e-3, 4.0 + 3e-3]])  # by atan 1e-3
  np.testing.assert_allclose(losses.cosine(turned, vector), 1 - np.cos(np.arctan(1e-3)), rtol=1e-3)


def test_factor_transfer_is_zero_for_factors_in_proportion():
  np.testing.assert_allclose(losses.factor_transfer(3 * STUDENT, STUDENT), 0, atol=1e-6)
  assert (losses.factor_transfer(STUDENT, TEACHER) > 1e-3).all()


def test_nst_is_the_same_by_channels_and_by_positions():
  # As many positions as make either Gram matrix the smaller one, the rest zero: they change no inner product.
  wide = lambda f: jnp.pad(f, ((0, 0), (0, 16), (0, 0), (0, 0)))
  np.testing.assert_allclose(losses.nst(wide(STUDENT), wide(TEACHER)), losses.nst(STUDENT, TEACHER), rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 20, 20, 8), (2, 3, 3, 40)])
def test_nst_holds_nothing_larger_than_its_inputs_or_a_gram_matrix(shape):
  student, teacher = maps(*shape), maps(*shape, seed=1)
  gradient = jax.make_jaxpr(jax.grad(lambda s: losses.nst(s, teacher).sum()))(student)
  largest = max(np.prod(v.aval.shape) for equation in gradient.eqns for v in equation.outvars)
  positions, channels = shape[1] * shape[2], shape[3]
  assert largest <= 2 * max(positions * channels, min(positions, channels) ** 2)


@pytest.mark.parametrize("channels", [3, 40])
def test_nst_keeps_its_digits_where_student_and_teacher_are_close(channels):
  student = np.asarray(maps(2, 6, 6, channels))
  teacher = student + np.float32(1e-3) * np.asarray(maps(2, 6, 6, channels, seed=1))
  gradient = jax.jit(jax.value_and_grad(lambda s, t: losses.nst(s, t).sum()))
  got, exact = in_float32_and_float64(gradient, student, teacher)
  for x, y in zip(got, exact, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max())


@pytest.mark.parametrize("name", ["fsp", "kdsvd", "inter_channel_correlation"])
def test_products_of_all_channels_with_all_are_never_held(name):
  """And a few channels at a time give what all at once do."""
  student, teacher = maps(2, 2, 2, 48), maps(2, 2, 2, 48, seed=1)
  rest = (teacher,) if name == "inter_channel_correlation" else (student, teacher, teacher)
  loss = jax.jit(lambda s: getattr(losses, name)(s, *rest))
  memory = jax.jit(jax.grad(lambda s: loss(s).sum())).lower(student).compile().memory_analysis().temp_size_in_bytes
  assert memory < 2 * 48 * 48 * 4  # one such array of the batch; a map has a twelfth of that
  if name != "kdsvd":  # which leaves its signs to the decomposition
    expected = getattr(family_features, name)(*(np.float64(x) for x in (student, *rest)))
    np.testing.assert_allclose(loss(student), expected, rtol=1e-5)


def test_hierarchical_context_of_a_constant_difference():
  np.testing.assert_allclose(losses.hierarchical_context(STUDENT + 2, STUDENT), 4, rtol=1e-5)


def test_hierarchical_context_without_a_level_below_the_height_is_the_hint():
  got = losses.hierarchical_context(STUDENT, TEACHER, levels=(8, 4))
  np.testing.assert_allclose(got, losses.hint(STUDENT, TEACHER), rtol=1e-6)


def test_vid_is_least_at_the_mean_squared_error():
  error = losses.hint(STUDENT[:1], TEACHER[:1])[0]
  slope = jax.grad(lambda variance: losses.vid(STUDENT[:1], TEACHER[:1], variance=variance).sum())
  np.testing.assert_allclose(slope(error), 0, atol=1e-6)
  assert slope(error / 2) < 0 < slope(error * 2)


def test_vid_is_the_gaussian_log_likelihood():
  density = norm.logpdf(TEACHER, STUDENT, jnp.sqrt(0.7))
  got = losses.vid(STUDENT, TEACHER, variance=0.7) + np.log(2 * np.pi) / 2
  np.testing.assert_allclose(got, -density.mean((1, 2, 3)), rtol=1e-5)


def test_vid_takes_a_variance_for_each_entry_and_ignores_masked_ones():
  variance = jnp.full(TEACHER.shape, 0.7).at[1].set(jnp.nan)
  total = lambda v, where: losses.vid(STUDENT, TEACHER, variance=v, where=where).sum()
  value, gradient = jax.value_and_grad(total)(variance, jnp.array([True, False]))
  np.testing.assert_allclose(value, losses.vid(STUDENT, TEACHER, variance=0.7)[0], rtol=1e-6)
  assert gradient[0].all() and not gradient[1].any()


def test_activation_boundary_counts_units_short_of_the_margin():
  student, teacher = jnp.array([[2.0, 0.5, -0.5, -2.0]]), jnp.array([[1.0, 1.0, 1.0, 1.0]])
  np.testing.assert_allclose(losses.activation_boundary(student, teacher), 0.5**2 + 1.5**2 + 3.0**2)
  np.testing.assert_allclose(losses.activation_boundary(student, -teacher), 3.0**2 + 1.5**2 + 0.5**2)
  np.testing.assert_array_equal(losses.activation_boundary(4 * teacher, teacher), 0)


def test_ofd_asks_nothing_below_a_negative_teacher():
  teacher, margin = jnp.array([[-0.5, -3.0, 2.0]]), jnp.array([-1.0, -1.0, -1.0])
  np.testing.assert_array_equal(losses.ofd(jnp.array([[-0.7, -1.5, 2.0]]), teacher, margin=margin), 0)
  np.testing.assert_allclose(losses.ofd(jnp.zeros((1, 3)), teacher, margin=margin), 0.5**2 + 1.0**2 + 2.0**2)


@pytest.mark.parametrize("scale", [0.5, -2.0])
@pytest.mark.parametrize("bias", [-20.0, -1.0, 0.0, 1.4])
def test_ofd_margin_is_the_mean_of_the_negative_part(scale, bias):
  with jax.enable_x64(True):
    got = losses.ofd_margin(jnp.array([scale], "float64"), jnp.array([bias], "float64"))[0]
  x = np.linspace(bias - 12 * abs(scale), 0, 400_001)
  density = np.exp(-(((x - bias) / scale) ** 2) / 2)
  np.testing.assert_allclose(got, np.trapezoid(x * density, x) / np.trapezoid(density, x), rtol=1e-7)


def test_ofd_margin_where_a_channel_is_hardly_ever_negative_or_constant():
  scale, bias = jnp.array([-2.0, 1.0, 1.0, 0.0, 0.0]), jnp.array([10.0, 1e4, -1e4, 3.0, -3.0])
  np.testing.assert_allclose(losses.ofd_margin(scale, bias), [-6, -3, -1e4, 0, -3], rtol=1e-6)
  slopes = jax.jacobian(losses.ofd_margin, argnums=(0, 1))(scale, bias)
  assert all(jnp.isfinite(slope).all() for slope in slopes)


def test_class_attention_of_linear_heads_ends_in_the_logits():
  """One position and no norm: what is left of the maps is the logits without the bias."""
  student, teacher, head = (np.asarray(x) for x in (STUDENT, TEACHER, maps(5, 7, seed=3)))
  got = losses.class_attention_transfer(student @ head, teacher @ head, size=1, normalize=False)
  np.testing.assert_allclose(got, losses.hint(student.mean((1, 2)) @ head, teacher.mean((1, 2)) @ head), rtol=1e-4)


@jax.jit
def kdsvd_gradient(student):
  return jax.grad(lambda s: on_layers(losses.kdsvd)(s, TEACHER).sum())(student)


def test_kdsvd_does_not_feel_the_sign_and_scale_of_the_student():
  value = on_layers(losses.kdsvd)
  np.testing.assert_allclose(value(-2 * STUDENT, TEACHER), value(STUDENT, TEACHER), rtol=1e-4)
  np.testing.assert_allclose(jnp.vdot(kdsvd_gradient(STUDENT), STUDENT), 0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-4])
def test_kdsvd_gradient_is_finite_at_equal_singular_values(scale, gap):
  values = scale * jnp.array([2.0, 2.0 * (1 + gap), 1.0, 1.0, 0.0])
  student = jnp.pad(jnp.diag(values), ((0, 7), (0, 0))).reshape(4, 3, 5)
  gradient = kdsvd_gradient(jnp.stack([student, student]))
  assert jnp.isfinite(gradient).all()


def test_kdsvd_rotates_equal_singular_values_as_one():
  """Directions that the student shares out evenly cannot be told apart, but the others keep their derivative."""
  values = jnp.array([3.0, 1.0, 1.0, 0.5, 0.5])
  student = jnp.pad(jnp.diag(values), ((0, 7), (0, 0))).reshape(1, 4, 3, 5).repeat(2, 0)
  assert jnp.abs(kdsvd_gradient(student)).max() > 1e-3


@pytest.mark.parametrize(
  "message, call",
  [
    (r"shape.*connector.*student \(2, 3\).*teacher \(2, 4\)", lambda: eager.hint(maps(2, 3), maps(2, 4))),
    (r"\[batch, \.\.\., width\]", lambda: eager.cosine(maps(2), maps(2))),
    (r"maps \[batch, \.\.\., channels\]", lambda: eager.nst(maps(2, 3), maps(2, 3))),
    (r"input_power.*1\.5", lambda: eager.factor_transfer(STUDENT, TEACHER, input_power=1.5)),
    (r"output_power.*0\.5", lambda: eager.factor_transfer(STUDENT, TEACHER, output_power=0.5)),
    (r"size must be a positive int.*got 0", lambda: eager.class_attention_transfer(STUDENT, TEACHER, size=0)),
    (r"size.*got \(2, 2\)", lambda: eager.class_attention_transfer(STUDENT, TEACHER, size=(2, 2))),
    (r"normalize.*got 1", lambda: eager.class_attention_transfer(STUDENT, TEACHER, normalize=1)),
    (r"levels must be positive.*got None", lambda: eager.hierarchical_context(STUDENT, TEACHER, levels=None)),
    (r"empty in student.*\(2, 0, 3, 5\)", lambda: eager.nst(STUDENT[:, :0], TEACHER)),
    (r"classes.*\(4,\).*\(5,\)", lambda: eager.class_attention_transfer(STUDENT[..., :4], TEACHER)),
    (r"variance.*\(2, 4, 3, 5\).*\(4,\)", lambda: eager.vid(STUDENT, TEACHER, variance=jnp.ones(4))),
    (r"margin.*\(2, 4, 3, 5\).*\(3,\)", lambda: eager.ofd(STUDENT, TEACHER, margin=-jnp.ones(3))),
    (r"bn_scale.*bn_bias.*\(3,\).*\(2,\)", lambda: eager.ofd_margin(jnp.ones(3), jnp.ones(2))),
    (r"channels.*\(4,\).*\(5,\)", lambda: eager.inter_channel_correlation(STUDENT[..., :4], TEACHER)),
    (r"student_last.*teacher_last.*\(4,\).*\(5,\)", lambda: eager.fsp(STUDENT, STUDENT[..., :4], TEACHER, TEACHER)),
    (r"k must be an int from 1 to 5.*got 6", lambda: eager.kdsvd(STUDENT, STUDENT, TEACHER, TEACHER, k=6)),
    (r"where must be a bool array .*\(2,\); got a list", lambda: eager.hint(STUDENT, STUDENT, where=[True, False])),
  ],
)
def test_mistakes_are_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()
