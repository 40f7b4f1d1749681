"""NumPy references and cases of `losses/similarity.py`, `channels.py` and of the features in `transport.py`."""

import numpy as np

from kdflax import losses
from tests.losses.case import Case, pairs_of
from tests.losses.family_features import FOURTH_DEGREE, pool, positions, to_common_size, unit
from tests.losses.family_logits import kl, log_softmax, softmax
from tests.losses.family_relations import flat


def similarity_distribution(
  s,
  t,
  student_keys=None,
  teacher_keys=None,
  *,
  student_temperature=0.07,
  teacher_temperature=0.07,
  exclude_self=False,
):
  s, t = flat(s), flat(t)
  student_keys, teacher_keys = s if student_keys is None else student_keys, t if teacher_keys is None else teacher_keys
  values = []
  for i, (own, target) in enumerate(zip(s, t, strict=True)):
    others = np.arange(len(student_keys)) != (i if exclude_self else -1)
    p = softmax((teacher_keys @ target / teacher_temperature)[others])
    values.append(-(p * log_softmax((student_keys @ own / student_temperature)[others])).sum())
  return np.array(values)


def token_similarity(s, t, *, kind="square", temperature=1.0, clip_negative=False):
  s, t = (positions(f) for f in to_common_size(s, t))
  s, t = s @ s.swapaxes(1, 2), t @ t.swapaxes(1, 2)
  if kind == "kl":
    return kl(softmax(t / temperature), softmax(s / temperature)).mean(-1)
  if clip_negative:
    s, t = np.maximum(s, 0), np.maximum(t, 0)
  return ((s - t) ** 2).mean((1, 2))


def prototype_similarity(s, t, labels, num_classes):
  s, t = to_common_size(s, t)

  def closeness(f):
    rows, classes = positions(f), labels.reshape(len(f), -1)
    found = np.zeros(rows.shape[:2])
    for i, n in np.ndindex(*found.shape):
      if 0 <= classes[i, n] < num_classes:
        found[i, n] = unit(rows[i, n]) @ unit(rows[i][classes[i] == classes[i, n]].mean(0))
    return found

  return ((closeness(s) - closeness(t)) ** 2).mean(-1)


def channel_wise(s, t, *, temperature=4.0):
  s, t = (positions(f).swapaxes(1, 2) / temperature for f in to_common_size(s, t))
  return temperature**2 * kl(softmax(t), softmax(s)).mean(-1)


def channel_correlation(s, t):
  def score(f):
    rows = f.reshape(-1, f.shape[-1])
    return ((rows - rows.mean(0)) / rows.std(0)).reshape(len(f), -1)

  values = ((score(s) - score(t)) ** 2).mean(-1) / 2
  columns = zip(s.reshape(-1, s.shape[-1]).T, t.reshape(-1, t.shape[-1]).T, strict=True)
  np.testing.assert_allclose(values.mean(), np.mean([1 - np.corrcoef(*pair)[0, 1] for pair in columns]))
  return values


def wkd_features(s, t, *, mean_weight=1.0, grid=1, epsilon=1e-5):
  def statistics(f):
    sizes = (grid,) * (f.ndim - 2)
    mean = pool(f, sizes)
    count = 1
    for n in f.shape[1:-1]:
      count = np.multiply.outer(count, [-(-(i + 1) * n // grid) - i * n // grid for i in range(grid)])
    variance = (pool(f**2, sizes) - mean**2) * (count / np.maximum(count - 1, 1))[..., None]
    return mean, np.sqrt(variance + epsilon)

  (s_mean, s_std), (t_mean, t_std) = statistics(s), statistics(t)
  cells = (mean_weight * (s_mean - t_mean) ** 2 + (s_std - t_std) ** 2).sum(-1)
  return cells.reshape(len(s), -1).mean(-1)


def with_classes(shape, teacher, classes):
  """Maps, and a class for every position of the smaller; one of them out of range."""

  def inputs(rng, batch):
    sizes = [min(pair) for pair in zip(shape[:-1], teacher[:-1], strict=True)]
    return (*pairs_of(*shape, teacher=teacher)(rng, batch), rng.integers(classes + 1, size=(batch, *sizes)))

  return inputs


TEMPERATURES = {"student_temperature": 1.5, "teacher_temperature": 0.7}
# Of features much smaller than the temperature the softmax is nearly constant, and float32 cannot hold the rest.
OF_A_SOFTMAX = (0.1, 1e15)
OF_UNIT_ROWS = (0.1, 1.0)

CASES = [
  Case(
    losses.similarity_distribution,
    similarity_distribution,
    pairs_of(4, teacher=(2, 3)),
    TEMPERATURES,
    compares=True,
    zero_at_equality=False,
    scales=OF_UNIT_ROWS,
  ),
  Case(
    losses.similarity_distribution,
    similarity_distribution,
    pairs_of(4, teacher=(6,)),
    TEMPERATURES,
    static={"exclude_self": True},
    compares=True,
    zero_at_equality=False,
    scales=OF_UNIT_ROWS,
    label="without-self",
  ),
  Case(losses.token_similarity, token_similarity, pairs_of(4, 3, teacher=(4, 5)), scales=FOURTH_DEGREE),
  Case(
    losses.token_similarity,
    token_similarity,
    pairs_of(3, 2, 3, teacher=(2, 3, 3)),
    static={"clip_negative": True},
    scales=FOURTH_DEGREE,
    label="clipped",
  ),
  Case(
    losses.token_similarity,
    token_similarity,
    pairs_of(4, 3, teacher=(4, 5)),
    {"temperature": 2.0},
    static={"kind": "kl"},
    zero_at_equality=False,
    scales=OF_A_SOFTMAX,
    label="kl",
  ),
  Case(
    losses.prototype_similarity,
    prototype_similarity,
    with_classes((3, 3, 4), (4, 3, 5), 2),
    static={"num_classes": 2},
  ),
  Case(
    losses.channel_wise,
    channel_wise,
    pairs_of(3, 4, 5, teacher=(3, 5, 5)),
    {"temperature": 2.0},
    scales=OF_A_SOFTMAX,
  ),
  Case(losses.channel_correlation, channel_correlation, pairs_of(3, 2, 4), compares=True),
  Case(losses.wkd_features, wkd_features, pairs_of(3, 4, teacher=(5, 4)), {"mean_weight": 2.0, "epsilon": 1e-3}),
  Case(losses.wkd_features, wkd_features, pairs_of(5, 4, 3), {"mean_weight": 1.5}, static={"grid": 2}, label="grid"),
]
