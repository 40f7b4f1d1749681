"""Methods: one function per paper, what it needs beside its loss; and the catalogue of them all.

    pair = methods.pair(student, teacher, batch)
    method = methods.crd(pair, num_examples=50000) | methods.review_kd(pair)

A `Method` is models, Terms and stages by name. The learner takes `{"student": student, "teacher": teacher} |
method.models` and `{"hard": hard} | method.terms`; `training.train_stages` runs its stages before.
"""

from kdflax.methods.activations import activation_boundary, ofd
from kdflax.methods.catalogue import CATALOGUE, SOURCES, TOOLS, Entry, paper
from kdflax.methods.contrast import crd, seed
from kdflax.methods.dense import cwd, gram_anchoring, pkd, wkd_f
from kdflax.methods.features import attention_transfer, factor_transfer, fitnets, mgd, review_kd, vid, vkd
from kdflax.methods.heads import cat_kd, simkd
from kdflax.methods.logits import ctkd, dist, dkd, hard_targets, mlkd, nkd, soft_targets, standardized_targets
from kdflax.methods.method import Method, Stage, Weight
from kdflax.methods.outputs import of_embeddings, of_flows, of_logits, of_maps
from kdflax.methods.pairs import Pair, Side, pair
from kdflax.methods.products import fsp, ickd, kdsvd, nst
from kdflax.methods.relations import (
  correlation_congruence,
  info_nce,
  pkt,
  rkd,
  similarity_preserving,
)
from kdflax.methods.targets import abkd, ofa, rld, wkd_l, wttm

__all__ = [
  "CATALOGUE",
  "SOURCES",
  "TOOLS",
  "Entry",
  "Method",
  "Pair",
  "Side",
  "Stage",
  "Weight",
  "abkd",
  "activation_boundary",
  "attention_transfer",
  "cat_kd",
  "correlation_congruence",
  "crd",
  "ctkd",
  "cwd",
  "dist",
  "dkd",
  "factor_transfer",
  "fitnets",
  "fsp",
  "gram_anchoring",
  "hard_targets",
  "ickd",
  "info_nce",
  "kdsvd",
  "mgd",
  "mlkd",
  "nkd",
  "nst",
  "of_embeddings",
  "of_flows",
  "of_logits",
  "of_maps",
  "ofa",
  "ofd",
  "pair",
  "paper",
  "pkd",
  "pkt",
  "review_kd",
  "rkd",
  "rld",
  "seed",
  "similarity_preserving",
  "simkd",
  "soft_targets",
  "standardized_targets",
  "vid",
  "vkd",
  "wkd_f",
  "wkd_l",
  "wttm",
]
