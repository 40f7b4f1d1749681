"""Connectors of several layers, one per paper: feature review, factor transfer, the teacher's classifier reused."""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdflax.model import Model, Outputs
from kdflax.models.adapters import from_nnx
from kdflax.models.layers import Activation, Convolution, check_rank, check_widths, head_init, unit_init
from kdflax.numerics.pooling import pool_to_at_most

_MAP = "[batch, height, width, channels]"


def review_fusion(
  paths: Sequence[str],
  channels: Sequence[int],
  *,
  sizes: Sequence[tuple[int, int]] | None = None,
  width: int | None = None,
) -> Model:
  """Fuse the student's maps from the deepest to the shallowest, each fusion to be compared with one teacher map.

  At each level: a 1x1 convolution to the common width; a blend with what the level below left, enlarged to the nearest
  neighbour, by two gates per position, `sigmoid(conv([x, y]))`; then a 3x3 convolution to the teacher's channels. Every
  convolution but the gates' has BatchNorm. The deepest level has nothing to blend.

  Args:
    paths: context paths of the student's maps, deepest first; a path to vectors [batch, features] counts as a map of
      one position, and its output is a vector again.
    channels: the teacher's channels, in the same order.
    sizes: the teacher's (height, width), in the same order; by default the student's.
    width: the common width; by default the channels of the deepest map, at most 512.

  Returns:
    A model with `features`, named as the last part of each path: [batch, *sizes[i], channels[i]].

  Raises:
    ValueError: if the lengths differ, two paths end alike, a number is not positive, or an input is neither a map nor a
      batch of vectors.

  Reference: Pengguang Chen, Shu Liu, Hengshuang Zhao and Jiaya Jia, "Distilling Knowledge via Knowledge Review", 2021,
  arXiv 2104.09044.
  """
  paths, channels = tuple(paths), tuple(channels)
  names = tuple(path.rsplit(".", 1)[-1] for path in paths)
  if not paths or len(channels) != len(paths) or (sizes is not None and len(sizes) != len(paths)):
    raise ValueError(f"give one entry per path; got paths {paths}, channels {channels}, sizes {sizes}")
  if len(set(names)) != len(names):
    raise ValueError(f"the outputs are named by the last part of each path, so these must differ: {names}")
  check_widths(channels=channels, width=(1 if width is None else width,))

  def make(rngs: nnx.Rngs, example: tuple[jax.ShapeDtypeStruct, ...]) -> _Review:
    for path, x in zip(paths, example, strict=True):
      if len(x.shape) not in (2, 4):
        raise ValueError(f"review_fusion takes {_MAP} or [batch, features]; {path!r} is {tuple(x.shape)}")
    common = min(512, example[0].shape[-1]) if width is None else width
    return _Review(names, [x.shape[-1] for x in example], channels, sizes, common, rngs)

  return from_nnx(make, inputs=paths, with_example=True)


def paraphraser(path: str, *, rate: float = 0.5) -> Model:
  """Compress the teacher's map to factors, from which it can be rebuilt.

  Three 3x3 convolutions each way, with BatchNorm and LeakyReLU (slope 0.1). Train it first on the squared error between
  `reconstruction` and the teacher's map; then freeze it, and compare `output` with that of a `translator`.

  Args:
    path: context path of the teacher's map [batch, height, width, channels].
    rate: factors per channel of the teacher.

  Returns:
    A model with `output` [batch, height, width, factors], factors = int(rate * channels), and `reconstruction`, shaped
    like the input.

  Raises:
    ValueError: if the rate is not positive or leaves no factor, or the input has not four axes.

  Reference: Jangho Kim, SeongUk Park and Nojun Kwak, "Paraphrasing Complex Network: Network Compression via Factor
  Transfer", 2018, arXiv 1802.04977. The way back is written there as transposed convolutions, which at stride 1 are the
  same functions as the convolutions here.
  """
  if rate <= 0:
    raise ValueError(f"rate must be positive, got {rate}")

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _Paraphraser:
    check_rank(example, 4, f"paraphraser({path!r})", _MAP)
    channels = example.shape[-1]
    if int(rate * channels) < 1:
      raise ValueError(f"rate {rate} of {channels} channels leaves no factor; raise it to {1 / channels:g} or more")
    return _Paraphraser(channels, int(rate * channels), rngs)

  return from_nnx(make, inputs=path, with_example=True)


def translator(path: str, factors: int) -> Model:
  """Map the student's features to the factors of a `paraphraser`.

  Three 3x3 convolutions with BatchNorm and LeakyReLU (slope 0.1).

  Args:
    path: context path of the student's map [batch, height, width, channels].
    factors: the channels of the paraphraser's output.

  Returns:
    A model with `output` [batch, height, width, factors].

  Raises:
    ValueError: if `factors` is not positive or the input has not four axes.

  Reference: Jangho Kim, SeongUk Park and Nojun Kwak, "Paraphrasing Complex Network: Network Compression via Factor
  Transfer", 2018, arXiv 1802.04977.
  """
  check_widths(factors=(factors,))

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _Stack:
    check_rank(example, 4, f"translator({path!r})", _MAP)
    return _Stack((example.shape[-1], example.shape[-1], factors, factors), (3, 3, 3), _leaky, rngs)

  return from_nnx(make, inputs=path, with_example=True)


def reused_head(
  path: str,
  head_params: Mapping[str, jax.Array],
  *,
  size: tuple[int, int] | None = None,
  factor: int = 2,
) -> Model:
  """Send the student's map through a projector into the teacher's classifier, which stays as it is.

  The projector is a bottleneck of 1x1, 3x3 and 1x1 convolutions with BatchNorm and ReLU. It is all that is learned:
  train it and the student on `hint(output, the teacher's last map)` alone. The classifier travels in `state`. Both stay
  in use after training: compose them with the encoder to one student (docs/recipes.md), which then leaves as a whole.

  Args:
    path: context path of the student's last map [batch, height, width, channels].
    head_params: the teacher's last layer, `kernel` [width, classes] and optionally `bias` [classes]; for the networks
      here, `params["head"]`.
    size: (height, width) of the teacher's last map; a larger student map is average-pooled to it first.
    factor: how much narrower than the teacher the bottleneck is.

  Returns:
    A model with `output` [batch, height, width, width of the head], its spatial mean `embedding`, and `logits`.

  Raises:
    ValueError: if the head has no kernel of two axes, `factor` leaves no channel, or the input has not four axes.

  Reference: Defang Chen, Jian-Ping Mei, Hailin Zhang, Can Wang, Yan Feng and Chun Chen, "Knowledge Distillation with
  the Reused Teacher Classifier", 2022, arXiv 2203.14001 (SimKD).
  """
  if "kernel" not in head_params or head_params["kernel"].ndim != 2:
    found = {name: jnp.shape(value) for name, value in head_params.items()}
    raise ValueError(f"head_params needs a kernel [width, classes]; got {found}")
  narrow = head_params["kernel"].shape[0] // factor if factor >= 1 else 0
  if narrow < 1:
    raise ValueError(f"factor {factor} leaves no channel of a head {head_params['kernel'].shape[0]} wide")

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _ReusedHead:
    check_rank(example, 4, f"reused_head({path!r})", _MAP)
    return _ReusedHead(example.shape[-1], narrow, head_params, size, rngs)

  return from_nnx(make, inputs=path, with_example=True)


def _nearest(x: jax.Array, size: Sequence[int]) -> jax.Array:
  """Enlarges or thins out a map: position i of m takes that of floor(i n / m)."""
  rows, columns = (np.arange(m) * n // m for n, m in zip(x.shape[1:3], size, strict=True))
  return x if x.shape[1:3] == tuple(size) else x[:, rows][:, :, columns]


def _leaky(x: jax.Array) -> jax.Array:
  return jax.nn.leaky_relu(x, 0.1)


class _Stack(nnx.Module):
  """Convolutions with BatchNorm, each followed by the activation."""

  def __init__(self, widths: Sequence[int], kernels: Sequence[int], activation: Activation, rngs: nnx.Rngs) -> None:
    steps = zip(itertools.pairwise(widths), kernels, strict=True)
    self.layers = nnx.List(Convolution(a, b, rngs, kernel=kernel) for (a, b), kernel in steps)
    self.activation = activation

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for layer in self.layers:
      x = self.activation(layer(x, train))
    return x


class _Paraphraser(nnx.Module):
  def __init__(self, channels: int, factors: int, rngs: nnx.Rngs) -> None:
    self.encoder = _Stack((channels, channels, factors, factors), (3, 3, 3), _leaky, rngs)
    self.decoder = _Stack((factors, factors, channels, channels), (3, 3, 3), _leaky, rngs)

  def __call__(self, x: jax.Array, *, train: bool) -> Outputs:
    factors = self.encoder(x, train=train)
    return {"output": factors, "reconstruction": self.decoder(factors, train=train)}


class _Level(nnx.Module):
  def __init__(self, inputs: int, width: int, outputs: int, blends: bool, rngs: nnx.Rngs) -> None:
    self.enter = Convolution(inputs, width, rngs, kernel=1, init=unit_init)
    self.leave = Convolution(width, outputs, rngs, init=unit_init)
    self.gates = nnx.Linear(2 * width, 2, kernel_init=head_init, rngs=rngs) if blends else None

  def __call__(
    self, x: jax.Array, below: jax.Array | None, size: Sequence[int], train: bool
  ) -> tuple[jax.Array, jax.Array]:
    x = self.enter(x, train)
    if self.gates is not None and below is not None:
      below = _nearest(below, x.shape[1:3])
      gates = jax.nn.sigmoid(self.gates(jnp.concatenate([x, below], axis=-1)))
      x = x * gates[..., :1] + below * gates[..., 1:]
    x = _nearest(x, size)
    return self.leave(x, train), x


class _Review(nnx.Module):
  def __init__(
    self,
    names: Sequence[str],
    inputs: Sequence[int],
    outputs: Sequence[int],
    sizes: Sequence[tuple[int, int]] | None,
    width: int,
    rngs: nnx.Rngs,
  ) -> None:
    self.names = names
    self.sizes = (None,) * len(names) if sizes is None else tuple(map(tuple, sizes))
    self.levels = nnx.List(
      _Level(a, width, b, index > 0, rngs) for index, (a, b) in enumerate(zip(inputs, outputs, strict=True))
    )

  def __call__(self, maps: tuple[jax.Array, ...], *, train: bool) -> Outputs:
    features, below = {}, None
    for name, level, size, x in zip(self.names, self.levels, self.sizes, maps, strict=True):
      vector = x.ndim == 2
      x = x[:, None, None, :] if vector else x
      fused, below = level(x, below, size or x.shape[1:3], train)
      features[name] = fused[:, 0, 0] if vector and fused.shape[1:3] == (1, 1) else fused
    return {"features": features}


class _Frozen(nnx.Variable):
  """An array that is kept and never learned."""


class _ReusedHead(nnx.Module):
  def __init__(
    self, inputs: int, narrow: int, head: Mapping[str, jax.Array], size: tuple[int, int] | None, rngs: nnx.Rngs
  ) -> None:
    self.projector = _Stack((inputs, narrow, narrow, head["kernel"].shape[0]), (1, 3, 1), jax.nn.relu, rngs)
    self.head = nnx.Dict({name: _Frozen(jnp.asarray(value)) for name, value in head.items()})
    self.size = size

  def __call__(self, x: jax.Array, *, train: bool) -> Outputs:
    x = self.projector(x if self.size is None else pool_to_at_most(x, self.size), train=train)
    embedding = x.mean((1, 2))
    logits = embedding @ self.head["kernel"][...]
    if "bias" in self.head:
      logits += self.head["bias"][...]
    return {"output": x, "embedding": embedding, "logits": logits}
