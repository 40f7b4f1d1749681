"""Methods of more than one loss, or none of their own."""

from kdflax import losses
from kdflax.methods import features, heads, logits, relations
from kdflax.methods.catalogue.entry import Entry

ENTRIES: dict[str, Entry] = {
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
  "vkd": Entry(
    "VkD",
    losses.smooth_l1,
    "embedding; connector that keeps angles",
    features.vkd,
    setting="1, on ImageNet for DeiT with distillation by logits beside it",
    source="b",
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
