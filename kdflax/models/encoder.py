"""Encoders of text: BERT, which takes the weights of its family from safetensors, and a bag of tokens beside it."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdflax.model import Model, Outputs, PyTree
from kdflax.models.adapters import from_nnx
from kdflax.models.importing import Rule, import_variables
from kdflax.models.layers import Dtype, check_dropout, check_widths, dropped_out, hidden_init
from kdflax.numerics.safe import l2_normalize, safe_divide

_INPUTS = ("token_ids", "mask")
_DRAW = nnx.initializers.truncated_normal(0.02)
# Only what changes the numbers that come out; what a key says beside these is refused.
_UNDERSTOOD = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}

# From the names of PyTorch: with or without the prefix of a model with a head, norms by their new or old names.
_LINEAR = {
  "attention.self.query": "query",
  "attention.self.key": "key",
  "attention.self.value": "value",
  "attention.output.dense": "output",
  "intermediate.dense": "up",
  "output.dense": "down",
}
_NORMS = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "norm"}
_EMBEDDINGS = {"word": "tokens", "position": "positions", "token_type": "segments"}


def _rules() -> list[Rule]:
  of_layer, to_layer = r"(?:bert\.)?encoder\.layer\.(\d+)\.", r"params/layers/\1/"
  rules = [
    Rule(rf"(?:bert\.)?embeddings\.{name}_embeddings\.weight", f"params/{leaf}/embedding")
    for name, leaf in _EMBEDDINGS.items()
  ]
  norms = {r"(?:bert\.)?embeddings\.LayerNorm": "params/norm"}
  norms |= {of_layer + name.replace(".", r"\."): to_layer + leaf for name, leaf in _NORMS.items()}
  for name, leaf in norms.items():
    rules += [Rule(rf"{name}\.(?:weight|gamma)", f"{leaf}/scale"), Rule(rf"{name}\.(?:bias|beta)", f"{leaf}/bias")]
  for name, leaf in _LINEAR.items():
    pattern = of_layer + name.replace(".", r"\.")
    rules += [Rule(rf"{pattern}\.weight", f"{to_layer}{leaf}/kernel", axes=(1, 0))]
    rules += [Rule(rf"{pattern}\.bias", f"{to_layer}{leaf}/bias")]
  # The head of pretraining and a table of 0, 1, 2, ... are no part of an encoder.
  return [*rules, Rule(r"(?:bert\.)?pooler\..*|cls\..*|(?:bert\.)?embeddings\.position_ids", None)]


def bert(
  vocabulary: int,
  *,
  width: int = 384,
  layers: int = 6,
  heads: int = 12,
  hidden: int = 1536,
  positions: int = 512,
  segments: int = 2,
  epsilon: float = 1e-12,
  dropout: float = 0.0,
  dtype: Dtype | None = None,
) -> Model:
  """Build a BERT encoder whose embedding is the mean of its tokens: a sentence encoder, as a teacher or a student.

  The defaults are those of MiniLM-L6. Every text is one segment, of number 0. `load_bert` brings weights of the family.

  Args:
    vocabulary: the number of tokens.
    width: of the states.
    layers: of attention and two linear maps each, with the norm after each of both.
    heads: of attention; they share the width.
    hidden: width between the two linear maps of a layer, where the exact GELU is.
    positions: the longest text.
    segments: rows of the table of segments.
    epsilon: of the norms, added to the variance.
    dropout: the probability of dropping a unit of the embeddings and of what a layer adds, in training.
    dtype: the type to compute in; parameters stay float32.

  Returns:
    A model that reads `token_ids`, int [batch, length], and `mask`, bool [batch, length], True at tokens and False at
    padding, and returns

    - `embedding` [batch, width]: the mean over the tokens, L2-normalised;
    - `pooled` [batch, width]: the mean as it is, for heads that classify;
    - `hidden` [batch, length, width]: the last states, and `features`: `embeddings` and `layer1` to `layerN` alike.
      Those at padding mean nothing: hand `mask` on as `where`.

  Raises:
    ValueError: if a size is not positive, the heads do not divide the width, or dropout is not in [0, 1); from `init`
      and `apply`, if the inputs are not two arrays of one shape, ids and mask, or a text is too long.

  Examples:
    >>> model = bert(100, width=8, layers=1, heads=2, hidden=16, positions=4)
    >>> batch = {"token_ids": jnp.array([[5, 7, 0]]), "mask": jnp.array([[True, True, False]])}
    >>> outputs, _ = model.apply(*model.init(jax.random.key(0), batch), batch, train=False)
    >>> outputs["embedding"].shape, outputs["hidden"].shape
    ((1, 8), (1, 3, 8))

  Reference: Jacob Devlin, Ming-Wei Chang, Kenton Lee and Kristina Toutanova, "BERT: Pre-training of Deep Bidirectional
  Transformers for Language Understanding", 2018, arXiv 1810.04805. The mean instead of the first token, as Nils Reimers
  and Iryna Gurevych use it (arXiv 1908.10084).
  """
  sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads, "hidden": hidden}
  check_widths(**{name: (size,) for name, size in (sizes | {"positions": positions, "segments": segments}).items()})
  check_dropout(dropout)
  if width % heads:
    raise ValueError(f"heads={heads} must divide width={width}")

  def make(rngs: nnx.Rngs, example: Any) -> _Bert:
    _check_texts(example, positions)
    block = lambda: _Layer(width, heads, hidden, epsilon, dropout, dtype, rngs)
    return _Bert(
      (vocabulary, positions, segments), nnx.List(block() for _ in range(layers)), width, epsilon, dropout, dtype, rngs
    )

  return from_nnx(make, input=None, with_example=True)


def load_bert(
  folder: str | pathlib.Path, *, sha256: str | None = None, dtype: Dtype | None = None
) -> tuple[Model, tuple[PyTree, PyTree]]:
  """Read a BERT encoder from a folder as the Hugging Face hub has it: `config.json` and `model.safetensors`.

  Args:
    folder: with both files.
    sha256: of `model.safetensors`, where another file must not be taken for it.
    dtype: the type to compute in; parameters are float32.

  Returns:
    The model and its variables, (params, state).

  Raises:
    ValueError: if the configuration is of another kind of model, or the weights are not those it describes.
    OSError: if a file cannot be read.
  """
  folder = pathlib.Path(folder)
  try:
    said = json.loads((folder / "config.json").read_text())
    sizes = {
      "vocabulary": said["vocab_size"],
      "width": said["hidden_size"],
      "layers": said["num_hidden_layers"],
      "heads": said["num_attention_heads"],
      "hidden": said["intermediate_size"],
      "positions": said["max_position_embeddings"],
      "segments": said["type_vocab_size"],
      "epsilon": said["layer_norm_eps"],
    }
  except (ValueError, LookupError, TypeError) as error:
    raise ValueError(f"{folder / 'config.json'} does not describe a BERT: {type(error).__name__} {error}") from error
  other = {name: said[name] for name, known in _UNDERSTOOD.items() if said.get(name, known) != known}
  if other:
    wanted = {name: _UNDERSTOOD[name] for name in other}
    raise ValueError(f"{folder / 'config.json'} has {other}; load_bert knows {wanted}")
  model = bert(**sizes, dtype=dtype)
  example = {name: jax.ShapeDtypeStruct((1, 1), kind) for name, kind in zip(_INPUTS, (jnp.int32, bool), strict=True)}
  like = jax.eval_shape(lambda key: model.init(key, example), jax.random.key(0))
  return model, import_variables(folder / "model.safetensors", _rules(), like=like, sha256=sha256)


def bag_of_tokens(vocabulary: int, *, width: int, hidden: Sequence[int] = (), dropout: float = 0.0) -> Model:
  """Build the smallest encoder of text: the mean of a vector for each token, without their order.

  It does nothing but look vectors up and add them, so a text costs microseconds.

  Args:
    vocabulary: the number of tokens.
    width: of their vectors.
    hidden: widths of layers with ReLU after the mean.
    dropout: the probability of dropping a unit of the mean and of each layer, in training.

  Returns:
    A model with the inputs of `bert`, and its `embedding` and `pooled` [batch, width or hidden[-1]].

  Raises:
    ValueError: if a size is not positive, or dropout is not in [0, 1); from `init` and `apply`, as `bert`.

  Reference: Mohit Iyyer, Varun Manjunatha, Jordan Boyd-Graber and Hal Daumé III, "Deep Unordered Composition Rivals
  Syntactic Methods for Text Classification", ACL 2015.
  """
  check_widths(vocabulary=(vocabulary,), width=(width,), hidden=hidden)
  check_dropout(dropout)

  def make(rngs: nnx.Rngs, example: Any) -> _Bag:
    _check_texts(example)
    return _Bag(vocabulary, (width, *hidden), dropout, rngs)

  return from_nnx(make, input=None, with_example=True)


def _check_texts(batch: Mapping[str, Any], positions: int | None = None) -> None:
  if missing := [name for name in _INPUTS if name not in batch]:
    raise ValueError(
      f"an encoder of text reads {list(_INPUTS)}, but the batch has no {missing}; it has {sorted(batch)}"
    )
  token_ids, mask = (batch[name] for name in _INPUTS)
  if len(token_ids.shape) != 2 or mask.shape != token_ids.shape:
    raise ValueError(f"token_ids and mask must both be [batch, length]; got {token_ids.shape} and {mask.shape}")
  if not jnp.issubdtype(token_ids.dtype, jnp.integer) or mask.dtype != jnp.bool_:
    raise ValueError(f"token_ids must be integers and mask bool; got {token_ids.dtype} and {mask.dtype}")
  if positions is not None and token_ids.shape[1] > positions:
    raise ValueError(f"token_ids has length {token_ids.shape[1]}, more than positions={positions}; cut the texts")


def _mean_of_tokens(states: jax.Array, mask: jax.Array) -> Outputs:
  """The mean over the tokens, 0 for a text without any, and its direction."""
  total = jnp.where(mask[..., None], states, 0).sum(1)
  pooled = safe_divide(total, mask.sum(1, keepdims=True).astype(total.dtype))
  return {"pooled": pooled, "embedding": l2_normalize(pooled)}


class _Layer(nnx.Module):
  def __init__(
    self, width: int, heads: int, hidden: int, epsilon: float, dropout: float, dtype: Dtype | None, rngs: nnx.Rngs
  ) -> None:
    linear = lambda a, b: nnx.Linear(a, b, kernel_init=_DRAW, dtype=dtype, rngs=rngs)
    self.query, self.key, self.value = (linear(width, width) for _ in range(3))
    self.output, self.up, self.down = linear(width, width), linear(width, hidden), linear(hidden, width)
    self.attention_norm, self.norm = (_norm(width, epsilon, dtype, rngs) for _ in range(2))
    self.dropout = nnx.Dropout(dropout)
    self.heads = heads

  def __call__(self, states: jax.Array, mask: jax.Array, train: bool, rngs: nnx.Rngs | None) -> jax.Array:
    drop = lambda x: dropped_out(self.dropout, x, train, rngs)
    by_head = lambda x: x.reshape(*x.shape[:2], self.heads, -1)
    query, key, value = (by_head(linear(states)) for linear in (self.query, self.key, self.value))
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    states = self.attention_norm(states + drop(self.output(attended.reshape(states.shape))))
    return self.norm(states + drop(self.down(nnx.gelu(self.up(states), approximate=False))))


class _Bert(nnx.Module):
  def __init__(
    self,
    tables: tuple[int, int, int],
    layers: nnx.List,
    width: int,
    epsilon: float,
    dropout: float,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
  ) -> None:
    table = lambda rows: nnx.Embed(rows, width, embedding_init=_DRAW, dtype=dtype, rngs=rngs)
    self.tokens, self.positions, self.segments = map(table, tables)
    self.norm = _norm(width, epsilon, dtype, rngs)
    self.layers = layers
    self.dropout = nnx.Dropout(dropout)

  def __call__(self, batch: Mapping[str, jax.Array], *, train: bool, rngs: nnx.Rngs | None) -> Outputs:
    token_ids, mask = (batch[name] for name in _INPUTS)
    places = self.positions(jnp.arange(token_ids.shape[1]))
    states = self.norm(self.tokens(token_ids) + places + self.segments(jnp.zeros(1, jnp.int32)))
    states = dropped_out(self.dropout, states, train, rngs)
    features = {"embeddings": states}
    for index, layer in enumerate(self.layers, start=1):
      features[f"layer{index}"] = states = layer(states, mask, train, rngs)
    return _mean_of_tokens(states, mask) | {"hidden": states, "features": features}


class _Bag(nnx.Module):
  def __init__(self, vocabulary: int, widths: Sequence[int], dropout: float, rngs: nnx.Rngs) -> None:
    self.tokens = nnx.Embed(vocabulary, widths[0], embedding_init=nnx.initializers.normal(0.1), rngs=rngs)
    pairs = itertools.pairwise(widths)
    self.hidden = nnx.List(nnx.Linear(a, b, kernel_init=hidden_init, rngs=rngs) for a, b in pairs)
    self.dropout = nnx.Dropout(dropout)

  def __call__(self, batch: Mapping[str, jax.Array], *, train: bool, rngs: nnx.Rngs | None) -> Outputs:
    token_ids, mask = (batch[name] for name in _INPUTS)
    pooled = _mean_of_tokens(self.tokens(token_ids), mask)["pooled"]
    for layer in self.hidden:
      pooled = jax.nn.relu(layer(dropped_out(self.dropout, pooled, train, rngs)))
    return {"pooled": pooled, "embedding": l2_normalize(pooled)}


def _norm(width: int, epsilon: float, dtype: Dtype | None, rngs: nnx.Rngs) -> nnx.LayerNorm:
  # The fast variance, a difference of squares, loses the digits that an epsilon of 1e-12 wants.
  return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)
