"""Every entry of the catalogue makes a method that trains the student; every public loss has an entry."""

import functools
import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import losses, methods, training
from kdflax.model import read
from kdflax.objectives import Term, evaluate
from tests.methods.case import BATCH, STUDENT, TEACHER, frozen, given, pair

BUILT = {name: entry for name, entry in methods.CATALOGUE.items() if entry.build is not None}
REPLACES_THE_STUDENT = ("simkd",)
PUTS_TOGETHER = ("rkd",)  # what has entries of its own


def build(name, **more):
  return BUILT[name].build(pair(), **given(name), **more)


def flat(method):
  """A method and its stages as one, all trained together."""
  beside = [methods.Method(stage.models, stage.terms) for stage in method.stages.values()]
  own = {name: model for name, model in method.models.items() if all(name not in other.models for other in beside)}
  return functools.reduce(operator.or_, beside, methods.Method(own, method.terms))


def test_every_public_loss_has_an_entry_or_is_a_tool():
  assert set(losses.__all__) == {name for name in methods.CATALOGUE if name in losses.__all__} | set(methods.TOOLS)
  assert not set(methods.CATALOGUE) & set(methods.TOOLS)


def test_an_entry_is_called_by_its_loss_or_its_function():
  for name, entry in methods.CATALOGUE.items():
    own = [getattr(losses, name, None), getattr(methods, name, None)]
    assert any(function is not None and function in (entry.loss, entry.function) for function in own), name


def test_every_method_of_the_package_is_in_the_catalogue():
  public = {name: value for name, value in vars(methods).items() if inspect.isfunction(value)}
  makes = {name: f for name, f in public.items() if inspect.signature(f).return_annotation is methods.Method}
  assert set(makes.values()) - {entry.function for entry in BUILT.values()} == {methods.of_maps, methods.of_flows}


def test_entries_say_where_their_numbers_come_from():
  for name, entry in methods.CATALOGUE.items():
    assert entry.title and entry.needs and entry.paper, name
    letters = [letter for letter in entry.source.split(", ") if letter]
    assert set(letters) <= set(methods.SOURCES), name
    assert bool(letters) == (entry.weight is not None or bool(entry.setting)), name
  told = {letter for entry in methods.CATALOGUE.values() for letter in entry.source.split(", ")}
  assert set(methods.SOURCES) <= told
  assert methods.CATALOGUE["inter_channel_correlation"].published == "2.5 [i]"
  assert methods.CATALOGUE["cosine"].published == "none recorded"


@pytest.mark.parametrize("name", BUILT)
def test_the_default_weight_is_the_published_one(name):
  """Where one was published for what the function makes."""
  entry = BUILT[name]
  parameters = inspect.signature(entry.function).parameters
  if entry.weight is None or entry.function.__name__.startswith("of_"):
    return
  if parameters["weight"].default is None:  # it depends
    weights = [term.weight for term in build(name, joint=True).terms.values()]
    assert set(weights) == {entry.weight}
  else:
    assert parameters["weight"].default == entry.weight


def filled(shapes):
  """Any positive numbers: methods are differentiable there, and nothing has to be compiled to draw them."""

  def fill(leaf):
    numbers = 0.5 + 0.4 * np.cos(3.0 * np.arange(leaf.size)).reshape(leaf.shape)
    return np.asarray(numbers, leaf.dtype)  # a counter is 0

  return jax.tree.map(fill, shapes)


@pytest.fixture(scope="module")
def slopes():
  """The value of every Term and its slope along a direction of the student's params, of many methods in one program.

  Of those that add a model, or something to their loss; the others only say where a loss finds its arguments, which the
  learner checks in the tests of experiments.zoo, and their derivatives are those of the losses' own tests.
  """
  made = {name: flat(build(name)) for name in BUILT if name not in (*REPLACES_THE_STUDENT, *PUTS_TOGETHER)}
  public = [getattr(losses, name) for name in losses.__all__]
  adds = lambda made: made.models or any(term.loss not in public for term in made.terms.values())
  method = functools.reduce(operator.or_, filter(adds, made.values()))
  networks, key = {"student": STUDENT, "teacher": TEACHER, **method.models}, jax.random.key(0)
  context, variables = {"batch": BATCH, "step": jnp.int32(3)}, {}
  for name, model in networks.items():
    example = read(context, model)
    variables[name] = filled(jax.eval_shape(model.init, key, example))
    context[name] = jax.eval_shape(
      lambda v, x, m=model: m.apply(*v, x, train=True, key=key)[0], variables[name], example
    )

  def values(params, variables, batch):
    everyone = {name: own for name, (own, _) in variables.items()} | {"student": params}
    seen = {"batch": batch, "step": jnp.int32(3), "params": everyone}
    for name, model in networks.items():
      own = (params, variables["student"][1]) if name == "student" else variables[name]
      seen[name], _ = model.apply(*own, read(seen, model), train=True, key=key)
    return jnp.stack(list(evaluate(method.terms, seen, 3)[0].values()))

  params = variables["student"][0]
  direction = jax.tree.map(lambda leaf: np.sin(np.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)
  slope = lambda params, *rest: jax.jvp(lambda params: values(params, *rest), (params,), (direction,))
  quick = {"xla_backend_optimization_level": 0}  # it runs once
  found = map(np.asarray, jax.jit(slope, compiler_options=quick)(params, variables, BATCH))
  return {name: (value, slope) for name, value, slope in zip(method.terms, *found, strict=True)}


def test_methods_go_together_and_every_term_trains_the_student(slopes):
  assert len(slopes) > len(BUILT) / 2
  for name, (value, slope) in slopes.items():
    assert np.isfinite(value) and np.isfinite(slope), name
    assert slope != 0 or name == "factor_transfer/rebuild", name


@pytest.mark.parametrize("name", [name for name in BUILT if not hasattr(losses, name)])
def test_methods_without_a_loss_of_their_own_fit_the_learner(name):
  """Shapes only; the others are tried by the tests of experiments.zoo."""
  method = build(name)
  inputs = {"logits": "student.logits", "labels": "batch.label"}
  hard = {"hard": Term(optax.softmax_cross_entropy_with_integer_labels, inputs)} if BUILT[name].hard else {}
  learner = training.make_learner(
    {"student": STUDENT, "teacher": TEACHER} | method.models, hard | method.terms, optax.sgd(1.0)
  )
  state = jax.eval_shape(learner.init, jax.random.key(0), BATCH, {"teacher": frozen()})
  after, metrics = jax.eval_shape(learner.step, state, BATCH, {"teacher": frozen()})
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert set(metrics) == {*hard, *method.terms}
