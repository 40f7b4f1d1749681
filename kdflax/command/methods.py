"""`kdflax methods [NAME]`: the catalogues of methods and balancers on a terminal."""

import argparse
import difflib
import inspect
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from kdflax import balancing, methods


def report(options: argparse.Namespace) -> dict[str, Any]:
  """All entries in short, or one in full.

  Raises:
    ValueError: if there is no entry of that name; the message has the nearest ones.
  """
  if options.name is None:
    return {"methods": {n: _method(n) for n in methods.CATALOGUE}, "balancers": {n: _balancer(n) for n in _BALANCERS}}
  names = {alias.lower(): (kind, name) for kind, name, aliases in _names() for alias in aliases}
  if options.name.lower() not in names:
    near = [names[match][1] for match in difflib.get_close_matches(options.name.lower(), names, n=3)]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    raise ValueError(f"there is no method or balancer {options.name!r}{hint} `kdflax methods` lists them".strip())
  kind, name = names[options.name.lower()]
  return _method(name, full=True) if kind == "method" else _balancer(name, full=True)


def text(found: dict[str, Any]) -> str:
  """For a terminal."""
  if "name" in found:
    return _in_full(found)
  rows = [(name, entry["title"], entry["needs"]) for name, entry in found["methods"].items()]
  weighers = [(name, entry["solves"], entry["reads"]) for name, entry in found["balancers"].items()]
  return "\n".join([
    _table("METHODS of distillation", ("name", "what it is", "needs"), rows),
    "",
    _table("BALANCERS of several tasks", ("name", "what it solves", "reads"), weighers),
    "",
    "`kdflax methods NAME` says more: formula, arguments, paper, the published weight.",
  ])  # fmt: skip


_BALANCERS = balancing.CATALOGUE


def _names() -> list[tuple[str, str, list[str]]]:
  """(kind, name, what it may be called by) of each entry; the entry's own name counts before that of a function."""
  found = [("balancer", name, [e.function.__name__]) for name, e in _BALANCERS.items()]
  found += [("method", name, [e.loss.__name__, *_function(e)]) for name, e in reversed(methods.CATALOGUE.items())]
  own = [("balancer", name, [name]) for name in _BALANCERS] + [("method", name, [name]) for name in methods.CATALOGUE]
  return [*found, *own]


def _function(entry: methods.Entry) -> list[str]:
  """The function of `kdflax.methods` that is called after this method; those for any loss are called after none."""
  given = entry.function
  return [given.__name__] if given is not None and not given.__name__.startswith("of_") else []


def _method(name: str, *, full: bool = False) -> dict[str, Any]:
  entry = methods.CATALOGUE[name]
  short = {"title": entry.title, "loss": f"kdflax.losses.{entry.loss.__name__}", "needs": entry.needs}
  if not full:
    return short
  function = entry.function
  sources = [f"[{letter}] is {methods.SOURCES[letter]}" for letter in entry.source.split(", ") if letter]
  return {
    "name": name,
    "kind": "method",
    **short,
    "method": None if function is None else _call(function),
    "published": f"{entry.published}{'; ' if sources else ''}{', '.join(sources)}",
    "paper": entry.paper,
    "signature": _call(entry.loss),
    "documentation": inspect.getdoc(entry.loss) or "",
  }


def _call(function: Callable[..., Any]) -> str:
  """How a function is called: its public name, its arguments and their defaults."""
  package = ".".join(function.__module__.split(".")[:2])
  signature = inspect.signature(function)
  bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
  arguments = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
  return f"{package}.{function.__name__}{arguments}"


def _balancer(name: str, *, full: bool = False) -> dict[str, Any]:
  entry = _BALANCERS[name]
  function = f"kdflax.balancing.{entry.function.__name__}"
  short = {"function": function, "solves": entry.solves.replace("`", ""), "reads": entry.reads, "when": entry.when}
  if not full:
    return short
  told = {"published": entry.setting or "nothing to set", "keeps": entry.state.replace("`", "")}
  signature = _call(entry.function)
  documentation = inspect.getdoc(entry.function) or ""
  return {"name": name, "kind": "balancer", **short, **told, "signature": signature, "documentation": documentation}


def _in_full(found: dict[str, Any]) -> str:
  body = ("signature", "documentation")
  facts = {key: value for key, value in found.items() if key not in (*body, "name", "kind") and value is not None}
  width = max(map(len, facts))
  lines = [f"{found['name']} ({found['kind']})", ""]
  for key, value in facts.items():
    indent = " " * (width + 4)
    lines += textwrap.wrap(value, _width(), initial_indent=f"  {key:{width}}  ", subsequent_indent=indent)
  return "\n".join([*lines, "", found["signature"], "", textwrap.indent(found["documentation"], "  ")])


def _table(title: str, heads: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> str:
  """Three columns; what does not fit into the terminal is cut between words."""
  columns = list(zip(heads, *rows, strict=True))
  first, second = (max(map(len, column)) for column in columns[:2])
  second = min(second, (_width() - first) // 2)
  third = _width() - first - second - 4
  cut = lambda words, width: textwrap.shorten(words, width, placeholder=" ...")
  shown = [
    f"{name:{first}}  {cut(what, second):{second}}  {cut(last, third)}".rstrip() for name, what, last in [heads, *rows]
  ]
  return "\n".join([title, "", *shown])


def _width() -> int:
  return min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
