"""The generated pages are those that the code would generate now."""

import pathlib
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
