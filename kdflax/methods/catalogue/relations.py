"""Methods that compare how examples lie to each other."""

import functools

from kdflax import losses
from kdflax.methods import contrast, relations
from kdflax.methods.catalogue.entry import Entry
from kdflax.methods.outputs import of_embeddings

_of = lambda loss, **settings: functools.partial(of_embeddings, loss=loss, **settings)

ENTRIES: dict[str, Entry] = {
  # relations
  "rkd_distance": Entry(
    "RKD, distances", losses.rkd_distance, "embedding", _of(losses.rkd_distance), weight=25.0, source="r, m"
  ),
  "rkd_angle": Entry("RKD, angles", losses.rkd_angle, "embedding", _of(losses.rkd_angle), weight=50.0, source="r, m"),
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
  "direction": Entry("SKD, its direction", losses.direction, "logits or embedding", _of(losses.direction)),
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
  "similarity_distribution": Entry(
    "SEED, CompRess, CLIP-KD, RRD",
    losses.similarity_distribution,
    "embeddings of unit norm, a queue of keys",
    contrast.seed,
    setting="1, alone, with 65536 keys, on ImageNet",
    source="q",
  ),
}
