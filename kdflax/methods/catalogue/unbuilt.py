"""Losses that no function makes a method of yet."""

from kdflax import losses
from kdflax.methods.catalogue.entry import Entry

ENTRIES = {
  "wttm": Entry("TTM, WTTM", losses.wttm, "logits"),
  "bernoulli_kl": Entry("MLD, its logits", losses.bernoulli_kl, "logits of labels that do not exclude each other"),
  "rld": Entry("RLD", losses.rld, "logits, labels"),
  "ofa": Entry("OFA", losses.ofa, "logits of any stage, labels"),
  "margin_mse": Entry("Margin MSE", losses.margin_mse, "scores of the items of a list"),
  "wkd_logits": Entry("WKD-L", losses.wkd_logits, "logits, costs between the classes"),
  "wkd_features": Entry("WKD-F", losses.wkd_features, "feature maps; connector where widths differ"),
  "alpha_beta": Entry("ABKD", losses.alpha_beta, "logits"),
  "smooth_l1": Entry("Smooth L1 (Theia, UNIC, DUNE)", losses.smooth_l1, "feature maps, tokens or embedding; connector"),
  "log_distance": Entry("SRD", losses.log_distance, "feature maps or embedding; connector"),
  "log_sigmoid_cosine": Entry(
    "DistilHuBERT, its cosine", losses.log_sigmoid_cosine, "hidden states; a head that predicts the teacher's"
  ),
  "channel_wise": Entry("CWD", losses.channel_wise, "feature maps or dense logits; connector where widths differ"),
  "channel_correlation": Entry(
    "PKD", losses.channel_correlation, "feature maps of one size; connector where widths differ"
  ),
  "similarity_distribution": Entry(
    "SEED, CompRess, CLIP-KD, RRD", losses.similarity_distribution, "embeddings of unit norm; a queue of keys"
  ),
  "token_similarity": Entry(
    "Gram anchoring (DINOv3), structured KD",
    losses.token_similarity,
    "tokens or feature maps, of unit norm for cosines",
  ),
  "prototype_similarity": Entry("IFVD", losses.prototype_similarity, "feature maps, a class for each position"),
  "direction": Entry("SKD, its direction", losses.direction, "logits or embedding"),
}
