"""Methods on feature maps."""

import functools

from kdflax import losses
from kdflax.methods import activations, dense, features, heads, products
from kdflax.methods.catalogue.entry import Entry
from kdflax.methods.outputs import of_embeddings

_of = lambda loss, **settings: functools.partial(of_embeddings, loss=loss, connect=True, **settings)

ENTRIES: dict[str, Entry] = {
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
    _of(losses.cosine),
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
  "smooth_l1": Entry(
    "Smooth L1 (Theia, UNIC, DUNE)",
    losses.smooth_l1,
    "feature maps, tokens or embedding; connector where widths or sizes differ",
    _of(losses.smooth_l1),
  ),
  "log_distance": Entry(
    "SRD",
    losses.log_distance,
    "feature maps, tokens or embedding; connector where widths or sizes differ",
    _of(losses.log_distance, power=4.0),
  ),
  "log_sigmoid_cosine": Entry(
    "DistilHuBERT, its cosine",
    losses.log_sigmoid_cosine,
    "hidden states or embedding; connector where widths differ",
    _of(losses.log_sigmoid_cosine),
  ),
  # channels and positions
  "channel_wise": Entry(
    "CWD",
    losses.channel_wise,
    "feature maps or dense logits; connector where widths differ",
    dense.cwd,
    setting="10 at T = 1 for maps of detectors, 5 for the logits of segmentation",
    source="x",
  ),
  "channel_correlation": Entry(
    "PKD",
    losses.channel_correlation,
    "feature maps; connector where widths differ",
    dense.pkd,
    setting="6 for maps of detectors",
    source="x",
  ),
  "token_similarity": Entry(
    "Gram anchoring (DINOv3), structured KD",
    losses.token_similarity,
    "feature maps or tokens, of as many positions",
    dense.gram_anchoring,
    setting="up to 2, towards an earlier self",
    source="z",
  ),
  "prototype_similarity": Entry("IFVD", losses.prototype_similarity, "feature maps, a class for each position"),
  "wkd_features": Entry(
    "WKD-F",
    losses.wkd_features,
    "feature maps; connector with BatchNorm",
    dense.wkd_f,
    weight=0.08,
    setting=" with means times 4 within a family of networks; 0.3 between",
    source="w",
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
}
