"""The order of an epoch: each example once, all orders alike, and no work for examples that are not asked for."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kdflax.data.orders import order_at

order = jax.jit(order_at, static_argnums=2)


@partial(jax.jit, static_argnums=(1, 2))
def _orders(key, keys, num_examples):
  """The first places of the orders of so many keys: int32 [keys, up to 8]."""
  places = jnp.arange(min(num_examples, 8))
  return jax.vmap(lambda key: order_at(key, places, num_examples))(jax.random.split(key, keys))


@pytest.mark.parametrize("num_examples", [1, 2, 3, 9, 23, 15190])
def test_every_example_comes_once(num_examples):
  found = order(jax.random.key(1), jnp.arange(num_examples), num_examples)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(np.sort(found), np.arange(num_examples))


def test_it_is_the_walk_of_its_docstring():
  """In Python's integers, for 23 examples on a grid of 4 by 6."""
  words = np.asarray(jax.random.bits(jax.random.key(5), (12, 2, 2), jnp.uint32)).tolist()

  def mixed(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)

  def hashed(x, pair):
    return mixed(mixed((x + pair[0]) % 2**32) ^ pair[1]) >> 1

  def walk(position):
    row, column = divmod(position, 6)
    for to_row, to_column in words:
      row = (row + hashed(column, to_row)) % 4
      column = (column + hashed(row, to_column)) % 6
    place = row * 6 + column
    return place if place < 23 else walk(place)

  found = order(jax.random.key(5), jnp.arange(23), 23)
  np.testing.assert_array_equal(found, [walk(position) for position in range(23)])


@pytest.mark.parametrize("num_examples", [4, 6])
def test_all_orders_of_a_few_examples_are_equally_likely(num_examples):
  """A chi-squared test of 100,000 keys; a fair one would fail it once in a thousand, but these keys are fixed."""
  code = _orders(jax.random.key(0), 100_000, num_examples) @ num_examples ** np.arange(num_examples)
  possible = [every @ num_examples ** np.arange(num_examples) for every in _permutations(num_examples)]
  counts = [np.count_nonzero(np.asarray(code) == value) for value in possible]
  assert sum(counts) == 100_000 and len(counts) == math.factorial(num_examples)
  assert stats.chisquare(counts).pvalue > 1e-3


def _permutations(count):
  return [np.asarray(every) for every in itertools.permutations(range(count))]


def test_places_and_neighbours_are_uniform_in_a_set_of_some_thousand():
  """Which example comes first, and how far the second is from it."""
  first, second = np.asarray(_orders(jax.random.key(0), 100_000, 5003))[:, :2].T
  for values, possible in ((first, 5003), ((second - first) % 5003, 5002)):
    _, counts = np.unique(values, return_counts=True)
    assert len(counts) == possible
    assert stats.chisquare(counts).pvalue > 1e-3


def test_orders_of_two_keys_have_no_more_in_common_than_chance_allows():
  """The fixed points of one order after another's inverse: one on average, whatever the size."""
  places = jnp.arange(15190)
  orders = [np.asarray(order(jax.random.fold_in(jax.random.key(0), epoch), places, 15190)) for epoch in range(20)]
  same = [np.count_nonzero(a == b) for a, b in itertools.pairwise(orders)]
  assert 0.3 < np.mean(same) < 2.0
  assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.04 for a, b in itertools.pairwise(orders))


def test_a_batch_of_a_large_set_is_all_the_work():
  program = jax.make_jaxpr(partial(order_at, num_examples=2**31 - 1))(jax.random.key(0), jnp.arange(8))
  assert max(math.prod(shape) for shape in _shapes(program.jaxpr)) <= 48  # the words of the key


def _shapes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
      if hasattr(inner, "jaxpr"):
        yield from _shapes(inner.jaxpr)


@pytest.mark.parametrize("num_examples", [0, 2**31])
def test_a_size_out_of_range_is_named(num_examples):
  with pytest.raises(ValueError, match=f"num_examples={num_examples} must be from 1"):
    order_at(jax.random.key(0), jnp.arange(1), num_examples)
