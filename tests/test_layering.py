"""Who may import whom, how long a module may be, and that what is public is documented."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys

import pytest

import kdflax

ROOT = pathlib.Path(kdflax.__file__).parents[1]
MODULES = sorted((ROOT / "kdflax").rglob("*.py"))
PACKAGES = ["kdflax", *sorted(f"kdflax.{m.name}" for m in pkgutil.iter_modules(kdflax.__path__) if m.ispkg)]

# Everything may stand on the ground floor, which stands on itself.
GROUND = ("kdflax.model", "kdflax.files", "kdflax.numerics", "kdflax.extras")
# What else the modules of a layer may import of kdflax: prefixes of module names. "kdflax.losses" allows all below it.
MAY_IMPORT = {
  "model": (),
  "files": (),
  "extras": (),
  "numerics": (),
  "losses": ("kdflax.losses",),
  "coupling": ("kdflax.coupling",),
  "balancing": ("kdflax.balancing",),
  "merging": ("kdflax.merging",),
  "data": ("kdflax.data",),
  "models": ("kdflax.models",),
  "objectives": (),
  "methods": ("kdflax.methods", "kdflax.losses", "kdflax.models", "kdflax.objectives"),
  "training": ("kdflax.training", "kdflax.objectives", "kdflax.balancing"),
  "teachers": ("kdflax.teachers", "kdflax.objectives"),
  "export": ("kdflax.export",),
  "command": (
    "kdflax.command",
    "kdflax.__version__",
    "kdflax.methods",
    "kdflax.balancing",
    "kdflax.teachers",
    "kdflax.training",
  ),
  "__main__": ("kdflax.command",),
}
PURE = {"jax", "numpy", "optax", "chex", "kdflax"} | sys.stdlib_module_names


def _layer(path):
  return path.relative_to(ROOT / "kdflax").parts[0].removesuffix(".py")


def _imports(path):
  """(module, names or None) of every import statement that runs, in functions as well."""
  tree = ast.parse(path.read_text())
  typing_only = {
    id(child)
    for node in ast.walk(tree)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for statement in node.body
    for child in ast.walk(statement)
  }
  for node in ast.walk(tree):
    if id(node) in typing_only:
      continue
    if isinstance(node, ast.Import):
      yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
      yield node.module, [alias.name for alias in node.names]


def _modules_used(path):
  """Full names: `from kdflax import losses` uses kdflax.losses, not all of kdflax."""
  for module, names in _imports(path):
    yield from ([f"kdflax.{name}" for name in names] if module == "kdflax" and names else [module])


def _relative(paths):
  return [str(path.relative_to(ROOT)) for path in paths]


def test_every_part_of_kdflax_has_a_rule():
  assert {_layer(path) for path in MODULES} - {"__init__"} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("path", MODULES, ids=_relative(MODULES))
def test_a_module_imports_only_what_its_layer_may(path):
  layer, used = _layer(path), list(_modules_used(path))
  assert not [name for name in used if name.split(".")[0] in ("experiments", "benchmarks", "tests")]
  if layer != "__init__":
    inside = lambda name, allowed: name == allowed or name.startswith(allowed + ".")
    own = [name for name in used if name.split(".")[0] == "kdflax"]
    wrong = [name for name in own if not any(inside(name, allowed) for allowed in (*GROUND, *MAY_IMPORT[layer]))]
    assert not wrong, f"{layer} may import {MAY_IMPORT[layer]}, not {wrong}"
    private = [name for name in own if any(re.match(r"_(?!_)", part) for part in name.split("."))]
    assert not [name for name in private if name.split(".")[1] != layer], "nobody imports another's private module"
  if layer != "models":
    assert not [name for name in used if name.split(".")[0] == "flax"], "only models imports flax"
  if layer in ("model", "numerics", "losses", "coupling", "balancing", "merging", "objectives"):
    assert {name.split(".")[0] for name in used} <= PURE


def test_the_reader_of_imports_sees_every_kind(tmp_path):
  """A rule is worth what its reader sees."""
  path = tmp_path / "module.py"
  path.write_text(
    "from typing import TYPE_CHECKING\nimport flax.nnx as nnx\nfrom kdflax import losses\n"
    "if TYPE_CHECKING:\n  from kdflax.models import Model\ndef f():\n  from kdflax.data.arrays import check\n"
  )
  assert set(_modules_used(path)) == {"typing", "flax.nnx", "kdflax.losses", "kdflax.data.arrays"}


def test_modules_stay_short():
  """About 400 lines: beyond that a module holds two ideas."""
  paths = [*MODULES, *(ROOT / "experiments").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
  lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
  assert {name: length for name, length in lengths.items() if length > 420} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_is_documented(package):
  module = importlib.import_module(package)
  public = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
  assert module.__doc__
  callables = {name: value for name, value in public.items() if inspect.isroutine(value) or inspect.isclass(value)}
  undocumented = [name for name, value in callables.items() if not (value.__doc__ or "").strip()]
  assert package == "kdflax" or public
  # A NamedTuple or dataclass without a docstring shows its signature instead.
  assert not undocumented + [name for name, value in callables.items() if value.__doc__.startswith(f"{name}(")]


def test_lists_of_public_names_are_sorted_and_whole():
  for package in PACKAGES[1:]:
    module = importlib.import_module(package)
    public = set(module.__all__)
    assert len(public) == len(module.__all__)
    named = {
      name
      for path_module, names in _imports(pathlib.Path(module.__file__))
      if path_module.startswith("kdflax") and names
      for name in names
    }
    assert public == {name for name in named if not name.startswith("_")}, package
