"""NumPy references and cases of `losses/divergences.py`."""

import numpy as np

from kdflax import losses
from tests.losses.case import Case
from tests.losses.family_logits import kl, logits, softmax


def distributions(s, t, temperature):
  return softmax(s / temperature), softmax(t / temperature)


def forward_kl(s, t, *, temperature=1.0):
  q, p = distributions(s, t, temperature)
  return kl(p, q)


def reverse_kl(s, t, *, temperature=1.0):
  q, p = distributions(s, t, temperature)
  return kl(q, p)


def total_variation(s, t, *, temperature=1.0):
  q, p = distributions(s, t, temperature)
  return np.abs(p - q).sum(-1) / 2


def skew_kl(s, t, *, temperature=1.0, alpha=0.1):
  q, p = distributions(s, t, temperature)
  return kl(p, alpha * p + (1 - alpha) * q)


def reverse_skew_kl(s, t, *, temperature=1.0, alpha=0.1):
  q, p = distributions(s, t, temperature)
  return kl(q, alpha * q + (1 - alpha) * p)


def jensen_shannon(s, t, *, temperature=1.0, beta=0.5):
  if beta in (0, 1):
    return (forward_kl, reverse_kl)[int(beta)](s, t, temperature=temperature)
  q, p = distributions(s, t, temperature)
  m = beta * p + (1 - beta) * q
  return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(s, t, *, alpha, beta, temperature=1.0):
  q, p = distributions(s, t, temperature)
  if alpha == 0 and beta == 0:
    return (np.log(q / p) ** 2).sum(-1) / 2
  if alpha == 0:
    return alpha_beta(t, s, alpha=beta, beta=0, temperature=temperature)
  if beta == 0:
    return (p**alpha * np.log(p**alpha / q**alpha) - p**alpha + q**alpha).sum(-1) / alpha**2
  if alpha + beta == 0:
    return (alpha * np.log(q / p) + (p / q) ** alpha - 1).sum(-1) / alpha**2
  both = alpha + beta
  return -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both).sum(-1) / (alpha * beta)


def powers(alpha, beta):
  return {"temperature": 2.0, "alpha": alpha, "beta": beta}


SOFT = {"temperature": 2.0}
SKEWED = {"temperature": 2.0, "alpha": 0.3}

CASES = [
  Case(losses.forward_kl, forward_kl, logits, SOFT, kind="logits"),
  Case(losses.reverse_kl, reverse_kl, logits, SOFT, kind="logits"),
  Case(losses.total_variation, total_variation, logits, SOFT, kind="logits"),
  Case(losses.skew_kl, skew_kl, logits, SKEWED, kind="logits"),
  Case(losses.reverse_skew_kl, reverse_skew_kl, logits, SKEWED, kind="logits"),
  Case(losses.jensen_shannon, jensen_shannon, logits, {"temperature": 2.0, "beta": 0.3}, kind="logits"),
  Case(losses.jensen_shannon, jensen_shannon, logits, SOFT, static={"beta": 0}, kind="logits", label="teacher-end"),
  Case(losses.jensen_shannon, jensen_shannon, logits, SOFT, static={"beta": 1.0}, kind="logits", label="student-end"),
  Case(losses.alpha_beta, alpha_beta, logits, powers(0.8, 0.3), kind="logits"),
  Case(losses.alpha_beta, alpha_beta, logits, powers(0.7, 0.0), kind="logits", label="teacher-end"),
  Case(losses.alpha_beta, alpha_beta, logits, powers(0.0, 0.6), kind="logits", label="student-end"),
]
