"""Learnable connectors: small models that read another model's output, or several, by context path.

A connector is an ordinary `Model` under its own name. `{"hint": conv_connector("student.features.stage2", 64)}` makes
`hint.output` in the context, and a Term compares that with the teacher's map. Input widths come from the example.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdflax.model import Model, Outputs, PyTree
from kdflax.models.adapters import from_nnx
from kdflax.models.layers import Activation, Convolution, check_rank, check_widths, conv_init, head_init
from kdflax.models.low_rank import orthogonal_matrix
from kdflax.numerics.safe import l2_normalize

_MAP = "[batch, height, width, channels]"


def linear_connector(path: str, width: int, *, bias: bool = True) -> Model:
  """Map the last axis linearly to another width.

  Args:
    path: context path of an array [batch, ..., features].
    width: the features of the output.
    bias: whether to add a learned bias, which starts at zero.

  Returns:
    A model with `output` [batch, ..., width].

  Raises:
    ValueError: if the width is not positive or the input has no feature axis.
  """
  check_widths(width=(width,))

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _Linear:
    if len(example.shape) < 2:
      raise ValueError(f"linear_connector({path!r}) takes [batch, ..., features], got {tuple(example.shape)}")
    return _Linear(example.shape[-1], width, bias, rngs)

  return from_nnx(make, inputs=path, with_example=True)


def orthogonal_connector(path: str, width: int) -> Model:
  """Map the last axis to another width by a learned matrix with orthonormal rows, or columns where it narrows.

  It may turn features, but where the output is at least as wide it keeps all lengths and angles: what the student's
  features lack, the connector cannot make up for. It has no bias, and starts at a random rotation.

    output = x Q,   Q the first rows and columns of `orthogonal_matrix(raw)`

  Args:
    path: context path of an array [batch, ..., features].
    width: the features of the output.

  Returns:
    A model with `output` [batch, ..., width].

  Raises:
    ValueError: if the width is not positive or the input has no feature axis.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> connector, x = orthogonal_connector("student.embedding", 5), jnp.array([[3.0, 0.0, 4.0]])
    >>> params, state = connector.init(jax.random.key(0), x)
    >>> print(f"{jnp.linalg.norm(connector.apply(params, state, x, train=True)[0]['output']):.3f}")
    5.000

  Reference: Roy Miles, Ismail Elezi and Jiankang Deng, "VkD: Improving Knowledge Distillation using Orthogonal
  Projections", 2024, arXiv 2403.06213.
  """
  check_widths(width=(width,))

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _Orthogonal:
    if len(example.shape) < 2:
      raise ValueError(f"orthogonal_connector({path!r}) takes [batch, ..., features], got {tuple(example.shape)}")
    return _Orthogonal(example.shape[-1], width, rngs)

  return from_nnx(make, inputs=path, with_example=True)


def conv_connector(
  path: str,
  channels: int,
  *,
  kernel: int = 1,
  stride: int = 1,
  batch_norm: bool = False,
  activation: Activation | None = None,
) -> Model:
  """Map a feature map to another number of channels by one convolution.

  As is: the 1x1 regressor of hints. With `batch_norm=True`: the connector of overhaul distillation (OFD). With
  `batch_norm=True, activation=jax.nn.relu` and a kernel of 3: the convolutional regressor of FitNets.

  Args:
    path: context path of a feature map [batch, height, width, features].
    channels: the channels of the output.
    kernel: the side of the kernel; padding keeps the size at stride 1.
    stride: the step between windows; 2 halves the size, odd sizes round up for odd kernels.
    batch_norm: whether BatchNorm follows, in place of a bias.
    activation: applied last, if given.

  Returns:
    A model with `output` [batch, height / stride, width / stride, channels].

  Raises:
    ValueError: if a number is not positive or the input has not four axes.

  Reference: Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta and Yoshua Bengio,
  "FitNets: Hints for Thin Deep Nets", 2014, arXiv 1412.6550.
  """
  check_widths(channels=(channels,), kernel=(kernel,), stride=(stride,))

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _Sequence:
    check_rank(example, 4, f"conv_connector({path!r})", _MAP)
    layer = Convolution(example.shape[-1], channels, rngs, kernel=kernel, stride=stride, batch_norm=batch_norm)
    return _Sequence([layer], [activation or _identity])

  return from_nnx(make, inputs=path, with_example=True)


def embedding_connector(path: str, width: int = 128) -> Model:
  """Map features linearly to points on the unit sphere, for contrastive losses.

  The trailing axes are flattened first. A row that maps to exactly zero stays zero and gets no gradient; any other row
  has norm 1, however small. Norms are computed in float32 or wider.

  Args:
    path: context path of an array [batch, ...].
    width: the dimensions of the sphere's space.

  Returns:
    A model with `output` [batch, width].

  Raises:
    ValueError: if the width is not positive or the input has only the batch axis.

  Reference: Yonglong Tian, Dilip Krishnan and Phillip Isola, "Contrastive Representation Distillation", 2019,
  arXiv 1910.10699. Their code divides by the norm as it is, which is NaN at zero.
  """
  check_widths(width=(width,))

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _Embedding:
    if len(example.shape) < 2:
      raise ValueError(f"embedding_connector({path!r}) takes [batch, ...], got {tuple(example.shape)}")
    return _Embedding(math.prod(example.shape[1:]), width, rngs)

  return from_nnx(make, inputs=path, with_example=True)


def vid_connector(path: str, channels: int) -> Model:
  """Predict the teacher's feature map as a Gaussian: a mean for each position, a variance for each channel.

  The mean is three bias-free 1x1 convolutions with ReLU between them; the variance is `softplus(rho) + 1e-5` and starts
  at 5.

  Args:
    path: context path of a feature map [batch, height, width, features].
    channels: the channels of the teacher's map.

  Returns:
    A model with `output` [batch, height, width, channels], the mean, and `variance` [channels].

  Raises:
    ValueError: if `channels` is not positive or the input has not four axes.

  Reference: Sungsoo Ahn, Shell Xu Hu, Andreas Damianou, Neil D. Lawrence and Zhenwen Dai, "Variational Information
  Distillation for Knowledge Transfer", 2019, arXiv 1904.05835. `log(1 + exp(rho))`, as often written, overflows.
  """
  check_widths(channels=(channels,))

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _Gaussian:
    check_rank(example, 4, f"vid_connector({path!r})", _MAP)
    return _Gaussian(example.shape[-1], channels, rngs)

  return from_nnx(make, inputs=path, with_example=True)


def temperature(*, start: float = 1.0, span: float = 20.0, initial: float = 1.0, reversal: float | str = 1.0) -> Model:
  """Learn a temperature against the student: a curriculum that makes the soft targets harder.

  `start + span * sigmoid(theta)`. The gradient of theta is multiplied by `-reversal`, so that an optimizer that
  descends for the student ascends for theta. At `reversal` 0 the temperature stays; at -1 it descends with the student.

  Args:
    start: the lowest temperature.
    span: the highest minus the lowest.
    initial: the first theta.
    reversal: a number, or the context path of a scalar, for a schedule. The paper's rises from 0 to 1 along a cosine.

  Returns:
    A model with `temperature`, a scalar. Its `inputs` is the path given as `reversal`; otherwise it reads nothing.

  Raises:
    ValueError: if `start` or `span` is not positive.

  Reference: Zheng Li, Xiang Li, Lingfeng Yang, Borui Zhao, Renjie Song, Lei Luo, Jun Li and Jian Yang, "Curriculum
  Temperature for Knowledge Distillation", 2022, arXiv 2211.16231. Their code gives the factor the opposite sign, and
  its default of 0 leaves the temperature where it started.
  """
  if start <= 0 or span <= 0:
    raise ValueError(f"start and span must be positive, got {start} and {span}")

  def init(key: jax.Array, example: Any) -> tuple[PyTree, PyTree]:
    del key, example
    return {"theta": jnp.asarray(initial, jnp.float32)}, {}

  def apply(
    params: PyTree, state: PyTree, factor: Any, *, train: bool, key: jax.Array | None = None
  ) -> tuple[Any, PyTree]:
    del train, key
    factor = factor if isinstance(reversal, str) else reversal
    fixed = jax.lax.stop_gradient(params["theta"])
    theta = fixed - factor * (params["theta"] - fixed)  # the value is theta, the derivative -factor
    return {"temperature": start + span * jax.nn.sigmoid(theta)}, state

  return Model(init, apply, reversal if isinstance(reversal, str) else "batch")


def _identity(x: jax.Array) -> jax.Array:
  return x


class _Linear(nnx.Module):
  def __init__(self, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs) -> None:
    self.linear = nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=head_init, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    return {"output": self.linear(x)}


class _Orthogonal(nnx.Module):
  def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
    size = max(inputs, outputs)
    self.raw = nnx.Param(nnx.initializers.normal(size**-0.5)(rngs.params(), (size, size)))
    self.inputs, self.outputs = inputs, outputs

  def __call__(self, x: jax.Array) -> Outputs:
    return {"output": x @ orthogonal_matrix(self.raw[...])[: self.inputs, : self.outputs].astype(x.dtype)}


class _Sequence(nnx.Module):
  def __init__(self, layers: Sequence[Convolution], activations: Sequence[Activation]) -> None:
    self.layers = nnx.List(layers)
    self.activations = tuple(activations)

  def __call__(self, x: jax.Array, *, train: bool) -> Outputs:
    for layer, activation in zip(self.layers, self.activations, strict=True):
      x = activation(layer(x, train))
    return {"output": x}


class _Embedding(nnx.Module):
  def __init__(self, inputs: int, width: int, rngs: nnx.Rngs) -> None:
    self.linear = nnx.Linear(inputs, width, kernel_init=head_init, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    return {"output": l2_normalize(self.linear(x.reshape(x.shape[0], -1)))}


class _Gaussian(nnx.Module):
  _FLOOR = 1e-5
  _INITIAL = 5.0

  def __init__(self, inputs: int, channels: int, rngs: nnx.Rngs) -> None:
    widths = (inputs, channels, channels, channels)
    self.layers = nnx.List(
      nnx.Linear(a, b, use_bias=False, kernel_init=conv_init, rngs=rngs) for a, b in itertools.pairwise(widths)
    )
    self.rho = nnx.Param(jnp.full((channels,), jnp.log(jnp.expm1(self._INITIAL - self._FLOOR))))

  def __call__(self, x: jax.Array) -> Outputs:
    for layer in self.layers[:-1]:
      x = jax.nn.relu(layer(x))
    return {"output": self.layers[-1](x), "variance": jax.nn.softplus(self.rho[...]) + self._FLOOR}
