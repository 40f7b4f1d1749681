"""The generated pages are those that the code would generate now."""

import pathlib
import re
import runpy

import pytest

from kdflax import losses

GENERATOR = pathlib.Path(__file__).parents[1] / "docs" / "generate_methods.py"


@pytest.fixture
def methods():
  return runpy.run_path(str(GENERATOR))


def test_methods_page_is_current(methods):
  assert methods["PAGE"].read_text() == methods["page"](), "run `python -m docs.generate_methods`"


def test_every_loss_has_its_row(methods):
  text = methods["PAGE"].read_text()
  for name in methods["entries"]():
    assert text.count(f"| `{name}` |") == 1, name


def test_a_public_loss_without_an_entry_is_an_error(methods, monkeypatch):
  monkeypatch.setattr(losses, "unheard_of", lambda student, teacher: student, raising=False)
  monkeypatch.setattr(losses, "__all__", [*losses.__all__, "unheard_of"])
  with pytest.raises(ValueError, match="no entry for unheard_of"):
    methods["page"]()


def test_a_docstring_without_formula_or_reference_is_an_error(methods):
  def silent():
    """Does something."""

  with pytest.raises(ValueError, match="silent has no formula"):
    methods["formula"](silent)
  with pytest.raises(ValueError, match="silent must say: Reference"):
    methods["paper"](silent)


def test_the_contract_names_every_test_that_checks_it():
  """Every test of the contract suite stands under a rule, and every test that a rule names exists."""
  root = GENERATOR.parents[1]
  page = (root / "docs" / "contract.md").read_text()
  named = set(re.findall(r"`(test_\w+)`", page))
  suite = set(
    re.findall(r"^def (test_\w+)", (root / "tests" / "losses" / "test_contract.py").read_text(), re.MULTILINE)
  )
  layering = set(re.findall(r"^def (test_\w+)", (root / "tests" / "test_layering.py").read_text(), re.MULTILINE))
  assert suite - {"test_every_public_loss_has_a_case"} <= named, "put it under its rule in docs/contract.md"
  assert named <= suite | layering
  assert re.findall(r"^## (\d)\. ", page, re.MULTILINE) == list("123456789")
