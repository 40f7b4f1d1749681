"""What experiments share around training: a locked run, one phase for all seeds, its batches, its test and its cost.

A phase is trained under a name, saved, and resumed under it; every leaf of its state has a leading axis that counts the
seeds. What it trains is a `Learner`, so any models, terms, balancer or averages will do.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from kdflax import data, models, training
from kdflax.data.orders import ORDER
from kdflax.objectives import Term
from kdflax.training.metrics import accuracy

PyTree = Any
_UNBOUND = ("run", "accept_changes", "mesh", "fsdp", "log")  # settings that may differ when a run continues


class Session(NamedTuple):
  """What the phases of a run share."""

  config: Any
  directory: pathlib.Path
  log: training.MetricsLog
  stop: threading.Event


class Feed(NamedTuple):
  """Where the batches of a phase come from."""

  batches: Any  # iterator, with a position if the batches depend on it
  sample: Any = None  # draws a batch from arrays that stay on the device
  axes: Any = None  # which axis of each array counts the seeds
  bound: Mapping[str, str] | None = None  # digests of what else is in it, by name; as `fit` takes them


class Program(NamedTuple):
  """What trains all repetitions of a phase at once; every leaf of its state counts them on its leading axes."""

  init: Callable[..., training.TrainState]  # (keys, batch, *frozen) -> state
  step: Any  # of `make_train_step`: (state, batch, *frozen) -> (state, metrics)
  steps_per_call: int = 1
  layout: training.Layout | None = None  # what is sharded how, if not everything is everywhere


class Phase(NamedTuple):
  """The end of a phase, and what it takes to run one more step of it."""

  state: training.TrainState
  seconds: float | None  # of all repetitions, compilation included; None if the phase was resumed
  step: Callable[[training.TrainState], training.TrainState]  # gives its argument away
  compiled: Callable[[], Any]  # the compiled program of a step


@contextlib.contextmanager
def session(config: Any, **bound: Any) -> Iterator[Session]:
  """Opens the run directory of a config: locked, bound to its settings, stopped by SIGTERM or Ctrl-C between two steps.

  Args:
    config: a dataclass with `run`, the directory, and `accept_changes`.
    **bound: what else the results depend on, as JSON.
  """
  common.check_room(config.run)
  settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _UNBOUND}
  settings |= {"order": ORDER} | bound
  with (
    training.RunDirectory(config.run, settings, accept_changes=config.accept_changes) as directory,
    training.MetricsLog(
      directory.path / "metrics.jsonl", [training.tracker(name, directory.path) for name in getattr(config, "log", ())]
    ) as log,
    training.stop_on_signals() as stop,
  ):
    yield Session(config, directory.path, log, stop)


def train(
  session: Session,
  name: str,
  learner: training.Learner,
  feed: Feed,
  num_steps: int,
  *,
  keys: jax.Array | None = None,
  frozen: Mapping[str, PyTree] | None = None,
  evaluate: Callable[[training.TrainState], dict[str, Any]] | None = None,
) -> Phase:
  """Trains a learner for each seed at once, saved and resumed under the name of the phase.

  Args:
    session: as `run` takes it.
    name: of the phase, `group, method` for the learning curves.
    learner: of one seed.
    feed: its data.
    num_steps: updates.
    keys: one key for each seed; by default those of `config.seeds` seeds, the same in every phase.
    frozen: handed to the learner, each leaf with an axis for the seeds; as `run` takes it.
    evaluate: `state -> numbers by name`, ten times during the phase.
  """
  given = () if frozen is None else (frozen,)
  axes = (0, feed.axes, *(0 for _ in given))
  seeds = training.Learner(jax.vmap(learner.init, axes), jax.vmap(learner.step, axes), learner.follows)
  layout, mesh = session.config.layout(leading=1), training.make_mesh()

  def init(*arguments):
    # Not jitted: its operations are compiled once for all phases, its program would be compiled for each.
    return jax.device_put(seeds.init(*arguments), training.replicated(mesh))

  everywhere = Program(init, training.make_train_step(seeds, mesh=mesh))
  chosen = everywhere if layout is None else program(seeds, layout)
  return run(session, name, chosen, feed, num_steps, keys=keys, frozen=frozen, evaluate=evaluate)


def program(learner: training.Learner, layout: training.Layout | None, steps_per_call: int = 1) -> Program:
  """The program of a learner of all repetitions, under a layout if there is one."""
  step = training.make_train_step(learner, layout=layout, steps_per_call=steps_per_call)
  init = jax.jit(learner.init) if layout is None else functools.partial(training.init_state, learner, layout=layout)
  return Program(init, step, steps_per_call, layout)


def _placed(feed: Feed, layout: training.Layout) -> Feed:
  """A feed whose arrays are on the devices: batches spread over them, what they are drawn from on each."""
  place = functools.partial(training.place_batch, mesh=layout)
  if hasattr(feed.batches, "get_state"):
    return feed._replace(batches=_PlacedBatches(feed.batches, place))
  if feed.sample is None and not isinstance(feed.batches, itertools.repeat):
    return feed._replace(batches=map(place, feed.batches))
  arrays = jax.device_put(next(feed.batches), training.replicated(layout.mesh))
  return feed._replace(batches=itertools.repeat(arrays))


class _PlacedBatches:
  """Batches of a stream on the devices; the position is that of the stream."""

  def __init__(self, batches: Any, place: Callable[[Any], Any]):
    self._batches, self._place = batches, place
    self.get_state, self.set_state = batches.get_state, batches.set_state

  def __next__(self) -> Any:
    return self._place(next(self._batches))


def run(
  session: Session,
  name: str,
  program: Program,
  feed: Feed,
  num_steps: int,
  *,
  keys: jax.Array | None = None,
  frozen: Mapping[str, PyTree] | None = None,
  evaluate: Callable[[training.TrainState], dict[str, Any]] | None = None,
) -> Phase:
  """Runs a program, saved and resumed under the name of the phase; `train` makes one for the seeds of a learner.

  Args:
    session: of a config with `seeds` and `save_every`.
    name: as for `train`.
    program: what to run.
    feed: its data; only its batches and what they are bound to matter here.
    num_steps: updates.
    keys: as for `train`.
    frozen: handed to the program, by name; the checkpoints of the phase are bound to its content.
    evaluate: as for `train`.
  """
  config, chunk = session.config, program.steps_per_call
  keys = jax.random.split(jax.random.key(0), config.seeds) if keys is None else keys
  given = () if frozen is None else (frozen,)
  if program.layout is not None:
    feed, given = _placed(feed, program.layout), jax.device_put(given, training.replicated(program.layout.mesh))
  bound = {name: training.digest(arrays) for name, arrays in (frozen or {}).items()} | dict(feed.bound or {})
  example = common.peek(feed.batches)
  state = program.init(keys, example, *given)
  interval = max(num_steps // 10 // chunk, 1) * chunk
  start = time.perf_counter()
  with training.Checkpoints(checkpoint_directory(session, name)) as checkpoints:
    resumed = bool(checkpoints.steps())
    state = training.fit(
      lambda state, batch: program.step(state, batch, *given),
      state,
      feed.batches,
      num_steps=num_steps,
      steps_per_call=chunk,
      phase=name,
      saving=training.Saving(checkpoints, config.save_every, bound),
      logging=training.Logging(session.log, interval, common.Progress(name, num_steps)),
      evaluation=training.Evaluation(evaluate, interval),
      stop=session.stop,
    )
  seconds = None if resumed else time.perf_counter() - start
  return Phase(
    state,
    seconds,
    lambda state: program.step(state, example, *given)[0],
    lambda: program.step.lower(state, example, *given).compile(),
  )


def checkpoint_directory(session: Session, name: str) -> pathlib.Path:
  """Where a phase is saved."""
  return session.directory / "checkpoints" / slug(name)


def slug(name: str) -> str:
  """The name of a phase as the name of a file."""
  return name.replace(", ", "-").replace(" ", "-")


def variables_of(state: training.TrainState, name: str) -> Any:
  """(params, state) of a model."""
  return state.params[name], state.model_state[name]


def one_seed(variables: tuple[PyTree, PyTree], seed: int = 0) -> tuple[PyTree, PyTree]:
  """The variables of one seed."""
  return jax.tree.map(lambda leaf: leaf[seed], variables)


def accuracy_of(logits: str = "model.logits", labels: str = "batch.label") -> Term:
  """The Term of a `tester` that counts right answers."""
  return Term(accuracy, {"logits": logits, "labels": labels, "where": "batch.where"})


def tester(
  model: models.Model, split: Any, terms: Mapping[str, Term] | None = None, *, batch_size: int = 512
) -> Callable[[Any], dict[str, Any]]:
  """Returns the function from the variables of all seeds to means over a split, compiled once.

  Args:
    model: called `model` in the context.
    split: arrays `[examples, ...]`.
    terms: per-example functions by name; by default the accuracy of one task.
    batch_size: examples at a time.

  Returns:
    `variables -> {name: [one number for each seed]}`.
  """
  terms = {"accuracy": accuracy_of()} if terms is None else terms
  step = jax.jit(jax.vmap(training.make_eval_step({"model": model}, terms), (0, None, None)))
  size = min(batch_size, data.num_examples(split))
  return lambda variables: training.evaluate_dataset(step, {"model": variables}, data.padded_batches(split, size))


def outputs(
  model: models.Model, variables: Any, split: Any, *, names: Sequence[str], batch_size: int = 512
) -> dict[str, Any]:
  """Returns what a model of every seed says about a split in evaluation mode.

  Args:
    model: any.
    variables: (params, state), each leaf with an axis for the seeds.
    split: arrays `[examples, ...]`.
    names: which of the outputs; feature maps of many images are large.
    batch_size: examples at a time.

  Returns:
    NumPy arrays `[seeds, examples, ...]` by name.
  """

  batches = data.padded_batches(split, min(batch_size, data.num_examples(split)))
  return training.predict(model, variables, batches, names=names, seeds=True)


def on_device(arrays: Any) -> Any:
  """Puts arrays on the device once."""
  return jax.tree.map(jnp.asarray, arrays)


def draw_mixed(arrays: Any, key: jax.Array, step: jax.Array, size: int) -> Any:
  """As many labelled images as of all images; `labelled` masks the second half.

  So the hard labels of a method and of its baseline come from the same batches.

  Args:
    arrays: `images`, a dict of arrays, and `labelled`, the rows that may be used with their labels.
    key: of the seed.
    step: training step.
    size: images of each kind.
  """
  images, labelled = arrays["images"], arrays["labelled"]
  chosen = data.batch_indices(
    training.named_key(key, "labelled"), step, num_examples=labelled.shape[0], batch_size=size
  )
  return data.mix(
    data.gather(images, labelled[chosen]), data.sample(images, training.named_key(key, "all"), step, size=size)
  )


class Cost(NamedTuple):
  """What one step of one seed costs."""

  milliseconds: float  # measured, median
  megaflops: float  # as the compiler counts them
  megabytes: float  # read and written, as the compiler counts them


def cost(session: Session, phase: Phase, name: str, *, seeds: int, repeats: int = 20) -> Cost:
  """Measures a step of a phase that has just been trained; a resumed one has the numbers of its first run.

  Args:
    session: where the numbers are kept.
    phase: of `train`; its state is left as it is.
    name: of the phase.
    seeds: trained at once; costs are divided by it.
    repeats: steps to time, in five groups.
  """
  file = session.directory / "costs" / f"{slug(name)}.json"
  if file.is_file():
    return Cost(**json.loads(file.read_text()))
  state, seconds = jax.tree.map(jnp.copy, phase.state), []
  state = jax.block_until_ready(phase.step(state))  # compiles, if the phase was resumed at its end
  for _ in range(5):
    start = time.perf_counter()
    for _ in range(max(repeats // 5, 1)):
      state = phase.step(state)
    jax.block_until_ready(state)
    seconds.append((time.perf_counter() - start) / max(repeats // 5, 1))
  analysis: Any = phase.compiled().cost_analysis() or {}
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  per_seed = lambda value: float(value) / seeds
  measured = Cost(
    milliseconds=per_seed(1e3 * np.median(seconds)),
    megaflops=per_seed(analysis.get("flops", float("nan")) / 1e6),
    megabytes=per_seed(analysis.get("bytes accessed", float("nan")) / 1e6),
  )
  file.parent.mkdir(exist_ok=True)
  training.write_atomically(file, json.dumps(measured._asdict()) + "\n")
  return measured


def latency(
  session: Session,
  model: models.Model,
  variables: Any,
  split: Any,
  name: str,
  *,
  batch_sizes: tuple[int, ...] = (1, 256),
) -> dict[str, float]:
  """Measures the jitted forward pass to the logits: median microseconds by batch size; once, then kept as `cost` is.

  Args:
    session: where the numbers are kept.
    model: any.
    variables: of one seed.
    split: images to take.
    name: of the model.
    batch_sizes: images in a pass.
  """
  file = session.directory / "costs" / f"{slug(name)}-forward.json"
  if file.is_file():
    return json.loads(file.read_text())
  forward = jax.jit(lambda params, state, batch: model.apply(params, state, batch, train=False, key=None)[0]["logits"])
  measured = {}
  for size in batch_sizes:
    batch = on_device(jax.tree.map(lambda x, size=size: x[:size], split))
    jax.block_until_ready(forward(*variables, batch))
    seconds = []
    for _ in range(51):
      start = time.perf_counter()
      jax.block_until_ready(forward(*variables, batch))
      seconds.append(time.perf_counter() - start)
    measured[str(size)] = float(1e6 * np.median(seconds))
  file.parent.mkdir(exist_ok=True)
  training.write_atomically(file, json.dumps(measured) + "\n")
  return measured
