"""A sweep in one program is as many runs, and the documented one works."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import sweeps
from kdflax import data, losses, models, training
from kdflax.objectives import Term

ARRAYS = {
  "image": np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32),
  "label": np.arange(12, dtype=np.int32) % 3,
}


def _learner(setting):
  logits = {"student_logits": "student.logits", "teacher_logits": "teacher.logits"}
  terms = {
    "hard": Term(
      optax.softmax_cross_entropy_with_integer_labels, {"logits": "student.logits", "labels": "batch.label"}
    ),
    "soft": Term(losses.kl_soft_targets, {**logits, "temperature": setting["temperature"]}, weight=setting["weight"]),
  }
  network = {"student": models.mlp((5,), 3), "teacher": models.mlp((6,), 3)}
  return training.make_learner(
    network, terms, optax.adam(setting["rate"]), sample=functools.partial(data.sample, size=4)
  )


@pytest.fixture(scope="module")
def frozen():
  return {"teacher": models.mlp((6,), 3).init(jax.random.key(9), ARRAYS)}


@pytest.fixture(scope="module")
def swept(frozen):
  """A grid of four settings and the params after three steps."""
  settings = sweeps.grid(weight=(0.5, 2.0), temperature=(1.0, 4.0), rate=(1e-2,))
  learner = sweeps.sweep(_learner, settings)
  state = learner.init(jax.random.key(0), ARRAYS, frozen)
  step = jax.jit(learner.step)
  for _ in range(3):
    state, metrics = step(state, ARRAYS, frozen)
  return settings, learner, state, metrics


def test_a_grid_has_every_combination():
  settings = sweeps.grid(a=(1.0, 2.0), b=(3.0, 4.0, 5.0))
  pairs = list(zip(settings["a"].tolist(), settings["b"].tolist(), strict=True))
  assert pairs == [(1.0, 3.0), (1.0, 4.0), (1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (2.0, 5.0)]
  assert sweeps.setting_at(settings, 4) == {"a": 2.0, "b": 4.0}


def test_each_setting_ends_where_a_run_of_its_own_ends(swept, frozen):
  settings, _, state, metrics = swept
  init, step = jax.jit(lambda s, *a: _learner(s).init(*a)), jax.jit(lambda s, *a: _learner(s).step(*a))
  for index in range(4):
    setting = sweeps.setting_at(settings, index)
    alone = init(setting, jax.random.key(0), ARRAYS, frozen)
    for _ in range(3):
      alone, said = step(setting, alone, ARRAYS, frozen)
    for swept_leaf, leaf in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
      np.testing.assert_allclose(swept_leaf[index], leaf, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["soft"][0][index], said["soft"][0], rtol=1e-5)  # the mean, beside its count
  kernels = np.asarray(state.params["student"]["head"]["kernel"])
  assert all(np.abs(kernels[0] - kernels[index]).max() > 1e-4 for index in (1, 2, 3))


def test_the_teacher_is_asked_once_for_all_settings(swept, frozen):
  """Its first product, of 4 images with 6 hidden units, has no axis of settings; the student's, with 5, has."""
  _, learner, state, _ = swept
  text = str(jax.make_jaxpr(learner.step)(state, ARRAYS, frozen))
  assert re.search(r"f32\[4,6\] = dot_general", text) and not re.search(r"f32\[4,4,6\] = dot_general", text)
  assert re.search(r"f32\[(4,4,5|4,5,4)\] = dot_general", text)


def test_the_page_runs(monkeypatch):
  """The blocks of docs/sweeps.md, the second after the first; the one about Optuna needs a package that tests lack."""
  blocks = re.findall(r"```python\n(.*?)```", Path("docs/sweeps.md").read_text(), re.DOTALL)
  names = {"ARRAYS": ARRAYS, "jnp": jnp}
  for block in blocks[:-1]:
    exec(block, names)
  assert set(names["best"]) == {"weight", "temperature", "rate"}
