"""kdflax: knowledge distillation and joint learning as pure JAX functions.

`import kdflax` takes a hundredth of a second: each part, as `kdflax.losses`, is imported when it is first named.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # the one place; setup.cfg reads it

__all__ = [
  "balancing",
  "command",
  "coupling",
  "data",
  "export",
  "extras",
  "files",
  "losses",
  "merging",
  "methods",
  "model",
  "models",
  "numerics",
  "objectives",
  "teachers",
  "training",
]

if TYPE_CHECKING:
  from kdflax import (
    balancing,
    command,
    coupling,
    data,
    export,
    extras,
    files,
    losses,
    merging,
    methods,
    model,
    models,
    numerics,
    objectives,
    teachers,
    training,
  )
else:

  def __getattr__(name):
    if name in __all__:
      return importlib.import_module(f"kdflax.{name}")
    raise AttributeError(f"module 'kdflax' has no attribute {name!r}; there are {', '.join(__all__)}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
