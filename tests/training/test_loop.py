"""The loop: whatever interrupts it, the state and the log end with the same bits."""

import itertools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import data, training
from kdflax.training.checkpoints import digests

STEPS, EVERY = 7, {"save_every": 3, "log_every": 2, "evaluate_every": 3}
OPTIMIZER = optax.adam(0.1)
ARRAYS = {"x": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)}


def _init():
  params = {"w": jnp.array([0.3, -0.2, 0.1])}
  return {"params": params, "opt": OPTIMIZER.init(params), "key": jax.random.key(0), "step": jnp.int32(0)}


@jax.jit
def _step(state, batch):
  """A regression with noise, so that the order of the batches, the step and every bit of the optimizer matter."""

  def objective(params):
    noise = 0.1 * jax.random.normal(jax.random.fold_in(state["key"], state["step"]), (3,))
    return jnp.square((batch["x"] + noise) @ params["w"] - 1).sum()

  loss, gradient = jax.value_and_grad(objective)(state["params"])
  updates, opt = OPTIMIZER.update(gradient, state["opt"], state["params"])
  after = {"params": optax.apply_updates(state["params"], updates), "opt": opt}
  return {**state, **after, "step": state["step"] + 1}, {"loss": (loss, jnp.float32(len(batch["x"])))}


def _fixed():
  return itertools.repeat(ARRAYS)


def _positioned():
  return data.DeviceBatches(ARRAYS, 2, jax.random.key(1))


def _fit(
  directory,
  batches,
  *,
  state=None,
  stop=None,
  stop_after=None,
  phase="train",
  log=None,
  steps=STEPS,
  step=_step,
  **options,
):
  """One process of a run: opens everything anew."""
  own = log is None
  log = training.MetricsLog(directory / "metrics.jsonl") if own else log
  stop = stop or threading.Event()

  def progress(done, _):
    if stop_after is not None and done == stop_after:
      stop.set()

  try:
    with training.Checkpoints(directory / "checkpoints" / phase) as checkpoints:
      return training.fit(
        step,
        _init() if state is None else state,
        batches,
        num_steps=steps,
        phase=phase,
        checkpoints=checkpoints,
        log=log,
        evaluate=lambda state: {"norm": float(jnp.square(state["params"]["w"]).sum())},
        stop=stop,
        progress=progress,
        **{**EVERY, **options},
      )
  finally:
    if own:
      log.close()


@pytest.fixture(scope="module", params=[_fixed, _positioned])
def uninterrupted(request, tmp_path_factory):
  directory = tmp_path_factory.mktemp("uninterrupted")
  state = _fit(directory, request.param())
  return request.param, digests(state), (directory / "metrics.jsonl").read_bytes()


def _until_done(run):
  """Runs again and again, stopped one step further each time; returns the last state and the number of runs."""
  for attempt in itertools.count(1):
    try:
      return run(), attempt
    except training.Preempted as message:
      assert "the same command continues it" in str(message)


def test_the_log_has_the_means_of_its_steps(uninterrupted):
  _, _, log = uninterrupted
  rows = [json.loads(line) for line in log.decode().splitlines()]
  assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 7]
  assert [row["step"] for row in rows if "norm" in row] == [3, 6, 7]


def test_interrupted_at_every_step_it_ends_with_the_same_bits(uninterrupted, tmp_path):
  make, expected, log = uninterrupted
  stop = threading.Event()
  stop.set()  # before it begins: each run does one step, saves and stops
  state, attempts = _until_done(lambda: _fit(tmp_path, make(), stop=stop))
  assert attempts == STEPS
  assert digests(state) == expected
  assert (tmp_path / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize("stop_after", range(1, STEPS - 1))
def test_what_was_done_after_the_last_save_is_done_again(uninterrupted, tmp_path, stop_after):
  """A process that dies without a word: its rows after the checkpoint are dropped, its steps repeated."""
  make, expected, log = uninterrupted

  def die(state, batch):
    if int(state["step"]) == stop_after:
      raise KeyboardInterrupt
    return _step(state, batch)

  with pytest.raises(KeyboardInterrupt):
    # The shapes of a step are asked for without values; only a step that runs can die.
    _fit(tmp_path, make(), step=lambda s, b: _step(s, b) if isinstance(s["step"], jax.core.Tracer) else die(s, b))
  assert digests(_fit(tmp_path, make())) == expected
  assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_it_continues_on_a_mesh(tmp_path):
  """In the middle of a window of the log: its sums and the metrics of the next step must meet on some device."""
  copies = training.replicated(training.make_mesh())
  step = jax.jit(_step, out_shardings=copies)
  place = lambda: jax.device_put(_init(), copies)
  run = lambda directory, **options: _fit(directory, _fixed(), state=place(), step=step, **options)
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  for directory in (whole, broken):
    directory.mkdir()
  expected = digests(run(whole))
  with pytest.raises(training.Preempted):
    run(broken, stop_after=2)
  assert digests(run(broken)) == expected
  assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_finished_run_is_returned_without_another_step(uninterrupted, tmp_path):
  make, expected, log = uninterrupted
  for _ in range(2):
    state = _fit(tmp_path, make())
  assert digests(state) == expected and (tmp_path / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize(
  ("before", "now", "named"),
  [
    ({"teacher": "a"}, {"teacher": "b"}, "teacher: a in the checkpoint, b now"),
    (None, {"teacher": "b"}, "teacher: absent in the checkpoint, b now"),
    ({"teacher": "a"}, None, "teacher: a in the checkpoint, absent now"),
  ],
)
def test_what_a_training_is_bound_to_may_not_change(tmp_path, before, now, named):
  with pytest.raises(training.Preempted):
    _fit(tmp_path, _fixed(), stop_after=3, bound=before)
  with pytest.raises(ValueError, match=f"train is bound to other content.*\n  {named}"):
    _fit(tmp_path, _fixed(), bound=now)
  _fit(tmp_path, _fixed(), bound=before)


def test_phases_share_a_log(tmp_path):
  """The second phase is stopped before its first save; its rows go, those of the first stay."""

  def run(directory, stop_after=None):
    log = training.MetricsLog(directory / "metrics.jsonl")
    try:
      _fit(directory, _fixed(), phase="a", log=log)
      _fit(directory, _fixed(), phase="b", log=log, save_every=100, stop_after=stop_after)
    finally:
      log.close()

  whole, broken = tmp_path / "whole", tmp_path / "broken"
  for directory in (whole, broken):
    directory.mkdir()
  run(whole)
  with pytest.raises(training.Preempted, match="b stopped at step 3 of 7"):
    run(broken, stop_after=2)
  run(broken)
  assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_log_that_was_lost_is_not_made_up(tmp_path):
  with pytest.raises(training.Preempted):
    _fit(tmp_path, _fixed(), stop_after=3)
  (tmp_path / "metrics.jsonl").write_bytes(b"")
  with pytest.raises(ValueError, match="rows are lost"):
    _fit(tmp_path, _fixed())


@pytest.mark.parametrize("name", ["num_steps", "save_every", "log_every", "evaluate_every"])
@pytest.mark.parametrize("interval", [3, -2])
def test_intervals_that_no_call_meets_are_refused(name, interval):
  intervals = {"num_steps": 4, "save_every": 4, "log_every": 4, "evaluate_every": 4} | {name: interval}
  with pytest.raises(ValueError, match=f"{name} must be a positive multiple of steps_per_call=2; got {interval}"):
    training.fit(_step, _init(), _fixed(), steps_per_call=2, **intervals)


def test_several_steps_in_a_call_count_as_such():
  def two(state, batch):
    state, first = _step(state, batch)
    state, second = _step(state, batch)
    return state, training.metrics.add(first, second)

  seen = []
  state = training.fit(
    two, _init(), _fixed(), num_steps=6, steps_per_call=2, progress=lambda done, row: seen.append(done)
  )
  assert seen == [2, 4, 6] and state["step"] == 6


def test_without_checkpoints_and_log_it_only_trains(uninterrupted):
  make, expected, _ = uninterrupted
  assert digests(training.fit(_step, _init(), make(), num_steps=STEPS)) == expected
