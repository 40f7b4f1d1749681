"""Distils a small student on characters of fonts that it has never seen, from few labels.

A teacher learns from all labelled images and its soft predictions are recorded. Then the same small student learns
from scratch (baseline), with one kind of the teacher's knowledge at a time, and with all of them, from a few of the
labels, the other images without theirs. Every seed has a teacher, a choice of labels and an order of batches of its
own, shared by the methods, so that differences to the baseline are paired.

    python -m experiments.distill                     about a minute on two CPU cores; results in runs/distill
    python -m experiments.distill --smoke             half a minute, for a look
    python -m experiments.distill --labels 310 1240   other numbers of labelled images
    python -m experiments.distill --dataset digits    scanned digits, 8 x 8, in a minute
    python -m experiments.distill --dataset mnist --path DIR --held-out 5000

Killed at any moment, the same command continues it and ends with the same bits.
"""

import dataclasses
import functools
import itertools
import sys
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from experiments import common, networks, own, phases, pictures
from kdflax import data, losses, models, teachers, training
from kdflax.data.glyphs import CHARACTERS
from kdflax.objectives import Term

cross_entropy = optax.softmax_cross_entropy_with_integer_labels

Method = Literal["baseline", "soft targets", "feature", "relational", "all"]
METHODS: dict[Method, tuple[str, ...]] = {
  "baseline": (),
  "soft targets": ("soft",),
  "feature": ("feature",),
  "relational": ("distance",),
  "all": ("soft", "feature", "distance"),
}


class Recipe(NamedTuple):
  """What a data set asks for."""

  labels: tuple[int, ...] = (1000, 100)
  seeds: int = 8
  student_hidden: tuple[int, ...] = (8,)
  teacher_hidden: tuple[int, ...] = (256, 256)
  student_steps: int = 1200
  teacher_steps: int = 600


RECIPES = {
  "glyphs": Recipe((620,), 5, (16,), (256, 128), 1000, 1500),
  "digits": Recipe(),
  **dict.fromkeys(("mnist", "cifar10", "cifar100"), Recipe()),
}


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of the terms; the hard-label cross-entropy counts 1."""

  soft: float = 1.0
  """Soft targets: T^2 KL(teacher || student)."""
  feature: float = 1.0
  """Hint: mean squared difference of the teacher's embedding and the student's, through a linear connector."""
  distance: float = 1.0
  """Relations: pairwise distances of the embeddings."""


@dataclasses.dataclass(frozen=True)
class Config(common.Devices):
  """Settings of the experiment; they are bound to the run directory."""

  run: str = "runs/distill"
  """Run directory: made, or continued if it holds a run with the same settings."""
  dataset: str = "glyphs"
  """Data set: glyphs, digits, mnist, cifar10 or cifar100."""
  path: str = ""
  """Folder with the files of the data set, if it is read from files."""
  held_out: int = 0
  """Training images to keep for validation, if the data set is read from files."""
  labels: tuple[int, ...] | None = None
  """Numbers of labelled training images to try; all others are used without their labels. By default, as for the next
  five that are None, those of the data set."""
  methods: tuple[Method, ...] = tuple(METHODS)
  """What the student learns from, beside the hard labels."""
  seeds: int | None = None
  """Paired repetitions, trained together by vmap."""
  student_hidden: tuple[int, ...] | None = None
  """Widths of the student's hidden layers."""
  teacher_hidden: tuple[int, ...] | None = None
  """Widths of the teacher's hidden layers."""
  student_steps: int | None = None
  """Updates of a student."""
  teacher_steps: int | None = None
  """Updates of a teacher."""
  batch_size: int = 64
  """Labelled images in a batch, and as many images for the teacher's knowledge."""
  learning_rate: float = 3e-3
  """Peak of the cosine schedule of Adam."""
  temperature: float = 4.0
  """Temperature of the soft targets."""
  weights: Weights = Weights()
  """Weights of the terms."""
  pipeline: Literal["device", "grain"] = "device"
  """Batches gathered on the device (each seed in its own order), or streamed by Grain (one order for all seeds)."""
  shift: int = 0
  """Random shifts of the images by up to this many pixels; needs the Grain pipeline."""
  save_every: int = 500
  """Updates between checkpoints."""
  accept_changes: bool = False
  """Continue a run although its settings differ."""
  smoke: bool = False
  """A short run: two seeds, a few steps, the baseline and everything together on 124 labels."""

  def augmentation(self) -> Any:
    """The augmentation of a Grain pipeline."""
    return data.random_shift(self.shift) if self.shift else None

  def checked(self) -> "Config":
    """Returns the settings that will be used.

    Raises:
      ValueError: if one makes no sense.
    """
    config = self
    if self.smoke:
      small = {"labels": (124,), "methods": ("baseline", "all"), "seeds": 2}
      steps = {"student_steps": 60, "teacher_steps": 60, "save_every": 30}
      run = "runs/distill-smoke" if self.run == Config.run else self.run
      config = dataclasses.replace(self, run=run, **small, **steps)
    networks.check_dataset(config, tuple(RECIPES))
    config = common.filled(config, RECIPES[config.dataset])
    if data.dataset(config.dataset).files and not config.held_out:
      raise ValueError(f"{config.dataset} needs a validation split: set held_out, for instance to 5000")
    counts = ("seeds", "student_steps", "teacher_steps", "batch_size", "save_every")
    common.check_numbers(config, at_least_one=counts, positive=("temperature", "learning_rate"))
    networks.check_widths(student_hidden=config.student_hidden, teacher_hidden=config.teacher_hidden)
    if not config.teacher_hidden:
      raise ValueError(
        "teacher_hidden must name a width or more: its last one is the embedding to learn from; got none"
      )
    if not config.labels:
      raise ValueError("labels must name a number of labelled images or more; got none")
    weights = dataclasses.asdict(config.weights)
    if any(not weight >= 0 for weight in weights.values()) or not any(weights.values()):
      raise ValueError(f"weights must be at least 0 and not all 0; got {weights}")
    unknown = set(config.methods) - set(METHODS)
    if unknown or "baseline" not in config.methods:
      raise ValueError(f"methods must be of {list(METHODS)} with baseline among them; got {list(config.methods)}")
    if config.batch_size > min(config.labels):
      raise ValueError(f"batch_size={config.batch_size} is larger than the labelled data: {min(config.labels)} images")
    if config.shift and config.pipeline != "grain":
      raise ValueError(f"shift={config.shift} needs pipeline=grain; the device pipeline does not augment")
    return config


def main(config: Config) -> None:
  """Runs the experiment, or what is left of it."""
  checked: Any = config.checked()
  splits = networks.read_one_task(checked)
  images = data.num_examples(splits["train"])
  if max(checked.labels) > images:
    raise ValueError(f"labels={max(checked.labels)} is more than the training images: {images}")
  data.with_label_budget(splits["train"], min(checked.labels), seed=0)  # refuses fewer labels than classes
  with phases.session(checked) as session:
    teacher = train_teacher(session, splits)
    students = {
      (budget, method): train_student(session, splits, budget, method)
      for budget, method in itertools.product(checked.labels, checked.methods)
    }
    report(session, splits, teacher, students)


class Trained(NamedTuple):
  """The end of a phase."""

  model: models.Model
  variables: Any  # (params, state), each leaf with an axis for the seeds
  accuracy: list[float]  # on the test split, one for each seed
  seconds: float | None  # of all seeds, compilation included; None if the phase was resumed


def train_teacher(session: phases.Session, splits: Any) -> Trained:
  """Trains one teacher for each seed and records what it says about the training images."""
  config, arrays = session.config, splits["train"]
  network = {"teacher": perceptron(config, config.teacher_hidden, dropout=0.2)}
  # A Term stops the gradient of a model called teacher, unless it is told that this one is to learn.
  terms = {"hard": Term(cross_entropy, {"logits": "teacher.logits", "labels": "batch.label"})}
  if config.pipeline == "grain":
    feed = phases.Feed(data.grain_batches(arrays, config.batch_size, seed=0, augment=config.augmentation()))
  else:
    sample = functools.partial(data.sample, size=config.batch_size)
    feed = phases.Feed(itertools.repeat(phases.on_device(arrays)), sample)
  trained = train(session, "teacher", network, terms, feed, config.teacher_steps, splits)
  variables = trained.variables
  outputs, _ = jax.vmap(lambda params, state: network["teacher"].apply(params, state, arrays, train=False, key=None))(
    *variables
  )
  outputs = {name: np.moveaxis(np.asarray(outputs[name]), 0, 1) for name in ("logits", "embedding")}
  source = {"model": f"mlp {config.teacher_hidden}", "variables": training.digest(variables)}
  teachers.record(session.directory / "teacher", outputs, arrays["index"], source=source)
  return trained


def perceptron(config: Config, hidden: tuple[int, ...], dropout: float = 0.0) -> models.Model:
  """A network for the images of the data set and its classes; the task with the most, if there are several."""
  known = data.dataset(config.dataset)
  classes = known.tasks[networks.largest_task(config.dataset)].classes
  return networks.normalized(models.mlp(hidden, classes, dropout=dropout), known.normalisation)


def train_student(session: phases.Session, splits: Any, budget: int, method: Method) -> Trained:
  """Trains one student for each seed on `budget` labels and the teacher's recorded outputs."""
  network, terms = objective(session.config, method)
  feed = student_feed(session, splits["train"], budget)
  return train(session, f"{budget} labels, {method}", network, terms, feed, session.config.student_steps, splits)


def student_feed(session: phases.Session, images: Any, budget: int) -> phases.Feed:
  """Batches of labelled images and as many of all images, with the teacher's outputs for both.

  `labelled` masks the second half, so that the hard labels of the method and of its baseline come from the same
  batches.
  """
  config = session.config
  teacher = teachers.read_record(session.directory / "teacher", images["index"])  # [images, seeds, ...]
  labelled = [np.flatnonzero(data.with_label_budget(images, budget, seed=s)["labelled"]) for s in range(config.seeds)]
  if config.pipeline == "grain":
    everything = images | {"teacher": teacher}
    streams = [
      data.grain_batches(part, config.batch_size, seed=seed, augment=config.augmentation())
      for seed, part in enumerate([jax.tree.map(lambda x: x[labelled[0]], everything), everything])
    ]
    axes = {name: None for name in [*images, "labelled"]} | {"teacher": 1}
    return phases.Feed(data.MixedBatches(*streams), axes=axes)

  arrays = {"images": images | {"teacher": teacher}, "labelled": np.stack(labelled)}
  axes = {"images": {name: None for name in images} | {"teacher": 1}, "labelled": 0}
  sample = functools.partial(phases.draw_mixed, size=config.batch_size)
  return phases.Feed(itertools.repeat(phases.on_device(arrays)), sample, axes)


def objective(config: Any, method: Method) -> tuple[dict[str, models.Model], dict[str, Term]]:
  """Returns the models and Terms of a method."""
  pair = {"student": "student.embedding", "teacher": "teacher.embedding"}
  terms = {
    "hard": Term(cross_entropy, {"logits": "student.logits", "labels": "batch.label", "where": "batch.labelled"}),
    "soft": Term(
      losses.kl_soft_targets,
      {"student_logits": "student.logits", "teacher_logits": "teacher.logits", "temperature": config.temperature},
      config.weights.soft,
    ),
    "feature": Term(losses.hint, {**pair, "student": "connector.output"}, config.weights.feature),
    "distance": Term(losses.rkd_distance, pair, config.weights.distance),
  }
  network = {"student": perceptron(config, config.student_hidden), "teacher": teachers.recorded()}
  if "feature" in METHODS[method]:
    network["connector"] = models.linear_connector("student.embedding", config.teacher_hidden[-1])
  return network, {name: terms[name] for name in ("hard", *METHODS[method])}


def train(session: phases.Session, name: str, network, terms, feed: phases.Feed, num_steps: int, splits) -> Trained:
  """Trains one model for each seed at once, saved and resumed under the name of the phase."""
  optimizer = optax.chain(
    optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(session.config.learning_rate, num_steps))
  )
  learner = training.make_learner(network, terms, optimizer, sample=feed.sample)
  model_name = next(iter(network))
  model = network[model_name]
  validate = phases.tester(model, splits["validation"])
  phase = phases.train(
    session,
    name,
    learner,
    feed,
    num_steps,
    evaluate=lambda state: {"validation/accuracy": validate(phases.variables_of(state, model_name))["accuracy"]},
  )
  variables = phases.variables_of(phase.state, model_name)
  test = phases.tester(model, splits["test"])
  return Trained(model, variables, test(variables)["accuracy"], phase.seconds)


def report(session: phases.Session, splits: Any, teacher: Trained, students: dict[tuple[int, Any], Trained]) -> None:
  """Writes the table and the pictures."""
  config = session.config
  results = [result(config, "teacher", len(splits["train"]["label"]), teacher, None)]
  for (budget, method), trained in students.items():
    results.append(result(config, method, budget, trained, students[budget, "baseline"]))
  rows = [
    {
      "labels": r["labels"],
      "method": r["method"],
      "test accuracy (%)": common.plus_minus(r["accuracy"]),
      "difference to baseline": "" if r["difference"] is None else common.plus_minus(r["difference"], sign="+"),
      "parameters": r["parameters"],
      "bytes": r["bytes"],
      "seconds": "resumed" if r["seconds"] is None else f"{r['seconds']:.1f}",
    }
    for r in results
  ]
  title = f"Students on {config.dataset}: mean and 95% interval over {config.seeds} paired seeds"
  print(common.write_table(session.directory, "results", title, rows, results))
  pictures.learning_curves(session.directory, "validation/accuracy", "baseline")
  pictures.accuracy_by_method(session.directory, results)
  softmax = softmax_of_seed(splits["test"], teacher, students)
  if config.dataset == "glyphs":
    best = max((r for r in results if r["labels"] == min(config.labels)), key=lambda r: np.mean(r["accuracy"]))
    pictures.set_right(session.directory, splits["test"], softmax, best["method"], CHARACTERS)
  else:
    pictures.confused_digits(session.directory, splits["test"], softmax)


def result(config: Any, method: str, labels: int, trained: Trained, baseline: Trained | None) -> dict[str, Any]:
  """One line of the results, with a number for each seed."""
  paired = (
    None if baseline is None or baseline is trained else np.subtract(trained.accuracy, baseline.accuracy).tolist()
  )
  return {
    "labels": labels,
    "method": method,
    "accuracy": trained.accuracy,
    "difference": paired,
    "parameters": models.count_parameters(trained.variables[0]) // config.seeds,
    "bytes": models.count_bytes(trained.variables[0]) // config.seeds,
    "seconds": trained.seconds,
  }


def softmax_of_seed(split: Any, teacher: Trained, students: dict[tuple[int, Any], Trained]) -> dict[str, np.ndarray]:
  """Probabilities `[images, classes]` of the teacher and of the students with the fewest labels, for the first seed."""
  fewest = min(budget for budget, _ in students)
  chosen = {"teacher": teacher} | {
    method: trained for (budget, method), trained in students.items() if budget == fewest
  }
  first = {name: phases.one_seed(trained.variables) for name, trained in chosen.items()}
  said = {
    name: chosen[name].model.apply(*variables, split, train=False, key=None)[0] for name, variables in first.items()
  }
  return {name: np.asarray(jax.nn.softmax(outputs["logits"])) for name, outputs in said.items()}


if __name__ == "__main__":
  if own.asked(sys.argv[1:]):
    common.run_command_line(own.main, own.Config)
  else:
    common.run_command_line(main, Config)
