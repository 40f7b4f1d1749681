"""Fuses joint learning and distillation: one small student for two tasks, from teachers of both.

On overlaid digits, two digits overlap in each image; to read the left one and to read the right one are two tasks. On
CIFAR-100 the tasks are its 100 fine and its 20 coarse classes. A student learns

- independent: a network of its own for each task, and no teacher;
- independent, taught: the same, each network with the soft targets of a teacher of its task;
- joint: one encoder shared by both tasks, and no teacher;
- multi-task teacher: as joint, with the soft targets of one teacher of both tasks;
- single-task teachers: as joint, with the soft targets of two teachers of one task each;
- composite: as the last, with the teachers' embeddings through an adapter for each task (feature) and their distances
  (relational) as well. Hard, soft, feature and relational terms of a task are a row; the rows are added, or balanced.

The setting is chosen so that there is something to transfer: teachers are wide and learn from all labels, students are
narrow and see a tenth (digits) or a fifth (CIFAR-100) of the labels, and the other images without them. It answers
whether a student that must be small and has few labels gains from teachers that had many; it says nothing about
students with all labels.

Every seed has teachers, a choice of labels and an order of batches of its own, shared by the methods, so that
differences are paired. Weights of the terms are 1, not tuned. The test split is looked at once, at the end. What the
teachers say is recorded once, about the images as they are, so images are not augmented.

    python -m experiments.fuse                       a quarter of an hour on two CPU cores; results in runs/fuse
    python -m experiments.fuse --smoke               half a minute, for a look
    python -m experiments.fuse --balancers UPGrad    one balancer, in a few minutes
    python -m experiments.fuse --dataset cifar100 --path DIR

Killed at any moment, the same command continues it and ends with the same bits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, phases, pictures
from experiments.balancers import BALANCERS, NEED_THREE_TASKS
from experiments.networks import check_dataset, embedding_width, forwarded, network, read
from kdflax import data, losses, models, teachers, training
from kdflax.objectives import Term
from kdflax.training import metrics

cross_entropy = optax.softmax_cross_entropy_with_integer_labels

FOR_TWO_TASKS = tuple(name for name in BALANCERS if name not in NEED_THREE_TASKS)
BASES = ("independent", "joint", "composite")  # what the others are compared with


class Recipe(NamedTuple):
  """What a data set asks for."""

  pair: tuple[str, str]  # encoders of a teacher and of a student
  labels: int
  teacher_steps: int
  student_steps: int
  learning_rate: float


RECIPES = {
  "overlaid_digits": Recipe(("mlp-256", "mlp-16"), 200, 2000, 3000, 3e-3),
  "cifar100": Recipe(("resnet56", "resnet20"), 10_000, 80_000, 80_000, 1e-3),
}


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of the terms of each task; the hard-label cross-entropy counts 1."""

  soft: float = 1.0
  """Soft targets: T^2 KL(teacher || student)."""
  feature: float = 1.0
  """Hint: mean squared difference of the teacher's embedding and the student's, through the adapter of the task."""
  distance: float = 1.0
  """Relations: pairwise distances of the same two."""


class Method(NamedTuple):
  """What a student is and what it learns from beside the hard labels."""

  shared: bool  # one encoder for both tasks, or one for each
  teacher: str = ""  # joint or single
  terms: tuple[str, ...] = ()
  balancer: str | None = None  # of the rows, one for each task


METHODS: dict[str, Method] = {
  "independent": Method(False),
  "independent taught": Method(False, "single", ("soft",)),
  "joint": Method(True),
  "multi-task teacher": Method(True, "joint", ("soft",)),
  "single-task teachers": Method(True, "single", ("soft",)),
  "composite": Method(True, "single", ("soft", "feature", "distance")),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the experiment; they are bound to the run directory."""

  run: str = "runs/fuse"
  """Run directory: made, or continued if it holds a run with the same settings."""
  dataset: str = "overlaid_digits"
  """Data set: overlaid_digits or cifar100."""
  path: str = ""
  """Folder with the files of the data set, if it is read from files."""
  cifar: str = ""
  """Old form of `--dataset cifar100 --path`; goes with version 0.3."""
  pair: tuple[str, str] | None = None
  """Encoders of teacher and student: names such as mlp-256, convnet-16-32 or resnet20; by default, as for the next
  four, those of the data set."""
  labels: int | None = None
  """Training images whose labels the students see; all others are used without them."""
  teacher_steps: int | None = None
  """Updates of a teacher."""
  student_steps: int | None = None
  """Updates of a student."""
  learning_rate: float | None = None
  """Peak of the cosine schedule of Adam."""
  held_out: int = 0
  """Training images to keep for validation, which only the learning curves need, if the data set is read from files."""
  methods: tuple[str, ...] = tuple(METHODS)
  """Methods to compare; differences are to those of independent, joint and composite that are among them."""
  balancers: tuple[str, ...] = FOR_TWO_TASKS
  """Balancers of the two tasks of the composite objective; without one, its rows are added."""
  seeds: int = 8
  """Paired repetitions, trained together by vmap."""
  batch_size: int = 64
  """Labelled images in a batch, and as many images for the teachers' knowledge."""
  temperature: float = 4.0
  """Temperature of the soft targets."""
  weights: Weights = Weights()
  """Weights of the terms."""
  save_every: int = 500
  """Updates between checkpoints."""
  accept_changes: bool = False
  """Continue a run although its settings differ."""
  smoke: bool = False
  """A short run: two seeds, few steps, one balancer."""

  @property
  def tasks(self) -> Mapping[str, data.Task]:
    """The tasks of the data set by name; all have classes."""
    return data.dataset(self.dataset).tasks

  def checked(self) -> "Config":
    """Returns the settings that will be used.

    Raises:
      ValueError: if one makes no sense.
    """
    config = forwarded(self)
    if self.smoke:
      run = "runs/fuse-smoke" if self.run == Config.run else self.run
      small: Any = {"methods": ("joint", "composite")}
      small |= {"balancers": ("UPGrad",), "seeds": 2, "student_steps": 40, "teacher_steps": 40, "save_every": 20}
      config = dataclasses.replace(config, run=run, **small)
    check_dataset(config, tuple(RECIPES))
    config = common.filled(config, RECIPES[config.dataset])
    counts = ("labels", "seeds", "student_steps", "teacher_steps", "batch_size", "save_every")
    common.check_numbers(config, at_least_one=counts, positive=("temperature", "learning_rate"))
    for name in config.pair:
      network(name, None)
    weights = dataclasses.asdict(config.weights)
    if any(not weight >= 0 for weight in weights.values()):
      raise ValueError(f"weights must be at least 0; got {weights}")
    if not config.methods or set(config.methods) - set(METHODS):
      raise ValueError(f"methods must be of {list(METHODS)}; got {list(config.methods)}")
    if unknown := [name for name in config.balancers if name not in FOR_TWO_TASKS]:
      raise ValueError(f"unknown balancers {unknown}; for two tasks there are {', '.join(FOR_TWO_TASKS)}")
    if config.batch_size > config.labels:
      raise ValueError(f"batch_size={config.batch_size} is larger than the labelled data: {config.labels} images")
    return config

  def compared(self) -> dict[str, Method]:
    """The methods to compare, those with a balancer last."""
    balanced = {f"composite {name}": METHODS["composite"]._replace(balancer=name) for name in self.balancers}
    return {name: METHODS[name] for name in METHODS if name in self.methods} | balanced


def main(config: Config) -> None:
  """Runs the experiment, or what is left of it."""
  config = config.checked()
  splits = load(config)
  with phases.session(config) as session:
    kinds = sorted({method.teacher for method in config.compared().values() if method.teacher})
    for kind in kinds:
      train_teacher(session, splits, kind)
    feed = student_feed(session, splits["train"], kinds)
    students = {name: train_student(session, splits, feed, name, method) for name, method in config.compared().items()}
    report(session, splits, students)


def load(config: Any) -> dict[str, Any]:
  """The splits, each with `image`, `label` by task and `index`.

  Raises:
    ValueError: if there are fewer training images than the labels that students may see, or fewer labels than classes.
  """
  splits = {name: data.by_task(arrays, config.tasks) for name, arrays in read(config).items()}
  data.with_label_budget(splits["train"], config.labels, seed=0, task=next(iter(config.tasks)))  # refuses here
  return splits


def multi_task(config: Config, encoder: str, *, shared: bool) -> models.Model:
  """A network for all tasks: one encoder for all, or one for each."""
  heads = {name: models.task_head(task.classes) for name, task in config.tasks.items()}
  network_of_bytes = network(encoder, None, data.dataset(config.dataset).normalisation)
  return (models.hard_sharing if shared else models.soft_sharing)(network_of_bytes, heads)


def optimizer(config: Any, num_steps: int) -> optax.GradientTransformation:
  """Adam along a cosine; no clipping, which would couple networks that are independent."""
  return optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))


def train_teacher(session: phases.Session, splits: Any, kind: str) -> None:
  """Trains the teachers of each seed, one of both tasks or one for each, and records them on the training images."""
  config, arrays = session.config, splits["train"]
  teacher = multi_task(config, config.pair[0], shared=kind == "joint")
  terms = {
    task: Term(cross_entropy, {"logits": f"network.logits.{task}", "labels": f"batch.label.{task}"})
    for task in config.tasks
  }
  sample = functools.partial(data.sample, size=config.batch_size)
  feed = phases.Feed(itertools.repeat(phases.on_device(arrays)), sample)
  learner = training.make_learner({"network": teacher}, terms, optimizer(config, config.teacher_steps), sample=sample)
  phase = phases.train(session, f"teachers, {kind}", learner, feed, config.teacher_steps)
  variables = phases.variables_of(phase.state, "network")
  said = phases.outputs(teacher, variables, arrays, names=("logits", "embedding"))
  said = jax.tree.map(lambda x: np.moveaxis(x, 0, 1), said)
  source = {"model": f"{kind}, {config.pair[0]}", "variables": training.digest(variables)}
  teachers.record(session.directory / "teachers" / kind, said, arrays["index"], source=source)


def student_feed(session: phases.Session, images: Any, kinds: Sequence[str]) -> phases.Feed:
  """Batches of labelled images and as many of all images, with what the teachers said about both."""
  config = session.config
  said = {kind: teachers.read_record(session.directory / "teachers" / kind, images["index"]) for kind in kinds}
  task = next(iter(config.tasks))
  labelled = [data.with_label_budget(images, config.labels, seed=s, task=task)["labelled"] for s in range(config.seeds)]
  arrays = {"images": images | {"teacher": said}, "labelled": np.stack([np.flatnonzero(rows) for rows in labelled])}
  axes = {"images": {name: None for name in images} | {"teacher": 1}, "labelled": 0}
  sample = functools.partial(phases.draw_mixed, size=config.batch_size)
  bound = {f"what {kind} teachers said": training.digest(said[kind]) for kind in kinds}
  return phases.Feed(itertools.repeat(phases.on_device(arrays)), sample, axes, bound)


def objective(config: Any, method: Method) -> tuple[dict[str, models.Model], dict[str, Term]]:
  """Returns the models and Terms of a method; a Term is named `<kind>/<task>`."""
  student = multi_task(config, config.pair[1], shared=method.shared)
  found = {"student": student, "teacher": teachers.recorded()}
  terms: dict[str, Term] = {}
  for task in config.tasks:
    logits, teacher = f"student.logits.{task}", f"teacher.{method.teacher}"
    pair = {"student": f"adapter_{task}.output", "teacher": f"{teacher}.embedding.{task}"}
    soft = {"student_logits": logits, "teacher_logits": f"{teacher}.logits.{task}", "temperature": config.temperature}
    hard = {"logits": logits, "labels": f"batch.label.{task}", "where": "batch.labelled"}
    possible = {
      "hard": Term(cross_entropy, hard),
      "soft": Term(losses.kl_soft_targets, soft, config.weights.soft),
      "feature": Term(losses.hint, pair, config.weights.feature),
      "distance": Term(losses.rkd_distance, pair, config.weights.distance),
    }
    terms |= {f"{name}/{task}": possible[name] for name in ("hard", *method.terms)}
    if "feature" in method.terms:
      found[f"adapter_{task}"] = models.linear_connector("student.embedding", embedding_width(config.pair[0]))
  return found, terms


class Student(NamedTuple):
  """A student of one method."""

  model: models.Model
  variables: Any  # (params, state), each leaf with an axis for the seeds


def train_student(session: phases.Session, splits: Any, feed: phases.Feed, name: str, method: Method) -> Student:
  """Trains the student of a method, one for each seed."""
  config = session.config
  found, terms = objective(config, method)
  balanced: dict[str, Any] = {}
  if method.balancer is not None:
    rows = {task: [term for term in terms if term.endswith(f"/{task}")] for task in config.tasks}
    balancer = BALANCERS[method.balancer](len(rows), config.student_steps)
    balanced = {"balancer": balancer, "rows": rows, "shared": "student/shared/"}
  learner = training.make_learner(found, terms, optimizer(config, config.student_steps), sample=feed.sample, **balanced)
  evaluate = validation(config, found["student"], splits)
  phase = phases.train(session, f"students, {name}", learner, feed, config.student_steps, evaluate=evaluate)
  return Student(found["student"], phases.variables_of(phase.state, "student"))


def validation(config: Config, student: models.Model, splits: Any) -> Any:
  """What a phase evaluates on the way: nothing without a validation split."""
  if "validation" not in splits:
    return None
  right = {task: phases.accuracy_of(f"model.logits.{task}", f"batch.label.{task}") for task in config.tasks}
  validate = phases.tester(student, splits["validation"], right)

  def evaluate(state: training.TrainState) -> dict[str, Any]:
    accuracy = validate(phases.variables_of(state, "student"))
    return {"validation/accuracy": np.mean(list(accuracy.values()), axis=0).tolist()}

  return evaluate


def report(session: phases.Session, splits: Any, students: dict[str, Student]) -> None:
  """Writes the two tables, of the methods and of their differences, and the pictures."""
  config = session.config
  results = {name: result(session, name, student, splits["test"]) for name, student in students.items()}
  note = (
    f"{config.labels} of {len(splits['train']['index'])} labels for the students, all for the teachers;"
    f" mean and 95% interval over {config.seeds} paired seeds"
  )
  rows = [row(name, result) for name, result in results.items()]
  print(common.write_table(session.directory, "results", f"Students of two tasks: {note}", rows, results))
  compared = [(name, base) for base in BASES if base in results for name in results if meaningful(name, base)]
  if {"multi-task teacher", "single-task teachers"} <= set(results):
    compared.append(("multi-task teacher", "single-task teachers"))
  if compared:
    differing = [difference(name, base, results) for name, base in compared]
    title = f"Which differences are beyond noise (the 95% interval of the paired difference excludes 0): {note}"
    print(common.write_table(session.directory, "differences", title, differing, differing))
  pictures.by_task(session.directory, results, tuple(config.tasks), BASES[0])
  if "validation" in splits:
    pictures.learning_curves(session.directory, "validation/accuracy", BASES[0])


def meaningful(name: str, base: str) -> bool:
  """Whether a difference answers a question: what sharing, a teacher, or balancing is worth."""
  if base == "composite" or name.startswith("composite "):
    return name.startswith(f"{base} ")
  return name not in (base, "independent")


def result(session: phases.Session, name: str, student: Student, split: Any) -> dict[str, Any]:
  """What is known of a method, with a number for each seed."""
  seeds, tasks = session.config.seeds, session.config.tasks
  logits = phases.outputs(student.model, student.variables, split, names=("logits",))["logits"]
  found: dict[str, Any] = {"accuracy": {}, "nll": {}, "ece": {}}
  for task in tasks:
    labels = split["label"][task]
    found["accuracy"][task] = (logits[task].argmax(-1) == labels).mean(-1).tolist()
    every = jnp.broadcast_to(labels, logits[task].shape[:-1])
    nll = metrics.negative_log_likelihood(logits[task], every)
    found["nll"][task] = np.asarray(nll).mean(-1).tolist()
    found["ece"][task] = [metrics.expected_calibration_error(of_seed, labels) for of_seed in logits[task]]
  one = phases.one_seed(student.variables)
  return found | {
    "parameters": models.count_parameters(student.variables[0]) // seeds,
    "bytes": models.count_bytes(student.variables[0]) // seeds,
    "microseconds": phases.latency(session, student.model, one, split, name),
  }


def over_tasks(values: dict[str, list[float]]) -> np.ndarray:
  """Mean over the tasks, [seeds]."""
  return np.mean(list(values.values()), axis=0)


def row(name: str, result: dict[str, Any]) -> dict[str, Any]:
  """One line of the table of methods."""
  shown = {"accuracy": ("accuracy (%)", 100, 1), "nll": ("NLL", 1, 3), "ece": ("ECE (%)", 100, 1)}
  return {
    "method": name,
    **{
      f"{task} {title}": common.plus_minus(values, scale=scale, digits=digits)
      for metric, (title, scale, digits) in shown.items()
      for task, values in result[metric].items()
    },
    "parameters": result["parameters"],
    "bytes": result["bytes"],
    **{f"µs for {images} images": f"{time:.0f}" for images, time in result["microseconds"].items()},
  }


def difference(name: str, base: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """One line of the table of differences."""
  line = {"method": name, "against": base}
  for task in results[name]["accuracy"]:
    gain = np.subtract(results[name]["accuracy"][task], results[base]["accuracy"][task])
    line |= {f"{task} (points)": common.plus_minus(gain, sign="+"), f"{task} beyond noise": common.beyond_noise(gain)}
  for metric, scale, digits in (("nll", 1, 3), ("ece", 100, 1)):
    change = over_tasks(results[name][metric]) - over_tasks(results[base][metric])
    line[metric.upper()] = common.plus_minus(change, scale=scale, digits=digits, sign="+")
    line[f"{metric.upper()} beyond noise"] = common.beyond_noise(change)
  return line


if __name__ == "__main__":
  common.run_command_line(main, Config)
