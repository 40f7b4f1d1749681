"""Models as pairs of pure functions: networks, and the learnable connectors between them."""

from kdflax.model import Model
from kdflax.models.adapters import count_bytes, count_parameters, from_linen, from_nnx
from kdflax.models.composition import compose, stacked, starting_from, unstack
from kdflax.models.connectors import (
  conv_connector,
  embedding_connector,
  linear_connector,
  orthogonal_connector,
  temperature,
  vid_connector,
)
from kdflax.models.convnet import convnet
from kdflax.models.decoder import decoder, make_cache
from kdflax.models.decoder_config import DecoderConfig, Rope
from kdflax.models.deep_connectors import paraphraser, reused_head, review_fusion, translator
from kdflax.models.encoder import bag_of_tokens, bert, load_bert
from kdflax.models.equinox_adapter import from_equinox
from kdflax.models.experts import cgc, dselect_k, mmoe, ple
from kdflax.models.importing import Rule, import_variables
from kdflax.models.low_rank import multi_task_low_rank, orthogonal_matrix
from kdflax.models.low_rank_adapters import low_rank_adapters, merge_low_rank
from kdflax.models.mlp import mlp
from kdflax.models.pretrained import Pretrained, load_pretrained, save_pretrained
from kdflax.models.resnet import RESNETS, resnet
from kdflax.models.sampling import Sampled, make_sampler
from kdflax.models.sharing import cross_stitch, feature_sharing, hard_sharing, mtan, soft_sharing, task_head
from kdflax.models.vit import vit

__all__ = [
  "RESNETS",
  "DecoderConfig",
  "Model",
  "Pretrained",
  "Rope",
  "Rule",
  "Sampled",
  "bag_of_tokens",
  "bert",
  "cgc",
  "compose",
  "conv_connector",
  "convnet",
  "count_bytes",
  "count_parameters",
  "cross_stitch",
  "decoder",
  "dselect_k",
  "embedding_connector",
  "feature_sharing",
  "from_equinox",
  "from_linen",
  "from_nnx",
  "hard_sharing",
  "import_variables",
  "linear_connector",
  "load_bert",
  "load_pretrained",
  "low_rank_adapters",
  "make_cache",
  "make_sampler",
  "merge_low_rank",
  "mlp",
  "mmoe",
  "mtan",
  "multi_task_low_rank",
  "orthogonal_connector",
  "orthogonal_matrix",
  "paraphraser",
  "ple",
  "resnet",
  "reused_head",
  "review_fusion",
  "save_pretrained",
  "soft_sharing",
  "stacked",
  "starting_from",
  "task_head",
  "temperature",
  "translator",
  "unstack",
  "vid_connector",
  "vit",
]
