"""Distillation losses: pure functions of arrays, student first, one value per example.

Value and gradient keep their digits in float32 for features of a scale of 1e-15 to 1e15; where a value of higher degree
in the features leaves float32 before they do, the docstring of the loss says from which scale to which it holds.
"""

from kdflax.losses.attention_maps import attention_transfer, class_attention_transfer, factor_transfer
from kdflax.losses.contrastive import CRDMemory, crd, crd_memory, info_nce
from kdflax.losses.divergences import (
  forward_kl,
  jensen_shannon,
  reverse_kl,
  reverse_skew_kl,
  skew_kl,
  total_variation,
)
from kdflax.losses.features import (
  activation_boundary,
  cosine,
  hierarchical_context,
  hint,
  ofd,
  ofd_margin,
  vid,
)
from kdflax.losses.gram_features import fsp, inter_channel_correlation, kdsvd, nst
from kdflax.losses.logit_relations import batch_correlation, class_correlation, dist
from kdflax.losses.logits import dkd, hard_targets, kl_soft_targets, nkd, standardize_logits, standardized
from kdflax.losses.relations import correlation_congruence, pkt, rkd_angle, rkd_distance, similarity_preserving
from kdflax.numerics.examples import masked_mean, masked_sum

__all__ = [
  "CRDMemory",
  "activation_boundary",
  "attention_transfer",
  "batch_correlation",
  "class_attention_transfer",
  "class_correlation",
  "correlation_congruence",
  "cosine",
  "crd",
  "crd_memory",
  "dist",
  "dkd",
  "factor_transfer",
  "forward_kl",
  "fsp",
  "hard_targets",
  "hierarchical_context",
  "hint",
  "info_nce",
  "inter_channel_correlation",
  "jensen_shannon",
  "kdsvd",
  "kl_soft_targets",
  "masked_mean",
  "masked_sum",
  "nkd",
  "nst",
  "ofd",
  "ofd_margin",
  "pkt",
  "reverse_kl",
  "reverse_skew_kl",
  "rkd_angle",
  "rkd_distance",
  "similarity_preserving",
  "skew_kl",
  "standardize_logits",
  "standardized",
  "total_variation",
  "vid",
]
