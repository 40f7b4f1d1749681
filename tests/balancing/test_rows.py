"""From rows to one gradient: one place asks a balancer what it needs, and leaves out what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import balancing as b
from kdflax.objectives import Term, evaluate

BALANCERS = {
  "fixed": b.fixed(jnp.array([1.0, 2.0, 3.0])),
  "uncertainty": b.uncertainty(optimizer=optax.sgd(0.1)),
  "random": b.random_weights(),
  "grad_norm": b.grad_norm(optimizer=optax.sgd(0.1)),
  "mgda": b.from_weighting(b.mgda),
  "imtl_g": b.from_weighting(b.imtl_g),
  "upgrad": b.from_weighting(b.upgrad),
  "pcgrad": b.from_weighting(b.pcgrad, random_order=True),
  "db_mtl": b.db_mtl(),
  "grad_drop": b.from_function(b.grad_drop, needs_key=True),
}
W, HEAD = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.5, -0.5])
ALL, WITHOUT_MIDDLE = jnp.array([True, True, True]), jnp.array([True, False, True])
PARAMS = {"w": "model.w", "head": "model.head"}
TERMS = {
  "first": Term(lambda w, head: jnp.atleast_1d((w.sum() - 3) ** 2 + head[0] + 4), PARAMS),
  "middle": Term(  # whose derivative is not finite at its targets
    lambda w, head, factor, at_w, at_head: jnp.atleast_1d(
      factor * (jnp.sqrt(((w - at_w) ** 2).sum()) + jnp.sqrt(((head - at_head) ** 2).sum()) + 1)
    ),
    PARAMS | {name: f"batch.{name}" for name in ("factor", "at_w", "at_head")},
  ),
  "last": Term(lambda w, head: jnp.atleast_1d(jnp.exp(w).sum() - head.prod()), PARAMS),
}
HEALTHY = {"factor": jnp.float32(1), "at_w": jnp.zeros(3), "at_head": jnp.zeros(2)}
CASES = {  # (batch, which rows have examples)
  "healthy": (HEALTHY, ALL),
  "value": (HEALTHY | {"factor": jnp.float32(jnp.nan)}, ALL),
  "shared gradient": (HEALTHY | {"at_w": W}, ALL),
  "own gradient": (HEALTHY | {"at_head": HEAD}, ALL),
  "absent": (HEALTHY, WITHOUT_MIDDLE),
}


def updated(balancer, batch, present, **options):
  def objective(shared, own):
    values, _ = evaluate(TERMS, {"model": {**shared, **own}, "batch": batch}, guard=balancer is not None)
    return jnp.stack(list(values.values()))

  shared, own = {"w": W}, {"head": HEAD}
  losses, pullback = jax.vjp(objective, shared, own)
  state = b.init_rows(balancer, 3, shared)
  return b.update_rows(balancer, losses, pullback, present, state, key=jax.random.key(1), **options)


@pytest.mark.parametrize("name", BALANCERS)
def test_a_row_that_is_not_finite_is_absent(name):
  """Be it its loss, its gradient over the shared or over its own params, whatever a balancer reads; also under vmap."""
  batches, present = jax.tree.map(lambda *leaves: jnp.stack(leaves), *CASES.values())
  updates = jax.jit(jax.vmap(functools.partial(updated, BALANCERS[name])))(batches, present)
  each = dict(zip(CASES, (jax.tree.map(lambda leaf, i=i: leaf[i], updates) for i in range(len(CASES))), strict=True))
  for case in ("value", "shared gradient", "own gradient"):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), each[case], each["absent"])
  assert each["absent"].present.tolist() == WITHOUT_MIDDLE.tolist()
  assert each["healthy"].present.all()
  assert np.abs(each["healthy"].own["head"] - each["absent"].own["head"]).max() > 0.01
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(each))


@pytest.mark.parametrize("options", [{}, {"weigh_own": False}, {"hold_gradients": False}])
def test_rows_alone_follow_the_same_weights_as_rows_together(options):
  """Without vmap, however the gradients are weighed: the rescue is the update of the healthy rows."""
  for balancer in (BALANCERS["fixed"], BALANCERS["mgda"]):
    update = jax.jit(lambda batch, present, balancer=balancer: updated(balancer, batch, present, **options))
    absent = update(*CASES["absent"])
    for case in ("shared gradient", "own gradient"):
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), update(*CASES[case]), absent)


def test_the_sum_of_the_rows_is_what_it_is():
  """Without a balancer nothing is left out: what is not finite shows."""
  update = updated(None, *CASES["absent"])
  expected = jax.grad(lambda w: (w.sum() - 3) ** 2 + jnp.exp(w).sum())(W)
  np.testing.assert_allclose(update.shared["w"], expected, rtol=1e-6)
  assert update.weights is None and update.state == ()
  assert np.isnan(updated(None, *CASES["shared gradient"]).shared["w"]).all()


def test_all_rows_lost_give_no_update():
  batch = HEALTHY | {"factor": jnp.float32(jnp.nan)}
  for name in ("fixed", "mgda", "db_mtl"):
    update = updated(BALANCERS[name], batch, jnp.array([False, True, False]))
    assert not update.present.any()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((update.shared, update.own)))


def test_gradients_that_are_not_held_give_the_same_update():
  one, other = (updated(BALANCERS["mgda"], *CASES["healthy"], hold_gradients=hold) for hold in (True, False))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), one, other)


def test_what_each_needs():
  assert [BALANCERS[name].needs for name in ("fixed", "mgda", "db_mtl")] == ["losses", "gramian", "gradients"]
