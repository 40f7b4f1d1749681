"""docs/style.md, where a check can enforce it: messages, references, the order of docstrings, high precision."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted((ROOT / "kdflax").rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
SECTIONS = ("Args:", "Returns:", "Raises:", "Examples:", "Reference:")
# Full names, title in quotes, year, number. What follows says where this function differs from other code.
PAPER = re.compile(r'Reference: (?P<authors>[^"]+), "(?P<title>[^"]+)", (?P<rest>.+)$', re.DOTALL)
PLACE = re.compile(r"(?!arXiv)(?:[^.;]+ )?(?:19|20)\d\d(?:, arXiv \d{4}\.\d{4,5})?\b")


def _end(node):
  """The last piece of text in a message, or None where it ends with a value."""
  if isinstance(node, ast.Constant) and isinstance(node.value, str):
    return node.value
  if isinstance(node, ast.JoinedStr) and node.values:
    return _end(node.values[-1])
  return _end(node.right) if isinstance(node, ast.BinOp) else None


def messages(tree):
  """(line, end of the message) of every exception raised with a text."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
      text = _end(node.exc.args[0])
      if text is not None:
        yield node.lineno, text


def docstrings(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
      text = ast.get_docstring(node)
      if text:
        yield getattr(node, "name", "the module"), text


def references(text):
  """The paragraphs of a docstring that name a paper."""
  return [part for part in text.split("\n\n") if part.startswith("Reference")]


def fault(reference):
  """What is wrong with a reference, or None."""
  found = PAPER.match(" ".join(reference.split()))
  if not found:
    return 'write: Reference: First Last and First Last, "Title", 2020, arXiv 2001.00001.'
  if re.search(r"\bet al\b", reference):
    return "name all authors"
  alone = [name for name in re.split(r", | and ", found["authors"]) if " " not in name.strip()]
  if alone:
    return f"write full names, not {alone}"
  if "arXiv:" in reference or not PLACE.match(found["rest"]):
    return "after the title: year, arXiv 2001.00001, or the place and the year"
  return None


@each_module
def test_messages_have_no_final_full_stop(path):
  assert [(line, text) for line, text in messages(ast.parse(path.read_text())) if text.rstrip().endswith(".")] == []


@each_module
def test_references_have_one_form(path):
  found = {
    name: fault(reference) for name, text in docstrings(ast.parse(path.read_text())) for reference in references(text)
  }
  assert {name: wrong for name, wrong in found.items() if wrong} == {}


@each_module
def test_sections_of_a_docstring_stand_in_one_order(path):
  for name, text in docstrings(ast.parse(path.read_text())):
    headings = [line.split(" ")[0] for line in text.splitlines() if line.startswith(SECTIONS)]
    assert headings == sorted(headings, key=SECTIONS.index), f"{name}: {headings}"


@each_module
def test_high_precision_has_one_spelling(path):
  text = path.read_text()
  assert not re.search(r"precision=[\"']|(?<!jax\.)lax\.Precision", text), "write precision=jax.lax.Precision.HIGHEST"


def test_the_checks_see_what_they_forbid():
  """A rule is worth what its reader sees."""
  tree = ast.parse('raise ValueError(f"a {b}" + f"c {d}.")\nraise ValueError("fine")\nraise KeyError(name)')
  assert list(messages(tree)) == [(1, "."), (2, "fine")]
  good = 'Reference: Ada Lovelace and Alan M. Turing, "On Numbers", 2001, arXiv 2001.00001. Theirs divides by two.'
  assert fault(good) is None and fault(good.replace("2001, arXiv 2001.00001", "NeurIPS 2001")) is None
  for bad in (
    good.replace("arXiv 2001", "arXiv:2001"),
    good.replace("Ada Lovelace and Alan M. Turing", "Lovelace and Turing"),
    good.replace("Ada Lovelace and Alan M. Turing", "Ada Lovelace et al."),
    good.replace('"', ""),
    good.replace("2001, arXiv 2001.00001", "arXiv 2001.00001"),
    "Reference:\n  Ada Lovelace, On Numbers, 2001.",
  ):
    assert fault(bad), bad
