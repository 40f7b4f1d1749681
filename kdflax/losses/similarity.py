"""Losses on similarities: of examples with keys, of positions with each other, of positions with their class."""

from typing import Literal

import jax
import jax.numpy as jnp

from kdflax.losses.maps import in_a_row, map_pair
from kdflax.numerics.examples import (
  AxisName,
  all_rows,
  as_examples,
  check_same,
  example_means,
  examples_of,
  flatten,
  hyper_parameters,
  mask,
  positions,
  positions_counted,
)
from kdflax.numerics.log_probabilities import log_softmax, relative_entropy
from kdflax.numerics.products import gram_difference, inner_products
from kdflax.numerics.safe import l2_normalize
from kdflax.numerics.targets import cross_entropy


def similarity_distribution(
  student: jax.Array,
  teacher: jax.Array,
  student_keys: jax.Array | None = None,
  teacher_keys: jax.Array | None = None,
  *,
  student_temperature: float | jax.Array = 0.07,
  teacher_temperature: float | jax.Array = 0.07,
  exclude_self: bool = False,
  where: jax.Array | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Cross-entropy between the distributions over keys that similarity gives each example.

  Matches which keys an example is close to; only the order and size of similarities matter, so widths may differ. Rows
  are used as given: L2-normalise them first, as the papers do. The minimum is the teacher's entropy, not 0.

    -sum_j p_ij log q_ij,   p_ij = softmax_j(t_i . k_j / T_t),   q_ij = softmax_j(s_i . k'_j / T_s)

  Args:
    student: `[batch, ...]`, s, trailing axes flattened.
    teacher: `[batch, ...]`, t, any width.
    student_keys: `[keys, ...]`, k', of the student's width, such as a queue; None is the batch of all devices. The
      gradient reaches them.
    teacher_keys: `[keys, ...]`, k, of the teacher's width, as many; None is the batch.
    student_temperature: T_s > 0, in units of the similarity, may be traced; broadcasts against `[batch]`.
    teacher_temperature: T_t > 0, likewise.
    exclude_self: leave the key at the example's own position in the batch out of both softmaxes, static.
    where: bool `[batch]`, which examples count, as anchors and, where the batch is the keys, as keys.
    axis_name: mapped axis over which the batch is spread, or None. Every device is given all keys.

  Returns:
    `[batch]` in float32 or wider, 0 for masked anchors and for those without any key.

  Raises:
    ValueError: if batches, widths or numbers of keys do not fit each other, an input is not floating, or `where` does
      not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.eye(2), jnp.eye(2)
    >>> print(similarity_distribution(student, teacher, student_temperature=1.0, teacher_temperature=1.0).round(4))
    [0.5822 0.5822]

  Reference: Zhiyuan Fang, Jianfeng Wang, Lijuan Wang, Lei Zhang, Yezhou Yang and Zicheng Liu, "SEED: Self-supervised
  Distillation for Visual Representation", 2021, arXiv 2101.04731. CLIP-KD and CompRess use it between modalities and
  with a queue for each side.
  """
  arrays = as_examples(where, lead=1, student=student, teacher=teacher)
  student, teacher = (flatten(x) for x in arrays)
  hyper = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
  student_temperature, teacher_temperature = hyper_parameters(student.shape[:1], where, student.dtype, **hyper)
  of_batch = student_keys is None or teacher_keys is None
  student_keys = _keys("student_keys", student_keys, "student", student, axis_name)
  teacher_keys = _keys("teacher_keys", teacher_keys, "teacher", teacher, axis_name)
  check_same("number of keys", student_keys=student_keys.shape[:1], teacher_keys=teacher_keys.shape[:1])
  if not student.size:
    return student.sum(axis=1)  # of no example
  chosen, has_keys = None, None
  if exclude_self or (of_batch and where is not None):
    chosen = _chosen_keys(len(student), len(student_keys), exclude_self, where if of_batch else None, axis_name)
    has_keys = chosen.any(axis=1)
    chosen = chosen | ~has_keys[:, None]  # all stand in where there is none, and the row is masked below

  def log_probabilities(rows: jax.Array, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    similarities = inner_products(rows, keys)
    return log_softmax(similarities if chosen is None else jnp.where(chosen, similarities, -jnp.inf), temperature)

  log_p = log_probabilities(teacher, teacher_keys, teacher_temperature)
  log_q = log_probabilities(student, student_keys, student_temperature)
  values = cross_entropy(jnp.exp(log_p), log_q, log_p == -jnp.inf)
  return mask(mask(values, has_keys), where)


def _keys(name: str, keys: jax.Array | None, rows_name: str, rows: jax.Array, axis_name: AxisName) -> jax.Array:
  """The keys `[keys, width]`, checked: those given, or the rows of the whole batch."""
  if keys is None:
    return all_rows(rows, axis_name)
  (keys,) = as_examples(None, lead=1, **{name: keys})
  keys = flatten(keys).astype(rows.dtype)
  check_same("width", **{rows_name: rows.shape[1:], name: keys.shape[1:]})
  return keys


def _chosen_keys(
  examples: int, keys: int, exclude_self: bool, where: jax.Array | None, axis_name: AxisName
) -> jax.Array:
  """bool `[examples, keys]`: over which keys the softmax of an example runs."""
  chosen = jnp.ones((examples, keys), bool)
  if where is not None:  # the keys are the batch
    chosen = chosen & all_rows(jnp.asarray(where), axis_name)
  if exclude_self:
    chosen = chosen & (positions(examples, axis_name)[:, None] != jnp.arange(keys))
  return chosen


def token_similarity(
  student: jax.Array,
  teacher: jax.Array,
  *,
  kind: Literal["square", "kl"] = "square",
  temperature: float | jax.Array = 1.0,
  clip_negative: bool = False,
  where: jax.Array | None = None,
) -> jax.Array:
  """Difference of how the positions of an example resemble each other.

  Matches the Gram matrix over the tokens of a sequence or the pixels of a map, so widths may differ; a larger map is
  adaptive-average-pooled to the smaller. Rows are used as given: L2-normalise them first for cosines.

    "square": mean_nm (G_s - G_t)_nm^2,   G_nm = f_n . f_m, or max(f_n . f_m, 0) with clip_negative
    "kl": mean_n KL(softmax_m(G_t / T)_n || softmax_m(G_s / T)_n)

  Args:
    student: `[batch, ..., channels]`, such as `[batch, tokens, width]`.
    teacher: `[batch, ..., channels]`, as many axes.
    kind: "square" or "kl", static. The square is of the fourth degree in the features: in float32 that holds for
      features of 1e-8 to 1e9.
    temperature: T > 0 of "kl", in units of the similarity, may be traced; broadcasts against `[batch]`.
    clip_negative: count negative similarities as 0, on both sides; of "square" only, static.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, without T^2; 0 for masked examples.

  Raises:
    ValueError: if the batch or the number of axes differ, an input is not floating, `where` does not fit, or `kind` is
      not one of those allowed.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
    >>> print(token_similarity(student, teacher))
    [0.5]

  Reference: Yifan Liu, Ke Chen, Chris Liu, Zengchang Qin, Zhenbo Luo and Jingdong Wang, "Structured Knowledge
  Distillation for Semantic Segmentation", 2019, arXiv 1903.04197 (its pair-wise term). DINOv3, arXiv 2508.10104, has
  the square as Gram anchoring; CIRKD, arXiv 2204.06986, and LightlyTrain have the divergence, the former between
  images.
  """
  if kind not in ("square", "kl"):
    raise ValueError(f'kind must be "square" or "kl"; got {kind!r}')
  student, teacher = (in_a_row(f) for f in map_pair(student, teacher, where))
  (temperature,) = hyper_parameters(student.shape[:1], examples_of(where), student.dtype, temperature=temperature)
  count = student.shape[1]
  similarities = lambda f: jnp.einsum("bnc,bmc->bnm", f, f, precision=jax.lax.Precision.HIGHEST)
  if kind == "square":
    if clip_negative:
      difference = jax.nn.relu(similarities(student)) - jax.nn.relu(similarities(teacher))
    else:
      difference = jax.vmap(gram_difference)(*_to_one_width(student, teacher))
    share = positions_counted(where, count, student.dtype) / count  # masked rows and columns are 0
    return mask(jnp.square(difference).mean(axis=(1, 2)) / share**2, examples_of(where))
  present = None if examples_of(where) is where else flatten(jnp.asarray(where))

  def log_probabilities(f: jax.Array) -> jax.Array:
    gram = similarities(f)
    if present is not None:  # an example without any position takes them all, and is masked below
      gram = jnp.where((present | ~present.any(axis=1, keepdims=True))[:, None], gram, -jnp.inf)
    return log_softmax(gram, temperature[..., None])

  divergence = relative_entropy(log_probabilities(teacher), log_probabilities(student))
  return example_means(divergence, where if present is None else present)


def _to_one_width(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both with channels of zero up to the wider of the two: they change no inner product."""
  width = max(student.shape[-1], teacher.shape[-1])
  pad = lambda f: jnp.pad(f, ((0, 0), (0, 0), (0, width - f.shape[-1])))
  return pad(student), pad(teacher)


def prototype_similarity(
  student: jax.Array,
  teacher: jax.Array,
  labels: jax.Array,
  num_classes: int,
  *,
  where: jax.Array | None = None,
) -> jax.Array:
  """Squared difference of how close each position is to the mean of its class.

  Matches how much the features of a class vary within an image: cosines to the prototypes, so widths may differ, and
  the larger map is adaptive-average-pooled to the smaller. A zero vector has cosine 0 with everything and gets no
  gradient. A position whose label is out of range adds 0 but counts.

    mean_n (cos(s_n, m_s) - cos(t_n, m_t))^2,   m = mean of the features of n's class in that image

  Args:
    student: `[batch, ..., channels]`, for images `[batch, height, width, channels]`.
    teacher: `[batch, ..., channels]`, as many axes.
    labels: integer `[batch, ...]`, the class of every position of the smaller map.
    num_classes: static.
    where: bool `[batch]`, which examples count, or `[batch, ...]`, which positions of maps of one size.

  Returns:
    `[batch]` in float32 or wider, 0 for masked examples.

  Raises:
    ValueError: if the batch or the number of axes differ, an input has the wrong kind of dtype, or `labels`,
      `num_classes` or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
    >>> print(f"{prototype_similarity(student, teacher, jnp.array([[0, 0]]), 1)[0]:.4f}")
    0.0858

  Reference: Yukang Wang, Wei Zhou, Tao Jiang, Xiang Bai and Yongchao Xu, "Intra-class Feature Variation Distillation
  for Semantic Segmentation", ECCV 2020, not on arXiv.
  """
  if not isinstance(num_classes, int) or num_classes < 1:
    raise ValueError(f"num_classes must be a positive int, not traced; got {num_classes!r}")
  student, teacher = map_pair(student, teacher, where)
  labels = jnp.asarray(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integers; got {labels.dtype}{list(labels.shape)}; take the argmax of one-hots")
  check_same("positions (labels for the smaller map)", student=student.shape[:-1], labels=labels.shape)
  counted = jnp.where(mask(jnp.ones(labels.shape, bool), where), labels, -1)
  own_class = (flatten(counted)[..., None] == jnp.arange(num_classes)).astype(student.dtype)

  def closeness(features: jax.Array) -> jax.Array:
    features = in_a_row(features)
    # Their direction is that of the means.
    sums = jnp.einsum("bnk,bnc->bkc", own_class, features, precision=jax.lax.Precision.HIGHEST)
    prototypes = jnp.einsum("bnk,bkc->bnc", own_class, l2_normalize(sums), precision=jax.lax.Precision.HIGHEST)
    return (l2_normalize(features) * prototypes).sum(axis=-1)

  squared = jnp.square(closeness(student) - closeness(teacher))
  return example_means(squared.reshape(labels.shape), where)
