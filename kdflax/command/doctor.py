"""`kdflax doctor`: versions, devices, and what is slow or missing with the line that mends it."""

import argparse
import configparser
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kdflax import __version__

_PACKAGE = pathlib.Path(__file__).parents[1]
_HARDWARE = ("cuda13", "tpu")  # extras that only some machines can use
_TOOLS = ("dev", "peers", "docs", "release")  # of those who work on kdflax itself
_CACHE = "~/.cache/kdflax"  # of `training.use_compile_cache`
_MALLOC = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483648"


class Requirement(NamedTuple):
  """A package that kdflax asks for: its name, the extras and the range of versions asked of it."""

  name: str
  extras: str
  versions: str

  @classmethod
  def parse(cls, line: str) -> "Requirement":
    """Of a line such as `jax[cuda13]>=0.10,<0.13`."""
    found = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?\s*\(?([^;)]*)", line.strip())
    if found is None:
      raise ValueError(f"{line!r} is no requirement")
    name, extras, versions = found.groups(default="")
    return cls(name, extras, versions.strip())


def report(options: argparse.Namespace) -> dict[str, Any]:
  """What there is, `faults` that keep kdflax from working, and `advice` with the line that mends each."""
  del options
  wanted = requirements()
  core = {need.name: _version(need.name) for need in wanted[""]}
  faults = [_misfit(need) for need in wanted[""] if _misfit(need)]
  devices, trouble = _devices()
  faults += [trouble] if trouble else []
  extras = {name: _missing(name, wanted) for name in wanted if name and name not in (*_HARDWARE, *_TOOLS)}
  on_accelerator = any(device["platform"] != "cpu" for device in devices)
  return {
    "kdflax": __version__,
    "at": str(_PACKAGE),
    "python": platform.python_version(),
    "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    "packages": {**core, "jaxlib": _version("jaxlib")},
    "devices": devices,
    "compile cache": _compile_cache(os.environ),
    "extras": {name: missing or "complete" for name, missing in extras.items()},
    "faults": faults,
    "advice": [*_advice(os.environ, on_accelerator), *_of_extras(extras)],
  }


def text(found: dict[str, Any]) -> str:
  """For a terminal."""
  short = lambda device: f"{device['kind']} ({device['platform']} {device['id']}{device['memory']})"
  packages = ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items())
  extras = [
    f"{name}: {'complete' if v == 'complete' else 'lacks ' + ', '.join(v)}" for name, v in found["extras"].items()
  ]
  lines = {
    "kdflax": [f"{found['kdflax']}, {found['at']}"],
    "Python": [f"{found['python']} on {found['machine']}"],
    "packages": [packages],
    "devices": [short(device) for device in found["devices"]] or ["none"],
    "compile cache": [found["compile cache"]],
    "extras": extras,
  }
  shown = [f"{title if i == 0 else '':15}{line}" for title, group in lines.items() for i, line in enumerate(group)]
  for title, remarks in (("to be mended:", found["faults"]), ("to be faster, or to have more:", found["advice"])):
    shown += ["", title, *(f"  - {remark}" for remark in remarks)] if remarks else []
  return "\n".join(
    [*shown, "", "kdflax cannot work here as it is" if found["faults"] else "all that kdflax needs is here"]
  )


def requirements() -> dict[str, list[Requirement]]:
  """What kdflax declares by extra, "" for the core: of setup.cfg in a clone, else of the installed package.

  Raises:
    ValueError: if there is neither.
  """
  clone = _PACKAGE.parent / "setup.cfg"
  if clone.is_file():
    file = configparser.ConfigParser()
    file.read(clone)
    groups = {"": file["options"]["install_requires"], **file["options.extras_require"]}
    lines = {extra: [line for line in text.splitlines() if line.strip()] for extra, text in groups.items()}
  else:
    try:
      declared = importlib.metadata.requires("kdflax") or []
    except importlib.metadata.PackageNotFoundError as error:
      raise ValueError("kdflax is not installed, and this is no clone: pip install kdflax") from error
    lines: dict[str, list[str]] = {"": []}
    for line in declared:
      extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
      lines.setdefault(extra.group(1) if extra else "", []).append(line)
  return {extra: [Requirement.parse(line) for line in group] for extra, group in lines.items()}


def _missing(extra: str, wanted: Mapping[str, list[Requirement]]) -> list[str]:
  """The packages of an extra that are absent or of another version, those of the extras in it as well."""
  found: list[str] = []
  for need in wanted[extra]:
    inner = [part for part in need.extras.split(",") if need.name == "kdflax" and part]
    found += [name for part in inner for name in _missing(part, wanted)]
    found += [need.name] if need.name != "kdflax" and _misfit(need) else []
  return list(dict.fromkeys(found))


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _misfit(need: Requirement) -> str | None:
  """What is wrong with the version that is installed, with the line that mends it; None if it fits."""
  version = _version(need.name)
  if version is not None and fits(version, need.versions):
    return None
  here = "is not installed" if version is None else f"is {version}, and kdflax needs {need.versions}"
  return f'{need.name} {here}: pip install "{need.name}{need.versions}"'


def fits(version: str, versions: str) -> bool:
  """Whether a version is in a range such as `>=0.10.2,<0.13`; only the numbers of a version count.

  Examples:
    >>> fits("0.12.1", ">=0.10.2,<0.13"), fits("0.13", ">=0.10.2,<0.13"), fits("1.1.414", "==1.1.414")
    (True, False, True)
  """
  compare = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
  }
  for part in filter(None, versions.replace(" ", "").split(",")):
    sign = re.match(r"[<>=!]=|[<>]", part)
    if sign is None:
      raise ValueError(f"{versions!r} is no range of versions such as '>=1.2,<2'")
    if not compare[sign.group()](*_padded(_numbers(version), _numbers(part[sign.end() :]))):
      return False
  return True


def _numbers(version: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", re.split(r"[a-zA-Z+]", version)[0])]


def _padded(left: list[int], right: list[int]) -> tuple[list[int], list[int]]:
  """1.2 is 1.2.0."""
  length = max(len(left), len(right))
  return left + [0] * (length - len(left)), right + [0] * (length - len(right))


def _devices() -> tuple[list[dict[str, str]], str | None]:
  """The devices that JAX sees, and why it sees none."""
  try:
    import jax

    return [_device(device) for device in jax.devices()], None
  except Exception as error:  # a driver that does not fit may raise anything
    return [], f"JAX finds no device ({' '.join(str(error).split())[:200]}); JAX_PLATFORMS=cpu makes do without one"


def _device(device: Any) -> dict[str, str]:
  try:
    limit = (device.memory_stats() or {}).get("bytes_limit")
  except Exception:  # not every backend tells
    limit = None
  memory = f", {limit / 2**30:.0f} GiB for JAX" if limit else ""
  return {"kind": device.device_kind, "platform": device.platform, "id": str(device.id), "memory": memory}


def _compile_cache(environment: Mapping[str, str]) -> str:
  """The folder of JAX's compile cache, and what is in it."""
  folder = pathlib.Path(environment.get("JAX_COMPILATION_CACHE_DIR", _CACHE)).expanduser()
  files = [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
  if not files:
    return f"{folder}, empty: the first run fills it (training.main_guard, training.use_compile_cache)"
  return f"{folder}, {len(files)} files of {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _advice(environment: Mapping[str, str], on_accelerator: bool) -> Iterable[str]:
  if not on_accelerator and environment.get("OPENBLAS_NUM_THREADS") != "1":
    yield "decompositions on a CPU (kdsvd, nuclear_norm) are several times slower: export OPENBLAS_NUM_THREADS=1"
  if not on_accelerator and sys.platform == "linux" and "malloc" not in environment.get("GLIBC_TUNABLES", ""):
    yield f"a step of large arrays, as over a vocabulary, may take twice its time: export GLIBC_TUNABLES={_MALLOC}"
  if not on_accelerator and pathlib.Path("/proc/driver/nvidia/version").exists():
    yield 'there is an NVIDIA driver, and JAX does not use it: pip install "kdflax[cuda13]"'


def _of_extras(extras: Mapping[str, list[str]]) -> Iterable[str]:
  for name, missing in extras.items():
    if missing:
      yield f'without {", ".join(missing)} there is no extra {name!r}: pip install "kdflax[{name}]"'
