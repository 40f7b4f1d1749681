"""The catalogue: every loss and method, what it needs, how it was published, and how it is set up.

The one table that docs/methods.md, the study `experiments.zoo`, the tests and the benchmarks read. A new loss gets an
entry under its name in the module of its kind, or a line in `TOOLS` if it is no method; what is a method and no loss of
its own gets one under the name of its function.
"""

from kdflax.methods.catalogue import combined, features, language, logits, relations
from kdflax.methods.catalogue.entry import Entry, paper

CATALOGUE: dict[str, Entry] = {
  **logits.ENTRIES,
  **features.ENTRIES,
  **relations.ENTRIES,
  **combined.ENTRIES,
  **language.ENTRIES,
}

SOURCES = {
  "r": "RepDistiller's scripts",
  "m": "mdistiller's configurations",
  "g": "TRL's GKD trainer",
  "s": "the scripts of logit-standardization-KD",
  "t": "the scripts of CTKD",
  "c": "the code of the authors of CAT-KD",
  "d": "that of DeiT",
  "f": "f-distill",
  "h": "DIST",
  "i": "ICKD",
  "k": "DistiLLM",
  "l": "MLKD",
  "n": "NKD",
  "v": "SimKD",
  "y": "MGD",
  "a": "ABKD",
  "o": "OFA",
  "p": "WTTM",
  "b": "the code of the authors of VkD",
  "q": "SEED",
  "u": "RLD",
  "w": "WKD",
  "z": "DINOv3",
  "x": "mmrazor's configurations",
}

# Public in kdflax.losses, and no method.
TOOLS = {
  "CRDMemory": "the state of crd",
  "crd_memory": "makes the state of crd",
  "masked_mean": "reduces",
  "masked_sum": "reduces",
  "normalize": "reduces what is on tokens",
  "ofd_margin": "makes an argument of ofd",
  "shift_labels": "makes an argument of fused_cross_entropy",
  "standardized": "wraps a loss, as in the entry standardize_logits",
}

__all__ = ["CATALOGUE", "SOURCES", "TOOLS", "Entry", "paper"]
