"""What losses on relations share: the local anchors, the examples of the whole batch, and which pairs of them exist."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import AxisName, all_rows, as_examples, flatten, positions
from kdflax.numerics.products import inner_products


class Side(NamedTuple):
  """Features of the local anchors and of the whole batch."""

  local: jax.Array  # [b, width]
  everyone: jax.Array  # [B, width]: the same array where the whole batch is local

  def map(self, function: Callable[[jax.Array], jax.Array]) -> "Side":
    """Applies a function to the features, once where both are the same."""
    local = function(self.local)
    return Side(local, local if self.everyone is self.local else function(self.everyone))

  def products(self) -> jax.Array:
    """Inner products `[b, B]` of the anchors with the batch."""
    return inner_products(self.local, self.everyone)


class Pairs(NamedTuple):
  """Which of the pairs (local anchor, example of the batch) exist."""

  anchors: jax.Array  # int [b]: positions of the local anchors in the whole batch
  present: jax.Array  # bool [B]: not masked
  valid: jax.Array  # bool [b, B]: neither is masked
  distinct: jax.Array  # bool [b, B]: valid, and not the same example
  counted: jax.Array  # scalar: examples of the whole batch that count

  def mean_over_batch(self, values: jax.Array) -> jax.Array:
    """`[b, B] -> [b]`: mean over the examples that count; 0 for a masked anchor."""
    return jnp.where(self.valid, values, 0).sum(axis=-1) / jnp.maximum(self.counted, 1)


def compare(
  student: jax.Array, teacher: jax.Array, where: jax.Array | None, axis_name: AxisName
) -> tuple[Side, Side, Pairs]:
  """The student's and the teacher's features `[batch, ...]`, checked and flattened, and the pairs to compare."""
  student, teacher = (flatten(x) for x in as_examples(where, lead=1, student=student, teacher=teacher))
  local = jnp.ones(student.shape[:1], bool) if where is None else jnp.asarray(where)
  everyone = all_rows(local, axis_name)
  anchors = positions(local.size, axis_name)
  valid = local[:, None] & everyone
  distinct = valid & (anchors[:, None] != jnp.arange(everyone.size))
  pairs = Pairs(anchors, everyone, valid, distinct, everyone.sum().astype(student.dtype))
  return Side(student, all_rows(student, axis_name)), Side(teacher, all_rows(teacher, axis_name)), pairs
