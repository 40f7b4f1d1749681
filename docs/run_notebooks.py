"""Executes docs/notebooks and writes them as pages with pictures: `python -m docs.run_notebooks`.

A notebook is a Python script in jupytext's percent format, so that a diff is read like one. It is executed again when
it or kdflax changed; the pages are in build/notebooks, where docs/site_hooks.py finds them, each with its .ipynb.
"""

import hashlib
import os
import pathlib
import time

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "notebooks"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(path: pathlib.Path) -> None:
  """Executes one notebook, if it is not done, and writes its page; an error in a cell ends it."""
  seal, content = TARGET / f"{path.stem}.sha256", _content(path)
  if seal.is_file() and seal.read_text() == content:
    return
  began = time.perf_counter()
  notebook = jupytext.read(path)
  notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
  os.environ.update(ENVIRONMENT)
  NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
  exporter = MarkdownExporter()
  resources = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
  text, resources = exporter.from_notebook_node(notebook, resources)
  (TARGET / f"{path.stem}_files").mkdir(parents=True, exist_ok=True)
  for name, picture in resources["outputs"].items():
    (TARGET / name).write_bytes(picture)
  nbformat.write(notebook, TARGET / f"{path.stem}_files" / f"{path.stem}.ipynb")
  link = f"\n\n[This page as a notebook]({path.stem}_files/{path.stem}.ipynb)\n"
  (TARGET / f"{path.stem}.md").write_text(text.rstrip() + link)
  seal.write_text(content)
  print(f"{path.stem}: {time.perf_counter() - began:.0f} s")


def _content(path: pathlib.Path) -> str:
  """What the page depends on: the notebook and the library."""
  sources = [path, *sorted((ROOT / "kdflax").rglob("*.py"))]
  return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


if __name__ == "__main__":
  for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
    run(notebook)
