"""What a model says about a whole data set, and how good it is, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdflax import data, training
from kdflax.model import Model
from kdflax.objectives import Term

SPLIT = {"x": np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32), "label": np.arange(10) % 2}
W = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2)), jnp.float32)  # [seeds, width, classes]
MODEL = Model(
  lambda key, batch: (W[0], {}),
  lambda params, state, batch, *, train, key=None: ({"logits": batch["x"] @ params, "input": {"x": batch["x"]}}, state),
)
TERMS = {
  "accuracy": Term(training.metrics.accuracy, {"logits": "m.logits", "labels": "batch.label", "where": "batch.where"})
}


@pytest.mark.parametrize("size", [3, 10, 64])
def test_the_means_are_those_over_all_examples(size):
  evaluate = training.make_eval_step({"m": MODEL}, TERMS)
  expected = [float(np.mean((SPLIT["x"] @ w).argmax(-1) == SPLIT["label"])) for w in np.asarray(W)]
  of = lambda evaluate, variables: training.evaluate_dataset(evaluate, variables, data.padded_batches(SPLIT, size))
  assert of(evaluate, {"m": (W[0], {})}) == {"accuracy": pytest.approx(expected[0])}
  seeds = jax.jit(jax.vmap(evaluate, (0, None, None)))
  assert of(seeds, {"m": (W, {})}) == {"accuracy": pytest.approx(expected)}


@pytest.mark.parametrize("size", [3, 10, 64])
def test_predictions_are_those_of_all_examples_in_order(size):
  batches = lambda: data.padded_batches(SPLIT, size)
  said = training.predict(MODEL, (W[0], {}), batches(), names=("logits", "input"))
  np.testing.assert_allclose(said["logits"], SPLIT["x"] @ W[0], rtol=1e-5)
  np.testing.assert_array_equal(said["input"]["x"], SPLIT["x"])
  said = training.predict(MODEL, (W, {}), batches(), seeds=True)
  np.testing.assert_allclose(said["logits"], SPLIT["x"] @ W, rtol=1e-5)
  whole = training.predict(MODEL, (W[0], {}), [SPLIT])  # batches without padding
  assert whole["logits"].shape == (10, 2)


def test_nothing_to_evaluate_and_unknown_outputs_are_named():
  with pytest.raises(ValueError, match="no batch to evaluate"):
    training.evaluate_dataset(training.make_eval_step({"m": MODEL}, TERMS), {"m": (W[0], {})}, iter([]))
  with pytest.raises(ValueError, match="no batch to predict"):
    training.predict(MODEL, (W[0], {}), [])
  with pytest.raises(ValueError, match=r"no outputs \['embedding'\]; it has \['input', 'logits'\]"):
    training.predict(MODEL, (W[0], {}), [SPLIT], names=("embedding",))
