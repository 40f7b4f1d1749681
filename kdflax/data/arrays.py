"""Data sets as plain dicts of equally long arrays: checks, stratified splits, rows by index, label budgets."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A dict of arrays with one leading axis of the same length; values may be dicts of the same kind.
Arrays = dict[str, Any]


def check(arrays: Arrays, *, num_classes: int | Mapping[str, Any] | None = None) -> None:
  """Refuse a data set that would train into nonsense: unequal lengths, no examples, NaN, labels out of range.

  Runs on the host and reads every value once, so call it where data enters and not in a training step.

  Args:
    arrays: dict of arrays `[examples, ...]`, possibly nested.
    num_classes: classes of `arrays["label"]`: a number for all labels in it, or, where tasks differ, a dict with
      its structure. A task that the dict leaves out, such as a regression, has no range.

  Raises:
    ValueError: naming the array by its path, how many entries are bad, where the first one is and the range seen.
  """
  num_examples(arrays)
  for path, values in _leaves(arrays):
    _check_finite(path, np.asarray(values))
  if num_classes is not None:
    if "label" not in arrays:
      raise ValueError(f"num_classes={num_classes} needs an array named 'label'; there are {sorted(arrays)}")
    _check_labels("label", arrays["label"], num_classes)


def num_examples(arrays: Arrays) -> int:
  """Return the common length of all arrays.

  Args:
    arrays: dict of arrays `[examples, ...]`, possibly nested.

  Returns:
    The number of examples, at least 1.

  Raises:
    ValueError: there is no array, one has no leading axis or no entries, or lengths differ.
  """
  lengths = {}
  for path, values in _leaves(arrays):
    if not hasattr(values, "shape") or values.dtype == object:
      raise ValueError(f"{path} is a {type(values).__name__} of objects; expected a NumPy or JAX array of numbers")
    if values.ndim == 0 or values.size == 0:
      raise ValueError(f"{path} holds no examples: its shape is {values.shape}, expected [examples, ...]")
    lengths[path] = values.shape[0]
  if not lengths:
    raise ValueError("the data set holds no arrays")
  if len(set(lengths.values())) > 1:
    seen = ", ".join(f"{path}: {length}" for path, length in lengths.items())
    raise ValueError(f"all arrays of a data set need the same number of examples, got {seen}")
  return next(iter(lengths.values()))


def gather(arrays: Arrays, indices: jax.Array | np.ndarray) -> Arrays:
  """Take the same rows of every array.

  NumPy rows of NumPy arrays stay on the host; everything else is a JAX gather and may be traced.

  Args:
    arrays: dict of arrays `[examples, ...]`, possibly nested.
    indices: integers `[...]` below the number of examples.

  Returns:
    The same structure with arrays `[*indices.shape, ...]`.
  """
  if isinstance(indices, np.ndarray):
    return jax.tree.map(lambda values: values[indices], arrays)
  return jax.tree.map(lambda values: jnp.asarray(values)[indices], arrays)


def stratified_split(labels: np.ndarray, sizes: Sequence[int], *, seed: int) -> list[np.ndarray]:
  """Draw disjoint index sets in which every class keeps its share.

  Every class is shuffled and spread evenly over one line of all examples; consecutive pieces of that line are the
  splits, so a class is within two examples of its share in each. Randomness is NumPy's frozen `RandomState`: a split
  is the same in every NumPy version, and a stored teacher never meets its own training data in a later test split.

  Args:
    labels: integer classes `[examples]`.
    sizes: examples per split; together at most all of them, each at least the number of classes.
    seed: of the shuffle.

  Returns:
    One ascending int32 index array per size.

  Raises:
    ValueError: the sizes do not fit the data; all numbers are named.
  """
  sizes = tuple(sizes)
  num_classes = _count_classes(labels)
  if sum(sizes) > len(labels):
    raise ValueError(f"sizes={sizes} ask for {sum(sizes)} examples, but there are only {len(labels)}")
  if any(size < num_classes for size in sizes):
    raise ValueError(f"sizes={sizes}: a stratified split needs at least one example of each of {num_classes} classes")
  order, rank, count = _shuffled_ranks(labels, seed)
  line = order[np.argsort((rank + 0.5) / count, kind="stable")]
  pieces = np.split(line, np.cumsum(sizes))[: len(sizes)]
  return [np.sort(piece).astype(np.int32) for piece in pieces]


def with_label_budget(arrays: Arrays, num_labelled: int, *, seed: int, task: str | None = None) -> Arrays:
  """Mark a few examples as labelled, equally many per class, for semi-supervised learning.

  The marked sets are nested: a larger budget with the same seed keeps the examples of a smaller one. The labels of
  the others stay where they are; pass `batch["labelled"]` as `where` to every loss that reads labels.

  Args:
    arrays: dict of arrays `[examples, ...]` with integer classes `[examples]` under `label`.
    num_labelled: examples to mark, at least one per class. Classes differ by at most one unless a class runs out.
    seed: of the choice.
    task: the label to balance, where `arrays["label"]` is a dict of tasks.

  Returns:
    The arrays and `labelled`, bool `[examples]`.

  Raises:
    ValueError: the budget is below the number of classes or above the number of examples, or `task` names no label.
  """
  total = num_examples(arrays)
  labels = np.asarray(_task_labels(arrays, task))
  num_classes = _count_classes(labels)
  if not num_classes <= num_labelled <= total:
    raise ValueError(
      f"num_labelled={num_labelled} must be between {num_classes} (the classes) and {total} (the examples)"
    )
  order, rank, _ = _shuffled_ranks(labels, seed)
  labelled = np.zeros(total, bool)
  labelled[order[np.argsort(rank, kind="stable")[:num_labelled]]] = True
  return arrays | {"labelled": labelled}


def _count_classes(labels: np.ndarray) -> int:
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"stratification needs integer classes of shape [examples], got {labels.dtype} {labels.shape}")
  return len(np.unique(labels))


def _shuffled_ranks(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Shuffle; return the order, and along it each example's rank in its class and the size of that class."""
  order = np.random.RandomState(seed).permutation(len(labels))
  _, classes, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
  first = np.cumsum(counts) - counts
  by_class = np.argsort(classes, kind="stable")
  rank = np.empty(len(labels), np.int64)
  rank[by_class] = np.arange(len(labels)) - np.repeat(first, counts)
  return order, rank, counts[classes]


def _task_labels(arrays: Arrays, task: str | None) -> Any:
  labels = arrays.get("label")
  if labels is None:
    raise ValueError(f"a label budget needs an array named 'label'; there are {sorted(arrays)}")
  if isinstance(labels, Mapping):
    if task not in labels:
      raise ValueError(f"task={task!r} is no label; there are {sorted(labels)}")
    return labels[task]
  if task is not None:
    raise ValueError(f"task={task!r}, but 'label' is one array and not a dict of tasks")
  return labels


def _leaves(arrays: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  if not isinstance(arrays, Mapping):
    yield path, arrays
    return
  for name, values in arrays.items():
    yield from _leaves(values, f"{path}.{name}" if path else str(name))


def _check_finite(path: str, values: np.ndarray) -> None:
  # jnp.issubdtype knows bfloat16 as a float, NumPy does not.
  if not jnp.issubdtype(values.dtype, jnp.inexact):
    return
  finite = np.isfinite(values)
  if not finite.all():
    raise ValueError(f"{path}: {_bad_entries(~finite)} NaN or infinite; {_range(values[finite], 'the others are')}")


def _check_labels(path: str, labels: Any, num_classes: int | Mapping[str, Any]) -> None:
  if isinstance(num_classes, Mapping):
    if not isinstance(labels, Mapping) or not set(num_classes) <= set(labels):
      seen = sorted(labels) if isinstance(labels, Mapping) else "one array"
      raise ValueError(f"num_classes names the tasks {sorted(num_classes)}, but {path} holds {seen}")
    for task, classes in num_classes.items():
      _check_labels(f"{path}.{task}", labels[task], classes)
    return
  for leaf_path, leaf in _leaves(labels, path):
    values = np.asarray(leaf)
    if not np.issubdtype(values.dtype, np.integer):
      raise ValueError(f"{leaf_path} has dtype {values.dtype}; classes need an integer dtype")
    bad = (values < 0) | (values >= num_classes)
    if bad.any():
      raise ValueError(f"{leaf_path}: {_bad_entries(bad)} outside [0, {num_classes}); {_range(values, 'labels are')}")


def _bad_entries(bad: np.ndarray) -> str:
  first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
  position = first[0] if len(first) == 1 else first
  return f"{bad.sum()} of {bad.size} entries (first at {position})"


def _range(values: np.ndarray, what: str) -> str:
  return f"{what} in [{values.min()}, {values.max()}]" if values.size else "there is no other"
