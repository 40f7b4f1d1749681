"""`kdflax inspect PATH`: what a folder or file of kdflax is, how large, and whether it is as it was written.

It reads only: a run may go on beside it.
"""

import argparse
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from kdflax.files import load_variables
from kdflax.numerics.trees import name_of

_MOST = 12  # lines of a list on a terminal


def report(options: argparse.Namespace) -> dict[str, Any]:
  """What is at the path, and `faults` for what is not as it was written.

  Raises:
    ValueError: if nothing is there, or nothing that kdflax wrote.
  """
  path = pathlib.Path(options.path)
  if not path.exists():
    raise ValueError(f"{path} does not exist")
  kind, read = _kind(path)
  found: dict[str, Any] = {"what": kind, "path": str(path), "size": _size(path), "faults": []}
  try:
    read(path, found)
  except Exception as error:  # a damaged file may end any reader
    found["faults"].append(_brief(error))
  return found


def text(found: dict[str, Any]) -> str:
  """For a terminal."""
  head = f"{found['path']}: {found['what']}, {_bytes(found['size'])}"
  shown = [
    line for key, value in found.items() if key not in ("what", "path", "size", "faults") for line in _lines(key, value)
  ]
  verdict = [f"DAMAGED: {fault}" for fault in found["faults"]] or ["every digest was verified: it is as it was written"]
  return "\n".join([head, *shown, *verdict])


def _kind(path: pathlib.Path) -> tuple[str, Callable[[pathlib.Path, dict[str, Any]], None]]:
  """What a path is by its files, and the function that reads it."""
  if path.is_file():
    if path.suffix == ".safetensors":
      return "variables of a model", _variables
  elif (path / "config.json").is_file():
    return "a run", _run
  elif (path / "_CHECKPOINT_METADATA").is_file():
    return "a checkpoint", _checkpoint
  elif _steps(path):
    return "the checkpoints of a run", _checkpoints
  elif (path / "manifest.json").is_file():
    is_export = any(path.glob("*.stablehlo"))
    return ("an exported student", _export) if is_export else ("a teacher record", _record)
  elif any(path.glob("*/manifest.json")) and not any(path.glob("*/*.stablehlo")):
    return "teacher records", _record
  elif (path / "variables.safetensors").is_file():
    return "an export that is not complete (manifest.json is missing)", _incomplete
  raise ValueError(
    f"{path} is nothing that kdflax wrote: no run (config.json), checkpoint, teacher record or export (manifest.json),"
    " and no .safetensors file of variables"
  )


def _run(path: pathlib.Path, found: dict[str, Any]) -> None:
  found["settings"] = json.loads((path / "config.json").read_text())
  if (path / "changes.json").is_file():
    found["settings changed"] = [change["changed"] for change in json.loads((path / "changes.json").read_text())]
  log = path / "metrics.jsonl"
  if log.is_file():
    rows = [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    found["rows of metrics"] = len(rows)
    if rows:
      found["last row"] = json.loads(rows[-1])
  phases = sorted({step.parent for step in _all_steps(path)})
  if not phases:
    found["checkpoints"] = "none yet"
  for phase in phases:
    part: dict[str, Any] = {"faults": []}
    _checkpoints(phase, part)
    found[phase.relative_to(path).as_posix()] = part["steps"]
    found["faults"] += [f"{phase.relative_to(path)}: {fault}" for fault in part["faults"]]
  for manifest in sorted(path.rglob("manifest.json")):
    kind, read = _kind(manifest.parent)
    part = {"faults": []}
    try:
      read(manifest.parent, part)
    except Exception as error:
      part["faults"].append(_brief(error))
    name = manifest.parent.relative_to(path)
    found[str(name)] = kind
    found["faults"] += [f"{name}: {fault}" for fault in part["faults"]]


def _checkpoints(path: pathlib.Path, found: dict[str, Any]) -> None:
  found["steps"] = {}
  for step in _steps(path):
    part: dict[str, Any] = {}
    try:
      _checkpoint(step, part)
      found["steps"][step.name] = part.get("metrics") or "whole"
    except Exception as error:
      found["steps"][step.name] = "damaged"
      found["faults"].append(f"step {step.name}: {_brief(error)}")


def _checkpoint(path: pathlib.Path, found: dict[str, Any]) -> None:
  from kdflax.training import read_checkpoint

  restored = read_checkpoint(path)
  found["step"] = restored.step
  if restored.metrics:
    found["metrics"] = restored.metrics
  found["saved with it"] = restored.extra
  found["arrays"] = _arrays(restored.arrays)


def _variables(path: pathlib.Path, found: dict[str, Any]) -> None:
  from kdflax.files import digest

  params, state = load_variables(path)
  found["digest"] = digest((params, state))
  found["arrays"] = _arrays({"params": params, "state": state})


def _export(path: pathlib.Path, found: dict[str, Any]) -> None:
  manifest = json.loads((path / "manifest.json").read_text())
  found["reads"], found["gives"] = manifest["arguments"]["batch"], manifest["results"]
  found["runs on"], found["digest"] = manifest["platforms"], manifest["variables"]
  if hashlib.sha256((path / "model.stablehlo").read_bytes()).hexdigest() != manifest["module"]:
    found["faults"].append("model.stablehlo is not what was exported (its SHA-256 differs); export the model again")
  params, state = load_variables(path / "variables.safetensors", digest=manifest["variables"])
  found["arrays"] = _arrays({"params": params, "state": state})


def _incomplete(path: pathlib.Path, found: dict[str, Any]) -> None:
  del path
  found["faults"].append("manifest.json is missing: export the model again")


def _record(path: pathlib.Path, found: dict[str, Any]) -> None:
  from kdflax import teachers

  for name, summary in teachers.inspect(path).items():
    found[name] = summary
    if summary["complete"]:
      teachers.open_record(path if (path / "manifest.json").is_file() else path / name)  # verifies it
    else:
      found["faults"].append(f"{name} was interrupted; the same command continues it")


def _steps(path: pathlib.Path) -> list[pathlib.Path]:
  """The checkpoints in a folder, oldest first."""
  steps = [file.parent for file in path.glob("*/_CHECKPOINT_METADATA") if file.parent.name.isdigit()]
  return sorted(steps, key=lambda step: int(step.name))


def _all_steps(path: pathlib.Path) -> list[pathlib.Path]:
  return [file.parent for file in path.rglob("_CHECKPOINT_METADATA") if file.parent.name.isdigit()]


def _arrays(tree: Any) -> dict[str, str]:
  """Types and shapes by path."""
  import jax

  return {name_of(path, "/"): f"{x.dtype}{list(x.shape)}" for path, x in jax.tree.leaves_with_path(tree)}


def _size(path: pathlib.Path) -> int:
  files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
  return sum(file.stat().st_size for file in files)


def _bytes(size: int) -> str:
  return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _brief(error: Exception) -> str:
  said = " ".join(str(error).split())
  return said if isinstance(error, ValueError | OSError) and said else f"{type(error).__name__}: {said}"[:300]


def _lines(key: str, value: Any) -> list[str]:
  """A value under its name; the first few lines of a long one."""
  if not isinstance(value, dict) or not value:
    return [f"  {key}: {value if isinstance(value, str | int | float) else json.dumps(value, default=str)}"]
  inner = [line for name, part in value.items() for line in _lines(str(name), part)]
  more = [f"    and {len(inner) - _MOST} more (--json has all)"] if len(inner) > _MOST else []
  return [f"  {key}:", *(f"  {line}" for line in inner[:_MOST]), *more]
