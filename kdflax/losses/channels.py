"""Losses that compare maps channel by channel: `[batch, ..., channels] -> [batch]`."""

import jax
import jax.numpy as jnp

from kdflax.losses.maps import check_channels, check_maps, in_a_row, map_pair
from kdflax.numerics.correlations import standard_score
from kdflax.numerics.examples import (
  AxisName,
  all_sum,
  as_features,
  check_same,
  example_sums,
  examples_of,
  flatten,
  hyper_parameters,
  mask,
)
from kdflax.numerics.log_probabilities import log_softmax, relative_entropy
from kdflax.numerics.safe import power_of_two


def channel_wise(
  student: jax.Array,
  teacher: jax.Array,
  *,
  temperature: float | jax.Array = 4.0,
  where: jax.Array | None = None,
) -> jax.Array:
  """Divergence between the distributions over positions that the channels are.

  Matches where each channel responds, whatever its mean: for dense prediction, on logits or features. Channels must
  agree; the larger map is adaptive-average-pooled to the smaller.

    T^2 mean_c KL(p_c || q_c),   p_c = softmax over positions of teacher_c / T, q_c of student_c / T

  Args:
    student: `[batch, ..., channels]`, for images `[batch, height, width, channels]`.
    teacher: `[batch, ..., channels]`, as many axes.
    temperature: T > 0, in units of the features, may be traced; broadcasts against `[batch]`.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the batch, the number of axes or the channels differ, an input is not floating, or `where` does not
      fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[0.0], [1.0]]]), jnp.array([[[1.0], [0.0]]])
    >>> print(f"{channel_wise(student, teacher, temperature=1.0)[0]:.4f}")
    0.4621

  Reference: Changyong Shu, Yifan Liu, Jianfei Gao, Zheng Yan and Chunhua Shen, "Channel-wise Knowledge Distillation for
  Dense Prediction", 2021, arXiv 2011.13256.
  """
  check_channels(student=student, teacher=teacher)
  student, teacher = (in_a_row(f).mT for f in map_pair(student, teacher, where))
  which = examples_of(where)
  (temperature,) = hyper_parameters(student.shape[:1], which, student.dtype, temperature=temperature)
  if which is not None and which is not where:  # an example without any position takes them all, and is masked below
    present = flatten(jnp.asarray(where)) | ~which[:, None]
    student, teacher = (jnp.where(present[:, None], f, -jnp.inf) for f in (student, teacher))
  log_p, log_q = (log_softmax(f, temperature[..., None]) for f in (teacher, student))
  return mask(temperature**2 * relative_entropy(log_p, log_q).mean(axis=1), which)


def channel_correlation(
  student: jax.Array,
  teacher: jax.Array,
  *,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Half the squared difference of the channels, standardised over the batch.

  Matches the pattern of each channel over all positions of all examples, up to shift and positive scale: one minus
  Pearson's correlation. Channels and positions must agree. A constant channel becomes 0 and gets no gradient.

    mean_nc (z(s)_nc - z(t)_nc)^2 / 2,   z(x) = (x - mean x) / std x by channel over the batch, of mean 1 - mean_c r_c

  Where examples have different numbers of positions that count, each is weighed by its own.

  Args:
    student: `[batch, ..., channels]`.
    teacher: `[batch, ..., channels]`, the same shape.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions; also in the statistics.
    axis_name: mapped axis over which the batch is spread, or None.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[0.0], [1.0]], [[2.0], [3.0]]])
    >>> print(channel_correlation(student, 5 - 2 * student).round(4))
    [2. 2.]

  Reference: Weihan Cao, Yifan Zhang, Jianfei Gao, Anda Cheng, Ke Cheng and Jian Cheng, "PKD: General Distillation
  Framework for Object Detectors via Pearson Correlation Coefficient", 2022, arXiv 2207.02039. The widely used
  implementation divides by a standard deviation with n - 1 in the denominator; this has n, so that the number is one
  minus the correlation.
  """
  check_maps(student=student, teacher=teacher)
  check_same("shape (or a connector between them)", student=jnp.shape(student), teacher=jnp.shape(teacher))
  student, teacher = as_features(where, student=student, teacher=teacher)
  between, channels = student.shape[:-1], student.shape[-1]
  counted = mask(jnp.ones(between, student.dtype), where)
  count = jnp.maximum(all_sum(counted.sum(), axis_name), 1)
  examples = all_sum(flatten(counted).any(axis=1).sum(), axis_name)
  # Down the rows by matrix products, as in `dist`.
  down = lambda x: all_sum(jnp.matmul(counted.reshape(-1), x, precision=jax.lax.Precision.HIGHEST), axis_name)
  spread = lambda x: jnp.tensordot(jnp.ones(counted.size, x.dtype), x, axes=0, precision=jax.lax.Precision.HIGHEST)

  def score(x: jax.Array) -> jax.Array:
    """Of norm 1 over the batch; from units of its own, so that no square leaves the range of the dtype."""
    x = x.reshape(-1, channels)
    x = x / spread(power_of_two(down(jnp.abs(x))))
    return standard_score(x, count, down, spread)[0]

  squared = jnp.square(score(student) - score(teacher)).reshape(student.shape)
  return examples / (2 * channels) * example_sums(squared, where)
