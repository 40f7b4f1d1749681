"""Numbers for each token from the logits of heads, `hidden @ head.T`, that are never there all at once.

The tokens go through in chunks. The pass that makes the values makes their gradient as well, while the logits of a
chunk are there: one product for the logits of a side, one for the gradient of its hidden states, one for its head's.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kdflax.numerics.examples import AxisName, mask

Arrays = Mapping[str, jax.Array]
Values = tuple[jax.Array, ...]


class Inputs(NamedTuple):
  """What values may be differentiated by, or of each whether it is; the first three are named by their side."""

  hidden: Mapping[str, Any]  # [tokens, width]
  heads: Mapping[str, Any]  # [rows, width]
  biases: Mapping[str, Any]  # [rows]
  hyper: Mapping[str, Any]  # [tokens]


class Formula(NamedTuple):
  """Values `[tokens]` of some tokens, each from its own logits: `values(logits, hyper, facts)`.

  Attributes:
    values: takes dicts of arrays; logits are `[tokens, rows]`. The facts have no gradient.
    chunk: tokens at once.
    axis_name: mapped axis over which the rows of the heads are spread. The values are then the shares of this device,
      which add up to the values; their gradient is that of the sum.
  """

  values: Callable[[Arrays, Arrays, Arrays], Values]
  chunk: int
  axis_name: AxisName = None


def head_values(formula: Formula, inputs: Inputs, facts: Arrays, seeds: Sequence[Values]) -> Values:
  """The values of all tokens, with a gradient that is made in the same pass.

  A seed says what will become of the values: their sum with its weights, times any constant, or the sum of such sums.
  If something else becomes of them, a second pass makes the gradient. There is no forward mode and there are no second
  derivatives.

  Args:
    formula: what a token's values are.
    inputs: on every side the same tokens.
    facts: `[tokens]` by name. `counted` is bool: the hidden states of other tokens are not looked at.
    seeds: of each sum, the weights `[tokens]` of each value.
  """
  axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves((inputs, facts, seeds))))
  spread = lambda tree: jax.tree.map(lambda x: _varying(x, axes), tree)
  return _values(formula, spread(inputs), spread(facts), spread(jax.lax.stop_gradient(seeds)))


def _axes(x: jax.Array) -> frozenset:
  """The axes of `shard_map` along which x may differ between devices."""
  return jax.typeof(x).manual_axis_type.varying


def _varying(x: jax.Array, axes: frozenset) -> jax.Array:
  """Under `shard_map`, x as what may differ along these axes: then its gradient may, and is added up outside."""
  missing = tuple(axes - _axes(x))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _values(formula: Formula, inputs: Inputs, facts: Arrays, seeds: Sequence[Values]) -> Values:
  return _pass(formula, inputs, facts, (), jax.tree.map(lambda _: False, inputs))[0]


def _forward(formula: Formula, inputs: Inputs, facts: Arrays, seeds: Sequence[Values]):
  wanted = jax.tree.map(lambda x: x.perturbed, inputs)
  inputs, facts, seeds = jax.tree.map(lambda x: x.value, (inputs, facts, seeds))
  values, gradients = _pass(formula, inputs, facts, seeds, wanted)
  return values, (inputs, facts, seeds, jax.tree.map(_only_first, gradients))


def _backward(formula: Formula, residuals: Any, cotangents: Sequence[jax.Array | SymbolicZero]):
  inputs, facts, seeds, gradients = residuals
  instantiate = lambda x, like: jnp.zeros_like(like) if isinstance(x, SymbolicZero) else mask(x, facts["counted"])
  cotangents = tuple(map(instantiate, cotangents, seeds[0]))
  made = _pull(formula, inputs, facts, seeds, gradients, cotangents)
  return Inputs(*map(_as_cotangents, inputs, made)), None, None


_values.defvjp(_forward, _backward, symbolic_zeros=True)


def _pull(formula: Formula, *arguments: Any) -> Inputs:
  """The gradient for these cotangents: sums of what the first pass made if they fit, else from a second pass."""

  # Several cotangents at once, a balancer's rows, are taken one after the other: a cond of several takes both ways.
  @jax.custom_batching.sequential_vmap
  def pull(inputs, facts, seeds, gradients, cotangents):
    factors, fit = zip(*(_factor(weights, cotangents) for weights in seeds), strict=True)
    all_fit = functools.reduce(jnp.logical_and, fit)
    if formula.axis_name is not None:
      all_fit = jax.lax.pmin(all_fit.astype(jnp.int32), formula.axis_name) == 1
    combine = lambda *made: sum(factor * x for factor, x in zip(factors, made, strict=True))
    wanted = Inputs(*({name: name in made for name in given} for given, made in zip(inputs, gradients[0], strict=True)))
    return jax.lax.cond(
      all_fit,
      lambda: jax.tree.map(combine, *gradients),
      lambda: _pass(formula, inputs, facts, (cotangents,), wanted)[1][0],
    )

  return pull(*arguments)


def _factor(weights: Values, cotangents: Values) -> tuple[jax.Array, jax.Array]:
  """The c of `cotangents = c * weights`, and whether there is one."""
  weight, cotangent = jnp.stack(weights).ravel(), jnp.stack(cotangents).ravel()
  if not weight.size:
    return jnp.zeros((), weight.dtype), jnp.array(True)
  at = jnp.argmax(jnp.abs(weight))
  factor = cotangent[at] / jnp.where(weight[at] == 0, 1, weight[at])
  rounding = 4 * jnp.finfo(weight.dtype).eps * jnp.abs(cotangent)
  return factor, jnp.all(jnp.abs(cotangent - factor * weight) <= rounding)


def _as_cotangents(given: Arrays, made: Arrays) -> dict[str, jax.Array | None]:
  return {name: made[name].astype(x.dtype) if name in made else None for name, x in given.items()}


@jax.custom_jvp
def _only_first(gradient: jax.Array) -> jax.Array:
  return gradient


@_only_first.defjvp
def _no_second_derivative(primals, tangents):
  raise NotImplementedError("fused heads have no second derivatives; take the loss of their logits instead")


def _pass(formula: Formula, inputs: Inputs, facts: Arrays, seeds: Sequence[Values], wanted: Inputs):
  """The values, and for each seed the gradients that are wanted of the sum of the values times its weights."""
  dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(inputs))
  moving = [
    side for side in inputs.heads if any(getattr(wanted, kind).get(side) for kind in ("hidden", "heads", "biases"))
  ]
  slopes = _by_rows(functools.partial(_slopes, formula.values, moving))

  def of_chunk(totals, part):
    hidden, hyper, facts, seeds = part
    hidden = {side: mask(x, facts["counted"]) for side, x in hidden.items()}
    logits = {side: _product(hidden[side], head, (1, 1), dtype) for side, head in inputs.heads.items()}
    logits |= {side: logits[side] + bias.astype(dtype) for side, bias in inputs.biases.items()}
    values, made = slopes(logits, hyper, facts, seeds)
    sums, rows = [], []
    for total, (of_logits, of_hyper) in zip(totals, made, strict=True):
      narrow = {side: _narrow(x, hidden[side], inputs.heads[side]) for side, x in of_logits.items()}
      heads = {side: _add_product(x, narrow[side], hidden[side], formula.chunk) for side, x in total[0].items()}
      sums.append((heads, {side: x + of_logits[side].sum(axis=0) for side, x in total[1].items()}))
      products = {side: _product(narrow[side], inputs.heads[side], (1, 0), dtype) for side in _wanted(wanted.hidden)}
      rows.append((products, {name: of_hyper[name] for name in _wanted(wanted.hyper)}))
    return sums, (values, rows)

  zeros = lambda given, names: {name: _zeros(given[name], dtype) for name in _wanted(names)}
  start = [(zeros(inputs.heads, wanted.heads), zeros(inputs.biases, wanted.biases)) for _ in seeds]
  cut, join = _chunks(len(facts["counted"]), formula.chunk)
  hyper = jax.tree.map(functools.partial(cut, mode="edge"), inputs.hyper)
  hidden, facts, weights = jax.tree.map(cut, (inputs.hidden, facts, tuple(seeds)))
  sums, (values, rows) = jax.lax.scan(of_chunk, start, (hidden, hyper, facts, weights))
  values, rows = jax.tree.map(join, (values, rows))
  return values, [Inputs(of_hidden, *total, of_hyper) for total, (of_hidden, of_hyper) in zip(sums, rows, strict=True)]


def _slopes(values: Callable, moving: Sequence[str], logits: Arrays, hyper: Arrays, facts: Arrays, seeds: Any):
  """Values of some tokens, and for each seed the gradient by the logits that move and by the hyper-parameters."""
  function = lambda part, hyper: values({**logits, **part}, hyper, facts)
  found, pull = jax.vjp(function, {side: logits[side] for side in moving}, hyper)
  return found, [pull(weights) for weights in seeds]


def _by_rows(function: Callable) -> Callable:
  """The function of tokens, on a CPU of a few at once: what passes from one loop to the next stays in the cache."""

  def by_rows(*arrays):
    tokens = len(jax.tree.leaves(arrays)[0])
    size = math.gcd(tokens, 8) if jax.default_backend() == "cpu" else tokens
    split = jax.tree.map(lambda x: x.reshape(tokens // size, size, *x.shape[1:]), arrays)
    found = jax.lax.map(lambda part: function(*part), split)
    return jax.tree.map(lambda x: x.reshape(tokens, *x.shape[2:]), found)

  return by_rows


def _wanted(names: Mapping[str, bool]) -> list[str]:
  return [name for name, wanted in names.items() if wanted]


def _zeros(like: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return _varying(jnp.zeros(like.shape, dtype), _axes(like))


def _chunks(tokens: int, chunk: int) -> tuple[Callable, Callable]:
  """Functions that cut `[tokens, ...]` into `[chunks, chunk, ...]`, filled up with zeros or as said, and join them.

  The tokens of a chunk lie evenly far apart: where tokens are spread over devices, so is every chunk.
  """
  chunk = max(1, min(chunk, tokens))
  chunks = -(-tokens // chunk)

  def cut(x, mode="constant"):
    filled = jnp.pad(x, [(0, chunks * chunk - tokens)] + [(0, 0)] * (x.ndim - 1), mode)
    return filled.reshape(chunk, chunks, *x.shape[1:]).swapaxes(0, 1)

  def join(x):
    return x.swapaxes(0, 1).reshape(chunks * chunk, *x.shape[2:])[:tokens]

  return cut, join


def _product(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
  """The product over an axis of each, summed in `dtype`; float32 is not rounded to less on the way."""
  common = dtype if dtype == jnp.float64 else jnp.result_type(x, y)
  precision = jax.lax.Precision.HIGHEST if common == jnp.float32 else None
  contract = (((axes[0],), (axes[1],)), ((), ()))
  return jax.lax.dot_general(x.astype(common), y.astype(common), contract, precision, dtype)


def _add_product(total: jax.Array, slopes: jax.Array, hidden: jax.Array, chunk: int) -> jax.Array:
  """`total + slopes' hidden`, `[rows, width]`, by blocks of rows as large as a chunk's logits.

  The product as a whole would be a second array of the size of the gradient.
  """
  rows, width = total.shape
  block = min(rows, max(1, chunk * rows // width))

  def add(start, size, total):
    part = jax.lax.dynamic_slice_in_dim(slopes, start, size, axis=1)
    moved = jax.lax.dynamic_slice_in_dim(total, start, size) + _product(part, hidden, (0, 0), total.dtype)
    return jax.lax.dynamic_update_slice_in_dim(total, moved, start, axis=0)

  if rows >= 2 * block:
    total = jax.lax.fori_loop(0, rows // block, lambda i, total: add(i * block, block, total), total)
    return add(rows - rows % block, rows % block, total) if rows % block else total
  return total + _product(slopes, hidden, (0, 0), total.dtype)


def _narrow(slopes: jax.Array, hidden: jax.Array, head: jax.Array) -> jax.Array:
  """Gradients of logits in bfloat16 if both sides of the product are; float16 would lose the small ones."""
  return slopes.astype(jnp.bfloat16) if jnp.result_type(hidden, head) == jnp.bfloat16 else slopes
