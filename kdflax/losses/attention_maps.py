"""Losses on maps of where something is in the image: `[batch, ..., channels] -> [batch]`."""

import numbers

import jax
import jax.numpy as jnp

from kdflax.losses.maps import check_maps, map_pair
from kdflax.numerics.examples import as_features, check_same, example_means
from kdflax.numerics.pooling import masked_average_pool
from kdflax.numerics.safe import in_own_units, l2_normalize


def attention_transfer(
  student: jax.Array, teacher: jax.Array, *, power: float = 2, where: jax.Array | None = None
) -> jax.Array:
  """Squared difference of the normalised spatial attention maps.

  Matches where the activations are strong, whatever their channels: widths may differ, and the larger map is
  adaptive-average-pooled to the smaller. A map that is zero everywhere stays zero and gets no gradient.

    mean_n (a_s - a_t)_n^2,   a = m / ||m||_2,   m_n = mean_c |f_nc|^power

  Args:
    student: `[batch, ..., channels]`, for images `[batch, height, width, channels]`.
    teacher: `[batch, ..., channels]`, as many axes.
    power: exponent of the activations, at least 1, static.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the batch or the number of axes differ, an input is not floating, `where` does not fit, or `power` is
      below 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [2.0, 1.0]]]), jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    >>> print(f"{attention_transfer(student, teacher)[0]:.4f}")
    0.0352

  Reference: Sergey Zagoruyko and Nikos Komodakis, "Paying More Attention to Attention", 2017, arXiv 1612.03928. The
  paper sums the norm of the difference; this is the mean over positions of its square, as its authors' code computes.
  """
  _check_power("power", power)
  student, teacher = map_pair(student, teacher, where)
  return example_means(jnp.square(_attention(student, power) - _attention(teacher, power)), where)


def factor_transfer(
  student: jax.Array,
  teacher: jax.Array,
  *,
  input_power: int = 2,
  output_power: float = 1,
  where: jax.Array | None = None,
) -> jax.Array:
  """Difference of the normalised factors, in the absolute value or another power.

  Matches the pattern over positions of the channel mean of a power: a factor, as a paraphraser of the teacher and a
  translator of the student give it. Widths may differ, and the larger map is adaptive-average-pooled to the smaller. A
  map of mean zero everywhere stays zero and gets no gradient. With `output_power=1` there is a kink where the factors
  are equal.

    mean_n |a_s - a_t|_n^output_power,   a = m / ||m||_2,   m_n = mean_c f_nc^input_power, signed

  Args:
    student: `[batch, ..., channels]`, for images `[batch, height, width, channels]`.
    teacher: `[batch, ..., channels]`, as many axes.
    input_power: exponent of the activations, an integer so that a negative one has a power; static.
    output_power: exponent of the difference, at least 1; static.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the batch or the number of axes differ, an input is not floating, `where` does not fit,
      `input_power` is not a positive integer or `output_power` is below 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [2.0, 1.0]]]), jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    >>> print(f"{factor_transfer(student, teacher)[0]:.4f}")
    0.1686

  Reference: Jangho Kim, SeongUk Park and Nojun Kwak, "Paraphrasing Complex Network: Network Compression via Factor
  Transfer", 2018, arXiv 1802.04977. The paper normalises the whole factor: for that, give factors as `[batch,
  positions, 1]` with `input_power=1`. Its p-norm is a mean of p-th powers here, as in the widely used implementations.
  """
  _check_power("input_power", input_power)
  _check_power("output_power", output_power)
  if int(input_power) != input_power:
    raise ValueError(f"input_power must be an integer; got {input_power}")
  student, teacher = map_pair(student, teacher, where)
  factor = lambda features: _unit_map((_ready_for(input_power, features) ** int(input_power)).mean(axis=-1))
  return example_means(jnp.abs(factor(student) - factor(teacher)) ** output_power, where)


def class_attention_transfer(
  student: jax.Array,
  teacher: jax.Array,
  *,
  size: int = 2,
  normalize: bool = True,
  where: jax.Array | None = None,
) -> jax.Array:
  """Squared difference of the coarse, normalised class activation maps.

  Matches where in the image each class is seen. The maps of a classifier with a linear head on pooled features are
  `features @ head`, one channel for each class, and their mean over positions gives the logits without the bias; so no
  connector is needed, and only the classes must agree. A map that pools to zero stays zero and gets no gradient.

    mean_kn (a_s - a_t)_kn^2,   a_k = m_k / ||m_k||_2,   m = the maps pooled to size x size positions

  Args:
    student: `[batch, height, width, classes]`, class activation maps.
    teacher: `[batch, height, width, classes]`; height and width may differ from the student's.
    size: positions per spatial axis after adaptive average pooling, static. Axes shorter than that repeat entries.
    normalize: divide each class's pooled map by its norm, static.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the batch, the number of axes or the classes differ, an input is not floating, `where` does not
      fit or `size` is not positive.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [2.0, 1.0]]]), jnp.array([[[0.0, 1.0], [1.0, 1.0]]])
    >>> print(f"{class_attention_transfer(student, teacher)[0]:.4f}")
    0.1992

  Reference: Ziyao Guo, Haonan Yan, Hui Li and Xiaodong Lin, "Class Attention Transfer Based Knowledge Distillation",
  2023, arXiv 2304.12777. Like the authors' code this is a mean over the positions too. Their settings turn the
  normalisation off where student and teacher are networks of one family, and keep it, some with `size=4`, between
  families.
  """
  if not isinstance(size, int) or size < 1:
    raise ValueError(f"size must be a positive int, not traced; got {size!r}")
  if not isinstance(normalize, bool):
    raise ValueError(f"normalize must be True or False, not traced; got {normalize!r}")
  check_maps(student=student, teacher=teacher)
  check_same("classes (the last axis)", student=jnp.shape(student)[-1:], teacher=jnp.shape(teacher)[-1:])
  student, teacher = as_features(where, student=student, teacher=teacher)
  spatial = tuple(range(1, student.ndim - 1))

  def attention(maps):
    pooled, _ = masked_average_pool(maps, (size,) * len(spatial), where)
    return l2_normalize(pooled, axis=spatial) if normalize else pooled

  _, windows = masked_average_pool(student[..., :1], (size,) * len(spatial), where)
  return example_means(jnp.square(attention(student) - attention(teacher)), windows)


def _check_power(name: str, power: float) -> None:
  """Below 1 the derivative at zero would be infinite."""
  if not isinstance(power, numbers.Real) or not power >= 1:
    raise ValueError(f"{name} must be a number, at least 1, and not traced; got {power}")


def _attention(features: jax.Array, power: float) -> jax.Array:
  strength = jnp.square(features) if power == 2 else jnp.abs(_ready_for(power, features)) ** power
  return _unit_map(strength.mean(axis=-1))


def _ready_for(power: float, features: jax.Array) -> jax.Array:
  """The features, scaled where a power could leave the range of the dtype: squares of 1e-15 and of 1e15 do not."""
  return features if power <= 2 else in_own_units(features, axis=tuple(range(1, features.ndim)))


def _unit_map(values: jax.Array) -> jax.Array:
  """`[batch, ...]`, each map of length 1."""
  return l2_normalize(values, axis=tuple(range(1, values.ndim)))
