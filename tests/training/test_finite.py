"""A training that is lost ends within one interval of the log, says where, and leaves its last finite checkpoint."""

import itertools
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import data, training
from kdflax.training import finite

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
ROWS = np.ones((6, 2), np.float32)


def _init():
  params = {"w": jnp.array([0.3, -0.2])}
  return {"params": params, "opt": OPTIMIZER.init(params), "best": jnp.float32(jnp.inf)}


@jax.jit
def _step(state, batch):
  """A regression whose logged loss hides what is not finite, as a maximum does that drops NaN."""
  loss = lambda params: jnp.square(batch["x"] @ params["w"] - 1).mean()
  value, gradient = jax.value_and_grad(loss)(state["params"])
  updates, opt = OPTIMIZER.update(gradient, state["opt"])
  after = {**state, "params": optax.apply_updates(state["params"], updates), "opt": opt}
  return after, {"loss": (jnp.nan_to_num(value), jnp.float32(1))}


class _Batches:
  """One row after the other; the one at `broken` holds a NaN pixel."""

  def __init__(self, broken):
    self._broken, self._position = broken, 0

  def __next__(self):
    self._position += 1
    x = ROWS.copy()
    if self._position == self._broken:
      x[3, 1] = np.nan
    return {"x": x}

  def get_state(self):
    return {"position": self._position}

  def set_state(self, state):
    self._position = state["position"]


def _fit(folder, batches, **options):
  with (
    training.Checkpoints(folder / "checkpoints") as checkpoints,
    training.MetricsLog(folder / "metrics.jsonl") as log,
  ):
    return training.fit(
      options.pop("step", _step),
      _init(),
      batches,
      num_steps=40,
      saving=training.Saving(checkpoints, save_every=2),
      logging=training.Logging(log, log_every=10, **options),
    )


@pytest.mark.parametrize("broken", [13, 20, 21])
def test_one_pixel_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path, broken):
  last = 2 * ((broken - 1) // 2)
  with pytest.raises(training.Diverged) as caught:
    _fit(tmp_path, _Batches(broken))
  message = str(caught.value)
  assert message.startswith(f"train diverged between the steps {last} and {last + 2} ")
  assert f"data from {{'position': {last}}} to {{'position': {last + 2}}}" in message
  assert f"after the checkpoint of step {last}" in message
  assert "opt/0/trace/w, params/w of the state are no longer finite; lower the learning rate" in message
  with training.Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [last - 2, last]
  state = _fit(tmp_path, _Batches(None))  # the same command continues, with batches that are whole
  assert np.isfinite(state["params"]["w"]).all()


def test_without_checkpoints_it_ends_within_an_interval_of_the_log():
  steps = []
  with pytest.raises(training.Diverged, match=r"between the steps 10 and 20 \(data"):
    training.fit(
      _step,
      _init(),
      _Batches(13),
      num_steps=100,
      logging=training.Logging(log_every=10, progress=lambda done, row: steps.append(done)),
    )
  assert steps[-1] == 19


def test_a_state_that_begins_with_nan_does_not_begin():
  state = _init()
  state["params"]["w"] = jnp.array([0.0, jnp.nan])
  with pytest.raises(training.Diverged, match=r"train cannot begin: params/w of the state holds NaN"):
    training.fit(_step, state, _Batches(None), num_steps=2)


def _with_metrics(**values):
  def step(state, batch):
    state, metrics = _step(state, batch)
    return state, metrics | {name: (jnp.float32(value), jnp.float32(1)) for name, value in values.items()}

  return step


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_ends_the_run_though_the_state_is(tmp_path, value):
  with pytest.raises(training.Diverged, match=r"between the steps 8 and 10 .*the means of kd are not finite, though"):
    _fit(tmp_path, _Batches(None), step=_with_metrics(kd=value, ce=1.0))


def test_a_term_that_only_watches_may_be_infinite(tmp_path):
  _fit(tmp_path, _Batches(None), step=_with_metrics(kd=np.inf), watched=("kd",))


@pytest.mark.parametrize("said", [{"skipped": 0.1}, {"present/kd": 0.5}])
def test_a_learner_that_leaves_out_what_is_not_finite_goes_on(tmp_path, said):
  _fit(tmp_path, _Batches(None), step=_with_metrics(**{"kd": np.nan, **said}))


def test_a_row_that_is_absent_for_a_whole_interval_is_said_once(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    _fit(tmp_path, _Batches(None), step=_with_metrics(**{"present/kd": 0.0, "present/ce": 0.1}))
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 1 and "train: the row 'kd' took part in no update" in said[0]


def test_updates_that_are_all_skipped_are_said_once(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    _fit(tmp_path, _Batches(None), step=_with_metrics(skipped=1.0))
  assert [r.getMessage()[:30] for r in caplog.records] == ["train: every update since the "]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, jnp.float8_e4m3fn])
def test_what_is_not_finite_is_found_by_name(dtype):
  good, bad = np.ones((3, 2), np.float32), np.ones((3, 2), np.float32)
  bad[2, 1] = np.nan
  state = {
    "a": jnp.asarray(good, dtype),
    "b": [jnp.asarray(bad, dtype), 3],
    "key": jax.random.key(0),
    "n": np.arange(3),
  }
  assert finite.not_finite(state) == ["b/0"]
  assert finite.not_finite({"a": 1.0, "b": float("nan"), "c": np.float32("inf")}) == ["b", "c"]


def test_it_is_found_on_every_device():
  mesh = training.make_mesh()
  split = jax.device_put(np.arange(16.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
  assert finite.not_finite({"x": split}) == []
  assert finite.not_finite({"x": split.at[13].set(jnp.nan)}) == ["x"]
  assert finite.not_finite({"x": jax.device_put(jnp.array(jnp.inf), training.replicated(mesh))}) == ["x"]


def test_on_an_accelerator_it_is_found_without_the_arrays(monkeypatch):
  monkeypatch.setattr(finite, "_host_devices", lambda: [])
  assert finite.not_finite({"a": jnp.ones(3), "b": jnp.array([1, jnp.nan])}) == ["b"]


def test_looking_leaves_the_arrays_to_be_donated():
  state = {"x": jnp.ones(1000)}
  finite.not_finite(state)
  place = state["x"].unsafe_buffer_pointer()
  moved = jax.jit(lambda s: {"x": s["x"] + 1}, donate_argnums=0)(state)
  assert moved["x"].unsafe_buffer_pointer() == place


def test_batches_that_end_are_named():
  rows = ({"x": ROWS} for _ in range(3))
  with pytest.raises(
    ValueError, match=r"the batches ended after 3 of num_steps=5 updates; give batches that start again"
  ):
    training.fit(_step, _init(), rows, num_steps=5)


def test_a_resumed_run_holds_its_state_once(tmp_path):
  size = 250_000
  make = lambda: {"w": jnp.zeros(size), "key": jax.random.key(0)}
  step = jax.jit(lambda s, b: ({**s, "w": s["w"] + b}, {"l": (s["w"][0], jnp.float32(1))}), donate_argnums=0)
  fit = lambda state, steps, **options: training.fit(
    step, state, itertools.repeat(1.0), num_steps=steps, checkpoints=checkpoints, **options
  )
  held = lambda: sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted() and x.shape == (size,))
  with training.Checkpoints(tmp_path) as checkpoints:
    fit(make(), 2)
    seen, given = [], make()
    before = held() - given["w"].nbytes
    state = fit(given, 4, progress=lambda done, row: seen.append(held() - before))
    assert seen[0] == 4 * size and given["w"].is_deleted() and not given["key"].is_deleted()
    shapes = jax.eval_shape(make)
    assert state["w"][0] == 4 and fit(shapes, 6)["w"][0] == 6
  with training.Checkpoints(tmp_path / "new") as checkpoints, pytest.raises(ValueError, match="no checkpoint to take"):
    fit(shapes, 6)


def test_a_checkpoint_later_than_the_end_is_not_taken_for_the_result(tmp_path):
  with training.Checkpoints(tmp_path) as checkpoints:
    training.fit(_step, _init(), _Batches(None), num_steps=6, checkpoints=checkpoints)
    with pytest.raises(ValueError, match=r"a checkpoint of step 6, later than num_steps=4; give at least num_steps=6"):
      training.fit(_step, _init(), _Batches(None), num_steps=4, checkpoints=checkpoints)
    training.fit(_step, _init(), _Batches(None), num_steps=6, checkpoints=checkpoints)


def test_a_metric_with_a_new_name_starts_an_empty_window(tmp_path, caplog):
  with training.Checkpoints(tmp_path) as checkpoints:
    fit = lambda step, steps, **options: training.fit(
      step, _init(), _Batches(None), num_steps=steps, log_every=10, checkpoints=checkpoints, **options
    )
    stop = threading.Event()
    stop.set()
    with pytest.raises(training.Preempted):
      fit(_step, 10, stop=stop)
    with caplog.at_level(logging.WARNING):
      rows = []
      fit(_with_metrics(watched=2.0), 10, progress=lambda done, row: rows.append(row))
  assert (
    rows[-1]["watched"] == 2 and "has sums of the metrics ['loss'], the program has ['loss', 'watched']" in caplog.text
  )


def test_old_names_serve_for_one_release_and_others_are_named():
  seen = []
  training.fit(_step, _init(), _Batches(None), num_steps=2, progress=lambda done, row: seen.append(done), log_every=1)
  assert seen == [1, 2]
  with pytest.raises(TypeError, match=r"unexpected arguments \['every'\]; see Saving, Logging and Evaluation"):
    training.fit(_step, _init(), _Batches(None), num_steps=2, every=1)


def test_device_batches_say_their_position():
  batches = data.DeviceBatches({"x": ROWS}, 2, jax.random.key(0))
  with pytest.raises(training.Diverged, match=r"data from .*step.* to "):
    training.fit(lambda s, b: _step(s, {"x": b["x"] * jnp.nan}), _init(), batches, num_steps=2)
