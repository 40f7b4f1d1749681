"""What the losses of vocabulary heads share: their arguments checked, and their values as functions of a chunk."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.numerics.examples import (
  AxisName,
  all_sum,
  check_broadcasts,
  check_classes,
  check_range,
  check_same,
  check_where,
  hyper_parameters,
  mask,
  positions,
)
from kdflax.numerics.heads import Arrays, Formula, Inputs, head_values
from kdflax.numerics.log_probabilities import (
  half_difference,
  log_mixture,
  log_normalize,
  log_sum_exp,
  mixture_divergence,
  mixture_end,
  relative_entropy,
  soften,
)

Number = float | jax.Array
# From the scores `[chunk, rows]` of each side, hyper-parameters and facts of a chunk: one value for each token.
ChunkLoss = Callable[[Arrays, Arrays, Arrays], jax.Array]

# Logits of one side that are there at once if no chunk is given. An accelerator needs long products to be busy.
ENTRIES_ON_CPU, ENTRIES_ELSEWHERE = 2**23, 2**27

DIVERGENCES: Mapping[str, Callable[[jax.Array, jax.Array, Arrays], jax.Array]] = {
  "forward_kl": lambda log_q, log_p, hyper: relative_entropy(log_p, log_q),
  "reverse_kl": lambda log_q, log_p, hyper: relative_entropy(log_q, log_p),
  "jensen_shannon": lambda log_q, log_p, hyper: mixture_divergence(log_p, log_q, hyper["beta"]),
  "skew_kl": lambda log_q, log_p, hyper: relative_entropy(log_p, log_mixture(log_p, log_q, hyper["alpha"])),
  "reverse_skew_kl": lambda log_q, log_p, hyper: relative_entropy(log_q, log_mixture(log_q, log_p, hyper["alpha"])),
  "total_variation": lambda log_q, log_p, hyper: half_difference(jnp.exp(log_q), jnp.exp(log_p)),
}

# What a hyper-parameter must be if it is a number that is known before tracing.
RANGES: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
  "temperature": ("above 0", lambda x: x > 0),
  "soft_cap": ("above 0, or None for no cap", lambda x: x > 0),
  "alpha": ("at least 0 and below 1", lambda x: (x >= 0) & (x < 1)),
  "beta": ("above 0 and below 1", lambda x: (x > 0) & (x < 1)),
  "z_loss": ("at least 0", lambda x: x >= 0),
}


class Side(NamedTuple):
  """The student, the teacher, or the only side, which has no name."""

  name: str
  hidden: jax.Array
  head: jax.Array
  bias: jax.Array | None = None
  soft_cap: Number | None = None

  def argument(self, kind: str) -> str:
    """What the user calls this array."""
    return f"{self.name}_{kind}" if self.name else kind


def check_sides(sides: Sequence[Side], where: jax.Array | None, chunk: int | None) -> tuple[int, ...]:
  """Returns the shape of the tokens.

  Raises:
    ValueError: if dtypes, widths, rows, leading axes, `where` or `chunk` do not fit.
  """
  for side in sides:
    arrays = {"hidden": side.hidden, "head": side.head} | ({} if side.bias is None else {"bias": side.bias})
    for kind, array in arrays.items():
      if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        shown = f"{jnp.result_type(array)}{list(jnp.shape(array))}"
        raise ValueError(f"{side.argument(kind)} must be floating; got {shown}. Cast it, e.g. to float32")
    hidden, head = jnp.shape(side.hidden), jnp.shape(side.head)
    if not hidden or len(head) != 2 or hidden[-1] != head[1]:
      names = f"{side.argument('hidden')} [..., width] and {side.argument('head')} [vocabulary, width]"
      turned = hidden and len(head) == 2 and hidden[-1] == head[0]
      raise ValueError(
        f"{names} must have the same width; got {hidden} and {head}{'. Transpose the head' if turned else ''}"
      )
    if 0 in head:
      raise ValueError(f"{side.argument('head')} must have rows and a width; got {head}")
    if side.bias is not None and jnp.shape(side.bias) != head[:1]:
      names = f"{side.argument('bias')} must have one number for each row of {side.argument('head')}"
      raise ValueError(f"{names}; got {jnp.shape(side.bias)} for {head}")
  check_same("leading (token) axes", **{side.argument("hidden"): jnp.shape(side.hidden)[:-1] for side in sides})
  tokens = jnp.shape(sides[0].hidden)[:-1]
  check_where(where, tokens)
  if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int | np.integer) or chunk < 1):
    raise ValueError(f"chunk must be a whole number of tokens, at least 1, or None; got {chunk!r}")
  return tokens


def facts_of_labels(
  side: Side, labels: jax.Array, tokens: tuple[int, ...], counted: jax.Array, ignore_index: int | None, axis: AxisName
) -> dict[str, jax.Array]:
  """Which tokens have a label that counts, which label, and whether there is no such class.

  Raises:
    ValueError: if labels are not integers of the tokens' shape, or known and out of range.
  """
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    shown = f"{jnp.result_type(labels)}{list(jnp.shape(labels))}"
    raise ValueError(f"labels must be integers; got {shown}. Take the argmax of one-hots")
  check_same("leading (token) axes", **{side.argument("hidden"): tokens, "labels": jnp.shape(labels)})
  labels, rows = jnp.asarray(labels), jnp.shape(side.head)[0]
  labelled = counted if ignore_index is None else counted & (labels != ignore_index)
  if axis is None:
    fix = "Say by ignore_index or where which do not count"
    check_classes("labels", labels, rows, labelled, fix)
  unknown = labelled & ((labels < 0) | (labels >= _everywhere(rows, axis)))
  return {"label": labels, "labelled": labelled, "unknown": unknown}


def divergence_of(
  student: Side,
  teacher: Side,
  divergence: str,
  num_classes: int | None,
  axis_name: AxisName,
  *,
  temperature: Number,
  alpha: Number,
  beta: Number,
) -> tuple[ChunkLoss, dict[str, Number]]:
  """The divergence between the sides as a function of a chunk, and the hyper-parameters that it takes.

  Raises:
    ValueError: if there is no such divergence, or the heads share no class.
  """
  if divergence not in DIVERGENCES:
    raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}")
  hyper: dict[str, Number] = {}
  if not (isinstance(temperature, int | float) and temperature == 1):  # a division less
    hyper["temperature"] = temperature
  if divergence in ("skew_kl", "reverse_skew_kl"):
    hyper["alpha"] = alpha
  if divergence == "jensen_shannon":
    end = mixture_end(beta)
    divergence = divergence if end is None else ("forward_kl", "reverse_kl")[end]
    hyper |= {"beta": beta} if end is None else {}
  shared = _shared_classes(student, teacher, num_classes, axis_name)
  return functools.partial(_divergence, DIVERGENCES[divergence], shared, axis_name), hyper


def _shared_classes(student: Side, teacher: Side, num_classes: int | None, axis_name: AxisName) -> int | None:
  """How many of the first rows count; None counts all."""
  heads = {side.argument("head"): jnp.shape(side.head) for side in (student, teacher)}
  shown = " and ".join(f"{name} {shape}" for name, shape in heads.items())
  rows = [shape[0] for shape in heads.values()]
  if axis_name is not None and rows[0] != rows[1]:
    raise ValueError(
      f"heads whose rows are spread over {axis_name!r} must have equally many on a device; got {shown}. Fill one up "
      "and give num_classes"
    )
  least, most = _everywhere(min(rows), axis_name), _everywhere(max(rows), axis_name)
  if num_classes is None:
    return None if least == most else least
  if not 1 <= num_classes <= least:
    raise ValueError(
      f"num_classes, the first rows that both sides share, must be in 1 .. {least}; got {num_classes} for {shown}"
    )
  return None if num_classes == most else num_classes


def _everywhere(rows: int, axis_name: AxisName) -> int:
  """Rows on all devices."""
  return rows if axis_name is None else rows * jax.lax.axis_size(axis_name)


def _divergence(
  between: Callable[[jax.Array, jax.Array, Arrays], jax.Array],
  num_classes: int | None,
  axis_name: AxisName,
  scores: Arrays,
  hyper: Arrays,
  facts: Arrays,
) -> jax.Array:
  def log_softmax(side):
    logits = _first(scores[side], num_classes, axis_name)
    logits = soften(logits, hyper["temperature"]) if "temperature" in hyper else logits
    return log_normalize(logits, axis_name)

  return mask(between(log_softmax("student"), log_softmax("teacher"), hyper), facts["counted"])


def _first(logits: jax.Array, num_classes: int | None, axis_name: AxisName) -> jax.Array:
  """The logits of the classes that both sides share; the others have probability 0."""
  if num_classes is None:
    return logits
  if axis_name is None:
    return logits[:, :num_classes]
  return jnp.where(positions(logits.shape[1], axis_name) < num_classes, logits, -jnp.inf)


def cross_entropy_of(side: Side, axis_name: AxisName) -> ChunkLoss:
  """The cross-entropy of a side with the labels as a function of a chunk."""
  return functools.partial(_cross_entropy, side.name, axis_name)


def _cross_entropy(side: str, axis_name: AxisName, scores: Arrays, hyper: Arrays, facts: Arrays) -> jax.Array:
  """`-log q_y + z_loss lse^2`; if rows are spread over devices, on the one that has row y."""
  logits = scores[side]
  is_label = facts["label"][:, None] == positions(logits.shape[1], axis_name)
  values = -jnp.where(is_label, log_normalize(logits, axis_name), 0).sum(axis=-1)
  if "z_loss" in hyper:
    largest, log_sum = log_sum_exp(logits, axis_name)
    penalty = hyper["z_loss"] * jnp.square(largest + log_sum)[:, 0]
    values = values + jnp.where(is_label.any(axis=-1), penalty, 0)
  return mask(jnp.where(facts["unknown"], jnp.nan, values), facts["labelled"])


def values_of(
  sides: Sequence[Side],
  losses: Mapping[str, ChunkLoss],
  hyper: Mapping[str, Number],
  facts: Mapping[str, jax.Array],
  weights: Sequence[Sequence[Number]],
  where: jax.Array | None,
  chunk: int | None,
  axis_name: AxisName,
) -> list[jax.Array]:
  """Runs the tokens through the losses.

  Args:
    sides: checked.
    losses: by the name of the fact that says which tokens count for it.
    hyper: of the losses; soft caps of the sides are added.
    facts: of the shape of the tokens.
    weights: in each sum that may be made of the values, their weights, each to be broadcast to the tokens.
    where: of the user, for the hyper-parameters of masked tokens.
    chunk: tokens at once.
    axis_name: over which rows are spread.

  Returns:
    The values of each loss, of the shape of the tokens.
  """
  tokens = facts["counted"].shape
  flat = lambda x: jnp.broadcast_to(x, tokens).reshape(-1)
  caps = {side.argument("soft_cap"): side.soft_cap for side in sides if side.soft_cap is not None}
  hyper = {**hyper, **caps}
  for name, value in hyper.items():
    check_range(name, value, *RANGES["soft_cap" if name in caps else name], where)
  for weight in (weight for group in weights for weight in group):
    check_broadcasts("expected_weights", jnp.shape(weight), "the tokens", tokens)
  arrays = [array for side in sides for array in (side.hidden, side.head, side.bias) if array is not None]
  dtype = jnp.result_type(jnp.float32, *arrays)
  numbers = hyper_parameters(tokens, where, dtype, **hyper)
  inputs = Inputs(
    {side.name: jnp.reshape(side.hidden, (-1, jnp.shape(side.hidden)[-1])) for side in sides},
    {side.name: jnp.asarray(side.head) for side in sides},
    {side.name: jnp.asarray(side.bias) for side in sides if side.bias is not None},
    {name: flat(number) for name, number in zip(hyper, numbers, strict=True)},
  )

  def of_tokens(logits, hyper, facts):
    scores = {side.name: _capped(side, logits[side.name], hyper) for side in sides}
    return tuple(loss(scores, hyper, facts) for loss in losses.values())

  rows = max(len(head) for head in inputs.heads.values())
  formula = Formula(of_tokens, _default_chunk(rows) if chunk is None else int(chunk), axis_name)
  seeds = tuple(
    tuple(
      flat(jnp.where(facts[counts], jnp.asarray(weight, dtype), 0))
      for counts, weight in zip(losses, group, strict=True)
    )
    for group in weights
  )
  shares = head_values(formula, inputs, {name: flat(fact) for name, fact in facts.items()}, seeds)
  return [all_sum(values, axis_name).reshape(tokens) for values in shares]


def _default_chunk(rows: int) -> int:
  """A multiple of 8 tokens where there are as many, which is what the numerics take at once on a CPU."""
  tokens = (ENTRIES_ON_CPU if jax.default_backend() == "cpu" else ENTRIES_ELSEWHERE) // rows
  return max(1, tokens - tokens % 8 if tokens > 8 else tokens)


def _capped(side: Side, logits: jax.Array, hyper: Arrays) -> jax.Array:
  if (name := side.argument("soft_cap")) not in hyper:
    return logits
  cap = hyper[name][:, None]
  return cap * jnp.tanh(logits / cap)
