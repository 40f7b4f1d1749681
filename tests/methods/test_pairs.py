"""What a pair reads off two models, how methods go together, and their mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import losses, methods, models
from kdflax.model import Model
from kdflax.objectives import stopped_arguments
from tests.methods.case import BATCH, STUDENT, TEACHER, pair


def returns(**outputs):
  """A model without params that returns outputs of given shapes."""
  made = lambda batch: jax.tree.map(lambda shape: jnp.zeros(shape), outputs, is_leaf=lambda x: isinstance(x, tuple))
  return Model(lambda key, batch: ({}, {}), lambda params, state, batch, *, train, key=None: (made(batch), state))


def test_stages_are_the_features_of_both_in_the_order_of_their_numbers():
  student = returns(
    features={"block10": (2, 3, 3, 4), "block9": (2, 3, 3, 4), "block9_pre": (2, 3, 3, 4), "own1": (2,)}
  )
  teacher = returns(features={"block9": (2, 3, 3, 8), "block10": (2, 3, 3, 8), "block9_pre": (2, 3, 3, 4)})
  assert list(methods.pair(student, teacher, BATCH).stages) == ["block9", "block10"]


def test_stages_may_have_other_names_in_the_teacher():
  teacher = returns(features={"layer2": (5, 3, 3, 6)}, logits=(5, 3))
  found = methods.pair(STUDENT, teacher, BATCH, stages={"stage2": "layer2"})
  term = methods.nst(found).terms["nst/stage2"]
  assert dict(term.inputs) == {"student": "student.features.stage2", "teacher": "teacher.features.layer2"}
  with pytest.raises(ValueError, match=r"the model 'teacher' returns no 'features.stage2'; it returns \['features.lay"):
    methods.pair(STUDENT, teacher, BATCH, stages=["stage2"])


def test_outputs_may_lie_under_other_names():
  student = returns(logits={"left": (5, 3), "right": (5, 2)}, features={"token": (5, 7)})
  aliases = {"logits": "logits.left", "embedding": "features.token"}
  found = methods.pair(student, TEACHER, BATCH, student_outputs=aliases)
  assert methods.dkd(found).terms["dkd"].inputs["student_logits"] == "student.logits.left"
  assert found.student.shape("embedding") == (5, 7)
  with pytest.raises(ValueError, match=r"'student' returns no 'logits'; it returns \['features.token', 'logits.left'"):
    methods.dkd(methods.pair(student, TEACHER, BATCH))
  with pytest.raises(ValueError, match=r"'student' returns no 'logits', said to be 'logits.middle'"):
    methods.dkd(methods.pair(student, TEACHER, BATCH, student_outputs={"logits": "logits.middle"}))


def test_methods_are_put_together_and_names_that_clash_are_an_error():
  both = methods.crd(pair(), num_examples=9, negatives=2) | methods.activation_boundary(pair())
  assert list(both.models) == ["crd_student", "crd_teacher", "crd"]
  assert list(both.terms) == ["crd"] and list(both.stages) == ["activation_boundary"]
  with pytest.raises(ValueError, match=r"both methods name {'models': \['crd', 'crd_student', .*'terms': \['crd'\]}"):
    both | methods.crd(pair(), num_examples=9)
  with pytest.raises(
    ValueError, match=r"{'stages': \['fsp'\]}; for a second student or teacher make the pair with other"
  ):
    methods.fsp(pair()) | methods.fsp(pair())
  with pytest.raises(TypeError):
    methods.fsp(pair()) | {}


def test_a_second_teacher_has_parts_of_its_own():
  second = methods.pair(STUDENT, TEACHER, BATCH, names=("student", "wide"))
  both = methods.crd(pair(), num_examples=9) | methods.crd(second, num_examples=9) | methods.soft_targets(second)
  assert {"crd", "crd_student_wide", "soft_targets_student_wide"} == set(both.terms)
  assert both.models["crd_student_wide"].inputs[0] == "crd_student_student_wide.output"
  assert stopped_arguments(both.terms["soft_targets_student_wide"]) == {"teacher_logits"}


def test_a_weight_may_be_a_schedule_also_where_stages_share_it():
  rising = optax.linear_schedule(0.0, 8.0, 4)
  terms = methods.activation_boundary(pair(), joint=True, weight=rising).terms
  last, first = (terms[f"activation_boundary/stage{number}"].weight for number in (2, 1))
  assert (last(1), first(1), first(4)) == (2.0, 1.0, 4.0)


def test_connectors_are_there_only_where_widths_differ():
  same = methods.pair(TEACHER, TEACHER, BATCH)
  assert not methods.ickd(same).models and not methods.fsp(same, joint=True).models
  assert list(methods.ickd(pair()).models) == ["ickd_stage2"]


@pytest.mark.parametrize(
  ("sizes", "stride"), [((12, 6), 2), ((6, 6), 1), ((7, 4), 2), ((9, 3), 3)], ids=["half", "same", "odd", "third"]
)
def test_the_regressor_of_fitnets_meets_smaller_maps_by_its_stride(sizes, stride):
  sides = [returns(features={"map1": (2, size, size, 3)}) for size in sizes]
  method = methods.fitnets(methods.pair(*sides, BATCH), joint=True)
  connector = method.models["fitnets_regressor"]
  example = jax.ShapeDtypeStruct((2, sizes[0], sizes[0], 3), jnp.float32)

  def run(key, x):
    return connector.apply(*connector.init(key, x), x, train=False)[0]["output"]

  assert jax.eval_shape(run, jax.random.key(0), example).shape == (2, sizes[1], sizes[1], 3)
  assert -(-sizes[0] // stride) == sizes[1]


MAPS = returns(features={"map1": (2, 4, 4, 3), "map2": (2, 2, 2, 3)}, logits=(2, 3), embedding=(2, 3))
SMALL = returns(features={"map1": (2, 3, 4, 3), "map2": (2, 1, 1, 3)}, logits=(2, 3), embedding=(2, 3))
ONE = returns(features={"map1": (2, 4, 4, 3)}, logits=(2, 3))
FLAT = returns(features={"map1": (2, 9), "map2": (2, 9)}, embedding=(2, 3))
HEAD = {"kernel": jnp.zeros((5, 3))}


@pytest.mark.parametrize(
  ("method", "student", "teacher", "message"),
  [
    (methods.soft_targets, FLAT, MAPS, "the model 'student' returns no 'logits'; it returns .'embedding', 'fea"),
    (methods.pkt, MAPS, ONE, "the model 'teacher' returns no 'embedding'"),
    (methods.rkd, ONE, MAPS, "the model 'student' returns no 'embedding'"),
    (methods.cat_kd, MAPS, MAPS, "the model 'student' has no params 'head.kernel'; it has .]"),
    (methods.activation_boundary, MAPS, MAPS, "the model 'student' returns no 'features.map2_pre'"),
    (methods.fsp, ONE, ONE, r"compares at least 2 stages of features; the pair has \['map1'\]"),
    (methods.nst, FLAT, returns(features={"x": (2, 3)}), r"at least 1 stages .* the pair has \[\]"),
    (methods.review_kd, FLAT, FLAT, r"'features.map2' of 'student' is \(2, 9\), .* 'teacher' is \(2, 9\)"),
    (methods.vid, MAPS, SMALL, r"maps of one size; 'features.map1' of 'student' is \(2, 4, 4, 3\), .* \(2, 3, 4, 3\)"),
    (methods.fitnets, SMALL, MAPS, r"maps of one size; 'features.map2' of 'student' is \(2, 1, 1, 3\)"),
    (lambda p: methods.fitnets(p, stage="map3"), MAPS, MAPS, r"no stage 'map3'; it has \['map1', 'map2'\]"),
    (lambda p: methods.ofd(p, margins={"map1": 0}), MAPS, MAPS, r"lacks the stages \['map2'\]; it has \['map1'\]"),
    (methods.ofd, MAPS, MAPS, r"no batch normalisation where .*; give margins={'map1': losses.ofd_ma"),
    (lambda p: methods.simkd(p, head=HEAD), MAPS, MAPS, "head reads 5 channels, but 'teacher.features.map2' has 3"),
    (lambda p: methods.simkd(p, head=HEAD), SMALL, MAPS, "maps of one size"),
    (lambda p: methods.of_logits(p, losses.dkd, beta=1.0), MAPS, MAPS, r"dkd needs \['labels'\]"),
    (lambda p: methods.dkd(p, betta=1.0), MAPS, MAPS, r"dkd has no argument \['betta'\]"),
    (lambda p: methods.of_logits(p, _Nameless()), MAPS, MAPS, "has no name of its own; give the method one: name="),
    (lambda p: methods.mgd(p, masked=1.0), MAPS, MAPS, r"masked must be in \[0, 1\); got 1.0"),
    (lambda p: methods.seed(p, queue=0), MAPS, MAPS, "queue must be at least 1; got 0"),
    (methods.wkd_l, MAPS, MAPS, "the model 'teacher' has no params 'head.kernel'"),
    (lambda p: methods.crd(p, num_examples=1), MAPS, MAPS, "num_examples must be at least 2 and .*; got 1 and"),
    (lambda p: methods.crd(p, num_examples=3, labels=np.zeros(2, int)), MAPS, MAPS, r"0, 1, ... of the 3 examples"),
    (lambda p: methods.crd(p, num_examples=2, labels=np.zeros(2, int)), MAPS, MAPS, "all 2 labels are 0"),
  ],
)  # fmt: skip
def test_a_model_that_lacks_what_a_method_needs_is_told_what(method, student, teacher, message):
  found = methods.pair(student, teacher, {"image": np.zeros((2, 4, 4, 1), np.float32)})
  with pytest.raises(ValueError, match=message):
    method(found)


class _Nameless:
  def __call__(self, student_logits, teacher_logits):
    return student_logits


def test_a_model_that_does_not_read_the_batch_makes_no_pair():
  connector = models.linear_connector("a.embedding", 4)
  with pytest.raises(ValueError, match=r"the model 'teacher' reads a.embedding, not the batch; make the pair with"):
    methods.pair(STUDENT, connector, BATCH)


@pytest.mark.parametrize("network", [models.convnet((3, 4), 3), models.resnet(14, 3, widths=(2, 3, 4, 5))])
def test_margins_are_those_of_the_last_batch_normalisation_before_the_relu(network):
  found = methods.pair(network, network, BATCH)
  terms = methods.ofd(found).terms
  for number, stage in enumerate(found.stages, start=1):
    channels = found.teacher.shape(f"features.{stage}")[-1]
    scale, bias = np.linspace(0.5, 2, channels), np.linspace(-1, 1, channels) * number
    term, rows = terms[f"ofd/{stage}"], np.random.default_rng(number).normal(size=(2, 4, 3, 3, channels))
    paths = [term.inputs[f"teacher_{part}"].removeprefix("params.teacher.") for part in ("scale", "bias")]
    block = "norm" if len(found.stages) == 2 else "1.second.norm"
    assert paths == [f"stages.{number - 1}.{block}.{part}" for part in ("scale", "bias")]
    assert {found.teacher.param(path) for path in paths} <= set(term.inputs.values())
    expected = losses.ofd(*rows, margin=losses.ofd_margin(scale, bias))
    np.testing.assert_array_equal(term.loss(*rows, scale, bias), expected)
    given = methods.ofd(found, margins=dict.fromkeys(found.stages, losses.ofd_margin(scale, bias))).terms[
      f"ofd/{stage}"
    ]
    np.testing.assert_array_equal(given.loss(*rows, margin=given.inputs["margin"]), expected)


def test_class_maps_are_the_heads_at_each_position():
  term = methods.cat_kd(pair(), size=1).terms["cat_kd"]
  assert term.inputs["teacher_head"] == "params.teacher.head.kernel"
  assert stopped_arguments(term) == {"teacher", "teacher_head"}
  random = np.random.default_rng(0)
  student, teacher, *heads = (random.normal(size=s) for s in ((5, 3, 3, 4), (5, 3, 3, 6), (4, 3), (6, 3)))
  classes = student.mean((1, 2)) @ heads[0] - teacher.mean((1, 2)) @ heads[1]
  values = term.loss(student, teacher, *heads, size=1, normalize=False)
  np.testing.assert_allclose(values, np.square(classes).mean(1), rtol=1e-5)


def test_mgd_hides_positions_of_every_example_in_training_only():
  model = methods.mgd(pair(), masked=0.5).models["mgd_stage2_masked"]
  x, key = jnp.ones((50, 3, 3, 6)), jax.random.key(0)
  hidden = np.asarray(model.apply({}, {}, x, train=True, key=key)[0]["output"])
  assert set(np.unique(hidden)) == {0, 1} and (hidden == hidden[..., :1]).all()
  assert 0.4 < hidden.mean() < 0.6 and len(np.unique(hidden[..., 0].reshape(50, -1), axis=0)) > 30
  np.testing.assert_array_equal(model.apply({}, {}, x, train=False, key=key)[0]["output"], x)
  np.testing.assert_array_equal(model.apply({}, {}, x, train=True)[0]["output"], x)
  assert methods.mgd(pair(), weight=0.5).terms["mgd/stage2"].weight == 0.5 * 3 * 3 * 6
