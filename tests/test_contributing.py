"""The pages for contributors name what exists: files, targets, tests, versions."""

import pathlib
import re

import pytest

import kdflax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/contract.md", "docs/style.md")
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_links_lead_somewhere(page):
  text = (ROOT / page).read_text()
  links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
  missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
  paths = set(re.findall(r"\b(?:kdflax|tests|docs|experiments|benchmarks|examples)/[\w/]+(?:\.\w+|/)", text))
  missing += [path for path in sorted(paths) if not (ROOT / path).exists()]
  assert missing == []


def test_every_target_says_what_it_does_and_those_named_exist():
  targets = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
  assert targets == set(re.findall(r"^(\w+):.*  ## \S", MAKEFILE, re.MULTILINE))
  named = {target for page in PAGES for target in re.findall(r"\bmake ([a-z]+)\b`", (ROOT / page).read_text())}
  assert named <= targets


def test_the_quick_subset_names_what_exists():
  for path in re.findall(r"tests/[\w/.]+", MAKEFILE):
    assert (ROOT / path).exists(), path


def test_workflows_run_what_anybody_can_run():
  import yaml

  read = lambda path: yaml.safe_load(path.read_text())
  workflows = {path.stem: read(path) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
  commands = {
    name: [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    for name, flow in workflows.items()
  }
  assert ".ci/run" in commands["ci"] and {".ci/run", "make release"} <= set(commands["release"])
  targets = set(re.findall(r"^(\w+):.*  ## \S", MAKEFILE, re.MULTILINE))
  assert {c.split()[1] for all_of in commands.values() for c in all_of if c.startswith("make ")} <= targets
  for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[abmn]*.yml"):
    assert {"name", "description", "body"} <= read(form).keys(), form


def test_the_citation_has_the_version():
  assert f"version: {kdflax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
  assert re.search(rf"^## {re.escape(kdflax.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
