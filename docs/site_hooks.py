"""What MkDocs does not do by itself: pages made from the code, a navigation of all pages, formulas without scripts.

`mkdocs build --strict` calls it (see mkdocs.yml); everything here reads the checkout and nothing else.
"""

import pathlib
import posixpath
import re
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "build" / "notebooks"  # written by docs/run_notebooks.py
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
  """Adds the pages that are made from the code, and puts every page in the navigation."""
  sections = {name: pages for entry in config.nav for name, pages in entry.items()}
  named = {page for pages in sections.values() for page in pages}
  for name in ("examples.md", "changelog.md"):
    files.append(File.generated(config, name, content={"examples.md": _examples, "changelog.md": _changelog}[name]()))
  for path in sorted((ROOT / "benchmarks" / "results").glob("*.*")):
    if path.suffix in (".md", ".svg", ".png"):
      files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
  for name, text in _reference().items():
    files.append(File.generated(config, name, content=text))
    sections["Reference"].append(name)
  for path in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
    made = NOTEBOOKS / f"{path.stem}.md"
    if not made.is_file():
      raise PluginError(f"{made} is missing: run python -m docs.run_notebooks before (make docs does)")
    files.append(File.generated(config, f"notebooks/{path.stem}.md", abs_src_path=str(made)))
    for picture in sorted(NOTEBOOKS.glob(f"{path.stem}_files/*")):
      files.append(File.generated(config, f"notebooks/{path.stem}_files/{picture.name}", abs_src_path=str(picture)))
    sections["Notebooks"].append(f"notebooks/{path.stem}.md")
  placed = named | set(sections["Reference"]) | set(sections["Notebooks"])
  for file in sorted(files.documentation_pages(), key=lambda file: file.src_uri):
    if file.src_uri not in placed:  # a new page of docs/ is found without being listed
      sections["Results" if "/" in file.src_uri else "Topics"].append(file.src_uri)
  config.nav[:] = [entry for entry in config.nav if next(iter(entry.values()))]
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
  """Makes links that leave docs/ lead to a page of the site, or to a file of the repository; a dead one is an error."""
  folder = posixpath.dirname(_origin(page.file.src_uri))

  def mended(match: re.Match[str]) -> str:
    target = match[2]
    if ":" in target or target.startswith("/"):
      return match[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    if path.startswith("docs/") and not path.endswith(".py"):  # MkDocs checks it
      where = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(page.file.src_uri) or ".")
      return f"{match[1]}{where}{match[3]}"
    if not (ROOT / path).exists():
      raise PluginError(f"{page.file.src_uri} links to {target}, and there is no {path}")
    inside = _inside(path)
    if inside is not None:
      where = posixpath.relpath(inside.split("#")[0], posixpath.dirname(page.file.src_uri) or ".")
      return f"{match[1]}{where}{('#' + inside.split('#')[1] + ')') if '#' in inside else match[3]}"
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{match[1]}{config.extra['repository']}/{kind}/main/{path}{match[3]}"

  parts = _CODE.split(markdown)
  return "".join(part if i % 2 else _LINK.sub(mended, part) for i, part in enumerate(parts))


def on_page_content(html: str, **_: Any) -> str:
  """Turns TeX into MathML, which browsers draw without a script or a font from elsewhere."""
  html = re.sub(
    r'<div class="arithmatex">\\\[(.*?)\\\]</div>', lambda m: convert(_plain(m[1]), display="block"), html, flags=re.S
  )
  return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: convert(_plain(m[1])), html, flags=re.S)


def _plain(tex: str) -> str:
  return tex.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()


def _origin(page: str) -> str:
  """Where the text of a page stands in the repository."""
  if page.startswith("benchmarks/"):
    return f"benchmarks/results/{page.split('/')[1]}"
  return {"changelog.md": "CHANGELOG.md", "examples.md": "examples/README.md"}.get(page, f"docs/{page}")


def _inside(path: str) -> str | None:
  """The page of the site that shows a file of the repository, if one does."""
  parts = path.split("/")
  if parts[0] == "examples":
    return "examples.md" if len(parts) == 1 else f"examples.md#{parts[1].removesuffix('.py')}"
  if parts[:2] == ["benchmarks", "results"]:
    return f"benchmarks/{parts[2] if len(parts) > 2 else 'features.md'}"
  return {"CHANGELOG.md": "changelog.md", "README.md": "index.md"}.get(path)


def _changelog() -> str:
  return (ROOT / "CHANGELOG.md").read_text()


def _examples() -> str:
  """All examples with their text: a page to read, not to click through."""
  shown = [
    "# Examples\n\nEach is a program of at most 60 lines, run by a test: `python -m examples.distil` in a clone."
  ]
  for path in sorted((ROOT / "examples").glob("[a-z]*.py")):
    text = path.read_text()
    shown.append(f"## {path.stem} {{ #{path.stem} }}\n\n```python\n{text.rstrip()}\n```")
  return "\n\n".join(shown) + "\n"


def _reference() -> dict[str, str]:
  """A page for each package: every public name, rendered from its docstring."""
  package = griffe.load("kdflax", search_paths=[str(ROOT)])
  pages = {"reference/index.md": ""}
  rows = []
  for name in [*sorted(package.exports or []), "training.metrics"]:
    module = package[name]
    names = public(module)
    about = (module.docstring.value if module.docstring else "").strip()
    blocks = [f"::: kdflax.{name}.{member}" for member in names]
    pages[f"reference/{name}.md"] = "\n\n".join([f"# kdflax.{name}", _as_prose(about), *blocks]) + "\n"
    rows.append(f"| [`kdflax.{name}`]({name}.md) | {about.splitlines()[0]} | {len(names)} |")
  table = "| package | what it is | public names |\n| --- | --- | --- |\n" + "\n".join(rows)
  pages["reference/index.md"] = (
    "# Reference\n\nEvery public name, from its docstring. What a loss promises beyond that is in the"
    f" [contract](../contract.md).\n\n{table}\n"
  )
  return pages


def public(module: Any) -> list[str]:
  """The public names of a package by its `__all__`, of a module what is defined in it; no modules."""
  if module.exports:
    return [name for name in module.exports if not _is_module(module[name])]
  defined = [name for name, member in module.members.items() if not member.is_alias and not name.startswith("_")]
  return [name for name in defined if not module[name].is_attribute or module[name].docstring]


def _is_module(member: Any) -> bool:
  return bool(member.target.is_module if member.is_alias else member.is_module)


def _as_prose(text: str) -> str:
  """Indented parts of a module's docstring are code."""
  parts = [f"```python\n{_bare(part)}\n```" if part.startswith("    ") else part for part in text.split("\n\n")]
  return "\n\n".join(parts)


def _bare(part: str) -> str:
  return "\n".join(line[4:] for line in part.splitlines())
