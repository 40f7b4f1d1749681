"""Rows of text for language models, how a model goes on with them, and how well it foretells them."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdflax import data, losses, models

ENDS = ("<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
_SCORED_AT_ONCE = 4  # rows; whole logits of both sides are there


class Language(NamedTuple):
  """A language model: what it is, and the function without and with logits."""

  config: models.DecoderConfig
  hidden: models.Model
  logits: models.Model

  def head_path(self, name: str) -> str:
    """The context path of the head of the model of this name."""
    return f"params.{name}.{self.config.head_name}"


def language(config: models.DecoderConfig) -> Language:
  """The language model of a config."""
  return Language(config, models.decoder(config, head=False), models.decoder(config))


def read_text(config: Any) -> tuple[dict[str, data.Arrays], Any]:
  """Returns the rows of each split, and their tokenizer, from the user's files or the standard library.

  Raises:
    ValueError: the tokenizer has no end token of a known name, or a split has no whole row.
  """
  if not config.text:
    most = 200_000 if config.smoke else None
    text = data.standard_library(length=config.length, vocabulary=config.vocabulary, most_bytes=most)
    return {name: examples_of(name, packed) for name, packed in text.splits.items()}, text.tokenizer
  documents = [pathlib.Path(file).read_text("utf-8", "replace") for file in config.text]
  parts = {name: [_part(document, name) for document in documents] for name in SHARES}
  if config.tokenizer:
    tokenizer = data.read_tokenizer(config.tokenizer)
  else:
    tokenizer = data.byte_pairs(parts["train"], config.vocabulary)
  packed = {name: data.pack(tokenizer, part, config.length, end=end_of(tokenizer)) for name, part in parts.items()}
  return {name: examples_of(name, arrays) for name, arrays in packed.items()}, tokenizer


def end_of(tokenizer: Any) -> int:
  """The number of the token that ends a document.

  Raises:
    ValueError: it has none of a known name.
  """
  found = [number for name in ENDS if (number := tokenizer.token_to_id(name)) is not None]
  if not found:
    raise ValueError(f"the tokenizer has no end token: none of {', '.join(ENDS)}")
  return found[0]


def _part(document: str, split: str) -> str:
  """A file of the user's is cut in three: its beginning is for training."""
  ends = np.cumsum([0.0, *SHARES.values()]) * len(document)
  place = list(SHARES).index(split)
  return document[round(ends[place]) : round(ends[place + 1])]


def examples_of(name: str, packed: data.Arrays) -> data.Arrays:
  """The whole rows of a split, each token with the one that it shall foretell, and how many bytes that is.

  Raises:
    ValueError: there is no whole row.
  """
  whole = packed["segments"].min(axis=1) > 0
  if not whole.any():
    raise ValueError(f"the {name} split has no whole row of {packed['tokens'].shape[1]} tokens; give more text")
  rows = jax.tree.map(lambda x: x[whole], packed)
  made = jax.tree.map(np.asarray, with_labels(rows["tokens"], rows["segments"]))
  return made | {"bytes": np.roll(rows["bytes"], -1, axis=1), "index": rows["index"]}


def with_labels(tokens: jax.Array, segments: jax.Array, counted: Any = True) -> data.Arrays:
  """Rows with their labels; a token counts that `counted` says, and that follows one of its own document.

  Args:
    tokens: `[rows, length]`.
    segments: `[rows, length]`.
    counted: bool `[rows, length]`.
  """
  follows = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
  labels, where = losses.shift_labels(jnp.asarray(tokens), follows & (jnp.asarray(segments) > 0) & counted)
  return {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments), "labels": labels, "where": where}


def few(rows: data.Arrays, count: int) -> data.Arrays:
  """So many rows, evenly spread over a split."""
  total = len(rows["tokens"])
  return data.gather(rows, np.linspace(0, total - 1, min(max(count, 1), total)).astype(int))


def continued(sample: Any, params: Any, rows: Mapping[str, Any], prompt: int, key: jax.Array) -> data.Arrays:
  """Rows that begin as those given and that a model goes on with; what it writes counts alone.

  Of the first tokens, it is given the document that the last of them is in.

  Args:
    sample: of `models.make_sampler`.
    params: of the model.
    rows: `tokens` and `segments` `[rows, length]`.
    prompt: how many first tokens.
    key: of what is drawn.
  """
  tokens, segments = (jnp.asarray(rows[name])[:, :prompt] for name in ("tokens", "segments"))
  start = jnp.argmax(segments == segments[:, -1:], axis=1)
  places = jnp.minimum(jnp.arange(prompt) + start[:, None], prompt - 1)
  made = sample(params, jnp.take_along_axis(tokens, places, axis=1), key, lengths=prompt - start)
  exists = jnp.arange(made.tokens.shape[1]) < made.lengths[:, None]
  return with_labels(made.tokens, exists.astype(jnp.int32), made.generated)


def scorer(student: Language, teacher: Language, rows: data.Arrays) -> Callable[[Any, Any], dict[str, list[float]]]:
  """Returns the function from the params of the students of all seeds and of the teacher to means over the rows.

  Args:
    student: their model.
    teacher: its model.
    rows: of a split; what is left over of batches of four rows is left out.
  """
  size = min(_SCORED_AT_ONCE, len(rows["tokens"]))
  batches = len(rows["tokens"]) // size
  shared = min(student.config.vocabulary, teacher.config.vocabulary)
  kinds = {"forward KL": losses.forward_kl, "reverse KL": losses.reverse_kl, "distance": losses.total_variation}

  @jax.jit
  def sums(students: Any, teacher_params: Any, batch: data.Arrays) -> dict[str, jax.Array]:
    where = batch["where"]
    say = lambda model, params: model.logits.apply(params, {}, batch, train=False, key=None)[0]["logits"]
    of_teacher = say(teacher, teacher_params)[..., :shared]

    def of_student(params):
      logits = say(student, params)
      found = {name: loss(logits[..., :shared], of_teacher, where=where) for name, loss in kinds.items()}
      own = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], axis=-1)[..., 0]
      return {name: values.sum() for name, values in found.items()} | {"nats": -jnp.where(where, own, 0).sum()}

    return jax.lax.map(of_student, students)

  def score(students: Any, teacher_params: Any) -> dict[str, list[float]]:
    total: dict[str, Any] = {}
    for index in range(batches):
      batch = jax.tree.map(lambda x, at=index * size: x[at : at + size], dict(rows))
      for name, value in sums(students, teacher_params, batch).items():
        total[name] = total.get(name, 0) + np.asarray(value, np.float64)
    used = jax.tree.map(lambda x: x[: batches * size], dict(rows))
    tokens, volume = used["where"].sum(), (used["bytes"] * used["where"]).sum()
    found = {name: total[name] / tokens for name in ("forward KL", "reverse KL")}
    found |= {"acceptance": 1 - total["distance"] / tokens, "bits per byte": total["nats"] / np.log(2) / volume}
    return {name: values.tolist() for name, values in found.items()}

  return score


def samples(
  writers: Mapping[str, tuple[Language, Any]], rows: data.Arrays, prompt: int, tokenizer: Any, chosen: Sequence[int]
) -> str:
  """A page of what each model makes of a few prompts, always taking its likeliest token.

  Args:
    writers: models with the params of one seed, by name.
    rows: of which the prompts are the first tokens.
    prompt: how many.
    tokenizer: of the rows.
    chosen: which of the rows.
  """
  some = {name: np.asarray(rows[name])[list(chosen)] for name in ("tokens", "segments")}
  new = some["tokens"].shape[1] - prompt
  greedy = {"new_tokens": new, "temperature": 0.0, "stop_tokens": (end_of(tokenizer),)}
  decode = lambda ids: tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)
  texts = {}
  for name, (model, params) in writers.items():
    made = continued(models.make_sampler(model.config, **greedy), params, some, prompt, jax.random.key(0))
    where = np.roll(made["where"], 1, axis=1)  # the labels that count are what was written
    texts[name] = [decode(np.asarray(row)[own]) for row, own in zip(made["tokens"], where, strict=True)]
  lines = [f"# What they write: the likeliest token each time, after {prompt} tokens of the test split", ""]
  for place in range(len(some["tokens"])):
    lines += [f"## Prompt {place + 1}", "", *_fenced(decode(some["tokens"][place, :prompt])), ""]
    lines += ["In the file:", "", *_fenced(decode(some["tokens"][place, prompt:])), ""]
    for name, written in texts.items():
      lines += [f"{name}:", "", *_fenced(written[place]), ""]
  return "\n".join(lines)


def _fenced(text: str) -> list[str]:
  return ["~~~~", text.replace("~~~~", "~~~").rstrip("\n"), "~~~~"]
