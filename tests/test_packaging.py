"""What a user installs: the parts of `import kdflax`, what the core and each extra bring, and that it is declared."""

import ast
import configparser
import importlib
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import venv

import pytest

import kdflax
from kdflax.extras import extra

ROOT = pathlib.Path(__file__).parents[1]
METADATA = configparser.ConfigParser()
METADATA.read(ROOT / "setup.cfg")
# Distributions that are imported by another name.
IMPORTED_AS = {
  "litert-converter": "litert_converter",
  "dm-pix": "dm_pix",
  "orbax-checkpoint": "orbax",
  "scikit-learn": "sklearn",
  "pillow": "PIL",
  "absl-py": "absl",
}
# Imports every module of an installed kdflax; what is not installed cannot be imported.
IMPORT_ALL = """
import importlib, pkgutil, kdflax
modules = [module.name for module in pkgutil.walk_packages(kdflax.__path__, "kdflax.")]
for name in modules:
  importlib.import_module(name)
print(len(modules), kdflax.__version__, kdflax.losses.hint.__name__, kdflax.__path__[0])
"""


def _declared(*extras):
  """Names under which the core and some extras are imported."""
  options = METADATA["options.extras_require"]
  lines = METADATA["options"]["install_requires"].splitlines()
  for name in extras:
    lines += options[name].splitlines()
  names = set()
  for line in filter(None, map(str.strip, lines)):
    distribution, inner = re.match(r"([\w-]+)(?:\[(\w+)\])?", line).groups()
    names |= _declared(inner) if distribution == "kdflax" else {IMPORTED_AS.get(distribution, distribution)}
  return names


def _imported(folder):
  """{third-party package: modules that import it}, wherever in the module."""
  found = {}
  for path in sorted((ROOT / folder).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"kdflax", "experiments"}:
        found.setdefault(name, []).append(str(path.relative_to(ROOT)))
  return found


def test_the_parts_come_when_they_are_named():
  parts = {module.name for module in pkgutil.iter_modules(kdflax.__path__) if not module.name.startswith("_")}
  assert parts == set(kdflax.__all__) <= set(dir(kdflax))
  assert kdflax.losses.hint is importlib.import_module("kdflax.losses").hint
  with pytest.raises(AttributeError, match=r"'kdflax' has no attribute 'loses'; there are balancing, .* losses, "):
    _ = kdflax.loses
  script = "import kdflax, sys; assert 'jax' not in sys.modules; kdflax.losses.hint; assert 'flax' not in sys.modules"
  subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_static_readers_see_the_same_parts():
  tree = ast.parse((ROOT / "kdflax" / "__init__.py").read_text())
  (names,) = [
    [alias.name for alias in node.names] for node in ast.walk(tree) if getattr(node, "module", "") == "kdflax"
  ]
  assert names == kdflax.__all__ == sorted(kdflax.__all__)


def test_the_version_stands_in_one_place():
  assert METADATA["metadata"]["version"] == "attr: kdflax.__version__"
  assert re.fullmatch(r"\d+\.\d+\.\d+", kdflax.__version__)


# Installed beside an extra with --no-deps, since pip would not agree to what it asks for; the message says so.
BESIDE = {"onnx-export": {"jax2onnx"}}


def test_what_is_imported_is_declared():
  options = METADATA["options.extras_require"]
  hardware, tools = {"cuda13", "tpu"}, {"dev", "peers", "docs", "release"}
  everything = _declared(*set(options) - hardware - tools).union(*BESIDE.values())
  undeclared = {name: files for name, files in _imported("kdflax").items() if name not in everything}
  assert not undeclared, f"declare these in setup.cfg: {undeclared}"
  undeclared = {name: files for name, files in _imported("experiments").items() if name not in _declared("experiments")}
  assert not undeclared, f"declare these in setup.cfg, under experiments: {undeclared}"


def test_what_the_core_declares_is_imported():
  """A package that nothing imports is not asked of a user."""
  assert _declared() - {"jaxlib"} <= _imported("kdflax").keys()


def test_an_import_outside_the_core_names_its_extra():
  """In kdflax an import of a package that the core does not bring stands in `with extra(name, ...)`, which does."""
  core = _declared()
  for path in sorted((ROOT / "kdflax").rglob("*.py")):
    tree, named = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
      call = node.items[0].context_expr if isinstance(node, ast.With) else None
      if (
        isinstance(call, ast.Call)
        and getattr(call.func, "id", "") == "extra"
        and isinstance(call.args[0], ast.Constant)
      ):
        brought = _declared(call.args[0].value) | BESIDE.get(call.args[0].value, set())
        packages = {name for inner in node.body for name in _third_party(inner)}
        assert packages <= brought, f"{path.name}: the extra {call.args[0].value} does not bring {packages - brought}"
        named |= packages
    outside = {name for name in _third_party(tree) if name not in core} - named
    assert not outside, f"{path.relative_to(ROOT)} imports {outside}, which the core does not bring: with extra(...)"


def _third_party(tree):
  for node in ast.walk(tree):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) else []
    yield from {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"kdflax"}


def test_the_core_needs_nothing_of_the_extras():
  """Every module of kdflax, while the packages of the extras cannot be imported."""
  absent = sorted(_declared("experiments") - _declared() - {"scipy", "absl"})  # jax and orbax bring these two
  hidden = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
  subprocess.run([sys.executable, "-c", hidden + IMPORT_ALL], cwd=ROOT, check=True, capture_output=True)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(ImportError, match=r'^a Grain pipeline needs grain, .*: pip install "kdflax\[data\]"$'):
    kdflax.data.grain_batches({}, 1, seed=0)
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(ImportError, match=r"^the data set 'digits' needs sklearn, "):
    kdflax.data.digits()


def test_a_package_that_is_there_but_damaged_speaks_for_itself():
  with pytest.raises(ImportError, match=r"^cannot import name 'no_such_name'"), extra("data", "a test"):
    from math import no_such_name  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]


def test_every_pin_satisfies_its_range():
  """requirements.txt is the whole environment, with each package that setup.cfg names."""
  from packaging.requirements import Requirement
  from packaging.utils import canonicalize_name

  pins = dict(
    line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")
  )
  pins = {canonicalize_name(name): version for name, version in pins.items()}
  options = METADATA["options.extras_require"]
  lines = [*METADATA["options"]["install_requires"].splitlines(), *options["dev"].splitlines()]
  lines += options["experiments"].splitlines() + options["data"].splitlines() + options["parquet"].splitlines()
  for requirement in map(Requirement, filter(None, lines)):
    if requirement.name != "kdflax":
      assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.slow
def test_a_wheel_with_its_core_dependencies_imports_whole(tmp_path):
  """In an environment of its own, away from this checkout; needs a package index."""
  run = lambda *command: (
    subprocess.run(
      [*map(str, command)], cwd=tmp_path, check=True, capture_output=True, text=True, env=_clean_environment()
    ).stdout
  )
  venv.create(tmp_path / "venv", with_pip=True)
  python = tmp_path / "venv" / "bin" / "python"
  pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet")
  run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
  (wheel,) = tmp_path.glob("*.whl")
  run(*pip, "install", wheel)
  count, version, loss, where = run(python, "-c", IMPORT_ALL).split()
  assert int(count) > 50 and version == kdflax.__version__ and loss == "hint"
  assert pathlib.Path(where).is_relative_to(tmp_path) and (pathlib.Path(where) / "py.typed").is_file()
  installed = run(python, "-m", "pip", "list", "--format=freeze").lower()
  assert "scipy" in installed  # jax brings it; the others are absent
  assert not [name for name in ("grain", "scikit-learn", "matplotlib", "tyro", "tqdm") if f"{name}==" in installed]


def _clean_environment():
  return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
