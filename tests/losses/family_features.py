"""NumPy references and cases of `losses/features.py`, `attention_maps.py` and `gram_features.py`."""

import numpy as np

from kdflax import losses
from tests.losses.case import Case, pairs_of


def pool(x, sizes):
  """Adaptive average pooling of the axes 1, 2, ... by its windows."""
  for axis, m in enumerate(sizes, start=1):
    n = x.shape[axis]
    windows = [np.take(x, range(i * n // m, -(-(i + 1) * n // m)), axis).mean(axis) for i in range(m)]
    x = np.stack(windows, axis)
  return x


def to_common_size(s, t):
  sizes = [min(pair) for pair in zip(s.shape[1:-1], t.shape[1:-1], strict=True)]
  return pool(s, sizes), pool(t, sizes)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def hint(s, t):
  return ((s - t) ** 2).reshape(len(s), -1).mean(-1)


def smooth_l1(s, t, *, beta=1.0):
  distance = np.abs(s - t)
  return np.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2).reshape(len(s), -1).mean(-1)


def log_distance(s, t, *, power):
  return np.log((np.abs(s - t) ** power).reshape(len(s), -1).sum(-1))


def log_sigmoid_cosine(s, t):
  return np.log1p(np.exp(-(unit(s) * unit(t)).sum(-1))).reshape(len(s), -1).mean(-1)


def attention_transfer(s, t, *, power=2):
  attention = lambda f: unit((np.abs(f) ** power).mean(-1).reshape(len(f), -1))
  s, t = to_common_size(s, t)
  return ((attention(s) - attention(t)) ** 2).mean(-1)


def cosine(s, t):
  return (1 - (unit(s) * unit(t)).sum(-1)).reshape(len(s), -1).mean(-1)


def factor_transfer(s, t, *, input_power=2, output_power=1):
  factor = lambda f: unit((f**input_power).mean(-1).reshape(len(f), -1))
  s, t = to_common_size(s, t)
  return (np.abs(factor(s) - factor(t)) ** output_power).mean(-1)


def class_attention_transfer(s, t, *, size=2, normalize=True):
  def attention(maps):
    maps = pool(maps, (size, size))
    return maps / np.linalg.norm(maps, axis=(1, 2), keepdims=True) if normalize else maps

  return hint(attention(s), attention(t))


def hierarchical_context(s, t, *, levels=(4, 2, 1)):
  total, weights, weight = hint(s, t), 1.0, 1.0
  for level in levels:
    if level >= s.shape[1]:
      continue
    weight /= 2
    total, weights = total + weight * hint(pool(s, (level, level)), pool(t, (level, level))), weights + weight
  return total / weights


def vid(mean, t, *, variance):
  variance = np.broadcast_to(variance, t.shape)
  return (((mean - t) ** 2 / variance + np.log(variance)) / 2).reshape(len(t), -1).mean(-1)


def activation_boundary(s, t, *, margin=1.0):
  inactive = (s + margin) ** 2 * ((s > -margin) & (t <= 0))
  active = (s - margin) ** 2 * ((s <= margin) & (t > 0))
  return (inactive + active).reshape(len(s), -1).sum(-1)


def ofd(s, t, *, margin):
  hidden = (s - margin) ** 2 * ((s > margin) & (t <= margin))
  negative = (s - t) ** 2 * ((s > t) & (t > margin) & (t <= 0))
  positive = (s - t) ** 2 * (t > 0)
  return (hidden + negative + positive).reshape(len(s), -1).sum(-1)


def positions(f):
  return f.reshape(len(f), -1, f.shape[-1])


def fsp(s_first, s_last, t_first, t_last):
  def flow(first, last):
    first, last = (positions(f) for f in to_common_size(first, last))
    return np.einsum("bnc,bnd->bcd", first, last) / first.shape[1]

  return ((flow(s_first, s_last) - flow(t_first, t_last)) ** 2).mean((1, 2))


def nst(s, t):
  s, t = (unit(positions(f).swapaxes(1, 2)) for f in to_common_size(s, t))
  kernel = lambda a, b: ((a[:, :, None] * b[:, None]).sum(-1) ** 2).mean((1, 2))
  return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def inter_channel_correlation(s, t):
  correlation = lambda f: unit(np.einsum("bnc,bnd->bcd", positions(f), positions(f)))
  return ((correlation(s) - correlation(t)) ** 2).sum((1, 2)) / s.shape[-1]


def kdsvd(s_first, s_last, t_first, t_last, *, k=1):
  def layer(s, t):
    """Singular vectors [channels, k] of one example."""
    _, _, candidates = np.linalg.svd(s)
    _, values, vectors = np.linalg.svd(t)
    paired = []
    for vector in vectors[:k]:
      cosines = candidates[: min(k + 3, *s.shape)] @ vector
      best = np.abs(cosines).argmax()
      paired.append(np.sign(cosines[best]) * candidates[best])
    weights = values[:k] / np.linalg.norm(values[:k])
    return weights * np.stack(paired, -1), weights * vectors[:k].T

  def example(s_first, s_last, t_first, t_last):
    first, last = layer(s_first, t_first), layer(s_last, t_last)
    s, t = (np.exp(-((b[:, None] - a) ** 2) / 8) for a, b in zip(first, last, strict=True))
    return ((s - t) ** 2).sum()

  maps = [positions(f) for f in (s_first, s_last, t_first, t_last)]
  return np.array([example(*each) for each in zip(*maps, strict=True)])


def layers_of(*shapes):
  """Inputs of the given trailing shapes: two layers of the student, then two of the teacher."""
  return lambda rng, batch: tuple(rng.normal(size=(batch, *shape)) for shape in shapes)


def signed_pairs_of(*shape):
  """Pairs with a teacher away from 0, where its sign decides and the loss jumps."""

  def inputs(rng, batch):
    student, teacher = pairs_of(*shape)(rng, batch)
    return student, teacher + 0.1 * np.sign(teacher)

  return inputs


FLOWS = layers_of((4, 3, 3), (2, 3, 4), (5, 2, 3), (2, 2, 4))


def subspaces(rng, batch, *shapes):
  """Layers whose last channels come in pairs of opposite sign.

  The sign of a singular vector is the decomposition's choice, and another one in another precision: with such channels
  it changes no sum over them.
  """
  opposite = lambda features: np.concatenate([features, -features], -1)
  shapes = shapes or ((2, 3, 4), (1, 3, 3), (3, 3, 4), (3, 1, 3))
  s_first, s_last, t_first, t_last = layers_of(*shapes)(rng, batch)
  return s_first, opposite(s_last), t_first, opposite(t_last)


FOURTH_DEGREE = (1e-8, 1e9)  # of the features: beyond it the value itself leaves float32
layer_pair = {"students": (0, 1), "teachers": (2, 3)}
variances = np.array([0.3, 1.0, 4.0])

CASES = [
  Case(losses.hint, hint, pairs_of(3, 2)),
  Case(losses.cosine, cosine, pairs_of(5)),
  Case(losses.cosine, cosine, pairs_of(3, 4), label="tokens"),
  Case(losses.smooth_l1, smooth_l1, pairs_of(3, 2), {"beta": 0.7}),
  Case(losses.log_distance, log_distance, pairs_of(3, 2), {"power": 3.0}, zero_at_equality=False),
  Case(losses.log_sigmoid_cosine, log_sigmoid_cosine, pairs_of(3, 4), zero_at_equality=False),
  Case(losses.attention_transfer, attention_transfer, pairs_of(4, 3, 5)),
  Case(losses.attention_transfer, attention_transfer, pairs_of(7, 2, 3, teacher=(3, 5, 4)), label="resized"),
  Case(losses.attention_transfer, attention_transfer, pairs_of(4, 3, 5), static={"power": 3}, label="cubed"),
  Case(losses.factor_transfer, factor_transfer, pairs_of(4, 3, 5), zero_at_equality=False),  # zero, but with a kink
  Case(
    losses.factor_transfer,
    factor_transfer,
    pairs_of(7, 2, 3, teacher=(3, 5, 4)),
    static={"input_power": 1, "output_power": 2},
    label="resized",
  ),
  Case(losses.class_attention_transfer, class_attention_transfer, pairs_of(4, 3, 5, teacher=(3, 2, 5))),
  Case(
    losses.class_attention_transfer,
    class_attention_transfer,
    pairs_of(5, 3, 4),
    static={"size": 3, "normalize": False},
    label="unnormalized",
  ),
  Case(losses.hierarchical_context, hierarchical_context, pairs_of(5, 3, 2)),
  Case(losses.hierarchical_context, hierarchical_context, pairs_of(4, 4, 2), static={"levels": (3, 2)}, label="levels"),
  Case(losses.vid, vid, pairs_of(2, 2, 3), {"variance": variances}, zero_at_equality=False),
  Case(losses.vid, vid, pairs_of(3), {"variance": 0.7}, zero_at_equality=False, label="scalar"),
  Case(losses.activation_boundary, activation_boundary, signed_pairs_of(2, 3), {"margin": 0.5}, zero_at_equality=False),
  Case(losses.ofd, ofd, signed_pairs_of(2, 2, 3), {"margin": -variances}),
  Case(losses.fsp, fsp, FLOWS, **layer_pair, scales=FOURTH_DEGREE),
  Case(losses.nst, nst, pairs_of(4, 3, 5, teacher=(4, 3, 8)), label="positions"),
  Case(losses.nst, nst, pairs_of(4, 4, 3, teacher=(5, 4, 2)), label="channels"),
  Case(losses.inter_channel_correlation, inter_channel_correlation, pairs_of(4, 3, 5, teacher=(2, 3, 5))),
  Case(losses.kdsvd, kdsvd, subspaces, **layer_pair),
  Case(losses.kdsvd, kdsvd, subspaces, static={"k": 2}, **layer_pair, label="two"),
]
