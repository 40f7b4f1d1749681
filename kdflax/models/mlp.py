"""The multilayer perceptron."""

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx

from kdflax.model import Model, Outputs
from kdflax.models.adapters import from_nnx
from kdflax.models.layers import Activation, Dtype, check_dropout, check_widths, classifier, dropped_out, hidden_init


def mlp(
  hidden: Sequence[int] = (64,),
  num_classes: int | None = 10,
  *,
  dropout: float = 0.0,
  activation: Activation = jax.nn.relu,
  input: str = "image",
  dtype: Dtype | None = None,
) -> Model:
  """Build a multilayer perceptron over the flattened input.

  `features` are `hidden1`, `hidden2`, ... after the activation and before dropout, and `hidden1_pre`, ... before the
  activation. `embedding` is the last of them, or the flattened input if `hidden` is empty (a linear classifier).
  Hidden kernels start He normal (fan-in), biases at zero.

  Args:
    hidden: the widths of the hidden layers.
    num_classes: the width of `logits`; None for an encoder without a head and without `logits`.
    dropout: the probability of dropping a hidden unit in training.
    activation: applied to every hidden layer.
    input: the entry of the batch to read, shape [batch, ...].
    dtype: the type to compute in; parameters stay float32. By default that of inputs and parameters together.

  Returns:
    A model with `logits` [batch, num_classes], `embedding` [batch, hidden[-1]] and `features` [batch, hidden[i]].

  Raises:
    ValueError: if a width is not positive, or dropout is not in [0, 1).
  """
  check_widths(hidden=hidden, num_classes=() if num_classes is None else (num_classes,))
  check_dropout(dropout)

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _MLP:
    if len(example.shape) < 2:
      raise ValueError(f"mlp takes an input of shape [batch, ...], got {tuple(example.shape)}; add a batch axis")
    return _MLP(math.prod(example.shape[1:]), tuple(hidden), num_classes, dropout, activation, dtype, rngs)

  return from_nnx(make, input=input, with_example=True)


class _MLP(nnx.Module):
  def __init__(
    self,
    size: int,
    hidden: Sequence[int],
    num_classes: int | None,
    dropout: float,
    activation: Activation,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
  ) -> None:
    widths = (size, *hidden)
    self.hidden = nnx.List(
      nnx.Linear(a, b, kernel_init=hidden_init, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)
    )
    self.head = classifier(widths[-1], num_classes, dtype, rngs)
    self.dropout = nnx.Dropout(dropout)
    self.activation = activation

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None) -> Outputs:
    embedding = dropped = x.reshape(x.shape[0], -1)
    features = {}
    for index, layer in enumerate(self.hidden, start=1):
      features[f"hidden{index}_pre"] = before = layer(dropped)
      features[f"hidden{index}"] = embedding = self.activation(before)
      dropped = dropped_out(self.dropout, embedding, train, rngs)
    logits = {} if self.head is None else {"logits": self.head(dropped)}
    return {**logits, "embedding": embedding, "features": features}
