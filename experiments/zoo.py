"""Many distillation methods on one teacher-student pair, all with the same budget, ranked.

A teacher is trained for each seed and frozen; then the same student learns once without it (baseline) and once with
each method, from the same batches, for the same number of steps, with the same optimizer. The table ranks methods by
test accuracy, says which differences to the baseline are beyond the noise of the seeds, and what a step costs.

On glyphs, the default, both are convolutional networks that keep the positions of their last maps, and the methods are
a choice of each kind; `--methods all` compares all. Weight, temperature (of methods that have one) and learning rate
are the best on the validation split, found by `--tune`: all settings of a method are one program, in which the teacher
is asked once for all of them. The learning rate of the baseline is tuned alike. They are kept in experiments/zoo.json.
For data that nobody tuned on, the weight is the published one of `methods.CATALOGUE`, or 1 if there is none. The table
names the source of each, and the published weight beside a tuned one: those were chosen for other networks and a
hundred times as many steps. Where a paper compares several layers, every stage counts; where it compares one, that is
the middle stage for hints and the last one for maps, and the embedding for relations.

    python -m experiments.zoo                                  some methods on glyphs; results in runs/zoo
    python -m experiments.zoo --smoke                          half a minute, for a look
    python -m experiments.zoo --methods kl_soft_targets crd    other methods
    python -m experiments.zoo --tune --run runs/zoo-tune       finds the settings, and draws what it found
    python -m experiments.zoo --dataset digits                 all methods on 8 x 8 digits
    python -m experiments.zoo --dataset cifar100 --path DIR --pair resnet56 resnet20

Killed at any moment, the same command continues it and ends with the same bits.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, phases, pictures, sweeps
from experiments.networks import check_dataset, forwarded
from experiments.zoo_pairs import PUBLISHED, RECIPES, classifier, draw_augmented, load, pair_of, published
from experiments.zoo_settings import BASELINE, METHODS, SETTINGS, grid_of, read_settings, setting_of, write_settings
from kdflax import methods, models, training
from kdflax.objectives import Term

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class Config(common.Devices):
  __doc__ = f"""Settings of the experiment; they are bound to the run directory.

  Three pairs on CIFAR-100 come with published numbers, which the table repeats beside its own:

      python -m experiments.zoo --dataset cifar100 --path DIR --pair resnet56 resnet20
      python -m experiments.zoo --dataset cifar100 --path DIR --pair resnet32x4 resnet8x4
      python -m experiments.zoo --dataset cifar100 --path DIR --pair resnet110 resnet32

  top-1 accuracy in percent, the mean of five runs for most methods:
{PUBLISHED}
  They are of the last or the best epoch, depending on the source.
  """

  run: str = "runs/zoo"
  """Run directory: made, or continued if it holds a run with the same settings."""
  dataset: str = "glyphs"
  """Data set: glyphs, digits or cifar100."""
  path: str = ""
  """Folder with the files of the data set, if it is read from files."""
  cifar: str = ""
  """Old form of `--dataset cifar100 --path`; goes with version 0.3."""
  pair: tuple[str, str] | None = None
  """Teacher and student: names such as resnet56 or convnet-16-32; by default that of the data set."""
  methods: tuple[str, ...] = ()
  """Methods by name, or `all`; by default those of the data set."""
  seeds: int = 5
  """Paired repetitions, trained together by vmap."""
  teacher_steps: int | None = None
  """Updates of a teacher; by default those of the data set, as for the next three."""
  student_steps: int | None = None
  """Updates of a student."""
  batch_size: int | None = None
  """Images in a batch."""
  learning_rate: float | None = None
  """First learning rate."""
  held_out: int = 0
  """Training images to keep for validation, which --tune needs, if the data set is read from files; published runs
  train on all."""
  save_every: int = 500
  """Updates between checkpoints."""
  tune: bool = False
  """Find the settings on the validation split, and stop."""
  tune_seeds: int = 1
  """Seeds for each setting that --tune tries."""
  weights: str = str(SETTINGS)
  """File of tuned settings."""
  accept_changes: bool = False
  """Continue a run although its settings differ."""
  smoke: bool = False
  """A short run: two seeds, a few steps, the baseline and two methods."""

  def checked(self) -> "Config":
    """Returns the settings that will be used.

    Raises:
      ValueError: if one makes no sense.
    """
    config = forwarded(self)
    if self.smoke:
      run = "runs/zoo-smoke" if self.run == Config.run else self.run
      small = {"methods": ("kl_soft_targets", "hint"), "seeds": 2, "teacher_steps": 60, "student_steps": 30}
      config = dataclasses.replace(config, run=run, **small)
    check_dataset(config, tuple(RECIPES))
    config = common.filled(config, RECIPES[config.dataset])
    chosen = (
      tuple(METHODS) if config.methods == ("all",) else config.methods or RECIPES[config.dataset].chosen or METHODS
    )
    unknown = set(chosen) - set(METHODS)
    if unknown:
      raise ValueError(f"methods has no {sorted(unknown)}; there are all, {', '.join(METHODS)}")
    config = dataclasses.replace(config, methods=tuple(name for name in METHODS if name in chosen))
    counts = ("seeds", "tune_seeds", "teacher_steps", "student_steps", "batch_size", "save_every")
    common.check_numbers(config, at_least_one=counts, positive=("learning_rate",))
    if config.tune and config.path and not config.held_out:
      raise ValueError("tune needs a validation split: set held_out, for instance to 5000")
    if config.weights != Config.weights and not config.tune and not pathlib.Path(config.weights).is_file():
      raise ValueError(f"weights: there is no file {config.weights}; --tune writes one")
    read_settings(config)
    for name in config.pair or ():
      classifier(name, config.dataset)
    return config


def main(config: Any) -> None:
  """Runs the experiment, or what is left of it."""
  config = config.checked()
  splits = load(config)
  images = len(splits["train"]["label"])
  if config.batch_size > images:
    raise ValueError(f"batch_size={config.batch_size} is larger than the training data: {images} images")
  pair = pair_of(*networks(config), splits["train"])
  found = {name: setting_of(config, name) for name in (*config.methods, BASELINE)}
  bound = None if config.tune else {name: setting for name, (setting, _) in found.items()}
  with phases.session(config, method_settings=bound) as session:
    bench = make_bench(session, splits, pair)
    if config.tune:
      tune(bench)
      return
    report(bench, {name: train_student(bench, name, setting) for name, (setting, _) in found.items()}, found)


class Bench(NamedTuple):
  """What all methods share."""

  session: phases.Session
  feed: phases.Feed
  student: models.Model
  teacher: models.Model
  frozen_teacher: Any  # (params, state), each leaf with an axis for the seeds
  teacher_accuracy: list[float]
  pair: methods.Pair
  labels: np.ndarray  # of the training images
  validate: Any  # a tester of the student, or None
  test: Any


class Student(NamedTuple):
  """A student of one method."""

  accuracy: list[float]  # on the test split, one for each seed
  cost: phases.Cost
  extra: int  # parameters of connectors, which are thrown away after training


def networks(config: Any) -> tuple[models.Model, models.Model]:
  """The student and the teacher."""
  teacher, student = (classifier(name, config.dataset) for name in config.pair)
  return student, teacher


def make_bench(session: phases.Session, splits: Any, pair: methods.Pair) -> Bench:
  """Trains the teachers and gathers what all methods share."""
  config, arrays = session.config, splits["train"]
  recipe = RECIPES[config.dataset]
  student, teacher = networks(config)
  sample = functools.partial(draw_augmented, size=config.batch_size, shift=recipe.shift, flip=recipe.flip)
  feed = phases.Feed(itertools.repeat(phases.on_device(arrays)), sample)
  terms = {"hard": Term(cross_entropy, {"logits": "teacher.logits", "labels": "batch.label"})}
  learner = training.make_learner(
    {"teacher": teacher}, terms, optimizer(config, config.teacher_steps, config.learning_rate), sample=sample
  )
  phase = phases.train(session, "teacher", learner, feed, config.teacher_steps)
  frozen = phases.variables_of(phase.state, "teacher")
  return Bench(
    session,
    feed,
    student,
    teacher,
    frozen,
    phases.tester(teacher, splits["test"])(frozen)["accuracy"],
    pair,
    arrays["label"],
    phases.tester(student, splits["validation"]) if "validation" in splits else None,
    phases.tester(student, splits["test"]),
  )


def optimizer(config: Config, num_steps: int, learning_rate: Any) -> optax.GradientTransformation:
  """SGD as the CIFAR-100 tables are made with, its three drops at 150, 180 and 210 of 240 epochs."""
  drops = {int(num_steps * epoch / 240): 0.1 for epoch in (150, 180, 210)}
  share = optax.piecewise_constant_schedule(1.0, drops)
  rate = lambda step: learning_rate * share(step)
  return optax.chain(
    optax.clip_by_global_norm(RECIPES[config.dataset].clip),
    optax.add_decayed_weights(5e-4),
    optax.sgd(rate, momentum=0.9),
  )


def program(bench: Bench, name: str, setting: Mapping[str, Any]) -> tuple[training.Learner, dict[str, models.Model]]:
  """The learner of a method and its connectors; the baseline has none.

  Args:
    bench: what methods share.
    name: of the method, or `baseline`.
    setting: `weight`, `temperature` and `rate`, which may be traced; what is not there is the default.
  """
  config, entry, connectors = bench.session.config, METHODS.get(name), {}
  networks = {"student": bench.student, "teacher": bench.teacher}
  labels = {"logits": "student.logits", "labels": "batch.label"}
  terms = {"hard": Term(cross_entropy, labels, 1.0 if entry is None else entry.hard)}
  if entry is not None and entry.build is not None:
    grown, weight = config.student_steps / 12, setting.get("weight", 1.0)
    growing = lambda step: weight * jnp.minimum((step + 1) / grown, 1.0)
    given = settings_of(bench, name) | {key: setting[key] for key in ("temperature",) if key in setting}
    method = entry.build(bench.pair, weight=growing if entry.warm_up else weight, **given)
    connectors = dict(method.models)
    terms |= {f"distil/{term}": value for term, value in method.terms.items()}
  descent = optimizer(config, config.student_steps, setting.get("rate", config.learning_rate))
  learner = training.make_learner(networks | connectors, terms, descent, sample=bench.feed.sample)
  return learner, connectors


def settings_of(bench: Bench, name: str) -> dict[str, Any]:
  """What a method is given beside the pair. All train beside the labels, so that they have the same budget."""
  if name in ("hint", "fsp", "activation_boundary", "factor_transfer"):
    return {"joint": True}
  if name == "similarity_distribution":
    return {"queue": min(len(bench.labels), 65536)}
  if name == "crd":
    examples = len(bench.labels)
    width, negatives = (128, 16384) if examples > 16384 else (32, 64)
    memory = {"num_examples": examples, "labels": bench.labels, "index": "batch.row"}
    return memory | {"width": width, "negatives": negatives}
  return {}


def train_student(bench: Bench, name: str, setting: Mapping[str, float]) -> Student:
  """Trains the students of a method, one for each seed, tests them and measures a step."""
  config = bench.session.config
  learner, connectors = program(bench, name, setting)
  phase = phases.train(
    bench.session,
    f"students, {name}",
    learner,
    bench.feed,
    config.student_steps,
    frozen={"teacher": bench.frozen_teacher},
    evaluate=validation(bench),
  )
  extra = {key: phase.state.params[key] for key in connectors}
  cost = phases.cost(bench.session, phase, f"students, {name}", seeds=config.seeds)
  accuracy = bench.test(phases.variables_of(phase.state, "student"))["accuracy"]
  return Student(accuracy, cost, models.count_parameters(extra) // config.seeds)


def validation(bench: Bench) -> Any:
  """What a phase evaluates on the way: nothing without a validation split."""
  if bench.validate is None:
    return None
  return lambda state: {"validation/accuracy": bench.validate(phases.variables_of(state, "student"))["accuracy"]}


def tune(bench: Bench) -> None:
  """Tries a grid of settings for every method and for the baseline, each grid as one program."""
  config = bench.session.config
  seeds = min(config.tune_seeds, config.seeds)
  found = {}
  for name in (BASELINE, *config.methods):
    found[name] = tune_one(bench, name, grid_of(config, name), seeds)
    print(f"{name}: {found[name]}")
  write_settings(config, found)
  report_tuning(bench.session.directory, f"{' to '.join(config.pair)} on {config.dataset}", found)


def report_tuning(directory: pathlib.Path, what: str, found: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes the best settings as a table and draws all that were tried."""
  tried = {name: entry["validation accuracy"] for name, entry in found.items()}
  rows = [
    {
      "method": name,
      **{key: f"{found[name][key]:g}" if key in found[name] else "" for key in ("weight", "temperature", "rate")},
      "validation accuracy (%)": f"{100 * max(row['accuracy'] for row in tried[name]):.1f}",
      "settings tried": len(tried[name]),
    }
    for name in tried
  ]
  print(common.write_table(directory, "results", f"The best settings of a sweep, {what}", rows, found))
  pictures.sweeps(directory, tried, BASELINE)


def tune_one(bench: Bench, name: str, grid: Mapping[str, np.ndarray], seeds: int) -> dict[str, Any]:
  """Returns the best setting of a method, and the validation accuracy of each."""
  config = bench.session.config
  learner = sweeps.sweep(lambda setting: program(bench, name, setting)[0], grid)
  keys = jax.random.split(jax.random.key(0), config.seeds)[:seeds]
  frozen = {"teacher": jax.tree.map(lambda leaf: leaf[:seeds], bench.frozen_teacher)}
  phase = phases.train(
    bench.session, f"tuning, {name}", learner, bench.feed, config.student_steps, keys=jnp.copy(keys), frozen=frozen
  )
  every = phases.variables_of(phase.state, "student")  # [seeds, settings, ...]
  together = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), every)
  means = np.asarray(bench.validate(together)["accuracy"]).reshape(seeds, -1).mean(axis=0)
  tried = [sweeps.setting_at(grid, index) for index in range(len(means))]
  return tried[int(means.argmax())] | {
    "validation accuracy": [
      setting | {"accuracy": round(float(mean), 4)} for setting, mean in zip(tried, means, strict=True)
    ]
  }


def report(bench: Bench, students: dict[str, Student], found: dict[str, tuple[dict[str, float], str]]) -> None:
  """Writes the ranked table and the pictures."""
  config = bench.session.config
  baseline = students[BASELINE].accuracy
  ranked = sorted(students.items(), key=lambda item: -np.mean(item[1].accuracy))
  results = [
    {
      "method": name,
      "title": METHODS[name].title if name in METHODS else BASELINE,
      **{key: found[name][0].get(key) for key in ("weight", "temperature", "rate")},
      "source": found[name][1],
      "accuracy": student.accuracy,
      "difference": None if name == BASELINE else np.subtract(student.accuracy, baseline).tolist(),
      "extra parameters": student.extra,
      **student.cost._asdict(),
    }
    for name, student in ranked
  ]
  known = published(config.pair) if config.dataset == "cifar100" else {}
  rows = [row(rank, result, known) for rank, result in enumerate(results, start=1)]
  teacher = common.plus_minus(bench.teacher_accuracy)
  title = (
    f"Distillation methods, {' to '.join(config.pair)} on {config.dataset}: mean and 95% interval over {config.seeds}"
    f" paired seeds of {config.student_steps} steps; the teacher has {teacher} %"
  )
  document = {"teacher": bench.teacher_accuracy, "students": results}
  print(common.write_table(bench.session.directory, "results", title, rows, document))
  pictures.ranking(bench.session.directory, results, bench.teacher_accuracy)
  if bench.validate is not None:
    pictures.learning_curves(bench.session.directory, "validation/accuracy", BASELINE)


def row(rank: int, result: dict[str, Any], known: dict[str, float]) -> dict[str, Any]:
  """One line of the table for people."""
  difference = result["difference"]
  beyond = "" if difference is None else common.beyond_noise(difference)
  shown = {
    "rank": rank,
    "method": result["title"],
    "loss": result["method"],
    "weight": "" if result["weight"] is None else f"{result['weight']:g} ({result['source']})",
    "temperature": "" if result["temperature"] is None else f"{result['temperature']:g}",
    "rate": "" if result["rate"] is None else f"{result['rate']:g}",
    "test accuracy (%)": common.plus_minus(result["accuracy"]),
    "difference to baseline": "" if difference is None else common.plus_minus(difference, sign="+"),
    "beyond noise": beyond,
    "ms a step": f"{result['milliseconds']:.2f}",
    "MFLOP a step": f"{result['megaflops']:.1f}",
    "MB a step": f"{result['megabytes']:.1f}",
    "extra parameters": result["extra parameters"],
  }
  return shown | ({"published (%)": known.get(result["method"], "")} if known else {})


if __name__ == "__main__":
  common.run_command_line(main, Config)
