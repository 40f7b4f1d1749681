"""Functions under `jax.jit`, for tests that call them with concrete arrays.

Called without it, a function compiles each of its operations by itself: a hundred programs instead of one.
"""

import functools
import inspect
import types
from collections.abc import Callable

import jax
import numpy as np


class Compiled:
  """A module whose functions run compiled; `__wrapped__` of each is the function itself."""

  def __init__(self, module: types.ModuleType):
    self._module = module

  def __getattr__(self, name: str):
    value = getattr(self._module, name)
    value = compiled(value) if inspect.isfunction(value) else value
    setattr(self, name, value)
    return value


def compiled(function: Callable) -> Callable:
  """Traces arrays and containers of arrays; all else is fixed, so that numbers are known as they are without `jit`."""

  @functools.cache
  def program(positional, keywords):
    return jax.jit(lambda args, kwargs: function(*_merged(args, positional), **kwargs, **dict(keywords)))

  @functools.wraps(function)
  def call(*args, **kwargs):
    positional = tuple((i, a) for i, a in enumerate(args) if not _is_traced(a))
    keywords = tuple(sorted((name, a) for name, a in kwargs.items() if not _is_traced(a)))
    traced = {name: a for name, a in kwargs.items() if _is_traced(a)}
    return program(positional, keywords)([a for a in args if _is_traced(a)], traced)

  return call


def _is_traced(value) -> bool:
  return any(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in jax.tree.leaves(value))


def _merged(traced: list, fixed: tuple) -> list:
  traced = list(traced)
  for position, value in fixed:
    traced.insert(position, value)
  return traced
