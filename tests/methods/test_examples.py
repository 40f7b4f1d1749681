"""Every method shows how it is used; tests/test_docstrings.py tries the examples."""

from kdflax import methods


def test_every_public_function_has_an_example():
  functions = {
    name: value for name, value in vars(methods).items() if name in methods.__all__ and hasattr(value, "__code__")
  }
  assert [name for name, function in functions.items() if "Examples:" not in (function.__doc__ or "")] == ["paper"]
