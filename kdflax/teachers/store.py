"""Stored teachers: what a teacher said about every example, recorded once and read back as a model.

A record is a directory with its rows in one or several safetensors files and a manifest: which files with which
digests, and where the outputs came from. A row belongs to an example and to one of its views, if the teacher saw it
augmented in several ways. A store is a directory of records by the names of their teachers. Nothing is pickled, and
rows are read from disk where they are asked for.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from kdflax.files import digest_of_text, write_atomically
from kdflax.model import Model, lookup
from kdflax.numerics.trees import nest_names
from kdflax.teachers._parts import (
  ARRAYS,
  INDEX,
  INPUT,
  MANIFEST,
  SEPARATOR,
  VIEW,
  Part,
  described,
  fingerprints,
  flat_outputs,
  is_output,
  open_part,
  read_manifest,
)

PyTree = Any


def record(
  directory: str | pathlib.Path, outputs: PyTree, index: np.ndarray, *, source: Mapping[str, Any] | None = None
) -> str:
  """Writes a teacher's outputs that are in memory; `record_from` writes them as they come.

  Args:
    directory: made if it does not exist; an earlier record in it is replaced.
    outputs: nested dict of arrays `[examples, ...]`, in the order of `index`.
    index: int `[examples]`, which example each row belongs to, without repetition.
    source: JSON to keep with it: model, digest of its params, data set.

  Returns:
    SHA-256 of the arrays.

  Raises:
    ValueError: if an array has another length than `index`, is not finite or of a dtype that would not come back
      (float8, complex), an index appears twice, or a name in `outputs` has a dot in it or is that of the index.
  """
  index = np.asarray(index, np.int64)
  if index.ndim != 1:
    raise ValueError(f"index must be [examples]; got shape {list(index.shape)}")
  if len(np.unique(index)) != len(index):
    raise ValueError("index names an example twice; record each example once")
  content = save({**flat_outputs(outputs, len(index)), INDEX: index})
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / MANIFEST).unlink(missing_ok=True)  # a record without a manifest is no record
  for stale in directory.glob("part-*.safetensors"):
    stale.unlink()
  write_atomically(directory / ARRAYS, content)
  digest = hashlib.sha256(content).hexdigest()
  manifest = {"sha256": digest, "examples": len(index), "source": dict(source or {})}
  write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")
  return digest


def read_record(directory: str | pathlib.Path, index: np.ndarray | None = None) -> PyTree:
  """Reads a record of one view into memory, its rows in the order of `index`; `open_record` leaves it on disk.

  Args:
    directory: where `record` or `record_from` wrote.
    index: int `[examples]`, the examples wanted; by default all in the recorded order.

  Returns:
    The nested dict of arrays `[examples, ...]`.

  Raises:
    ValueError: if there is no complete record, its content is not what was recorded, or it lacks an example.
  """
  return open_record(directory).read(index)


def open_record(directory: str | pathlib.Path, *, verify: bool = True) -> "Record":
  """Opens a record without loading its outputs.

  Args:
    directory: where `record` or `record_from` wrote.
    verify: compare the files with their digests first, which reads each of them once.

  Raises:
    ValueError: if there is no complete record, or its content is not what was recorded.
  """
  directory = pathlib.Path(directory)
  manifest = read_manifest(directory)
  if manifest is None or not manifest["complete"]:
    why = f"{MANIFEST} is missing" if manifest is None else "it was interrupted"
    raise ValueError(f"{directory} holds no complete teacher record ({why}); record the teacher again")
  return Record(directory, manifest, verify=verify)


def open_records(directory: str | pathlib.Path, *, verify: bool = True) -> dict[str, "Record"]:
  """Opens all records of a store, by the names of their folders: several teachers of the same examples.

  Args:
    directory: a folder of records.
    verify: as for `open_record`.

  Raises:
    ValueError: if there is none, or one is not complete.
  """
  folders = sorted(file.parent for file in pathlib.Path(directory).glob(f"*/{MANIFEST}"))
  if not folders:
    raise ValueError(f"{directory} holds no records; expected folders with a {MANIFEST} in it, one for each teacher")
  return {folder.name: open_record(folder, verify=verify) for folder in folders}


class Record:
  """A record that stays on disk; `open_record` makes it.

  Attributes:
    directory: where it is.
    source: what was written with it.
    digest: SHA-256 of its content; settings of a run may be bound to it.
    index: int64 `[rows]`, the example of each row.
    view: int64 `[rows]`, the number of its view, 0 where the teacher saw each example once.
    outputs: the outputs by path, such as `{"logits": "float32[10]"}`.
  """

  def __init__(self, directory: pathlib.Path, manifest: Mapping[str, Any], *, verify: bool = True):
    """Opens the files that a manifest lists; see `open_record`."""
    self.directory: pathlib.Path = directory
    self.source: dict[str, Any] = manifest["source"]
    self.inputs: str | None = manifest["inputs"]
    parts: list[Part] = manifest["parts"]
    self.digest: str = digest_of_text(json.dumps([part.sha256 for part in parts]))
    self._parts = [open_part(directory, part, verify) for part in parts]
    self._starts = np.cumsum([0, *(part.rows for part in parts)])
    join = lambda name: np.concatenate([np.zeros(0, np.int64), *(part[name] for part in self._parts)])
    self.index: np.ndarray = join(INDEX)
    self.view: np.ndarray = join(VIEW)
    first = self._parts[0] if self._parts else {}
    self.outputs: dict[str, str] = {name: described(array) for name, array in first.items() if is_output(name)}
    self._rows = {int(view): np.flatnonzero(self.view == view) for view in np.unique(self.view)}
    self._rows = {view: rows[np.argsort(self.index[rows], kind="stable")] for view, rows in self._rows.items()}
    self._check()

  def __len__(self) -> int:
    return len(self.index)

  @property
  def views(self) -> list[int]:
    """The numbers of its views."""
    return list(self._rows)

  def read(self, index: np.ndarray | None = None, view: np.ndarray | int | None = None) -> PyTree:
    """Reads rows, and only them.

    Args:
      index: int `[examples]`, the examples wanted; by default all rows in the recorded order.
      view: int `[examples]` or one for all, which view of each; may be left out if there is only one.

    Returns:
      The nested dict of arrays `[examples, ...]`.

    Raises:
      ValueError: if the record lacks an example, or has several views and none is named.
    """
    return self._gather(np.arange(len(self)) if index is None else self._found(np.asarray(index), view))

  def of(self, batch: Mapping[str, Any]) -> PyTree:
    """Reads the rows of a batch, by its `index` and, where it was augmented, its `view`.

    Raises:
      ValueError: as `read`; or the batch does not hold what the teacher saw: another augmentation, order or data set.
    """
    if INDEX not in batch:
      raise ValueError(f"a batch needs 'index' to find the teacher's outputs; it has {sorted(batch)}")
    rows = self._found(np.asarray(batch[INDEX]), batch.get(VIEW))
    if self.inputs:
      seen = self._gather(rows, lambda name: name == INPUT)[INPUT]
      self._check_seen(fingerprints(lookup(batch, self.inputs)), seen, batch)
    return self._gather(rows)

  def checksums(self) -> np.ndarray:
    """The checksum of what the teacher saw of each row, int64 `[rows]`, where `record_from` was told its inputs."""
    return self._gather(np.arange(len(self)), lambda name: name == INPUT)[INPUT]

  def _check_seen(self, now: np.ndarray, before: np.ndarray, batch: Mapping[str, Any]) -> None:
    other = np.flatnonzero(now != before)
    if other.size:
      examples = np.asarray(batch[INDEX])[other[:5]].tolist()
      raise ValueError(
        f"{other.size} of {len(now)} examples have another {self.inputs!r} than the teacher of {self.directory} saw,"
        f" first {examples}; use the augmentation and the data of the record, or record the teacher again"
      )

  def _found(self, index: np.ndarray, view: Any) -> np.ndarray:
    """The row of each example."""
    if view is None:
      if len(self._rows) > 1:
        raise ValueError(f"{self.directory} has the views {_few(self._rows)} of its examples; say which, by 'view'")
      view = next(iter(self._rows), 0)
    views = np.broadcast_to(np.asarray(view), index.shape)
    rows = np.full(index.shape, -1, np.int64)
    for number in np.unique(views):
      candidates, wanted = self._rows.get(int(number), np.zeros(0, np.int64)), views == number
      if candidates.size:
        place = np.searchsorted(self.index[candidates], index[wanted]).clip(max=len(candidates) - 1)
        rows[wanted] = np.where(self.index[candidates[place]] == index[wanted], candidates[place], -1)
    if (rows < 0).any():
      missing, where = index[rows < 0], views[rows < 0]
      of_view = f" in the view {where[0]} (it has {_few(self._rows)})" if where.any() or self._rows.keys() - {0} else ""
      raise ValueError(
        f"the record in {self.directory} lacks {missing.size} of the examples, first {missing[:5].tolist()}{of_view}"
      )
    return rows

  def _gather(self, rows: np.ndarray, wanted: Any = None) -> PyTree:
    wanted = wanted or is_output
    kinds = {name: array for name, array in (self._parts[0] if self._parts else {}).items() if wanted(name)}
    found = {name: np.empty((len(rows), *array.shape[1:]), array.dtype) for name, array in kinds.items()}
    part_of_row = np.searchsorted(self._starts, rows, side="right") - 1
    for part in np.unique(part_of_row):
      here = part_of_row == part
      for name in found:
        found[name][here] = self._parts[part][name][rows[here] - self._starts[part]]
    return nest_names(found, SEPARATOR)

  def _check(self) -> None:
    kinds = [{name: described(array) for name, array in part.items()} for part in self._parts]
    repeated = any(len(np.unique(self.index[rows])) != len(rows) for rows in self._rows.values())
    if any(kind != kinds[0] for kind in kinds) or repeated:
      why = f"its parts differ: {kinds}" if not repeated else "a row of an example is there twice"
      raise ValueError(f"{self.directory} is no record: {why}; record the teacher again")


def inspect(directory: str | pathlib.Path) -> dict[str, dict[str, Any]]:
  """Says what a record, or each record of a store, holds; of one that is being written as well.

  Args:
    directory: a record, or a folder of records.

  Returns:
    By the name of its folder: `rows`, `examples`, `views`, `outputs` by path, `bytes`, `complete` and `source`.

  Raises:
    ValueError: if there is no record, or one is damaged.
  """
  directory = pathlib.Path(directory)
  folders = (
    [directory] if (directory / MANIFEST).is_file() else sorted(f.parent for f in directory.glob(f"*/{MANIFEST}"))
  )
  if not folders:
    raise ValueError(f"{directory} holds no record and no folder with one")
  return {folder.name: _summary(folder) for folder in folders}


def recorded(path: str = "batch.teacher") -> Model:
  """A teacher whose outputs come with the batch: the same Terms serve it as a live one.

  Args:
    path: context path of the recorded outputs, put there with the data.

  Returns:
    A model without params that returns what it is given.
  """
  return Model(lambda key, example: ({}, {}), lambda params, state, batch, *, train, key=None: (batch, state), path)


class RecordedBatches:
  """Batches with what the recorded teachers said about them, read as they come; the position is that of the batches.

      batches = RecordedBatches(data.grain_batches(...), {"teacher": teachers.open_record(directory)})

  Args:
    batches: iterator of batches with `index` and, if they are augmented, `view`.
    records: by the name under which the outputs join the batch; `recorded("batch.<name>")` is the teacher.
  """

  def __init__(self, batches: Any, records: Mapping[str, Record]):
    self._batches, self._records = batches, dict(records)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return self

  def __next__(self) -> dict[str, Any]:
    batch = next(self._batches)
    return {**batch, **{name: record.of(batch) for name, record in self._records.items()}}

  def get_state(self) -> dict[str, Any]:
    """Return the position of the batches, and the digests of the records."""
    return {"batches": self._batches.get_state(), "records": {n: record.digest for n, record in self._records.items()}}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continue at a position that `get_state` returned.

    Raises:
      ValueError: if it is of other records.
    """
    if state["records"] != self.get_state()["records"]:
      raise ValueError(f"the position is of other records: {state['records']}, here {self.get_state()['records']}")
    self._batches.set_state(state["batches"])


def _summary(directory: pathlib.Path) -> dict[str, Any]:
  manifest = read_manifest(directory)
  assert manifest is not None
  found = Record(directory, manifest, verify=False)
  return {
    "rows": len(found),
    "examples": len(np.unique(found.index)),
    "views": found.views,
    "outputs": found.outputs,
    "bytes": sum((directory / part.file).stat().st_size for part in manifest["parts"]),
    "complete": manifest["complete"],
    "source": found.source,
  }


def _few(numbers: Iterable[int]) -> str:
  names = [str(n) for n in numbers]
  return ", ".join(names if len(names) <= 8 else [*names[:7], "...", names[-1]])
