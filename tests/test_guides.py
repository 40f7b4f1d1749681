"""Every Python block of the documentation runs: the blocks of a page one after another, in one namespace."""

import os
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Pages whose blocks another test runs, because they need a beginning of their own, and which test that is.
ELSEWHERE = {
  "docs/recipes.md": "tests/test_schemes.py",
  "docs/export.md": "tests/test_export.py",
  "docs/balancing.md": "tests/balancing/test_balancing_page.py",
  "docs/sweeps.md": "tests/experiments/test_sweeps.py",
  "docs/language.md": "tests/test_language_page.py",
}
PAGES = {
  str(path.relative_to(ROOT)): blocks
  for path in sorted((ROOT / "docs").rglob("*.md"))
  if (blocks := BLOCK.findall(path.read_text()))
}


@pytest.mark.parametrize("page", sorted(PAGES.keys() - ELSEWHERE.keys()))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names: dict = {}
  for number, block in enumerate(PAGES[page]):
    exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_pages_that_are_run_elsewhere_are_named_there():
  for page, test in ELSEWHERE.items():
    assert page in PAGES and pathlib.Path(page).name in (ROOT / test).read_text(), page


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))])
def test_links_of_a_page_lead_somewhere(page):
  made = {
    "examples.md",
    "changelog.md",
    "reference",
    "benchmarks",
  }  # of docs/, when the site is built, which checks them
  missing = []
  for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", (ROOT / page).read_text()):
    target = pathlib.Path(os.path.normpath((ROOT / page).parent / link)).relative_to(ROOT)
    if not (ROOT / target).exists() and target.parts[1] not in made:
      missing.append(link)
  assert missing == []
