"""Fuses joint learning and distillation: one small student for several tasks, from teachers of all.

On glyphs, characters of fonts that no model has seen, the tasks are the character, whether it is slanted, and the
weight of its strokes (a regression). On overlaid digits they are the left and the right one, on CIFAR-100 its 100 fine
and its 20 coarse classes. A student learns

- independent: a network of its own for each task, and no teacher;
- independent, taught: the same, each network with the soft targets of a teacher of its task: distillation alone;
- joint: one encoder shared by all tasks, and no teacher: joint learning alone;
- multi-task teacher: as joint, with the soft targets of one teacher of all tasks: both at once;
- single-task teachers: as joint, with the soft targets of a teacher for each task;
- composite: as the last, with the teachers' embeddings through an adapter for each task (feature) and their distances
  (relational) as well. Hard, soft, feature and relational terms of a task are a row; the rows are added, or balanced.

The soft target of a regression is the teacher's prediction, and its terms are squared errors of the standardised
target. The setting is chosen so that there is something to transfer: teachers are wide and learn from all labels,
students are narrow and see few of them, and the other images without. It answers whether a student that must be small
and has few labels gains from teachers that had many; it says nothing about students with all labels.

Every seed has teachers, a choice of labels and an order of batches of its own, shared by the methods, so that
differences are paired. Weights of the terms are 1, not tuned. The test split is looked at once, at the end. What the
teachers say is recorded once, about the images as they are, so images are not augmented.

    python -m experiments.fuse                       some minutes on two CPU cores; results in runs/fuse
    python -m experiments.fuse --smoke               half a minute, for a look
    python -m experiments.fuse --balancers UPGrad    and a balancer of the composite rows
    python -m experiments.fuse --dataset overlaid_digits    two digits in each image, and more balancers
    python -m experiments.fuse --dataset cifar100 --path DIR

Killed at any moment, the same command continues it and ends with the same bits.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import common, fuse_report, own, phases
from experiments.balancers import BALANCERS, NEED_THREE_TASKS
from experiments.networks import check_dataset, embedding_width, forwarded, network, read, standardized, tasks_of
from kdflax import data, losses, models, teachers, training
from kdflax.objectives import Term

cross_entropy = optax.softmax_cross_entropy_with_integer_labels

FOR_TWO_TASKS = tuple(name for name in BALANCERS if name not in NEED_THREE_TASKS)


class Recipe(NamedTuple):
  """What a data set asks for."""

  pair: tuple[str, str]  # encoders of a teacher and of a student
  labels: int
  teacher_steps: int
  student_steps: int
  learning_rate: float
  balancers: tuple[str, ...] = FOR_TWO_TASKS


RECIPES = {
  # Without balancers, which experiments.joint compares on the same tasks: each would take as long as all other methods.
  "glyphs": Recipe(("mlp-256-128", "mlp-32-16"), 620, 1500, 1000, 3e-3, ()),
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

  shared: bool  # one encoder for all tasks, or one for each
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
class Config(common.Devices):
  """Settings of the experiment; they are bound to the run directory."""

  run: str = "runs/fuse"
  """Run directory: made, or continued if it holds a run with the same settings."""
  dataset: str = "glyphs"
  """Data set: glyphs, overlaid_digits or cifar100."""
  path: str = ""
  """Folder with the files of the data set, if it is read from files."""
  cifar: str = ""
  """Old form of `--dataset cifar100 --path`; goes with version 0.3."""
  pair: tuple[str, str] | None = None
  """Encoders of teacher and student: names such as mlp-256, convnet-16-32 or resnet20; by default, as for the next
  four and the balancers, those of the data set."""
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
  balancers: tuple[str, ...] | None = None
  """Balancers of the tasks of the composite objective; without one, its rows are added."""
  seeds: int = 5
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
    """The tasks of the data set by name."""
    return tasks_of(self.dataset)

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
    known = FOR_TWO_TASKS if len(config.tasks) == 2 else tuple(BALANCERS)
    if unknown := [name for name in config.balancers if name not in known]:
      raise ValueError(f"unknown balancers {unknown}; for {len(config.tasks)} tasks there are {', '.join(known)}")
    if config.batch_size > config.labels:
      raise ValueError(f"batch_size={config.batch_size} is larger than the labelled data: {config.labels} images")
    return config

  def compared(self) -> dict[str, Method]:
    """The methods to compare, those with a balancer last."""
    balanced = {f"composite {name}": METHODS["composite"]._replace(balancer=name) for name in self.balancers or ()}
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
    print(fuse_report.write(session, students, splits))


def load(config: Any) -> dict[str, Any]:
  """The splits, each with `image`, `label` by task and `index`.

  Raises:
    ValueError: if there are fewer training images than the labels that students may see, or fewer labels than classes.
  """
  splits = standardized({name: data.by_task(arrays, config.tasks) for name, arrays in read(config).items()})
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
  """Trains the teachers of each seed, one of all tasks or one for each, and records them on the training images."""
  config, arrays = session.config, splits["train"]
  teacher = multi_task(config, config.pair[0], shared=kind == "joint")
  terms = {
    name: hard_term(task, f"network.logits.{name}", f"batch.label.{name}") for name, task in config.tasks.items()
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


def hard_term(task: data.Task, output: str, label: str, **where: str) -> Term:
  """The loss of a task's labels: cross-entropy in nats, or the squared error of the standardised target."""
  if task.classes is None:
    return Term(optax.squared_error, {"predictions": output, "targets": label, **where})
  return Term(cross_entropy, {"logits": output, "labels": label, **where})


def soft_term(config: Any, task: data.Task, student: str, teacher: str) -> Term:
  """What a student learns from a teacher's prediction."""
  if task.classes is None:
    return Term(optax.squared_error, {"predictions": student, "targets": teacher}, config.weights.soft)
  pair = {"student_logits": student, "teacher_logits": teacher, "temperature": config.temperature}
  return Term(losses.kl_soft_targets, pair, config.weights.soft)


def objective(config: Any, method: Method, images: Any) -> tuple[dict[str, models.Model], dict[str, Term]]:
  """Returns the models and Terms of a method; a Term is named `<kind>/<task>`."""
  width = embedding_width(config.pair[0], images)
  student = multi_task(config, config.pair[1], shared=method.shared)
  found = {"student": student, "teacher": teachers.recorded()}
  terms: dict[str, Term] = {}
  for name, task in config.tasks.items():
    output, teacher = f"student.logits.{name}", f"teacher.{method.teacher}"
    pair = {"student": f"adapter_{name}.output", "teacher": f"{teacher}.embedding.{name}"}
    possible = {
      "hard": hard_term(task, output, f"batch.label.{name}", where="batch.labelled"),
      "soft": soft_term(config, task, output, f"{teacher}.logits.{name}"),
      "feature": Term(losses.hint, pair, config.weights.feature),
      "distance": Term(losses.rkd_distance, pair, config.weights.distance),
    }
    terms |= {f"{kind}/{name}": possible[kind] for kind in ("hard", *method.terms)}
    if "feature" in method.terms:
      found[f"adapter_{name}"] = models.linear_connector("student.embedding", width)
  return found, terms


class Student(NamedTuple):
  """A student of one method."""

  model: models.Model
  variables: Any  # (params, state), each leaf with an axis for the seeds


def train_student(session: phases.Session, splits: Any, feed: phases.Feed, name: str, method: Method) -> Student:
  """Trains the student of a method, one for each seed."""
  config = session.config
  found, terms = objective(config, method, splits["train"])
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
  classes = [name for name, task in config.tasks.items() if task.classes is not None]
  right = {task: phases.accuracy_of(f"model.logits.{task}", f"batch.label.{task}") for task in classes}
  validate = phases.tester(student, splits["validation"], right)

  def evaluate(state: training.TrainState) -> dict[str, Any]:
    accuracy = validate(phases.variables_of(state, "student"))
    return {"validation/accuracy": np.mean(list(accuracy.values()), axis=0).tolist()}

  return evaluate


if __name__ == "__main__":
  if own.asked(sys.argv[1:]):
    common.run_command_line(own.main, own.Config)
  else:
    common.run_command_line(main, Config)
