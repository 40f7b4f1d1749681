"""NumPy references and cases of `losses/targets.py` and of the logit losses in `ranking.py` and `transport.py`."""

import numpy as np

from kdflax import losses
from tests.losses.case import Case
from tests.losses.family_logits import (
  kl,
  labelled,
  log_softmax,
  logits,
  of_labels,
  softmax,
  standardized,
  without_labels,
)


def dkd(s, t, y, *, temperature=4.0, alpha=1.0, beta=8.0):
  binary = lambda z: np.stack([of_labels(softmax(z), y), 1 - of_labels(softmax(z), y)], -1)
  others = lambda z: softmax(without_labels(z, y))
  s, t = s / temperature, t / temperature
  return temperature**2 * (alpha * kl(binary(t), binary(s)) + beta * kl(others(t), others(s)))


def nkd(s, t, y, *, temperature=1.0, gamma=1.5):
  target = -of_labels(softmax(t), y) * of_labels(log_softmax(s), y)
  p, log_q = softmax(without_labels(t, y) / temperature), log_softmax(without_labels(s, y) / temperature)
  return target - gamma * temperature**2 * (p * log_q).sum(-1)


def rld(s, t, y, *, temperature, top_temperature, alpha, beta):
  top, target = softmax(t / top_temperature).max(-1), of_labels(softmax(s / top_temperature), y)
  binary = lambda p: np.stack([p, 1 - p], -1)
  below = np.zeros(len(s))
  for i, (row, other, label) in enumerate(zip(s, t, y, strict=True)):
    if (lower := other < other[label]).any():
      below[i] = kl(softmax(other[lower] / temperature), softmax(row[lower] / temperature))
  return alpha * top_temperature**2 * kl(binary(top), binary(target)) + beta * temperature**2 * below


def ofa(s, t, y, *, epsilon, temperature=1.0):
  own = np.eye(s.shape[-1])[y]
  return -(((softmax(t / temperature) + own) ** epsilon - own) * log_softmax(s / temperature)).sum(-1)


def margin_mse(s, t):
  margins = lambda x: x[:, :, None] - x[:, None]
  items = s.shape[-1]
  return ((margins(s) - margins(t)) ** 2).sum((1, 2)) / (items * (items - 1))


def wkd_logits(s, t, cost, *, temperature, regularization, iterations):
  q, p = softmax(s / temperature), softmax(t / temperature)
  plan_costs = []
  for own, other, each in zip(q, p, cost, strict=True):
    m = np.exp(-each / regularization)
    u = np.full(len(own), 1 / len(own))
    for _ in range(iterations):
      v = other / (m.T @ u)
      u = own / (m @ v)
    plan_costs.append((np.outer(u, v) * m * each).sum())
  return np.array(plan_costs)


DKD = {"temperature": 3.0, "alpha": 0.7, "beta": 5.0}
NKD = {"temperature": 2.0, "gamma": 1.2}
RLD = {"temperature": 2.0, "top_temperature": 3.0, "alpha": 0.7, "beta": 1.5}
SINKHORN = {"regularization": 0.3, "iterations": 5}


def costly(rng, batch):
  student, teacher = logits(rng, batch)
  return student, teacher, rng.random(size=(batch, 7, 7))


standardized_dkd = losses.standardized(losses.dkd)

CASES = [
  Case(losses.dkd, dkd, labelled(7), DKD, kind="logits"),
  Case(losses.dkd, dkd, labelled(2), DKD, kind="logits", label="two-classes"),
  Case(standardized_dkd, standardized(dkd), labelled(7), DKD, kind="logits", label="standardized"),
  Case(losses.nkd, nkd, labelled(7), NKD, kind="logits", zero_at_equality=False),
  Case(losses.nkd, nkd, labelled(2), NKD, kind="logits", zero_at_equality=False, label="two-classes"),
  Case(losses.rld, rld, labelled(7, 6), RLD, kind="logits", zero_at_equality=False),
  Case(losses.ofa, ofa, labelled(7), {"epsilon": 1.4, "temperature": 2.0}, kind="logits", zero_at_equality=False),
  Case(losses.margin_mse, margin_mse, logits, kind="logits"),
  Case(
    losses.wkd_logits,
    wkd_logits,
    costly,
    {"temperature": 2.0},
    static=SINKHORN,
    kind="logits",
    zero_at_equality=False,
  ),
]
