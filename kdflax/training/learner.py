"""The training step: models -> context -> terms -> balancer -> optimizer, as one pure function."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from kdflax import balancing
from kdflax.model import Model, PyTree, Variables, named_key
from kdflax.numerics.examples import AxisName
from kdflax.numerics.trees import merge, partition
from kdflax.objectives import Metrics, Term, at, evaluate, read_by
from kdflax.training import checks
from kdflax.training.forward import init_models, run_fixed, run_trained, start_context
from kdflax.training.passes import Passes, Rows, pass_cached, pass_in_parts, pass_whole, split_batch
from kdflax.training.precision import computing_in
from kdflax.training.sharding import pin_batch, pin_gradient
from kdflax.training.state import Average, Penalty, TrainState
from kdflax.training.update import followed, follower, over_devices, penalize, unless_spoilt, widened

Balancing = balancing.Balancer | balancing.Combiner | None


class Sample(Protocol):
  """`(data, key, step) -> batch`."""

  def __call__(self, data: PyTree, key: jax.Array, step: jax.Array, /) -> PyTree: ...


class Learner(NamedTuple):
  """A training program as a pair of pure functions, to be jitted, vmapped over seeds or scanned.

  `init(key, data, frozen) -> TrainState` and `step(state, data, frozen) -> (TrainState, metrics)`, where `frozen` holds
  (params, state) of the models that are not trained, and `data` is a batch (or what `sample` draws one from). `follows`
  names the source of each average, for a `Layout`: make another learner of this one by `learner._replace(step=...)`.
  """

  init: Callable[..., TrainState]
  step: Callable[..., tuple[TrainState, Metrics]]
  follows: Mapping[str, str] | None = None


class _Program(NamedTuple):
  """What a learner is made of: the checked arguments of `make_learner`."""

  models: dict[str, Model]
  terms: dict[str, Term]
  optimizer: optax.GradientTransformation
  averages: dict[str, Average]
  penalties: dict[str, Penalty]
  balancer: Balancing
  rows: dict[str, tuple[str, ...]]
  shared: str | None
  weigh_own: bool
  batch_size: int | None
  hold_gradients: bool
  skip_not_finite: bool
  accumulate: int
  cache_outputs: bool
  sample: Sample | None
  axis_name: AxisName


def make_learner(
  models: Mapping[str, Model],
  terms: Mapping[str, Term],
  optimizer: optax.GradientTransformation,
  *,
  averages: Mapping[str, Average] | None = None,
  penalties: Mapping[str, Penalty] | None = None,
  balancer: Balancing = None,
  rows: Mapping[str, Sequence[str]] | None = None,
  shared: str | None = None,
  weigh_own: bool = True,
  batch_size: int | None = None,
  hold_gradients: bool = True,
  skip_not_finite: bool = False,
  accumulate: int = 1,
  cache_outputs: bool = False,
  compute_dtype: DTypeLike | None = None,
  sample: Sample | None = None,
  axis_name: AxisName = None,
) -> Learner:
  """Builds the pure functions that initialise and update a training state.

  Models are evaluated in order and their outputs stored in the context under their names, so that a connector can read
  what an earlier model returned. Frozen and averaged models run first, outside the gradient and in evaluation mode. A
  model that changes with time reads the path `"step"`.

  Args:
    models: all models by name, connectors included.
    terms: the objective.
    optimizer: updates the params of all models that are neither frozen nor averages. One that needs the value of the
      objective (`optax.contrib.reduce_on_plateau`, `optax.polyak_sgd`) is given the sum of the weighted Terms and
      penalties; one that evaluates the objective anew (the line search of `optax.lbfgs`) is refused.
    averages: models that follow another by a moving average, by name (mean teacher, momentum encoder). The state holds
      them in float32 or wider whatever the params are, or small steps would be lost; the model gets them in the params'
      own dtype.
    penalties: costs of the trained params (a coupling between tasks) by name. They are no rows: a balancer never sees
      them, and their gradient, times their weight, is added to the update that it makes of the rows. The metrics hold
      the unweighted values.
    balancer: how rows of the objective become one update; by default their sum. A row whose loss or gradient is not
      finite is then absent, as one without examples is (see `balancing.update_rows`), and the params stay finite if all
      that a model computes is; the metric `present/ROW` is 1 where the row took part. Without a balancer it spoils the
      params, and the log need not show it: XLA's `relu` and maximum drop NaN on a CPU, so the loss may be finite again
      while the params are lost. `skip_not_finite` prevents it.
    rows: names of the terms that are added before the balancer sees them, by name of the row; by default each term is a
      row. A term whose weight is the number 0 is only watched and needs none. A row is absent at a step where all its
      weights are 0, as a schedule may say.
    shared: regular expression searched in paths such as `student/encoder/kernel`: params whose gradients the balancer
      weighs row by row. All by default.
    weigh_own: whether params that are not shared get the balancer's weights (True) or the plain sum of the rows. A
      Combiner gives no weights, so with one it is always the plain sum.
    batch_size: for a balancer or Combiner that looks at the gradient of each row: how many rows go back at a time. All
      by default, which is fastest and takes the memory of as many backward passes as there are rows; with 1 it is that
      of one, as in `balancing.task_gradients`.
    hold_gradients: for a balancer that looks at the Gramian of the rows: whether the gradients of all rows are kept
      until they are weighed. With False only their products are, layer by layer, and one more pass back makes the
      weighted sum: with many rows the memory of a few passes instead of one for each (`balancing.task_gramian`).
    skip_not_finite: whether an update is left out whose gradient is not finite, or that would make something of the
      state so that was finite: params, statistics, optimizer, balancer and averages stay as they are, and only the
      number of steps moves. The metric `skipped` is 1 then, and the others do not count that step.
    accumulate: in how many equal parts a step works through its batch, by the first axis, with the memory of one part.
      The update is that of the whole batch for every Term that is a mean over examples or tokens, whichever the
      balancer; averages, schedules and the number of steps move once. Losses that compare examples are refused, unless
      outputs are cached. What a model does to a batch it does to each part: BatchNorm normalises by the statistics of
      the part, and its running statistics move with every part, one after another.
    cache_outputs: whether a step in parts keeps what the Terms read of each model's outputs, and evaluates them on all
      of it: then every loss has the value and the gradient of the whole batch, those that compare examples as well. It
      costs one more pass forward, and the memory of those outputs (embeddings are small, feature maps are not).
    compute_dtype: floating-point type in which the models compute, such as `jnp.bfloat16`; params, states, averages,
      the optimizer and the losses stay in float32 (see `computing_in`, which evaluates a model likewise). None for that
      of the params.
    sample: `(data, key, step) -> batch`, to draw batches from arrays that stay on the device.
    axis_name: mapped axis when the step runs inside `pmap` or `shard_map`; gradients and floating-point statistics are
      then averaged over it, while counters and other integers stay each device's own. None under plain `jit`, on a mesh
      as well.

  Returns:
    The learner.

  Raises:
    ValueError: if a row names an unknown term or leaves one out, an average follows a model that is unknown or not
      trained or its decay is not in [0, 1], a penalty has the name of a term or a negative weight, a model has a name
      that no path can hold, `batch_size` or `accumulate` < 1, `batch_size` is given with `hold_gradients=False`,
      a loss compares examples that are to be accumulated, or (at trace time) a context path does not exist, arrays do
      not fit a loss, a penalty is no scalar, a frozen or averaged model reads a trained one, nothing trains a model
      that is not frozen, an average is of another shape than what it follows, an optimizer accumulates by itself where
      that is another update or evaluates the objective anew, a batch does not split into equal parts, or a step is
      given other frozen models than `init` was.
  """
  checks.check_batch_size(batch_size, hold_gradients)
  checks.check_parts(accumulate, cache_outputs, terms)
  program = _Program(
    {name: computing_in(model, compute_dtype) for name, model in checks.checked_models(models).items()},
    dict(terms),
    optimizer,
    checks.checked_averages(averages, models),
    checks.checked_penalties(penalties, terms),
    balancer,
    checks.checked_rows(rows, terms),
    shared,
    weigh_own,
    batch_size,
    hold_gradients,
    skip_not_finite,
    accumulate,
    cache_outputs,
    sample,
    axis_name,
  )
  follows = {name: average.source for name, average in program.averages.items()}
  return Learner(functools.partial(_init, program), functools.partial(_step, program), follows)


def learner(*args: Any, **options: Any) -> Learner:
  """The old name of `make_learner`, kept until 0.3."""
  warnings.warn("training.learner is called make_learner; the old name goes with 0.3", FutureWarning, stacklevel=2)
  return make_learner(*args, **options)


def _init(program: _Program, key: jax.Array, data: PyTree, frozen: Variables | None = None) -> TrainState:
  """Makes the state that training starts from, and finds every mistake that shapes and names can show."""
  models, averages, frozen = program.models, program.averages, frozen or {}
  checks.check_frozen(models, averages, frozen)
  checks.check_reads(models, _fixed(program, frozen))
  batch = data if program.sample is None else jax.eval_shape(program.sample, data, key, jnp.int32(0))
  if program.accumulate > 1:
    batch = jax.eval_shape(
      lambda batch: jax.tree.map(lambda leaf: leaf[0], split_batch(batch, program.accumulate)), batch
    )
  sources = {name: average.source for name, average in averages.items()}
  variables, context = init_models(models, key, batch, frozen, sources)
  jax.eval_shape(lambda context: evaluate(program.terms, context, 0), context)  # mistakes show before anything runs
  trained = [name for name in models if name not in frozen and name not in averages]
  params, states = ({name: variables[name][part] for name in trained} for part in (0, 1))
  checks.check_terms_train(program.terms, trained=set(trained))
  for name, source in sources.items():
    checks.check_same_shapes(name, variables[name], source, variables[source])
  checks.check_scalars(program.penalties, params)
  shared_params, _ = partition(params, program.shared, name="shared")
  if not program.penalties:
    checks.check_models_learn(models, program.terms, [name for name in trained if jax.tree.leaves(params[name])])
  opt_state = program.optimizer.init(params)
  checks.check_optimizer(program.optimizer, opt_state, params)
  checks.warn_of_masked_statistics(program.terms, {name: states[name] for name in trained})
  checks.check_accumulates(opt_state, program.terms, averages, program.balancer is not None)
  state = TrainState(
    jnp.int32(0),
    params,
    states,
    opt_state,
    balancing.init_rows(program.balancer, len(program.rows), shared_params),
    {name: widened(params[source]) for name, source in sources.items()},
    key,
  )
  return jax.tree.map(jnp.copy, state)  # a step donates it: no buffer may be in it twice, nor be the caller's


def _step(
  program: _Program, state: TrainState, data: PyTree, frozen: Variables | None = None
) -> tuple[TrainState, Metrics]:
  """Makes one update."""
  frozen = frozen or {}
  checks.check_frozen(program.models, program.averages, frozen)
  checks.check_variables(program.models, state, frozen)
  key = jax.random.fold_in(state.key, state.step)
  batch = data if program.sample is None else program.sample(data, named_key(state.key, "data"), state.step)
  losses, pullback, present, states, metrics = _passes(program, state, pin_batch(batch), frozen, key)
  update = balancing.update_rows(
    program.balancer,
    losses,
    lambda weights: pin_gradient(pullback(weights)),
    present,
    state.balancer_state,
    key=named_key(key, "balancer"),
    weigh_own=program.weigh_own,
    batch_size=program.batch_size,
    hold_gradients=program.hold_gradients,
    axis_name=program.axis_name,
  )
  gradient = merge(update.shared, update.own)
  value = jnp.where(update.present, losses, 0).sum()
  metrics |= _row_metrics(program, update)
  if program.penalties:
    cost, slope, costs = penalize(program.penalties, state.params, state.step)
    value, gradient = value + cost, jax.tree.map(jnp.add, gradient, pin_gradient(slope))
    metrics |= costs
  optimizer = optax.with_extra_args_support(program.optimizer)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, value=value, grad=gradient)
  params: Any = optax.apply_updates(state.params, updates)
  averages = followed(program.averages, state, params)
  after = TrainState(
    state.step + 1, params, over_devices(states, program.axis_name), opt_state, update.state, averages, state.key
  )
  return unless_spoilt(state, after, gradient, metrics) if program.skip_not_finite else (after, metrics)


def _fixed(program: _Program, frozen: Variables) -> list[str]:
  """The models that run first, outside the gradient: those that are frozen, and averages."""
  return [name for name in program.models if name in frozen or name in program.averages]


def _passes(program: _Program, state: TrainState, batch: PyTree, frozen: Variables, key: jax.Array) -> Passes:
  """Goes through the objective with a batch, in as many parts as are asked for."""
  run = functools.partial(_run, program, state, frozen)
  rows = Rows(functools.partial(_losses, program), functools.partial(_present, program, step=state.step))
  params = partition(state.params, program.shared, name="shared")
  if program.accumulate == 1:
    return pass_whole(run, rows, params, state.model_state, batch, key)
  if program.cache_outputs:
    say, judge = (functools.partial(function, program, state, frozen) for function in (_say, _judge))
    return pass_cached(say, judge, rows, params, state.model_state, batch, key, parts=program.accumulate)
  balanced = program.balancer is not None
  return pass_in_parts(run, rows, params, state.model_state, batch, key, parts=program.accumulate, balanced=balanced)


def _run(
  program: _Program, state: TrainState, *arguments: Any
) -> tuple[dict[str, jax.Array], Metrics, dict[str, PyTree]]:
  """The value of each Term on a batch, the metrics, and the next states of the models; takes what `_see` does."""
  seen, moved = _see(program, state, *arguments)
  return *_evaluate(program, state, seen), moved


def _see(
  program: _Program,
  state: TrainState,
  frozen: Variables,
  params: dict[str, PyTree],
  states: dict[str, PyTree],
  batch: PyTree,
  key: jax.Array,
) -> tuple[dict[str, Any], dict[str, PyTree]]:
  """The context of a batch in training mode, and the next states of the models."""
  names, given = _fixed(program, frozen), {**frozen, **_followers(program, state)}
  fixed = run_fixed(program.models, names, given, start_context(batch, state.step))
  return run_trained(program.models, params, states, jax.lax.stop_gradient(fixed), key)


def _say(program: _Program, *arguments: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """What Terms read of the outputs of each model, and the next states; takes what `_see` does."""
  seen, moved = _see(program, *arguments)
  return {name: part for name, part in read_by(program.terms, seen).items() if name in program.models}, moved


def _judge(
  program: _Program,
  state: TrainState,
  frozen: Variables,
  params: dict[str, PyTree],
  said: dict[str, PyTree],
  batch: PyTree,
) -> tuple[dict[str, jax.Array], Metrics]:
  """Evaluates all Terms on what models said of a batch."""
  still = {name: variables[0] for name, variables in {**frozen, **_followers(program, state)}.items()}
  return _evaluate(
    program, state, start_context(batch, state.step) | said | {"params": jax.lax.stop_gradient(still) | params}
  )


def _evaluate(program: _Program, state: TrainState, context: Any) -> tuple[dict[str, jax.Array], Metrics]:
  guard = program.balancer is not None
  return evaluate(program.terms, context, state.step, axis_name=program.axis_name, guard=guard)


def _followers(program: _Program, state: TrainState) -> dict[str, tuple[PyTree, PyTree]]:
  """(params, state) of the averages."""
  return {name: follower(state, average.source, name) for name, average in program.averages.items()}


def _losses(program: _Program, values: Mapping[str, jax.Array]) -> jax.Array:
  """The losses of the rows, `[T]`."""
  return jnp.stack([sum(values[term] for term in row) for row in program.rows.values()])


def _present(program: _Program, metrics: Metrics, *, step: jax.Array) -> jax.Array:
  """Which rows have examples, bool `[T]`; those of a Term whose weight is 0 now do not count."""
  counts = {name: jnp.where(at(term.weight, step) > 0, metrics[name][1], 0) for name, term in program.terms.items()}
  return jnp.stack([sum(counts[term] for term in row) > 0 for row in program.rows.values()])


def _row_metrics(program: _Program, update: balancing.RowsUpdate) -> Metrics:
  """The weight of each row, where there are weights, and with a balancer whether it took part."""
  shown = {"weight": update.weights, "present": None if program.balancer is None else update.present}
  return {
    f"{name}/{row}": (jnp.asarray(value, jnp.float32), jnp.ones(()))
    for name, values in shown.items()
    if values is not None
    for row, value in zip(program.rows, values, strict=True)
  }
