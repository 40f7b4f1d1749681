"""Logits at the edge of what a softmax can hold, and settings that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import losses as eager
from tests.compiled import Compiled

losses = Compiled(eager)  # the formulas; what they refuse is tried on the functions themselves

STUDENT = np.array([[1, 0, -200, 0.5]], np.float32)  # in float32 its third class has underflown
TEACHER = np.array([[0.5, 1, -np.inf, 0.2]], np.float32)
BOUNDED = (losses.skew_kl, losses.reverse_skew_kl, losses.jensen_shannon, losses.total_variation)


def labelled(loss):
  return lambda student, teacher: loss(student, teacher, np.array([0]))


def value_and_gradients(loss, *logits):
  return jax.value_and_grad(lambda *logits: loss(*logits).sum(), argnums=(0, 1))(*(jnp.asarray(x) for x in logits))


@pytest.mark.parametrize(
  ("loss", "infinite"),
  [
    (losses.reverse_kl, (STUDENT, TEACHER)),
    (losses.forward_kl, (TEACHER, STUDENT)),
    (losses.kl_soft_targets, (TEACHER, STUDENT)),
    (labelled(losses.dkd), (TEACHER, STUDENT)),
    (labelled(losses.nkd), (TEACHER, STUDENT)),
    (lambda s, t: losses.skew_kl(s, t, alpha=0.0), (TEACHER, STUDENT)),
    (lambda s, t: losses.reverse_skew_kl(s, t, alpha=0.0), (STUDENT, TEACHER)),
  ],
)
def test_a_class_impossible_on_one_side_and_underflown_on_the_other(loss, infinite):
  """Infinite where the expectation runs over it; otherwise it adds nothing, as if it had been left out."""
  value, gradients = value_and_gradients(loss, *infinite)
  assert value == np.inf and not any(np.isnan(g).any() for g in gradients)
  finite = infinite[::-1]
  value, gradients = value_and_gradients(loss, *finite)
  np.testing.assert_allclose(value, loss(*(np.delete(logits, 2, axis=1) for logits in finite))[0], rtol=1e-6)
  assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("loss", BOUNDED)
def test_bounded_divergences_of_such_a_class_are_finite(loss):
  for pair in ((STUDENT, TEACHER), (TEACHER, STUDENT)):
    value, gradients = value_and_gradients(loss, *pair)
    np.testing.assert_allclose(value, loss(*(np.delete(logits, 2, axis=1) for logits in pair))[0], rtol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


OF_TWO_LOGITS = [
  losses.kl_soft_targets,
  losses.hard_targets,
  labelled(losses.dkd),
  labelled(losses.nkd),
  losses.dist,
  losses.class_correlation,
  losses.batch_correlation,
  losses.forward_kl,
  losses.reverse_kl,
  *BOUNDED,
]


@pytest.mark.parametrize("loss", OF_TWO_LOGITS)
def test_one_class_is_refused(loss):
  with pytest.raises(ValueError, match=r"at least 2 classes.*got \(1, 1\).*bernoulli_kl"):
    loss(STUDENT[:, :1], TEACHER[:, :1])


@pytest.mark.parametrize("loss", [eager.kl_soft_targets, eager.skew_kl, eager.dist, eager.info_nce])
def test_a_temperature_known_to_be_wrong_is_refused(loss):
  for wrong in (0, -4, np.nan, np.float32(0), np.array([-1.0])):
    with pytest.raises(ValueError, match=r"temperature must be above 0; got"):
      loss(STUDENT, STUDENT, temperature=wrong)
    with pytest.raises(ValueError, match=r"temperature must be above 0; got"):
      jax.jit(lambda s, wrong=wrong: loss(s, s, temperature=wrong))(STUDENT)


@pytest.mark.parametrize("loss", [eager.skew_kl, eager.reverse_skew_kl])
def test_a_share_known_to_be_wrong_is_refused(loss):
  for wrong in (-0.1, 1, np.nan, np.array([1.5])):
    with pytest.raises(ValueError, match=r"alpha must be at least 0 and below 1; got"):
      loss(STUDENT, STUDENT, alpha=wrong)


def test_a_masked_example_may_have_a_wrong_temperature():
  logits = np.repeat(STUDENT, 2, axis=0)
  options = {"temperature": np.array([-1.0, 2.0]), "where": np.array([False, True])}
  np.testing.assert_array_equal(eager.kl_soft_targets(logits, logits, **options), 0)
  with pytest.raises(ValueError, match="temperature"):
    eager.kl_soft_targets(logits, logits, temperature=np.array([-1.0, 2.0]))
