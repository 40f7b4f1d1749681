"""Teachers on one footing: features of one variance, and which teacher counts for which example."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


def phi_s(features: jax.Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Measures the rotation and the one scale that give every channel of a teacher variance 1.

  Several teachers' features are then learned on one footing, and since the scale is a single number for all channels,
  `standardize` keeps angles and relative distances and can be undone. Measured once, on the host.

    matrix = H U' / sqrt(mean eigenvalue),   covariance = U diag(eigenvalues) U'

  where H is an orthonormal Hadamard matrix, which shares out every eigenvalue evenly among the channels. There is none
  for a width that 4 does not divide, above 2; there H is another orthonormal matrix, made for these eigenvalues, that
  gives every channel variance 1 as well.

  Args:
    features: `[..., channels]`, all examples and positions to measure.

  Returns:
    The mean `[channels]` and the matrix `[channels, channels]`, for `standardize`; in float32 or wider.

  Raises:
    ValueError: if there are fewer than two rows, or the features do not vary or are not finite.

  Examples:
    >>> import numpy as np
    >>> features = np.random.default_rng(0).normal(size=(50, 4)) * [1.0, 2.0, 3.0, 4.0]
    >>> mean, matrix = phi_s(features)
    >>> print(np.asarray(standardize(features, mean, matrix)).var(axis=0, ddof=1).round(4))
    [1. 1. 1. 1.]

  Reference: Mike Ranzinger, Jon Barker, Greg Heinrich, Pavlo Molchanov, Bryan Catanzaro and Andrew Tao, "PHI-S:
  Distribution Balancing for Label-Free Multi-Teacher Distillation", 2024, arXiv 2410.01680.
  """
  features = np.asarray(features)
  dtype, channels = np.result_type(features.dtype, np.float32), features.shape[-1]
  rows = features.reshape(-1, channels).astype(np.float64)
  if len(rows) < 2:
    raise ValueError(f"features need at least 2 rows to measure a covariance; got shape {features.shape}")
  mean = rows.mean(axis=0)
  centred = rows - mean
  eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / (len(rows) - 1))
  scale = eigenvalues.mean()
  if not 0 < scale < np.inf:
    raise ValueError(f"features must be finite and vary; the mean variance of their {channels} channels is {scale}")
  rotation = _hadamard(channels)
  if rotation is None:
    rotation = _evening_rotation(eigenvalues)
  return mean.astype(dtype), (rotation @ vectors.T / np.sqrt(scale)).astype(dtype)


def standardize(features: jax.Array, mean: jax.Array | np.ndarray, matrix: jax.Array | np.ndarray) -> jax.Array:
  """Applies what `phi_s` measured: `(features - mean) @ matrix.T`.

  Args:
    features: `[..., channels]`.
    mean: `[channels]`.
    matrix: `[channels, channels]`.

  Returns:
    `[..., channels]`.

  Raises:
    ValueError: if the widths differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> print(standardize(jnp.array([[3.0, 1.0]]), jnp.array([1.0, 1.0]), jnp.eye(2) / 2))
    [[1. 0.]]
  """
  features, mean, matrix = jnp.asarray(features), jnp.asarray(mean), jnp.asarray(matrix)
  if mean.shape != features.shape[-1:] or matrix.shape != (*features.shape[-1:],) * 2:
    raise ValueError(
      f"mean and matrix must have the features' width; got features {features.shape}, mean {mean.shape}, matrix "
      f"{matrix.shape}"
    )
  return jnp.matmul(features - mean, matrix.T, precision=jax.lax.Precision.HIGHEST)


def teacher_dropping(losses: jax.Array, keep: jax.Array) -> jax.Array:
  """Which teacher counts for which example: those kept, and always the one that is hardest to follow.

  So no teacher is left behind by a student that finds others easier. Draw `keep` anew in every step, such as
  `jax.random.bernoulli(key, 1 - rate, losses.shape)`.

  Args:
    losses: `[teachers, batch]`, the student's loss to each teacher.
    keep: bool `[teachers, batch]`.

  Returns:
    `[teachers, batch]` of 1 and 0 in the dtype of the losses, without derivative.

  Raises:
    ValueError: if the shapes differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> losses = jnp.array([[3.0, 1.0], [2.0, 4.0]])
    >>> print(teacher_dropping(losses, jnp.zeros((2, 2), bool)))
    [[1. 0.]
     [0. 1.]]

  Reference: Mert Bulent Sariyildiz, Philippe Weinzaepfel, Thomas Lucas, Diane Larlus and Yannis Kalantidis, "UNIC:
  Universal Classification Models via Multi-teacher Distillation", 2024, arXiv 2408.05088. Its code divides by the sum
  of all coefficients.
  """
  if jnp.shape(losses) != jnp.shape(keep):
    raise ValueError(f"losses and keep must have one shape; got {jnp.shape(losses)} and {jnp.shape(keep)}")
  hardest = jnp.argmax(losses, axis=0) == jnp.arange(len(losses))[:, None]
  return (hardest | jnp.asarray(keep, bool)).astype(losses.dtype)


def fusion_weights(cross_entropies: jax.Array, *, kind: Literal["min_ce", "avg_ce"]) -> jax.Array:
  """Weights of teachers by how well each predicts the truth.

    min_ce: 1 for the teacher of least cross-entropy, 0 for the others
    avg_ce: softmax over the teachers of exp(-cross-entropy)

  Args:
    cross_entropies: `[teachers, ...]`, of each teacher with the labels, in nats, such as one for each example.
    kind: "min_ce" or "avg_ce", static.

  Returns:
    `[teachers, ...]`, which sum to 1 over the teachers.

  Raises:
    ValueError: if `kind` is not one of those allowed.

  Examples:
    >>> import jax.numpy as jnp
    >>> print(fusion_weights(jnp.array([2.0, 1.0]), kind="min_ce"))
    [0. 1.]

  Reference: Fanqi Wan, Xinting Huang, Deng Cai, Xiaojun Quan, Wei Bi and Shuming Shi, "Knowledge Fusion of Large
  Language Models", 2024, arXiv 2401.10491.
  """
  if kind not in ("min_ce", "avg_ce"):
    raise ValueError(f'kind must be "min_ce" or "avg_ce"; got {kind!r}')
  cross_entropies = jnp.asarray(cross_entropies)
  if kind == "avg_ce":
    return jax.nn.softmax(jnp.exp(-cross_entropies), axis=0)
  return jax.nn.one_hot(jnp.argmin(cross_entropies, axis=0), len(cross_entropies), axis=0, dtype=cross_entropies.dtype)


def _hadamard(size: int) -> np.ndarray | None:
  """An orthonormal Hadamard matrix: Sylvester's doubling of 1 or of one of Paley's; None where that makes none."""
  doublings = 0
  while True:
    core = _paley(size >> doublings)
    if core is not None:
      break
    if size >> doublings & 1:
      return None
    doublings += 1
  for _ in range(doublings):
    core = np.block([[core, core], [core, -core]])
  return core / np.sqrt(size)


def _paley(size: int) -> np.ndarray | None:
  """Paley's matrix of 1 and -1 from the squares modulo a prime, of the first kind or else the second; or that of 1."""
  if size == 1:
    return np.ones((1, 1))
  if _is_prime(size - 1) and (size - 1) % 4 == 3:
    return np.eye(size) + _bordered(size - 1, -1)
  half = size // 2
  if size % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
    return np.kron(_bordered(half - 1, 1), [[1, 1], [1, -1]]) + np.kron(np.eye(half), [[1, -1], [-1, -1]])
  return None


def _bordered(prime: int, sign: int) -> np.ndarray:
  """The matrix of the quadratic residues of all differences, between a row of 1 and a column of `sign`."""
  squares = np.unique(np.arange(1, prime) ** 2 % prime)
  residue = np.where(np.isin(np.arange(prime), squares), 1.0, -1.0)
  residue[0] = 0
  index = np.arange(prime)
  inner = residue[(index[:, None] - index) % prime]
  return np.block([[np.zeros((1, 1)), np.ones((1, prime))], [np.full((prime, 1), float(sign)), inner]])


def _is_prime(number: int) -> bool:
  return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _evening_rotation(eigenvalues: np.ndarray) -> np.ndarray:
  """An orthonormal matrix R for which R diag(eigenvalues) R' has their mean everywhere on its diagonal.

  One turn of two channels at a time, one above the mean and one below, brings one of them to the mean.
  """
  size, mean = len(eigenvalues), eigenvalues.mean()
  rotation, covariance = np.eye(size), np.diag(eigenvalues).astype(np.float64)
  for _ in range(size - 1):
    variances = np.diag(covariance)
    high, low = variances.argmax(), variances.argmin()
    above, below, between = variances[high] - mean, variances[low] - mean, covariance[high, low]
    if above <= 1e-14 * mean:
      break
    # tan of the turn that leaves the mean on the diagonal: above + 2 between t + below t^2 = 0.
    tangent = (between + np.sqrt(between**2 - above * below)) / -below
    cosine = 1 / np.sqrt(1 + tangent**2)
    turn = cosine * np.array([[1, tangent], [-tangent, 1]])
    rotation[[high, low]] = turn @ rotation[[high, low]]
    covariance[[high, low]] = turn @ covariance[[high, low]]
    covariance[:, [high, low]] = covariance[:, [high, low]] @ turn.T
  return rotation
