"""The table of the zoo: every loss of `kdflax.losses` as the connectors and Terms that make it a method.

Weights that the field published are those of docs/methods.md, on the scale of the formulas here; the others are None
and are tuned. Where a paper compares several layers, every stage counts; where it compares one, that is the second
stage for hints and the last one for maps, and the pooled embedding for relations.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdflax import losses, models
from kdflax.objectives import Term

Network = dict[str, models.Model]
Terms = dict[str, Term]
Weight = Any  # a number, a scalar array or a schedule


class Pair(NamedTuple):
  """What the methods need to know of a teacher and a student: shapes, and the training labels for negatives."""

  student: Mapping[str, tuple[int, int, int]]  # (height, width, channels) of the maps by stage, first to last
  teacher: Mapping[str, tuple[int, int, int]]
  labels: np.ndarray  # [training examples]

  @property
  def stages(self) -> tuple[str, ...]:
    """The stages that both have, first to last."""
    return tuple(self.student)

  def channels(self, stage: str) -> int:
    """The teacher's channels, which a connector must give."""
    return self.teacher[stage][-1]


class Method(NamedTuple):
  """A row of the table."""

  title: str
  build: Callable[[Pair, Weight], tuple[Network, Terms]]
  weight: float | None = None  # published; None: to be tuned
  hard: float = 1.0  # weight of the cross-entropy with the labels
  warm_up: bool = False  # the weight grows over the first twelfth of the steps


def logits(loss: Callable, **arguments: Any):
  """A loss of the two logits; further arguments are context paths or constants."""
  inputs = {"student_logits": "student.logits", "teacher_logits": "teacher.logits", **arguments}
  return lambda pair, weight: ({}, {"distil": Term(loss, inputs, weight)})


def embeddings(loss: Callable):
  """A loss of the two pooled embeddings, whatever their widths."""
  inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}
  return lambda pair, weight: ({}, {"distil": Term(loss, inputs, weight)})


def projected_embedding(loss: Callable):
  """A loss of the two embeddings, the student's through a linear connector."""

  def build(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
    connector = models.linear_connector("student.embedding", pair.channels(pair.stages[-1]))
    inputs = {"student": "connector.output", "teacher": "teacher.embedding"}
    return {"connector": connector}, {"distil": Term(loss, inputs, weight)}

  return build


def last_map(loss: Callable, *, connect: bool = False):
  """A loss of the two last maps, the student's through a 1x1 convolution if `connect` and if widths differ."""

  def build(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
    stage = pair.stages[-1]
    network, paths = _adapted(pair, [stage]) if connect else ({}, {stage: f"student.features.{stage}"})
    inputs = {"student": paths[stage], "teacher": f"teacher.features.{stage}"}
    return network, {"distil": Term(loss, inputs, weight)}

  return build


def every_map(loss: Callable):
  """A loss of the maps of every stage, added up."""

  def build(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
    inputs = {stage: {side: f"{side}.features.{stage}" for side in ("student", "teacher")} for stage in pair.stages}
    return {}, {f"distil/{stage}": Term(loss, inputs[stage], weight) for stage in pair.stages}

  return build


def consecutive_maps(loss: Callable):
  """A loss of the flow from each stage to the next, added up."""

  def build(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
    network, paths = _adapted(pair, pair.stages)
    terms = {}
    for first, last in zip(pair.stages, pair.stages[1:], strict=False):
      inputs = {
        "student_first": paths[first],
        "student_last": paths[last],
        "teacher_first": f"teacher.features.{first}",
        "teacher_last": f"teacher.features.{last}",
      }
      terms[f"distil/{last}"] = Term(loss, inputs, weight)
    return network, terms

  return build


def hint(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
  """FitNets: the second stage through a convolutional regressor."""
  stage = pair.stages[1]
  regressor = models.conv_connector(
    f"student.features.{stage}", pair.channels(stage), kernel=3, batch_norm=True, activation=jax.nn.relu
  )
  inputs = {"student": "regressor.output", "teacher": f"teacher.features.{stage}"}
  return {"regressor": regressor}, {"distil": Term(losses.hint, inputs, weight)}


def before_activation(loss: Callable, **arguments: str):
  """A loss of the maps before the ReLU through connectors, halved for each stage before the last.

  In the arguments `{stage}` stands for the stage.
  """

  def build(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
    network, terms = {}, {}
    for depth, stage in enumerate(reversed(pair.stages)):
      name = f"connector_{stage}"
      network[name] = models.conv_connector(f"student.features.{stage}_pre", pair.channels(stage), batch_norm=True)
      inputs = {"student": f"{name}.output", "teacher": f"teacher.features.{stage}_pre"}
      inputs |= {argument: path.format(stage=stage) for argument, path in arguments.items()}
      terms[f"distil/{stage}"] = Term(loss, inputs, weight / 2**depth)
    return network, terms

  return build


def overhaul(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
  """OFD: its margins are those of the frozen teacher, given as the params of a model without a function."""
  network, terms = before_activation(losses.ofd, margin="margins.{stage}")(pair, weight)
  margins = models.Model(lambda key, batch: ({}, {}), lambda params, state, batch, *, train, key=None: (params, state))
  return {"margins": margins, **network}, terms


def variational(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
  """VID: every stage of the teacher as a Gaussian that the student predicts."""
  network, terms = {}, {}
  for stage in pair.stages:
    network[f"gaussian_{stage}"] = models.vid_connector(f"student.features.{stage}", pair.channels(stage))
    inputs = {"predicted_mean": f"gaussian_{stage}.output", "variance": f"gaussian_{stage}.variance"}
    terms[f"distil/{stage}"] = Term(losses.vid, inputs | {"teacher": f"teacher.features.{stage}"}, weight)
  return network, terms


def review(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
  """ReviewKD over the maps; the paper adds the pooled embedding as one more level."""
  deepest_first = pair.stages[::-1]
  fusion = models.review_fusion(
    [f"student.features.{stage}" for stage in deepest_first],
    [pair.channels(stage) for stage in deepest_first],
    sizes=[pair.teacher[stage][:2] for stage in deepest_first],
    width=pair.channels(deepest_first[0]),
  )
  inputs = {
    stage: {"student": f"fusion.features.{stage}", "teacher": f"teacher.features.{stage}"} for stage in pair.stages
  }
  terms = {f"distil/{stage}": Term(losses.hierarchical_context, inputs[stage], weight) for stage in pair.stages}
  return {"fusion": fusion}, terms


def factors(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
  """Factor transfer; the paraphraser learns beside the student here, in the paper before it."""
  stage = pair.stages[-1]
  teacher = f"teacher.features.{stage}"
  network = {
    "paraphraser": models.paraphraser(teacher),
    "translator": models.translator(f"student.features.{stage}", pair.channels(stage) // 2),
  }
  stopped = ("teacher", "paraphraser.output")
  inputs = {"student": "translator.output", "teacher": "paraphraser.output"}
  rebuilt = {"student": "paraphraser.reconstruction", "teacher": teacher}
  return network, {
    "distil": Term(losses.factor_transfer, inputs, weight, stop_gradient=stopped),
    "rebuild": Term(losses.hint, rebuilt),
  }


def class_maps(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
  """CAT-KD: class activation maps, without normalisation as its authors train beside labels."""
  loss = functools.partial(losses.class_attention_transfer, normalize=False)
  return {}, {"distil": Term(loss, {"student": "student.class_maps", "teacher": "teacher.class_maps"}, weight)}


def contrastive(pair: Pair, weight: Weight) -> tuple[Network, Terms]:
  """CRD: a projection on each side, and the memory as the state of a model."""
  width, negatives = (128, 16384) if len(pair.labels) > 16384 else (32, 64)
  network = {side: models.embedding_connector(f"{side}.embedding", width) for side in ("student", "teacher")}
  network = {f"projected_{side}": connector for side, connector in network.items()}
  network["crd"] = crd_model(("projected_student.output", "projected_teacher.output"), pair.labels, width, negatives)
  return network, {"distil": Term(lambda values: values, {"values": "crd.values"}, weight, stop_gradient=())}


def crd_model(embeddings: Sequence[str], labels: np.ndarray, width: int, negatives: int) -> models.Model:
  """Makes CRD a model: its memory is the state, its output `values` one value per example.

  Args:
    embeddings: context paths of the student's and the teacher's embeddings on the sphere.
    labels: `[training examples]`; `batch.row` names the examples of a batch among them.
    width: of the embeddings.
    negatives: drawn for each example uniformly, with replacement, from the examples of other classes.
  """
  order = np.argsort(labels, kind="stable")
  counts = np.bincount(labels)
  first = np.cumsum(counts) - counts

  def init(key: jax.Array, example: Any):
    return {}, losses.crd_memory(key, len(labels), width)._asdict()

  def apply(params, state, inputs, *, train: bool, key: jax.Array | None = None):
    student, teacher, row = inputs
    label = jnp.asarray(labels)[row][:, None]
    # A position in the order of the classes, counted past the example's own class.
    key = jax.random.key(0) if key is None else key
    position = jax.random.randint(key, (len(row), negatives), 0, len(labels) - jnp.asarray(counts)[label])
    position += jnp.where(position >= jnp.asarray(first)[label], jnp.asarray(counts)[label], 0)
    indices = jnp.concatenate([row[:, None], jnp.asarray(order)[position]], axis=1)
    values, memory = losses.crd(student, teacher, indices, losses.CRDMemory(**state))
    return {"values": values}, memory._asdict() if train else state

  return models.Model(init, apply, (*embeddings, "batch.row"))


def unit_congruence(student: jax.Array, teacher: jax.Array, **arguments: Any) -> jax.Array:
  """Correlation congruence of unit vectors, which its Gaussian kernel is an expansion for."""
  return losses.correlation_congruence(_unit(student), _unit(teacher), **arguments)


def _unit(rows: jax.Array) -> jax.Array:
  squares = jnp.square(rows).sum(axis=-1, keepdims=True)
  return rows * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def _adapted(pair: Pair, stages: Sequence[str]) -> tuple[Network, dict[str, str]]:
  """1x1 convolutions to the teacher's channels where widths differ, and the paths of the maps that fit."""
  network, paths = {}, {}
  for stage in stages:
    paths[stage] = f"student.features.{stage}"
    if pair.student[stage][-1] != pair.channels(stage):
      network[f"connector_{stage}"] = models.conv_connector(paths[stage], pair.channels(stage))
      paths[stage] = f"connector_{stage}.output"
  return network, paths


# One row for each public loss, by its name. `experiments.zoo` says what the published weights were published for.
METHODS: dict[str, Method] = {
  "kl_soft_targets": Method("KD", logits(losses.kl_soft_targets, temperature=4.0), 0.9, hard=0.1),
  "standardize_logits": Method(
    "KD of standardized logits", logits(losses.standardized(losses.kl_soft_targets), temperature=2.0), 9.0, hard=0.1
  ),
  "dkd": Method("DKD", logits(losses.dkd, labels="batch.label"), 1.0, warm_up=True),
  "nkd": Method("NKD", logits(losses.nkd, labels="batch.label")),
  "dist": Method("DIST", logits(losses.dist, temperature=4.0)),
  "class_correlation": Method("MLKD, class level", logits(losses.class_correlation, temperature=4.0)),
  "batch_correlation": Method("MLKD, batch level", logits(losses.batch_correlation, temperature=4.0)),
  "hard_targets": Method("hard distillation", logits(losses.hard_targets)),
  "forward_kl": Method("forward KL", logits(losses.forward_kl)),
  "reverse_kl": Method("reverse KL", logits(losses.reverse_kl)),
  "total_variation": Method("total variation", logits(losses.total_variation)),
  "skew_kl": Method("skew KL", logits(losses.skew_kl)),
  "reverse_skew_kl": Method("reverse skew KL", logits(losses.reverse_skew_kl)),
  "jensen_shannon": Method("generalised JSD", logits(losses.jensen_shannon)),
  "hint": Method("FitNets hint", hint, 100.0),
  "cosine": Method("cosine", projected_embedding(losses.cosine)),
  "hierarchical_context": Method("ReviewKD", review, 1.0, warm_up=True),
  "vid": Method("VID", variational, 1.0),
  "activation_boundary": Method("AB", before_activation(losses.activation_boundary), 3e-3),
  "ofd": Method("OFD", overhaul, 1e-3),
  "attention_transfer": Method("AT", every_map(losses.attention_transfer), 1000.0),
  "factor_transfer": Method("FT", factors, 200.0),
  "class_attention_transfer": Method("CAT-KD", class_maps, 10.0),
  "fsp": Method("FSP", consecutive_maps(losses.fsp), 50.0),
  "nst": Method("NST", every_map(losses.nst), 50.0),
  "inter_channel_correlation": Method("ICKD", last_map(losses.inter_channel_correlation, connect=True)),
  "kdsvd": Method("KDSVD", consecutive_maps(losses.kdsvd), 1.0),
  "rkd_distance": Method("RKD, distances", embeddings(losses.rkd_distance), 25.0),
  "rkd_angle": Method("RKD, angles", embeddings(losses.rkd_angle), 50.0),
  "similarity_preserving": Method("SP", last_map(losses.similarity_preserving), 3000.0),
  "pkt": Method("PKT", embeddings(losses.pkt), 30000.0),
  "correlation_congruence": Method("CC", embeddings(unit_congruence)),
  "crd": Method("CRD", contrastive, 0.8),
  "info_nce": Method("InfoNCE", projected_embedding(losses.info_nce)),
}

# Public in kdflax.losses, and no method for a pair of classifiers.
NO_METHODS = {
  "CRDMemory": "the state of crd",
  "crd_memory": "makes the state of crd",
  "masked_mean": "reduces",
  "masked_sum": "reduces",
  "ofd_margin": "makes an argument of ofd",
  "standardized": "wraps a loss, as in the row standardize_logits",
  "top_k_kl": "for vocabularies",
  "fused_linear": "for vocabularies",
  "unordered_logits": "for vocabularies that differ",
}
