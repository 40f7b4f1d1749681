"""Residual networks for small images, in the depths and widths that distillation papers report on CIFAR-100."""

from collections.abc import Sequence

import jax
from flax import nnx

from kdflax.model import Model, Outputs
from kdflax.models.adapters import from_nnx
from kdflax.models.layers import Convolution, Dtype, check_rank, check_widths, classifier

_PLAIN = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)

RESNETS: dict[str, tuple[int, tuple[int, ...]]] = {
  **{f"resnet{depth}": (depth, _PLAIN) for depth in (8, 14, 20, 32, 44, 56, 110)},
  **{f"resnet{depth}x4": (depth, _WIDE) for depth in (8, 14, 32)},
}


def resnet(
  depth: int | str = 20,
  num_classes: int | None = 100,
  *,
  widths: Sequence[int] | None = None,
  input: str = "image",
  dtype: Dtype | None = None,
) -> Model:
  """Build a CIFAR residual network of basic blocks, 6 n + 2 layers deep.

  A 3x3 stem, then three stages of n blocks, then the global average pool. Stages 2 and 3 halve the image. Where the
  size or the width changes, the shortcut is a 1x1 convolution with BatchNorm. Convolutions start He normal (fan-out).
  BatchNorm counts every example of the batch, those that a Term masks as well.

  `features` are `stem`, `stage1`, `stage2`, `stage3`, all after the ReLU, and `stem_pre`, `stage1_pre`, ... the same
  maps before it (for a stage: the sum of the last block and its shortcut). What is not used costs nothing under `jit`.

  Args:
    depth: the number of layers, 6 n + 2, or a published name that fixes the widths too: "resnet8", "resnet14",
      "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet14x4", "resnet32x4".
    num_classes: the width of `logits`; None for an encoder without a head and without `logits`.
    widths: the channels of the stem and the three stages; by default 16, 16, 32, 64; the x4 names have
      32, 64, 128, 256.
    input: the entry of the batch to read, shape [batch, height, width, channels].
    dtype: the type to compute in; parameters and BatchNorm statistics stay float32.

  Returns:
    A model with `logits` [batch, num_classes], `embedding` [batch, widths[-1]] and `features` by stage.

  Raises:
    ValueError: if the depth is not 6 n + 2, the name is unknown, `widths` is given with a name or is not four positive
      numbers, or the input has not four axes.

  Reference: Kaiming He, Xiangyu Zhang, Shaoqing Ren and Jian Sun, "Deep Residual Learning for Image Recognition", 2015,
  arXiv 1512.03385; the x4 widths and the shortcut are those of Yonglong Tian, Dilip Krishnan and Phillip Isola,
  "Contrastive Representation Distillation", 2019, arXiv 1910.10699. The original pads the shortcut with zeros instead.
  Widely used code draws the bias of the classifier uniformly and averages the unbiased variance of the batch; here the
  bias starts at zero and the variance is the one that normalises.
  """
  layers, channels = _architecture(depth, widths)
  check_widths(widths=channels, num_classes=() if num_classes is None else (num_classes,))

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _ResNet:
    check_rank(example, 4, "resnet", "[batch, height, width, channels]")
    return _ResNet(example.shape[-1], (layers - 2) // 6, channels, num_classes, dtype, rngs)

  return from_nnx(make, input=input, with_example=True)


def _architecture(depth: int | str, widths: Sequence[int] | None) -> tuple[int, tuple[int, ...]]:
  if isinstance(depth, str):
    if depth not in RESNETS:
      raise ValueError(f"unknown resnet {depth!r}; the names are {', '.join(RESNETS)}")
    if widths is not None:
      raise ValueError(f"the name {depth!r} fixes the widths; give the depth as a number to choose {tuple(widths)}")
    return RESNETS[depth]
  if depth < 8 or depth % 6 != 2:
    raise ValueError(f"the depth of a CIFAR resnet is 6 n + 2 (8, 14, 20, 26, 32, ...), got {depth}")
  channels = _PLAIN if widths is None else tuple(widths)
  if len(channels) != 4:
    raise ValueError(f"widths must be four numbers, for the stem and three stages; got {channels}")
  return depth, channels


class _Block(nnx.Module):
  """Returns the sum before the last ReLU, which belongs to whoever uses it."""

  def __init__(self, inputs: int, outputs: int, stride: int, dtype: Dtype | None, rngs: nnx.Rngs) -> None:
    self.first = Convolution(inputs, outputs, rngs, stride=stride, dtype=dtype)
    self.second = Convolution(outputs, outputs, rngs, dtype=dtype)
    changes = stride != 1 or inputs != outputs
    self.shortcut = Convolution(inputs, outputs, rngs, kernel=1, stride=stride, dtype=dtype) if changes else None

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    branch = self.second(jax.nn.relu(self.first(x, train)), train)
    return branch + (x if self.shortcut is None else self.shortcut(x, train))


class _ResNet(nnx.Module):
  def __init__(
    self,
    channels: int,
    blocks: int,
    widths: Sequence[int],
    num_classes: int | None,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
  ) -> None:
    self.stem = Convolution(channels, widths[0], rngs, dtype=dtype)
    self.stages = nnx.List(
      nnx.List(
        _Block(inputs if index == 0 else outputs, outputs, stride if index == 0 else 1, dtype, rngs)
        for index in range(blocks)
      )
      for inputs, outputs, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True)
    )
    self.head = classifier(widths[-1], num_classes, dtype, rngs)

  def __call__(self, x: jax.Array, *, train: bool) -> Outputs:
    before = self.stem(x, train)
    features = {"stem_pre": before, "stem": jax.nn.relu(before)}
    for index, stage in enumerate(self.stages, start=1):
      for block in stage:
        before = block(jax.nn.relu(before), train)
      features |= {f"stage{index}_pre": before, f"stage{index}": jax.nn.relu(before)}
    embedding = features[f"stage{len(self.stages)}"].mean((1, 2))
    logits = {} if self.head is None else {"logits": self.head(embedding)}
    return {**logits, "embedding": embedding, "features": features}
