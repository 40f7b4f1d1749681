"""The settings of the zoo's methods: what there is to tune, what was found, and the file that keeps it."""

import inspect
import json
import pathlib
from typing import Any

import numpy as np

from experiments import sweeps
from kdflax import methods, training

# All methods for two classifiers that leave the student as it is and train it beside the labels.
METHODS = {name: entry for name, entry in methods.CATALOGUE.items() if entry.build and entry.hard}
BASELINE = "baseline"
SETTINGS = pathlib.Path(__file__).with_name("zoo.json")  # what --tune found, by data set and method
GRID = (0.1, 1.0, 10.0, 100.0)  # of weights
SHARES = (0.001, 0.01, 0.1, 1.0)  # of a published weight
TEMPERATURES = (1.0, 4.0)
RATES = (1.0, 2.0)  # of the learning rate


def setting_of(config: Any, name: str) -> tuple[dict[str, float], str]:
  """Returns the setting of a method, and where its weight comes from."""
  published = METHODS[name].weight if name in METHODS else None
  found = read_settings(config).get(config.dataset, {}).get(name)
  if found:
    here = (tuple(found["pair"]), found["steps"]) == (config.pair, config.student_steps)
    tuned_on = "tuned" if here else f"tuned on {' to '.join(found['pair'])}, {found['steps']} steps"
    setting = {key: float(found[key]) for key in ("weight", "temperature", "rate") if key in found}
    return setting, tuned_on if published is None else f"{tuned_on}, {published:g} published"
  if name == BASELINE:
    return {}, ""
  return ({"weight": 1.0}, "untuned") if published is None else ({"weight": published}, "published")


def read_settings(config: Any) -> dict[str, dict[str, Any]]:
  """Returns the tuned settings by data set and method, each with what it was tuned on; none if there is no file.

  Raises:
    ValueError: if the file is not one that `write_settings` wrote.
  """
  file = pathlib.Path(config.weights)
  if not file.is_file():
    return {}
  try:
    tuned = json.loads(file.read_text())
    for method, entry in (item for methods in tuned.values() for item in methods.items()):
      numbers = [float(entry[key]) for key in ("temperature", "rate") if key in entry]
      if method != BASELINE and not float(entry["weight"]) >= 0:
        raise ValueError("a weight below 0")
      if not int(entry["steps"]) >= 1 or not all(number > 0 for number in numbers):
        raise ValueError("no steps, or a temperature or learning rate that is not positive")
      " to ".join(entry["pair"])
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"weights: {file} is not a file that --tune writes ({type(error).__name__}: {error}); name another"
    ) from error
  return tuned


def grid_of(config: Any, name: str) -> dict[str, np.ndarray]:
  """The settings to try: weights, temperatures where the method has one, and learning rates."""
  rates = {"rate": tuple(share * config.learning_rate for share in RATES)}
  if name == BASELINE:
    return sweeps.grid(**rates)
  entry = METHODS[name]
  weights = GRID if entry.weight is None else tuple(entry.weight * share for share in SHARES)
  takes = inspect.signature(entry.function or entry.loss).parameters
  inside = "settings" in takes and "temperature" in inspect.signature(entry.loss).parameters
  warm = entry.needs.startswith("logits") and ("temperature" in takes or inside)
  return sweeps.grid(weight=weights, **({"temperature": TEMPERATURES} if warm else {}), **rates)


def write_settings(config: Any, found: dict[str, Any]) -> None:
  """Adds tuned settings to the file, with what they were tuned on."""
  file, tuned = pathlib.Path(config.weights), read_settings(config)
  note = {"pair": config.pair, "steps": config.student_steps, "seeds": min(config.tune_seeds, config.seeds)}
  found = {name: entry | note for name, entry in found.items()}
  tuned[config.dataset] = tuned.get(config.dataset, {}) | found
  training.write_atomically(file, json.dumps(tuned, indent=1) + "\n")
