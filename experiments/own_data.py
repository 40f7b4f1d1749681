"""A user's own images and teachers: opened, compared with each other, and split, before anything is trained."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import networks
from kdflax import data, teachers
from kdflax.files import digest

SPLITS = ("train", "validation", "test")
_BATCH = 64  # images that a teacher sees at once
_PROBED = 256  # images on which it is tried before anything is written


class Own(NamedTuple):
  """A data set of the user: images by size, and which of them are for what."""

  open: Callable[[Any], list[data.Images]]  # size -> parts, decoded to that size
  labels: np.ndarray | None  # int32 [images]
  classes: tuple[str, ...] | None
  rows: Mapping[str, np.ndarray]  # of each split, counted through the parts

  def arrays(self, size: Any, rows: np.ndarray) -> data.Arrays:
    """Decodes some images."""
    parts = self.open(size)
    starts = np.cumsum([0, *map(len, parts)])
    found, places = [], []
    for part, start, end in zip(parts, starts, starts[1:], strict=False):
      place = np.flatnonzero((rows >= start) & (rows < end))
      if place.size:
        found.append(part.arrays(rows[place] - start) | {"index": rows[place].astype(np.int32)})
        places.append(place)
    shapes = {arrays["image"].shape[1:] for arrays in found}
    if len(shapes) > 1:
      raise ValueError(f"the images of the folders differ in shape: {sorted(shapes)}; give a size")
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    return data.gather(joined, np.argsort(np.concatenate(places)))


def own_data(config: Any) -> Own:
  """Opens what `--data` names: a folder of classes, one with train and test in it, a folder of images, or Parquet.

  Raises:
    ValueError: if the folders have other classes than each other, a class is too small to be split, or there are too
      few images.
    OSError: if it is not there.
  """
  root = pathlib.Path(config.data)
  if root.suffix == ".parquet" or (root.is_dir() and any(root.glob("*.parquet"))):
    label = config.label or None
    make = functools.cache(lambda size: [data.image_table(root, label=label, size=size, channels=config.channels)])
    names = [""]
  else:
    found = [name for name in SPLITS if (root / name).is_dir()]
    names = found if "train" in found else [""]
    make = functools.cache(
      lambda size: [data.image_folder(root / name, size=size, channels=config.channels) for name in names]
    )
  parts = make(config.size)
  _check_classes(root, names, parts)
  labelled = [part.labels for part in parts if part.labels is not None]
  labels = np.concatenate(labelled) if labelled else None
  classes = parts[0].classes
  if labels is not None and classes is None:
    classes = tuple(str(n) for n in range(labels.max() + 1))
  starts = np.cumsum([0, *map(len, parts)])
  given = {n: np.arange(a, b) for n, a, b in zip(names, starts, starts[1:], strict=False)}
  return Own(make, labels, classes, _split(root, given, labels, classes, config))


def _check_classes(root: pathlib.Path, names: Sequence[str], parts: Sequence[data.Images]) -> None:
  for name, part in zip(names, parts, strict=True):
    if part.classes != parts[0].classes:
      mine, first = set(part.classes or ()), set(parts[0].classes or ())
      raise ValueError(
        f"{root / name} has other classes than {root / names[0]}: lacks {sorted(first - mine)}, and"
        f" {sorted(mine - first)} more; each split needs all of them"
      )


def _split(root: pathlib.Path, given: Mapping[str, np.ndarray], labels: Any, classes: Any, config: Any) -> Any:
  """Rows of each split; what the folders do not give is drawn from the training images, equally of each class."""
  rows = dict(given) if "train" in given else {"train": given[""]}
  for name in ("test", "validation"):
    if name in rows:
      continue
    pool, share = rows["train"], config.held_out
    held = max(round(share * sum(map(len, given.values()))), 1)
    if labels is None:
      order = np.random.RandomState(0).permutation(pool)
      rows[name], rows["train"] = np.sort(order[:held]), np.sort(order[held:])
      continue
    counts = np.bincount(labels[pool], minlength=len(classes))
    if counts.min() < 3:
      small = {classes[n]: int(counts[n]) for n in np.flatnonzero(counts < 3)}
      raise ValueError(f"{root}: too few images to hold some out, at least 3 of each class: {small}")
    held = max(held, len(classes))
    kept, out = data.stratified_split(labels[pool], (len(pool) - held, held), seed=0)
    rows[name], rows["train"] = pool[out], pool[kept]
  return {name: rows[name] for name in SPLITS}


class Asked(NamedTuple):
  """A teacher that fits the data: it was asked about some of the images."""

  name: str  # of what it knows
  file: str
  teacher: Any  # External, or a Record
  size: Any  # of the images that it wants


class Said(NamedTuple):
  """What a teacher says about every image."""

  digest: str  # of the record
  logits: np.ndarray  # [images, classes], in the order of the classes of the data


def ask(config: Any, own: Own, name: str, file: str) -> Asked:
  """Asks a teacher about a few of the images; nothing is written yet.

  Raises:
    ValueError: if the file is of no known kind, takes other inputs, knows other classes, has them in another order, or
      is a record of other images.
  """
  path, train = pathlib.Path(file), own.rows["train"]
  rows = train[np.unique(np.linspace(0, len(train) - 1, _PROBED).astype(int))]
  if path.is_dir():
    teacher = teachers.open_record(path)
    if len(teacher) != (total := sum(map(len, own.rows.values()))):
      raise ValueError(
        f"{path} is a record of {len(teacher)} images, the data have {total}; record the teacher on them"
      )
    seen = teacher.source.get("images", {})
    size = tuple(seen["size"]) if isinstance(seen.get("size"), list) else seen.get("size")
    said = teacher.of(next(_batches(own, size, rows))) if seen else teacher.read(rows)
  else:
    teacher, size = _teacher(config, own, path)
    said = teacher(next(_batches(own, size, rows)))
  if "logits" not in said:
    raise ValueError(f"{file} says {sorted(said)}; a student learns from 'logits'")
  _check_logits(name, file, said["logits"], own, config)
  _check_right(name, file, _of_classes(config, own, said["logits"]), own, rows, config)
  return Asked(name, file, teacher, size)


def hear(config: Any, own: Own, asked: Asked, directory: pathlib.Path) -> Said:
  """Records a teacher on all images of the data, or reads its record; continued after a kill."""
  index = np.sort(np.concatenate(list(own.rows.values())))
  record = asked.teacher
  if not isinstance(record, teachers.Record):
    facts = {"images": {"size": asked.size, "channels": config.channels}}
    batches = _batches(own, asked.size, index, step=_BATCH)
    source = dict(asked.teacher.source) | facts
    record = teachers.record_from(asked.teacher, batches, directory, inputs="image", source=source, num_rows=len(index))
  return Said(record.digest, _of_classes(config, own, record.read(index)["logits"]))


def _of_classes(config: Any, own: Own, logits: np.ndarray) -> np.ndarray:
  """Logits of the classes of the data; of a teacher that says probabilities their logarithms do the same."""
  logits = np.asarray(logits, np.float32)
  if logits.min() >= 0 and np.abs(logits.sum(1) - 1).max() < 1e-3:
    logits = np.log(np.maximum(logits, 1e-9))
  chosen = _chosen_classes(config, own, logits.shape[1])
  return logits if chosen is None else logits[:, chosen]


def _teacher(config: Any, own: Own, path: pathlib.Path) -> tuple[Any, Any]:
  """The teacher in a file, and the size of the images that it wants."""
  if path.suffix == ".onnx":
    takes = teachers.onnx_inputs(path)
    if len(takes) != 1:
      raise ValueError(f"{path} takes {takes}; a teacher of images takes one input: record it with record_from")
    ((name, (dtype, shape)),) = takes.items()
    first = len(shape) == 4 and shape[1] in (1, 3)
    if len(shape) != 4 or not (first or shape[3] in (1, 3)):
      raise ValueError(f"{path} takes {name!r} as {dtype}{shape}; expected images with 1 or 3 channels")
    height, width, channels = (shape[2], shape[3], shape[1]) if first else (shape[1], shape[2], shape[3])
    size = (height, width) if height and width else config.teacher_size
    prepare = teachers.image_input(
      mean=config.teacher_mean, deviation=config.teacher_deviation, channels=channels, channels_first=first
    )
    inputs = {name: (lambda batch: batch["image"]) if dtype == "uint8" else prepare}
    outputs = {"logits": config.teacher_output} if config.teacher_output else None
    return teachers.from_onnx(path, inputs=inputs, outputs=outputs), size
  if path.suffix == ".safetensors":
    if not config.teacher_network or own.classes is None:
      raise ValueError(f"{path} holds weights: say of which network by --teacher-network, for data with labels")
    model = networks.network(config.teacher_network, len(own.classes), None)
    params, state = teachers.load_variables(path)
    forward = jax.jit(lambda image: model.apply(params, state, {"image": image}, train=False, key=None)[0]["logits"])
    prepare = teachers.image_input(
      mean=config.teacher_mean, deviation=config.teacher_deviation, channels=config.channels, channels_first=False
    )
    source = {"network": config.teacher_network, "sha256": digest((params, state))}
    return teachers.External(
      lambda batch: {"logits": np.asarray(forward(prepare(batch)))}, source
    ), config.teacher_size or config.size
  raise ValueError(f"teacher {path}: expected an .onnx file, a .safetensors file, or the folder of a record")


def _batches(own: Own, size: Any, index: np.ndarray, *, step: int | None = None) -> Iterator[data.Arrays]:
  """Images by their place in the data, decoded as they are asked for; all at once without a step."""
  for start in range(0, len(index), step or len(index)):
    arrays = own.arrays(size, index[start : start + (step or len(index))])
    yield {"image": arrays["image"], "index": arrays["index"]}


def _check_logits(name: str, file: str, logits: np.ndarray, own: Own, config: Any) -> None:
  if logits.ndim != 2:
    raise ValueError(f"{file} says {list(logits.shape)} about a batch; expected [images, classes]: --teacher-output")
  if name == "class" and own.classes is not None and not config.teacher_classes and logits.shape[1] != len(own.classes):
    raise ValueError(
      f"{file} knows {logits.shape[1]} classes, the data have {len(own.classes)}: {', '.join(own.classes[:10])}; name"
      " those of the teacher in a file, one a line, by --teacher-classes"
    )


def _chosen_classes(config: Any, own: Own, number: int) -> np.ndarray | None:
  """Which of the teacher's classes are those of the data, by their names."""
  if not config.teacher_classes or own.classes is None:
    return None
  names = [line.strip() for line in pathlib.Path(config.teacher_classes).read_text().splitlines() if line.strip()]
  if len(names) != number:
    raise ValueError(f"{config.teacher_classes} names {len(names)} classes, the teacher has {number}")
  missing = [name for name in own.classes if name not in names]
  if missing:
    raise ValueError(f"the teacher knows no class {', '.join(missing)}; it knows {', '.join(names[:20])}")
  return np.array([names.index(name) for name in own.classes])


def _check_right(name: str, file: str, logits: np.ndarray, own: Own, rows: np.ndarray, config: Any) -> None:
  """A teacher that is right as often as a guess has its classes in another order."""
  if name != "class" or own.labels is None or config.trust_teacher:
    return
  right, guess = float((logits.argmax(1) == own.labels[rows]).mean()), 1 / logits.shape[1]
  if len(rows) >= 50 and right < 1.5 * guess:
    raise ValueError(
      f"{file} is right on {100 * right:.1f}% of {len(rows)} labelled images, a guess on {100 * guess:.1f}%: are its"
      f" classes in the order {', '.join((own.classes or ())[:10])}, and its mean and deviation right? --trust-teacher"
      " goes on"
    )
