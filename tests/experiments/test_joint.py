"""The joint-learning experiment: a tiny run end to end, stopped and resumed, and its mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import joint, joint_report
from experiments.balancers import BALANCERS, one_of
from experiments.pictures import pareto_front
from kdflax import balancing, training

SMALL = joint.Settings(hidden=(3, 2), steps=20, batch_size=8, l2=(0.1,), trace_norm=(0.1,))
TINY = joint.Config(problems=("diabetes",), diabetes=SMALL, balancers=("UPGrad", "DB-MTL"), seeds=2, save_every=10)


@pytest.mark.slow
@pytest.mark.xdist_group("joint")
def test_a_run_that_was_stopped_ends_with_the_same_numbers(monkeypatch, whole_and_stopped):
  programs = {}
  build = joint.machine

  def once(work, model, *, penalties=(), balancers=()):  # compile each program once for both runs
    key = (len(penalties), len(balancers), isinstance((*balancers, None)[0], balancing.Combiner))
    if key not in programs:
      programs[key] = build(work, model, penalties=penalties, balancers=balancers)
    return programs[key]

  monkeypatch.setattr(joint, "machine", once)
  run, first, second = whole_and_stopped(joint.main, TINY, 2, "trace-norm soft stopped at step 10 of 20")
  for result in (*first, *second):
    del result["seconds"]
  assert first == second
  assert [r["method"] for r in first] == [
    "independent",
    "L2 soft",
    "trace-norm soft",
    "feature",
    "hard",
    *TINY.balancers,
  ]
  assert first[0]["improvement"] == [0.0, 0.0]
  for name in ("results.md", "trade_off-diabetes.png", "difference_spectra.png", "gradient_cosines.png"):
    assert (run / name).stat().st_size > 0
  with pytest.raises(training.RunDirectoryError, match="seeds"):
    joint.main(dataclasses.replace(TINY, run=str(run), seeds=3))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"balancers": ("UPGrad", "upgrade")}, r"\['upgrade'\]; there are random weights, .*Nash-MTL"),
    ({"problems": ("iris",)}, r"\['iris'\]; there are glyphs, overlaid_digits, diabetes"),
    ({"diabetes": dataclasses.replace(SMALL, weights={"sugar": 2.0})}, r"losses are for .*weights for .*sugar"),
    ({"diabetes": dataclasses.replace(SMALL, steps=15)}, "steps must be a positive multiple of 10; got 15"),
    ({"diabetes": dataclasses.replace(SMALL, l2=(0.0,))}, "strengths of couplings must be positive"),
    ({"diabetes": dataclasses.replace(SMALL, hidden=(8,))}, "two layers"),
    (
      {"diabetes": dataclasses.replace(SMALL, hidden=(8, 0))},
      r"diabetes: hidden must be widths of at least 1; got \(8, 0",
    ),
    ({"problems": ()}, "problems must name one or more of glyphs, overlaid_digits, diabetes; got none"),
    ({"seeds": 0}, "seeds"),
  ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **changes).checked()


def test_names_of_tasks_must_match():
  joint.check_tasks(losses={"a": 1, "b": 2}, heads={"b": 1, "a": 1})
  for other in ("heads", "labels", "weights"):
    with pytest.raises(ValueError, match=rf"losses are for \['a', 'b'\], {other} for \['a', 'c'\]"):
      joint.check_tasks(losses={"a": 1, "b": 2}, **{other: {"a": 1, "c": 2}})
  with pytest.raises(ValueError, match="weights for"):
    joint.task_terms(joint.PROBLEMS["diabetes"], {"left": 1.0})


def test_weights_reach_their_loss():
  terms = joint.task_terms(joint.PROBLEMS["diabetes"], {"sex": 3.0})
  assert {task: term.weight for task, term in terms.items()} == {"progression": 1.0, "glucose": 1.0, "sex": 3.0}


def test_one_of_is_the_balancer_it_chooses():
  made = tuple(BALANCERS[name](3, 30) for name in ("uncertainty", "Nash-MTL", "random weights"))
  losses, gramian, key = jnp.array([1.0, 2.0, 3.0]), jnp.diag(jnp.array([1.0, 4.0, 9.0])), jax.random.key(0)
  state = one_of(made, jnp.int32(0)).init(3)

  @jax.jit
  def update(index):
    return one_of(made, index).update(losses, state, gramian=gramian, key=key)

  for index, balancer in enumerate(made):
    weights, after = update(jnp.int32(index))
    expected, moved = balancer.update(losses, balancer.init(3), gramian=gramian, key=key)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    for other, (new, old) in enumerate(zip(after, state, strict=True)):
      for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(moved if other == index else old), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_every_balancer_can_be_made_for_three_tasks_and_all_but_two_for_two():
  for tasks in (2, 3):
    work = joint.Work("", joint.Problem("x", dict.fromkeys("abc"[:tasks])), SMALL, {})
    names = [name for group in joint.balancers_of(joint.Config(balancers=tuple(BALANCERS)), work) for name in group]
    left_out = set() if tasks == 3 else {"Krum", "trimmed mean"}
    assert set(names) == {"hard", *BALANCERS} - left_out


def test_the_front_holds_what_no_other_beats():
  points = {"a": (0.0, 3.0), "b": (1.0, 1.0), "c": (2.0, 2.0), "d": (2.0, 1.0), "e": (3.0, 0.0)}
  assert pareto_front(points) == ["a", "c", "e"]


def test_verdicts_need_an_interval_without_zero():
  line = lambda method, values: (
    {"method": method, "tasks": {"a": {}}, "improvement": values} | {"improvement_by_task": {"a": values}}
  )
  results = [line("independent", [0, 0, 0]), line("good", [1, 1.1, 1]), line("bad", [-1, -1.1, -1])]
  text = "\n".join(joint_report.verdicts([*results, line("unclear", [-1, 1, 0.5])]))
  assert "**a**: worse than an independent network with bad; better with good." in text
  assert "**overall**: sharing hurts with bad." in text


def test_seeds_of_glyphs_differ_in_their_training_images_alone():
  first, second = (joint.splits_of("glyphs", seed) for seed in (0, 1))
  for splits in (first, second):
    assert np.bincount(splits["train"]["label"]["character"]).tolist() == [10] * 62
    assert abs(splits["train"]["label"]["weight"].mean()) < 1e-5 and abs(splits["train"]["image"].mean()) < 0.2
  assert set(first["train"]["index"].tolist()) != set(second["train"]["index"].tolist())
  np.testing.assert_array_equal(first["test"]["image"], second["test"]["image"])
