"""Layouts: every array where its rule says, the compiled step without a gathered gradient, the one-device result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks import scale
from kdflax import losses, models, training
from kdflax.numerics.trees import name_of
from kdflax.objectives import Term

SIZES = scale.SMALL  # masked batches of a size that eight devices do not divide
CASES = {"8": "FSDP, 8", "4x2": "FSDP and tensor parallel, 4 x 2"}
AXES = {"data": 4, "model": 2}


@functools.cache
def _richest():
  """Relations between all examples, a memory of all, a Gramian of the rows, an average, a trace norm, clipping."""
  return scale.learner_of(SIZES)


def _batch(seed=0):
  return scale.batch_of(SIZES, seed)


@functools.cache
def _frozen():
  return {"teacher": scale.teacher_of(SIZES).init(jax.random.key(7), _batch())}


def _train(step, state, place, frozen, num_steps):
  for seed in range(num_steps):
    state, metrics = step(state, place(_batch(seed=seed)), frozen)
  return state._replace(key=0), training.metrics.means(metrics)


@functools.cache
def _one_device(num_steps):
  _, step, init, frozen = _spread("1")
  return _train(step, init(), lambda batch: batch, frozen, num_steps)


@functools.cache
def _spread(name):
  """(layout, step, init, frozen); on one device without a layout."""
  if name == "1":
    learner = _richest()
    state = learner.init(jax.random.key(0), _batch(), _frozen())
    return None, training.make_train_step(learner), lambda: _copy(state), _frozen()
  layout = scale.layout_of(CASES[name])
  frozen = training.place_frozen(_frozen(), layout)
  step = training.make_train_step(_richest(), layout=layout)
  state = training.init_state(_richest(), jax.random.key(0), _batch(), frozen, layout=layout)
  return layout, step, lambda: _copy(state), frozen


def _copy(state):
  """For a step to take."""
  return jax.tree.map(jnp.copy, state)


def _assert_close(a, b, rtol):
  compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(np.abs(np.asarray(y)).max(), 1e-6))
  jax.tree.map(compare, a, b)


def _specs(tree):
  return {name_of(p, "/"): leaf.sharding.spec for p, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("name", CASES)
def test_devices_together_are_one_device(name):
  layout, step, init, frozen = _spread(name)
  end = _train(step, init(), functools.partial(training.place_batch, mesh=layout), frozen, 3)
  _assert_close(end, _one_device(3), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_devices_together_are_one_device_after_fifty_steps(name):
  layout, step, init, frozen = _spread(name)
  end = _train(step, init(), functools.partial(training.place_batch, mesh=layout), frozen, 50)
  _assert_close(end, _one_device(50), rtol=1e-3)


class _Batches:
  """A stream with a position, of batches that lie where a layout wants them."""

  def __init__(self, layout):
    self._layout, self._next = layout, 0

  def __next__(self):
    self._next += 1
    batch = _batch(seed=self._next)
    return batch if self._layout is None else training.place_batch(batch, self._layout)

  def get_state(self):
    return self._next

  def set_state(self, state):
    self._next = state


def _fit(folder, name, num_steps):
  """One process on one kind of devices."""
  layout, step, init, frozen = _spread(name)
  with training.Checkpoints(folder) as checkpoints:
    saving = training.Saving(checkpoints, save_every=2)
    run = lambda state, batch: step(state, batch, frozen)
    return training.fit(run, init(), _Batches(layout), num_steps=num_steps, saving=saving)


def test_a_training_continues_on_other_devices(tmp_path):
  """Saved on eight, continued on 4 x 2 and then on one; every array comes back cut as the new layout says."""
  whole = _fit(tmp_path / "whole", "8", 6)
  _fit(tmp_path / "moved", "8", 2)
  state = _spread("4x2")[2]()
  with training.Checkpoints(tmp_path / "moved") as checkpoints:
    restored = checkpoints.restore({"state": jax.tree.map(training.loop._shape, state)})
  assert _specs(restored.arrays["state"]) == _specs(state)
  for name, num_steps in (("4x2", 4), ("1", 6)):
    end = _fit(tmp_path / "moved", name, num_steps)
  _assert_close(end._replace(key=0), whole._replace(key=0), rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_training_continues_on_the_same_devices_with_the_same_bits(tmp_path, name):
  whole = _fit(tmp_path / "whole", name, 4)
  _fit(tmp_path / "stopped", name, 2)
  assert training.digest(_fit(tmp_path / "stopped", name, 4)) == training.digest(whole)


def test_an_evaluation_is_that_of_one_device():
  layout, _, _, frozen = _spread("4x2")
  logits = {"student_logits": "student.logits", "teacher_logits": "teacher.logits", "where": "batch.where"}
  terms = {"soft": Term(losses.forward_kl, logits)}
  network = {name: scale.teacher_of(SIZES) for name in ("student", "teacher")}
  variables = {
    "student": training.place_frozen({"s": network["student"].init(jax.random.key(1), _batch())}, layout)["s"]
  }
  variables |= frozen
  found = training.make_eval_step(network, terms, layout=layout)(variables, _batch())["soft"]
  expected = training.make_eval_step(network, terms)(jax.device_get(variables), _batch())["soft"]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  said = training.predict(network["student"], variables["student"], [training.place_batch(_batch(), layout)])
  assert said["logits"].shape == (_batch()["where"].sum(), SIZES.classes)


def test_what_follows_params_lies_where_they_do():
  layout, step, init, frozen = _spread("4x2")
  state = init()
  start = _specs(state)
  for prefix in ("params/student", "averages/mean", "opt_state/1/0/mu/student", "opt_state/1/0/nu/student"):
    assert start[f"{prefix}/shared/hidden/0/kernel"] == P("data", "model")
    assert start[f"{prefix}/task/left/head/linear/kernel"] == P(None, ("data", "model"))
    assert start[f"{prefix}/shared/hidden/0/bias"] == P()  # a few numbers
  assert start["model_state/crd/student"] == P("data", "model") and start["model_state/crd/student_norm"] == P()
  assert frozen["teacher"][0]["hidden"]["0"]["kernel"].sharding.spec == P("data", "model")
  kernel = state.params["student"]["shared"]["hidden"]["0"]["kernel"]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(SIZES.image // 4, SIZES.hidden[0] // 2)}
  state, _ = step(state, training.place_batch(_batch(), layout), frozen)
  assert _specs(state) == start


@pytest.mark.parametrize("name", CASES)
def test_no_head_no_gradient_and_no_memory_is_gathered(name):
  """No head, no kernel's gradient of any row, and not the memory of all examples is whole on a device."""
  layout, step, init, frozen = _spread(name)
  program = step.lower(init(), training.place_batch(_batch(), layout), frozen).compile().as_text()
  assert any(message.kind == "all-gather" for message in scale.messages(program))
  assert scale.gathered(SIZES, program) == []


def test_what_is_gathered_is_seen():
  """A rule is worth what its reader sees: a head that is cut and used whole."""
  mesh = training.make_mesh()
  head = jax.device_put(jnp.ones((SIZES.hidden[1], SIZES.classes)), jax.sharding.NamedSharding(mesh, P("data")))
  whole = jax.jit(lambda head: jnp.sort(head, axis=0), out_shardings=training.replicated(mesh))
  assert scale.gathered(SIZES, whole.lower(head).compile().as_text()) == ["a head"]


@pytest.mark.slow
def test_memory_falls_with_the_devices():
  """The state by the number of devices, but for what is too small to be cut; temporaries fall as well."""
  memory = {name: scale.compiled(scale.LARGE, scale.layout_of(name)).memory_analysis() for name in scale.CASES}
  state = {name: plan.argument_size_in_bytes for name, plan in memory.items()}
  temporaries = {name: plan.temp_size_in_bytes for name, plan in memory.items()}
  assert state["copies"] > 0.95 * state["one device"]
  for devices in (2, 4, 8):
    assert state[f"FSDP, {devices}"] < 1.1 * state["one device"] / devices
  assert temporaries["FSDP, 8"] < temporaries["FSDP, 4"] < temporaries["FSDP, 2"] < temporaries["one device"]


def test_a_step_is_compiled_once():
  layout, _, init, frozen = _spread("8")
  traced = []
  step = training.make_train_step(_counting(_richest(), traced), layout=layout)
  state = init()
  for seed in range(2):
    state, _ = step(state, training.place_batch(_batch(seed=seed), layout), frozen)
  assert len(traced) == 1


def _counting(learner, traced):
  def step(state, batch, frozen):
    traced.append(1)
    return state._replace(step=state.step + 1), {"count": (jnp.ones(()), jnp.ones(()))}

  return learner._replace(step=step)


def _tree(**shapes):
  return {"net": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}


def _cut(rules, leading=0, **shapes):
  """By name, how rules cut the params of one model."""
  layout = training.Layout(training.make_mesh(AXES), rules, leading=leading)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  state = training.TrainState(number, _tree(**shapes), {}, (), (), {}, number)
  return {name: leaf.spec for name, leaf in layout.of_state(state).params["net"].items()}


def test_rules_add_up_and_a_partition_spec_is_the_last_word():
  shapes = {"kernel": (8, 64, 32), "bias": (32,), "odd": (7, 63), "whole": (64, 64)}
  rules = [("whole", P()), training.tensor_parallel(at_least=1), training.fsdp(at_least=64)]
  assert _cut(rules, **shapes) == {
    "kernel": P(None, "data", "model"), "bias": P("model"), "odd": P(), "whole": P()
  }  # fmt: skip
  assert _cut([("kernel", P("model")), training.fsdp(at_least=1)], **shapes)["kernel"] == P("model")
  assert _cut([training.fsdp(("data", "model"), at_least=1)], **shapes)["kernel"] == P(None, ("data", "model"))
  assert _cut([training.fsdp(at_least=2**20)], **shapes) == dict.fromkeys(shapes, P())
  assert _cut([training.fsdp(at_least=2048)], leading=1, kernel=(64, 16, 128)) == {"kernel": P(None, None, "data")}


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([("nett", P())], r"rules: 'nett' finds nothing.*net/kernel"),
    ([("kernel", P("data", "rows"))], r"rule 'kernel' names the axes \['rows'\]; the mesh has"),
    ([training.fsdp("rows")], r"rule '' names the axes \['rows'\]"),
    ([("kernel", P(None, "data"))], r"net/kernel of shape \[8, 6\] cannot be cut by .* multiple of the devices"),
    ([("kernel", P(None, None, "data"))], r"net/kernel of shape \[8, 6\] cannot be cut"),
  ],
)
def test_rules_that_do_not_fit_are_refused(rules, message):
  with pytest.raises(ValueError, match=message):
    _cut(rules, kernel=(8, 6))


def test_states_of_other_shapes_follow_as_far_as_they_go():
  """Adafactor keeps rows and columns of a square, a combiner a leading axis of tasks."""
  layout = training.Layout(training.make_mesh(), [training.fsdp(at_least=16)])
  params = {"net": {"kernel": jnp.zeros((16, 32)), "bias": jnp.zeros((32,))}}
  opt_state = optax.adafactor(0.1, min_dim_size_to_factor=8).init(params)
  number, tasks = jnp.int32(0), jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape)), params)
  placed = layout.of_state(training.TrainState(number, params, {}, opt_state, {"mean": tasks}, {}, number))
  specs = {name_of(p, "/"): leaf.spec for p, leaf in jax.tree.leaves_with_path(placed)}
  assert specs["balancer_state/mean/net/kernel"] == P(None, None, "data")
  assert specs["balancer_state/mean/net/bias"] == P(None, "data")
  assert specs["opt_state/0/v_row/net/kernel"] == specs["opt_state/0/v_col/net/kernel"] == P("data")
  jax.device_put(opt_state, placed.opt_state)


def test_a_mesh_and_a_layout_are_one_too_many():
  mesh = training.make_mesh()
  with pytest.raises(ValueError, match="one of mesh and layout"):
    training.make_train_step(_richest(), mesh=mesh, layout=training.Layout(mesh))


def test_an_evaluation_takes_a_batch_of_the_host_that_does_not_divide():
  network = {"student": models.mlp((16,), 64)}
  terms = {"said": Term(lambda logits: logits.sum(-1), {"logits": "student.logits"})}
  batch = {"image": np.arange(96, dtype=np.float32).reshape(12, 8)}
  layout = training.Layout(training.make_mesh({"data": 8, "model": 1}), [training.fsdp("data", at_least=1)])
  variables = training.place_frozen({"student": network["student"].init(jax.random.key(0), batch)}, layout)
  found = training.make_eval_step(network, terms, layout=layout)(variables, batch)["said"]
  expected = training.make_eval_step(network, terms)(jax.device_get(variables), batch)["said"]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
