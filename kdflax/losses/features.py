"""Losses on feature maps and embeddings, entry by entry: `[batch, ...] -> [batch]`, channels last."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdflax.losses.maps import check_maps, like_teacher, same_shape
from kdflax.numerics.examples import (
  check_range,
  example_means,
  example_sums,
  examples_of,
  hyper_parameters,
  mask,
)
from kdflax.numerics.pooling import masked_average_pool
from kdflax.numerics.safe import huber, l2_normalize, safe_divide


def hint(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
  """Mean squared difference of two features of one shape.

  Matches activations one by one, so widths must agree: put a learnable connector before it where they do not. 0 only
  where the features are equal.

    mean_k (s_k - t_k)^2 over all entries of an example

  Args:
    student: `[batch, ...]`.
    teacher: `[batch, ...]`, the same shape.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
    >>> print(f"{hint(student, teacher)[0]:.4f}")
    1.0000

  Reference: Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta and Yoshua Bengio,
  "FitNets: Hints for Thin Deep Nets", 2015, arXiv 1412.6550. The paper has half the squared norm of the difference;
  like the widely used implementations this is the mean over the entries.
  """
  student, teacher = same_shape(where, student=student, teacher=teacher)
  return example_means(jnp.square(student - teacher), where)


def cosine(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
  """One minus the cosine between two features.

  Matches directions along the last axis and leaves the lengths free. A zero vector has cosine 0 with everything, so its
  value is 1, and gets no gradient.

    mean_n (1 - <s_n, t_n> / (||s_n|| ||t_n||)),   n over the axes between the batch and the last

  Args:
    student: `[batch, ..., width]`.
    teacher: `[batch, ..., width]`, the same shape.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, from 0 to 2; 0 for masked examples.

  Raises:
    ValueError: if the shapes differ or have one axis, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
    >>> print(f"{cosine(student, teacher)[0]:.4f}")
    0.2000

  Reference: Guo-Hua Wang, Yifan Ge and Jianxin Wu, "In Defense of Feature Mimicking for Knowledge Distillation", 2020,
  arXiv 2011.01424, which argues for matching directions rather than lengths, by other means; the cosine is the form in
  common use. Taken from the distance of the normalised vectors, so nearly parallel features keep their digits.
  """
  student, teacher = _directions(where, student=student, teacher=teacher)
  both_have_a_direction = student.any(axis=-1) & teacher.any(axis=-1)
  distance = jnp.where(both_have_a_direction, jnp.square(student - teacher).sum(axis=-1) / 2, 1)
  return example_means(distance, where)


def smooth_l1(
  student: jax.Array, teacher: jax.Array, *, beta: float | jax.Array = 1.0, where: jax.Array | None = None
) -> jax.Array:
  """Mean absolute difference of two features of one shape, squared where it is small.

  Matches activations one by one, as `hint` does, but a large error weighs only by its size: outliers of the teacher do
  not rule the gradient. Close to `hint / (2 beta)` where all errors are small.

    mean_k l(s_k - t_k),   l(d) = d^2 / (2 beta) where |d| < beta,   |d| - beta / 2 elsewhere

  Args:
    student: `[batch, ...]`.
    teacher: `[batch, ...]`, the same shape.
    beta: where the square ends, above 0, in units of the features, may be traced.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, `where` does not fit, or `beta` is not a number above 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> print(smooth_l1(jnp.array([[0.5, 3.0]]), jnp.zeros((1, 2))))
    [1.3125]

  Reference: Ross Girshick, "Fast R-CNN", 2015, arXiv 1504.08083. Theia, UNIC and DUNE add it to `cosine`; the Huber
  loss is beta times this.
  """
  check_range("beta", beta, "above 0", lambda value: value > 0)
  student, teacher = same_shape(where, student=student, teacher=teacher)
  (beta,) = hyper_parameters((), None, student.dtype, beta=beta)
  return example_means(huber(student - teacher, beta) / beta, where)


def log_distance(
  student: jax.Array, teacher: jax.Array, *, power: float | jax.Array, where: jax.Array | None = None
) -> jax.Array:
  """Logarithm of the summed power of the difference.

  Matches activations one by one; the logarithm makes the gradient grow as the features meet, so that an example that is
  nearly matched counts as much as one that is far. Not bounded below: where the features are equal it is the logarithm
  of the smallest number of the dtype, without gradient.

    log sum_k |s_k - t_k|^power

  Args:
    student: `[batch, ...]`, through a connector where widths differ.
    teacher: `[batch, ...]`, the same shape.
    power: at least 1, may be traced.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, `where` does not fit, or `power` is not a number of at
      least 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> print(f"{log_distance(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)), power=2.0)[0]:.4f}")
    1.6094

  Reference: Roy Miles and Krystian Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation",
  2024, arXiv 2303.11098. torchdistill takes the logarithm of the sum over the whole batch.
  """
  check_range("power", power, "at least 1", lambda value: value >= 1)
  student, teacher = same_shape(where, student=student, teacher=teacher)
  (power,) = hyper_parameters((), None, student.dtype, power=power)
  distance = jnp.abs(student - teacher)
  # In units of the largest, whose power is in range whatever the features are; its own derivative cancels.
  largest = jax.lax.stop_gradient(distance.max(axis=tuple(range(1, distance.ndim)), keepdims=True))
  apart = ~(largest.reshape(-1) <= 0)
  total = example_sums(safe_divide(distance, largest) ** power, None)
  values = power * jnp.log(jnp.where(apart, largest.reshape(-1), 1)) + jnp.log(jnp.where(apart, total, 1))
  same = math.log(jnp.finfo(student.dtype).tiny)
  return mask(jnp.where(apart, values, same), examples_of(where))


def log_sigmoid_cosine(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
  """Logistic loss of the cosine between two features.

  Matches directions along the last axis, as `cosine` does, with a gradient that is larger where they are opposed. From
  0.313 for parallel vectors to 1.313 for opposed ones. A zero vector has cosine 0 with everything and gets no gradient.

    mean_n -log sigmoid(<s_n, t_n> / (||s_n|| ||t_n||)),   n over the axes between the batch and the last

  Args:
    student: `[batch, ..., width]`.
    teacher: `[batch, ..., width]`, the same shape.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ or have one axis, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> print(f"{log_sigmoid_cosine(jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]]))[0]:.4f}")
    0.3133

  Reference: Heng-Jui Chang, Shu-wen Yang and Hung-yi Lee, "DistilHuBERT: Speech Representation Learning by Layer-wise
  Distillation of Hidden-unit BERT", 2022, arXiv 2110.01900, which adds it to the mean absolute difference.
  """
  student, teacher = _directions(where, student=student, teacher=teacher)
  return example_means(-jax.nn.log_sigmoid((student * teacher).sum(axis=-1)), where)


def hierarchical_context(
  student: jax.Array, teacher: jax.Array, *, levels: Sequence[int] = (4, 2, 1), where: jax.Array | None = None
) -> jax.Array:
  """Mean squared difference at full size and on a pyramid of average pools.

  Matches activations at every scale, the finer ones with more weight. Height alone decides which levels are used; a
  level pools height and width to that many positions, so a width below the level repeats its columns.

    (sum_l w_l mean (pool_l(s) - pool_l(t))^2) / sum_l w_l,   w = 1 at full size, then 1/2, 1/4, ... for each level used

  Args:
    student: `[batch, height, width, channels]`; one or three spatial axes work too, the first counts as the height.
    teacher: the same shape.
    levels: sizes of the pools, from fine to coarse, static; one that is not below the height is skipped.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ or have no spatial axis, an input is not floating, `where` does not fit, or
      `levels` are not positive whole numbers.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [2.0, 1.0]]]), jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    >>> print(f"{hierarchical_context(student, teacher)[0]:.4f}")
    0.7083

  Reference: Pengguang Chen, Shu Liu, Hengshuang Zhao and Jiaya Jia, "Distilling Knowledge via Knowledge Review", 2021,
  arXiv 2104.09044, the hierarchical context loss. The review of several layers, with its fusion of student stages, is
  the model's part.
  """
  check_maps(student=student, teacher=teacher)
  student, teacher = same_shape(where, student=student, teacher=teacher)
  difference = student - teacher  # pooling is linear, so one pool of the difference does for both
  total, weights, weight = example_means(jnp.square(difference), where), 1.0, 1.0
  if not isinstance(levels, Sequence) or not all(isinstance(level, int) and level > 0 for level in levels):
    raise ValueError(f"levels must be positive whole numbers such as (4, 2, 1); got {levels!r}")
  for level in levels:
    if level < difference.shape[1]:
      pooled, counted = masked_average_pool(difference, (level,) * (difference.ndim - 2), where)
      weight /= 2
      total, weights = total + weight * example_means(jnp.square(pooled), counted), weights + weight
  return total / weights


def vid(
  predicted_mean: jax.Array, teacher: jax.Array, *, variance: jax.Array | float, where: jax.Array | None = None
) -> jax.Array:
  """Negative log-likelihood of the teacher's feature under a Gaussian that the student predicts.

  Bounds the information that the student's feature shares with the teacher's. Learn `variance` with the student: at its
  best value it is the mean squared error, so channels that cannot be predicted lose weight. The value is not bounded
  below and not 0 at equality.

    mean_k ((mu_k - t_k)^2 / variance_k + log variance_k) / 2,   without the constant log(2 pi) / 2

  Args:
    predicted_mean: `[batch, ...]`, mu: the student's feature through a learnable connector.
    teacher: `[batch, ...]`, the same shape.
    variance: positive, in squared units of the teacher's feature, may be traced and learned: anything that broadcasts
      to the teacher's shape, such as `[channels]`. Make it by `softplus` plus a small floor, not by `log(1 + exp)`,
      which overflows.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `variance` or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
    >>> print(f"{vid(student, teacher, variance=2.0)[0]:.4f}")
    0.5966

  Reference: Sungsoo Ahn, Shell Xu Hu, Andreas Damianou, Neil D. Lawrence and Zhenwen Dai, "Variational Information
  Distillation for Knowledge Transfer", 2019, arXiv 1904.05835. mdistiller never trains its variance, because the
  optimizer does not see it.
  """
  predicted_mean, teacher = same_shape(where, predicted_mean=predicted_mean, teacher=teacher)
  spread = like_teacher(teacher, variance=variance)
  if where is not None and spread.ndim == teacher.ndim:  # one for each example: 1 where masked, whose logarithm is 0
    spread = jnp.where(jnp.expand_dims(where, tuple(range(jnp.ndim(where), teacher.ndim))), spread, 1)
  likelihood = jnp.square(predicted_mean - teacher) / spread + jnp.log(spread)
  return example_means(likelihood, where) / 2


def _directions(where: jax.Array | None, **features: jax.Array) -> list[jax.Array]:
  """Features of one shape over their lengths along the last axis."""
  checked = same_shape(where, **features)
  if checked[0].ndim < 2:
    raise ValueError(f"{' and '.join(features)} must be [batch, ..., width]; got shape {checked[0].shape}")
  return [l2_normalize(x) for x in checked]
