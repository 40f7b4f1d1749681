"""Merging by formula against sums written out in NumPy and float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdflax import merging
from tests.compiled import compiled

SHAPES = {"conv": {"bias": (4,), "kernel": (3, 3, 2, 4)}, "head": {"gain": (), "kernel": (8, 6)}}
SIZE = 4 + 72 + 1 + 48


def draw(seed, dtype=np.float64, scale=1.0):
  random = np.random.default_rng(seed)
  shape = lambda node: isinstance(node, tuple)
  return jax.tree.map(lambda s: np.asarray(scale * random.normal(size=s), dtype), SHAPES, is_leaf=shape)


def flat(tree):
  return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def same(got, expected, dtype=np.float64):
  """A tree against a flat vector, in the structure, dtype and digits that are promised."""
  assert jax.tree.map(jnp.shape, got) == jax.tree.map(lambda s: s, SHAPES, is_leaf=lambda s: isinstance(s, tuple))
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
  rtol = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 1e-2}[jnp.dtype(dtype).name]
  np.testing.assert_allclose(flat(got), expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def masks_of(seed, rate):
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: random.random(leaf.shape) >= rate, draw(0))


BASE, TUNED = draw(0), [draw(seed) for seed in (1, 2, 3)]
FISHERS = [jax.tree.map(np.square, draw(seed)) for seed in (4, 5, 6)]
MASKS = [masks_of(seed, 0.7) for seed in (7, 8, 9)]


def ties_by_hand(base, tuned, density, scale):
  differences = np.stack([flat(tree) - flat(base) for tree in tuned])
  for row in differences:
    row[np.argsort(-np.abs(row), kind="stable")[math.floor(density * row.size) :]] = 0
  sign = np.sign(differences.sum(0))
  agree = (np.sign(differences) == sign) & (sign != 0)
  return flat(base) + scale * np.where(agree, differences, 0).sum(0) / np.maximum(agree.sum(0), 1)


def sum_by_hand(scales, masks=None):
  masks = [1.0] * len(TUNED) if masks is None else masks
  terms = zip(scales, masks, TUNED, strict=True)
  return flat(BASE) + sum(s * m * (flat(tree) - flat(BASE)) for s, m, tree in terms)


F = np.stack([flat(tree) for tree in FISHERS])
THETA = np.stack([flat(tree) for tree in TUNED])
CASES = {
  "average": (lambda b, t, *_: merging.average(t), THETA.mean(0)),
  "weighted average": (lambda b, t, *_: merging.average(t, [3, 0, 1]), (3 * THETA[0] + THETA[2]) / 4),
  "task arithmetic": (lambda b, t, *_: merging.task_arithmetic(b, t, 0.3), sum_by_hand([0.3] * 3)),
  "task arithmetic, scales": (lambda b, t, *_: merging.task_arithmetic(b, t, [1, -2, 0.5]), sum_by_hand([1, -2, 0.5])),
  "ties": (lambda b, t, *_: merging.ties(b, t, 0.3, 0.7), ties_by_hand(BASE, TUNED, 0.3, 0.7)),
  "ties of all": (lambda b, t, *_: merging.ties(b, t, 1.0, 1.0), ties_by_hand(BASE, TUNED, 1.0, 1.0)),
  "dare": (
    lambda b, t, f, m: merging.dare(b, t, drop_rate=0.7, scale=[1, 2, 3], masks=m),
    sum_by_hand(np.array([1, 2, 3]) / 0.3, [flat(mask) for mask in MASKS]),
  ),
  "fisher": (lambda b, t, f, m: merging.fisher(t, f), (F * THETA).sum(0) / F.sum(0)),
}
ARGUMENTS = BASE, TUNED, FISHERS, MASKS


@pytest.mark.parametrize("name", CASES)
def test_the_formula_in_every_precision(name, float64):
  merge, expected = CASES[name]
  same(jax.jit(merge)(*ARGUMENTS), expected)
  same(merge(*ARGUMENTS), expected)
  narrow = lambda dtype: jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(dtype), ARGUMENTS)
  rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), narrow(jnp.bfloat16)[1])
  same(jax.jit(merge)(*narrow(np.float32)), expected, np.float32)
  if name == "average":
    same(merge(*narrow(jnp.bfloat16)), np.mean([flat(tree) for tree in rounded], 0), jnp.bfloat16)


@pytest.mark.parametrize("kept", [0, 1, 40, SIZE - 1, SIZE])
def test_ties_keeps_as_many_entries_as_it_says(kept):
  """Also where magnitudes are equal: half of them here are one number, and the first of them stay."""
  tree = jax.tree.map(lambda leaf: np.float32(np.where(leaf > 0, 1.0, leaf)), draw(1))
  zeros = jax.tree.map(np.zeros_like, tree)
  density = (kept + 0.5) / SIZE if kept < SIZE else 1.0
  got = flat(compiled(merging.ties)(zeros, [tree], density, 1.0))
  assert np.count_nonzero(got) == kept
  np.testing.assert_array_equal(got, ties_by_hand(zeros, [tree], density, 1.0))


def test_ties_keeps_nothing_where_the_sum_has_no_sign_and_lets_nan_through():
  base, one = {"a": np.zeros(3, np.float32)}, {"a": np.float32([1, 2, np.nan])}
  got = merging.ties(base, [one, {"a": np.float32([-1, 3, 1])}], 1.0, 1.0)["a"]
  np.testing.assert_array_equal(got, [0, 2.5, np.nan])


def test_dare_draws_for_every_model_and_leaf_its_own():
  base, ones = {"a": jnp.zeros(4000), "b": jnp.zeros(4000)}, {"a": jnp.ones(4000), "b": jnp.ones(4000)}
  dare = lambda key, tuned=(ones,): merging.dare(base, tuned, drop_rate=0.75, scale=1.0, key=jax.random.key(key))
  first, both = dare(0), dare(0, (ones, ones))
  assert set(np.unique(first["a"])) == {0.0, 4.0} and set(np.unique(both["a"])) == {0.0, 4.0, 8.0}
  assert abs(np.mean(first["a"]) - 1) < 0.1 and abs(np.mean(both["b"]) - 2) < 0.15
  assert (first["a"] != first["b"]).any() and (first["a"] != dare(1)["a"]).any()
  np.testing.assert_array_equal(first["a"], dare(0)["a"])
  rates = jax.jit(lambda rate: merging.dare(base, [ones], drop_rate=rate, scale=1.0, key=jax.random.key(0)))
  np.testing.assert_array_equal(rates(0.75)["a"], first["a"])


def test_dare_hands_its_models_to_ties(float64):
  """DARE with TIES: the drawn differences are trimmed and elected."""
  drawn = [merging.dare(BASE, [t], drop_rate=0.5, scale=1.0, masks=[m]) for t, m in zip(TUNED, MASKS, strict=True)]
  by_hand = [jax.tree.map(lambda b, t, m: b + m * (t - b) / 0.5, BASE, t, m) for t, m in zip(TUNED, MASKS, strict=True)]
  same(merging.ties(BASE, drawn, 0.2, 1.0), ties_by_hand(BASE, by_hand, 0.2, 1.0))


def test_equal_models_give_exactly_that_model():
  tree = draw(1, np.float32)
  for merged in (merging.average([tree] * 3), merging.fisher([tree] * 3, [draw(4, np.float32)] * 3)):
    jax.tree.map(np.testing.assert_array_equal, merged, tree)


def test_fisher_has_no_scale_and_averages_what_matters_to_no_model():
  params = [{"a": np.float32([1, 2, 3])}, {"a": np.float32([5, 4, 9])}]
  fishers = [{"a": np.float32([3e-30, 0, 3e30])}, {"a": np.float32([1e-30, 0, 1e30])}]
  np.testing.assert_allclose(merging.fisher(params, fishers)["a"], [2, 3, 4.5], rtol=1e-5)
  tiny = [{"a": 1e-44 * np.ones(3, np.float32)}] * 2  # below the smallest normal number
  assert np.isfinite(merging.fisher(params, tiny)["a"]).all()


# RegMean: fits of the merged kernel to what each model answers on inputs of its own.


def inputs(seed, rows=20, width=8):
  return np.random.default_rng(seed).normal(size=(rows, width)) * np.geomspace(1e-2, 1e2, width)


def gram_trees(samples):
  return [{"bias": None, "kernel": x.T @ x} for x in samples]


def layers_of(count, out=3):
  return [{"bias": draw(s)["conv"]["bias"], "kernel": np.random.default_rng(s).normal(size=(8, out))}
          for s in range(count)]  # fmt: skip


def test_regmean_is_the_least_squares_fit(float64):
  samples, layers = [inputs(seed) for seed in (10, 11, 12)], layers_of(3)
  got = jax.jit(lambda w, g: merging.regmean(w, g, 1.0))(layers, gram_trees(samples))
  answers = np.concatenate([x @ layer["kernel"] for x, layer in zip(samples, layers, strict=True)])
  expected = np.linalg.lstsq(np.concatenate(samples), answers, rcond=None)[0]
  np.testing.assert_allclose(got["kernel"], expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
  np.testing.assert_allclose(got["bias"], np.mean([layer["bias"] for layer in layers], 0), rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_regmean_shrinks_what_is_off_the_diagonal(alpha, float64):
  samples, layers = [inputs(seed) for seed in (10, 11)], layers_of(2)
  shrunk = [(x.T @ x) * np.where(np.eye(8), 1, alpha) for x in samples]
  targets = sum(gram @ layer["kernel"] for gram, layer in zip(shrunk, layers, strict=True))
  got = merging.regmean(layers, gram_trees(samples), alpha)["kernel"]
  np.testing.assert_allclose(got, np.linalg.solve(sum(shrunk), targets), rtol=1e-9, atol=1e-9)


def test_regmean_averages_directions_without_inputs(float64):
  """A unit that never fires, and fewer examples than inputs: the fit of least distance from the average."""
  samples, layers = [inputs(seed, rows=3) for seed in (10, 11)], layers_of(2)
  for x in samples:
    x[:, 2] = 0
  got = np.asarray(merging.regmean(layers, gram_trees(samples), 1.0)["kernel"])
  mean = (layers[0]["kernel"] + layers[1]["kernel"]) / 2
  np.testing.assert_allclose(got[2], mean[2], rtol=1e-9)
  for x, layer in zip(samples, layers, strict=True):  # three directions for each, so both can be had
    np.testing.assert_allclose(x @ got, x @ layer["kernel"], rtol=1e-5, atol=1e-5)


def test_regmean_takes_a_convolution_as_a_matrix_and_its_digits_hold_in_float32():
  random = np.random.default_rng(0)
  kernels = [{"kernel": random.normal(size=(2, 2, 3, 5))} for _ in range(2)]
  patches = [random.normal(size=(40, 12)) for _ in range(2)]
  narrow = jax.tree.map(np.float32, (kernels, [{"kernel": x.T @ x} for x in patches]))
  answers = np.concatenate([x @ k["kernel"].reshape(12, 5) for x, k in zip(patches, kernels, strict=True)])
  expected = np.linalg.lstsq(np.concatenate(patches), answers, rcond=None)[0].reshape(2, 2, 3, 5)
  got = merging.regmean(*narrow, 1.0)["kernel"]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# Placement, derivatives, mistakes.


@pytest.mark.parametrize("name", CASES)
def test_sharded_leaves_stay_as_they_are(name):
  """Nothing is gathered: only counts cross devices."""
  merge, expected = CASES[name]
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  specs = {"conv": {"bias": P("model"), "kernel": P(None, None, None, "data")},
           "head": {"gain": P(), "kernel": P("data", "model")}}  # fmt: skip
  placed = lambda tree: jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)
  narrow = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(np.float32), ARGUMENTS)
  arguments = (placed(narrow[0]), *([placed(tree) for tree in trees] for trees in narrow[1:]))
  program = jax.jit(merge).lower(*arguments).compile()
  got = program(*arguments)
  same(got, expected, np.float32)
  jax.tree.map(
    lambda leaf, start: leaf.sharding.is_equivalent_to(start.sharding, leaf.ndim) or pytest.fail(), got, arguments[0]
  )
  assert not re.search("all-gather|all-to-all|collective-permute", program.as_text())


def test_merged_params_have_derivatives_by_scale_and_params(float64):
  tuned, weights = TUNED[:2], draw(9)
  score = lambda tree: sum(map(jnp.vdot, jax.tree.leaves(weights), jax.tree.leaves(tree)))
  slope = jax.jit(jax.grad(lambda scale: score(merging.task_arithmetic(BASE, tuned, scale))))(jnp.array([0.2, 0.4]))
  np.testing.assert_allclose(slope, [flat(weights) @ (flat(tree) - flat(BASE)) for tree in tuned], rtol=1e-9)
  merged = jax.jit(lambda tuned: score(merging.ties(BASE, tuned, 0.3, 2.0)))
  moved = jax.grad(merged)(tuned)
  entry = jax.tree.map(np.zeros_like, BASE)
  entry["head"]["kernel"][3, 3] = 1e-6
  nudged = [jax.tree.map(np.add, tuned[0], entry), tuned[1]]
  change = merged(nudged) - merged(tuned)
  np.testing.assert_allclose(moved[0]["head"]["kernel"][3, 3], change / 1e-6, rtol=1e-5, atol=1e-6)


def changed(**parts):
  tree = draw(1)
  return tree | {name: tree[name] | part for name, part in parts.items()}


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (changed(head={"kernel": np.ones((8, 5))}), r"leaf 'head/kernel' has shape \(8, 6\) in {0} and \(8, 5\) in {1}"),
    (changed(head={"more": np.ones(1)}), r"{0} and {1} differ in structure: leaf 'head/more' is only in {1} \(1 such"),
    ({"conv": draw(1)["conv"]}, r"differ in structure: leaf 'head/gain' is only in {0} \(2 such leaves\)"),
    (changed(conv={"bias": np.ones(4, int)}), r"leaf 'conv/bias' of {1} is int32; only floating arrays merge"),
  ],
)
def test_trees_that_differ_are_named_with_the_path_and_both_shapes(other, message):
  trees, of = [draw(0), other], lambda *names: message.format(*map(re.escape, names))
  with pytest.raises(ValueError, match=of("params_list[0]", "params_list[1]")):
    merging.average(trees)
  with pytest.raises(ValueError, match=of("params_list[0]", "params_list[1]")):
    merging.fisher(trees, trees)
  with pytest.raises(ValueError, match=of("weights_list[0]", "weights_list[1]")):
    merging.regmean(trees, [{}, {}])
  for merge in (
    lambda base, tuned: merging.task_arithmetic(base, tuned, 1.0),
    lambda base, tuned: merging.ties(base, tuned, 0.5, 1.0),
    lambda base, tuned: merging.dare(base, tuned, drop_rate=0.5, scale=1.0, key=jax.random.key(0)),
    lambda base, tuned: merging.learned(base, tuned, None),
  ):
    with pytest.raises(ValueError, match=of("base", "tuned[0]")):
      jax.eval_shape(merge, trees[0], trees[1:])


def test_other_containers_and_other_arguments_are_refused():
  tree, key = {"a": [np.ones(2)]}, jax.random.key(0)
  with pytest.raises(ValueError, match="hold their leaves in other containers"):
    merging.average([tree, {"a": (np.ones(2),)}])
  with pytest.raises(ValueError, match=r"params_list must be a sequence of pytrees.*got a mapping of \['a'\]"):
    merging.average(tree)
  with pytest.raises(ValueError, match="tuned must hold at least one pytree"):
    merging.task_arithmetic(tree, [], 1.0)
  with pytest.raises(ValueError, match=r"weights must be one number for each of 2 models; got shape \(3,\)"):
    merging.average([tree, tree], [1, 2, 3])
  with pytest.raises(ValueError, match="weights must not add up to 0"):
    merging.average([tree, tree], [1, -1])
  with pytest.raises(ValueError, match=r"scale must be a number or one for each of 1 models; got shape \(2,\)"):
    merging.task_arithmetic(tree, [tree], [1.0, 2.0])
  for density in (-0.1, 1.1, np.nan):
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\]; got"):
      merging.ties(tree, [tree], density, 1.0)
  with pytest.raises(ValueError, match="scale must be a number"):
    merging.ties(tree, [tree], 0.5, jnp.ones(1))
  for rate in (-0.1, 1.0, np.nan):
    with pytest.raises(ValueError, match=r"drop_rate must be in \[0, 1\)"):
      merging.dare(tree, [tree], drop_rate=rate, scale=1.0, key=key)
  for options, given in (({}, "neither"), ({"key": key, "masks": [{"a": [np.ones(2, bool)]}]}, "both")):
    with pytest.raises(ValueError, match=f"either a key to draw masks from or the masks.*got {given}"):
      merging.dare(tree, [tree], drop_rate=0.5, scale=1.0, **options)
  with pytest.raises(ValueError, match=r"leaf 'a/0' of masks\[0\] must be bool, True where kept; got"):
    merging.dare(tree, [tree], drop_rate=0.5, scale=1.0, masks=[tree])
  with pytest.raises(ValueError, match="masks must be one for each of 2 models; got 1"):
    merging.dare(tree, [tree, tree], drop_rate=0.5, scale=1.0, masks=[tree])
  with pytest.raises(ValueError, match="fishers must be one for each of 2 models; got 1"):
    merging.fisher([tree, tree], [tree])


def test_gram_matrices_that_do_not_fit_are_refused():
  layers, eye = [{"bias": np.ones(2), "kernel": np.ones((3, 2))}] * 2, np.eye(3)
  grams = lambda *kernels, **bias: [{"bias": None, "kernel": kernel} | bias for kernel in kernels]
  with pytest.raises(ValueError, match=r"leaf 'kernel' of shape \(3, 2\) needs a Gram matrix of shape \(3, 3\); "
                     r"grams_list\[1\] has one of \(2, 2\)"):  # fmt: skip
    merging.regmean(layers, grams(eye, np.eye(2)))
  with pytest.raises(ValueError, match=r"grams_list\[1\] has no Gram matrix for leaf 'kernel', but another model has"):
    merging.regmean(layers, grams(eye, None))
  with pytest.raises(ValueError, match=r"leaf 'bias' of shape \(2,\) is no kernel"):
    merging.regmean(layers, grams(eye, eye, bias=np.eye(2)))
  with pytest.raises(ValueError, match=r"grams_list\[0\] must have a Gram matrix or None for every leaf.*'bias'"):
    merging.regmean(layers, [{"kernel": eye}] * 2)
  with pytest.raises(ValueError, match="grams_list must be one for each of 2 models; got 1"):
    merging.regmean(layers, grams(eye))
  with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]; got 1.5"):
    merging.regmean(layers, grams(eye, eye), 1.5)
