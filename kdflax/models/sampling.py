"""Texts of a decoder, in one compiled program of fixed shape."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kdflax.model import PyTree
from kdflax.models.decoder import decoder, make_cache
from kdflax.models.decoder_config import DecoderConfig
from kdflax.models.layers import check_widths


class Sampled(NamedTuple):
  """Prompts with what was sampled behind them, each row filled up with the padding token.

  `tokens` is `[batch, prompt + new_tokens]`; `generated`, a bool of that shape, says which of them were sampled, the
  stop token included; `lengths` `[batch]` counts prompt and sampled tokens. A loss on what was sampled takes
  `losses.shift_labels(tokens, generated)`.
  """

  tokens: jax.Array
  generated: jax.Array
  lengths: jax.Array


Sampler = Callable[..., Sampled]


def make_sampler(
  config: DecoderConfig,
  *,
  new_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  stop_tokens: Sequence[int] = (),
  pad_token: int = 0,
) -> Sampler:
  """Make a compiled function that continues prompts, one token after another with a cache of keys and values.

  Prompts of different lengths are padded on the right. A row depends on its prompt, its number and the key alone:
  neither on the others nor on their padding. It is computed until `new_tokens`, or until all rows have stopped.

  Args:
    config: of the decoder whose params are given later.
    new_tokens: how many tokens to sample for each row.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: to sample from the k likeliest tokens only.
    top_p: to sample only from the likeliest tokens that have this probability together, at the temperature and among
      the top k.
    stop_tokens: after each of these a row ends.
    pad_token: what stands behind the end.

  Returns:
    `sample(params, prompts, key, lengths=None) -> Sampled`, jitted: prompts are integers `[batch, length]`, `lengths`
    `[batch]` says how many of them count, at least 1; all by default. For a low-rank student merge the params first.

  Raises:
    ValueError: for a number of tokens or a top_k below 1, a temperature below 0, a top_p outside (0, 1], a token that
      is not of the vocabulary; when called, for prompts or lengths of another shape, or known lengths that do not fit.

  Examples:
    >>> config = DecoderConfig(vocabulary=11, width=8, depth=1, heads=2)
    >>> params, _ = decoder(config).init(jax.random.key(0), {"tokens": jnp.zeros((1, 1), int)})
    >>> sample = make_sampler(config, new_tokens=2, temperature=0.0)
    >>> sampled = sample(params, jnp.array([[3, 4, 5], [6, 0, 0]]), jax.random.key(0), lengths=jnp.array([3, 1]))
    >>> print(sampled.tokens.shape, sampled.lengths, sampled.generated[1])
    (2, 5) [5 3] [False  True  True False False]
  """
  check_widths(new_tokens=[new_tokens], top_k=[] if top_k is None else [top_k])
  if not temperature >= 0:
    raise ValueError(f"temperature must be at least 0, got {temperature}")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"top_p must be in (0, 1], got {top_p}")
  foreign = [token for token in (*stop_tokens, pad_token) if not 0 <= token < config.vocabulary]
  if foreign:
    raise ValueError(f"tokens {foreign} are not of the vocabulary of {config.vocabulary}")
  model = decoder(config)
  stops = np.asarray(stop_tokens, np.int32)  # of NumPy: a sampler made inside of one program may serve another

  def draw(logits: jax.Array, keys: jax.Array, step: jax.Array | int) -> jax.Array:
    if temperature == 0:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    likely = _truncated(logits / temperature, top_k, top_p)
    own = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    return jax.vmap(jax.random.categorical)(own, likely).astype(jnp.int32)

  @jax.jit
  def run(params: PyTree, prompts: jax.Array, key: jax.Array, lengths: jax.Array) -> Sampled:
    batch, size = prompts.shape
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    cache = make_cache(config, batch, size + new_tokens, config.dtype or params["embedding"].dtype)

    def ask(cache: Any, **entries: jax.Array) -> tuple[jax.Array, Any]:
      outputs, _ = model.apply(params, {}, {**entries, "cache": cache}, train=False)
      return outputs["logits"][:, 0], outputs["cache"]

    def accept(drawn: jax.Array, step: jax.Array | int, texts: jax.Array, done: jax.Array, counts: jax.Array) -> Any:
      texts = texts.at[:, step].set(jnp.where(done, pad_token, drawn))
      return texts, done | jnp.isin(drawn, stops), counts + ~done

    def following(carry: Any) -> Any:
      step, cache, texts, done, counts = carry
      last = jax.lax.dynamic_slice_in_dim(texts, step - 1, 1, axis=1)
      logits, cache = ask(cache, tokens=last, positions=(lengths + step - 1)[:, None])
      return (step + 1, cache, *accept(draw(logits, keys, step), step, texts, done, counts))

    exists = jnp.arange(size) < lengths[:, None]
    logits, cache = ask(
      cache, tokens=prompts, segments=exists, select=lengths[:, None] - 1, positions=_counted(prompts)
    )
    texts = jnp.full((batch, new_tokens), pad_token, jnp.int32)
    nothing = (texts, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))
    start = (jnp.int32(1), cache, *accept(draw(logits, keys, 0), 0, *nothing))
    goes_on = lambda carry: (carry[0] < new_tokens) & ~carry[3].all()
    _, _, texts, _, counts = jax.lax.while_loop(goes_on, following, start)
    return _joined(prompts, texts, lengths, counts, pad_token)

  def sample(params: PyTree, prompts: jax.Array, key: jax.Array, lengths: jax.Array | None = None) -> Sampled:
    prompts = jnp.asarray(prompts)
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer) or 0 in prompts.shape:
      raise ValueError(f"prompts must be integers of shape [batch, length], got {prompts.dtype} of {prompts.shape}")
    lengths = jnp.full(prompts.shape[0], prompts.shape[1]) if lengths is None else jnp.asarray(lengths)
    if lengths.shape != prompts.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
      raise ValueError(f"lengths must be integers of shape {prompts.shape[:1]}, got {lengths.dtype} of {lengths.shape}")
    if not isinstance(lengths, Tracer) and not bool(((lengths > 0) & (lengths <= prompts.shape[1])).all()):
      raise ValueError(f"lengths must be from 1 to that of the prompts, {prompts.shape[1]}; got {lengths}")
    return run(params, prompts.astype(jnp.int32), key, lengths.astype(jnp.int32))

  return sample


def _counted(tokens: jax.Array) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


def _truncated(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
  """Logits with -inf for what shall not be sampled."""
  if top_k is not None and top_k < logits.shape[-1]:
    logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][..., -1:], -jnp.inf, logits)
  if top_p is not None and top_p < 1:
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of those that are likelier: 0 for the first
    least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def _joined(prompts: jax.Array, texts: jax.Array, lengths: jax.Array, counts: jax.Array, pad_token: int) -> Sampled:
  """Moves the texts up to the ends of their prompts."""
  place = jnp.arange(prompts.shape[1] + texts.shape[1])
  after = place - lengths[:, None]
  ends = (lengths + counts)[:, None]
  own = jnp.take_along_axis(prompts, jnp.minimum(place, prompts.shape[1] - 1)[None], axis=1)
  new = jnp.take_along_axis(texts, jnp.clip(after, 0, texts.shape[1] - 1), axis=1)
  tokens = jnp.where(after < 0, own, jnp.where(place < ends, new, pad_token))
  return Sampled(tokens, (after >= 0) & (place < ends), lengths + counts)
