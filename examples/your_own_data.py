"""Your own data: a dict of NumPy arrays, checked once, split, streamed with augmentation, tested to the last example.

python -m examples.your_own_data
"""

import functools

import jax
import numpy as np
import optax

from kdflax import data, models, training
from kdflax.objectives import Term
from kdflax.training import metrics


def stripes(examples=600, size=12):
  """Pictures of horizontal (0) or vertical (1) stripes under noise, as bytes: what your reader would return."""
  random = np.random.default_rng(0)
  label = random.integers(2, size=examples).astype(np.int32)
  wave = 127 + 60 * np.sin(np.arange(size) + 6 * random.random((examples, 1)))
  image = np.where(label[:, None, None] == 1, wave[:, None, :], wave[:, :, None])
  image = np.clip(image + 110 * random.normal(size=image.shape), 0, 255).astype(np.uint8)
  return {"image": image[..., None], "label": label, "index": np.arange(examples)}


def main(steps=200):
  arrays = stripes()
  data.check(arrays, num_classes=2)  # NaN, labels out of range, unequal lengths: refused by name
  train, test = (data.gather(arrays, rows) for rows in data.stratified_split(arrays["label"], (400, 200), seed=0))
  # Grain reads and augments in the background; its position is a dict that `training.fit` saves with the state.
  batches = data.grain_batches(train, 64, seed=0, augment=data.random_shift(2))
  statistics = data.Normalisation((train["image"].mean() / 255,), (train["image"].std() / 255,))
  floats = lambda batch: batch | {"image": data.normalize(batch["image"], statistics)}

  network = models.convnet((8, 16), 2)
  inputs = {"logits": "network.logits", "labels": "batch.label"}
  hard = Term(optax.softmax_cross_entropy_with_integer_labels, inputs)
  learner = training.make_learner({"network": network}, {"hard": hard}, optax.adam(3e-3))
  state = learner.init(jax.random.key(0), floats(next(batches)))
  step = training.make_train_step(learner)
  for _ in range(steps):
    state, _ = step(state, floats(next(batches)))

  variables = {"network": (state.params["network"], state.model_state["network"])}
  accuracy = Term(metrics.accuracy, inputs | {"where": "batch.where"})  # leaves out the padding of the last batch
  test_step = training.make_eval_step({"network": network}, {"accuracy": accuracy})
  parts = (test_step(variables, floats(batch)) for batch in data.padded_batches(test, 64))
  found = metrics.means(functools.reduce(metrics.add, parts))["accuracy"]
  print(f"{found:.1%} of {len(test['label'])} test pictures")
  return found


if __name__ == "__main__":
  main()
