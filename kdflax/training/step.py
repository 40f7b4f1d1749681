"""The training step: models -> context -> terms -> balancer -> optimizer, as one pure function."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kdflax import balancing
from kdflax.objectives import AxisName, Metrics, Term, evaluate, is_stopped, lookup
from kdflax.training.mesh import replicated
from kdflax.training.state import TrainState, named_key

if TYPE_CHECKING:  # training needs no model, only the shape of one
  from kdflax.models import Model

PyTree = Any
Frozen = Mapping[str, tuple[PyTree, PyTree]]  # (params, state) by model name


class Average(NamedTuple):
  """A model whose params follow another's: `average = decay * average + (1 - decay) * source` after each update."""

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
  models: "Mapping[str, Model]",
  terms: Mapping[str, Term],
  optimizer: optax.GradientTransformation,
  *,
  averages: Mapping[str, Average] | None = None,
  penalties: Mapping[str, Penalty] | None = None,
  balancer: "balancing.Balancer | balancing.Combiner | None" = None,
  rows: Mapping[str, Sequence[str]] | None = None,
  shared: str | None = None,
  weigh_own: bool = True,
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
    balancer: how rows of the objective become one update; by default their sum.
    rows: names of the terms that are added before the balancer sees them, by name of the row; by default each term is a
      row.
    shared: regular expression searched in paths such as `student/encoder/kernel`: params whose gradients the balancer
      weighs row by row. All by default.
    weigh_own: whether params that are not shared get the balancer's weights (True) or the plain sum of the rows. A
      Combiner gives no weights, so with one it is always the plain sum.
    sample: `(data, key, step) -> batch`, to draw batches from arrays that stay on the device.
    axis_name: mapped axis when the step runs inside `pmap` or `shard_map`; gradients and statistics are then averaged
      over it. None under plain `jit`, on a mesh as well.

  Returns:
    The learner.

  Raises:
    ValueError: if a row names an unknown term or leaves one out, an average follows a model that is unknown or not
      trained, a penalty has the name of a term or a negative weight, or (at trace time) a context path does not exist,
      arrays do not fit a loss, or a penalty is no scalar.
  """
  averages = dict(averages or {})
  penalties = _checked_penalties(penalties, terms)
  rows = _checked_rows(rows, terms)
  for name, average in averages.items():
    if name not in models or average.source not in models:
      raise ValueError(f"average {name!r} of {average.source!r}: models are {list(models)}")
    if average.source in averages:
      raise ValueError(f"average {name!r} of {average.source!r}, which is an average itself; follow a trained model")

  def outside(frozen: Frozen) -> list[str]:
    unknown = set(frozen) - set(models)
    if unknown:
      raise ValueError(f"frozen {sorted(unknown)} are not among the models {list(models)}")
    still = [f"{name!r} of {a.source!r}" for name, a in averages.items() if {name, a.source} & set(frozen)]
    if still:
      raise ValueError(f"average {', '.join(still)} follows nothing: frozen are {list(frozen)}")
    return [name for name in models if name in frozen or name in averages]

  def init(key: jax.Array, data: PyTree, frozen: Frozen | None = None) -> TrainState:
    frozen = frozen or {}
    outside(frozen)
    batch = data if sample is None else jax.eval_shape(sample, data, key, jnp.int32(0))
    context = {"batch": jax.tree.map(_zeros, batch), "step": jnp.int32(0)}
    params, states = {}, {}
    for name, model in models.items():
      example = _read(context, model)
      source = averages[name].source if name in averages else name
      variables = frozen[name] if name in frozen else model.init(named_key(key, source), example)
      if name not in frozen and name not in averages:
        params[name], states[name] = variables
      shapes = jax.eval_shape(lambda v, x, m=model: m.apply(*v, x, train=False, key=None)[0], variables, example)
      context[name] = jax.tree.map(_zeros, shapes)
    jax.eval_shape(lambda context: evaluate(terms, context, 0), context)  # mistakes show before anything runs
    _check_terms_train(terms, trained=set(params))
    for name, penalty in penalties.items():
      shape = jax.eval_shape(penalty.function, params).shape
      if shape:
        raise ValueError(f"penalty {name!r} must return a scalar, it has shape {shape}; sum over it")
    balancer_state = _init_balancer(balancer, len(rows), _partition(params, shared)[0])
    average_params = {name: params[average.source] for name, average in averages.items()}
    state = TrainState(jnp.int32(0), params, states, optimizer.init(params), balancer_state, average_params, key)
    return jax.tree.map(jnp.copy, state)  # a step donates it: no buffer may be in it twice, nor be the caller's

  def step(state: TrainState, data: PyTree, frozen: Frozen | None = None) -> tuple[TrainState, Metrics]:
    frozen = frozen or {}
    key = jax.random.fold_in(state.key, state.step)
    batch = data if sample is None else sample(data, named_key(state.key, "data"), state.step)
    context = {"batch": batch, "step": state.step}
    for name in outside(frozen):
      average = averages.get(name)
      variables = (state.averages[name], state.model_state[average.source]) if average else frozen[name]
      context[name], _ = models[name].apply(*variables, _read(context, models[name]), train=False, key=None)
    context = jax.lax.stop_gradient(context)

    def objective(shared_params: PyTree, own_params: PyTree):
      params, seen, states = _merge(shared_params, own_params), dict(context), {}
      for name in params_order:
        seen[name], states[name] = models[name].apply(
          params[name], state.model_state[name], _read(seen, models[name]), train=True, key=named_key(key, name)
        )
      values, metrics = evaluate(terms, seen, state.step, axis_name=axis_name)
      return jnp.stack([sum(values[term] for term in row) for row in rows.values()]), (states, metrics)

    params_order = [name for name in models if name in state.params]
    shared_params, own_params = _partition(state.params, shared)
    losses, pullback, (states, metrics) = jax.vjp(objective, shared_params, own_params, has_aux=True)
    present = jnp.stack([sum(metrics[term][1] for term in row) > 0 for row in rows.values()])
    gradient, balancer_state, weights = _balance(
      balancer, losses, pullback, present, state.balancer_state, named_key(key, "balancer"), weigh_own, axis_name
    )
    gradient = _merge(*gradient)
    if penalties:
      slope, values = jax.grad(_penalize, has_aux=True)(state.params, penalties, state.step)
      gradient = jax.tree.map(jnp.add, gradient, slope)
      metrics |= {name: (value, jnp.ones(())) for name, value in values.items()}
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    if axis_name is not None:
      states = jax.lax.pmean(states, axis_name)
    if weights is not None:
      metrics |= {f"weight/{row}": (weight, jnp.ones(())) for row, weight in zip(rows, weights, strict=True)}
    moved = {
      name: optax.incremental_update(params[a.source], state.averages[name], 1 - _at(a.decay, state.step))
      for name, a in averages.items()
    }
    return TrainState(state.step + 1, params, states, opt_state, balancer_state, moved, state.key), metrics

  return Learner(init, step)


def _balance(balancer, losses, pullback, present, state, key, weigh_own, axis_name):
  """Returns ((gradient of the shared, of the own params), balancer state, weights of the rows or None)."""
  mean = (lambda tree: tree) if axis_name is None else (lambda tree: jax.lax.pmean(tree, axis_name))
  everything = present.astype(losses.dtype)
  if balancer is None:
    return mean(pullback(everything)), state, None
  if not (isinstance(balancer, balancing.Combiner) or balancer.needs_gramian):
    weights, state = balancer.update(losses, state, key=key, present=present)
    shared, own = mean(pullback(weights))
    return (shared, own if weigh_own else mean(pullback(everything)[1])), state, weights
  # Gradients are averaged over the devices before they are combined: combining is not linear.
  jacobian = mean(jax.vmap(lambda row: pullback(row)[0])(jnp.eye(len(losses), dtype=losses.dtype)))
  if isinstance(balancer, balancing.Combiner):
    direction, state = balancer.update(losses, jacobian, state, key=key, present=present)
    return (direction, mean(pullback(everything)[1])), state, None
  gramian = balancing.gramian(jacobian)
  weights, state = balancer.update(losses, state, gramian=gramian, key=key, present=present)
  own = mean(pullback(weights if weigh_own else everything)[1])
  return (balancing.combine(jacobian, weights, present=present), own), state, weights


def _check_terms_train(terms: Mapping[str, Term], trained: set[str]) -> None:
  """Refuses a Term that reads trained models and stops the gradient to all of them: it would train nothing, silently.

  A Term of weight 0 is only watched.
  """
  for name, term in terms.items():
    if isinstance(term.weight, int | float) and term.weight == 0:
      continue
    read = [p for p in term.inputs.values() if isinstance(p, str) and p.split(".")[0] in trained]
    if read and all(is_stopped(term, path) for path in read):
      raise ValueError(
        f"term {name!r} trains nothing: it stops the gradient to {term.stop_gradient}, which is all it reads of trained"
        f" models ({read}); give it stop_gradient=()"
      )


def _init_balancer(balancer, num_rows: int, shared_params: PyTree) -> PyTree:
  if balancer is None:
    return ()
  if isinstance(balancer, balancing.Combiner):
    return balancer.init(jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape), leaf.dtype), shared_params))
  return balancer.init(num_rows)


def _penalize(params, penalties, step) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the weighted sum of the penalties, and each without its weight."""
  values = {name: penalty.function(params) for name, penalty in penalties.items()}
  return jnp.sum(jnp.stack([_at(penalties[name].weight, step) * value for name, value in values.items()])), values


def _checked_penalties(penalties, terms) -> dict[str, Penalty]:
  penalties = dict(penalties or {})
  if set(penalties) & set(terms):
    raise ValueError(f"penalties and terms share the names {sorted(set(penalties) & set(terms))}; metrics need both")
  for name, penalty in penalties.items():
    if isinstance(penalty.weight, int | float) and not penalty.weight >= 0:
      raise ValueError(f"the weight of penalty {name!r} must be at least 0; got {penalty.weight}")
  return penalties


def _checked_rows(rows, terms) -> dict[str, tuple[str, ...]]:
  if rows is None:
    return {name: (name,) for name in terms}
  named = [term for row in rows.values() for term in row]
  if sorted(named) != sorted(terms):
    raise ValueError(f"rows must name every term once; rows have {sorted(named)}, terms are {sorted(terms)}")
  return {name: tuple(row) for name, row in rows.items()}


def _zeros(like: Any) -> jax.Array:
  return jnp.zeros(like.shape, jax.dtypes.canonicalize_dtype(like.dtype))  # NumPy's int64 labels become int32


def _read(context: Mapping[str, Any], model: "Model") -> Any:
  if isinstance(model.inputs, str):
    return lookup(context, model.inputs)
  return tuple(lookup(context, path) for path in model.inputs)


def _at(value: float | optax.Schedule, step: jax.Array) -> Any:
  return value(step) if callable(value) else value


def _partition(params: PyTree, pattern: str | None) -> tuple[PyTree, PyTree]:
  """Two trees of the structure of params, with None for the leaves of the other."""
  is_shared = lambda path: pattern is None or re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/"))
  shared = jax.tree.map_with_path(lambda path, leaf: leaf if is_shared(path) else None, params)
  own = jax.tree.map_with_path(lambda path, leaf: None if is_shared(path) else leaf, params)
  if params and not jax.tree.leaves(shared):
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    raise ValueError(f"shared={pattern!r} matches none of {paths}")
  return shared, own


def _merge(shared: PyTree, own: PyTree) -> PyTree:
  return jax.tree.map(lambda a, b: b if a is None else a, shared, own, is_leaf=lambda x: x is None)


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


def make_eval_step(models: "Mapping[str, Model]", terms: Mapping[str, Term]) -> Callable:
  """Compiles an evaluation: `(variables by model name, batch) -> metrics`, in evaluation mode.

  Terms whose inputs name `"where": "batch.where"` leave out the padding of a last batch.
  """

  @jax.jit
  def evaluate_batch(variables: Frozen, batch: PyTree) -> Metrics:
    return evaluate(terms, apply_models(models, variables, batch), 0)[1]

  return evaluate_batch


def apply_models(models: "Mapping[str, Model]", variables: Frozen, batch: PyTree) -> dict[str, Any]:
  """Returns the context of a batch in evaluation mode, at step 0."""
  context: dict[str, Any] = {"batch": batch, "step": jnp.int32(0)}
  for name, model in models.items():
    context[name], _ = model.apply(*variables[name], _read(context, model), train=False, key=None)
  return context
