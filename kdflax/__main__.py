"""`python -m kdflax` is the command `kdflax`."""

import sys

from kdflax.command import main

if __name__ == "__main__":
  sys.exit(main())
