"""Copies tables and pictures of finished runs into the documentation: `python -m docs.keep_results runs/distill ...`.

They go to docs/<name of the run>/, where a dash is a folder: those of runs/glyphs-distill go to docs/glyphs/distill/.
The table of the run `distill` stands in README.md as well.
"""

import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).parent.parent
BEGIN, END = "<!-- results of make distill: written by `python -m docs.keep_results` -->", "<!-- end of results -->"


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
  if run.name == "distill":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    table = (run / "results.md").read_text().split("\n\n", 1)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
  for name in sys.argv[1:]:
    main(pathlib.Path(name))
