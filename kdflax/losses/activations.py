"""Losses on features before the ReLU, whose signs say what passes it: `[batch, ...] -> [batch]`, channels last."""

import math

import jax
import jax.numpy as jnp

from kdflax.losses.maps import like_teacher, same_shape
from kdflax.numerics.examples import as_examples, check_same, example_sums


def activation_boundary(
  student: jax.Array, teacher: jax.Array, *, margin: float | jax.Array = 1.0, where: jax.Array | None = None
) -> jax.Array:
  """Squared hinge that puts each student unit on the teacher's side of zero.

  Matches which units are active, not how much: features before the ReLU. 0 once every unit clears the margin on the
  right side, so not in general where the features are equal.

    sum_k relu(margin - s_k)^2 where t_k > 0,   relu(margin + s_k)^2 where t_k <= 0

  Args:
    student: `[batch, ...]`, pre-activations, through a connector where widths differ.
    teacher: `[batch, ...]`, the same shape; only its signs matter, so it gets no gradient.
    margin: how far beyond zero a unit must be, in units of the student's feature, may be traced; broadcasts to it.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, a sum over the units; 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
    >>> print(f"{activation_boundary(student, teacher, margin=1.5)[0]:.4f}")
    0.2500

  Reference: Byeongho Heo, Minsik Lee, Sangdoo Yun and Jin Young Choi, "Knowledge Transfer via Distillation of
  Activation Boundaries Formed by Hidden Neurons", 2019, arXiv 1811.03233. RepDistiller adds factors of 3 / 1000 and
  powers of two over the layers.
  """
  student, teacher = same_shape(where, student=student, teacher=teacher)
  margin = like_teacher(teacher, margin=margin)
  shortfall = jnp.maximum(margin - jnp.where(teacher > 0, student, jnp.where(teacher <= 0, -student, teacher)), 0)
  return example_sums(jnp.square(shortfall), where)


def ofd(
  student: jax.Array, teacher: jax.Array, *, margin: jax.Array | float, where: jax.Array | None = None
) -> jax.Array:
  """Partial squared distance to the teacher's feature through a margin ReLU.

  Matches what passes the teacher's ReLU. Where the teacher is negative the student need only be no larger than the
  teacher or the margin, whichever is higher, because the ReLU after it hides the rest.

    sum_k (s_k - r_k)^2 where t_k > 0 or s_k > r_k,   r = max(t, margin)

  Args:
    student: `[batch, ..., channels]`, before the ReLU, through a connector where widths differ.
    teacher: `[batch, ..., channels]`, before the ReLU, the same shape.
    margin: `[channels]`, negative, in units of the feature: `ofd_margin` of the teacher's batch normalisation. May be
      traced.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions.

  Returns:
    `[batch]` in float32 or wider, a sum over the units; 0 for masked examples.

  Raises:
    ValueError: if the shapes differ, an input is not floating, or `margin` or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
    >>> print(f"{ofd(student, -teacher, margin=-1.5)[0]:.4f}")
    15.2500

  Reference: Byeongho Heo, Jeesoo Kim, Sangdoo Yun, Hyojin Park, Nojun Kwak and Jin Young Choi, "A Comprehensive
  Overhaul of Feature Distillation", 2019, arXiv 1904.01866. Summed like the authors' code, which gives it the weight
  1e-3 and halves it for each earlier layer. There the teacher's batch normalisation runs on batch statistics; which
  statistics made the features is up to the model here.
  """
  student, teacher = same_shape(where, student=student, teacher=teacher)
  target = jnp.maximum(teacher, like_teacher(teacher, margin=margin))
  hidden = (teacher <= 0) & (student <= target)
  return example_sums(jnp.where(hidden, 0, jnp.square(student - target)), where)


def ofd_margin(bn_scale: jax.Array, bn_bias: jax.Array) -> jax.Array:
  """Expected negative activation of each channel, from the batch normalisation before the ReLU.

  The margin of `ofd`. Where a channel is practically never negative, 3 standard deviations stand in for it.

    E[x | x < 0] = b - s phi(b / s) / Phi(-b / s)  for x ~ N(b, s^2), s = |bn_scale|, b = bn_bias
    -3 s                                           where Phi(-b / s) <= 1e-3

  The ratio is taken in log space, so it stays exact far into the tail. A scale of 0 gives min(b, 0).

  Args:
    bn_scale: `[...]`, gamma of the teacher's last batch normalisation; its sign does not matter.
    bn_bias: `[...]`, beta, the same shape.

  Returns:
    `[...]` in float32 or wider, at most 0.

  Raises:
    ValueError: if the shapes differ or an input is not floating.

  Examples:
    >>> import jax.numpy as jnp
    >>> print(f"{ofd_margin(jnp.array([1.0]), jnp.array([0.0]))[0]:.4f}")
    -0.7979

  Reference: Byeongho Heo, Jeesoo Kim, Sangdoo Yun, Hyojin Park, Nojun Kwak and Jin Young Choi, "A Comprehensive
  Overhaul of Feature Distillation", 2019, arXiv 1904.01866. The authors' code divides by zero for a scale of 0.
  """
  check_same("shape", bn_scale=jnp.shape(bn_scale), bn_bias=jnp.shape(bn_bias))
  scale, bias = as_examples(None, lead=0, bn_scale=bn_scale, bn_bias=bn_bias)
  scale = jnp.abs(scale)
  positive = scale > 0
  # Beyond 40 standard deviations the densities are 0 or the second case applies; the clip keeps the quotient finite.
  z = jnp.clip(bias / jnp.where(positive, scale, 1), -40, 40)
  log_negative = jax.scipy.stats.norm.logcdf(-z)
  expected = bias - scale * jnp.exp(jax.scipy.stats.norm.logpdf(z) - log_negative)
  margin = jnp.where(log_negative > math.log(1e-3), expected, -3 * scale)
  return jnp.where(positive, margin, jnp.minimum(bias, 0))
