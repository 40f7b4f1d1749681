"""Several teachers as one: models without params that read the outputs of other models.

An ensemble is an ordinary `Model` under a name of its own, so that the Terms which serve one teacher serve many. All of
them return `logits [batch, ..., classes]` and `weights [batch, teachers]`, how much each teacher counts for an example;
a Term on features may read the weights too. Nothing is stopped here: that is a property of the Term, and students that
read each other (online ensembles) are welcome.

Teachers of different widths need nothing here; their features meet the student's through connectors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.model import Model

Weights = Sequence[float] | Callable[[jax.Array], jax.Array]  # the weights, or the weights at a step
Temperature = float | Callable[[jax.Array], jax.Array] | str  # the number, the number at a step, or where it is found
Combine = Callable[..., tuple[jax.Array, jax.Array]]


def average_logits(paths: Sequence[str], *, weights: Weights | None = None) -> Model:
  """Average the teachers' logits: the normalised geometric mean of their probabilities, at every temperature.

    z = sum_k w_k z_k / sum_k w_k

  A class at -inf is one that a teacher does not know: the mean is over those that do, and -inf if none does. There the
  constant that a softmax leaves free matters; `average_probabilities` does not depend on it. A NaN or +inf of a teacher
  that counts stays NaN, as in every loss.

  Args:
    paths: context paths of the teachers' logits [batch, ..., classes].
    weights: one number >= 0 for each teacher, equal by default; or a function of the step that returns them. At a step
      where it returns nothing but 0 the teachers count equally.

  Returns:
    A model with `logits` [batch, ..., classes] in float32 or wider, and `weights` [batch, teachers], which sum to 1.

  Raises:
    ValueError: if a weight is negative or their number is wrong, or (when run) the logits differ in shape.
  """

  def combine(logits, shares, _):
    logits = _broken_as_nan(logits)
    share = jnp.where(logits == -jnp.inf, 0, _along(shares, logits))
    total = share.sum(0)
    counted = jnp.where(share == 0, 0, share * jnp.where(share == 0, 0, logits))
    mean = jnp.sum(counted, axis=0) / jnp.where(total == 0, 1, total)
    return jnp.where(total == 0, -jnp.inf, mean), shares

  return _ensemble(paths, combine, weights)


def average_probabilities(
  paths: Sequence[str], *, temperature: Temperature = 1.0, weights: Weights | None = None
) -> Model:
  """Average the teachers' probabilities: a mixture, which is as unsure as its teachers disagree.

  Computed from log-probabilities, so that what is unlikely for all teachers keeps its digits. A NaN or +inf of a
  teacher that counts stays NaN.

    z = T log sum_k w_k softmax(z_k / T),   so that softmax(z / T) is the mixture

  Args:
    paths: context paths of the teachers' logits [batch, ..., classes]; a class at -inf has probability 0.
    temperature: T > 0 of the Term that reads `logits`; at another temperature the mixture is not that of the softened
      probabilities. As in the Term a number, a schedule, or a context path (of a learned temperature).
    weights: as for `average_logits`.

  Returns:
    As `average_logits`; `logits` are `T log p` of the mixture.

  Raises:
    ValueError: as `average_logits`, or if the temperature is not positive.
  """
  return _ensemble(paths, _as_mixture, weights, temperature)


def confidence_weighted(paths: Sequence[str], *, labels: str = "batch.label", temperature: Temperature = 1.0) -> Model:
  """Average the teachers' probabilities, each example trusting the teachers that are right about it.

  With c_k the cross-entropy of teacher k with the label of the example:

    w_k = (1 - exp(c_k) / sum_j exp(c_j)) / (K - 1)

  The weights of an example sum to 1 and none exceeds 1 / (K - 1): with two teachers the better one may take all, with
  many they are nearly equal. The Kullback-Leibler divergence to this mixture has the gradient of the weighted sum of
  the divergences to each teacher, the paper's loss; the values differ by what does not depend on the student.

  Args:
    paths: context paths of the logits [batch, classes] of at least two teachers. One that has the label's class at
      -inf gets weight 0.
    labels: context path of integer classes [batch]; an example whose label is not a class (-1, say) is unlabelled, and
      its teachers count equally.
    temperature: as for `average_probabilities`; the cross-entropies are taken at temperature 1.

  Returns:
    As `average_probabilities`. The weights of the paper's feature loss have the same formula over other logits, those
    of the teachers' classifiers on the student's features, which `models.reused_head` returns.

  Raises:
    ValueError: if there is one teacher only, the temperature is not positive, or (when run) the shapes do not fit.

  Reference: Hailin Zhang, Defang Chen and Can Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", 2022,
  arXiv 2201.00007. Their code averages the feature loss over the teachers as well, a factor 1 / K.
  """
  if len(paths) < 2:
    raise ValueError(f"confidence_weighted compares teachers, so it needs two or more; got {list(paths)}")

  def combine(logits, shares, temperature, label):
    if label.shape != logits.shape[1:-1] or label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
      raise ValueError(
        f"{labels!r} must be integers [batch] for logits [batch, classes];"
        f" got {label.dtype}{list(label.shape)} for {list(logits.shape[1:])}"
      )
    labelled = (label >= 0) & (label < logits.shape[-1])
    chosen = jnp.where(labelled, label, 0)[None, :, None]
    cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
    finite = jnp.minimum(cross_entropy, jnp.finfo(logits.dtype).max)  # of two teachers that exclude the label, too
    confidence = (1 - jax.nn.softmax(finite, axis=0)) / (len(paths) - 1)
    shares = jnp.where(labelled[:, None], confidence.T, shares)
    return _mixture(logits, shares, temperature), shares

  return _ensemble(paths, combine, None, temperature, labels=labels)


def random_teacher(paths: Sequence[str], *, per: str = "example", weights: Weights | None = None) -> Model:
  """Learn from one teacher at a time, drawn anew at every step.

  In evaluation, where nothing is random, the mixture of the teachers takes its place.

  Args:
    paths: context paths of the teachers' logits [batch, ..., classes].
    per: draw a teacher for each `"example"`, or one for the whole `"batch"`.
    weights: probabilities of the teachers up to a factor, equal by default or where all are 0; or a function of the
      step that returns them, for a choice that follows a schedule: the next teacher every 1000 steps, and the last one
      from then on, is `lambda step: jax.nn.one_hot(jnp.minimum(step // 1000, 1), 2)` for two of them.

  Returns:
    A model with `logits` [batch, ..., classes] in float32 or wider, those of the teacher drawn, and `weights` [batch,
    teachers], 1 for it and 0 for the others.

  Raises:
    ValueError: as `average_logits`, if `per` is neither, or (when run) training gives no key.
  """
  if per not in ("example", "batch"):
    raise ValueError(f"per must be 'example' or 'batch'; got {per!r}")

  def combine(logits, shares, temperature, *, train, key):
    if not train:
      return _as_mixture(logits, shares, temperature)
    if key is None:
      raise ValueError("random_teacher draws a teacher; apply(train=True) needs a key")
    batch = logits.shape[1]
    choice = jax.random.categorical(key, jnp.log(shares), shape=(batch,) if per == "example" else None)
    if per == "batch":
      choice = jnp.broadcast_to(choice[0], (batch,))
    return logits[choice, jnp.arange(batch)], jax.nn.one_hot(choice, len(paths), dtype=logits.dtype)

  return _ensemble(paths, combine, weights, random=True)


def label_map(path: str, classes: Sequence[int], num_classes: int, *, labels: str | None = None) -> Model:
  """Place a teacher's classes among the student's.

  The classes that the teacher does not know are at -inf. A Term against the whole student then says that they do not
  occur, so let it see only the examples of the teacher's classes: give `labels`, and `"where": "NAME.known"`.

  Args:
    path: context path of the teacher's logits [batch, ..., len(classes)].
    classes: for each class of the teacher, which class of the student it is.
    num_classes: the number of the student's classes.
    labels: context path of the student's integer labels [batch, ...].

  Returns:
    A model with `logits` [batch, ..., num_classes], and with `labels` also `known`, bool [batch, ...]: whether the
    example is of one of these classes.

  Raises:
    ValueError: if a class is out of range or named twice, there is none, or (when run) the teacher has another number
      of classes.
  """
  subset = _checked_classes(path, classes, num_classes)

  def apply(params, state, inputs, *, train, key=None):
    del params, train, key
    logits = inputs if labels is None else inputs[0]
    outputs = {"logits": _placed(path, logits, subset, num_classes)}
    if labels is not None:
      outputs["known"] = jnp.isin(inputs[1], subset)
    return outputs, state

  return Model(_no_variables, apply, path if labels is None else (path, labels))


def subset_teachers(
  paths: Sequence[str],
  classes: Sequence[Sequence[int]],
  num_classes: int,
  *,
  temperature: Temperature = 1.0,
  weights: Weights | None = None,
  overlap: bool = False,
) -> Model:
  """Make one teacher of teachers that know different classes.

  The mixture of their probabilities over the student's classes: a teacher says nothing on the classes it does not know,
  and how much the subsets weigh against each other is not in the logits, so it is said by `weights` (the shares of the
  subsets in the data, say). For terms on one subset at a time see `label_map`.

    z = T log sum_k w_k p_k,   p_k(classes_k[i]) = softmax(z_k / T)_i, 0 for the other classes

  Args:
    paths: context paths of the teachers' logits [batch, ..., classes of the teacher].
    classes: for each teacher, which of the student's classes its classes are.
    num_classes: the number of the student's classes.
    temperature: as for `average_probabilities`.
    weights: as for `average_logits`.
    overlap: whether a class may be known to several teachers; its probabilities then add up.

  Returns:
    As `average_probabilities`.

  Raises:
    ValueError: if a class is out of range, named twice for one teacher, known to several without `overlap`, or known to
      none, and as `average_probabilities`.
  """
  if len(classes) != len(paths):
    raise ValueError(f"give the classes of every teacher: {len(paths)} paths, {len(classes)} lists of classes")
  maps = [_checked_classes(path, own, num_classes) for path, own in zip(paths, classes, strict=True)]
  counts = np.bincount(np.concatenate(maps), minlength=num_classes)
  shared, missing = np.flatnonzero(counts > 1).tolist(), np.flatnonzero(counts == 0).tolist()
  if shared and not overlap:
    owners = [path for path, own in zip(paths, maps, strict=True) if shared[0] in own]
    raise ValueError(f"several teachers know the classes {shared} ({shared[0]}: {owners}); fix it or say overlap=True")
  if missing:
    raise ValueError(f"no teacher knows the classes {missing}; the student would learn that they never occur")

  def place(*logits):
    return [_placed(*given, num_classes) for given in zip(paths, logits, maps, strict=True)]

  return _ensemble(paths, _as_mixture, weights, temperature, place=place)


def _ensemble(
  paths: Sequence[str],
  combine: Combine,
  weights: Weights | None,
  temperature: Temperature = 1.0,
  *,
  labels: str | None = None,
  random: bool = False,
  place: Callable[..., Sequence[jax.Array]] | None = None,
) -> Model:
  """A model that stacks logits to [teachers, batch, ..., classes] and combines them by weights [batch, teachers]."""
  paths = tuple(paths)
  if not paths:
    raise ValueError("an ensemble needs at least one path of logits")
  if isinstance(temperature, int | float) and not temperature > 0:
    raise ValueError(f"temperature must be positive; got {temperature}")
  given = () if callable(weights) else _checked_weights(paths, weights)
  others = {"labels": labels, "temperature": temperature if isinstance(temperature, str) else None}
  others |= {"step": "step" if callable(weights) or callable(temperature) else None}
  others = {name: path for name, path in others.items() if path is not None}

  def apply(params, state, inputs, *, train, key=None):
    del params
    logits, read = inputs[: len(paths)], dict(zip(others, inputs[len(paths) :], strict=True))
    share = jnp.asarray(weights(read["step"]) if callable(weights) else given)
    divisor = temperature(read["step"]) if callable(temperature) else read.get("temperature", temperature)
    stacked = _stack(paths, logits if place is None else place(*logits))
    if share.shape != (len(paths),):
      raise ValueError(f"weights must be one number for each of {list(paths)}; got shape {list(share.shape)}")
    shares = jnp.broadcast_to(_shares(share).astype(stacked.dtype), (stacked.shape[1], len(paths)))
    options = {"train": train, "key": key} if random else {}
    combined, shares = combine(stacked, shares, divisor, *([read["labels"]] if labels else []), **options)
    return {"logits": combined, "weights": shares}, state

  return Model(_no_variables, apply, (*paths, *others.values()))


def _shares(weights: jax.Array) -> jax.Array:
  """Weights over their sum; equal shares where that is not positive, so that a schedule that ran out is defined."""
  total = weights.sum()
  return jnp.where(total <= 0, 1 / weights.size, weights / jnp.where(total <= 0, 1, total))


def _no_variables(key: jax.Array, example: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  del key, example
  return {}, {}


def _as_mixture(logits: jax.Array, shares: jax.Array, temperature: Any) -> tuple[jax.Array, jax.Array]:
  return _mixture(logits, shares, temperature), shares


def _mixture(logits: jax.Array, shares: jax.Array, temperature: Any) -> jax.Array:
  """`T log sum_k w_k softmax(z_k / T)`, with finite derivatives where a probability or a weight is 0."""
  log_probs = jax.nn.log_softmax(_broken_as_nan(logits) / temperature)
  share = _along(shares, logits)
  possible = (log_probs != -jnp.inf) & (share != 0)  # true of NaN, which is to be seen
  terms = jnp.where(possible, log_probs + jnp.log(jnp.where(share == 0, 1, share)), -jnp.inf)
  any_possible = possible.any(0)
  return jnp.where(any_possible, temperature * jax.nn.logsumexp(jnp.where(any_possible, terms, 0), axis=0), -jnp.inf)


def _broken_as_nan(logits: jax.Array) -> jax.Array:
  """NaN in all of a row `[..., classes]` that holds a NaN or +inf: no softmax of it is finite."""
  broken = (jnp.isnan(logits) | (logits == jnp.inf)).any(axis=-1, keepdims=True)
  return jnp.where(broken, jnp.nan, logits)


def _along(shares: jax.Array, logits: jax.Array) -> jax.Array:
  """Weights [batch, teachers] against logits [teachers, batch, ..., classes]."""
  return shares.T.reshape(shares.T.shape + (1,) * (logits.ndim - 2))


def _stack(paths: Sequence[str], logits: Sequence[jax.Array]) -> jax.Array:
  shapes = {path: jnp.shape(z) for path, z in zip(paths, logits, strict=True)}
  if len(set(shapes.values())) > 1:
    raise ValueError(f"teachers must agree on the shape of their logits; got {shapes}; map classes with label_map")
  if len(shapes[paths[0]]) < 2:
    raise ValueError(f"logits must be [batch, ..., classes]; got {shapes}")
  stacked = jnp.stack([jnp.asarray(z) for z in logits])
  return stacked.astype(jnp.promote_types(stacked.dtype, jnp.float32))


def _placed(path: str, logits: jax.Array, classes: np.ndarray, num_classes: int) -> jax.Array:
  if logits.shape[-1] != len(classes):
    raise ValueError(f"{path!r} has {logits.shape[-1]} classes, and {len(classes)} are mapped: {classes.tolist()}")
  return jnp.full((*logits.shape[:-1], num_classes), -jnp.inf, logits.dtype).at[..., classes].set(logits)


def _checked_classes(path: str, classes: Sequence[int], num_classes: int) -> np.ndarray:
  found = np.asarray(() if isinstance(classes, Mapping) else tuple(classes))  # of a mapping it would take the keys
  if found.ndim != 1 or not found.size or not np.issubdtype(found.dtype, np.integer):
    raise ValueError(
      f"the classes of {path!r} must be a sequence of integers, one for each of its logits; got {classes!r}"
    )
  outside = found[(found < 0) | (found >= num_classes)].tolist()
  values, counts = np.unique(found, return_counts=True)
  if outside:
    raise ValueError(f"the classes {outside} of {path!r} are not among the student's, 0 to {num_classes - 1}")
  if counts.max() > 1:
    raise ValueError(f"{path!r} maps two of its classes to the same one: {values[counts > 1].tolist()}")
  return found


def _checked_weights(paths: Sequence[str], weights: Sequence[float] | None) -> np.ndarray:
  given = np.ones(len(paths)) if weights is None else np.asarray(weights, np.float64)
  if given.shape != (len(paths),) or not (np.isfinite(given) & (given >= 0)).all() or not given.any():
    raise ValueError(f"weights must be one number >= 0 for each of {list(paths)}, not all 0; got {weights}")
  return (given / given.sum()).astype(np.float64)
