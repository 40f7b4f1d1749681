"""Copies tables and pictures of finished runs into the documentation: `python -m docs.keep_results runs/distill ...`.

They go to docs/<name of the run>/, where a dash is a folder: those of runs/glyphs-distill go to docs/glyphs/distill/.
The table of the run `distill` and the first rows of `fuse` stand in README.md as well.
"""

import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).parent.parent
MARK, END = "<!-- results of {}: written by `python -m docs.keep_results` -->", "<!-- end of results -->"
IN_README = {"distill": "make distill", "fuse": "experiments.fuse"}  # run: what its place in the README is called
_BALANCED = re.compile(r"^\| composite ")  # rows too many for the README


def main(run: pathlib.Path) -> None:
  """Copies the tables and pictures of a run.

  Raises:
    ValueError: if the run has no table: it is not finished.
  """
  if not (run / "results.md").is_file():
    raise ValueError(f"{run} has no results.md; finish the run first")
  kept = ROOT.joinpath("docs", *run.name.split("-"))
  kept.mkdir(parents=True, exist_ok=True)
  for file in [*run.glob("*.png"), *run.glob("*.md")]:
    shutil.copy(file, kept / file.name)
  if run.name in IN_README:
    write_into_readme(IN_README[run.name], (run / "results.md").read_text().split("\n\n", 1)[1])


def write_into_readme(name: str, table: str) -> None:
  """Puts a table in its place in README.md, without the rows of single balancers."""
  readme, mark = ROOT / "README.md", MARK.format(name)
  before, rest = readme.read_text().split(mark)
  kept = "\n".join(line for line in table.splitlines() if not _BALANCED.match(line) or line.startswith("| composite |"))
  readme.write_text(f"{before}{mark}\n\n{kept}\n\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
  for name in sys.argv[1:]:
    main(pathlib.Path(name))
