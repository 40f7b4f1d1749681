"""Tests of the documentation site: collected where the extra `docs` is installed (`make docs browse` does both)."""

from importlib.util import find_spec

collect_ignore_glob = [] if all(map(find_spec, ("mkdocs", "selenium"))) else ["test_*.py"]
