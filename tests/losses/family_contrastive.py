"""NumPy references and cases of `losses/contrastive.py`."""

import numpy as np

from kdflax import losses
from tests.losses.case import Case, pairs_of


def info_nce(s, t, *, temperature=0.07):
  unit = lambda f: f / np.linalg.norm(f, axis=1, keepdims=True)
  scores = np.exp(unit(s) @ unit(t).T / temperature)
  return -np.log(np.diag(scores) / scores.sum(1))


CASES = [
  Case(losses.info_nce, info_nce, pairs_of(5), {"temperature": 0.2}, compares=True, zero_at_equality=False),
]
