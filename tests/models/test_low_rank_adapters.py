"""Low-rank students: they start as their model, equal the merged one, and are all that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdflax import losses, models, training
from kdflax.objectives import Term

CONFIG = models.DecoderConfig(vocabulary=17, width=8, depth=2, heads=2, mlp_width=12)
DECODER = models.decoder(CONFIG)
TOKENS = {"tokens": jax.random.randint(jax.random.key(0), (4, 6), 0, 17)}
PARAMS = jax.jit(DECODER.init)(jax.random.key(1), TOKENS)[0]
PLAIN = jax.jit(lambda params: DECODER.apply(params, {}, TOKENS, train=False)[0])
ATTENTION = "attention/(query|value)/kernel"


def nonzero(params):
  draw = np.random.default_rng(5)
  return jax.tree.map(lambda leaf: 0.5 * draw.normal(size=leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("pattern", [ATTENTION, "^(embedding|head)|mlp/down"])
def test_a_student_equals_its_merged_model(pattern):
  student = models.low_rank_adapters(DECODER, pattern, 3, scale=1.5)
  assert student.inputs == ("batch", "params.base")
  factors, state = student.init(jax.random.key(2), (TOKENS, PARAMS))
  assert state == {}
  call = jax.jit(lambda factors: student.apply(factors, {}, (TOKENS, PARAMS), train=False)[0])
  plain = PLAIN(PARAMS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), call(factors), plain)
  factors = nonzero(factors)
  expected = PLAIN(models.merge_low_rank(PARAMS, factors, scale=1.5))
  assert np.abs(expected["logits"] - plain["logits"]).max() > 0.1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), call(factors), expected)


def test_factors_have_the_shapes_of_their_kernels():
  factors, _ = models.low_rank_adapters(DECODER, ATTENTION, 3).init(jax.random.key(2), (TOKENS, PARAMS))
  shapes = jax.tree.map(jnp.shape, factors)
  kernel = {"kernel": {"down": (2, 8, 3), "up": (2, 3, 8)}}
  assert shapes == {"layers": {"attention": {"query": kernel, "value": kernel}}}
  merged = models.merge_low_rank(PARAMS, nonzero(factors))
  query, value = (merged["layers"]["attention"][part]["kernel"] for part in ("query", "value"))
  own = nonzero(factors)["layers"]["attention"]["query"]["kernel"]
  expected = PARAMS["layers"]["attention"]["query"]["kernel"] + np.einsum("lir,lro->lio", own["down"], own["up"])
  np.testing.assert_allclose(query, expected, rtol=1e-5, atol=1e-6)
  assert (value != PARAMS["layers"]["attention"]["value"]["kernel"]).any()
  assert merged["head"] is PARAMS["head"]


def test_no_gradient_of_a_whole_kernel_is_made():
  """Of a decoder, whose students multiply by one factor after the other."""
  wide = models.DecoderConfig(vocabulary=17, width=16, depth=2, heads=2, mlp_width=40)
  decoder = models.decoder(wide)
  student = models.low_rank_adapters(decoder, "^layers.*kernel$", 2)
  params = jax.eval_shape(decoder.init, jax.random.key(0), TOKENS)[0]
  factors = jax.eval_shape(student.init, jax.random.key(0), (TOKENS, params))[0]
  loss = lambda factors, params: student.apply(factors, {}, (TOKENS, params), train=True)[0]["logits"].sum()
  text = str(jax.make_jaxpr(jax.grad(loss))(factors, params))
  made = [line for line in text.splitlines() if "dot_general" in line and ":f32[16,40]" in line.split("=")[0]]
  assert "dot_general" in text and made == []
  whole = str(jax.make_jaxpr(jax.grad(lambda p: decoder.apply(p, {}, TOKENS, train=True)[0]["logits"].sum()))(params))
  assert [line for line in whole.splitlines() if "dot_general" in line and ":f32[16,40]" in line.split("=")[0]]


def test_any_model_may_have_low_rank_students():
  model, batch = models.mlp((6, 5), 3), {"image": jax.random.normal(jax.random.key(3), (4, 2, 4))}
  params = nonzero(jax.eval_shape(model.init, jax.random.key(1), batch)[0])
  student = models.low_rank_adapters(model, "hidden/1/kernel", 2)
  factors = nonzero(jax.eval_shape(student.init, jax.random.key(2), (batch, params))[0])
  outputs, _ = jax.jit(lambda factors: student.apply(factors, {}, (batch, params), train=False))(factors)
  expected, _ = model.apply(models.merge_low_rank(params, factors), {}, batch, train=False)
  np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=1e-6)


def test_a_student_shares_its_teacher_and_learns_alone():
  """Self-distillation: towards the teacher's answers at half the temperature. Only factors are in the state."""
  student = models.low_rank_adapters(DECODER, ATTENTION, 2, base="teacher")
  soft = Term(
    lambda student_logits, teacher_logits: losses.forward_kl(student_logits, 2 * teacher_logits).mean(-1),
    {"student_logits": "student.logits", "teacher_logits": "teacher.logits"},
  )
  learner = training.make_learner({"teacher": DECODER, "student": student}, {"soft": soft}, optax.adam(1e-2))
  frozen = {"teacher": (PARAMS, {})}
  state = learner.init(jax.random.key(0), TOKENS, frozen)
  assert set(state.params) == {"student"} and models.count_parameters(state.params) == 2 * 2 * 2 * (8 + 8)
  step = training.make_train_step(learner)
  losses_seen = []
  for _ in range(20):
    state, metrics = step(state, TOKENS, frozen)
    losses_seen.append(training.metrics.means(metrics)["soft"])
  assert losses_seen[-1] < 0.9 * losses_seen[0]


def test_mistakes_are_named():
  student = lambda pattern: models.low_rank_adapters(DECODER, pattern, 2).init(jax.random.key(0), (TOKENS, PARAMS))
  with pytest.raises(ValueError, match=r"pattern='conv' matches none of \['embedding', 'head'"):
    student("conv")
  with pytest.raises(ValueError, match=r"pattern='norm' matches none of"):
    student("norm")  # has an axis of layers, and is no matrix for that
  with pytest.raises(ValueError, match=r"rank must be at least 1, got \(0,\)"):
    models.low_rank_adapters(DECODER, ATTENTION, 0)
  with pytest.raises(ValueError, match=r"a network, which reads the batch; this model reads 'student.embedding'"):
    models.low_rank_adapters(models.linear_connector("student.embedding", 3), ".", 1)
  factors = {"down": jnp.ones((8, 2)), "up": jnp.ones((2, 9))}
  with pytest.raises(ValueError, match=r"factors for tail, which the params do not have"):
    models.merge_low_rank(PARAMS, {"tail": factors})
  with pytest.raises(ValueError, match=r"\(8, 2\) and \(2, 9\) do not fit head of shape \(17, 8\)"):
    models.merge_low_rank(PARAMS, {"head": factors})
  with pytest.raises(ValueError, match="down and up of each kernel"):
    models.merge_low_rank(PARAMS, {"head": {"down": factors["down"]}})
