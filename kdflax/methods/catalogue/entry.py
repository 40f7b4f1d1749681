"""What the catalogue says of a method."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from kdflax.methods.method import Method


class Entry(NamedTuple):
  """One method.

  Attributes:
    title: as the field calls it.
    loss: its formula.
    needs: of the models and the batch.
    build: `(pair, *, weight, ...) -> Method`; None for what is no matter of two classifiers, such as vocabularies.
    weight: published for small CIFAR-100 networks, on the scale of the formula here and for what `build` makes.
    setting: what else was published; without a `weight`, all of it.
    source: who published it, by the letters of `SOURCES`.
    hard: weight of the cross-entropy with the labels beside it; 0 if there was none.
    warm_up: whether the weight grew from 0 over the first twelfth of the training.
    takes: keyword arguments that `build` must be given beside the pair.
  """

  title: str
  loss: Callable[..., Any]
  needs: str
  build: Callable[..., Method] | None = None
  weight: float | None = None
  setting: str = ""
  source: str = ""
  hard: float = 1.0
  warm_up: bool = False
  takes: tuple[str, ...] = ()

  @property
  def published(self) -> str:
    """The published weight and setting in words, with the letters of the source."""
    weight = "" if self.weight is None else f"{self.weight:g}"
    source = f" [{self.source}]" if self.source else ""
    return f"{weight}{self.setting}{source}" or "none recorded"

  @property
  def function(self) -> Callable[..., Method] | None:
    """The function of `kdflax.methods` that sets it up."""
    function: Any = self.build
    while isinstance(function, functools.partial):
      function = function.func
    return function

  @property
  def paper(self) -> str:
    """Authors, title and year, with the address if it is on arXiv: as the function says, or else the loss."""
    told = "Reference:" in (self.function.__doc__ or "") if self.function else False
    return paper(self.function if told and self.function else self.loss)


def paper(function: Callable[..., Any]) -> str:
  """The first reference of a docstring as a link.

  Raises:
    ValueError: if it has none of the usual form.
  """
  text = " ".join((inspect.getdoc(function) or "").split())
  found = re.search(r'Reference: (.+?), "(.+?)", (.*?\d{4})\b(?:, arXiv (\d{4}\.\d{4,5}))?', text)
  if not found:
    raise ValueError(f'the docstring of {function.__name__} must say: Reference: AUTHORS, "TITLE", YEAR, arXiv NUMBER')
  authors, title, year, number = found.groups()
  title = f"[{title}](https://arxiv.org/abs/{number})" if number else title
  return f"{authors}, {title}, {year}"
