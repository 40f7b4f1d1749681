"""Per-task gradients, Gramian and combination, and functions of whole gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdflax import balancing
from tests.balancing.cases import assert_close

PARAMS = {"layer": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.ones(3)}, "scale": jnp.float32(0.5)}
INPUTS = jnp.linspace(0, 1, 8).reshape(4, 2)


def forward(params):
  return jnp.tanh(INPUTS @ params["layer"]["kernel"] + params["layer"]["bias"]) * params["scale"]


def losses_fn(params):
  out = forward(params)
  return jnp.stack([(out**2).mean(), jnp.abs(out[:, 0]).sum(), out[:, 2].mean()])


def flat(tree):
  return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(tree)], axis=1)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 7])
def test_task_gradients(batch_size):
  losses, gradients = jax.jit(lambda p: balancing.task_gradients(losses_fn, p, batch_size=batch_size))(PARAMS)
  assert_close(losses, losses_fn(PARAMS), 1e-6)
  expected = jax.jacrev(losses_fn)(PARAMS)
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), gradients, expected)


def test_one_forward_pass():
  calls = []

  def counted(params):
    calls.append(1)
    return losses_fn(params)

  balancing.task_gradients(counted, PARAMS)
  assert len(calls) == 1


def test_task_gramian_is_that_of_the_gradients_and_takes_its_weights_back():
  losses, products, pullback, aux = balancing.task_gramian(lambda p: (losses_fn(p), 7), PARAMS, has_aux=True)
  expected, gradients = balancing.task_gradients(losses_fn, PARAMS)
  weights = jnp.array([0.5, 2.0, -1.0])
  assert aux == 7
  assert_close(losses, expected, 1e-6)
  assert_close(products, flat(gradients) @ flat(gradients).T, 1e-6)
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), pullback(weights), balancing.combine(gradients, weights))


def test_task_gramian_holds_the_gradients_of_few_layers():
  """Eight tasks over eight layers, in temporary memory as the compiler plans it: of 64 gradients of a layer."""
  layers, heads = [jnp.zeros((128, 128))] * 8, jnp.zeros((128, 8))

  def losses_fn(layers):
    hidden = jnp.ones((16, 128))
    for kernel in layers:
      hidden = jnp.tanh(hidden @ kernel)
    return jax.nn.softplus(hidden @ heads).mean(0)

  def held(layers):
    _, gradients = balancing.task_gradients(losses_fn, layers)
    return balancing.combine(gradients, jnp.diagonal(balancing.gramian(gradients)))

  def passed(layers):
    _, products, pullback = balancing.task_gramian(losses_fn, layers)
    return pullback(jnp.diagonal(products))

  extra = lambda f: jax.jit(f).lower(layers).compile().memory_analysis().temp_size_in_bytes / layers[0].nbytes
  assert extra(held) > 64
  assert extra(passed) < 32


def test_losses_by_name_are_sorted_whether_jitted_or_not():
  def named(params):
    first, second, third = losses_fn(params)
    return {"right": first, "left": second, "middle": third}

  expected = losses_fn(PARAMS)[jnp.array([1, 2, 0])]
  assert_close(balancing.task_gradients(named, PARAMS)[0], expected, 1e-6)
  assert_close(balancing.task_gradients(jax.jit(named), PARAMS)[0], expected, 1e-6)


def test_aux():
  losses, gradients, aux = balancing.task_gradients(lambda p: (losses_fn(p), {"out": forward(p)}), PARAMS, has_aux=True)
  assert losses.shape == (3,) and gradients["scale"].shape == (3,)
  assert_close(aux["out"], forward(PARAMS), 1e-6)


def test_representation_gradients():
  def heads(z):
    return {"a": (z**2).mean(), "b": z[:, 0].sum()}

  weights = jnp.array([0.3, 2.0])
  losses, gradients, pullback = balancing.representation_gradients(heads, forward, PARAMS)
  assert gradients.shape == (2, 4, 3)
  through = pullback(balancing.combine(gradients, weights))
  expected = jax.grad(lambda p: balancing.joint_loss(heads(forward(p)), weights))(PARAMS)
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), through, expected)
  assert_close(losses, jnp.stack([heads(forward(PARAMS))[name] for name in "ab"]), 1e-6)


def test_gramian_and_combine():
  _, gradients = balancing.task_gradients(losses_fn, PARAMS)
  rows = flat(gradients).astype(np.float64)
  assert_close(balancing.gramian(gradients), rows @ rows.T, 1e-6)
  weights = jnp.array([0.5, -1.0, 2.0])
  combined = balancing.combine(gradients, weights)
  assert jax.tree.structure(combined) == jax.tree.structure(PARAMS)
  assert_close(np.concatenate([np.ravel(x) for x in jax.tree.leaves(combined)]), np.asarray(weights) @ rows, 1e-6)


def test_gramian_of_bfloat16_is_summed_in_float32():
  rows = jnp.ones((2, 4096), jnp.bfloat16)
  assert balancing.gramian([rows, rows]).dtype == jnp.float32
  np.testing.assert_array_equal(balancing.gramian([rows, rows]), np.full((2, 2), 8192))
  combined = balancing.combine([rows], jnp.array([0.25, 0.5]))
  assert combined[0].dtype == jnp.bfloat16 and combined[0][0] == 0.75


def test_groups():
  _, gradients = balancing.task_gradients(losses_fn, PARAMS)
  by_layer = balancing.gramian(gradients, depth=1)
  assert jax.tree.map(jnp.shape, by_layer, is_leaf=lambda x: isinstance(x, jax.Array)) == {
    "layer": (3, 3),
    "scale": (3, 3),
  }
  assert jax.tree.structure(balancing.gramian(gradients, depth=9)) == jax.tree.structure(PARAMS)
  assert_close(sum(jax.tree.leaves(by_layer)), balancing.gramian(gradients), 1e-6)
  assert_close(balancing.gramian(gradients, depth=0), balancing.gramian(gradients), 1e-6)
  weights = balancing.per_group(balancing.upgrad)(by_layer)
  with pytest.raises(ValueError, match="per_group: there is no Gramian"):
    balancing.per_group(balancing.upgrad)({})
  combined = balancing.combine(gradients, weights)
  for name in ("layer", "scale"):
    part = {name: gradients[name]}
    expected = balancing.combine(part, balancing.upgrad(balancing.gramian(part)))
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), combined[name], expected[name])


def test_sharded_leaves_stay_sharded():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
  sharded = jax.device_put({"w": rows, "v": rows[:, :, 0]}, NamedSharding(mesh, PartitionSpec(None, "data")))
  products = jax.jit(balancing.gramian)
  text = products.lower(sharded).compile().as_text()
  assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text
  local = jax.tree.map(np.asarray, sharded)
  assert_close(products(sharded), flat(local) @ flat(local).T, 1e-5)
  combined = jax.jit(balancing.combine)(sharded, jnp.array([1.0, 2.0, 3.0]))
  assert combined["w"].sharding.spec[0] == "data"
  assert_close(combined["w"], np.einsum("t,tij->ij", [1, 2, 3], rows), 1e-5)
  for direction in (balancing.grad_drop(sharded, jax.random.key(0)), balancing.trimmed_mean(sharded, trim=1)):
    assert direction["w"].shape == (16, 8)


def test_absent_rows_may_be_nan():
  gradients = {"w": jnp.array([[1.0, 2.0], [jnp.nan, jnp.nan], [3.0, -4.0]])}
  present = jnp.array([True, False, True])
  combined = balancing.combine(gradients, jnp.array([1.0, 0.0, 2.0]), present=present)
  assert_close(combined["w"], [7.0, -6.0], 1e-6)
  kept = {"w": gradients["w"][present]}
  key = jax.random.key(3)
  got = balancing.grad_drop(gradients, key, present=present)
  assert_close(got["w"], balancing.grad_drop(kept, key)["w"], 1e-6)
  assert_close(balancing.trimmed_mean(gradients, trim=0, present=present)["w"], [2.0, -1.0], 1e-6)


def test_grad_drop():
  rows = jnp.array([[2.0, -1.0, 1.0, 0.0], [1.0, -3.0, -3.0, 0.0]])
  draws = jax.vmap(lambda key: balancing.grad_drop([rows], key)[0])(jax.random.split(jax.random.key(0), 2000))
  assert_close(draws[:, :2], np.tile([1.5, -2.0], (2000, 1)), 1e-6)  # the tasks agree
  kept = np.asarray(draws[:, 2])
  assert set(np.unique(kept)) == {-1.5, 0.5}
  assert abs((kept > 0).mean() - 0.25) < 0.04  # P = (1 - 2 / 4) / 2
  assert not np.asarray(draws[:, 3]).any()
  leaky = balancing.grad_drop([rows], jax.random.key(0), leak=1.0)
  assert_close(leaky[0], rows.mean(0), 1e-6)


def test_trimmed_mean():
  rows = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
  assert_close(balancing.trimmed_mean([rows], trim=1)[0], np.sort(rows, axis=0)[1:-1].mean(0), 1e-6)
  present = jnp.array([True, True, False, False, True])
  got = balancing.trimmed_mean([jnp.asarray(rows)], trim=2, present=present)[0]
  assert_close(got, np.median(rows[np.asarray(present)], axis=0), 1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: balancing.task_gradients(lambda p: jnp.sum(p), jnp.ones(2)), "losses must be an array"),
    (lambda: balancing.task_gradients(lambda p: {"a": p}, jnp.ones(2)), "losses must be an array"),
    (lambda: balancing.task_gradients(lambda p: {}, jnp.ones(2)), "losses must be an array"),
    (lambda: balancing.task_gradients(losses_fn, PARAMS, batch_size=0), "batch_size must be"),
    (lambda: balancing.task_gradients(lambda p: p["x"], {"n": 3, "x": jnp.ones(2)}), r"\['n'\] has dtype int32"),
    (lambda: balancing.gramian({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}), "one leading axis"),
    (lambda: balancing.gramian({"a": jnp.ones(())}), "leading task axis"),
    (lambda: balancing.gramian({}), "one leading axis"),
    (lambda: balancing.gramian({"a": jnp.ones((2, 3))}, depth=-1), "depth must be"),
    (lambda: balancing.combine({"a": jnp.ones((2, 3))}, jnp.ones(3)), "weights must have shape"),
    (lambda: balancing.combine([jnp.ones((2, 3))], jnp.ones(2), present=jnp.ones(3, bool)), "present must be bool"),
    (lambda: balancing.trimmed_mean([jnp.ones((2, 3))], trim=1), "trim must satisfy"),
    (lambda: balancing.grad_drop([jnp.ones((2, 3))], jax.random.key(0), leak=jnp.ones(3)), "leak must be"),
  ],
)
def test_arguments_are_checked(call, message):
  with pytest.raises(ValueError, match=message):
    call()
