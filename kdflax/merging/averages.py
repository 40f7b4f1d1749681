"""Averages of the params of several models: plain, weighted by Fisher information, or by what the layers are fed.

Every leaf is merged by itself, elementwise but for `regmean`, so sharded leaves stay as they are. Where no data tell
the models apart (a Fisher information of 0, a direction that no input has) the plain average stands.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kdflax.merging._trees import Aligned, align, several
from kdflax.numerics.trees import PyTree, name_of

_HIGHEST = jax.lax.Precision.HIGHEST


def average(params_list: Sequence[PyTree], weights: Sequence[float] | jax.Array | None = None) -> PyTree:
  """Average the params of several models.

  Models that were tuned from one start often lie in one basin, where their average is as good as their ensemble and
  costs one model (a soup). Equal models give exactly that model.

      sum_i w_i theta_i / sum_i w_i

  Args:
    params_list: one pytree of floating arrays for each model, all alike.
    weights: `[models]`, one number for each; equal by default. May be traced, and negative, but for their sum.

  Returns:
    A pytree like the first, in its dtypes; computed in float32 or wider.

  Raises:
    ValueError: if the trees differ (the leaf and both shapes are named), a leaf is not floating, or the weights are not
      one for each model or add up to 0.

  Examples:
    >>> average([{"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([5.0, 2.0])}], weights=[3, 1])
    {'kernel': Array([2., 2.], dtype=float32)}

  Reference: Mitchell Wortsman, Gabriel Ilharco, Samir Yitzhak Gadre, Rebecca Roelofs, Raphael Gontijo-Lopes, Ari S.
  Morcos, Hongseok Namkoong, Ali Farhadi, Yair Carmon, Simon Kornblith and Ludwig Schmidt, "Model soups: averaging
  weights of multiple fine-tuned models improves accuracy without increasing inference time", 2022, arXiv 2203.05482.
  """
  aligned = align(several("params_list", params_list))
  shares = _shares(weights, len(params_list))
  return aligned.rebuild([_weighted_mean(versions, shares) for versions in aligned.versions])


def fisher(params_list: Sequence[PyTree], fishers: Sequence[PyTree]) -> PyTree:
  """Average the params of several models, each entry weighed by how much the model's data depend on it.

  The mode of the product of Gaussian posteriors whose precisions are the diagonal Fisher informations. An entry that
  matters to none of the models (all its informations 0) is averaged with equal weights.

      sum_i F_i theta_i / sum_i F_i

  Args:
    params_list: one pytree of floating arrays for each model, all alike.
    fishers: for each model a pytree like its params with the diagonal of its Fisher information, at least 0: the mean
      over examples of the squared gradient of the log-likelihood. To weigh the models, multiply by a number; only the
      ratios count, whatever the scale.

  Returns:
    A pytree like the first params, in their dtypes; computed in float32 or wider.

  Raises:
    ValueError: if there is not one Fisher information for each model, the trees differ (the leaf and both shapes are
      named), or a leaf is not floating.

  Examples:
    >>> params = [{"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([5.0, 4.0])}]
    >>> fisher(params, [{"kernel": jnp.array([3.0, 0.0])}, {"kernel": jnp.array([1.0, 0.0])}])
    {'kernel': Array([2., 3.], dtype=float32)}

  Reference: Michael Matena and Colin Raffel, "Merging Models with Fisher-Weighted Averaging", 2021, arXiv 2111.09832.
  Widely used code raises informations below 1e-6 to that; here none is changed.
  """
  count = len(several("params_list", params_list))
  if len(several("fishers", fishers)) != count:
    raise ValueError(f"fishers must be one for each of {count} models; got {len(fishers)}")
  aligned = align(several("params_list", params_list) | several("fishers", fishers))
  merged = []
  for versions in aligned.versions:
    informations = jnp.stack(versions[count:])
    largest = jnp.max(informations, 0)  # taken out first: squared gradients may be too small to be added up
    shares = jnp.where(largest == 0, 1, informations / jnp.where(largest == 0, 1, largest))
    merged.append(_weighted_mean(versions[:count], shares / shares.sum(0)))
  return aligned.rebuild(merged)


def regmean(weights_list: Sequence[PyTree], grams_list: Sequence[PyTree], alpha: float | jax.Array = 0.9) -> PyTree:
  """Merge linear layers so that the merged one answers the inputs of each as that one did.

  The least squares fit, in closed form, of one kernel to the outputs of all models on their own inputs. Directions that
  no model's inputs have keep the average, as everything does that has no Gram matrix.

      W = (sum_i G_i)^-1 sum_i G_i W_i  =  mean W + (sum_i G_i)^+ sum_i G_i (W_i - mean W),   G_i = X_i' X_i

  with the off-diagonal entries of every G times alpha: at 1 the fit itself, at 0 an average weighed by the inputs'
  energies.

  Args:
    weights_list: one pytree of floating arrays for each model, all alike.
    grams_list: for each model a tree like it, with a Gram matrix `[in, in]` of the layer's inputs for every kernel
      `[in, out]` and None for every leaf to be averaged (a bias). A kernel of more axes is taken as `[..., out]`, its
      leading axes together. Sum them over the same number of examples for each, or divide by it.
    alpha: in [0, 1], may be traced.

  Returns:
    A pytree like the first of the weights, in its dtypes; computed in float32 or wider.

  Raises:
    ValueError: if there is not one tree of Gram matrices for each model, the trees differ or a Gram matrix does not fit
      its kernel (the leaf and both shapes are named), some models but not all have a Gram matrix for a leaf, a leaf is
      not floating, or alpha is not in [0, 1].

  Examples:
    >>> kernels = [{"kernel": jnp.array([[1.0], [0.0]])}, {"kernel": jnp.array([[5.0], [8.0]])}]
    >>> grams = [{"kernel": jnp.diag(jnp.array([3.0, 0.0]))}, {"kernel": jnp.diag(jnp.array([1.0, 0.0]))}]
    >>> regmean(kernels, grams)["kernel"].round(4)
    Array([[2.],
           [4.]], dtype=float32)

  Reference: Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro and Pengxiang Cheng, "Dataless Knowledge Fusion by Merging
  Weights of Language Models", 2022, arXiv 2212.09849. Its code inverts the sum of the Gram matrices, and so fails where
  a unit never fires; the pseudo-inverse, taken after scaling the diagonal to 1, is the same where that has an inverse.
  """
  count = len(several("weights_list", weights_list))
  if len(several("grams_list", grams_list)) != count:
    raise ValueError(f"grams_list must be one for each of {count} models; got {len(grams_list)}")
  if not isinstance(alpha, Tracer) and not 0 <= alpha <= 1:
    raise ValueError(f"alpha must be in [0, 1]; got {alpha}")
  aligned = align(several("weights_list", weights_list))
  equal = _shares(None, count)
  grams = _grams(aligned, grams_list)
  merged = []
  for versions, own in zip(aligned.versions, grams, strict=True):
    mean = _weighted_mean(versions, equal)
    merged.append(mean if own is None else mean + _fit([leaf - mean for leaf in versions], own, alpha))
  return aligned.rebuild(merged)


def _shares(weights: Any, count: int) -> jax.Array:
  """The weights over their sum."""
  if weights is None:
    return jnp.full(count, 1 / count)
  weights = jnp.asarray(weights)
  if weights.shape != (count,):
    raise ValueError(f"weights must be one number for each of {count} models; got shape {weights.shape}")
  total = weights.sum()
  if not isinstance(total, Tracer) and total == 0:
    raise ValueError(f"weights must not add up to 0; got {weights}")
  return weights / total


def _weighted_mean(versions: Sequence[jax.Array], shares: jax.Array) -> jax.Array:
  """Of shares that add up to 1, `[models]` or one for each entry; relative to the first, so equal versions stay."""
  first, *others = versions
  shares = shares.astype(first.dtype)
  return first + sum((share * (leaf - first) for share, leaf in zip(shares[1:], others, strict=True)), jnp.zeros(()))


def _grams(aligned: Aligned, grams_list: Sequence[PyTree]) -> list[list[jax.Array] | None]:
  """For every leaf the Gram matrices of all models, or None."""
  trees = {where: _by_name(tree) for where, tree in several("grams_list", grams_list).items()}
  for where, tree in trees.items():
    if differing := sorted(tree.keys() ^ set(aligned.names)):
      raise ValueError(
        f"{where} must have a Gram matrix or None for every leaf of the weights and no others; {differing[0]!r} is in "
        f"one of the two only ({len(differing)} such leaves)"
      )
  return [
    _grams_of(name, versions[0], {where: tree[name] for where, tree in trees.items()})
    for name, versions in zip(aligned.names, aligned.versions, strict=True)
  ]


def _by_name(tree: PyTree) -> dict[str, Any]:
  leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
  return {name_of(path): leaf for path, leaf in leaves}


def _grams_of(name: str, kernel: jax.Array, grams: Mapping[str, Any]) -> list[jax.Array] | None:
  """The Gram matrices of one leaf, checked; None if no model has one."""
  without = [where for where, gram in grams.items() if gram is None]
  if len(without) == len(grams):
    return None
  if without:
    raise ValueError(f"{without[0]} has no Gram matrix for leaf {name!r}, but another model has; give None to all")
  if kernel.ndim < 2:
    raise ValueError(f"leaf {name!r} of shape {kernel.shape} is no kernel [..., out]; give None for its Gram matrix")
  inputs = math.prod(kernel.shape[:-1])
  for where, gram in grams.items():
    if jnp.shape(gram) != (inputs, inputs):
      raise ValueError(
        f"leaf {name!r} of shape {kernel.shape} needs a Gram matrix of shape {(inputs, inputs)}; {where} has one of "
        f"{jnp.shape(gram)}"
      )
  return [jnp.asarray(gram, kernel.dtype) for gram in grams.values()]


def _fit(kernels: Sequence[jax.Array], grams: Sequence[jax.Array], alpha: float | jax.Array) -> jax.Array:
  """`(sum G)^+ sum G W` of kernels `[..., out]`."""
  shape, diagonal = kernels[0].shape, jnp.eye(len(grams[0]), dtype=bool)
  shrunk = jnp.stack([jnp.where(diagonal, gram, alpha * gram) for gram in grams])
  matrices = jnp.stack([kernel.reshape(-1, shape[-1]) for kernel in kernels])
  targets = jnp.einsum("mij,mjk->ik", shrunk, matrices, precision=_HIGHEST)
  return _pseudo_solve(shrunk.sum(0), targets).reshape(shape)


def _pseudo_solve(gram: jax.Array, targets: jax.Array) -> jax.Array:
  """`gram^+ targets`, the diagonal of the Gram matrix scaled to 1: units of small inputs count as much as others."""
  energy = jnp.diagonal(gram)
  scale = jnp.where(energy == 0, 0, 1 / jnp.sqrt(jnp.where(energy == 0, 1, energy)))[:, None]
  values, vectors = jnp.linalg.eigh(scale * gram * scale.T)
  seen = ~(values <= len(gram) * jnp.finfo(gram.dtype).eps * values[-1])
  inverse = jnp.where(seen, 1 / jnp.where(seen, values, 1), 0)[:, None]
  product = functools.partial(jnp.matmul, precision=_HIGHEST)
  return scale * product(vectors, inverse * product(vectors.T, scale * targets))
