"""The examples in the docstrings print what they say."""

import doctest
import importlib
import pkgutil

import pytest

from kdflax import methods

MODULES = [module.name for module in pkgutil.iter_modules(methods.__path__)]
WITHOUT = ("method", "catalogue")  # what is no function that sets something up


@pytest.mark.parametrize("module", [name for name in MODULES if name not in WITHOUT])
def test_examples_print_what_they_say(module):
  results = doctest.testmod(importlib.import_module(f"kdflax.methods.{module}"))
  assert results.attempted and not results.failed


def test_every_public_function_has_an_example():
  functions = {
    name: value for name, value in vars(methods).items() if name in methods.__all__ and hasattr(value, "__code__")
  }
  assert [name for name, function in functions.items() if "Examples:" not in (function.__doc__ or "")] == ["paper"]
