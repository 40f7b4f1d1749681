"""Learns several tasks together on real data, and asks what sharing and balancing them is worth.

By default, the character, the slant and the weight (a regression) of fonts that no model has seen, from 620 images.
Independent networks are compared with hard sharing (one encoder), soft sharing (own networks coupled by L2 or by the
trace norm of their differences) and feature sharing (one layer, own deeper ones), all with the same layers from input
to prediction, and then balancers on the hard-sharing network. Two small problems more: two overlaid digits, to be read
left and right; and 442 diabetes patients, of whom the progression of the disease and the blood sugar (regressions) and
the sex (classes) are predicted.

Every seed has a split of the data (of glyphs a choice of training images), initial weights and an order of batches of
its own, the same for all methods, so that differences are paired. Strengths of the couplings are chosen by the
validation split (mean over tasks of accuracy or R^2, mean over seeds). Learning rates, steps and widths are the same
for all methods; nobody tuned them for any.

    python -m experiments.joint                       some minutes on two CPU cores; results in runs/joint
    python -m experiments.joint --smoke               a look, in seconds
    python -m experiments.joint --balancers UPGrad    other balancers
    python -m experiments.joint --problems overlaid_digits diabetes --run runs/joint-small

Killed at any moment, the same command continues it and ends with the same bits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, joint_report, phases
from experiments.balancers import BALANCERS, CHOSEN, NEED_THREE_TASKS, one_of
from experiments.networks import check_widths, few_glyphs, tasks_of
from kdflax import balancing, coupling, data, models, training
from kdflax.objectives import Term, evaluate

STEPS_PER_CALL = 10


class Problem(NamedTuple):
  """Where the inputs of a problem are, and its tasks."""

  input: str
  tasks: Mapping[str, int | None]  # number of classes, or None for a regression


def problem_of(name: str) -> Problem:
  """The problem that a data set of several tasks poses."""
  return Problem(data.dataset(name).input, {task: of.classes for task, of in tasks_of(name).items()})


PROBLEMS = {name: problem_of(name) for name in ("glyphs", "overlaid_digits", "diabetes")}
_LABELS = 620  # training images of the glyphs: ten of each character


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the networks of a problem are made and trained."""

  hidden: tuple[int, ...] = (64, 32)
  """Widths of the layers before a task's last one; feature sharing shares the first."""
  steps: int = 1000
  """Updates; a multiple of 10."""
  learning_rate: float = 3e-3
  """Peak of the cosine schedule of Adam."""
  batch_size: int = 64
  """Examples in a batch."""
  l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
  """Strengths of the L2 coupling to choose from."""
  trace_norm: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
  """Strengths of the trace-norm coupling to choose from."""
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  """Weights of the losses by task; 1 if not given."""


@dataclasses.dataclass(frozen=True)
class Config(common.Devices):
  """Settings of the experiment; they are bound to the run directory."""

  run: str = "runs/joint"
  """Run directory: made, or continued if it holds a run with the same settings."""
  problems: tuple[str, ...] = ("glyphs",)
  """Problems to solve: data sets of several tasks, by name."""
  overlaid_digits: Settings = Settings()
  """Settings for the overlaid digits."""
  diabetes: Settings = Settings(hidden=(32, 16), steps=300)
  """Settings for the diabetes patients."""
  glyphs: Settings = Settings(hidden=(32, 16), steps=600)
  """Settings for the glyphs."""
  balancers: tuple[str, ...] = CHOSEN
  """Balancers to try on the hard-sharing network; without one, its losses are added."""
  seeds: int = 5
  """Paired repetitions, trained together by vmap."""
  save_every: int = 500
  """Updates between checkpoints; a multiple of 10."""
  accept_changes: bool = False
  """Continue a run although its settings differ."""
  smoke: bool = False
  """A run of seconds: two seeds, few steps and balancers, the smallest problem."""

  def checked(self) -> "Config":
    """Returns the settings that will be used.

    Raises:
      ValueError: if one makes no sense.
    """
    config = self
    if self.smoke:
      few = dataclasses.replace(self.diabetes, hidden=(8, 4), steps=20, l2=(1e-3,), trace_norm=(1e-3,))
      run = "runs/joint-smoke" if self.run == Config.run else self.run
      small: Any = {"problems": ("diabetes",), "diabetes": few, "seeds": 2, "save_every": 10}
      config = dataclasses.replace(self, run=run, balancers=("UPGrad", "uncertainty"), **small)
    unknown = [name for name in config.balancers if name not in BALANCERS]
    if unknown:
      raise ValueError(f"unknown balancers {unknown}; there are {', '.join(BALANCERS)}")
    if unknown := [name for name in config.problems if name not in PROBLEMS]:
      raise ValueError(f"unknown problems {unknown}; there are {', '.join(PROBLEMS)}")
    if not config.problems:
      raise ValueError(f"problems must name one or more of {', '.join(PROBLEMS)}; got none")
    if config.seeds < 1 or config.save_every < 1 or config.save_every % STEPS_PER_CALL:
      raise ValueError(
        f"seeds must be at least 1 and save_every a positive multiple of {STEPS_PER_CALL}; got {config.seeds} and"
        f" {config.save_every}"
      )
    for name in config.problems:
      _check_settings(name, getattr(config, name))
    return config


def _check_settings(problem: str, settings: Settings) -> None:
  check_widths(**{f"{problem}: hidden": settings.hidden})
  if settings.steps < 1 or settings.steps % STEPS_PER_CALL:
    raise ValueError(f"{problem}: steps must be a positive multiple of {STEPS_PER_CALL}; got {settings.steps}")
  if settings.batch_size < 1 or not settings.learning_rate > 0 or len(settings.hidden) < 2:
    raise ValueError(
      f"{problem}: batch_size and learning_rate must be positive and hidden name two layers or more; got {settings}"
    )
  if not settings.l2 or not settings.trace_norm or not min(*settings.l2, *settings.trace_norm) > 0:
    raise ValueError(f"{problem}: strengths of couplings must be positive; got {settings.l2}, {settings.trace_norm}")
  weights = dict.fromkeys(PROBLEMS[problem].tasks, 1.0) | dict(settings.weights)
  check_tasks(losses=PROBLEMS[problem].tasks, weights=weights)


def check_tasks(**names: Mapping[str, Any]) -> None:
  """Raises a ValueError unless all arguments name the same tasks."""
  first, *others = names
  for other in others:
    if set(names[other]) != set(names[first]):
      raise ValueError(
        f"tasks do not match: {first} are for {sorted(names[first])}, {other} for {sorted(names[other])}"
      )


def main(config: Config) -> None:
  """Runs the experiment, or what is left of it."""
  config = config.checked()
  with phases.session(config) as session:
    results = [result for name in config.problems for result in solve(session, name)]
    print(joint_report.write(session.directory, results, config.seeds))


class Work(NamedTuple):
  """One problem of a run."""

  name: str
  problem: Problem
  settings: Settings
  splits: Any  # by name; arrays [seeds, examples, ...] on the device
  layout: training.Layout | None = None


class Machine(NamedTuple):
  """Everything compiled for one kind of network: an integer chooses the coupling, or the balancer, of a phase."""

  program: phases.Program
  predict: Callable  # (params, split) -> predictions by task


class Trained(NamedTuple):
  """The end of a phase: networks for each strength of the coupling and each seed."""

  params: Any  # leaves [strengths, seeds, ...]
  validation: np.ndarray  # [strengths, seeds], mean of the tasks' scores
  test: dict[str, dict[str, np.ndarray]]  # by task and metric, [strengths, seeds]
  seconds: float | None  # None if the phase was resumed


def solve(session: phases.Session, name: str) -> Iterator[dict[str, Any]]:
  """Trains every method on a problem; one result for each, with a number for each seed."""
  config, problem = session.config, PROBLEMS[name]
  work = Work(name, problem, getattr(config, name), load(name, config.seeds), config.layout(leading=2))
  soft = machine(work, network(work, "soft"), penalties=(coupling.l2_coupling, trace_norm))
  trained = train(session, work, "L2 soft", soft, 0, (0.0, *work.settings.l2))
  baseline = networks_at(trained)  # without coupling the networks are independent
  yield joint_report.result(name, "independent", baseline, baseline)
  yield joint_report.result(name, "L2 soft", best(trained, (0.0, *work.settings.l2)), baseline)
  trained = train(session, work, "trace-norm soft", soft, 1, (0.0, *work.settings.trace_norm))
  yield joint_report.result(name, "trace-norm soft", best(trained, (0.0, *work.settings.trace_norm)), baseline)
  trained = train(session, work, "feature", machine(work, network(work, "feature")))
  yield joint_report.result(name, "feature", networks_at(trained), baseline)
  hard = network(work, "hard")
  cosines = cosine_diagnostic(work, hard)
  for made in balancers_of(session.config, work):
    shared = machine(work, hard, balancers=tuple(made.values()))
    for choice, method in enumerate(made):
      trained = train(session, work, method, shared, choice, diagnose=cosines)
      yield joint_report.result(name, method, networks_at(trained), baseline)


def balancers_of(config: Config, work: Work) -> list[dict[str, Any]]:
  """The balancers by name, and those that combine whole gradients; hard sharing alone is the sum of the losses."""
  tasks, steps = len(work.problem.tasks), work.settings.steps
  names = [name for name in config.balancers if tasks > 2 or name not in NEED_THREE_TASKS]
  made = {"hard": balancing.fixed(1.0)} | {name: BALANCERS[name](tasks, steps) for name in names}
  combines = {name: balancer.needs == "gradients" for name, balancer in made.items()}
  groups = [{name: made[name] for name in made if combines[name] is kind} for kind in (False, True)]
  return [group for group in groups if group]


def trace_norm(task_params: Sequence[Any]) -> jax.Array:
  """The trace-norm coupling, smoothed so that training is smooth where differences vanish, by matrix products."""
  return coupling.trace_norm_coupling(task_params, smoothing=1e-2, method="newton_schulz")


def load(name: str, seeds: int) -> Any:
  """The splits of a problem, another for each seed (of glyphs other training images), stacked on the device."""
  each = [splits_of(name, seed) for seed in range(seeds)]
  check_tasks(losses=PROBLEMS[name].tasks, labels=each[0]["train"]["label"])
  kept = (PROBLEMS[name].input, "label")
  select = lambda arrays: {key: arrays[key] for key in kept}
  return {
    split: jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *(select(splits[split]) for splits in each))
    for split in each[0]
  }


def splits_of(name: str, seed: int) -> dict[str, data.Arrays]:
  """The splits of a problem for one seed."""
  if name != "glyphs":
    return data.load(name, seed=seed)
  return few_glyphs(tasks_of(name), _LABELS, seed)


def network(work: Work, sharing: str) -> models.Model:
  """A multi-task network: `soft`, `feature` or `hard`."""
  hidden, heads = work.settings.hidden, task_heads(work.problem)
  encoder = models.mlp(hidden, None, input=work.problem.input)
  if sharing == "soft":
    return models.soft_sharing(encoder, heads)
  if sharing == "hard":
    return models.hard_sharing(encoder, heads)
  extractor = models.mlp(hidden[:1], None, input=work.problem.input)
  return models.feature_sharing(extractor, models.mlp(hidden[1:], None, input="embedding"), heads)


def task_heads(problem: Problem) -> dict[str, models.Model]:
  """A linear head for each task."""
  return {task: models.task_head(classes) for task, classes in problem.tasks.items()}


def task_terms(problem: Problem, weights: Mapping[str, float] | None = None) -> dict[str, Term]:
  """A loss for each task: cross-entropy in nats, or the squared error of the standardised target.

  Raises:
    ValueError: if the weights name other tasks than the problem has.
  """
  weights = dict.fromkeys(problem.tasks, 1.0) | dict(weights or {})
  check_tasks(losses=problem.tasks, weights=weights)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  terms = {}
  for task, classes in problem.tasks.items():
    output, label = f"student.logits.{task}", f"batch.label.{task}"
    if classes is None:
      terms[task] = Term(optax.squared_error, {"predictions": output, "targets": label}, weights[task])
    else:
      terms[task] = Term(cross_entropy, {"logits": output, "labels": label}, weights[task])
  return terms


def machine(work: Work, model: models.Model, *, penalties: Sequence = (), balancers: Sequence = ()) -> Machine:
  """Builds what trains one network for each strength and seed at once, whichever penalty or balancer is chosen."""
  settings = work.settings
  examples = work.splits["train"]["label"][next(iter(work.problem.tasks))].shape[1]
  terms = task_terms(work.problem, settings.weights)
  kernels = coupling.select("kernel")

  def learner(arrays, strength):
    def couple(params):
      tasks = [kernels(task) for task in models.unstack(params["student"]["stacked"])]
      return jax.lax.switch(arrays["choice"], penalties, tasks)

    return training.make_learner(
      {"student": model},
      terms,
      optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps)),
      penalties={"coupling": training.Penalty(couple, strength)} if penalties else None,
      balancer=one_of(balancers, arrays["choice"]) if balancers else None,
      shared="^student/shared/" if balancers else None,
      sample=functools.partial(data.sample, size=min(settings.batch_size, examples)),
    )

  def init(keys, arrays):
    one = lambda strength: jax.vmap(learner(arrays, strength).init)(keys, arrays["train"])
    return jax.vmap(one)(arrays["strength"])

  def step(state, arrays):
    one = lambda state, strength: jax.vmap(learner(arrays, strength).step)(state, arrays["train"])
    return jax.vmap(one)(state, arrays["strength"])

  program = phases.program(training.Learner(init, step), work.layout, STEPS_PER_CALL)
  return Machine(program, predictor(work, model))


def train(
  session: phases.Session,
  work: Work,
  method: str,
  machine: Machine,
  choice: int = 0,
  strengths: Sequence[float] = (0.0,),
  *,
  diagnose: Callable[[Any], dict[str, Any]] | None = None,
) -> Trained:
  """Runs a phase of a machine: one choice, all strengths and seeds."""

  def check(state):
    validation = scores(work, machine.predict(state.params["student"], "validation"), "validation")
    rows = {f"validation/{task}": score[metric_of(work, task)] for task, score in validation.items()}
    rows |= diagnose(state.params["student"]) if diagnose else {}
    return {name: row.tolist() for name, row in rows.items()}

  arrays = {"train": work.splits["train"], "strength": jnp.asarray(strengths), "choice": jnp.int32(choice)}
  batches, steps = itertools.repeat(arrays), work.settings.steps
  phase = phases.run(session, f"{work.name}, {method}", machine.program, phases.Feed(batches), steps, evaluate=check)
  params = phase.state.params["student"]
  validation = scores(work, machine.predict(params, "validation"), "validation")
  score = np.mean([validation[task][metric_of(work, task)] for task in work.problem.tasks], axis=0)
  return Trained(params, score, scores(work, machine.predict(params, "test"), "test"), phase.seconds)


def predictor(work: Work, model: models.Model) -> Callable[[Any, str], dict[str, jax.Array]]:
  """The function from params [strengths, seeds, ...] and a split to predictions by task, compiled once for a shape."""

  def one(params, arrays):
    return model.apply(params, {}, arrays, train=False, key=None)[0]["logits"]

  run = jax.jit(jax.vmap(jax.vmap(one), (0, None)))
  return lambda params, split: run(params, work.splits[split])


def cosine_diagnostic(work: Work, model: models.Model) -> Callable[[Any], dict[str, Any]]:
  """The function from params to the cosines of the tasks' gradients over all training examples, for every pair."""
  terms = task_terms(work.problem)

  def one(params, arrays):
    def losses(shared):
      outputs, _ = model.apply(params | {"shared": shared}, {}, arrays, train=False, key=None)
      values, _ = evaluate(terms, {"student": outputs, "batch": arrays})
      return jnp.stack(list(values.values()))

    _, gradients = balancing.task_gradients(losses, params["shared"])
    return balancing.gradient_cosines(balancing.gramian(gradients))

  run = jax.jit(jax.vmap(jax.vmap(one), (0, None)))

  def diagnose(params):
    cosines = np.asarray(run(params, work.splits["train"]))
    pairs = itertools.combinations(enumerate(work.problem.tasks), 2)
    return {f"cosine/{first} and {second}": cosines[..., i, j] for (i, first), (j, second) in pairs}

  return diagnose


def metric_of(work: Work, task: str) -> str:
  """The metric of a task in which higher is better."""
  return "r_squared" if work.problem.tasks[task] is None else "accuracy"


def scores(work: Work, predictions: Mapping[str, jax.Array], split: str) -> dict[str, dict[str, np.ndarray]]:
  """Metrics `[strengths, seeds]` by task and name, over a whole split."""
  labels = work.splits[split]["label"]
  check_tasks(heads=predictions, labels=labels)
  results = {}
  for task, classes in work.problem.tasks.items():
    found, wanted = np.asarray(predictions[task]), np.asarray(labels[task])
    if classes is None:
      error = np.abs(found.astype(np.float64) - wanted).mean(-1)
      results[task] = {"absolute_error": error, "r_squared": common.scores(found, wanted, classes)}
    else:
      results[task] = {"accuracy": common.scores(found, wanted, classes)}
  return results


def best(trained: Trained, strengths: Sequence[float]) -> dict[str, Any]:
  """The networks of the positive strength that validates best."""
  index = max(range(1, len(strengths)), key=lambda index: trained.validation[index].mean())
  return networks_at(trained, index, strengths[index])


def networks_at(trained: Trained, index: int = 0, strength: float = 0.0) -> dict[str, Any]:
  """The networks of one strength, for all seeds."""
  return {
    "strength": strength,
    "tasks": {task: {name: v[index].tolist() for name, v in found.items()} for task, found in trained.test.items()},
    "validation": trained.validation[index].tolist(),
    "seconds": trained.seconds,
    "params": jax.tree.map(lambda leaf: np.asarray(leaf[index]), trained.params),
  }


if __name__ == "__main__":
  common.run_command_line(main, Config)
