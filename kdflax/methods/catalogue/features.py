"""Methods on feature maps."""

import functools

from kdflax import losses
from kdflax.methods import activations, features, heads, products
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
