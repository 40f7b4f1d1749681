"""Distils a teacher of yours into a small student on your own images: from a folder and a file to an exported student.

    python -m experiments.distill --data flowers --teacher teacher.onnx --student convnet-16-32 --size 32
    python -m experiments.distill --data photos.parquet --teacher record/teacher --labels 200
    python -m experiments.fuse --data photos --teacher left=a.onnx right=b.onnx --student convnet-16-32

The data are a folder with a folder of images for each class (or train, validation and test of that kind in it), a
folder of images without labels, or Parquet with encoded images. A teacher is an ONNX file, the folder of a record
(`teachers.record_from`), or safetensors of a network that is named. What does not fit is said before training. Then the
student learns from the teacher, beside one that learns from the labels alone; the table says what each is worth on
images that were held out, and the student that is best on the validation images leaves, in RUN/student.

Killed at any moment, the same command continues it.
"""

import dataclasses
import functools
import itertools
import json
import sys
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from experiments import common, networks, own_data, phases
from kdflax import data, export, losses, models, teachers, training
from kdflax.objectives import Term

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class Config(common.Devices):
  """Settings of a distillation of your own; they are bound to the run directory."""

  data: str = ""
  """Folder of images, or Parquet."""
  teacher: tuple[str, ...] = ()
  """The teacher: an .onnx file, the folder of a record, or .safetensors; several as left=FILE right=FILE."""
  student: str = "convnet-16-32"
  """The student: mlp-64, convnet-16-32, convnet-16-32-flat, resnet20, ..."""
  run: str = "runs/own"
  """Run directory: made, or continued if it holds a run with the same settings."""
  size: int | None = None
  """Height and width of the student's images; needed if they differ."""
  channels: Literal[1, 3] = 3
  """Of the student's images: 3, or 1 for grey."""
  label: str = "label"
  """Column of the labels in Parquet; "" for none."""
  labels: int = 0
  """How many of the training labels to use, the others being unlabelled; 0 for all."""
  held_out: float = 0.15
  """Share of the images for validation, and for test, where the data do not say."""
  teacher_network: str = ""
  """Network of a .safetensors file, as --student names one."""
  teacher_output: str = ""
  """Tensor of an ONNX file with the logits, or the probabilities; by default its only output."""
  teacher_classes: str = ""
  """File with the names of the teacher's classes, one a line, where they are not those of the data."""
  teacher_mean: tuple[float, ...] = (0.0,)
  """Mean of the channels that the teacher wants subtracted, where white is 1: 0.485 0.456 0.406 for ImageNet."""
  teacher_deviation: tuple[float, ...] = (1.0,)
  """Deviation of the channels that it wants divided by: 0.229 0.224 0.225 for ImageNet."""
  teacher_size: int | None = None
  """Height and width of the teacher's images, where its file does not say."""
  trust_teacher: bool = False
  """Go on although the teacher is right no more often than a guess."""
  seeds: int = 3
  """Paired repetitions, trained together by vmap."""
  steps: int = 1500
  """Updates of a student."""
  batch_size: int = 64
  """Labelled images in a batch, and as many of all images."""
  learning_rate: float = 3e-3
  """Peak of the cosine schedule of Adam."""
  temperature: float = 4.0
  """Temperature of the soft targets."""
  soft: float = 1.0
  """Weight of the soft targets; that of the labels is 1."""
  formats: tuple[Literal["onnx", "litert"], ...] = ()
  """What to write beside StableHLO and safetensors."""
  save_every: int = 500
  """Updates between checkpoints."""
  accept_changes: bool = False
  """Continue a run although its settings differ."""
  smoke: bool = False
  """A short run: two seeds, a few steps."""

  def checked(self) -> "Config":
    """Returns the settings that will be used.

    Raises:
      ValueError: if one makes no sense.
    """
    config = dataclasses.replace(self, seeds=2, steps=40, save_every=20) if self.smoke else self
    if not config.data or not config.teacher:
      raise ValueError("say --data, a folder of images or Parquet, and --teacher, an .onnx file or a record")
    counts = ("seeds", "steps", "batch_size", "save_every")
    common.check_numbers(config, at_least_one=counts, positive=("temperature", "learning_rate", "held_out"))
    if config.held_out >= 0.4 or config.labels < 0:
      raise ValueError(f"held_out={config.held_out} must be below 0.4, and labels={config.labels} at least 0")
    networks.network(config.student, 2)
    self.tasks()
    return config

  def tasks(self) -> dict[str, str]:
    """The files of the teachers by the name of what they know; the only one is called `class`."""
    if len(self.teacher) == 1 and "=" not in self.teacher[0]:
      return {"class": self.teacher[0]}
    named = [entry.partition("=") for entry in self.teacher]
    found = {name: file for name, equals, file in named if equals and name and file and "." not in name}
    if len(found) != len(named):
      raise ValueError(f"several teachers have names: --teacher left=a.onnx right=b.onnx; got {self.teacher}")
    return found


class Work(NamedTuple):
  """What the students of a run share."""

  config: Config
  splits: dict[str, data.Arrays]
  classes: dict[str, int]  # how many, by task
  normalisation: data.Normalisation
  labelled: np.ndarray | None  # rows [seeds, labels] of the training split
  bound: dict[str, str]  # digests of what the teachers said


def main(config: Config) -> None:
  """Runs the distillation, or what is left of it."""
  config = config.checked()
  own = own_data.own_data(config)
  splits = {name: own.arrays(config.size, rows) for name, rows in own.rows.items()}
  if own.labels is not None and config.labels:
    data.with_label_budget(splits["train"], config.labels, seed=0)  # refuses fewer labels than classes
  asked = [own_data.ask(config, own, name, file) for name, file in config.tasks().items()]
  with phases.session(config) as session:
    said = {a.name: own_data.hear(config, own, a, session.directory / "teachers" / a.name) for a in asked}
    for arrays in splits.values():
      logits = {name: teacher.logits[arrays["index"]] for name, teacher in said.items()}
      arrays["teacher"] = {"logits": logits}
      arrays["says"] = {name: z.argmax(-1).astype(np.int32) for name, z in logits.items()}
    work = _work(config, own, splits, said)
    methods = ["distilled", *(["labels alone"] if _learns_labels(work) else [])]
    students = {method: _train(session, work, method) for method in methods}
    _report(session, work, own, students)


def _work(config: Config, own: own_data.Own, splits: Any, said: dict[str, own_data.Said]) -> Work:
  train = splits["train"]
  pixels = train["image"].reshape(-1, train["image"].shape[-1]) / 255
  deviation = np.maximum(pixels.std(0), 1e-3)
  labelled = None
  if own.labels is not None:
    budget = config.labels or data.num_examples(train)
    choose = lambda seed: np.flatnonzero(data.with_label_budget(train, budget, seed=seed)["labelled"])
    labelled = np.stack([choose(seed) for seed in range(config.seeds)])
  normalisation = data.Normalisation(tuple(pixels.mean(0).tolist()), tuple(deviation.tolist()))
  smallest = len(train["index"]) if labelled is None else labelled.shape[1]
  config = dataclasses.replace(config, batch_size=min(config.batch_size, smallest))
  classes = {name: teacher.logits.shape[1] for name, teacher in said.items()}
  bound = {f"teacher/{name}": teacher.digest for name, teacher in said.items()}
  return Work(config, splits, classes, normalisation, labelled, bound)


def _learns_labels(work: Work) -> bool:
  """Labels are those of the only task; of several teachers each says its own."""
  return work.labelled is not None and set(work.classes) == {"class"}


def student_of(work: Work) -> models.Model:
  """The network of the student: one head, or one for each task."""
  name = work.config.student
  if set(work.classes) == {"class"}:
    one = networks.network(name, work.classes["class"], work.normalisation)
    return _heads_named(one)
  heads = {task: models.task_head(number) for task, number in work.classes.items()}
  return models.hard_sharing(networks.network(name, None, work.normalisation), heads)


def _heads_named(model: models.Model) -> models.Model:
  """A network of one task as one of several: its logits are those of `class`."""

  def apply(params, state, batch, *, train, key=None):
    outputs, state = model.apply(params, state, batch, train=train, key=key)
    return outputs | {"logits": {"class": outputs["logits"]}}, state

  return models.Model(model.init, apply)


def _train(session: phases.Session, work: Work, method: str) -> phases.Phase:
  config, train = work.config, work.splits["train"]
  soft = {
    f"soft/{task}": Term(
      losses.kl_soft_targets,
      {"student_logits": f"student.logits.{task}", "teacher_logits": f"teacher.logits.{task}",
       "temperature": config.temperature},
      config.soft,
    )
    for task in work.classes
  }  # fmt: skip
  hard = Term(cross_entropy, {"logits": "student.logits.class", "labels": "batch.label", "where": "batch.labelled"})
  terms = (soft if method == "distilled" else {}) | ({"hard": hard} if _learns_labels(work) else {})
  network = {"student": student_of(work), "teacher": teachers.recorded()}
  optimizer = optax.chain(
    optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
  )
  if _learns_labels(work):
    arrays = {"images": train, "labelled": work.labelled}
    sample = functools.partial(phases.draw_mixed, size=config.batch_size)
    feed = phases.Feed(itertools.repeat(phases.on_device(arrays)), sample, {"images": None, "labelled": 0}, work.bound)
  else:
    sample = functools.partial(data.sample, size=config.batch_size)
    feed = phases.Feed(itertools.repeat(phases.on_device(train)), sample, bound=work.bound)
  learner = training.make_learner(network, terms, optimizer, sample=feed.sample)
  validate = phases.tester(network["student"], work.splits["validation"], _scores(work))
  evaluate = lambda state: {
    f"validation/{name}": values for name, values in validate(phases.variables_of(state, "student")).items()
  }
  return phases.train(session, f"own, {method}", learner, feed, config.steps, evaluate=evaluate)


def _scores(work: Work) -> dict[str, Term]:
  """How often the student says what the labels say, and what each teacher says."""
  agreement = {f"agreement/{t}": phases.accuracy_of(f"model.logits.{t}", f"batch.says.{t}") for t in work.classes}
  right = {"accuracy": phases.accuracy_of("model.logits.class")} if _learns_labels(work) else {}
  return right | agreement


def _report(session: phases.Session, work: Work, own: own_data.Own, students: dict[str, phases.Phase]) -> None:
  """Writes the table, and the student that is best on the validation images."""
  student, rows, results = student_of(work), [], []
  if _learns_labels(work):
    test = work.splits["test"]
    right = [float((test["says"]["class"] == test["label"]).mean())]
    results.append({"who": "teacher", "accuracy": right})
  validate, evaluate = (phases.tester(student, work.splits[s], _scores(work)) for s in ("validation", "test"))
  for method, phase in students.items():
    variables = phases.variables_of(phase.state, "student")
    results.append({"who": method, **evaluate(variables), "seconds": phase.seconds, **_size(variables, work)})
  variables = phases.variables_of(students["distilled"].state, "student")
  best = int(np.argmax(np.mean(list(validate(variables).values()), axis=0)))
  chosen = jax.tree.map(np.asarray, phases.one_seed(variables, best))
  small, rounded = export.int8_weights(student, chosen)
  one = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)
  results.append({"who": "exported", **evaluate(one(chosen)), **_size(one(chosen), work, 1)})
  in_bytes = phases.tester(small, work.splits["test"], _scores(work))(one(rounded))
  results.append({"who": "exported, weights of 8 bits", **in_bytes, **_size(one(rounded), work, 1)})
  for result in results:
    numbers = {name: common.plus_minus(v) if len(v) > 1 else f"{100 * v[0]:.1f}"
               for name, v in result.items() if isinstance(v, list)}  # fmt: skip
    blank = {name: "" for name in _scores(work)}
    rows.append({"": result["who"], **blank, **numbers, "parameters": result.get("parameters", ""),
                 "bytes": result.get("bytes", "")})  # fmt: skip
  title = f"Students of {', '.join(work.config.teacher)} on {work.config.data}: percent of the test images"
  print(common.write_table(session.directory, "results", title, rows, results))
  _leave(session, work, own, student, chosen)


def _size(variables: Any, work: Work, seeds: int | None = None) -> dict[str, int]:
  count = work.config.seeds if seeds is None else seeds
  sizes = [models.count_parameters(variables[0]) // count, models.count_bytes(variables[0]) // count]
  return dict(zip(("parameters", "bytes"), sizes, strict=True))


def _leave(session: phases.Session, work: Work, own: own_data.Own, student: models.Model, variables: Any) -> None:
  """Exports the student, and tries the export on test images."""
  directory, outputs = session.directory / "student", [f"logits.{task}" for task in work.classes]
  example: Any = {"image": work.splits["test"]["image"][:8]}
  export.export_model(directory, student, variables, example, outputs=outputs)
  found: Any = export.load_exported(directory)(example)
  expected, _ = student.apply(variables[0], variables[1], example, train=False, key=None)
  for task in work.classes:
    np.testing.assert_allclose(found[f"logits.{task}"], expected["logits"][task], rtol=1e-3, atol=1e-3)
  facts = {"classes": own.classes if _learns_labels(work) else None, "image": list(example["image"].shape[1:])}
  training.write_atomically(directory / "about.json", json.dumps(facts, indent=1) + "\n")
  for form in work.config.formats:
    write = {"onnx": export.export_onnx, "litert": export.export_litert}[form]
    write(
      directory / {"onnx": "student.onnx", "litert": "student.tflite"}[form],
      student,
      variables,
      example,
      outputs=outputs,
    )
  print(f"the student is in {directory}: {', '.join(sorted(f.name for f in directory.iterdir()))}", file=sys.stderr)


def asked(arguments: list[str]) -> bool:
  """Whether a command line is about data of the user's own."""
  return any(argument == "--data" or argument.startswith("--data=") for argument in arguments)


if __name__ == "__main__":
  common.run_command_line(main, Config)
