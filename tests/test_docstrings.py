"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
WITH_EXAMPLES = [
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for path in sorted((ROOT / "kdflax").rglob("*.py"))
  if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_print_what_they_say(name):
  options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  results = doctest.testmod(importlib.import_module(name), optionflags=options)
  assert results.attempted and not results.failed
