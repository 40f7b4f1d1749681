"""Losses of language models, on tokens."""

from kdflax import losses
from kdflax.methods.catalogue.entry import Entry

_HEADS = "hidden states and vocabulary heads"
_KNOWN = "logits, the teacher's k likeliest classes and their log-probabilities"

ENTRIES = {
  "fused_divergence": Entry("Any divergence of two heads", losses.fused_divergence, _HEADS),
  "fused_cross_entropy": Entry("Cross-entropy of a head", losses.fused_cross_entropy, "hidden states, head, labels"),
  "fused_distillation": Entry("Both in one pass", losses.fused_distillation, f"{_HEADS}, labels"),
  "fused_linear": Entry("One of these", losses.fused_linear, _HEADS),
  "top_k_kl": Entry("Top-k KL", losses.top_k_kl, _KNOWN),
  "top_k_reverse_kl": Entry("Top-k reverse KL", losses.top_k_reverse_kl, _KNOWN),
  "top_k_jensen_shannon": Entry("Top-k generalised JSD", losses.top_k_jensen_shannon, _KNOWN),
  "sampled_kl": Entry("Sparse logit sampling", losses.sampled_kl, "logits, classes drawn from the teacher"),
  "unordered_logits": Entry("ULD", losses.unordered_logits, "logits, over any two vocabularies"),
}
