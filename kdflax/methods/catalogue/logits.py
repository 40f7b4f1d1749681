"""Methods on logits."""

import functools

from kdflax import losses
from kdflax.methods import logits, targets
from kdflax.methods.catalogue.entry import Entry
from kdflax.methods.outputs import of_logits

_of = lambda loss, **settings: functools.partial(of_logits, loss=loss, **settings)
_LANGUAGE = ", alone, for language models"

ENTRIES: dict[str, Entry] = {
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
    _of(losses.class_correlation, temperature=4.0),
    setting="0.9 at each T of 2 to 6, cross-entropy 0.1",
    source="l",
  ),
  "batch_correlation": Entry(
    "MLKD, batch level",
    losses.batch_correlation,
    "logits",
    _of(losses.batch_correlation, temperature=4.0),
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
  "bernoulli_kl": Entry(
    "MLD, its logits",
    losses.bernoulli_kl,
    "logits of labels that do not exclude each other",
    _of(losses.bernoulli_kl),
  ),
  "rld": Entry(
    "RLD",
    losses.rld,
    "logits, labels",
    targets.rld,
    weight=1.0,
    setting=" with alpha 1, beta 8, T = 4 and 1 for the top; warm-up of 20 epochs",
    source="u",
    warm_up=True,
  ),
  "wttm": Entry("WTTM", losses.wttm, "logits", targets.wttm, setting="4 with gamma 0.2, beside CRD", source="p"),
  "ofa": Entry(
    "OFA",
    losses.ofa,
    "logits, labels",
    targets.ofa,
    weight=1.0,
    setting=" with epsilon 1, between architectures, at exits of the stages as well",
    source="o",
  ),
  "wkd_logits": Entry(
    "WKD-L",
    losses.wkd_logits,
    "logits, labels, the teacher's head for the costs",
    targets.wkd_l,
    weight=600.0,
    setting=" at T = 8 with costs by CKA within a family of networks; 200 at T = 6 between",
    source="w",
  ),
  "margin_mse": Entry("Margin MSE", losses.margin_mse, "scores of several items for each example"),
  # divergences
  "forward_kl": Entry(
    "Forward KL; GKD at beta 0",
    losses.forward_kl,
    "logits",
    _of(losses.forward_kl),
    setting=f"1{_LANGUAGE}",
    source="g",
  ),
  "reverse_kl": Entry(
    "Reverse KL (MiniLLM); GKD at beta 1",
    losses.reverse_kl,
    "logits",
    _of(losses.reverse_kl),
    setting=f"1{_LANGUAGE}",
    source="g",
  ),
  "total_variation": Entry(
    "Total variation distance (f-distill)",
    losses.total_variation,
    "logits",
    _of(losses.total_variation),
    setting=f"1{_LANGUAGE}",
    source="f",
  ),
  "skew_kl": Entry(
    "Skew KL (DistiLLM)", losses.skew_kl, "logits", _of(losses.skew_kl), setting=f"1{_LANGUAGE}", source="k"
  ),
  "reverse_skew_kl": Entry(
    "Skew reverse KL (DistiLLM)",
    losses.reverse_skew_kl,
    "logits",
    _of(losses.reverse_skew_kl),
    setting=f"1{_LANGUAGE}",
    source="k",
  ),
  "jensen_shannon": Entry(
    "Generalised JSD (GKD)",
    losses.jensen_shannon,
    "logits",
    _of(losses.jensen_shannon),
    setting=f"1{_LANGUAGE}",
    source="g",
  ),
  "alpha_beta": Entry(
    "ABKD",
    losses.alpha_beta,
    "logits",
    targets.abkd,
    setting="alpha 0.8, beta 0.3 for language models",
    source="a",
  ),
}
