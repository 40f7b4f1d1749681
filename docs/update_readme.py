"""Copies table and pictures of a finished run into the documentation: `python -m docs.update_readme runs/distill`."""

import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).parent.parent
BEGIN, END = "<!-- results of make distill: written by `python -m docs.update_readme` -->", "<!-- end of results -->"


def main(run: pathlib.Path) -> None:
  """Replaces what stands between the two marks of README.md, and the pictures."""
  readme = ROOT / "README.md"
  before, rest = readme.read_text().split(BEGIN)
  after = rest.split(END)[1]
  table = (run / "results.md").read_text().split("\n\n", 1)[1]
  readme.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}")
  pictures = ROOT / "docs" / "distill"
  pictures.mkdir(exist_ok=True)
  for picture in run.glob("*.png"):
    shutil.copy(picture, pictures / picture.name)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
