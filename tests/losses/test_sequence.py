"""What the contract does not say of losses of tokens whose teacher is known in part or has another vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import losses as eager
from tests.compiled import Compiled
from tests.losses.family_logits import log_softmax

losses = Compiled(eager)  # the formulas; what they refuse is tried on the functions themselves

TOP_K = (losses.top_k_kl, losses.top_k_reverse_kl, losses.top_k_jensen_shannon)
WHOLE = (losses.forward_kl, losses.reverse_kl, losses.jensen_shannon)


def logits_of(seed, classes=7):
  return np.random.default_rng(seed).normal(size=(4, classes)).astype(np.float32)


def known(logits, k):
  indices = np.argsort(-logits, axis=-1)[:, :k]
  return np.take_along_axis(log_softmax(logits), indices, -1).astype(np.float32), indices


@pytest.mark.parametrize(("top_k", "whole"), list(zip(TOP_K, WHOLE, strict=True)))
def test_with_all_classes_it_is_the_divergence_and_with_fewer_never_above(top_k, whole):
  student, teacher = logits_of(0), logits_of(1)
  full = np.asarray(whole(student, teacher))
  for tail in (True, False):
    np.testing.assert_allclose(top_k(student, *known(teacher, 7), tail=tail), full, rtol=1e-5)
  assert (np.asarray(top_k(student, *known(teacher, 3))) < full).all()


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("tail", [True, False])
def test_entries_of_minus_infinity_take_no_part(top_k, tail):
  """Their index may be one that is there already, or none at all; a record of nothing says nothing."""
  student, (log_p, indices) = logits_of(0), known(logits_of(1), 3)
  filled = np.concatenate([log_p, np.full((4, 2), -np.inf, np.float32)], -1)
  at = np.concatenate([indices, indices[:, :1], np.full((4, 1), 99)], -1)

  def total(student, log_p, indices):
    return top_k(student, log_p, indices, tail=tail).sum()

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
  (value, slopes), (padded_value, padded) = run(student, log_p, indices), run(student, filled, at)
  np.testing.assert_allclose(padded_value, value, rtol=1e-6)
  np.testing.assert_allclose(padded[0], slopes[0], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(padded[1][:, :3], slopes[1], rtol=1e-5, atol=1e-7)
  assert not padded[1][:, 3:].any()
  nothing = run(student, np.full_like(log_p, -np.inf), indices)
  for leaf in jax.tree.leaves(nothing):  # the rest is all there is, up to rounding
    np.testing.assert_allclose(leaf, 0, atol=1e-6)


@pytest.mark.parametrize("top_k", TOP_K)
def test_a_tail_that_is_nothing_or_rounding_stays_finite(top_k):
  """A teacher sure beyond rounding, one whose coarse record sums to more than 1, and classes that neither side has."""
  sure = np.array([[0.0, -30.0]], np.float32)
  coarse = np.log(np.array([[0.7, 0.32]], np.float32))
  all_there_is = np.log(np.array([[0.3, 0.7 - 1e-7]], np.float32))
  student, masked = np.array([[0.3, -0.2, 1.0, 0.1]], np.float32), np.array([[1.0, 2.0, -np.inf, -np.inf]], np.float32)
  at = np.array([[0, 1]])
  for logits, log_p in ((student, sure), (student, coarse), (masked, all_there_is), (student * 1e4, sure)):
    value, slope = jax.value_and_grad(lambda logits, log_p=log_p: top_k(logits, log_p, at).sum())(logits)
    assert np.isfinite(value) and np.isfinite(slope).all() and value >= -1e-6
  assert jax.grad(lambda logits: top_k(logits, sure, at).sum())(student)[0, 2] > 0  # the tail has a gradient


def test_static_ends_of_beta_are_the_two_directions():
  arguments = (logits_of(0), *known(logits_of(1), 3))
  for beta, end in ((0, losses.top_k_kl), (1.0, losses.top_k_reverse_kl)):
    for tail in (True, False):
      got = losses.top_k_jensen_shannon(*arguments, beta=beta, tail=tail)
      np.testing.assert_array_equal(got, end(*arguments, tail=tail))


def test_draws_estimate_the_gradient_of_the_forward_kl():
  """Exactly, if every class is drawn as often as the teacher expects it; the value lacks the teacher's entropy."""
  student, p = logits_of(0, 4), np.array([[0.5, 0.25, 0.25, 0.0]] * 4, np.float32)
  draws = np.array([[0, 1, 0, 2]] * 4)
  weights = np.full(draws.shape, 0.25, np.float32)
  kl = lambda s: losses.forward_kl(s, jnp.log(p)).sum()
  drawn = lambda s: losses.sampled_kl(s, draws, weights).sum()
  np.testing.assert_allclose(jax.grad(drawn)(student), jax.grad(kl)(student), atol=1e-6)
  np.testing.assert_allclose(drawn(student) - kl(student), 4 * np.log([2, 4]).mean(), rtol=1e-5)
  # A weight of 0 fills up, whatever its class and however impossible.
  filled = losses.sampled_kl(
    np.concatenate([student, np.full((4, 1), -np.inf, np.float32)], -1),
    np.concatenate([draws, [[4, 99]] * 4], -1),
    np.concatenate([weights, np.zeros((4, 2), np.float32)], -1),
  )
  np.testing.assert_allclose(filled.sum(), drawn(student), rtol=1e-6)


def test_sorted_probabilities_see_no_names():
  student = logits_of(0)
  shuffled = np.random.default_rng(2).permutation(student, axis=-1)
  np.testing.assert_allclose(losses.unordered_logits(student, shuffled), 0, atol=1e-6)
  longer = np.concatenate([shuffled, np.full((4, 3), -np.inf, np.float32)], -1)
  np.testing.assert_allclose(losses.unordered_logits(longer, student), 0, atol=1e-6)


def test_indices_that_do_not_fit_are_named():
  student, (log_p, indices) = logits_of(0), known(logits_of(1), 3)
  with pytest.raises(ValueError, match=r"teacher_indices of shape \(4, 3\) must be in 0 .. 6; got 9"):
    eager.top_k_kl(student, log_p, np.full_like(indices, 9))
  with pytest.raises(ValueError, match="teacher_indices must be integers; got float32"):
    eager.sampled_kl(student, log_p, log_p)
  with pytest.raises(ValueError, match=r"same shape; got teacher_log_probs \(4, 3\), teacher_indices \(4, 2\)"):
    eager.top_k_kl(student, log_p, indices[:, :2])
  with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
    eager.top_k_kl(student, log_p, indices, temperature=0)
  unseen = jax.jit(eager.top_k_kl)(student, log_p, np.where(indices == indices.max(), -1, indices))
  assert np.isnan(unseen).any()
