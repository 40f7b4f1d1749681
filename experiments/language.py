"""Distils a language model on real text: what a student several times smaller learns from its teacher, and how.

A byte-pair vocabulary is made of the text of Python's standard library, whose files are split into training, validation
and test, and a teacher learns from all of the training text. Then the same small student learns

- alone: from the text;
- forward KL, reverse KL, JSD, skew KL: from the teacher's distribution of every next token of the text, by
  `fused_divergence`, without the logits of all tokens;
- sequence-level: from what the teacher writes itself, its likeliest token each time, after the first tokens of rows of
  the text;
- on-policy reverse KL, on-policy JSD: as the divergence, but in the second half of the training a share of each batch
  is what the student has just written, and the teacher says what it thinks of it (GKD).

All make as many updates with as many rows. Every seed has its own first params (those of a checkpoint are the same)
and its own order of rows, shared by the methods, so that differences are paired; the teacher is one, so the intervals
say nothing of other teachers. The test split is looked at once, at the end.

    python -m experiments.language                       results in runs/language
    python -m experiments.language --smoke               half a minute, for a look
    python -m experiments.language --teacher DIR --student DIR --tokenizer FILE --text FILE FILE

The last distils checkpoints that you have: directories of config.json and safetensors, a tokenizer.json, and files of
text, each of which is cut in training, validation and test. The students are written to RUN/students as checkpoints.

Killed at any moment, the same command continues it and ends with the same bits.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, language_report, phases
from experiments.language_text import Language, continued, end_of, few, language, read_text, scorer
from kdflax import data, losses, models, teachers, training
from kdflax.files import digest
from kdflax.objectives import Term


class Method(NamedTuple):
  """What a student learns from: the divergence from the teacher, or the text alone; and who writes the text."""

  divergence: str | None = None
  writer: Literal["nobody", "teacher", "student"] = "nobody"


METHODS: dict[str, Method] = {
  "alone": Method(),
  "forward KL": Method("forward_kl"),
  "reverse KL": Method("reverse_kl"),
  "JSD": Method("jensen_shannon"),
  "skew KL": Method("skew_kl"),
  "sequence-level": Method(writer="teacher"),
  "on-policy reverse KL": Method("reverse_kl", "student"),
  "on-policy JSD": Method("jensen_shannon", "student"),
}


@dataclasses.dataclass(frozen=True)
class Config(common.Devices):
  """Settings of the experiment; they are bound to the run directory."""

  run: str = "runs/language"
  """Run directory: made, or continued if it holds a run with the same settings."""
  teacher: str = ""
  """Directory of the teacher's checkpoint; by default one is trained."""
  student: str = ""
  """Directory of the checkpoint that the students start from; by default they start from scratch."""
  tokenizer: str = ""
  """Vocabulary of the checkpoints, a tokenizer.json; by default one is made of the text."""
  text: tuple[str, ...] = ()
  """Files of text; by default those of Python's standard library."""
  vocabulary: int = 8192
  """Tokens of the vocabulary, if it is made here, up to 262,144."""
  length: int = 128
  """Tokens in a row."""
  methods: tuple[str, ...] = tuple(METHODS)
  """What the student learns from; "alone" must be among them."""
  seeds: int = 3
  """Paired repetitions, one after another in each step."""
  teacher_width: int = 192
  """Width of the teacher, if it is trained here."""
  teacher_depth: int = 4
  """Layers of the teacher."""
  student_width: int = 64
  """Width of the student, if it starts from scratch."""
  student_depth: int = 2
  """Layers of the student."""
  teacher_steps: int = 400
  """Updates of the teacher."""
  student_steps: int = 100
  """Updates of a student."""
  batch_size: int = 4
  """Rows in a batch."""
  learning_rate: float = 5e-3
  """Peak of the schedule of a student: a tenth of the updates up, then down along a cosine."""
  teacher_learning_rate: float = 3e-3
  """The same of the teacher."""
  temperature: float = 1.0
  """Of both sides of a divergence."""
  beta: float = 0.5
  """Share of the teacher in the mixture of JSD."""
  alpha: float = 0.1
  """Share of the teacher in the mixture of the skew KL."""
  share: float = 0.5
  """Share of the rows of a batch that the student writes itself, in the second half of an on-policy training."""
  prompt: int = 32
  """Tokens of a row that stay when a model writes the rest."""
  greedy_rows: int = 256
  """Rows that the teacher writes for the sequence-level method."""
  test_rows: int = 128
  """Rows of the test split that are scored; an eighth as many of the validation split on the way."""
  save_every: int = 50
  """Updates between checkpoints."""
  accept_changes: bool = False
  """Continue a run although its settings differ."""
  smoke: bool = False
  """A short run: two seeds, few steps, small models, three methods."""

  def checked(self) -> "Config":
    """Returns the settings that will be used.

    Raises:
      ValueError: if one makes no sense.
    """
    config = self
    if self.smoke:
      run = "runs/language-smoke" if self.run == Config.run else self.run
      small: Any = {"methods": ("alone", "forward KL", "on-policy JSD"), "vocabulary": 512, "length": 32, "prompt": 8}
      small |= {"seeds": 2, "teacher_width": 16, "teacher_depth": 2, "student_width": 8, "student_depth": 1}
      small |= {"teacher_steps": 20, "student_steps": 20, "save_every": 10, "test_rows": 16, "greedy_rows": 8}
      config = dataclasses.replace(self, run=run, **small)
    counts = ("seeds", "teacher_width", "teacher_depth", "student_width", "student_depth", "teacher_steps")
    counts += ("student_steps", "batch_size", "prompt", "greedy_rows", "test_rows", "save_every")
    positive = ("learning_rate", "teacher_learning_rate", "temperature")
    common.check_numbers(config, at_least_one=counts, positive=positive)
    if not config.prompt < config.length:
      raise ValueError(f"prompt={config.prompt} must be shorter than a row, length={config.length}")
    if not 0 < config.share <= 1:
      raise ValueError(f"share must be above 0 and at most 1; got {config.share}")
    if not 0 < config.beta < 1 or not 0 <= config.alpha < 1:
      raise ValueError(f"beta must be in (0, 1) and alpha in [0, 1); got {config.beta} and {config.alpha}")
    if set(config.methods) - set(METHODS) or "alone" not in config.methods:
      raise ValueError(f"methods must be of {list(METHODS)} with alone among them; got {list(config.methods)}")
    if (config.teacher or config.student) and not (config.tokenizer and config.text):
      raise ValueError("a checkpoint needs its vocabulary and text: give tokenizer and text as well")
    if config.tokenizer and not config.text:
      raise ValueError(f"tokenizer={config.tokenizer!r} needs text: files to distil on")
    return config


def main(config: Config) -> None:
  """Runs the experiment, or what is left of it."""
  config = config.checked()
  splits, tokenizer = read_text(config)
  pair = models_of(config, tokenizer)
  if config.batch_size > len(splits["train"]["tokens"]):
    raise ValueError(f"batch_size={config.batch_size} is more than the {len(splits['train']['tokens'])} rows of text")
  with phases.session(config, text=digest(splits)) as session:
    teacher = train_teacher(session, splits, pair) if pair.teacher_params is None else pair.teacher_params
    end = end_of(tokenizer)
    students = {name: train_student(session, splits, pair, teacher, name, end) for name in config.methods}
    for name, trained in students.items():
      export(session, pair, name, trained, tokenizer)
    language_report.write(session, splits, pair, teacher, students, tokenizer)


class Pair(NamedTuple):
  """The two models, and their params where they come from checkpoints."""

  student: Language
  teacher: Language
  student_params: Any = None
  teacher_params: Any = None


def models_of(config: Config, tokenizer: Any) -> Pair:
  """Reads the checkpoints that are given, and makes configs for the others.

  Raises:
    ValueError: if a checkpoint cannot be read, or has fewer rows than the vocabulary has tokens.
  """
  tokens, found = tokenizer.get_vocab_size(), {}
  for name in ("student", "teacher"):
    width, depth = getattr(config, f"{name}_width"), getattr(config, f"{name}_depth")
    if directory := getattr(config, name):
      read = models.load_pretrained(directory, param_dtype=np.float32 if name == "student" else None)
      if read.config.vocabulary < tokens:
        raise ValueError(f"{directory} has {read.config.vocabulary} tokens, fewer than {config.tokenizer}: {tokens}")
      found[name] = language(read.config), read.variables[0]
    else:
      heads, mlp = max(width // 32, 1), 8 * width // 3 // 8 * 8
      sizes = {"width": width, "depth": depth, "heads": heads, "mlp_width": mlp, "max_length": config.length}
      found[name] = language(models.DecoderConfig(vocabulary=tokens, tied=True, **sizes)), None
  return Pair(found["student"][0], found["teacher"][0], found["student"][1], found["teacher"][1])


def optimizer(peak: float, num_steps: int) -> optax.GradientTransformation:
  """AdamW along a schedule that rises first."""
  schedule = optax.warmup_cosine_decay_schedule(0, peak, max(num_steps // 10, 1), num_steps, peak / 20)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


def from_text(student: Language, soft_cap: float | None) -> Term:
  """The cross-entropy of the text."""
  inputs = {"hidden": "student.hidden", "head": student.head_path("student"), "labels": "batch.labels"}
  return Term(losses.fused_cross_entropy, inputs | {"where": "batch.where"} | _given(soft_cap=soft_cap))


def from_teacher(config: Config, pair: Pair, divergence: str) -> Term:
  """A divergence from the teacher on the text of the batch."""
  inputs = {"student_hidden": "student.hidden", "student_head": pair.student.head_path("student")}
  inputs |= {"teacher_hidden": "teacher.hidden", "teacher_head": pair.teacher.head_path("teacher")}
  numbers: dict[str, Any] = {"temperature": config.temperature, "beta": config.beta, "alpha": config.alpha}
  caps = {f"{name}_soft_cap": getattr(pair, name).config.logit_soft_cap for name in ("student", "teacher")}
  loss = functools.partial(losses.fused_divergence, divergence=divergence, **numbers, **_given(**caps))
  return Term(loss, inputs | {"where": "batch.where"})


def _given(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def train_teacher(session: phases.Session, splits: Any, pair: Pair) -> Any:
  """Trains the teacher from scratch and returns its params."""
  config, sample = session.config, functools.partial(data.sample, size=session.config.batch_size)
  terms = {"text": from_text(pair.teacher, None)}
  tune = optimizer(config.teacher_learning_rate, config.teacher_steps)
  learner = training.make_learner({"student": pair.teacher.hidden}, terms, tune, sample=sample)
  score = scorer(pair.teacher, pair.teacher, few(splits["validation"], config.test_rows // 8))

  def evaluate(state):
    params = state.params["student"]
    return {"validation/bits per byte": score(params, phases.one_seed(params))["bits per byte"]}

  feed, keys = feed_of(splits["train"]), jax.random.split(jax.random.key(1), 1)
  phase = phases.run(
    session, "teacher", program_of(session, learner), feed, config.teacher_steps, keys=keys, evaluate=evaluate
  )
  return phases.one_seed(phase.state.params["student"])


def feed_of(rows: data.Arrays) -> phases.Feed:
  """Rows that stay on the device, of which each seed draws in its own order."""
  arrays = {name: rows[name] for name in ("tokens", "segments", "labels", "where")}
  return phases.Feed(itertools.repeat(phases.on_device(arrays)))


def program_of(session: phases.Session, learner: training.Learner, params: Any = None) -> phases.Program:
  """Trains the seeds one after another in each step: a CPU multiplies one large matrix better than several.

  Args:
    session: of the run.
    learner: of one seed.
    params: of a checkpoint that all seeds start from.
  """

  def init(keys, rows, *frozen):
    return jax.vmap(learner.init, (0, *(None for _ in (rows, *frozen))))(keys, rows, *frozen)

  def step(states, rows, *frozen):
    return jax.lax.map(lambda state: learner.step(state, rows, *frozen), states)

  def init_from(*arguments):
    state = program.init(*arguments)
    place = lambda leaf, like: jax.device_put(jnp.broadcast_to(leaf, like.shape), like.sharding)
    start = jax.tree.map(place, params, state.params["student"])
    return state._replace(params=state.params | {"student": start})

  program = phases.program(training.Learner(init, step, learner.follows), session.config.layout(leading=1))
  return program if params is None else program._replace(init=init_from)


class Trained(NamedTuple):
  """The end of a training."""

  params: Any  # each leaf with an axis for the seeds
  milliseconds: float  # of an update of one seed


def train_student(session: phases.Session, splits: Any, pair: Pair, teacher: Any, name: str, end: int) -> Trained:
  """Trains the student of a method for each seed."""
  config, method = session.config, METHODS[name]
  tune = optimizer(config.learning_rate, config.student_steps)
  frozen = None if method.divergence is None else {"teacher": (teacher, {})}
  if method.divergence is None:
    network = {"student": pair.student.hidden}
    terms = {"text": from_text(pair.student, pair.student.config.logit_soft_cap)}
  else:
    network = {"student": pair.student.hidden, "teacher": pair.teacher.hidden}
    terms = {name: from_teacher(config, pair, method.divergence)}
  sample = functools.partial(data.sample, size=config.batch_size)
  if method.writer == "student":
    learner = on_policy(config, pair.student, training.make_learner(network, terms, tune), end)
  else:
    learner = training.make_learner(network, terms, tune, sample=sample)
  rows = splits["train"]
  if method.writer == "teacher":
    rows = greedy_text(session, rows, pair.teacher, teacher, end)
  score = scorer(pair.student, pair.teacher, few(splits["validation"], config.test_rows // 8))

  def evaluate(state):
    return {f"validation/{metric}": values for metric, values in score(state.params["student"], teacher).items()}

  program, phase_name = program_of(session, learner, pair.student_params), f"students, {name}"
  phase = phases.run(
    session, phase_name, program, feed_of(rows), config.student_steps, frozen=frozen, evaluate=evaluate
  )
  return Trained(phase.state.params["student"], milliseconds_of(session, phase, phase_name))


def milliseconds_of(session: phases.Session, phase: phases.Phase, name: str) -> float:
  """Measures an update of one seed at the end of a phase; a resumed one has the number of its first run."""
  file = session.directory / "costs" / f"{phases.slug(name)}.json"
  if not file.is_file():
    state = jax.block_until_ready(phase.step(jax.tree.map(jnp.copy, phase.state)))
    start = time.perf_counter()
    for _ in range(3):
      state = jax.block_until_ready(phase.step(state))
    taken = 1e3 * (time.perf_counter() - start) / 3 / session.config.seeds
    file.parent.mkdir(exist_ok=True)
    training.write_atomically(file, json.dumps(taken) + "\n")
  return json.loads(file.read_text())


def on_policy(config: Config, student: Language, learner: training.Learner, end: int) -> training.Learner:
  """A learner that, in its second half, sees text that its student has just written in a share of its rows.

  What is drawn follows from the key and the step of the state alone, so a run that is resumed writes the same text.
  """
  own = max(1, round(config.share * config.batch_size))
  sampler = models.make_sampler(student.config, new_tokens=config.length - config.prompt, stop_tokens=(end,))

  def batch_of(state: training.TrainState, rows: data.Arrays) -> data.Arrays:
    key = training.named_key(state.key, "data")  # as a learner draws
    given = data.sample(rows, key, state.step, size=config.batch_size)
    key = training.named_key(jax.random.fold_in(state.key, state.step), "own text")

    def written():
      first = {name: given[name][:own] for name in ("tokens", "segments")}
      made = continued(sampler, state.params["student"], first, config.prompt, key)
      return {name: jnp.concatenate([made[name].astype(given[name].dtype), given[name][own:]]) for name in given}

    return jax.lax.cond(2 * state.step < config.student_steps, lambda: given, written)

  def init(key, rows, frozen):
    return learner.init(key, {name: value[: config.batch_size] for name, value in rows.items()}, frozen)

  step = lambda state, rows, frozen: learner.step(state, batch_of(state, rows), frozen)
  return training.Learner(init, step, learner.follows)


def greedy_text(session: phases.Session, rows: data.Arrays, teacher: Language, params: Any, end: int) -> data.Arrays:
  """What the teacher writes after the beginnings of some rows, recorded in the run directory."""
  config, directory = session.config, session.directory / "greedy"
  source = {"params": digest(params), "rows": config.greedy_rows, "prompt": config.prompt}
  chosen = few(rows, config.greedy_rows)
  if not (directory.is_dir() and _is_of(directory, source)):
    greedy = {"new_tokens": config.length - config.prompt, "temperature": 0.0, "stop_tokens": (end,)}
    sampler, key = models.make_sampler(teacher.config, **greedy), jax.random.key(0)
    write = jax.jit(lambda params, part: continued(sampler, params, part, config.prompt, key))
    size = min(128, len(chosen["tokens"]))
    parts = [
      jax.tree.map(np.asarray, write(params, {name: chosen[name][at : at + size] for name in ("tokens", "segments")}))
      for at in range(0, len(chosen["tokens"]) - size + 1, size)
    ]
    made = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    teachers.record(directory, made, np.arange(len(made["tokens"])), source=source)
  return teachers.read_record(directory)


def _is_of(directory: pathlib.Path, source: dict[str, Any]) -> bool:
  try:
    return teachers.open_record(directory).source == source
  except ValueError:
    return False


def export(session: phases.Session, pair: Pair, name: str, trained: Trained, tokenizer: Any) -> None:
  """Writes the student of the first seed as a checkpoint that others read, with its vocabulary."""
  directory = session.directory / "students" / phases.slug(name)
  if (directory / "config.json").is_file():
    return
  shutil.rmtree(directory, ignore_errors=True)  # half of one, from a run that was killed
  like = session.config.student or None
  models.save_pretrained(directory, pair.student.config, phases.one_seed(trained.params), like=like)
  tokenizer.save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
  common.run_command_line(main, Config)
