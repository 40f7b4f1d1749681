"""A vision transformer whose class token, registers and patches are outputs by name."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kdflax.model import Model, Outputs
from kdflax.models.adapters import from_nnx
from kdflax.models.layers import Dtype, check_dropout, check_rank, check_widths, classifier

_small = jax.nn.initializers.normal(0.02)


def vit(
  num_classes: int | None = None,
  *,
  patch: int = 4,
  width: int = 64,
  depth: int = 4,
  heads: int = 4,
  mlp_ratio: int = 4,
  registers: int = 0,
  dropout: float = 0.0,
  scan: bool = True,
  remat: bool = False,
  input: str = "image",
  dtype: Dtype | None = None,
) -> Model:
  """Build a vision transformer: patches, a class token and registers through layers that normalise before they add.

  Positions are learned, one for each patch, so the size of the image is fixed by the first example. The patches keep
  their places in the image: a map loss reads `patches` or `features.layer2` as it reads a map of a convolutional net,
  and a teacher of another grid is resized to it or pooled. Registers are tokens that no loss reads; large models
  otherwise use patches of the background for what belongs to no place.

  Args:
    num_classes: the width of `logits`, which read the class token; None for a trunk without a head.
    patch: the side of a patch, in pixels.
    width: of the tokens.
    depth: the number of layers.
    heads: of the attention; they divide the width.
    mlp_ratio: the width inside the MLP over that of the tokens.
    registers: how many.
    dropout: the probability of dropping an entry of what a layer adds, in training.
    scan: compile one layer and run it `depth` times, or all of them in a row, which may run a little faster.
    remat: compute the inside of the layers again in the backward pass instead of keeping it.
    input: the entry of the batch to read, shape [batch, height, width, channels].
    dtype: the type to compute in; parameters, norms, and the tokens to which layers add, stay float32.

  Returns:
    A model with `embedding` [batch, width], the class token; `patches` [batch, height / patch, width / patch, width];
    `registers` [batch, registers, width] if there are any, all three behind the last norm; `features` behind each
    layer: `layer1`, ... as `patches` and `layer1_class`, ... as `embedding`; and `logits` [batch, num_classes].

  Raises:
    ValueError: if a number is not positive, the heads do not divide the width, dropout is not in [0, 1), the input has
      not four axes, or the patch does not divide its height and width.

  Reference: Alexey Dosovitskiy, Lucas Beyer, Alexander Kolesnikov, Dirk Weissenborn, Xiaohua Zhai, Thomas Unterthiner,
  Mostafa Dehghani, Matthias Minderer, Georg Heigold, Sylvain Gelly, Jakob Uszkoreit and Neil Houlsby, "An Image is
  Worth 16x16 Words: Transformers for Image Recognition at Scale", 2020, arXiv 2010.11929; registers: Timothée Darcet,
  Maxime Oquab, Julien Mairal and Piotr Bojanowski, "Vision Transformers Need Registers", 2023, arXiv 2309.16588. As in
  the latter the class token has no position of its own.
  """
  numbers = {"patch": patch, "width": width, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio}
  check_widths(**{name: (number,) for name, number in numbers.items()})
  check_widths(num_classes=() if num_classes is None else (num_classes,), registers=(registers,) if registers else ())
  check_dropout(dropout)
  if width % heads:
    raise ValueError(f"heads must divide the width, got heads={heads} and width={width}")

  sizes = _Sizes(patch, width, depth, heads, mlp_ratio * width, registers, dropout, scan, remat, dtype)

  def make(rngs: nnx.Rngs, example: jax.ShapeDtypeStruct) -> _ViT:
    check_rank(example, 4, "vit", "[batch, height, width, channels]")
    if example.shape[1] % patch or example.shape[2] % patch:
      raise ValueError(f"patch={patch} must divide height and width of the image, got {tuple(example.shape)}")
    return _ViT(example.shape, num_classes, sizes, rngs)

  return from_nnx(make, input=input, with_example=True)


class _Sizes(NamedTuple):
  patch: int
  width: int
  depth: int
  heads: int
  hidden: int
  registers: int
  dropout: float
  scan: bool
  remat: bool
  dtype: Dtype | None


class _Layer(nnx.Module):
  """Attention and an MLP, each added to what it reads normalised."""

  def __init__(self, sizes: _Sizes, rngs: nnx.Rngs) -> None:
    linear = lambda inputs, outputs: nnx.Linear(inputs, outputs, dtype=sizes.dtype, rngs=rngs)
    self.attention_norm, self.mlp_norm = nnx.LayerNorm(sizes.width, rngs=rngs), nnx.LayerNorm(sizes.width, rngs=rngs)
    self.query_key_value, self.mixed = linear(sizes.width, 3 * sizes.width), linear(sizes.width, sizes.width)
    self.up, self.down = linear(sizes.width, sizes.hidden), linear(sizes.hidden, sizes.width)
    self.sizes = sizes

  def __call__(self, x: jax.Array, drop: Any) -> jax.Array:
    by_head = self.query_key_value(self.attention_norm(x)).reshape(*x.shape[:2], 3, self.sizes.heads, -1)
    mixed = jax.nn.dot_product_attention(*jnp.moveaxis(by_head, 2, 0))
    x = x + drop(self.mixed(mixed.reshape(x.shape)), 0)
    return x + drop(self.down(jax.nn.gelu(self.up(self.mlp_norm(x)))), 1)


class _ViT(nnx.Module):
  def __init__(self, image: tuple[int, ...], num_classes: int | None, sizes: _Sizes, rngs: nnx.Rngs) -> None:
    self.sizes, self.grid = sizes, (image[1] // sizes.patch, image[2] // sizes.patch)
    self.patches = nnx.Linear(sizes.patch**2 * image[-1], sizes.width, dtype=sizes.dtype, rngs=rngs)
    self.positions = nnx.Param(_small(rngs.params(), (*self.grid, sizes.width)))
    self.others = nnx.Param(_small(rngs.params(), (1 + sizes.registers, sizes.width)))  # the class token comes first
    self.layers = nnx.vmap(lambda rngs: _Layer(sizes, rngs))(rngs.split(sizes.depth))
    self.norm = nnx.LayerNorm(sizes.width, rngs=rngs)
    self.head = classifier(sizes.width, num_classes, sizes.dtype, rngs)

  def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None) -> Outputs:
    key = rngs.dropout() if train and rngs is not None and self.sizes.dropout else None
    tokens, by_layer = self._through_layers(self._tokens(x), key)
    first, others, patches = self._parts(self.norm(tokens))
    outputs: Outputs = {"embedding": first, "patches": patches, "features": {}}
    for index in range(self.sizes.depth):
      first_here, _, patches_here = self._parts(by_layer[index])
      outputs["features"] |= {f"layer{index + 1}": patches_here, f"layer{index + 1}_class": first_here}
    registers = {"registers": others} if self.sizes.registers else {}
    return outputs | registers | ({} if self.head is None else {"logits": self.head(first)})

  def _tokens(self, x: jax.Array) -> jax.Array:
    """Class token, registers, and the patches with their positions, `[batch, tokens, width]`."""
    (rows, columns), patch, batch = self.grid, self.sizes.patch, x.shape[0]
    cut = x.reshape(batch, rows, patch, columns, patch, -1).swapaxes(2, 3).reshape(batch, rows, columns, -1)
    patches = self.patches(cut) + self.positions.get_value()
    patches = patches.reshape(batch, rows * columns, -1)
    others = jnp.broadcast_to(self.others.get_value(), (batch, *self.others.get_value().shape))
    return jnp.concatenate([others.astype(patches.dtype), patches], axis=1)

  def _through_layers(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The tokens behind all layers, and behind each of them `[depth, batch, tokens, width]`."""
    graph, states = nnx.split(self.layers)
    kept = 1 - self.sizes.dropout

    def body(x: jax.Array, layer: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
      state, index = layer

      def drop(added: jax.Array, place: int) -> jax.Array:
        if key is None:
          return added
        chosen = jax.random.bernoulli(jax.random.fold_in(key, 2 * index + place), kept, added.shape)
        return jnp.where(chosen, added / kept, 0)

      x = nnx.merge(graph, state)(x, drop)
      return x, x

    body = jax.checkpoint(body, prevent_cse=not self.sizes.scan) if self.sizes.remat else body
    unroll = 1 if self.sizes.scan else self.sizes.depth
    return jax.lax.scan(body, x, (states, jnp.arange(self.sizes.depth)), unroll=unroll)

  def _parts(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Class token, registers and the map of patches."""
    first, others, patches = jnp.split(tokens, [1, 1 + self.sizes.registers], axis=1)
    return first[:, 0], others, patches.reshape(tokens.shape[0], *self.grid, -1)
