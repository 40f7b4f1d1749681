"""Packages that a core installation does not bring: imported where they are used, named with their extra if absent."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
  """Tell a user who lacks a package which extra of kdflax brings it; wrap the import in it.

  Args:
    name: of the extra in setup.cfg.
    purpose: what needs the package, for the message.

  Raises:
    ImportError: an import inside failed.

  Examples:
    >>> with extra("data", "a pipeline"):
    ...   import no_such_package
    Traceback (most recent call last):
    ImportError: a pipeline needs no_such_package, which is not installed: pip install "kdflax[data]"
  """
  try:
    yield
  except ImportError as error:
    # A part of a package that is there, but too old or damaged, is another error.
    if not isinstance(error, ModuleNotFoundError) or not error.name:
      raise
    package = error.name.split(".")[0]
    message = f'{purpose} needs {package}, which is not installed: pip install "kdflax[{name}]"'
    raise ImportError(message, name=error.name) from error
