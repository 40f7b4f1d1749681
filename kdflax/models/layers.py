"""What the networks and the connectors share: initial weights, one layer, and checks."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Dtype = jnp.dtype | type


class Activation(Protocol):
  """An elementwise function of an array."""

  def __call__(self, x: jax.Array, /) -> jax.Array: ...


class Draw(Protocol):
  """`(key, shape, dtype) -> random numbers`."""

  def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any, /) -> jax.Array: ...


def _scaled(draw: Draw, numerator: float, fan: str) -> nnx.Initializer:
  """Makes an initializer: `draw` times sqrt(numerator / fan), for kernels [..., inputs, outputs]."""

  def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
    del out_sharding
    # Drawn flat: the same numbers, and a draw with four axes takes XLA about five times as long to compile on a CPU.
    flat = draw(key, (math.prod(shape),), dtype).reshape(shape)
    size = math.prod(shape[:-1]) if fan == "in" else math.prod(shape[:-2]) * shape[-1]
    return flat * jnp.asarray(math.sqrt(numerator / size), dtype)

  return init


def _symmetric(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


# Kaiming He, Xiangyu Zhang, Shaoqing Ren and Jian Sun (2015), arXiv 1502.01852: the first keeps the variance of
# gradients, the second that of activations. Neither is truncated.
conv_init: nnx.Initializer = _scaled(jax.random.normal, 2.0, "out")
hidden_init: nnx.Initializer = _scaled(jax.random.normal, 2.0, "in")
head_init: nnx.Initializer = _scaled(_symmetric, 1.0, "in")  # uniform within 1 / sqrt(inputs)
unit_init: nnx.Initializer = _scaled(_symmetric, 3.0, "in")  # uniform, of variance 1 / inputs


class Convolution(nnx.Module):
  """A convolution with BatchNorm, or with a bias in its place.

  The padding is symmetric and given in numbers: "SAME" pads a strided convolution at the far side only, and weights
  trained elsewhere would not fit.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    kernel: int = 3,
    stride: int = 1,
    batch_norm: bool = True,
    init: nnx.Initializer = conv_init,
    dtype: Dtype | None = None,
  ) -> None:
    self.conv: nnx.Conv = nnx.Conv(
      inputs,
      outputs,
      (kernel, kernel),
      strides=stride,
      padding=[((kernel - 1) // 2, kernel // 2)] * 2,
      use_bias=not batch_norm,
      kernel_init=init,
      conv_general_dilated=convolve,
      dtype=dtype,
      rngs=rngs,
    )
    norm = nnx.BatchNorm(outputs, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs) if batch_norm else None
    self.norm: nnx.BatchNorm | None = norm

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = self.conv(x)
    return x if self.norm is None else self.norm(x, use_running_average=not train)


_NARROW = 4  # channels in, up to which a CPU is faster by one product


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any) -> jax.Array:
  """Convolves as `jax.lax.conv_general_dilated`, which on a CPU is slow for few channels.

  There it is a product of patches with the kernel instead: `vmap` over kernels, as over paired seeds, makes a batched
  product of it, where XLA would make a grouped convolution several times slower.
  """
  whole = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
  if kernel.shape[2] > _NARROW:
    return whole(x, kernel)
  by_patches = functools.partial(_product_of_patches, strides=strides, padding=padding, precision=options["precision"])
  return jax.lax.platform_dependent(x, kernel, cpu=by_patches, default=whole)


def _product_of_patches(
  x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], precision: Any
) -> jax.Array:
  """Every patch that the kernel sees, its rows after each other, times the kernel as a matrix."""
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  height, width = (
    (size - edge) // stride for size, edge, stride in zip(padded.shape[1:], kernel.shape, strides, strict=False)
  )
  down, right = strides
  shifted = [
    padded[:, i : i + height * down + 1 : down, j : j + width * right + 1 : right]
    for i in range(kernel.shape[0])
    for j in range(kernel.shape[1])
  ]
  return jnp.matmul(jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, kernel.shape[-1]), precision=precision)


def classifier(inputs: int, num_classes: int | None, dtype: Dtype | None, rngs: nnx.Rngs) -> nnx.Linear | None:
  """Makes the last layer of a classifier, or nothing for an encoder."""
  if num_classes is None:
    return None
  return nnx.Linear(inputs, num_classes, kernel_init=head_init, dtype=dtype, rngs=rngs)


def check_widths(**widths: Sequence[int]) -> None:
  """Raises a ValueError, naming the argument, unless every width is a positive integer."""
  for name, values in widths.items():
    if any(isinstance(value, bool) or not isinstance(value, int | np.integer) for value in values):
      raise ValueError(f"{name} must be whole numbers, got {tuple(values)}")
    if any(value < 1 for value in values):
      raise ValueError(f"{name} must be at least 1, got {tuple(values)}")


def check_dropout(rate: float) -> None:
  """Raises a ValueError unless the rate is a probability below 1."""
  if not 0 <= rate < 1:
    raise ValueError(f"dropout must be in [0, 1), got {rate}")


def check_rank(x: Any, rank: int, name: str, axes: str) -> None:
  """Raises unless an input has the number of axes that a model is written for.

  Args:
    x: the array, or its shape.
    rank: the number of axes wanted.
    name: the model, for the message.
    axes: the axes wanted, for the message.

  Raises:
    ValueError: for any other number of axes.
  """
  if len(x.shape) != rank:
    raise ValueError(f"{name} takes an input of shape {axes}, got {tuple(x.shape)}; reshape it to {rank} axes")


def dropped_out(dropout: nnx.Dropout, x: jax.Array, train: bool, rngs: nnx.Rngs | None) -> jax.Array:
  """Dropout in training. In evaluation it is no part of the program, which other formats would have to know."""
  return dropout(x, deterministic=False, rngs=rngs) if train else x
