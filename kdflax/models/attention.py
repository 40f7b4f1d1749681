"""What a token of a decoder sees of others: rotary positions, masks of texts and windows, keys and values kept."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdflax.models.decoder_config import DecoderConfig, Rope

_FIRST = np.int32(0)  # a number of Python would be wider where float64 is allowed
Rotation = tuple[jax.Array, jax.Array]  # cosine and sine, [batch or 1, length, 1, head_width / 2]
Mask = jax.Array | None  # bool [batch or 1, 1, queries, keys]; None is causal


class Past(NamedTuple):
  """Keys and values of all layers, and where the next ones go."""

  keys: jax.Array
  values: jax.Array
  layer: jax.Array | int
  place: jax.Array

  def followed_by(self, key: jax.Array, value: jax.Array) -> "Past":
    """With the keys and values of further tokens in this layer."""
    write = lambda old, new: jax.lax.dynamic_update_slice(
      old, new[None].astype(old.dtype), (self.layer, _FIRST, self.place, _FIRST, _FIRST)
    )
    return self._replace(keys=write(self.keys, key), values=write(self.values, value))


def rotation(rope: Rope, positions: jax.Array, length: int, config: DecoderConfig) -> Rotation:
  """By how much queries and keys turn at these positions."""
  frequencies = jnp.asarray(rope.frequencies(config.head_width, length, config.max_length), jnp.float32)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles) * rope.magnitude(), jnp.sin(angles) * rope.magnitude()


def rotated(x: jax.Array, rotation: Rotation) -> jax.Array:
  """Turns the first half of each head against the second, as the checkpoints of all these families do."""
  cosine, sine = rotation
  first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
  turned = (first * cosine - second * sine, second * cosine + first * sine)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attended(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, config: DecoderConfig) -> jax.Array:
  """Grouped-query attention, `[batch, queries, heads, head_width]`."""
  scale = config.query_scale or config.head_width**-0.5
  if config.attention_soft_cap is not None:
    return _attended_capped(query, key, value, mask, config, scale)
  causal: dict[str, Any] = {"mask": mask} if mask is not None else {"is_causal": True}
  if mask is None and config.window is not None and config.slides[0]:
    causal["local_window_size"] = (config.window - 1, 0)
  return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation=config.attention, **causal)


def _attended_capped(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, config: DecoderConfig, scale: float
) -> jax.Array:
  """The same with a soft cap between products and softmax, which `dot_product_attention` has no place for."""
  kind = jnp.promote_types(query.dtype, jnp.float32)
  grouped = query.reshape(*query.shape[:2], config.kv_heads, -1, config.head_width)
  scores = scale * jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=kind)
  assert mask is not None
  scores = jnp.where(mask[:, :, None], capped(scores, config.attention_soft_cap), jnp.finfo(kind).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)


def masks(
  config: DecoderConfig, positions: jax.Array, segments: jax.Array | None, seen: Mapping[str, jax.Array] | None
) -> tuple[Mask, Mask]:
  """What a query sees of the keys: in a layer without a window, and in one with it."""
  plain = segments is None and seen is None and len(set(config.slides)) == 1
  if plain and config.attention_soft_cap is None:
    return None, None  # causal, which attention knows how to do without an array
  length = positions.shape[1]
  rows = jnp.arange(length) if seen is None else seen["index"] - length + jnp.arange(length)
  key_positions, key_segments = (positions, segments) if seen is None else (seen["positions"], seen["segments"])
  mask = jnp.arange(key_positions.shape[1]) <= rows[:, None]
  if key_segments is not None:
    own = jnp.ones_like(positions) if segments is None else segments
    mask = mask & (own[:, :, None] == key_segments[:, None]) & (key_segments != 0)[:, None]
  near = mask if config.window is None else mask & (positions[:, :, None] - key_positions[:, None] < config.window)
  expand = lambda mask: jnp.expand_dims(mask, tuple(range(4 - mask.ndim)) if mask.ndim < 3 else 1)
  return expand(mask), expand(near)


def places(
  batch: Mapping[str, Any], tokens: jax.Array, cache: Mapping[str, jax.Array] | None
) -> tuple[jax.Array, jax.Array | None]:
  """Positions and segments of the tokens; segments only where there are some to keep apart."""
  segments = None if "segments" not in batch else jnp.asarray(batch["segments"]).astype(jnp.int32)
  counted = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  if "positions" in batch:
    positions = jnp.asarray(batch["positions"]).astype(jnp.int32)
  elif cache is not None:
    positions = counted + cache["index"]
  elif segments is None:
    positions = counted
  else:
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    positions = counted - jax.lax.cummax(jnp.where(starts, counted, 0), axis=1)
  return positions, segments


def extended(cache: Mapping[str, jax.Array], positions: jax.Array, segments: jax.Array | None) -> dict[str, jax.Array]:
  """The cache with the places of further tokens; their keys and values follow layer by layer."""
  shape = (cache["positions"].shape[0], positions.shape[1])
  add = lambda old, new: jax.lax.dynamic_update_slice(old, jnp.broadcast_to(new, shape), (_FIRST, cache["index"]))
  return {
    **cache,
    "positions": add(cache["positions"], positions),
    "segments": add(cache["segments"], jnp.ones((), jnp.int32) if segments is None else segments),
    "index": cache["index"] + positions.shape[1],
  }


def capped(z: jax.Array, cap: float | None) -> jax.Array:
  """Numbers bent into (-cap, cap)."""
  return z if cap is None else cap * jnp.tanh(z / cap)
