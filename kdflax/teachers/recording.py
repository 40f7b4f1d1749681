"""Recording a teacher of any kind, as it speaks: in parts, on disk as it goes, continued after a kill."""

import contextlib
import fcntl
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from kdflax.files import write_atomically
from kdflax.model import lookup
from kdflax.teachers._parts import (
  INDEX,
  INPUT,
  MANIFEST,
  VIEW,
  Part,
  described,
  fingerprints,
  flat_outputs,
  read_manifest,
)
from kdflax.teachers.store import Record, open_record

PyTree = Any
_SECONDS_A_PART = 60  # what a kill can cost
_SECONDS_A_LINE = 10


def record_from(
  function: Callable[[dict[str, Any]], PyTree],
  batches: Iterable[Mapping[str, Any]],
  directory: str | pathlib.Path,
  *,
  inputs: str | None = None,
  source: Mapping[str, Any] | None = None,
  dtype: Any = None,
  num_rows: int | None = None,
  part_bytes: int = 64 << 20,
  progress: Callable[[str], Any] | None = None,
) -> Record:
  """Records what any function says about every example and view, and goes on where it was interrupted.

  The outputs are written in parts while they come, at least once a minute, and never held as a whole. The same call
  continues after a kill: rows that are there are not computed again, and a complete record is only opened.

  Args:
    function: `batch -> outputs`, a nested dict of NumPy arrays `[batch, ...]`: a network, a server, a table.
    batches: dicts of arrays with `index`, int `[batch]`, and, if they are augmented, `view`, int `[batch]`, which
      augmentation of the example it is (`data.views` makes both). Rows where `where` is False are left out, so
      `data.padded_batches` will do. A row that was there before is left out as well.
    directory: of this record, such as `store/left` in a store of several teachers.
    inputs: context path of an array of the batch, such as `"image"`, that a student must see exactly as the teacher
      does: of each row a checksum is kept, and `Record.of` refuses a batch that differs.
    source: JSON to keep with it: model, digest of its params, data set. A record of another source is not continued.
    dtype: type to keep floats in, such as `np.float16`; by default as they come.
    num_rows: how many rows there will be, to say how long it takes; unless given, that of `len(batches)` batches.
    part_bytes: size of a part.
    progress: called with a line of text every ten seconds; by default it goes to stderr.

  Returns:
    The record, opened.

  Raises:
    ValueError: if the directory holds a record of another source or other inputs, an array has another length than
      `index`, changes its shape between batches, is not finite (also: in `dtype`) or of a dtype that would not come
      back.
    BlockingIOError: another process is writing there.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with _locked(directory):
    writer = _Writer(directory, inputs, json.loads(json.dumps(dict(source or {}))), part_bytes)
    said = _Progress(directory.name, num_rows, batches, progress, len(writer.seen))
    try:
      for batch in batches:
        new = writer.missing(batch)
        if new.size:
          outputs = flat_outputs(function(dict(batch)), len(batch[INDEX]))
          writer.add(batch, new, {path: _kept(path, array, dtype) for path, array in outputs.items()})
        said.advance(batch, len(writer.seen), new.size)
    except BaseException:
      writer.write()  # a mistake or Ctrl-C costs nothing, a kill at most the part that is gathering
      raise
    writer.finish()
  return open_record(directory, verify=False)


class _Writer:
  """The parts of a record: rows gather in memory until they fill one."""

  def __init__(self, directory: pathlib.Path, inputs: str | None, source: dict[str, Any], part_bytes: int):
    self._directory, self._inputs, self._source, self._part_bytes = directory, inputs, source, part_bytes
    self._parts: list[Part] = []
    self._kinds: dict[str, str] = {}
    self._known: dict[tuple[int, int], int] = {}  # checksums of rows of an earlier call
    self.seen: set[tuple[int, int]] = set()
    self._complete = False
    manifest = read_manifest(directory)
    if manifest is not None:
      self._continue(manifest)
    self._clear()

  def _continue(self, manifest: dict[str, Any]) -> None:
    for what, before, now in [
      ("source", manifest["source"], self._source),
      ("inputs", manifest["inputs"], self._inputs),
    ]:
      if before != now:
        raise ValueError(
          f"{self._directory} holds a record of another {what}: {before!r}, now {now!r}; choose another directory, or"
          " delete it to record anew"
        )
    record = Record(self._directory, manifest)  # verified: what follows counts on it
    self._parts, self._kinds, self._complete = manifest["parts"], record.outputs, manifest["complete"]
    rows = list(zip(record.index.tolist(), record.view.tolist(), strict=True))
    self.seen.update(rows)
    if self._inputs:
      self._known = dict(zip(rows, record.checksums().tolist(), strict=True))

  def missing(self, batch: Mapping[str, Any]) -> np.ndarray:
    """The rows of a batch that are still to be recorded."""
    rows = _rows_of(batch)
    kept = np.asarray(batch.get("where", np.ones(len(rows), bool)))
    if self._known:
      known = np.array([place for place, row in enumerate(rows) if kept[place] and row in self._known], int)
      now = fingerprints(np.asarray(lookup(batch, self._inputs or ""))[known])
      other = [rows[place] for place, checksum in zip(known, now, strict=True) if checksum != self._known[rows[place]]]
      if other:
        raise ValueError(
          f"{len(other)} examples have another {self._inputs!r} than when {self._directory} was begun, first"
          f" {[index for index, _ in other[:5]]}; delete it to record anew"
        )
    last_first = reversed(list(enumerate(rows)))  # so that the first of two equal rows stays
    new = {row: place for place, row in last_first if kept[place] and row not in self.seen}
    return np.array(sorted(new.values()), int)

  def add(self, batch: Mapping[str, Any], new: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
    """Takes the new rows of a batch and its outputs."""
    kinds = {path: described(array) for path, array in outputs.items()}
    self._kinds = self._kinds or kinds
    if kinds != self._kinds:
      raise ValueError(f"the outputs changed: {self._kinds} before, {kinds} now; each row must have the same")
    rows = _rows_of(batch)
    facts = {name: np.array([rows[place][n] for place in new], np.int64) for n, name in enumerate((INDEX, VIEW))}
    if self._inputs:
      facts[INPUT] = fingerprints(np.asarray(lookup(batch, self._inputs))[new])
    self._waiting.append({path: array[new] for path, array in outputs.items()} | facts)
    self._bytes += sum(array.nbytes for array in self._waiting[-1].values())
    self.seen.update(rows[place] for place in new)
    if self._bytes >= self._part_bytes or time.monotonic() - self._since > _SECONDS_A_PART:
      self.write()

  def finish(self) -> None:
    """Writes what is left, and that the record is complete."""
    self.write()
    if not self._complete:
      self._write_manifest(complete=True)

  def write(self) -> None:
    """Writes the rows that have gathered as a part."""
    if not self._waiting:
      return
    arrays = {name: np.concatenate([rows[name] for rows in self._waiting]) for name in self._waiting[0]}
    content, name = save(arrays), f"part-{len(self._parts):05d}.safetensors"
    write_atomically(self._directory / name, content)
    self._parts.append(Part(name, len(arrays[INDEX]), hashlib.sha256(content).hexdigest()))
    self._write_manifest(complete=False)  # a part counts from here on
    self._clear()

  def _write_manifest(self, *, complete: bool) -> None:
    self._complete = complete
    document = {
      "complete": complete,
      "examples": sum(part.rows for part in self._parts),
      "inputs": self._inputs,
      "source": self._source,
      "parts": self._parts,
    }
    write_atomically(self._directory / MANIFEST, json.dumps(document, indent=1) + "\n")

  def _clear(self) -> None:
    self._waiting: list[dict[str, np.ndarray]] = []
    self._bytes, self._since = 0, time.monotonic()


class _Progress:
  """Lines that say how much is done and how long the rest takes."""

  def __init__(self, name: str, num_rows: int | None, batches: Any, say: Callable[[str], Any] | None, done: int):
    self._name, self._total, self._say = name, num_rows, say
    self._batches = len(batches) if hasattr(batches, "__len__") else None
    self._start = self._last = time.monotonic()
    self._before, self._computed = done, 0

  def advance(self, batch: Mapping[str, Any], done: int, computed: int) -> None:
    """Counts a batch."""
    self._computed += computed
    if self._total is None and self._batches is not None:
      self._total = self._batches * len(batch[INDEX])
    now = time.monotonic()
    if now - self._last >= _SECONDS_A_LINE and self._computed:
      self._last = now
      line = progress_line(self._name, done, self._total, self._computed / (now - self._start))
      self._say(line) if self._say else print(line, file=sys.stderr, flush=True)


def progress_line(name: str, done: int, total: int | None, rate: float) -> str:
  """What is said of a recording: rows done, rows a second, and the time that the rest will take."""
  if total is None or total < done:
    return f"{name}: {done:,} rows, {rate:,.1f} a second"
  left = int((total - done) / rate)
  hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
  time_left = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
  return f"{name}: {done:,} of {total:,} rows, {rate:,.1f} a second, {time_left} left"


def _rows_of(batch: Mapping[str, Any]) -> list[tuple[int, int]]:
  """(example, view) of each row."""
  if INDEX not in batch:
    raise ValueError(f"a batch needs 'index', which example each row is; it has {sorted(batch)}")
  index = np.asarray(batch[INDEX])
  view = np.asarray(batch.get(VIEW, np.zeros(index.shape, np.int64)))
  if index.ndim != 1 or index.dtype.kind not in "iu" or view.shape != index.shape or view.dtype.kind not in "iu":
    kinds = f"{index.dtype}{list(index.shape)} and {view.dtype}{list(view.shape)}"
    raise ValueError(f"index and view must be integers [batch]; got {kinds}")
  return list(zip(index.tolist(), view.tolist(), strict=True))


def _kept(path: str, array: np.ndarray, dtype: Any) -> np.ndarray:
  if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  with np.errstate(over="ignore"):
    kept = array.astype(dtype)
  if not np.isfinite(kept).all():
    raise ValueError(f"{path} reaches {np.abs(array).max():g}, which {np.dtype(dtype)} does not hold; keep it wider")
  return kept


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
  """One writer at a time."""
  with open(directory / "lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BlockingIOError(f"another process is recording into {directory}; wait for it") from error
    yield
