"""Coupling penalties against the sums that define them, projections, shardings and the proximal step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdflax import models
from kdflax.coupling import (
  compose,
  l2_coupling,
  left_multiply,
  proximal_trace_norm,
  select,
  stacked_trace_norm,
  trace_norm_coupling,
)
from tests.compiled import compiled

PENALTIES = (l2_coupling, trace_norm_coupling)


def make_tasks(count, seed=0, scale=1.0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: np.asarray(scale * rng.normal(size=shape), dtype)
  return [
    {"conv": {"kernel": draw(2, 2, 3, 4), "bias": draw(4)}, "dense": {"kernel": draw(12, 4)}, "gain": draw()}
    for _ in range(count)
  ]


def as_matrix(leaf):
  return np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1] if np.ndim(leaf) > 1 else 1)


def nuclear(matrix):
  return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False).sum()


def polar(matrix):
  u, _, vt = np.linalg.svd(matrix, full_matrices=False)
  return u @ vt


def definition(penalty, tasks):
  """The double sum over ordered pairs, in float64."""
  of_difference = {l2_coupling: lambda d: np.sum(d**2), trace_norm_coupling: nuclear}[penalty]
  total = 0.0
  for first, second in itertools.permutations(tasks, 2):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
      total += of_difference(as_matrix(a) - as_matrix(b))
  return total


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("count", [2, 5])
def test_value_is_the_sum_over_ordered_pairs(penalty, count):
  tasks = make_tasks(count)
  np.testing.assert_allclose(jax.jit(penalty)(tasks), definition(penalty, tasks), rtol=1e-5)
  with jax.enable_x64(True):
    tasks = make_tasks(count, dtype=np.float64)
    np.testing.assert_allclose(jax.jit(penalty)(tasks), definition(penalty, tasks), rtol=1e-9)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradient_of_a_task_is_twice_the_sum_over_the_others(penalty):
  tasks = make_tasks(3)
  gradients = jax.jit(jax.grad(penalty))(tasks)
  one = {l2_coupling: lambda d: 2 * d, trace_norm_coupling: polar}[penalty]
  for i, layer in itertools.product(range(3), ("conv", "dense")):
    mine = as_matrix(tasks[i][layer]["kernel"])
    expected = 2 * sum(one(mine - as_matrix(tasks[j][layer]["kernel"])) for j in range(3) if j != i)
    got = as_matrix(gradients[i][layer]["kernel"])
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_identical_tasks_cost_exactly_nothing_and_are_not_pushed(penalty, count):
  tasks = make_tasks(1, scale=100.0) * count
  value, gradients = jax.jit(jax.value_and_grad(penalty))(tasks)
  assert value == 0
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_l2_does_not_cancel_under_a_common_offset():
  tasks = [jax.tree.map(lambda leaf: np.float32(leaf * 2.0**-6 + 100), task) for task in make_tasks(4)]
  np.testing.assert_allclose(l2_coupling(tasks), definition(l2_coupling, tasks), rtol=1e-5)


def test_smoothing_and_method_reach_the_norm():
  tasks = make_tasks(3)
  norm = compiled(trace_norm_coupling)
  exact = norm(tasks)
  assert norm(tasks, smoothing=1.0) < exact
  np.testing.assert_allclose(norm(tasks, method="newton_schulz"), exact, rtol=1e-5)
  assert jax.jit(jax.grad(lambda mu: trace_norm_coupling(tasks, smoothing=mu)))(0.5) < 0


def test_one_batched_call_for_each_shape():
  tasks = [{"a": task["dense"]["kernel"], "b": 2 * task["dense"]["kernel"], "c": np.ones((5, 4), np.float32)}
           for task in make_tasks(4)]  # fmt: skip
  text = str(jax.make_jaxpr(lambda tasks: trace_norm_coupling(tasks, method="svd"))(tasks))
  assert text.count("= svd[") == 2
  assert "f32[12,12,4]" in text  # six pairs of two leaves


def test_bfloat16_parameters():
  tasks = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), make_tasks(3))
  for penalty in PENALTIES:
    value, gradients = jax.jit(jax.value_and_grad(penalty))(tasks)
    assert value.dtype == jnp.float32
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(value, definition(penalty, tasks), rtol=1e-5)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_sharded_parameters_give_the_result_of_one_device(penalty):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tasks = [{"kernel": draw(16, 8), "bias": draw(8)} for _ in range(3)]
  shardings = {"kernel": NamedSharding(mesh, P("data", "model")), "bias": NamedSharding(mesh, P("model"))}
  value, gradients = jax.jit(jax.value_and_grad(penalty))(tasks)
  pinned = jax.jit(jax.value_and_grad(penalty), out_shardings=(NamedSharding(mesh, P()), [shardings] * 3))
  sharded_value, sharded_gradients = pinned([jax.device_put(task, shardings) for task in tasks])
  np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(sharded_gradients), jax.tree.leaves(gradients), strict=True):
    assert len(a.sharding.device_set) == 8
    assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * np.linalg.norm(b)


def collectives(penalty, shape, spec, count=3):
  """Lines of the compiled value and gradient that move more than a reduction, over leaves of one shape and layout."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  layout = NamedSharding(mesh, spec)
  tasks = [jax.device_put(np.random.default_rng(i).normal(size=shape).astype(np.float32), layout) for i in range(count)]
  compute = jax.jit(jax.value_and_grad(penalty), out_shardings=(None, [layout] * count))
  text = compute.lower(tasks).compile().as_text()
  assert " all-reduce(" in text
  moves = (" all-gather", " all-to-all", " collective-permute")
  return [line for line in text.splitlines() if any(f"{move}(" in line or f"{move}-start(" in line for move in moves)]


@pytest.mark.parametrize(
  ("penalty", "shape", "spec"),
  [
    (l2_coupling, (1024, 16), P("data", None)),
    (l2_coupling, (64, 64), P(None, "data")),
    (l2_coupling, (3, 3, 64, 16), P(None, None, "data", None)),
    (l2_coupling, (3, 3, 16, 64), P(None, None, None, "data")),
    (trace_norm_coupling, (1024, 16), P("data", None)),
    (trace_norm_coupling, (16, 1024), P(None, "data")),
    (trace_norm_coupling, (3, 3, 64, 16), P(None, None, "data", None)),
    (lambda leaves: sum(map(stacked_trace_norm, leaves)), (64, 16, 3), P("data", None, None)),
    (lambda leaves: sum(map(stacked_trace_norm, leaves)), (16, 64, 3), P(None, "data", None)),
  ],
)
def test_common_layouts_are_not_gathered(penalty, shape, spec):
  assert collectives(penalty, shape, spec) == []


def test_the_short_side_is_gathered():
  """So the sweep above can fail."""
  assert collectives(trace_norm_coupling, (1024, 16), P(None, "data"))


def test_row_sharded_parameters_are_not_gathered():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, P("data", None))
  tasks = [jax.device_put(np.random.default_rng(i).normal(size=(1024, 4)).astype(np.float32), rows) for i in range(3)]
  compute = jax.jit(jax.value_and_grad(trace_norm_coupling), out_shardings=(None, [rows] * 3))
  text = compute.lower(tasks).compile().as_text()
  assert "all-reduce" in text
  assert "f32[3,128,4]" in text  # the three pairs, one eighth of the rows
  assert "1024" not in "".join(line for line in text.splitlines() if "all-gather" in line or "all-to-all" in line)


# Projections.


def test_select_compares_different_trees_on_the_selected_part():
  first, second = make_tasks(2)
  second = {**second, "head": np.ones((9, 9), np.float32)}
  part = select(r"^conv/")
  assert set(part(first)) == {"conv/kernel", "conv/bias"}
  for penalty in PENALTIES:
    expected = definition(penalty, [first["conv"], second["conv"]])
    np.testing.assert_allclose(penalty([first, second], part), expected, rtol=1e-5)
  gradient = jax.grad(lambda tasks: l2_coupling(tasks, part))([first, second])[1]
  assert np.any(gradient["conv"]["kernel"])
  assert not np.any(gradient["head"])
  assert not np.any(gradient["dense"]["kernel"])


def test_projections_for_each_task_bring_layers_of_different_shape_together():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tasks = [{"kernel": draw(6, 4), "bias": draw(5)}, {"kernel": draw(2, 1, 4, 4), "bias": draw(3)}]
  maps = [draw(3, 6), draw(3, 8)]
  projections = [compose(select("kernel"), left_multiply(matrix)) for matrix in maps]
  projected = [matrix @ task["kernel"].reshape(-1, 4) for matrix, task in zip(maps, tasks, strict=True)]
  for penalty in PENALTIES:
    np.testing.assert_allclose(penalty(tasks, projections), definition(penalty, projected), rtol=1e-5)
  gradient = jax.grad(lambda tasks: trace_norm_coupling(tasks, projections))(tasks)[0]["kernel"]
  expected = 2 * maps[0].T @ polar(np.float64(projected[0]) - projected[1])
  assert np.linalg.norm(gradient - expected) <= 1e-5 * np.linalg.norm(expected)


def test_compose_applies_from_left_to_right():
  params = make_tasks(1)[0]
  assert compose()(params) is params
  assert compose(select("kernel"), select("dense"))(params).keys() == {"dense/kernel"}


def test_left_multiply_leaves_vectors_alone():
  params = make_tasks(1)[0]
  mapped = left_multiply(2 * jnp.eye(12))({"conv": params["conv"], "gain": params["gain"]})
  np.testing.assert_allclose(mapped["conv"]["kernel"], 2 * as_matrix(params["conv"]["kernel"]), rtol=1e-6)
  np.testing.assert_array_equal(mapped["conv"]["bias"], params["conv"]["bias"])


@pytest.mark.parametrize("penalty", PENALTIES)
def test_mistakes_are_named(penalty):
  first, second = make_tasks(2)
  with pytest.raises(ValueError, match="at least 2 tasks' parameters, got 1"):
    penalty([first])
  with pytest.raises(ValueError, match=r"got a mapping of \['left', 'right'\]: its values"):
    penalty({"left": first, "right": second})
  with pytest.raises(ValueError, match="3 for 2 tasks"):
    penalty([first, second], [select("conv")] * 3)
  with pytest.raises(
    ValueError, match=r"no leaf path matches 'convv'; the paths are conv/bias, conv/kernel, dense/kern"
  ):
    penalty([first, second], select("convv"))
  with pytest.raises(ValueError, match=r"tasks 0 and 2 .* leaf 'conv/bias' is only in task 0"):
    penalty([first, second, {"gain": second["gain"]}])
  other = {**second, "dense": {"kernel": np.ones((5, 4))}}
  with pytest.raises(ValueError, match=r"'dense/kernel' has shape \(12, 4\) in task 0 and \(5, 4\) in task 1"):
    penalty([first, other])
  with pytest.raises(ValueError, match=r"leaf 'dense/kernel' has 12 rows .* \(3, 5\)"):
    penalty([first, other], compose(select("dense"), left_multiply(jnp.ones((3, 5)))))
  with pytest.raises(ValueError, match=r"must be \[rows, m\], got shape \(3,\)"):
    left_multiply(jnp.ones(3))


# Stacked.


def test_stacked_unfoldings():
  x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
  modes = [np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for axis in range(3)]
  expected = {
    "last": nuclear(modes[2]),
    "tucker": sum(map(nuclear, modes)),
    "train": nuclear(modes[0]) + nuclear(x.reshape(20, 3)),
  }
  for unfolding, value in expected.items():
    np.testing.assert_allclose(stacked_trace_norm(x, unfolding=unfolding), value, rtol=1e-5)
  np.testing.assert_allclose(stacked_trace_norm({"a": x, "b": 2 * x}), 3 * expected["last"], rtol=1e-5)
  equal_tasks = np.repeat(x[..., :1], 3, -1)
  np.testing.assert_allclose(np.linalg.norm(jax.grad(stacked_trace_norm)(equal_tasks)), 1, rtol=1e-5)


def test_stacked_mistakes_are_named():
  with pytest.raises(ValueError, match="unknown unfolding 'mode'; choose one of last, tucker, train"):
    stacked_trace_norm(jnp.ones((2, 2)), unfolding="mode")
  with pytest.raises(ValueError, match=r"leaf 'bias' has shape \(3,\)"):
    stacked_trace_norm({"bias": jnp.ones(3)})


# The proximal step.


def test_proximal_steps_reach_the_exactly_low_rank_minimiser():
  rng = np.random.default_rng(0)
  target = (rng.normal(size=(20, 2)) @ rng.normal(size=(2, 6)) + 0.05 * rng.normal(size=(20, 6))).astype(np.float32)
  loss = lambda params: jnp.sum((params["kernel"] - target) ** 2) / 2
  rate, weight = 0.3, 1.0
  optimizer = optax.chain(optax.sgd(rate), proximal_trace_norm(rate * weight))
  params = {"kernel": jnp.asarray(rng.normal(size=target.shape), jnp.float32)}
  state = optimizer.init(params)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(60):
    params, state = step(params, state)
  s = np.linalg.svd(params["kernel"], compute_uv=False)
  assert s[1] > 0.1 * s[0]
  assert np.all(s[2:] <= 1e-6 * s[0])
  # The minimiser of the sum is the proximal point of the target.
  u, s, vt = np.linalg.svd(target.astype(np.float64), full_matrices=False)
  expected = u * np.maximum(s - weight, 0) @ vt
  assert np.linalg.norm(params["kernel"] - expected) <= 1e-5 * np.linalg.norm(expected)


def test_proximal_step_with_schedule_mask_and_kernels():
  params = {"kernel": jnp.ones((2, 2, 3, 4)), "bias": jnp.full(4, 3.0)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  transformation = proximal_trace_norm(optax.linear_schedule(0.0, 2.0, 2))
  state = transformation.init(params)
  norms = []
  for _ in range(3):
    updates, state = transformation.update(zeros, state, params)
    norms.append(np.linalg.norm(params["bias"] + updates["bias"]))
  np.testing.assert_allclose(norms, [6, 5, 4], rtol=1e-6)
  assert int(state.count) == 3

  masked = optax.masked(proximal_trace_norm(1.0), {"kernel": True, "bias": False})
  updates, _ = masked.update(zeros, masked.init(params), params)
  assert not np.any(updates["bias"])
  np.testing.assert_allclose(params["kernel"] + updates["kernel"], 1 - 1 / np.sqrt(48), rtol=1e-5)


def test_proximal_step_makes_stacked_tasks_share_a_direction():
  stacked = jnp.asarray(1 + 1e-2 * np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)
  transformation = proximal_trace_norm(0.2)
  updates, _ = transformation.update(jnp.zeros_like(stacked), transformation.init(stacked), stacked)
  s = np.linalg.svd(np.asarray(stacked + updates).reshape(20, 3), compute_uv=False)
  assert s[1] <= 1e-6 * s[0]


def test_proximal_step_makes_soft_sharing_low_rank():
  """Parameters as the library stacks them, tasks first: of rank 1 over four tasks after one Optax step."""
  heads = {task: models.task_head() for task in "abcd"}
  batch = {"image": np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)}
  params, _ = models.soft_sharing(models.mlp((8,), None), heads).init(jax.random.key(0), batch)
  stacked = params["stacked"]
  unfolded = np.asarray(stacked["hidden"]["0"]["kernel"], np.float64).reshape(4, -1)
  s = np.linalg.svd(unfolded, compute_uv=False)
  transformation = optax.chain(optax.sgd(0.0), proximal_trace_norm((s[0] + s[1]) / 2, task_axis=0))
  updates, _ = transformation.update(stacked, transformation.init(stacked), stacked)
  kernel = np.asarray(optax.apply_updates(stacked, updates)["hidden"]["0"]["kernel"])
  after = np.linalg.svd(kernel.reshape(4, -1), compute_uv=False)
  np.testing.assert_allclose(after[0], (s[0] - s[1]) / 2, rtol=1e-4)
  assert after[1] <= 1e-6 * s[0]
  np.testing.assert_allclose(stacked_trace_norm(stacked["hidden"]["0"]["kernel"], task_axis=0), s.sum(), rtol=1e-5)
  moved = jnp.moveaxis(stacked["hidden"]["0"]["kernel"], 0, 1)
  for unfolding in ("last", "tucker", "train"):
    expected = stacked_trace_norm(jnp.moveaxis(moved, 1, -1), unfolding=unfolding)
    np.testing.assert_allclose(stacked_trace_norm(moved, unfolding=unfolding, task_axis=1), expected, rtol=1e-6)


def test_a_missing_task_axis_is_named():
  with pytest.raises(ValueError, match=r"a leaf of shape \(3, 2\) has no task axis 2"):
    stacked_trace_norm(jnp.ones((3, 2)), task_axis=2)
  transformation, params = proximal_trace_norm(0.1, task_axis=-3), jnp.ones((3, 2))
  with pytest.raises(ValueError, match="has no task axis -3"):
    transformation.update(params, transformation.init(params), params)


def test_proximal_step_mistakes_are_named():
  with pytest.raises(ValueError, match=r"threshold must be at least 0, got -0\.1"):
    proximal_trace_norm(-0.1)
  transformation = proximal_trace_norm(0.1)
  with pytest.raises(ValueError, match="needs the parameters"):
    transformation.update({}, transformation.init({}))
