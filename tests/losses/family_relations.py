"""NumPy references and cases of `losses/relations.py`."""

import math

import numpy as np

from kdflax import losses
from tests.losses.case import Case, pairs_of


def flat(x):
  return x.reshape(len(x), -1)


def huber(x):
  return np.where(np.abs(x) <= 1, x**2 / 2, np.abs(x) - 0.5)


def similarity_preserving(s, t):
  def similarity(f):
    gram = flat(f) @ flat(f).T
    return gram / np.linalg.norm(gram, axis=1, keepdims=True)

  return ((similarity(s) - similarity(t)) ** 2).mean(1)


def pkt(s, t, *, epsilon=1e-7):
  def probabilities(f):
    rows = flat(f) / np.linalg.norm(flat(f), axis=1, keepdims=True)
    similarity = (rows @ rows.T + 1) / 2
    return similarity / similarity.sum(1, keepdims=True)

  p, q = probabilities(t), probabilities(s)
  return (p * np.log((p + epsilon) / (q + epsilon))).mean(1)


def correlation_congruence(s, t, *, kernel="gaussian", gamma=0.4, order=2):
  def correlations(f):
    products = flat(f) @ flat(f).T
    if kernel == "bilinear":
      return products
    terms = [(2 * gamma * products) ** r / math.factorial(r) for r in range(order + 1)]
    return np.exp(-2 * gamma) * sum(terms)

  return ((correlations(s) - correlations(t)) ** 2).mean(1)


def rkd_distance(s, t):
  def relative(f):
    distance = np.linalg.norm(flat(f)[:, None] - flat(f), axis=-1)
    return distance / (distance.sum() / (len(f) * (len(f) - 1)))

  return huber(relative(s) - relative(t)).mean(1)


def rkd_angle(s, t, *, chunk=None):  # the chunk changes memory, not the value
  def cosines(f):
    sides = flat(f) - flat(f)[:, None]  # [i, j]: from i to j
    norms = np.linalg.norm(sides, axis=-1, keepdims=True)
    sides = np.divide(sides, norms, where=norms > 0, out=np.zeros_like(sides))
    return np.einsum("ijd,ikd->ijk", sides, sides)

  return huber(cosines(s) - cosines(t)).mean((1, 2))


def direction(s, t, *, ridge=0.1):
  def cosines(f):
    rows = flat(f) / np.linalg.norm(flat(f), axis=1, keepdims=True)
    return rows @ rows.T

  difference = cosines(s) - cosines(t)
  inverse = np.linalg.inv(np.cov(difference.T) + ridge * np.eye(len(difference)))
  return np.sqrt(np.einsum("ij,jk,ik->i", difference, inverse, difference))


embeddings = pairs_of(5, teacher=(2, 3))


def unit_rows(rng, batch):
  """The series of the Gaussian kernel is meant for rows of unit norm."""
  norm = lambda x: np.sqrt((x**2).sum(axis=tuple(range(1, x.ndim)), keepdims=True))
  return tuple(x / norm(x) for x in embeddings(rng, batch))


CASES = [
  Case(losses.similarity_preserving, similarity_preserving, embeddings, compares=True),
  Case(losses.pkt, pkt, embeddings, {"epsilon": 1e-7}, compares=True),
  Case(
    losses.correlation_congruence,
    correlation_congruence,
    unit_rows,
    {"gamma": 0.3},
    compares=True,
    scales=(1e-8, 1e4),
  ),
  Case(
    losses.correlation_congruence,
    correlation_congruence,
    unit_rows,
    {"gamma": 0.3},
    compares=True,
    static={"order": 3},
    scales=(1e-8, 1e2),
    label="order-3",
  ),
  Case(
    losses.correlation_congruence,
    correlation_congruence,
    unit_rows,
    compares=True,
    static={"kernel": "bilinear"},
    scales=(1e-8, 1e9),
    label="bilinear",
  ),
  Case(losses.rkd_distance, rkd_distance, embeddings, compares=True),
  Case(losses.rkd_angle, rkd_angle, embeddings, compares=True, static={"chunk": 3}),
  # Zero, but with a kink.
  Case(losses.direction, direction, embeddings, {"ridge": 0.2}, compares=True, zero_at_equality=False),
]
