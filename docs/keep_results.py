"""Copies tables and pictures of finished runs into the documentation: `python -m docs.keep_results runs/distill ...`.

They go to docs/<name of the run>/, where a dash is a folder: those of runs/zoo-tune go to docs/zoo/tune/.
The table of the run `distill` and the first rows of `fuse` stand in README.md as well.
"""

import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).parent.parent
MARK, END = "<!-- results of {}: written by `python -m docs.keep_results` -->", "<!-- end of results -->"
IN_README = {"distill": "make distill", "fuse": "experiments.fuse"}  # run: what its place in the README is called
_LEFT_OUT = ("NLL", "bytes", "seconds", "µs")  # columns that begin so: for the page of the run, too much for the README


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
  """Puts a table in its place in README.md, without the rows of single balancers and without some columns."""
  readme, mark = ROOT / "README.md", MARK.format(name)
  before, rest = readme.read_text().split(mark)
  rows = [line.split("|")[1:-1] for line in table.strip().splitlines()]
  shown = [index for index, title in enumerate(rows[0]) if not title.strip().startswith(_LEFT_OUT)]
  kept = [row for row in rows if not row[0].startswith(" composite ") or row[0] == " composite "]
  lines = ["|" + "|".join(row[index] for index in shown) + "|" for row in kept]
  readme.write_text(f"{before}{mark}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
  for name in sys.argv[1:]:
    main(pathlib.Path(name))
