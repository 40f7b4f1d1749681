"""What a decoder is made of: its sizes, its rotary positions, and where the families of language models differ."""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from kdflax.models.layers import Dtype, check_widths

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions: with which frequencies queries and keys turn.

  Attributes:
    base: of the powers that the wave lengths are.
    scaling: how a longer context is reached. "linear" divides all frequencies by `factor`; "dynamic" raises the base
      with the length of the batch, or of its cache, beyond the `max_length` of the model; "llama3" and "yarn" divide
      low frequencies and leave high ones, each with a ramp of its own.
    factor: by how much the context grows.
    original_length: of the context before it grew, in tokens; of "llama3" and "yarn".
    low_frequency_factor, high_frequency_factor: ends of the ramp of "llama3", in turns over the original context.
    beta_fast, beta_slow: the same of "yarn".
    attention_factor: what "yarn" multiplies rotated queries and keys by; None is what its paper says.
    truncate: whether the ramp of "yarn" starts and ends at whole dimensions.

  Reference: Bowen Peng, Jeffrey Quesnelle, Honglu Fan and Enrico Shippole, "YaRN: Efficient Context Window Extension of
  Large Language Models", 2023, arXiv 2309.00071, which describes the others as well; "llama3" is that of the Llama 3.1
  checkpoints.
  """

  base: float = 10_000.0
  scaling: Literal["linear", "dynamic", "llama3", "yarn"] | None = None
  factor: float = 1.0
  original_length: int = 0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self) -> None:
    if self.scaling not in (None, "linear", "dynamic", "llama3", "yarn"):
      raise ValueError(f'scaling must be "linear", "dynamic", "llama3", "yarn" or None; got {self.scaling!r}')
    if not self.base > 1 or not self.factor >= 1:
      raise ValueError(f"base must be above 1 and factor at least 1; got {self.base} and {self.factor}")
    if self.scaling in ("llama3", "yarn") and self.original_length < 1:
      raise ValueError(f"scaling={self.scaling!r} needs original_length, the context before it grew")

  def frequencies(self, width: int, length: int, max_length: int) -> np.ndarray:
    """Returns the angles per position, `[width / 2]`, for a head of this width and a batch of this length."""
    base = self.base
    if self.scaling == "dynamic":
      stretch = self.factor * max(length, max_length) / max_length - (self.factor - 1)
      base *= stretch ** (width / (width - 2))
    plain = base ** (-np.arange(0, width, 2) / width)
    if self.scaling == "linear":
      return plain / self.factor
    if self.scaling == "llama3":
      turns = self.original_length * plain / (2 * math.pi)
      kept = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
    elif self.scaling == "yarn":
      first, last = self._ramp(width)
      kept = 1 - (np.arange(width // 2) - first) / (last - first)
    else:
      return plain
    kept = np.clip(kept, 0, 1)
    return plain * kept + plain / self.factor * (1 - kept)

  def magnitude(self) -> float:
    """Returns what rotated queries and keys are multiplied by."""
    if self.scaling != "yarn":
      return 1.0
    return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

  def _ramp(self, width: int) -> tuple[float, float]:
    """The dimensions between which "yarn" goes over from frequencies that stay to frequencies that are divided."""
    turning = lambda turns: width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))
    first, last = turning(self.beta_fast), turning(self.beta_slow)
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    return first, last if last > first else first + 1e-3


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The sizes of a decoder, and where Llama, Qwen and Gemma differ. The defaults are those of a small Llama.

  Attributes:
    vocabulary: how many tokens there are, the rows of embedding and head.
    width: of the hidden states.
    depth: how many layers.
    heads: of the queries.
    kv_heads: of keys and values, each shared by `heads / kv_heads` queries; 0 is as many as `heads`.
    head_width: of one head; 0 is `width / heads`.
    mlp_width: of the gated layer; 0 is 8/3 of `width`, rounded up to a multiple of 8.
    max_length: the context that the model is made for, in tokens. Only "dynamic" rotary positions look at it.
    activation: of the gate: "silu" is SwiGLU, "gelu_tanh" the GeGLU of Gemma.
    norm_epsilon: added to the mean square in RMSNorm.
    unit_offset: whether RMSNorm multiplies by 1 + scale (Gemma) instead of scale.
    post_norms: whether attention and MLP are normalised before they are added as well (Gemma).
    qk_norm: whether each head of queries and keys is normalised (Qwen 3, Gemma 3).
    qkv_bias, output_bias, mlp_bias: whether these projections have biases (`qkv_bias`: Qwen 2).
    embedding_scale: what embeddings are multiplied by; sqrt(width) in Gemma.
    query_scale: what the products of queries and keys are multiplied by; None is 1 / sqrt(head_width).
    attention_soft_cap: c > 0 turns these products z into `c tanh(z / c)` (Gemma 2).
    logit_soft_cap: the same of the logits. A loss that takes hidden states and a head needs it as well.
    rope: rotary positions.
    local_rope: those of layers that see only a window, where they differ (Gemma 3).
    window: how many tokens a sliding layer sees, itself included.
    sliding: for each layer, whether it is limited to the window; empty is all if there is a window.
    tied: whether the embedding is the head.
    dtype: to compute in; None is that of the params.
    param_dtype: of the params that `init` makes.
    remat: what the backward pass computes again instead of keeping it: "layer" keeps the input of each layer,
      "products" what matrices were multiplied to as well, None keeps all. It takes `scan`: of layers that are compiled
      one by one XLA may compute all again at once.
    scan: whether the layers are one compiled body that runs `depth` times, or `depth` bodies, which take longer to
      compile and may run faster. The params are stacked either way.
    attention: "cudnn" for the flash attention of NVIDIA's library, which takes float16 and bfloat16 and no soft cap;
      None is XLA's.

  Raises:
    ValueError: for sizes below 1 or that do not divide, an activation or another choice of unknown name, a soft cap,
      scale or epsilon of 0 or less, or a window and layers that do not fit.
  """

  vocabulary: int
  width: int
  depth: int
  heads: int
  kv_heads: int = 0
  head_width: int = 0
  mlp_width: int = 0
  max_length: int = 2048
  activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
  norm_epsilon: float = 1e-6
  unit_offset: bool = False
  post_norms: bool = False
  qk_norm: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  embedding_scale: float = 1.0
  query_scale: float | None = None
  attention_soft_cap: float | None = None
  logit_soft_cap: float | None = None
  rope: Rope = Rope()
  local_rope: Rope | None = None
  window: int | None = None
  sliding: tuple[bool, ...] = ()
  tied: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = np.float32
  remat: Literal["layer", "products"] | None = None
  scan: bool = True
  attention: Literal["xla", "cudnn"] | None = None

  def __post_init__(self) -> None:
    set_to = lambda name, value: object.__setattr__(self, name, getattr(self, name) or value)
    check_widths(vocabulary=[self.vocabulary], width=[self.width], depth=[self.depth], heads=[self.heads])
    if not self.head_width and self.width % self.heads:
      raise ValueError(f"width {self.width} is no multiple of heads {self.heads}; give head_width, or other sizes")
    set_to("kv_heads", self.heads)
    set_to("head_width", self.width // self.heads)
    set_to("mlp_width", -(-self.width // 3) * 8)
    object.__setattr__(self, "sliding", tuple(map(bool, self.sliding)))
    self._check()

  @property
  def slides(self) -> tuple[bool, ...]:
    """For each layer, whether it is limited to the window."""
    return self.sliding or (self.window is not None,) * self.depth

  @property
  def head_name(self) -> str:
    """Where the head lies in the params: a Term reads it at `f"params.student.{config.head_name}"`."""
    return "embedding" if self.tied else "head"

  def _check(self) -> None:
    check_widths(
      kv_heads=[self.kv_heads], head_width=[self.head_width], mlp_width=[self.mlp_width], max_length=[self.max_length]
    )
    if self.heads % self.kv_heads or self.head_width % 2:
      raise ValueError(
        f"heads must be a multiple of kv_heads, and head_width even; got {self.heads}, {self.kv_heads} and"
        f" {self.head_width}"
      )
    choices: dict[str, tuple[Any, ...]] = {
      "activation": ACTIVATIONS,
      "remat": (None, "layer", "products"),
      "attention": (None, "xla", "cudnn"),
    }
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
    for name in ("norm_epsilon", "embedding_scale", "query_scale", "attention_soft_cap", "logit_soft_cap", "window"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}; leave it out for none")
    if len(self.slides) != self.depth or any(self.slides) != (self.window is not None):
      raise ValueError(
        f"sliding says for each of {self.depth} layers whether it is limited to the window, {self.window}; got"
        f" {self.sliding}; leave out both for no windows, or sliding alone if all layers have one"
      )
    if self.attention == "cudnn" and self.attention_soft_cap is not None:
      raise ValueError('attention="cudnn" has no attention_soft_cap; leave attention out')
