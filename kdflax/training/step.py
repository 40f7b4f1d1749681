"""The training step: models -> context -> terms -> balancer -> optimizer, as one pure function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kdflax import balancing
from kdflax.model import Model, PyTree, Variables, named_key, paths_of, read
from kdflax.numerics.examples import AxisName
from kdflax.numerics.trees import merge, partition
from kdflax.objectives import Metrics, Term, evaluate, is_stopped, is_watched
from kdflax.training.mesh import replicated
from kdflax.training.state import TrainState


class Average(NamedTuple):
  """A model whose params follow another's: `average = decay * average + (1 - decay) * source` after each update.

  `decay` is in [0, 1], 0.999 say, or a schedule of such numbers.
  """

  source: str
  decay: float | optax.Schedule


class Penalty(NamedTuple):
  """A cost of the params themselves: `function(params by model name) -> scalar`, times a weight or a schedule."""

  function: Callable[[dict[str, PyTree]], jax.Array]
  weight: float | jax.Array | optax.Schedule = 1.0


class Learner(NamedTuple):
  """A training program as a pair of pure functions, to be jitted, vmapped over seeds or scanned.

  `init(key, data, frozen) -> TrainState` and `step(state, data, frozen) -> (TrainState, metrics)`, where `frozen` holds
  (params, state) of the models that are not trained, and `data` is a batch (or what `sample` draws one from).
  """

  init: Callable[..., TrainState]
  step: Callable[..., tuple[TrainState, Metrics]]


def learner(
  models: Mapping[str, Model],
  terms: Mapping[str, Term],
  optimizer: optax.GradientTransformation,
  *,
  averages: Mapping[str, Average] | None = None,
  penalties: Mapping[str, Penalty] | None = None,
  balancer: "balancing.Balancer | balancing.Combiner | None" = None,
  rows: Mapping[str, Sequence[str]] | None = None,
  shared: str | None = None,
  weigh_own: bool = True,
  batch_size: int | None = None,
  sample: Callable[[PyTree, jax.Array, jax.Array], PyTree] | None = None,
  axis_name: AxisName = None,
) -> Learner:
  """Builds the pure functions that initialise and update a training state.

  Models are evaluated in order and their outputs stored in the context under their names, so that a connector can read
  what an earlier model returned. Frozen and averaged models run first, outside the gradient and in evaluation mode. A
  model that changes with time reads the path `"step"`.

  Args:
    models: all models by name, connectors included.
    terms: the objective.
    optimizer: updates the params of all models that are neither frozen nor averages.
    averages: models that follow another by a moving average, by name (mean teacher, momentum encoder).
    penalties: costs of the trained params (a coupling between tasks) by name. They are no rows: a balancer never sees
      them, and their gradient, times their weight, is added to the update that it makes of the rows. The metrics hold
      the unweighted values.
    balancer: how rows of the objective become one update; by default their sum. A row whose loss or gradient is not
      finite is then absent, as one without examples is (see `balancing.update_rows`), and the params stay finite if all
      that a model computes is. Without a balancer it spoils the params, and the loss in the log says so.
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
    sample: `(data, key, step) -> batch`, to draw batches from arrays that stay on the device.
    axis_name: mapped axis when the step runs inside `pmap` or `shard_map`; gradients and floating-point statistics are
      then averaged over it, while counters and other integers stay each device's own. None under plain `jit`, on a mesh
      as well.

  Returns:
    The learner.

  Raises:
    ValueError: if a row names an unknown term or leaves one out, an average follows a model that is unknown or not
      trained or its decay is not in [0, 1], a penalty has the name of a term or a negative weight, `batch_size` < 1, or
      (at trace time) a context path does not exist, arrays do not fit a loss, a penalty is no scalar, a frozen or
      averaged model reads a trained one, nothing trains a model that is not frozen, an average is of another shape than
      what it follows, or a step is given other frozen models than `init` was.
  """
  averages = _checked_averages(averages, models)
  penalties = _checked_penalties(penalties, terms)
  rows = _checked_rows(rows, terms)
  if batch_size is not None and batch_size < 1:
    raise ValueError(f"batch_size must be at least 1; got {batch_size}")

  def outside(frozen: Variables) -> list[str]:
    unknown = set(frozen) - set(models)
    if unknown:
      raise ValueError(f"frozen {sorted(unknown)} are not among the models {list(models)}")
    still = [f"{name!r} of {a.source!r}" for name, a in averages.items() if {name, a.source} & set(frozen)]
    if still:
      raise ValueError(f"average {', '.join(still)} follows nothing: frozen are {list(frozen)}")
    return [name for name in models if name in frozen or name in averages]

  def init(key: jax.Array, data: PyTree, frozen: Variables | None = None) -> TrainState:
    frozen = frozen or {}
    _check_reads(models, outside(frozen))
    batch = data if sample is None else jax.eval_shape(sample, data, key, jnp.int32(0))
    context = {"batch": jax.tree.map(_zeros, batch), "step": jnp.int32(0)}
    params, states, followers = {}, {}, {}
    for name, model in models.items():
      example = read(context, model)
      source = averages[name].source if name in averages else name
      variables = frozen[name] if name in frozen else model.init(named_key(key, source), example)
      if name in averages:
        followers[name] = variables
      elif name not in frozen:
        params[name], states[name] = variables
      run = lambda params, state, x, m=model: m.apply(params, state, x, train=False, key=None)[0]
      shapes = jax.eval_shape(run, *variables, example)
      context[name] = jax.tree.map(_zeros, shapes)
    jax.eval_shape(lambda context: evaluate(terms, context, 0), context)  # mistakes show before anything runs
    _check_terms_train(terms, trained=set(params))
    for name, average in averages.items():
      _check_same_shapes(name, followers[name], average.source, (params[average.source], states[average.source]))
    for name, penalty in penalties.items():
      shape = jax.eval_shape(penalty.function, params).shape
      if shape:
        raise ValueError(f"penalty {name!r} must return a scalar, it has shape {shape}; sum over it")
    balancer_state = balancing.init_rows(balancer, len(rows), partition(params, shared, name="shared")[0])
    if not penalties:
      _check_models_learn(models, terms, [name for name in params if jax.tree.leaves(params[name])])
    average_params = {name: params[average.source] for name, average in averages.items()}
    state = TrainState(jnp.int32(0), params, states, optimizer.init(params), balancer_state, average_params, key)
    return jax.tree.map(jnp.copy, state)  # a step donates it: no buffer may be in it twice, nor be the caller's

  def step(state: TrainState, data: PyTree, frozen: Variables | None = None) -> tuple[TrainState, Metrics]:
    frozen = frozen or {}
    _check_variables(models, state, frozen)
    key = jax.random.fold_in(state.key, state.step)
    batch = data if sample is None else sample(data, named_key(state.key, "data"), state.step)
    context = {"batch": batch, "step": state.step}
    for name in outside(frozen):
      average = averages.get(name)
      variables = (state.averages[name], state.model_state[average.source]) if average else frozen[name]
      context[name], _ = models[name].apply(*variables, read(context, models[name]), train=False, key=None)
    context = jax.lax.stop_gradient(context)

    def objective(shared_params: PyTree, own_params: PyTree):
      params, seen, states = merge(shared_params, own_params), dict(context), {}
      for name in params_order:
        seen[name], states[name] = models[name].apply(
          params[name], state.model_state[name], read(seen, models[name]), train=True, key=named_key(key, name)
        )
      values, metrics = evaluate(terms, seen, state.step, axis_name=axis_name, guard=balancer is not None)
      return jnp.stack([sum(values[term] for term in row) for row in rows.values()]), (states, metrics)

    params_order = [name for name in models if name in state.params]
    shared_params, own_params = partition(state.params, shared, name="shared")
    losses, pullback, (states, metrics) = jax.vjp(objective, shared_params, own_params, has_aux=True)
    counts = {name: jnp.where(_at(term.weight, state.step) > 0, metrics[name][1], 0) for name, term in terms.items()}
    present = jnp.stack([sum(counts[term] for term in row) > 0 for row in rows.values()])
    update = balancing.update_rows(
      balancer,
      losses,
      pullback,
      present,
      state.balancer_state,
      key=named_key(key, "balancer"),
      weigh_own=weigh_own,
      batch_size=batch_size,
      axis_name=axis_name,
    )
    gradient = merge(update.shared, update.own)
    if penalties:
      slope, values = jax.grad(_penalize, has_aux=True)(state.params, penalties, state.step)
      gradient = jax.tree.map(jnp.add, gradient, slope)
      metrics |= {name: (value, jnp.ones(())) for name, value in values.items()}
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    if axis_name is not None:
      states = jax.tree.map(lambda leaf: _mean_if_inexact(leaf, axis_name), states)
    if update.weights is not None:
      metrics |= {f"weight/{row}": (weight, jnp.ones(())) for row, weight in zip(rows, update.weights, strict=True)}
    moved = {
      name: optax.incremental_update(params[a.source], state.averages[name], 1 - _at(a.decay, state.step))
      for name, a in averages.items()
    }
    return TrainState(state.step + 1, params, states, opt_state, update.state, moved, state.key), metrics

  return Learner(init, step)


def _mean_if_inexact(leaf: jax.Array, axis_name: AxisName) -> jax.Array:
  """The mean over the devices; a counter or a key has none."""
  return jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _check_reads(models: Mapping[str, Model], outside: Sequence[str]) -> None:
  """Refuses a model that runs before the trained ones, outside the gradient, and reads one of them."""
  for name in outside:
    trained = [p for p in paths_of(models[name]) if _model(p) in models and _model(p) not in outside]
    if trained:
      raise ValueError(
        f"{name!r} is frozen or an average, so it runs first and outside the gradient, but it reads {trained} of a"
        " trained model; train it with the optimizer holding its params still (optax.partition, optax.set_to_zero)"
      )


def _check_variables(models: Mapping[str, Model], state: TrainState, frozen: Variables) -> None:
  """Refuses a state that was made with other frozen models than this step is given."""
  both = sorted(set(frozen) & set(state.params))
  neither = [name for name in models if name not in {*frozen, *state.params, *state.averages}]
  if both:
    raise ValueError(f"{both} are given as frozen, but this state trains them; give init the frozen models, too")
  if neither:
    raise ValueError(f"{neither} are neither in this state nor given as frozen; give the step what init was given")


def _check_same_shapes(name: str, follower: Any, source: str, variables: Any) -> None:
  shapes = lambda tree: {jax.tree_util.keystr(p): jnp.shape(x) for p, x in jax.tree.leaves_with_path(tree)}
  own, followed = shapes(follower), shapes(variables)
  if own != followed:
    path = next(path for path in [*own, *followed] if own.get(path) != followed.get(path))
    raise ValueError(
      f"average {name!r} must be the network of {source!r}: {path[3:]} has shape {own.get(path, 'absent')} in the one"
      f" and {followed.get(path, 'absent')} in the other"
    )


def _check_terms_train(terms: Mapping[str, Term], trained: set[str]) -> None:
  """Refuses a Term that stops the gradient to all it reads of trained models: it would train nothing, silently."""
  for name, term in terms.items():
    read = [path for path in _paths(term) if _model(path) in trained]
    if not is_watched(term) and read and all(is_stopped(term, path) for path in read):
      raise ValueError(
        f"term {name!r} trains nothing: it stops the gradient to {term.stop_gradient}, which is all it reads of trained"
        f" models ({read}); give it stop_gradient=()"
      )


def _check_models_learn(models: Mapping[str, Model], terms: Mapping[str, Term], trained: Sequence[str]) -> None:
  """Refuses a model that no Term sends a gradient to, as a teacher that was forgotten among the frozen ones."""
  weighed = [term for term in terms.values() if not is_watched(term)]
  reached = {_model(path) for term in weighed for path in _paths(term) if not is_stopped(term, path)}
  for name in reversed(list(models)):  # each reads the ones before it
    reached |= {_model(path) for path in paths_of(models[name])} if name in reached else set()
  idle = [name for name in trained if name not in reached]
  if idle:
    raise ValueError(
      f"no term trains {idle}; give init and step what is not to be trained as frozen, {{{idle[0]!r}: (params, state)}}"
    )


def _paths(term: Term) -> list[str]:
  return [source for source in term.inputs.values() if isinstance(source, str)]


def _model(path: str) -> str:
  return path.split(".")[0]


def _penalize(params, penalties, step) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the weighted sum of the penalties, and each without its weight."""
  values = {name: penalty.function(params) for name, penalty in penalties.items()}
  return jnp.sum(jnp.stack([_at(penalties[name].weight, step) * value for name, value in values.items()])), values


def _checked_averages(averages, models) -> dict[str, Average]:
  averages = dict(averages or {})
  for name, average in averages.items():
    if name not in models or average.source not in models:
      raise ValueError(f"average {name!r} of {average.source!r}: models are {list(models)}")
    if average.source in averages:
      raise ValueError(f"average {name!r} of {average.source!r}, which is an average itself; follow a trained model")
    if isinstance(average.decay, int | float) and not 0 <= average.decay <= 1:
      raise ValueError(f"the decay of average {name!r} must be between 0 and 1, near 1 as 0.999; got {average.decay}")
  return averages


def _checked_penalties(penalties, terms) -> dict[str, Penalty]:
  penalties = dict(penalties or {})
  if set(penalties) & set(terms):
    raise ValueError(f"penalties and terms share the names {sorted(set(penalties) & set(terms))}; metrics need both")
  for name, penalty in penalties.items():
    if isinstance(penalty.weight, int | float) and not penalty.weight >= 0:
      raise ValueError(f"the weight of penalty {name!r} must be at least 0; got {penalty.weight}")
  return penalties


def _checked_rows(rows, terms) -> dict[str, tuple[str, ...]]:
  weighed = [name for name, term in terms.items() if not is_watched(term)]
  if rows is None:
    return {name: (name,) for name in weighed}
  named = [term for row in rows.values() for term in row]
  if sorted(named) != sorted({*named, *weighed}) or not set(named) <= set(terms):
    raise ValueError(f"rows must name every term once; rows have {sorted(named)}, terms are {sorted(terms)}")
  return {name: tuple(row) for name, row in rows.items()}


def _zeros(like: Any) -> jax.Array:
  return jnp.zeros(like.shape, jax.dtypes.canonicalize_dtype(like.dtype))  # NumPy's int64 labels become int32


def _at(value: float | jax.Array | optax.Schedule, step: jax.Array) -> Any:
  return value(step) if callable(value) else value


def make_train_step(learner: Learner, *, mesh: Mesh | None = None, steps_per_call: int = 1) -> Callable:
  """Compiles a learner's step: one jitted function that donates the state it is given.

  Args:
    learner: the program; a vmapped step (several seeds) is welcome.
    mesh: devices to run on. The state comes back replicated; batches keep the sharding they have (`place_batch`).
    steps_per_call: updates in one dispatch, by `lax.scan` over the same data; needs a learner that samples. Pays on an
      accelerator; on a CPU with convolutions it costs.

  Returns:
    `step(state, data, frozen=None) -> (state, metrics)`, the metrics added up over the updates of the call.
  """

  def call(state, data, *frozen):
    if steps_per_call == 1:
      return learner.step(state, data, *frozen)
    state, metrics = jax.lax.scan(lambda s, _: learner.step(s, data, *frozen), state, length=steps_per_call)
    return state, jax.tree.map(lambda x: x.sum(0), metrics)

  return jax.jit(call, donate_argnums=0, out_shardings=None if mesh is None else replicated(mesh))
