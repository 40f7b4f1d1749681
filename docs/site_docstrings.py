"""Docstrings as the site shows them: indented formulas in a block of their own, references with a link to the paper."""

import re
from typing import Any

import griffe

_SECTIONS = ("Args:", "Returns:", "Raises:", "Examples:", "Reference:", "Attributes:", "Yields:")
_SHARED = re.compile(r"^  (\w+(?:, \w+)+): (.*\n?(?:^    .*\n?)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
  """Turns what docs/style.md asks of a docstring into Markdown."""

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    """Called for each object with a docstring."""
    if obj.docstring is not None:
      obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
  """Formulas, those parts of the description that are indented, become blocks; arXiv numbers become links.

  Examples:
    >>> print(as_markdown("A loss.\\n\\n  a + b\\n\\nArgs:\\n  a: it."))
    A loss.
    <BLANKLINE>
    ```text
    a + b
    ```
    <BLANKLINE>
    Args:
      a: it.
  """
  shown, section = [], False
  for part in text.split("\n\n"):
    lines = part.splitlines()
    section = section or part.startswith(_SECTIONS)
    if lines and not section and all(line.startswith("  ") for line in lines):
      part = "\n".join(["```text", *_dedented(lines), "```"])
    if part.startswith("Args:"):
      part = _SHARED.sub(_each_by_itself, part).rstrip()
    if part.startswith("Reference:"):
      section, words = False, " ".join(part.split())
      part = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", f"**Reference**: {words[11:]}")
    shown.append(part)
  return "\n\n".join(shown)


def _each_by_itself(match: re.Match[str]) -> str:
  """What is said of several arguments at once, `a, b: text`, said of each."""
  return "".join(f"  {name}: {match[2].rstrip()}\n" for name in match[1].split(", "))


def _dedented(lines: list[str]) -> list[str]:
  margin = min(len(line) - len(line.lstrip()) for line in lines)
  return [line[margin:] for line in lines]
