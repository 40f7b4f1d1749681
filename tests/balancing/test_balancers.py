"""Balancers and combiners: the shared contract for every one, and each method against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import balancing
from tests.balancing.cases import assert_close, random
from tests.balancing.cases import jitted as weighting_of

SGD = optax.adam(0.1)
BALANCERS = {
  "fixed": balancing.fixed(0.5),
  "random_weights": balancing.random_weights(),
  "from_weighting": balancing.from_weighting(balancing.upgrad),
  "from_weighting pcgrad": balancing.from_weighting(balancing.pcgrad, random_order=True),
  "dynamic_weight_average": balancing.dynamic_weight_average(steps_per_epoch=2),
  "uncertainty": balancing.uncertainty(optimizer=SGD),
  "imtl_l": balancing.imtl_l(optimizer=SGD),
  "grad_norm": balancing.grad_norm(optimizer=SGD),
  "geometric": balancing.geometric(),
  "grad_vac": balancing.grad_vac(),
  "famo": balancing.famo(),
  "smooth_tchebycheff": balancing.smooth_tchebycheff(warmup_steps=3, nadir_steps=2),
  "pbi": balancing.pbi(0.7),
  "cosmos": balancing.cosmos(0.7, penalty=0.3),
  "pcd": balancing.pcd(tau=0.3),
  "from_loss_weighting": balancing.from_loss_weighting(functools.partial(balancing.uw_so, temperature=2.0)),
  "smoothed": balancing.smoothed(balancing.from_weighting(balancing.cagrad)),
}
COMBINERS = {name: balancing.from_balancer(balancer) for name, balancer in BALANCERS.items()} | {
  "db_mtl": balancing.db_mtl(),
  "moco": balancing.moco(),
  "excess_mtl": balancing.excess_mtl(),
  "grad_drop": balancing.from_function(balancing.grad_drop, needs_key=True),
  "trimmed_mean": balancing.from_function(functools.partial(balancing.trimmed_mean, trim=0)),
}
RANDOM = ("random_weights", "from_weighting pcgrad", "grad_vac", "grad_drop")
LOGARITHMIC = ("geometric", "famo", "smooth_tchebycheff")
STEPS = 6


@functools.cache
def jitted(name):
  return jax.jit(BALANCERS[name].update)


@functools.cache
def jitted_combiner(name):
  return jax.jit(COMBINERS[name].update)


def losses_at(step, tasks=3):
  return np.random.default_rng(step).uniform(0.5, 2, tasks).astype(np.float32)


def gradients_at(step, tasks=3):
  rows = random(tasks, 12, step).astype(np.float32)
  return {"w": rows[:, :8].reshape(tasks, 2, 4), "b": rows[:, 8:]}


def inputs_at(step, tasks=3):
  return {"gramian": balancing.gramian(gradients_at(step, tasks)), "key": jax.random.key(step)}


def walk(name, state=None, steps=range(STEPS), tasks=3, **kwargs):
  state = BALANCERS[name].init(tasks) if state is None else state
  weights = []
  for step in steps:
    out, state = jitted(name)(losses_at(step, tasks), state, **inputs_at(step, tasks), **kwargs)
    weights.append(np.asarray(out))
  return np.stack(weights), state


def dtypes(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


# --- the contract of every balancer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BALANCERS)
def test_state_is_a_fixed_pytree_that_resumes(name):
  """Leaves are arrays of constant shape and dtype; a state that went through NumPy continues exactly."""
  start = BALANCERS[name].init(3)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(start))
  weights, end = walk(name)
  assert dtypes(start) == dtypes(end)  # so a step compiles once
  assert weights.shape == (STEPS, 3) and np.isfinite(weights).all()
  _, half = walk(name, steps=range(3))
  leaves, structure = jax.tree.flatten(half)
  restored = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
  resumed, resumed_end = walk(name, restored, range(3, STEPS))
  np.testing.assert_array_equal(resumed, weights[3:])
  jax.tree.map(np.testing.assert_array_equal, resumed_end, end)


@pytest.mark.parametrize("name", BALANCERS)
def test_absent_task(name):
  """The others are weighed as if alone, whatever the absent one's loss and gradients; one compilation."""
  if name in RANDOM:
    pytest.skip("draws differ with the number of tasks")
  kept = np.array([True, False, True, True])
  traces = []

  @jax.jit
  def update(losses, state, **kwargs):
    traces.append(1)
    return BALANCERS[name].update(losses, state, **kwargs)

  state, alone = BALANCERS[name].init(4), BALANCERS[name].init(3)
  for step in range(STEPS):
    losses = losses_at(step, 4)
    products = np.array(balancing.gramian(gradients_at(step, 4)))
    expected, alone = jitted(name)(losses[kept], alone, gramian=products[kept][:, kept], key=jax.random.key(step))
    losses[1], products[1], products[:, 1] = np.nan, np.nan, np.nan
    weights, state = update(losses, state, gramian=products, key=jax.random.key(step), present=kept)
    assert weights[1] == 0
    assert_close(weights[kept], expected, 1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  update(losses_at(0, 4), state, gramian=np.eye(4, dtype=np.float32), key=jax.random.key(0), present=np.ones(4, bool))
  assert len(traces) == 1


@pytest.mark.parametrize("name", BALANCERS)
def test_absence_leaves_the_entries_of_the_state(name):
  _, state = walk(name)
  present = np.array([True, False, True])
  _, moved = jitted(name)(losses_at(0), state, **inputs_at(0), present=present)
  for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
    if old.shape == (3,):
      np.testing.assert_array_equal(new[1], old[1])


@pytest.mark.parametrize("name", BALANCERS)
def test_bad_losses_never_reach_the_state(name):
  state = BALANCERS[name].init(3)
  for bad in (0.0, -1.0, np.nan, np.inf):
    weights, state = jitted(name)(losses_at(0) * np.array([1, bad, 1], np.float32), state, **inputs_at(0))
    if name in LOGARITHMIC or not np.isfinite(bad):
      assert weights[1] == 0 and np.isfinite(weights).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", COMBINERS)
def test_what_is_not_finite_counts_as_absent(name):
  """A loss, or one entry of a gradient: direction and state are those with the task absent, at once and later."""
  update, key = jitted_combiner(name), jax.random.key(0)
  state = COMBINERS[name].init(gradients_at(0))
  _, state = update(losses_at(0), gradients_at(0), state, key=key)
  expected, expected_state = update(losses_at(1), gradients_at(1), state, key=key, present=np.arange(3) != 1)
  for bad in (np.nan, np.inf, -np.inf):
    losses, gradients = losses_at(1), gradients_at(1)
    losses[1] = bad
    broken = {**gradients, "w": gradients["w"].copy()}
    broken["w"][1, 0, 2] = bad
    for given in ((losses, gradients), (losses, broken), (losses_at(1), broken)):
      direction, after = update(*given, state, key=key)
      jax.tree.map(np.testing.assert_array_equal, (direction, after), (expected, expected_state))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((direction, after)))
  assert any(np.any(leaf) for leaf in jax.tree.leaves(direction))


@pytest.mark.parametrize("name", [*LOGARITHMIC, "db_mtl"])
def test_known_losses_must_be_positive(name):
  losses = jnp.array([1.0, 0.0, 2.0])
  gradients = gradients_at(0)
  combiner = COMBINERS[name]
  with pytest.raises(ValueError, match=r"must be positive; that of task 1 is 0\.0"):
    combiner.update(losses, gradients, combiner.init(gradients), key=jax.random.key(0))
  absent = jnp.array([True, False, True])
  jax.eval_shape(lambda state: combiner.update(losses, gradients, state, present=absent), combiner.init(gradients))


@pytest.mark.parametrize("name", BALANCERS)
def test_needs(name):
  balancer, losses = BALANCERS[name], jnp.ones(3)
  state = balancer.init(3)
  given = {"gramian": jnp.eye(3), "key": jax.random.key(0)}
  for need, flag in (("gramian", balancer.needs_gramian), ("key", balancer.needs_key)):
    others = {k: v for k, v in given.items() if k != need}
    if flag:
      with pytest.raises(ValueError, match=f"^{name.split()[0]}"):
        balancer.update(losses, state, **others)
    else:
      jax.eval_shape(lambda others: balancer.update(losses, state, **others), others)


@pytest.mark.parametrize("name", BALANCERS)
def test_shapes_are_checked(name):
  balancer = BALANCERS[name]
  state, key = balancer.init(3), jax.random.key(0)
  with pytest.raises(ValueError, match=r"losses must have shape \(T,\)"):
    balancer.update(jnp.ones(()), state, gramian=jnp.eye(3), key=key)
  with pytest.raises(ValueError, match="3 tasks"):
    balancer.update(jnp.ones(3), state, gramian=jnp.eye(2), key=key)
  with pytest.raises(ValueError, match="present must be bool"):
    balancer.update(jnp.ones(3), state, gramian=jnp.eye(3), key=key, present=jnp.ones(2, bool))
  with pytest.raises(ValueError, match="num_tasks"):
    balancer.init(0)
  if any(leaf.ndim for leaf in jax.tree.leaves(state)):
    with pytest.raises(ValueError, match="does not belong to 2 tasks"):
      balancer.update(jnp.ones(2), state, gramian=jnp.eye(2), key=key)


@pytest.mark.parametrize("name", BALANCERS)
def test_weights_carry_no_gradient(name):
  balancer = BALANCERS[name]
  state = balancer.init(3)

  def total(losses):
    return balancing.joint_loss(losses, balancer.update(losses, state, **inputs_at(0))[0])

  losses = jnp.asarray(losses_at(0))
  weights, _ = jitted(name)(losses, state, **inputs_at(0))
  assert_close(jax.jit(jax.grad(total))(losses), weights, 1e-5)


@pytest.mark.parametrize("name", BALANCERS)
def test_one_task(name):
  """A single task keeps a positive weight for ever."""
  balancer = BALANCERS[name]
  state = balancer.init(1)
  for step in range(4):
    weights, state = jitted(name)(jnp.ones(1), state, gramian=jnp.full((1, 1), 4.0), key=jax.random.key(step))
  expected = {"fixed": 0.5, "cosmos": 0.7, "smoothed": 1.5}.get(name, 1.0)
  if name not in ("uncertainty", "imtl_l"):  # learned
    assert_close(weights, [expected], 1e-5)


# --- each method ------------------------------------------------------------------------------------------------------


def test_fixed():
  weights, _ = balancing.fixed(jnp.array([1.0, 2.0])).update(jnp.ones(2), optax.EmptyState())
  np.testing.assert_array_equal(weights, [1, 2])
  with pytest.raises(ValueError, match="weights must be a number or have shape"):
    balancing.fixed(jnp.ones(2)).init(3)


def test_random_weights_depend_on_the_key_only():
  weights = [
    balancing.random_weights().update(jnp.ones(3), optax.EmptyState(), key=jax.random.key(k))[0] for k in (0, 0, 1)
  ]
  np.testing.assert_array_equal(weights[0], weights[1])
  assert np.abs(weights[0] - weights[2]).max() > 1e-3
  assert_close(np.sum(weights, axis=1), np.ones(3), 1e-6)


def test_dynamic_weight_average_of_epochs():
  weights, _ = walk("dynamic_weight_average", steps=range(6))
  losses = np.stack([losses_at(step) for step in range(6)])
  np.testing.assert_array_equal(weights[:4], np.ones((4, 3)))
  ratio = losses[2:4].mean(0) / losses[:2].mean(0)
  expected = 3 * np.exp(ratio / 2) / np.exp(ratio / 2).sum()
  assert_close(weights[4:], np.stack([expected, expected]), 1e-6)


@pytest.mark.parametrize(("make", "optimum"), [(balancing.uncertainty, 1 / 2), (balancing.imtl_l, 1)])
def test_learned_weights_reach_their_optimum(make, optimum):
  """At the optimum every weighted loss is the same: 1/2 for uncertainty, 1 for IMTL-L."""
  losses = jnp.array([0.1, 1.0, 20.0])
  balancer = make(optimizer=optax.adam(0.05))
  last = jax.lax.scan(lambda s, _: balancer.update(losses, s)[::-1], balancer.init(3), length=1500)[1][-1]
  assert_close(last * losses, np.full(3, optimum), 1e-3)


def test_grad_norm_follows_its_objective():
  """One SGD step equals the gradient, by JAX, of the objective with its target held constant."""
  alpha, products = 1.5, inputs_at(1)["gramian"]
  logits = jnp.array([0.1, -0.3, 0.2])
  balancer = balancing.grad_norm(alpha=alpha, optimizer=optax.sgd(1.0), logits=logits)
  _, state = balancer.update(jnp.asarray(losses_at(0)), balancer.init(3), gramian=products)
  _, state = balancer.update(jnp.asarray(losses_at(1)), state, gramian=products)

  def objective(logits):
    weighted = 3 * jax.nn.softmax(logits) * jnp.sqrt(jnp.diagonal(products))
    ratio = losses_at(1) / losses_at(0)
    target = jax.lax.stop_gradient(weighted.mean() * (ratio / ratio.mean()) ** alpha)
    return jnp.abs(weighted - target).sum()

  assert_close(state.logits.values, logits - jax.grad(objective)(logits), 1e-5)


def test_geometric_is_the_gradient_of_the_geometric_mean():
  losses = jnp.array([1e-3, 2.0, 1e4])
  expected = jax.grad(lambda l: jnp.exp(jnp.log(l).mean()))(losses)
  assert_close(
    balancing.geometric().update(losses, optax.EmptyState())[0],
    expected,
    1e-5,
  )


def test_famo_gives_weight_to_the_task_that_stalls():
  balancer = balancing.famo()
  state = balancer.init(2)
  for step in range(50):
    weights, state = balancer.update(jnp.array([1.0, 0.9**step]), state)
  shares = weights * jnp.array([1.0, 0.9**49])
  assert shares[0] / shares.sum() > 0.7


def test_smooth_tchebycheff_is_the_gradient_of_its_objective():
  balancer = balancing.smooth_tchebycheff(smoothing=0.3, warmup_steps=3, nadir_steps=2)
  state = balancer.init(3)
  losses = [jnp.asarray(losses_at(step)) for step in range(4)]
  for loss in losses[:3]:
    weights, state = balancer.update(loss, state)
    assert_close(weights, 1 / loss, 1e-6)
  nadir = (losses[1] + losses[2]) / 2
  objective = lambda loss: 3 * 0.3 * jax.nn.logsumexp(jnp.log(loss / nadir) / 0.3)
  assert_close(balancer.update(losses[3], state)[0], jax.grad(objective)(losses[3]), 1e-5)


def test_pareto_scalarizers_are_gradients_of_their_objectives():
  losses, preference = jnp.asarray(losses_at(0)), jnp.array([0.2, 0.5, 0.3])

  def pbi(losses):
    direction = preference / jnp.linalg.norm(preference)
    along = (losses - 0.1) @ direction
    return along + 5 * jnp.linalg.norm(losses - 0.1 - along * direction)

  def cosmos(losses):
    cosine = preference @ losses / jnp.linalg.norm(preference) / jnp.linalg.norm(losses)
    return preference @ losses - 2 * cosine

  state = optax.EmptyState()
  assert_close(balancing.pbi(preference, reference=0.1).update(losses, state)[0], jax.grad(pbi)(losses), 1e-5)
  assert_close(balancing.cosmos(preference, penalty=2.0).update(losses, state)[0], jax.grad(cosmos)(losses), 1e-5)
  on_the_line = balancing.pbi(preference).update(3 * preference, state)[0]
  assert_close(on_the_line, preference / jnp.linalg.norm(preference), 1e-5)


def test_grad_vac_starts_as_pcgrad_and_reaches_its_target():
  gradients = np.array([[1.0, 0.0, 0.0], [-0.5, 1.0, 0.0]])
  products = jnp.asarray(gradients @ gradients.T)
  balancer, update = BALANCERS["grad_vac"], jitted("grad_vac")
  weights, state = update(jnp.ones(2), balancer.init(2), gramian=products, key=jax.random.key(0))
  assert_close(weights, balancing.pcgrad(products, jnp.array([[1], [0]])), 1e-5)
  cosine = -0.5 / np.sqrt(1.25)
  assert_close(state.target, [[0, cosine / 2], [cosine / 2, 0]], 1e-5)
  # A pair below its target is turned until its cosine is the target.
  state = state._replace(target=jnp.array([[0.0, 0.6], [-1.0, 0.0]]))
  weights, _ = update(jnp.ones(2), state, gramian=products, key=jax.random.key(0))
  turned = 2 * np.asarray(weights) @ gradients - gradients[1]
  assert_close(turned @ gradients[1] / np.linalg.norm(turned) / np.linalg.norm(gradients[1]), 0.6, 1e-5)


def test_smoothed_is_a_running_mean():
  weights, _ = walk("smoothed", steps=range(3))
  raw = [np.asarray(weighting_of("cagrad")(inputs_at(step)["gramian"])) for step in range(3)]
  mean = raw[0]
  for step in (1, 2):
    mean = 0.9 * mean + 0.1 * raw[step]
    assert_close(weights[step], mean, 1e-5)
  scheduled = balancing.smoothed(balancing.random_weights(), decay=lambda step: jnp.where(step < 1, 0.0, 1.0))
  assert scheduled.needs_key and not scheduled.needs_gramian
  state, seen = scheduled.init(2), []
  for step in range(3):
    out, state = scheduled.update(jnp.ones(2), state, key=jax.random.key(step))
    seen.append(out)
  np.testing.assert_array_equal(seen[0], seen[2])


@pytest.mark.parametrize("steps", [dict(warmup_steps=1, nadir_steps=2), dict(warmup_steps=3, nadir_steps=0)])
def test_smooth_tchebycheff_checks_its_steps(steps):
  with pytest.raises(ValueError, match="nadir_steps"):
    balancing.smooth_tchebycheff(**steps)


def test_joint_loss():
  named = {"right": jnp.float32(2.0), "left": jnp.float32(3.0)}
  assert balancing.joint_loss(named, jnp.array([10.0, 1.0])) == 32  # sorted: left, right
  assert balancing.joint_loss(named, {"left": jnp.float32(1.0), "right": jnp.float32(0.5)}) == 4
  absent = jax.grad(lambda l: balancing.joint_loss(l, jnp.ones(2), present=jnp.array([True, False])))
  np.testing.assert_array_equal(absent(jnp.array([1.0, jnp.nan])), [1, 0])
  with pytest.raises(ValueError, match="pytree like that of the losses"):
    balancing.joint_loss(named, {"left": jnp.float32(1.0), "middle": jnp.float32(1.0)})
  with pytest.raises(ValueError, match="one entry for each loss"):
    balancing.joint_loss(named, jnp.ones(3))
  for weights in (2.0, jnp.ones((2, 1))):
    with pytest.raises(ValueError, match=r"^weights must be an array \[T\]"):
      balancing.joint_loss(named, weights)


@pytest.mark.parametrize("name", COMBINERS)
def test_losses_by_name_are_refused(name):
  combiner, losses = COMBINERS[name], {"left": jnp.ones(()), "right": jnp.ones(())}
  gradients, key = gradients_at(0, 2), jax.random.key(0)
  with pytest.raises(ValueError, match=r"losses must be one array \[T\]; got a dict.*jnp\.stack"):
    combiner.update(losses, gradients, combiner.init(gradients), key=key)
  if name in BALANCERS:
    with pytest.raises(ValueError, match=rf"^{name.split()[0]}.*losses must be one array \[T\]; got a dict"):
      BALANCERS[name].update(losses, BALANCERS[name].init(2), gramian=jnp.eye(2), key=key)


# --- combiners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name", ["from_weighting", "random_weights", "uncertainty", *list(COMBINERS)[len(BALANCERS) :]]
)
def test_combiner_contract(name):
  """Directions like one gradient; constant state types; resumes exactly; an absent task's NaN reaches nothing."""
  combiner, update = COMBINERS[name], jitted_combiner(name)
  assert combiner.needs_key == (name in RANDOM)
  start = state = combiner.init(gradients_at(0))
  for step in range(4):
    half = state if step == 3 else None
    direction, state = update(losses_at(step), gradients_at(step), state, key=jax.random.key(step))
  assert dtypes(start) == dtypes(state)
  assert jax.tree.map(jnp.shape, direction) == {"w": (2, 4), "b": (4,)}
  restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), half)
  again, _ = update(losses_at(3), gradients_at(3), restored, key=jax.random.key(3))
  jax.tree.map(np.testing.assert_array_equal, again, direction)
  present = np.array([True, False, True])
  broken = jax.tree.map(lambda leaf: jnp.asarray(leaf).at[1].set(jnp.nan), gradients_at(4))
  losses = losses_at(4)
  losses[1] = np.nan
  direction, after = update(losses, broken, state, key=jax.random.key(4), present=present)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((direction, after)))


@pytest.mark.parametrize("name", ["db_mtl", "moco", "excess_mtl", "trimmed_mean"])
def test_combiner_equals_dropping_an_absent_task(name):
  combiner, kept = COMBINERS[name], np.array([True, False, True])
  drop = lambda tree: jax.tree.map(lambda leaf: leaf[kept], tree)
  state, alone = combiner.init(gradients_at(0)), combiner.init(drop(gradients_at(0)))
  for step in range(3):
    gradients, losses = gradients_at(step), losses_at(step)
    direction, state = jitted_combiner(name)(losses, gradients, state, present=kept)
    expected, alone = jitted_combiner(name)(losses[kept], drop(gradients), alone)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), direction, expected)


@pytest.mark.parametrize("name", ["db_mtl", "moco", "excess_mtl", "grad_drop", "trimmed_mean"])
@pytest.mark.parametrize("tasks", [1, 4])
def test_identical_gradients_give_one(name, tasks):
  """At every step, so running means have no ramp; losses of 1, since DB-MTL's gradients are those of log L."""
  one = {"w": np.repeat(random(1, 6).astype(np.float32), tasks, axis=0)}
  combiner = COMBINERS[name]
  state = combiner.init(one)
  for step in range(3):
    direction, state = jitted_combiner(name)(np.ones(tasks, np.float32), one, state, key=jax.random.key(step))
    assert_close(direction["w"], one["w"][0], 1e-5)


def test_db_mtl():
  """Two steps by hand: corrected running means of g / L, all as long as the longest."""
  combiner, beta = balancing.db_mtl(beta=0.9), 0.9
  rows = [random(2, 5, step).astype(np.float32) for step in range(2)]
  state = combiner.init([rows[0]])
  _, state = combiner.update(losses_at(0, 2), [rows[0]], state)
  direction, _ = combiner.update(losses_at(1, 2), [rows[1]], state)
  logs = [row / losses_at(step, 2)[:, None] for step, row in enumerate(rows)]
  mean = ((1 - beta) * beta * logs[0] + (1 - beta) * logs[1]) / (1 - beta**2)
  norms = np.linalg.norm(mean, axis=1, keepdims=True)
  assert_close(direction[0], (mean * norms.max() / norms).mean(0), 1e-5)


def test_moco_tends_to_mgda():
  rows = np.array([[3.0, 0.0], [0.0, 1.0]], np.float32)
  combiner = balancing.moco(gamma=1.0, gamma_sigma=0.0)
  state = combiner.init([rows])
  step = lambda state, _: combiner.update(jnp.ones(2), [jnp.asarray(rows)], state)[::-1]
  state, directions = jax.jit(lambda state: jax.lax.scan(step, state, length=200))(state)
  assert_close(directions[0][-1], [0.3, 0.9], 1e-3)  # the point of the line through the two that is nearest to 0
  assert_close(state.weights.sum(), 1, 1e-5)


def test_excess_mtl_favours_the_task_whose_gradients_do_not_fall():
  combiner = balancing.excess_mtl(learning_rate=0.5)
  rows = np.eye(3, dtype=np.float32)[:2]
  state = combiner.init([rows])
  for step in range(10):
    gradients = rows * np.array([[1.0], [0.5**step]], np.float32)
    direction, state = combiner.update(np.ones(2, np.float32), [gradients], state)
    if step == 0:
      assert_close(direction[0], rows.mean(0), 1e-6)
  assert state.weights[0] > 0.7 and state.weights.sum() == pytest.approx(1, rel=1e-5)
  zero_first = combiner.update(np.ones(2, np.float32), [rows * [[1], [0]]], combiner.init([rows]))[1]
  _, after = combiner.update(np.ones(2, np.float32), [rows], zero_first)
  assert np.isfinite(after.weights).all()


def test_excess_mtl_weights_come_back_from_nothing():
  """Three hundred e-folds are below the smallest float32, and a weight of 0 would stay 0."""
  combiner = balancing.excess_mtl(learning_rate=1.0)
  rows = np.eye(2, dtype=np.float32)
  update = jax.jit(combiner.update)
  state = combiner.init([rows])
  for scale in ([[1], [1]], *[[[1], [300]]] * 3):
    direction, state = update(np.ones(2, np.float32), [rows * np.array(scale, np.float32)], state)
  assert state.weights[0] > 0
  direction, alone = update(np.ones(2, np.float32), [rows], state, present=np.array([True, False]))
  assert_close(direction[0], rows[0], 1e-6)
  assert np.isfinite(alone.weights).all()
  for _ in range(3):
    _, state = update(np.ones(2, np.float32), [rows * np.array([[1e4], [1e-4]], np.float32)], state)
  assert state.weights[0] > 0.99


def test_from_function_needs_its_key():
  combiner = COMBINERS["grad_drop"]
  with pytest.raises(ValueError, match="grad_drop draws random numbers"):
    combiner.update(jnp.ones(3), gradients_at(0), ())


@pytest.mark.parametrize("name", ["db_mtl", "moco", "excess_mtl"])
def test_combiners_check_the_number_of_tasks(name):
  state = COMBINERS[name].init(gradients_at(0, 2))
  with pytest.raises(ValueError, match="state is for 2 tasks"):
    COMBINERS[name].update(jnp.ones(3), gradients_at(0), state)


@pytest.mark.parametrize("name", ["db_mtl", "moco", "excess_mtl"])
def test_the_state_of_a_combiner_keeps_its_types(name):
  """A step that is given its own state must not be compiled again."""
  combiner = {"db_mtl": balancing.db_mtl, "moco": balancing.moco, "excess_mtl": balancing.excess_mtl}[name]()
  gradients = {"w": jnp.ones((3, 2))}
  update = jax.jit(combiner.update)
  _, state = update(jnp.ones(3), gradients, combiner.init(gradients))
  update(jnp.ones(3), gradients, state)
  assert update._cache_size() == 1


def test_rates_that_freeze_or_ascend_are_refused():
  for beta in (1.0, 1.5, -0.1, float("nan")):
    with pytest.raises(ValueError, match=r"db_mtl: beta.* must be in \[0, 1\)"):
      balancing.db_mtl(beta=beta)
  for beta in (0.0, 1.5):
    with pytest.raises(ValueError, match=r"moco: beta.* must be in \(0, 1\]"):
      balancing.moco(beta=beta)
