"""One decoder for the families of language models that are distilled: Llama, Qwen and Gemma."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kdflax.model import Model, Outputs, PyTree
from kdflax.models.adapters import from_nnx
from kdflax.models.attention import Mask, Past, Rotation, attended, capped, extended, masks, places, rotated, rotation
from kdflax.models.decoder_config import DecoderConfig
from kdflax.models.layers import Activation

_ACTIVATIONS: dict[str, Activation] = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
Ranks = tuple[tuple[str, int], ...]


class FactoredModel(Model):
  """A model that reads low-rank factors, `down` and `up`, where they stand beside a `kernel` in its params."""

  __slots__ = ()


def decoder(config: DecoderConfig, *, head: bool = True, features: bool = False) -> Model:
  """Build a language model: RMSNorm, rotary positions, grouped-query attention and a gated MLP in each layer.

  It reads of the batch

  - `tokens`: integer `[batch, length]`;
  - `segments`, where given: integer or bool `[batch, length]`. A token sees those of its own segment; 0 or False is
    padding, which none sees. Several texts in one row are numbered from 1;
  - `positions`, where given: integer `[batch, length]`. By default they count from 0 in each segment;
  - `select`, where given: integer `[batch, n]`, of which tokens hidden states and logits are wanted;
  - `cache`, where given: what `make_cache` made or an earlier call returned. The tokens follow those in it.

  The params are `embedding` [vocabulary, width], `head` of the same shape unless it is tied, `norm`, and `layers`, each
  array of which has the layers as its first axis. A loss that takes hidden states and a head reads the latter at
  `"params.student.head"` or `"params.student.embedding"`; it is there without `head=True` as well.

  Kernels start normal with variance 1 / inputs, those that write to the hidden states divided by sqrt(2 depth),
  embedding and head with a standard deviation of 0.02.

  Args:
    config: its sizes and kinds.
    head: whether to return logits. Without, nothing of the size of the vocabulary is made but the embedding.
    features: whether to return the hidden states behind each layer, for losses on features.

  Returns:
    A model with `hidden` [batch, length, width] behind the last norm; with `head`, `logits` [batch, length, vocabulary]
    in float32 or wider; with `features`, `features` of `layer1`, `layer2`, ... [batch, length, width]; where there was
    one, the `cache` with what was added.

  Raises:
    ValueError: when called, if tokens are no integers of two axes, another entry has another shape, or more tokens
      follow than the cache is long.

  Examples:
    >>> config = DecoderConfig(vocabulary=11, width=8, depth=2, heads=2)
    >>> batch = {"tokens": jnp.zeros((1, 3), int)}
    >>> model = decoder(config)
    >>> params, state = model.init(jax.random.key(0), batch)
    >>> outputs, _ = model.apply(params, state, batch, train=False)
    >>> print(outputs["hidden"].shape, outputs["logits"].shape, params["head"].shape)
    (1, 3, 8) (1, 3, 11) (11, 8)
  """

  @functools.cache
  def build(ranks: Ranks) -> Model:
    return from_nnx(lambda rngs: _Decoder(_Build(config, ranks, rngs), head, features), input=None)

  def apply(params: PyTree, state: PyTree, batch: Any, *, train: bool, key: jax.Array | None = None) -> Any:
    return build(_ranks(params)).apply(params, state, batch, train=train, key=key)

  return FactoredModel(build(()).init, apply)


def make_cache(config: DecoderConfig, batch_size: int, length: int, dtype: Any = None) -> dict[str, jax.Array]:
  """Make an empty cache of keys and values, for tokens that come one after another.

  Args:
    config: of the decoder.
    batch_size: how many rows.
    length: how many tokens it can hold for each row, prompt included.
    dtype: of keys and values; by default that in which the decoder computes, or that of its params as `init` makes
      them.

  Returns:
    `keys` and `values` [depth, batch, length, kv_heads, head_width]; for each token its `positions` and `segments`
    [batch, length], 0 where there is none yet; and `index`, how many there are.

  Examples:
    >>> config = DecoderConfig(vocabulary=11, width=8, depth=2, heads=2)
    >>> print(make_cache(config, 3, 5)["keys"].shape)
    (2, 3, 5, 2, 4)
  """
  shape = (config.depth, batch_size, length, config.kv_heads, config.head_width)
  dtype = dtype or config.dtype or config.param_dtype
  tokens = jnp.zeros((batch_size, length), jnp.int32)
  arrays = {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}
  return {**arrays, "positions": tokens, "segments": tokens, "index": jnp.zeros((), jnp.int32)}


class _Build(NamedTuple):
  """What layers are made of: sizes, the ranks of low-rank additions by path in a layer, and random numbers."""

  config: DecoderConfig
  ranks: Ranks
  rngs: nnx.Rngs


class _Norm(nnx.Module):
  """RMSNorm, in float32 or wider."""

  def __init__(self, width: int, config: DecoderConfig) -> None:
    start = jnp.zeros if config.unit_offset else jnp.ones
    self.scale = nnx.Param(start((width,), config.param_dtype))
    self.epsilon, self.offset = config.norm_epsilon, float(config.unit_offset)

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
    return (normed * (self.offset + self.scale.get_value().astype(wide.dtype))).astype(x.dtype)


class _Linear(nnx.Linear):
  """A projection, with a low-rank addition where the params have one."""

  def __init__(self, inputs: int, outputs: int, bias: bool, build: _Build, path: str, shrink: float = 1.0) -> None:
    config, rank = build.config, dict(build.ranks).get(path, 0)
    init = jax.nn.initializers.normal(1 / math.sqrt(inputs * shrink))
    types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    super().__init__(inputs, outputs, use_bias=bias, kernel_init=init, rngs=build.rngs, **types)
    self.down = nnx.Param(jnp.zeros((inputs, rank))) if rank else None
    self.up = nnx.Param(jnp.zeros((rank, outputs))) if rank else None

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    projected = super().__call__(inputs, out_sharding)
    if self.down is None or self.up is None:
      return projected
    down, up = (factor.get_value().astype(projected.dtype) for factor in (self.down, self.up))
    return projected + (inputs.astype(projected.dtype) @ down) @ up


class _Attention(nnx.Module):
  def __init__(self, build: _Build) -> None:
    config = build.config
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    self.query = _Linear(config.width, queries, config.qkv_bias, build, "attention/query")
    self.key = _Linear(config.width, keys, config.qkv_bias, build, "attention/key")
    self.value = _Linear(config.width, keys, config.qkv_bias, build, "attention/value")
    self.output = _Linear(queries, config.width, config.output_bias, build, "attention/output", 2 * config.depth)
    self.query_norm = _Norm(config.head_width, config) if config.qk_norm else None
    self.key_norm = _Norm(config.head_width, config) if config.qk_norm else None
    self.config = config

  def __call__(self, x: jax.Array, rotation: Rotation, mask: Mask, past: Past | None) -> tuple[jax.Array, Any]:
    by_head = lambda y: y.reshape(*x.shape[:2], -1, self.config.head_width)
    query, key, value = by_head(self.query(x)), by_head(self.key(x)), by_head(self.value(x))
    query = query if self.query_norm is None else self.query_norm(query)
    key = key if self.key_norm is None else self.key_norm(key)
    query, key = rotated(query, rotation), rotated(key, rotation)
    if past is not None:
      past = past.followed_by(key, value)
      key, value = past.keys[past.layer].astype(key.dtype), past.values[past.layer].astype(value.dtype)
    mixed = attended(query, key, value, mask, self.config)
    return self.output(mixed.reshape(*x.shape[:2], -1)), past


class _Gated(nnx.Module):
  """SwiGLU or GeGLU: `down(act(gate x) * up x)`."""

  def __init__(self, build: _Build) -> None:
    config = build.config
    self.gate = _Linear(config.width, config.mlp_width, config.mlp_bias, build, "mlp/gate")
    self.up = _Linear(config.width, config.mlp_width, config.mlp_bias, build, "mlp/up")
    self.down = _Linear(config.mlp_width, config.width, config.mlp_bias, build, "mlp/down", 2 * config.depth)
    self.activation = config.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(_ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class _Layer(nnx.Module):
  def __init__(self, build: _Build) -> None:
    config = build.config
    self.attention_norm, self.mlp_norm = _Norm(config.width, config), _Norm(config.width, config)
    self.attention, self.mlp = _Attention(build), _Gated(build)
    self.attention_post_norm = _Norm(config.width, config) if config.post_norms else None
    self.mlp_post_norm = _Norm(config.width, config) if config.post_norms else None

  def __call__(self, x: jax.Array, rotation: Rotation, mask: Mask, past: Past | None) -> tuple[jax.Array, Any]:
    added, past = self.attention(self.attention_norm(x), rotation, mask, past)
    x = x + (added if self.attention_post_norm is None else self.attention_post_norm(added))
    added = self.mlp(self.mlp_norm(x))
    return x + (added if self.mlp_post_norm is None else self.mlp_post_norm(added)), past


class _Decoder(nnx.Module):
  def __init__(self, build: _Build, head: bool, features: bool) -> None:
    config, rngs = build.config, build.rngs
    shape, init = (config.vocabulary, config.width), jax.nn.initializers.normal(0.02)
    self.embedding = nnx.Param(init(rngs.params(), shape, config.param_dtype))
    self.layers = nnx.vmap(lambda rngs: _Layer(build._replace(rngs=rngs)))(rngs.split(config.depth))
    self.norm = _Norm(config.width, config)
    self.head = None if config.tied else nnx.Param(init(rngs.params(), shape, config.param_dtype))
    self.config, self.returns_logits, self.returns_features = config, head, features

  def __call__(self, batch: Mapping[str, Any]) -> Outputs:
    config, (tokens, cache) = self.config, _checked(batch, self.config)
    positions, segments = places(batch, tokens, cache)
    seen = None if cache is None else extended(cache, positions, segments)
    x = jnp.take(self.embedding.get_value(), tokens, axis=0)  # a token that does not exist gives NaN
    x = x.astype(config.dtype or x.dtype)
    x = x * jnp.asarray(config.embedding_scale, x.dtype)
    x, past, features = self._through_layers(x, positions, masks(config, positions, segments, seen), cache)
    if "select" in batch:
      x = jnp.take_along_axis(x, jnp.asarray(batch["select"])[..., None], axis=1)
    outputs: Outputs = {"hidden": self.norm(x)}
    if self.returns_logits:
      outputs["logits"] = _logits(outputs["hidden"], (self.head or self.embedding).get_value(), config)
    if self.returns_features:
      outputs["features"] = {f"layer{index + 1}": features[index] for index in range(config.depth)}
    if seen is not None:
      outputs["cache"] = seen | {"keys": past.keys, "values": past.values}
    return outputs

  def _through_layers(
    self, x: jax.Array, positions: jax.Array, masks: tuple[Mask, Mask], cache: Mapping[str, jax.Array] | None
  ) -> tuple[jax.Array, Any, Any]:
    """Runs the layers; one body for all of them, so what differs between layers is chosen by number."""
    config, (graph, states) = self.config, nnx.split(self.layers)
    length = positions.shape[1] if cache is None else cache["positions"].shape[1]
    wide = rotation(config.rope, positions, length, config)
    near = wide if config.local_rope is None else rotation(config.local_rope, positions, length, config)
    choose = _chooser(config.slides)

    def body(carry: tuple[jax.Array, Any], layer: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, Any]:
      (x, past), (state, index, slides) = carry, layer
      rotation, mask = choose(slides, (near, masks[1]), (wide, masks[0]))
      past = None if past is None else past._replace(layer=index)
      x, past = nnx.merge(graph, state)(x, rotation, mask, past)
      return (x, past), x if self.returns_features else None

    past = None if cache is None else Past(cache["keys"], cache["values"], jnp.int32(0), cache["index"])
    numbered = (states, jnp.arange(config.depth, dtype=jnp.int32), jnp.asarray(config.slides))
    unroll = 1 if config.scan else config.depth
    (x, past), features = jax.lax.scan(_remembering(body, config), (x, past), numbered, unroll=unroll)
    return x, past, features


def _ranks(params: PyTree) -> Ranks:
  """The ranks of the factors that stand beside kernels."""
  blocks = params["layers"].items() if isinstance(params, Mapping) and "layers" in params else ()
  parts = [(f"{name}/{part}", leaves) for name, block in blocks for part, leaves in block.items()]
  return tuple(
    (path, leaves["down"].shape[-1]) for path, leaves in parts if isinstance(leaves, Mapping) and "down" in leaves
  )


def _remembering(body: Callable[..., Any], config: DecoderConfig) -> Callable[..., Any]:
  """The body of the scan, with what its backward pass shall compute again."""
  if config.remat is None:
    return body
  policy = None if config.remat == "layer" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(body, policy=policy, prevent_cse=not config.scan)


def _chooser(sliding: tuple[bool, ...]) -> Callable[[jax.Array, Any, Any], Any]:
  """Chooses what a layer needs: without looking, where all layers are of one kind."""
  if len(set(sliding)) == 1:
    return lambda slides, near, wide: near if sliding[0] else wide
  return lambda slides, near, wide: jax.tree.map(lambda a, b: jnp.where(slides, a, b), near, wide)


def _logits(hidden: jax.Array, head: jax.Array, config: DecoderConfig) -> jax.Array:
  kind = jnp.promote_types(hidden.dtype, jnp.float32)
  logits = jnp.einsum("bld,vd->blv", hidden, head.astype(hidden.dtype), preferred_element_type=kind)
  return capped(logits, config.logit_soft_cap)


def _checked(batch: Mapping[str, Any], config: DecoderConfig) -> tuple[jax.Array, Mapping[str, jax.Array] | None]:
  """Returns tokens and cache."""
  if not isinstance(batch, Mapping) or "tokens" not in batch:
    there = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"a decoder reads the entry 'tokens' of the batch; got {there}")
  tokens = jnp.asarray(batch["tokens"])
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens must be integers of shape [batch, length], got {tokens.dtype} of {tokens.shape}")
  for name in ("positions", "segments"):
    if name in batch and jnp.shape(batch[name]) != tokens.shape:
      raise ValueError(f"{name} must have the shape of tokens {tokens.shape}, got {jnp.shape(batch[name])}")
  if "select" in batch and (jnp.ndim(batch["select"]) != 2 or jnp.shape(batch["select"])[0] != tokens.shape[0]):
    raise ValueError(f"select must have the shape [{tokens.shape[0]}, n], got {jnp.shape(batch['select'])}")
  cache = batch.get("cache")
  if cache is not None:
    rows, space = cache["positions"].shape
    expected = (config.depth, tokens.shape[0], space, config.kv_heads, config.head_width)
    if cache["keys"].shape != expected:
      raise ValueError(f"the cache must be of {expected} for these tokens; got {cache['keys'].shape} of {rows} rows")
    if tokens.shape[1] > space:
      raise ValueError(f"{tokens.shape[1]} tokens do not fit a cache of {space}; make it longer")
  return tokens, cache
