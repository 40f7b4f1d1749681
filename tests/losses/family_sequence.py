"""NumPy references and cases of `losses/sequence.py`."""

import numpy as np

from kdflax import losses
from tests.losses.case import Case, pairs_of
from tests.losses.family_divergences import jensen_shannon as between_logits
from tests.losses.family_logits import kl, log_softmax, softmax


def outcomes(s, log_p, indices, temperature, tail):
  q, p = np.take_along_axis(softmax(s / temperature), indices, -1), np.exp(log_p)
  if not tail:
    return q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
  with_rest = lambda x: np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1)
  return with_rest(q), with_rest(p)


def top_k_kl(s, log_p, indices, *, temperature=1.0, tail=True):
  q, p = outcomes(s, log_p, indices, temperature, tail)
  return kl(p, q)


def top_k_reverse_kl(s, log_p, indices, *, temperature=1.0, tail=True):
  q, p = outcomes(s, log_p, indices, temperature, tail)
  return kl(q, p)


def top_k_jensen_shannon(s, log_p, indices, *, beta=0.5, temperature=1.0, tail=True):
  q, p = outcomes(s, log_p, indices, temperature, tail)
  return between_logits(np.log(q), np.log(p), beta=beta)


def sampled_kl(s, indices, weights, *, temperature=1.0):
  return -(weights * np.take_along_axis(log_softmax(s / temperature), indices, -1)).sum(-1)


def unordered_logits(s, t, *, temperature=1.0):
  longest = max(s.shape[-1], t.shape[-1])
  descending = lambda z: np.sort(softmax(z / temperature))[:, ::-1]
  filled = lambda x: np.pad(x, [(0, 0), (0, longest - x.shape[-1])])
  return np.abs(filled(descending(s)) - filled(descending(t))).sum(-1)


def known_in_part(rng, batch):
  """Logits of 7 classes, and the 3 likeliest of a teacher that gives the last class no probability."""
  student, teacher = pairs_of(7, teacher=(6,))(rng, batch)
  indices = np.argsort(-teacher, axis=-1)[:, :3]
  return student, np.take_along_axis(log_softmax(teacher), indices, -1), indices


def drawn(rng, batch):
  """Classes that come again, with weights that sum to less than 1."""
  return rng.normal(size=(batch, 7)), rng.integers(6, size=(batch, 4)), rng.uniform(0.05, 0.2, size=(batch, 4))


SOFT = {"temperature": 2.0}
PART = {"kind": "logits", "teachers": (), "zero_at_equality": False}

CASES = [
  Case(losses.top_k_kl, top_k_kl, known_in_part, SOFT, **PART),
  Case(losses.top_k_kl, top_k_kl, known_in_part, SOFT, {"tail": False}, **PART, label="no-tail"),
  Case(losses.top_k_reverse_kl, top_k_reverse_kl, known_in_part, SOFT, **PART),
  Case(losses.top_k_reverse_kl, top_k_reverse_kl, known_in_part, SOFT, {"tail": False}, **PART, label="no-tail"),
  Case(losses.top_k_jensen_shannon, top_k_jensen_shannon, known_in_part, SOFT | {"beta": 0.3}, **PART),
  Case(losses.sampled_kl, sampled_kl, drawn, SOFT, **PART),
  Case(losses.unordered_logits, unordered_logits, pairs_of(7, teacher=(9,)), SOFT, kind="logits"),
]
