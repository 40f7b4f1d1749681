"""Methods that compare an example with many others: a memory of the whole training set, or a queue of the last."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdflax import losses, models
from kdflax.methods.method import Method, Weight
from kdflax.methods.pairs import Pair
from kdflax.model import Model, PyTree
from kdflax.numerics.examples import AxisName, all_rows
from kdflax.numerics.safe import l2_normalize
from kdflax.objectives import Term

Draw = Callable[[jax.Array, jax.Array], jax.Array]  # (key, own rows [batch]) -> rows [batch, negatives]


def crd(
  pair: Pair,
  *,
  num_examples: int,
  labels: np.ndarray | None = None,
  index: str = "batch.index",
  width: int = 128,
  negatives: int = 16384,
  temperature: float | jax.Array = 0.07,
  momentum: float | jax.Array = 0.5,
  weight: Weight = 0.8,
  axis_name: AxisName = None,
) -> Method:
  """Tell an example's own embedding in the other model's memory from those of other examples, in both directions.

  Args:
    pair: of models with an `embedding`, of any widths.
    num_examples: in the training set; the memory holds `2 * num_examples * width` numbers.
    labels: classes of the training examples, integer `[num_examples]`, host-side. With them negatives are drawn
      from other classes, as in the authors' code; without, from all other examples.
    index: context path of the row of each example in the training set, integer `[batch]`.
    width: of the two projections.
    negatives: drawn for each example uniformly, with replacement.
    temperature: of the scores.
    momentum: share of an old row that stays.
    weight: of the Term, a number or a schedule.
    axis_name: mapped axis that the batch is spread over, as of the learner.

  Returns:
    A method with the models `crd_student`, `crd_teacher` (the projections) and `crd` (the memory, which is its state),
    and the Term `crd`.

  Raises:
    ValueError: if a number is not positive, a model has no embedding, the labels do not fit, or all are one class.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.crd(pair, num_examples=50, negatives=8).models)
    ['crd_student', 'crd_teacher', 'crd']

  Reference: Yonglong Tian, Dilip Krishnan and Phillip Isola, "Contrastive Representation Distillation", 2020, arXiv
  1910.10699.
  """
  if num_examples < 2 or negatives < 1:
    raise ValueError(f"num_examples must be at least 2 and negatives at least 1; got {num_examples} and {negatives}")
  draw = _from_all(num_examples, negatives) if labels is None else _from_others(labels, num_examples, negatives)
  student, teacher, memory = (pair.named(part) for part in ("crd_student", "crd_teacher", "crd"))
  parts = {
    student: models.embedding_connector(pair.student.path("embedding"), width),
    teacher: models.embedding_connector(pair.teacher.path("embedding"), width),
  }

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    return {}, losses.crd_memory(key, num_examples, width)._asdict()

  def apply(
    params: PyTree, state: PyTree, inputs: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    student, teacher, own = inputs
    indices = jnp.concatenate([own[:, None], draw(jax.random.key(0) if key is None else key, own)], axis=1)
    values, after = losses.crd(
      student,
      teacher,
      indices,
      losses.CRDMemory(**state),
      temperature=temperature,
      momentum=momentum,
      axis_name=axis_name,
    )
    return {"values": values}, after._asdict() if train else state

  parts[memory] = Model(init, apply, (f"{student}.output", f"{teacher}.output", index))
  return Method(parts, {memory: Term(_as_they_are, {"values": f"{memory}.values"}, weight)})


def seed(
  pair: Pair,
  *,
  queue: int = 65536,
  student_temperature: Any = 0.2,
  teacher_temperature: Any = 0.01,
  weight: Weight = 1.0,
  axis_name: AxisName = None,
) -> Method:
  """Learn which of the last examples the teacher finds similar to this one. It takes no labels.

  Args:
    pair: of models with an `embedding`; the student's is mapped linearly to the teacher's width.
    queue: how many of the teacher's embeddings are kept; those of a batch take the place of the oldest before they are
      compared, so each example is among its own keys. Until it is full the others are random.
    student_temperature: of the student's similarities, a number, a schedule or a context path.
    teacher_temperature: of the teacher's.
    weight: of the Term, a number or a schedule.
    axis_name: mapped axis that the batch is spread over, as of the learner.

  Returns:
    A method with the models `seed_student`, `seed_teacher` (both on the unit sphere) and `seed_queue` (its state), and
    the Term `seed`.

  Raises:
    ValueError: if the queue is empty or a model has no embedding; when traced, if a batch does not fit into the queue.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.seed(pair, queue=64).models)
    ['seed_student', 'seed_teacher', 'seed_queue']

  Reference: Zhiyuan Fang, Jianfeng Wang, Lijuan Wang, Lei Zhang, Yezhou Yang and Zicheng Liu, "SEED: Self-supervised
  Distillation for Visual Representation", 2021, arXiv 2101.04731. In the authors' code an example is compared with the
  others of its batch only from the next step on.
  """
  if queue < 1:
    raise ValueError(f"queue must be at least 1; got {queue}")
  student, teacher, keys = (pair.named(f"seed_{part}") for part in ("student", "teacher", "queue"))
  width = math.prod(pair.teacher.shape("embedding")[1:])
  parts = {
    student: models.embedding_connector(pair.student.path("embedding"), width),
    teacher: _on_the_sphere(pair.teacher.path("embedding")),
    keys: _queue(f"{teacher}.output", queue, width, axis_name),
  }
  inputs = {
    "student": f"{student}.output",
    "teacher": f"{teacher}.output",
    "student_keys": f"{keys}.keys",
    "teacher_keys": f"{keys}.keys",
    "student_temperature": student_temperature,
    "teacher_temperature": teacher_temperature,
  }
  return Method(parts, {pair.named("seed"): Term(losses.similarity_distribution, inputs, weight)})


def _on_the_sphere(path: str) -> Model:
  """A model without params that brings what it reads to length 1."""

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    return {}, {}

  def apply(params: PyTree, state: PyTree, x: Any, *, train: bool, key: jax.Array | None = None) -> tuple[Any, PyTree]:
    return {"output": l2_normalize(x.reshape(x.shape[0], -1))}, state

  return Model(init, apply, path)


def _queue(path: str, size: int, width: int, axis_name: AxisName) -> Model:
  """A model whose state is the last `size` rows that it has read; `keys` are they, with those of this batch."""

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    return {}, {"rows": l2_normalize(jax.random.normal(key, (size, width), jnp.float32)), "next": jnp.int32(0)}

  def apply(params: PyTree, state: PyTree, x: Any, *, train: bool, key: jax.Array | None = None) -> tuple[Any, PyTree]:
    new = jax.lax.stop_gradient(x if axis_name is None else all_rows(x, axis_name)).astype(state["rows"].dtype)
    if len(new) > size:
      raise ValueError(f"a batch of {len(new)} does not fit into a queue of {size}; make it longer")
    places = (state["next"] + jnp.arange(len(new))) % size
    after = {"rows": state["rows"].at[places].set(new), "next": (state["next"] + len(new)) % size}
    return {"keys": after["rows"]}, after if train else state

  return Model(init, apply, path)


def _as_they_are(values: jax.Array) -> jax.Array:
  return values


def _from_all(num_examples: int, negatives: int) -> Draw:
  """Rows of any example but the own."""

  def draw(key: jax.Array, own: jax.Array) -> jax.Array:
    return (own[:, None] + jax.random.randint(key, (len(own), negatives), 1, num_examples)) % num_examples

  return draw


def _from_others(labels: np.ndarray, num_examples: int, negatives: int) -> Draw:
  """Rows of examples of other classes."""
  labels = np.asarray(labels)
  if labels.shape != (num_examples,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
    raise ValueError(
      f"labels must be classes 0, 1, ... of the {num_examples} examples; got {labels.dtype} of shape {labels.shape}"
    )
  order, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
  if counts.max() == num_examples:
    raise ValueError(f"all {num_examples} labels are {labels[0]}, so there are no negatives; leave labels out")
  first = np.cumsum(counts) - counts

  def draw(key: jax.Array, own: jax.Array) -> jax.Array:
    label = jnp.asarray(labels)[own][:, None]
    # A position in the order of the classes, counted past the example's own class.
    count = jnp.asarray(counts)[label]
    position = jax.random.randint(key, (len(own), negatives), 0, num_examples - count)
    position += jnp.where(position >= jnp.asarray(first)[label], count, 0)
    return jnp.asarray(order)[position]

  return draw
