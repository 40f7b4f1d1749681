"""Losses in your own loop: Flax and Optax as everywhere, and of kdflax only a loss.

python -m examples.losses_in_your_own_loop
"""

import jax
import optax
from flax import linen as nn

from kdflax import data, losses


class Perceptron(nn.Module):
  width: int

  @nn.compact
  def __call__(self, image):
    hidden = nn.relu(nn.Dense(self.width)(image.reshape(len(image), -1)))
    return nn.Dense(10)(hidden)


def train(network, loss_of, batches, steps):
  """Minimises the mean of `loss_of(logits, batch)`, one value for each example."""
  optimizer, params = optax.adam(3e-3), network.init(jax.random.key(0), next(batches)["image"])
  opt_state = optimizer.init(params)

  @jax.jit
  def step(params, opt_state, batch):
    loss = lambda params: loss_of(network.apply(params, batch["image"]), batch).mean()
    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state

  for _ in range(steps):
    params, opt_state = step(params, opt_state, next(batches))
  return params


def main(steps=1000):
  splits = data.load("digits")
  batches = data.DeviceBatches(splits["train"], 64, jax.random.key(1))
  logits_of = lambda network, params, batch: network.apply(params, batch["image"])
  hard = lambda logits, batch: optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
  teacher, student = Perceptron(256), Perceptron(8)
  knowledge = train(teacher, hard, batches, steps)

  def soft(logits, batch):
    return losses.kl_soft_targets(logits, logits_of(teacher, knowledge, batch), temperature=4.0)

  params = train(student, lambda logits, batch: 0.1 * hard(logits, batch) + 0.9 * soft(logits, batch), batches, steps)
  test = splits["test"]
  right = {
    name: (logits_of(network, found, test).argmax(-1) == test["label"]).mean().item()
    for name, network, found in (("teacher", teacher, knowledge), ("student", student, params))
  }
  print({name: f"{share:.1%}" for name, share in right.items()})
  return right


if __name__ == "__main__":
  main()
