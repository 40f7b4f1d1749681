"""NumPy references and cases of `losses/logits.py`."""

import numpy as np

from kdflax import losses
from tests.losses.case import Case, pairs_of


def log_softmax(z):
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(p, q):
  return (p * np.log(p / q)).sum(-1)


def softmax(z):
  return np.exp(log_softmax(z))


def kl_soft_targets(s, t, *, temperature=1.0):
  return temperature**2 * kl(softmax(t / temperature), softmax(s / temperature))


def hard_targets(s, t):
  return -np.take_along_axis(log_softmax(s), t.argmax(-1)[..., None], -1)[..., 0]


def of_labels(x, y):
  return np.take_along_axis(x, y[..., None], -1)[..., 0]


def without_labels(z, y):
  """The other classes' logits, `[batch, classes - 1]`."""
  return np.stack([np.delete(row, label) for row, label in zip(z, y, strict=True)])


def bernoulli_kl(s, t, *, temperature=1.0):
  both = lambda z: np.stack([1 / (1 + np.exp(-z / temperature)), 1 / (1 + np.exp(z / temperature))], -1)
  return kl(both(t), both(s)).sum(-1)


def wttm(s, t, *, gamma):
  powers = softmax(t) ** gamma
  total = powers.sum(-1)
  return total * kl(powers / total[..., None], softmax(s))


def dist(s, t, *, temperature=1.0, beta=1.0, gamma=1.0):
  q, p = softmax(s / temperature), softmax(t / temperature)
  within_example = np.array([1 - np.corrcoef(*pair)[0, 1] for pair in zip(q, p, strict=True)])
  # The share of example i in 1 - rho of a class: half the squared difference of its two standard scores.
  score = lambda x: (x - x.mean(0)) / x.std(0)
  within_class = (score(q) - score(p)) ** 2 / 2
  correlations = [np.corrcoef(*pair)[0, 1] for pair in zip(q.T, p.T, strict=True)]
  np.testing.assert_allclose(within_class.mean(0), 1 - np.array(correlations))
  return temperature**2 * (beta * within_example + gamma * within_class.mean(-1))


def class_correlation(s, t, *, temperature=1.0):
  q, p = softmax(s / temperature), softmax(t / temperature)
  difference = q.T @ q - p.T @ p
  values = len(q) / q.shape[1] * ((q + p) / (q + p).sum(0)) @ (difference**2).sum(1)
  np.testing.assert_allclose(values.mean(), np.sum(difference**2) / q.shape[1])
  return values


def batch_correlation(s, t, *, temperature=1.0):
  q, p = softmax(s / temperature), softmax(t / temperature)
  return ((q @ q.T - p @ p.T) ** 2).sum(1)


def standardize(z):
  return (z - z.mean(-1, keepdims=True)) / (z.std(-1, ddof=1, keepdims=True) + 1e-7)


def standardized(reference):
  return lambda s, t, *rest, **hyper: reference(standardize(s), standardize(t), *rest, **hyper)


logits = pairs_of(7)
many_classes = pairs_of(30)


def labelled(classes, labels=None):
  """Logits and a label of each example, one of the first `labels` classes."""
  return lambda rng, batch: (*pairs_of(classes)(rng, batch), rng.integers(labels or classes, size=batch))


SOFT = {"temperature": 3.0}
DIST = {"temperature": 2.0, "beta": 0.7, "gamma": 1.3}
standardized_kl, standardized_dist = losses.standardized(losses.kl_soft_targets), losses.standardized(losses.dist)

CASES = [
  Case(losses.kl_soft_targets, kl_soft_targets, logits, SOFT, kind="logits"),
  Case(losses.hard_targets, hard_targets, logits, kind="logits", zero_at_equality=False),
  Case(losses.bernoulli_kl, bernoulli_kl, logits, SOFT, kind="logits"),
  Case(losses.bernoulli_kl, bernoulli_kl, pairs_of(1), SOFT, kind="logits", label="one-logit"),
  Case(losses.wttm, wttm, logits, {"gamma": 0.4}, kind="logits", zero_at_equality=False),
  Case(losses.dist, dist, logits, DIST, kind="logits", compares=True),
  Case(losses.class_correlation, class_correlation, logits, SOFT, kind="logits", compares=True),
  Case(
    losses.class_correlation, class_correlation, many_classes, SOFT, kind="logits", compares=True, label="many-classes"
  ),
  Case(losses.batch_correlation, batch_correlation, logits, SOFT, kind="logits", compares=True),
  Case(standardized_kl, standardized(kl_soft_targets), logits, SOFT, kind="logits", label="standardized"),
  Case(standardized_dist, standardized(dist), logits, DIST, kind="logits", compares=True, label="standardized"),
]
