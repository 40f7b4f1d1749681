"""What the formulas imply: invariances, limits, relations between losses, and digits that must not be lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdflax import losses as eager
from tests.compiled import Compiled, compiled
from tests.losses import family_contrastive, family_relations
from tests.losses.case import in_float32_and_float64
from tests.losses.family_divergences import forward_kl, jensen_shannon, reverse_kl
from tests.losses.family_logits import softmax

losses = Compiled(eager)  # the formulas; what they refuse is tried on the functions themselves

RELATIONS = (
  losses.similarity_preserving,
  losses.pkt,
  losses.correlation_congruence,
  losses.rkd_distance,
  losses.rkd_angle,
)
DIVERGENCES = (
  losses.forward_kl,
  losses.reverse_kl,
  losses.total_variation,
  losses.skew_kl,
  losses.reverse_skew_kl,
  losses.jensen_shannon,
)


def labelled(loss):
  """A loss of two logits, from one that takes labels as well."""

  @functools.wraps(loss)
  def of_logits(student, teacher, **hyper):
    return loss(student, teacher, jnp.arange(len(student)) % student.shape[-1], **hyper)

  return of_logits


WITH_LABELS = labelled(losses.dkd), labelled(losses.nkd)
LOGIT_LOSSES = (
  *DIVERGENCES,
  *WITH_LABELS,
  losses.kl_soft_targets,
  losses.hard_targets,
  losses.dist,
  losses.class_correlation,
  losses.batch_correlation,
)

by_name = functools.partial(pytest.mark.parametrize, ids=lambda loss: loss.__name__)


def float64(test):
  @functools.wraps(test)
  def run(*args, **kwargs):
    with jax.enable_x64(True):
      test(*args, **kwargs)

  return run


def features(seed=0, batch=6, width=5):
  return np.random.default_rng(seed).normal(size=(2, batch, width))


@by_name("loss", RELATIONS)
@float64
def test_relations_follow_a_permutation_and_ignore_a_rotation(loss):
  student, teacher = features()
  expected = np.asarray(loss(student, teacher))
  assert expected.max() > 0
  order = np.random.default_rng(1).permutation(len(student))
  rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))
  np.testing.assert_allclose(loss(student[order], teacher[order]), expected[order], rtol=1e-9)
  np.testing.assert_allclose(loss(student @ rotation, teacher), expected, rtol=1e-9)


@by_name("loss", (losses.similarity_preserving, losses.pkt, losses.rkd_distance, losses.rkd_angle))
@float64
def test_relations_ignore_the_scale(loss):
  student, teacher = features()
  for scale in (1e-3, 1e3):
    np.testing.assert_allclose(loss(scale * student, teacher), loss(student, teacher), rtol=1e-9)


@by_name("loss", (losses.rkd_distance, losses.rkd_angle))
@float64
def test_relational_distillation_ignores_a_translation(loss):
  student, teacher = features()
  np.testing.assert_allclose(loss(student + 1e3, teacher - 7), loss(student, teacher), rtol=1e-9)


@pytest.mark.parametrize("spread", [0.1, 1e-2, 1e-3])
def test_pkt_keeps_its_digits_where_rows_are_opposed(spread):
  """Two classes that a student has collapsed lie opposite each other, where 1 + cos is a small difference."""
  side = np.where(np.arange(12) % 2, 1, -1)[:, None] * features(seed=3, batch=1)[0]
  student, teacher = (side + spread * features(seed=1, batch=12)).astype(np.float32)
  gradient = jax.jit(jax.value_and_grad(lambda s, t: losses.pkt(s, t).sum()))
  got, exact = in_float32_and_float64(gradient, student, teacher)
  for x, y in zip(got, exact, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-4 * np.abs(y).max())


def test_info_nce_keeps_its_digits_where_the_student_is_right():
  student = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
  for rows in (student, student[:1]):
    expected = family_contrastive.info_nce(*[np.float64(rows)] * 2, temperature=0.05)
    np.testing.assert_allclose(losses.info_nce(rows, rows, temperature=0.05), expected, rtol=1e-4, atol=1e-15)


@by_name("loss", (losses.similarity_preserving, losses.pkt, losses.info_nce))
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_relations_of_directions_ignore_a_scale_whose_squares_leave_float32(loss, scale):
  student, teacher = features().astype(np.float32)
  scale = np.float32(scale)
  np.testing.assert_allclose(loss(scale * student, teacher / scale), loss(student, teacher), rtol=1e-5)


@pytest.mark.parametrize("width", [3, 512, 16384])
def test_equal_rows_far_from_the_origin_are_at_distance_zero(width):
  student, teacher = 100 + features(batch=4, width=width).astype(np.float32)
  student[1] = student[0]
  # With three of four rows equal, and the teacher's so too, every distance is 0 or the same: nothing is left to match.
  student[2] = student[0]
  teacher[1:3] = teacher[0]
  np.testing.assert_array_equal(losses.rkd_distance(student, teacher)[:3] < 1e-12, True)
  value, gradient = jax.value_and_grad(lambda s: losses.rkd_angle(s, teacher).sum())(student)
  assert value < 1e-10 and np.isfinite(gradient).all()


def clusters(seed, spread=1e-3):
  """Four clusters of four unit rows, as a student that has collapsed its classes gives them."""
  rng = np.random.default_rng(seed)
  rows = np.repeat(rng.normal(size=(4, 8)), 4, axis=0) + spread * rng.normal(size=(16, 8))
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@by_name("loss", RELATIONS)
@pytest.mark.parametrize("where", ["clusters", "far from the origin"])
def test_relations_in_float32_keep_their_digits(loss, where):
  """Where products of rows are nearly equal, their differences have lost what float32 can hold."""
  offset, spread = (0, 1e-3) if where == "clusters" else (1e3, 1.0)
  student, teacher = ((offset + clusters(seed, spread)).astype(np.float32) for seed in (0, 1))
  gradient = jax.jit(jax.value_and_grad(lambda student, teacher: loss(student, teacher).mean()))
  got, exact = in_float32_and_float64(gradient, student, teacher)
  np.testing.assert_allclose(got[0], exact[0], rtol=1e-4)
  assert np.linalg.norm(np.asarray(got[1]) - np.asarray(exact[1])) < 1e-3 * np.linalg.norm(exact[1])


@by_name("loss", (losses.pkt, losses.rkd_distance, losses.rkd_angle))
def test_float32_gradients_keep_their_digits_however_close_two_rows_are(loss):
  gradient = jax.jit(jax.value_and_grad(lambda student, teacher: loss(student, teacher).mean()))
  for share in (0.3, 0.1, 0.03, 0.01, 1e-4):
    student, teacher = (x.astype(np.float32) for x in features(batch=12, width=64))
    student[[1, 7]] = student[0] + np.float32(share) * student[8:10]
    teacher[3] = teacher[2] + np.float32(share) * teacher[8]
    got, exact = in_float32_and_float64(gradient, student, teacher)
    np.testing.assert_allclose(got[0], exact[0], rtol=3e-6, err_msg=str(share))
    error = np.linalg.norm(np.asarray(got[1]) - np.asarray(exact[1])) / np.linalg.norm(exact[1])
    assert error < 3e-5, (share, error)


@by_name("loss", (losses.rkd_distance, losses.rkd_angle))
def test_a_vmap_still_asks_whether_rows_are_close(loss):
  """A `vmap` would make both of two branches one, and take the slow one too for every batch."""
  batches = jnp.stack([features(batch=6, width=4)[0] for _ in range(3)]).astype(jnp.float32)
  gradient = jax.grad(lambda x: loss(x, 1 + x).sum())
  branches = lambda function, x: str(jax.make_jaxpr(function)(x)).count("cond[")
  assert branches(jax.vmap(gradient), batches) == branches(gradient, batches[0]) > 0
  one_is_close = batches.at[1, 0].set(batches[1, 1] * 1.001)
  got = jax.vmap(loss)(one_is_close, batches)
  np.testing.assert_allclose(
    got, [loss(x, t) for x, t in zip(one_is_close, batches, strict=True)], rtol=1e-5, atol=1e-7
  )


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
@float64
def test_equal_rows_count_at_distance_zero(name):
  student, teacher = features()
  student[3], teacher[[1, 4]] = student[0], teacher[2]
  np.testing.assert_allclose(getattr(losses, name)(student, teacher), getattr(family_relations, name)(student, teacher))


@by_name("loss", LOGIT_LOSSES)
@float64
def test_logit_losses_ignore_a_shift(loss):
  student, teacher = features()
  shift = np.arange(6.0)[:, None]
  np.testing.assert_allclose(loss(student + shift, teacher - 2 * shift), loss(student, teacher), rtol=1e-9, atol=1e-12)


@by_name("loss", LOGIT_LOSSES)
def test_logit_losses_keep_the_digits_of_logits_far_from_zero(loss):
  """Multiples of 1/64 next to 8192 are float32 numbers: nothing is lost before the loss sees them."""
  student, teacher = (np.round(64 * x).astype(np.float32) / 64 for x in features())
  np.testing.assert_allclose(loss(student + 8192, teacher + 8192), loss(student, teacher), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("loss", "share"),
  [
    (losses.kl_soft_targets, None),
    (losses.reverse_kl, None),
    (losses.total_variation, None),
    (losses.skew_kl, "alpha"),
    (losses.reverse_skew_kl, "alpha"),
    (losses.jensen_shannon, "beta"),
    (losses.dist, None),
  ],
)
@float64
def test_learned_temperatures_and_shares_have_derivatives_where_classes_are_masked(loss, share):
  student, teacher = features()
  student[:, 1] = teacher[:, 1] = -np.inf
  temperature, shares = np.linspace(0.5, 3, 6), np.linspace(0.1, 0.9, 6)

  def total(temperature, shares):
    hyper = {"temperature": temperature} | ({share: shares} if share else {})
    return (temperature * loss(student, teacher, **hyper)).sum()

  check_grads(jax.jit(total), (temperature, shares), order=1, modes=["fwd", "rev"], rtol=1e-6)
  check_grads(jax.jit(jax.grad(total, argnums=(0, 1))), (temperature, shares), order=1, modes=["fwd"], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_hot_soft_targets_are_half_the_variance_of_the_difference(dtype):
  """KL at temperature T is `var_c(s - t) / (2 T^2)` up to O(T^-3)."""
  student, teacher = features()
  with jax.enable_x64(dtype == "float64"):
    values = losses.kl_soft_targets(student.astype(dtype), teacher.astype(dtype), temperature=1e4)
  np.testing.assert_allclose(values, (student - teacher).var(axis=-1) / 2, rtol=2e-3)


@float64
def test_jensen_shannon_is_symmetric_at_one_half():
  student, teacher = features()
  there, back = losses.jensen_shannon(student, teacher, beta=0.5), losses.jensen_shannon(teacher, student, beta=0.5)
  np.testing.assert_allclose(there, back, rtol=1e-9)
  assert (np.asarray(there) < np.log(2)).all()
  disjoint = np.array([[1e4, 0.0], [0.0, 1e4]])
  np.testing.assert_allclose(losses.jensen_shannon(disjoint, disjoint[::-1], beta=0.5), np.log(2), rtol=1e-9)


@pytest.mark.parametrize("number", [float, np.float32, np.array, jnp.asarray])
def test_jensen_shannon_at_its_ends_is_a_divergence_in_one_direction(number):
  student, teacher = features().astype(np.float32)
  for beta, end in ((0.0, eager.forward_kl), (1.0, eager.reverse_kl)):
    np.testing.assert_array_equal(eager.jensen_shannon(student, teacher, beta=number(beta)), end(student, teacher))


def test_jensen_shannon_refuses_a_beta_outside_the_unit_interval():
  with pytest.raises(ValueError, match=r"beta.*0 and 1.*1\.5"):
    eager.jensen_shannon(*features(), beta=1.5)


@float64
def test_skewed_divergences_without_skew_are_the_two_directions():
  student, teacher = features()
  skew, reverse = (jax.jit(loss) for loss in (losses.skew_kl, losses.reverse_skew_kl))
  np.testing.assert_allclose(skew(student, teacher, alpha=0.0), forward_kl(student, teacher), rtol=1e-9)
  np.testing.assert_allclose(reverse(student, teacher, alpha=0.0), reverse_kl(student, teacher), rtol=1e-9)


@by_name("loss", (losses.skew_kl, losses.reverse_skew_kl))
@float64
def test_a_share_has_a_derivative_where_it_is_zero(loss):
  student, teacher = features()
  total = lambda alpha: loss(student, teacher, alpha=alpha).sum()
  np.testing.assert_allclose(jax.grad(total)(0.0), (total(1e-6) - total(0.0)) / 1e-6, rtol=1e-4)


@by_name("loss", (losses.total_variation, losses.jensen_shannon, losses.forward_kl))
@pytest.mark.parametrize("classes", [10, 4000])
def test_equal_logits_have_no_gradient_however_they_are_compiled(loss, classes):
  """Through operations of their own, as two models have, the two sides are compiled to different roundings."""
  student = jax.random.normal(jax.random.key(0), (6, classes))
  gradient = jax.jit(jax.grad(lambda s, t: loss(s, t).sum()))(student, jnp.array(student))
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_a_masked_share_may_be_anything():
  student, teacher = features(batch=2)
  values = losses.jensen_shannon(student, teacher, beta=np.array([np.nan, 0.5]), where=np.array([False, True]))
  np.testing.assert_allclose(values, [0, losses.jensen_shannon(student, teacher)[1]], rtol=1e-6)


@float64
def test_decoupled_parts_add_up_to_soft_targets():
  """KL(p || q) = KL(b_p || b_q) + (1 - p_y) KL(p^ || q^)."""
  student, teacher = features()
  labels = np.array([0, 3, 2, 4, 1, 1])
  parts = functools.partial(losses.dkd, student, teacher, labels, temperature=3.0)
  rest = 1 - np.take_along_axis(softmax(teacher / 3), labels[:, None], -1)[:, 0]
  total = parts(alpha=1.0, beta=0.0) + rest * parts(alpha=0.0, beta=1.0)
  np.testing.assert_allclose(total, losses.kl_soft_targets(student, teacher, temperature=3.0), rtol=1e-9)


def test_decoupled_loss_of_two_classes_has_no_second_part():
  student, teacher = features(width=2)
  values = losses.dkd(student, teacher, np.array([0, 1] * 3), alpha=0.0, beta=1.0)
  np.testing.assert_array_equal(values, 0)


@by_name("loss", (eager.dkd, eager.nkd))
def test_labels_are_checked(loss):
  student, teacher = features()
  with pytest.raises(ValueError, match=r"labels must be integers.*float32"):
    loss(student, teacher, np.ones(6, np.float32))
  with pytest.raises(ValueError, match=r"labels \(5,\)"):
    loss(student, teacher, np.ones(5, int))
  np.testing.assert_array_equal(np.isnan(loss(student, teacher, np.array([0, 1, 5, -1, 2, 3]))), [0, 0, 1, 1, 0, 0])


@float64
def test_constant_logits_are_standardised_to_zero_with_the_gradient_of_the_centring():
  cotangent = np.arange(5.0)
  values, pullback = jax.vjp(losses.standardize_logits, jnp.full(5, 0.1))
  np.testing.assert_array_equal(values, 0)
  np.testing.assert_allclose(pullback(cotangent)[0], (cotangent - cotangent.mean()) * 1e7, rtol=1e-9)


def test_standardised_logits_keep_an_impossible_class_out_of_their_statistics():
  logits = np.array([1.0, 2.0, 4.0, -np.inf], np.float32)
  got = losses.standardize_logits(logits)
  np.testing.assert_allclose(got[:3], losses.standardize_logits(logits[:3]), rtol=1e-6)
  assert got[3] == -np.inf


@float64
def test_correlation_with_a_constant_is_zero_and_of_two_constants_one():
  student, teacher = features()
  within = functools.partial(losses.dist, beta=1.0, gamma=0.0)
  np.testing.assert_allclose(within(np.ones_like(student), teacher), 1, rtol=1e-9)
  np.testing.assert_array_equal(within(np.ones_like(student), np.zeros_like(student)), 0)


@by_name("loss", LOGIT_LOSSES)
@float64
def test_standardized_losses_ignore_a_scale(loss):
  """Logit standardisation works with every loss of two logits."""
  student, teacher = features()
  scale = np.linspace(0.5, 2, 6)[:, None]
  wrapped = compiled(eager.standardized(loss))
  np.testing.assert_allclose(wrapped(student * scale + 3, teacher), wrapped(student, teacher), rtol=1e-5, atol=1e-9)


@by_name("loss", (*DIVERGENCES, *WITH_LABELS, losses.kl_soft_targets))
def test_nearly_equal_bfloat16_vocabularies(loss):
  """In the dtype of the inputs the sums over 32,000 classes have no digit left, and some come out negative."""
  rng = np.random.default_rng(0)
  teacher = jnp.asarray(3 * rng.normal(size=(2, 32_000)), jnp.bfloat16)
  student = jnp.asarray(np.float64(teacher) + 0.2 * rng.normal(size=teacher.shape), jnp.bfloat16)
  got = loss(student, teacher)
  with jax.enable_x64(True):
    exact = loss(jnp.asarray(student, jnp.float64), jnp.asarray(teacher, jnp.float64))
  assert got.dtype == jnp.float32 and exact.dtype == jnp.float64
  np.testing.assert_allclose(got, exact, rtol=1e-2)
  if loss is losses.jensen_shannon:
    np.testing.assert_allclose(exact, jensen_shannon(*np.float64([student, teacher])), rtol=1e-9)


def test_float32_divergence_of_nearly_equal_logits_keeps_its_digits():
  student, teacher = features()
  student = (teacher + 1e-3 * student).astype(np.float32)
  teacher = teacher.astype(np.float32)
  got = losses.forward_kl(student, teacher)
  np.testing.assert_allclose(got, forward_kl(np.float64(student), np.float64(teacher)), rtol=2e-3)


@pytest.mark.parametrize("lower", [20.0, 60.0, 200.0])
def test_dist_does_not_depend_on_how_unlikely_a_class_is(lower):
  """Its correlation over the batch is that of its relative probabilities; their squares would be out of range."""
  student = np.array([[0, 1, 2.0], [1, 0, 1.0], [0, 0.5, 3.0]]) - [0, 0, lower]
  teacher = np.array([[0, 2, 3.0], [1, 0, 2.0], [2, 0.5, 0.0]]) - [0, 0, lower]
  mean = lambda student, teacher: losses.dist(student, teacher).mean()
  value, gradients = jax.value_and_grad(mean, (0, 1))(*(jnp.float32(x) for x in (student, teacher)))
  with jax.enable_x64(True):
    expected = jax.value_and_grad(mean, (0, 1))(jnp.asarray(student), jnp.asarray(teacher))
  np.testing.assert_allclose(value, expected[0], rtol=1e-5)
  for got, exact in zip(gradients, expected[1], strict=True):
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-6)
  assert np.abs(expected[1][0][:, 2]).min() > 1e-3


def test_settings_that_make_no_sense_are_named():
  x = jnp.ones((3, 2))
  with pytest.raises(ValueError, match=r"chunk must be a positive int; got 2\.0"):
    eager.rkd_angle(x, x, chunk=2.0)
  with pytest.raises(ValueError, match=r"array beta must be inside \(0, 1\); 0 and 1 are forward_kl and reverse_kl"):
    eager.jensen_shannon(x, x, beta=np.array([0.0, 0.5, 1.0]))
  with pytest.raises(ValueError, match="epsilon must be a single number; got shape"):
    eager.pkt(x, x, epsilon=jnp.ones(3))
  with pytest.raises(ValueError, match="temperature must be a number or an array; got None"):
    eager.kl_soft_targets(x, x, temperature=None)
