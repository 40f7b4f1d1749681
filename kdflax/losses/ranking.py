"""Losses on the scores of a list of items: `[..., items] -> [...]`, one value per list."""

import jax
import jax.numpy as jnp

from kdflax.numerics.examples import as_examples, check_same, mask


def margin_mse(student_scores: jax.Array, teacher_scores: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
  """Mean squared difference of the margins between the items of a list.

  Matches by how much each item is ahead of each other, whatever the level of the scores: for retrieval and ranking. It
  is twice the variance of the difference over the items.

    mean over i != j of ((s_i - s_j) - (t_i - t_j))^2

  Args:
    student_scores: `[..., items]`, such as a query's score of a positive and of negatives. An item at -inf on both
      sides, as padding is, takes no part.
    teacher_scores: `[..., items]`.
    where: bool `[...]`, which lists count.

  Returns:
    `[...]` in float32 or wider, 0 for masked lists and for those of one item.

  Raises:
    ValueError: if the shapes differ, an input is not floating, there is one item only, or `where` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> print(margin_mse(jnp.array([[3.0, 1.0]]), jnp.array([[8.0, 5.0]])))
    [1.]

  Reference: Sebastian Hofstätter, Sophia Althammer, Michael Schröder, Mete Sertkan and Allan Hanbury, "Improving
  Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation", 2020, arXiv 2010.02666, which has one
  positive and one negative.
  """
  check_same("shape", student_scores=jnp.shape(student_scores), teacher_scores=jnp.shape(teacher_scores))
  if jnp.shape(student_scores)[-1:] == (1,):
    raise ValueError(f"student_scores and teacher_scores need at least 2 items; got {jnp.shape(student_scores)}")
  student, teacher = as_examples(where, student_scores=student_scores, teacher_scores=teacher_scores)
  absent = (student == -jnp.inf) & (teacher == -jnp.inf)
  total = lambda x: jnp.where(absent, 0, x).sum(axis=-1, keepdims=True)
  count = total(jnp.ones_like(student))
  difference = jnp.where(absent, 0, student) - jnp.where(absent, 0, teacher)
  deviation = difference - total(difference) / jnp.maximum(count, 1)
  return mask((2 * total(jnp.square(deviation)) / jnp.maximum(count - 1, 1))[..., 0], where)
