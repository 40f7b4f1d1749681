"""The catalogue: every loss and method, what it needs, how it was published, and how it is set up.

The one table that docs/methods.md, the study `experiments.zoo`, the tests and the benchmarks read. A new loss gets an
entry under its name, or a line in `TOOLS` if it is no method; what is a method and no loss of its own gets one under
the name of its function.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from kdflax import losses
from kdflax.methods import activations, contrast, features, heads, logits, outputs, products, relations
from kdflax.methods.method import Method

_of_logits = lambda loss, **settings: functools.partial(outputs.of_logits, loss=loss, **settings)
_of_embeddings = lambda loss, **settings: functools.partial(outputs.of_embeddings, loss=loss, **settings)


class Entry(NamedTuple):
  """One method.

  Attributes:
    title: as the field calls it.
    loss: its formula.
    needs: of the models and the batch.
    build: `(pair, *, weight, ...) -> Method`; None for what is no matter of two classifiers, such as vocabularies.
    weight: published for small CIFAR-100 networks, on the scale of the formula here and for what `build` makes.
    setting: what else was published; without a `weight`, all of it.
    source: who published it, by the letters of `SOURCES`.
    hard: weight of the cross-entropy with the labels beside it; 0 if there was none.
    warm_up: whether the weight grew from 0 over the first twelfth of the training.
    takes: keyword arguments that `build` must be given beside the pair.
  """

  title: str
  loss: Callable[..., Any]
  needs: str
  build: Callable[..., Method] | None = None
  weight: float | None = None
  setting: str = ""
  source: str = ""
  hard: float = 1.0
  warm_up: bool = False
  takes: tuple[str, ...] = ()

  @property
  def published(self) -> str:
    """The published weight and setting in words, with the letters of the source."""
    weight = "" if self.weight is None else f"{self.weight:g}"
    source = f" [{self.source}]" if self.source else ""
    return f"{weight}{self.setting}{source}" or "none recorded"

  @property
  def function(self) -> Callable[..., Method] | None:
    """The function of `kdflax.methods` that sets it up."""
    function: Any = self.build
    while isinstance(function, functools.partial):
      function = function.func
    return function

  @property
  def paper(self) -> str:
    """Authors, title and year, with the address if it is on arXiv: as the function says, or else the loss."""
    told = "Reference:" in (self.function.__doc__ or "") if self.function else False
    return paper(self.function if told and self.function else self.loss)


def paper(function: Callable[..., Any]) -> str:
  """The first reference of a docstring as a link.

  Raises:
    ValueError: if it has none of the usual form.
  """
  text = " ".join((inspect.getdoc(function) or "").split())
  found = re.search(r'Reference: (.+?), "(.+?)", (.*?\d{4})\b(?:, arXiv (\d{4}\.\d{4,5}))?', text)
  if not found:
    raise ValueError(f'the docstring of {function.__name__} must say: Reference: AUTHORS, "TITLE", YEAR, arXiv NUMBER')
  authors, title, year, number = found.groups()
  title = f"[{title}](https://arxiv.org/abs/{number})" if number else title
  return f"{authors}, {title}, {year}"


_LANGUAGE = ", alone, for language models"
SOURCES = {
  "r": "RepDistiller's scripts",
  "m": "mdistiller's configurations",
  "g": "TRL's GKD trainer",
  "s": "the scripts of logit-standardization-KD",
  "t": "the scripts of CTKD",
  "c": "the code of the authors of CAT-KD",
  "d": "that of DeiT",
  "f": "f-distill",
  "h": "DIST",
  "i": "ICKD",
  "k": "DistiLLM",
  "l": "MLKD",
  "n": "NKD",
  "v": "SimKD",
  "y": "MGD",
}

CATALOGUE: dict[str, Entry] = {
  # logits
  "kl_soft_targets": Entry(
    "KD, soft targets; mutual learning (DML)",
    losses.kl_soft_targets,
    "logits",
    logits.soft_targets,
    weight=0.9,
    setting=" at T = 4, cross-entropy 0.1",
    source="r, m",
    hard=0.1,
  ),
  "hard_targets": Entry(
    "Hard distillation (DeiT)",
    losses.hard_targets,
    "logits",
    logits.hard_targets,
    setting="0.5, cross-entropy 0.5, on ImageNet",
    source="d",
  ),
  "dkd": Entry(
    "DKD",
    losses.dkd,
    "logits, labels",
    logits.dkd,
    weight=1.0,
    setting=" with alpha 1, beta 8, T = 4; warm-up of 20 epochs",
    source="m",
    warm_up=True,
  ),
  "nkd": Entry(
    "NKD", losses.nkd, "logits, labels", logits.nkd, setting="1 on ImageNet with gamma 1.5, T = 1", source="n"
  ),
  "dist": Entry("DIST", losses.dist, "logits", logits.dist, setting="1 with beta 1, gamma 1", source="h"),
  "class_correlation": Entry(
    "MLKD, class level",
    losses.class_correlation,
    "logits",
    _of_logits(losses.class_correlation, temperature=4.0),
    setting="0.9 at each T of 2 to 6, cross-entropy 0.1",
    source="l",
  ),
  "batch_correlation": Entry(
    "MLKD, batch level",
    losses.batch_correlation,
    "logits",
    _of_logits(losses.batch_correlation, temperature=4.0),
    setting="0.9 at each T of 2 to 6, cross-entropy 0.1",
    source="l",
  ),
  "standardize_logits": Entry(
    "KD of standardized logits",
    losses.standardize_logits,
    "logits",
    logits.standardized_targets,
    weight=9.0,
    setting=" for KD at T = 2, cross-entropy 0.1",
    source="s",
    hard=0.1,
  ),
  # divergences
  "forward_kl": Entry(
    "Forward KL; GKD at beta 0",
    losses.forward_kl,
    "logits",
    _of_logits(losses.forward_kl),
    setting=f"1{_LANGUAGE}",
    source="g",
  ),
  "reverse_kl": Entry(
    "Reverse KL (MiniLLM); GKD at beta 1",
    losses.reverse_kl,
    "logits",
    _of_logits(losses.reverse_kl),
    setting=f"1{_LANGUAGE}",
    source="g",
  ),
  "total_variation": Entry(
    "Total variation distance (f-distill)",
    losses.total_variation,
    "logits",
    _of_logits(losses.total_variation),
    setting=f"1{_LANGUAGE}",
    source="f",
  ),
  "skew_kl": Entry(
    "Skew KL (DistiLLM)", losses.skew_kl, "logits", _of_logits(losses.skew_kl), setting=f"1{_LANGUAGE}", source="k"
  ),
  "reverse_skew_kl": Entry(
    "Skew reverse KL (DistiLLM)",
    losses.reverse_skew_kl,
    "logits",
    _of_logits(losses.reverse_skew_kl),
    setting=f"1{_LANGUAGE}",
    source="k",
  ),
  "jensen_shannon": Entry(
    "Generalised JSD (GKD)",
    losses.jensen_shannon,
    "logits",
    _of_logits(losses.jensen_shannon),
    setting=f"1{_LANGUAGE}",
    source="g",
  ),
  # features
  "hint": Entry(
    "FitNets hint",
    losses.hint,
    "feature maps or embedding; connector where widths or sizes differ",
    features.fitnets,
    weight=100.0,
    setting=" beside the labels",
    source="r, m",
  ),
  "cosine": Entry(
    "Cosine feature matching",
    losses.cosine,
    "feature maps, tokens or embedding; connector where widths or sizes differ",
    _of_embeddings(losses.cosine, connect=True),
  ),
  "hierarchical_context": Entry(
    "ReviewKD, HCL",
    losses.hierarchical_context,
    "feature maps; fusion of student stages as the connector",
    features.review_kd,
    weight=1.0,
    setting="; warm-up of 20 epochs",
    source="m",
    warm_up=True,
  ),
  "vid": Entry(
    "VID",
    losses.vid,
    "feature maps; connector for the mean, learned variance",
    features.vid,
    weight=1.0,
    source="r, m",
  ),
  "activation_boundary": Entry(
    "AB",
    losses.activation_boundary,
    "feature maps before the ReLU; connector where widths differ",
    activations.activation_boundary,
    weight=3e-3,
    setting=" for the last layer, halved for each before: 1 with the 3 / 1000 of its code",
    source="r",
  ),
  "ofd": Entry(
    "OFD",
    losses.ofd,
    "feature maps before the ReLU and the teacher's batch normalisation; connector",
    activations.ofd,
    weight=1e-3,
    setting=" for the last layer, halved for each before",
    source="m",
  ),
  # attention maps
  "attention_transfer": Entry(
    "AT", losses.attention_transfer, "feature maps", features.attention_transfer, weight=1000.0, source="r, m"
  ),
  "factor_transfer": Entry(
    "FT",
    losses.factor_transfer,
    "feature maps; paraphraser and translator as connectors",
    features.factor_transfer,
    weight=200.0,
    source="r",
  ),
  "class_attention_transfer": Entry(
    "CAT-KD",
    losses.class_attention_transfer,
    "class activation maps: features times the head",
    heads.cat_kd,
    weight=10.0,
    setting=", of 0.7 to 15 within a family of networks, with normalize=False; 15 to 600 between, more with size=4",
    source="c",
  ),
  # Gram matrices of features
  "fsp": Entry(
    "FSP",
    losses.fsp,
    "feature maps of two layers; connector where widths differ",
    products.fsp,
    weight=50.0,
    source="r",
  ),
  "nst": Entry("NST", losses.nst, "feature maps", products.nst, weight=50.0, source="r, m"),
  "inter_channel_correlation": Entry(
    "ICKD",
    losses.inter_channel_correlation,
    "feature maps; connector where widths differ",
    products.ickd,
    weight=2.5,
    source="i",
  ),
  "kdsvd": Entry(
    "KDSVD",
    losses.kdsvd,
    "feature maps of two layers; connector where widths differ",
    products.kdsvd,
    weight=1.0,
    source="r, m",
  ),
  # relations
  "rkd_distance": Entry(
    "RKD, distances", losses.rkd_distance, "embedding", _of_embeddings(losses.rkd_distance), weight=25.0, source="r, m"
  ),
  "rkd_angle": Entry(
    "RKD, angles", losses.rkd_angle, "embedding", _of_embeddings(losses.rkd_angle), weight=50.0, source="r, m"
  ),
  "similarity_preserving": Entry(
    "SP",
    losses.similarity_preserving,
    "feature maps or embedding",
    relations.similarity_preserving,
    weight=3000.0,
    source="r, m",
  ),
  "pkt": Entry("PKT", losses.pkt, "embedding", relations.pkt, weight=30000.0, source="r, m"),
  "correlation_congruence": Entry(
    "CC, CCKD",
    losses.correlation_congruence,
    "embedding, of unit norm for the Gaussian kernel",
    relations.correlation_congruence,
  ),
  # contrastive
  "crd": Entry(
    "CRD",
    losses.crd,
    "embeddings of unit norm through a learned projection, indices of the examples, memory",
    contrast.crd,
    weight=0.8,
    setting=" with 16384 negatives",
    source="r, m",
    takes=("num_examples",),
  ),
  "info_nce": Entry("InfoNCE", losses.info_nce, "embeddings of one width", relations.info_nce),
  # more than one loss, or none of their own
  "rkd": Entry(
    "RKD",
    losses.rkd_distance,
    "embedding",
    relations.rkd,
    weight=1.0,
    setting=", distances times 25 and angles times 50",
    source="r, m",
  ),
  "mlkd": Entry(
    "MLKD",
    losses.class_correlation,
    "logits",
    logits.mlkd,
    weight=0.9,
    setting=" for each of three Terms at each T of 2 to 6, cross-entropy 0.1",
    source="l",
    hard=0.1,
  ),
  "ctkd": Entry(
    "CTKD",
    losses.kl_soft_targets,
    "logits",
    logits.ctkd,
    weight=0.9,
    setting=", T from 1 to 21, reversal 0 to 1 in 10 epochs, cross-entropy 0.1",
    source="t",
    hard=0.1,
  ),
  "mgd": Entry(
    "MGD",
    losses.hint,
    "feature maps of one size",
    features.mgd,
    setting="2e-5 times the sum over the map, 65 % hidden, for detectors",
    source="y",
  ),
  "simkd": Entry(
    "SimKD",
    losses.hint,
    "a student without a head, the teacher's last map and head",
    heads.simkd,
    weight=1.0,
    setting=", alone",
    source="v",
    hard=0.0,
    takes=("head",),
  ),
}

# Public in kdflax.losses, and no method.
TOOLS = {
  "CRDMemory": "the state of crd",
  "crd_memory": "makes the state of crd",
  "masked_mean": "reduces",
  "masked_sum": "reduces",
  "ofd_margin": "makes an argument of ofd",
  "standardized": "wraps a loss, as in the entry standardize_logits",
}
