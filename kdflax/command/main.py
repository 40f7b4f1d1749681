"""The arguments of the command `kdflax`, and its exit codes."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from kdflax import __version__

GOOD, FAULT, BAD_INPUT = 0, 1, 2
_EXIT_CODES = "exit codes: 0 all is well; 1 something is damaged or does not fit; 2 the arguments or the path are wrong"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command.

  Args:
    arguments: of the command line; those of the process by default.

  Returns:
    The exit code: 0 if all is well, 1 if something is damaged or does not fit, 2 if the arguments or the path are
    wrong.
  """
  options = _parser().parse_args(arguments)
  try:
    module: Any = importlib.import_module(options.module)  # a subcommand costs what it needs, and no more
    found = module.report(options)
    print(json.dumps(found, indent=2) if options.json else module.text(found))
    return FAULT if found.get("faults") else GOOD
  except BrokenPipeError:  # of `kdflax methods | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return GOOD
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "kdflax", description="Knowledge distillation and joint learning as pure JAX functions.", epilog=_EXIT_CODES
  )
  parser.add_argument("--version", action="version", version=f"kdflax {__version__}")
  commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
  add = lambda name, what: commands.add_parser(name, help=what, description=what, epilog=_EXIT_CODES)

  doctor = add("doctor", "versions, devices, what is slow or missing and the line that mends it")
  methods = add("methods", "the catalogue of methods and balancers, or all about one of them")
  methods.add_argument("name", nargs="?", help="of a method, a balancer, or a function, such as rkd_angle or UPGrad")
  inspect = add("inspect", "what a run, checkpoint, teacher record or export is, and whether it is whole")
  inspect.add_argument("path", help="a folder, or a file of variables")
  for command, name in ((doctor, "doctor"), (methods, "methods"), (inspect, "inspection")):
    command.set_defaults(module=f"kdflax.command.{name}")
    command.add_argument("--json", action="store_true", help="for programs")
  return parser
