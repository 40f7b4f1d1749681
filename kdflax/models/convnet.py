"""A small convolutional network for images of 8x8 to 32x32."""

from collections.abc import Sequence

import jax
from flax import nnx

from kdflax.model import Model, Outputs
from kdflax.models.adapters import from_nnx
from kdflax.models.layers import Convolution, Dtype, check_dropout, check_rank, check_widths, classifier, dropped_out


def convnet(
  widths: Sequence[int] = (16, 32),
  num_classes: int | None = 10,
  *,
  dropout: float = 0.0,
  pool: bool = True,
  input: str = "image",
  dtype: Dtype | None = None,
) -> Model:
  """Build a plain stack of 3x3 convolutions, BatchNorm and ReLU, with a global average pool before the classifier.

  Every stage is one convolution; the first keeps the size of the image, each later one halves it. `features` are
  `stage1`, `stage2`, ... after the ReLU and `stage1_pre`, ... before it. Convolutions start He normal (fan-out).
  BatchNorm counts every example of the batch, those that a Term masks as well.

  Args:
    widths: the channels of each stage; at least one.
    num_classes: the width of `logits`; None for an encoder without a head and without `logits`.
    dropout: the probability of dropping a channel of the embedding in training.
    pool: average the last map over its positions; False flattens it instead, for images such as characters, in which
      it matters where something is and a small network would lose that.
    input: the entry of the batch to read, shape [batch, height, width, channels].
    dtype: the type to compute in; parameters and BatchNorm statistics stay float32.

  Returns:
    A model with `logits` [batch, num_classes], `embedding` [batch, widths[-1]] (times the last map's positions without
    `pool`; before dropout) and `features` [batch, height / 2^i, width / 2^i, widths[i]]; odd sizes round up.

  Raises:
    ValueError: if a width is not positive or there is none, dropout is not in [0, 1), or the input has not four axes.
  """
  check_widths(widths=widths, num_classes=() if num_classes is None else (num_classes,))
  check_dropout(dropout)
  if not widths:
    raise ValueError("widths must name at least one stage, got ()")

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _ConvNet:
    check_rank(example, 4, "convnet", "[batch, height, width, channels]")
    return _ConvNet(example.shape[1:], tuple(widths), num_classes, dropout, pool, dtype, rngs)

  return from_nnx(make, input=input, with_example=True)


class _ConvNet(nnx.Module):
  def __init__(
    self,
    image: Sequence[int],
    widths: Sequence[int],
    num_classes: int | None,
    dropout: float,
    pool: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
  ) -> None:
    self.stages = nnx.List(
      Convolution(a, b, rngs, stride=1 if index == 0 else 2, dtype=dtype)
      for index, (a, b) in enumerate(zip((image[-1], *widths[:-1]), widths, strict=True))
    )
    self.dropout = nnx.Dropout(dropout)
    self.pool = pool
    height, width = (-(-size // 2 ** (len(widths) - 1)) for size in image[:2])
    self.head = classifier(widths[-1] * (1 if pool else height * width), num_classes, dtype, rngs)

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None) -> Outputs:
    features = {}
    for index, stage in enumerate(self.stages, start=1):
      features[f"stage{index}_pre"] = before = stage(x, train)
      features[f"stage{index}"] = x = jax.nn.relu(before)
    embedding = x.mean((1, 2)) if self.pool else x.reshape(x.shape[0], -1)
    dropped = dropped_out(self.dropout, embedding, train, rngs)
    logits = {} if self.head is None else {"logits": self.head(dropped)}
    return {**logits, "embedding": embedding, "features": features}
