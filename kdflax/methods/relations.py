"""Methods that compare how examples lie to each other."""

from typing import Any

import jax

from kdflax import losses
from kdflax.methods.method import Method, Weight, times
from kdflax.methods.outputs import of_embeddings, of_maps
from kdflax.methods.pairs import Pair
from kdflax.numerics.safe import l2_normalize


def rkd(pair: Pair, *, distance: float = 25.0, angle: float = 50.0, weight: Weight = 1.0) -> Method:
  """Learn the distances between the embeddings of a batch, and the angles of their triangles.

  Args:
    pair: of models with an `embedding`, of any widths.
    distance: share of the Term of distances.
    angle: share of the Term of angles.
    weight: of both, a number or a schedule.

  Returns:
    A method with the Terms `rkd_distance` and `rkd_angle`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.rkd(pair).terms)
    ['rkd_distance', 'rkd_angle']

  Reference: Wonpyo Park, Dongju Kim, Yan Lu and Minsu Cho, "Relational Knowledge Distillation", 2019, arXiv 1904.05068.
  """
  distances = of_embeddings(pair, losses.rkd_distance, weight=times(weight, distance))
  return distances | of_embeddings(pair, losses.rkd_angle, weight=times(weight, angle))


def similarity_preserving(pair: Pair, *, weight: Weight = 3000.0) -> Method:
  """Learn which examples of a batch have similar maps at the last stage.

  Args:
    pair: of models with feature maps, of any widths and sizes.
    weight: of the Term, a number or a schedule.

  Returns:
    A method with the Term `similarity_preserving/STAGE`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> batch = {"image": np.zeros((2, 8, 8, 1), np.float32)}
    >>> pair = methods.pair(models.convnet((4, 6)), models.convnet((8, 12)), batch)
    >>> list(methods.similarity_preserving(pair).terms)
    ['similarity_preserving/stage2']

  Reference: Frederick Tung and Greg Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv 1907.09682.
  """
  return of_maps(pair, losses.similarity_preserving, stages=pair.some_stages()[-1:], weight=weight)


def pkt(pair: Pair, *, weight: Weight = 30000.0, **settings: Any) -> Method:
  """Learn for each example how probable the others are as its neighbours.

  Args:
    pair: of models with an `embedding`, of any widths.
    weight: of the Term, a number or a schedule.
    **settings: `epsilon` (1e-7) of `losses.pkt`.

  Returns:
    A method with the Term `pkt`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.pkt(pair).terms)
    ['pkt']

  Reference: Nikolaos Passalis and Anastasios Tefas, "Learning Deep Representations with Probabilistic Knowledge
  Transfer", 2018, arXiv 1803.10837.
  """
  return of_embeddings(pair, losses.pkt, weight=weight, **settings)


def correlation_congruence(pair: Pair, *, weight: Weight = 1.0, **settings: Any) -> Method:
  """Learn how the embeddings of a batch correlate, each brought to length 1, as the expansion of the kernel asks for.

  Args:
    pair: of models with an `embedding`, of any widths.
    weight: of the Term, a number or a schedule; none is known that goes with the formula here.
    **settings: `gamma` (0.4) of `losses.correlation_congruence`.

  Returns:
    A method with the Term `correlation_congruence`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.correlation_congruence(pair).terms)
    ['correlation_congruence']

  Reference: Baoyun Peng, Xiao Jin, Jiaheng Liu, Shunfeng Zhou, Yichao Wu, Yu Liu, Dongsheng Li and Zhaoning Zhang,
  "Correlation Congruence for Knowledge Distillation", 2019, arXiv 1904.01802.
  """
  return of_embeddings(pair, _unit_congruence, name="correlation_congruence", weight=weight, **settings)


def info_nce(pair: Pair, *, weight: Weight = 1.0, **settings: Any) -> Method:
  """Recognise an example's own embedding among those that the teacher has for the batch.

  Args:
    pair: of models with an `embedding`.
    weight: of the Term, a number or a schedule; none is known that goes with the formula here.
    **settings: `temperature` (0.07) of `losses.info_nce`.

  Returns:
    A method with the Term `info_nce` and the linear connector `info_nce_connector`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.info_nce(pair).models)
    ['info_nce_connector']

  Reference: Aaron van den Oord, Yazhe Li and Oriol Vinyals, "Representation Learning with Contrastive Predictive
  Coding", 2018, arXiv 1807.03748.
  """
  return of_embeddings(pair, losses.info_nce, connect=True, weight=weight, **settings)


def _unit_congruence(student: jax.Array, teacher: jax.Array, **arguments: Any) -> jax.Array:
  return losses.correlation_congruence(l2_normalize(student), l2_normalize(teacher), **arguments)
