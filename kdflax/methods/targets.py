"""Methods on logits that reshape what the teacher says, or weigh how classes lie to each other."""

from typing import Any

import jax
import jax.numpy as jnp

from kdflax import losses
from kdflax.methods.method import Method, Weight
from kdflax.methods.outputs import of_logits
from kdflax.methods.pairs import Pair
from kdflax.numerics.safe import l2_normalize


def rld(
  pair: Pair,
  *,
  labels: str = "batch.label",
  temperature: Any = 4.0,
  top_temperature: Any = 1.0,
  alpha: Any = 1.0,
  beta: Any = 8.0,
  weight: Weight = 1.0,
) -> Method:
  """Learn how sure the teacher is, said of the true class, and its ranking of the classes below that.

  Published with a warm-up of the weight over the first 20 of 240 epochs: give an `optax.linear_schedule`.

  Args:
    pair: of models with `logits`.
    labels: context path of the true classes.
    temperature: of the classes below the true one.
    top_temperature: of the sureness.
    alpha: share of the sureness.
    beta: share of the ranking.
    weight: of the Term, a number or a schedule.

  Returns:
    A method with the Term `rld`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.rld(pair).terms)
    ['rld']

  Reference: Wujie Sun, Defang Chen, Siwei Lyu, Genlang Chen, Chun Chen and Can Wang, "Knowledge Distillation with
  Refined Logits", 2024, arXiv 2408.07703.
  """
  settings = {"temperature": temperature, "top_temperature": top_temperature, "alpha": alpha, "beta": beta}
  return of_logits(pair, losses.rld, weight=weight, labels=labels, **settings)


def wttm(pair: Pair, *, gamma: Any = 0.2, weight: Weight = 4.0) -> Method:
  """Learn the teacher's probabilities raised to a power, smooth ones with more weight; the student has no temperature.

  Args:
    pair: of models with `logits`.
    gamma: the power, 1 over the teacher's temperature.
    weight: of the Term, a number or a schedule; published for `gamma` 0.2 beside CRD.

  Returns:
    A method with the Term `wttm`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.wttm(pair).terms)
    ['wttm']

  Reference: Kaixiang Zheng and En-Hui Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024, arXiv
  2402.11148.
  """
  return of_logits(pair, losses.wttm, weight=weight, gamma=gamma)


def ofa(
  pair: Pair, *, labels: str = "batch.label", epsilon: Any = 1.0, weight: Weight = 1.0, **settings: Any
) -> Method:
  """Learn the teacher's probabilities with the true class made stronger, for teachers of another architecture.

  The paper adds exits to the student's stages, each trained by this loss as well, which are left out.

  Args:
    pair: of models with `logits`.
    labels: context path of the true classes.
    epsilon: how much stronger; 1 for CIFAR-100 and up to 1.5 for ImageNet in the authors' commands.
    weight: of the Term, a number or a schedule.
    **settings: `temperature` (1) of `losses.ofa`.

  Returns:
    A method with the Term `ofa`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.ofa(pair).terms)
    ['ofa']

  Reference: Zhiwei Hao, Jianyuan Guo, Kai Han, Yehui Tang, Han Hu, Yunhe Wang and Chang Xu, "One-for-All: Bridge the
  Gap Between Heterogeneous Architectures in Knowledge Distillation", 2023, arXiv 2310.19444.
  """
  return of_logits(pair, losses.ofa, weight=weight, labels=labels, epsilon=epsilon, **settings)


def abkd(pair: Pair, *, alpha: Any = 0.8, beta: Any = 0.3, weight: Weight = 1.0, **settings: Any) -> Method:
  """Learn by a divergence between forward and reverse KL: `alpha` where it looks, `beta` how hard.

  Args:
    pair: of models with `logits`.
    alpha: 1 with `beta` 0 is forward KL, 0 with `beta` 1 reverse KL.
    beta: as `alpha`; the sum of both is 1.1 in the authors' command for language models.
    weight: of the Term, a number or a schedule.
    **settings: `temperature` (1) of `losses.alpha_beta`.

  Returns:
    A method with the Term `abkd`.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.abkd(pair).terms)
    ['abkd']

  Reference: Guanghui Wang, Zhiyong Yang, Zitai Wang, Shi Wang, Qianqian Xu and Qingming Huang, "ABKD: Pursuing a Proper
  Allocation of the Probability Mass in Knowledge Distillation via alpha-beta-Divergence", 2025, arXiv 2505.04560.
  """
  return of_logits(pair, losses.alpha_beta, name="abkd", weight=weight, alpha=alpha, beta=beta, **settings)


def wkd_l(
  pair: Pair,
  *,
  labels: str = "batch.label",
  teacher_head: str = "head.kernel",
  temperature: Any = 8.0,
  regularization: Any = 0.05,
  iterations: int = 10,
  sharpen: float = 1.0,
  target: float = 1.0,
  weight: Weight = 600.0,
) -> Method:
  """Learn the probabilities of the wrong classes by what it costs to move them, cheap between classes that are alike.

  Alike are classes whose columns of the teacher's head point the same way: `cost = 1 - exp(-sharpen (1 - cos))`. Beside
  it stands the cross-entropy of the true class with what the teacher gives it.

  Args:
    pair: of models with `logits`.
    labels: context path of the true classes.
    teacher_head: path of the kernel `[channels, classes]` of the teacher's head in its params.
    temperature: of the wrong classes.
    regularization: of Sinkhorn's iterations, in units of the cost.
    iterations: of Sinkhorn.
    sharpen: how fast the cost rises.
    target: weight of the Term of the true class.
    weight: of the transport, a number or a schedule; published for costs by CKA, with a decay from epoch 150 of 240 on.

  Returns:
    A method with the Terms `wkd_l` and `wkd_l/target`.

  Raises:
    ValueError: if a model has no logits, or the teacher no such head.

  Examples:
    >>> import numpy as np
    >>> from kdflax import methods, models
    >>> pair = methods.pair(models.mlp((4,)), models.mlp((8,)), {"image": np.zeros((2, 6), np.float32)})
    >>> list(methods.wkd_l(pair).terms)
    ['wkd_l', 'wkd_l/target']

  Reference: Jiaming Lv, Haoyuan Yang and Peihua Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for
  Knowledge Distillation", 2024, arXiv 2412.08139.
  """
  settings = {
    "temperature": temperature,
    "regularization": regularization,
    "iterations": iterations,
    "sharpen": sharpen,
  }
  settings |= {"labels": labels, "teacher_head": pair.teacher.param(teacher_head)}
  transport = of_logits(pair, _transport, name="wkd_l", weight=weight, **settings)
  return transport | of_logits(pair, losses.nkd, name="wkd_l/target", weight=target, labels=labels, gamma=0.0)


def _transport(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  teacher_head: jax.Array,
  *,
  sharpen: float,
  where: jax.Array | None = None,
  **settings: Any,
) -> jax.Array:
  """`wkd_logits` of all classes but the true one, with the costs of a head."""
  classes = l2_normalize(jnp.asarray(teacher_head), axis=0)
  cost = 1 - jnp.exp(-sharpen * (1 - classes.T @ classes))
  others = jnp.arange(classes.shape[1] - 1)
  wrong = others + (others >= jnp.asarray(labels)[..., None])
  student, teacher = (jnp.take_along_axis(logits, wrong, axis=-1) for logits in (student_logits, teacher_logits))
  costs = cost[wrong[..., :, None], wrong[..., None, :]]
  return losses.wkd_logits(student, teacher, costs, where=where, **settings)
