"""Distillation losses: pure functions of arrays, student first, one value per example.

Value and gradient keep their digits in float32 for features of a scale of 1e-15 to 1e15; where a value of higher degree
in the features leaves float32 before they do, the docstring of the loss says from which scale to which it holds.
"""

from kdflax.losses.activations import activation_boundary, ofd, ofd_margin
from kdflax.losses.attention_maps import attention_transfer, class_attention_transfer, factor_transfer
from kdflax.losses.channels import channel_correlation, channel_wise
from kdflax.losses.contrastive import CRDMemory, crd, crd_memory, info_nce
from kdflax.losses.divergences import (
  alpha_beta,
  forward_kl,
  jensen_shannon,
  reverse_kl,
  reverse_skew_kl,
  skew_kl,
  total_variation,
)
from kdflax.losses.features import (
  cosine,
  hierarchical_context,
  hint,
  log_distance,
  log_sigmoid_cosine,
  smooth_l1,
  vid,
)
from kdflax.losses.fused import fused_cross_entropy, fused_distillation, fused_divergence, fused_linear
from kdflax.losses.gram_features import fsp, inter_channel_correlation, kdsvd, nst
from kdflax.losses.logit_relations import batch_correlation, class_correlation, dist
from kdflax.losses.logits import bernoulli_kl, hard_targets, kl_soft_targets, standardize_logits, standardized, wttm
from kdflax.losses.ranking import margin_mse
from kdflax.losses.relations import (
  correlation_congruence,
  direction,
  pkt,
  rkd_angle,
  rkd_distance,
  similarity_preserving,
)
from kdflax.losses.sequence import (
  sampled_kl,
  top_k_jensen_shannon,
  top_k_kl,
  top_k_reverse_kl,
  unordered_logits,
)
from kdflax.losses.similarity import prototype_similarity, similarity_distribution, token_similarity
from kdflax.losses.targets import dkd, nkd, ofa, rld
from kdflax.losses.tokens import normalize, shift_labels
from kdflax.losses.transport import wkd_features, wkd_logits
from kdflax.numerics.examples import masked_mean, masked_sum

__all__ = [
  "CRDMemory",
  "activation_boundary",
  "alpha_beta",
  "attention_transfer",
  "batch_correlation",
  "bernoulli_kl",
  "channel_correlation",
  "channel_wise",
  "class_attention_transfer",
  "class_correlation",
  "correlation_congruence",
  "cosine",
  "crd",
  "crd_memory",
  "direction",
  "dist",
  "dkd",
  "factor_transfer",
  "forward_kl",
  "fsp",
  "fused_cross_entropy",
  "fused_distillation",
  "fused_divergence",
  "fused_linear",
  "hard_targets",
  "hierarchical_context",
  "hint",
  "info_nce",
  "inter_channel_correlation",
  "jensen_shannon",
  "kdsvd",
  "kl_soft_targets",
  "log_distance",
  "log_sigmoid_cosine",
  "margin_mse",
  "masked_mean",
  "masked_sum",
  "nkd",
  "normalize",
  "nst",
  "ofa",
  "ofd",
  "ofd_margin",
  "pkt",
  "prototype_similarity",
  "reverse_kl",
  "reverse_skew_kl",
  "rkd_angle",
  "rkd_distance",
  "rld",
  "sampled_kl",
  "shift_labels",
  "similarity_distribution",
  "similarity_preserving",
  "skew_kl",
  "smooth_l1",
  "standardize_logits",
  "standardized",
  "token_similarity",
  "top_k_jensen_shannon",
  "top_k_kl",
  "top_k_reverse_kl",
  "total_variation",
  "unordered_logits",
  "vid",
  "wkd_features",
  "wkd_logits",
  "wttm",
]
