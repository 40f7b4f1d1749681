"""Writes docs/methods.md: `python -m docs.generate_methods`.

Formulas and papers come from the docstrings, so the page cannot disagree with them. What a docstring does not say, how
the field calls a method, what it needs from the models and the weight that goes with its scale, is the table below.
"""

import importlib
import inspect
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kdflax import losses, models

PAGE = pathlib.Path(__file__).with_name("methods.md")
NONE = "none recorded"


class Facts(NamedTuple):
  """What the docstring of a loss does not say."""

  method: str
  needs: str
  weight: str = NONE


FACTS = {
  # logits
  "kl_soft_targets": Facts(
    "KD, soft targets; mutual learning (DML)", "logits", "0.9 at T = 4, cross-entropy 0.1 [r, m]"
  ),
  "hard_targets": Facts("Hard distillation (DeiT)", "logits", "0.5, cross-entropy 0.5 [d]"),
  "dkd": Facts("DKD", "logits, labels", "1 with alpha 1, beta 8, T = 4; warm-up of 20 epochs [m]"),
  "nkd": Facts("NKD", "logits, labels", "1 on ImageNet with gamma 1.5, T = 1 [n]"),
  "dist": Facts("DIST", "logits", "1 with beta 1, gamma 1 [h]"),
  "class_correlation": Facts("MLKD, class level", "logits", "0.9 at each T of 2 to 6, cross-entropy 0.1 [l]"),
  "batch_correlation": Facts("MLKD, batch level", "logits", "0.9 at each T of 2 to 6, cross-entropy 0.1 [l]"),
  "standardize_logits": Facts("Logit standardization", "logits", "9 for KD at T = 2 [s]"),
  # divergences
  "forward_kl": Facts("Forward KL; GKD at beta 0", "logits", "1, alone, for language models [g]"),
  "reverse_kl": Facts("Reverse KL (MiniLLM); GKD at beta 1", "logits", "1, alone, for language models [g]"),
  "total_variation": Facts("Total variation distance (f-distill)", "logits", "1, alone, for language models [f]"),
  "skew_kl": Facts("Skew KL (DistiLLM)", "logits", "1, alone, for language models [k]"),
  "reverse_skew_kl": Facts("Skew reverse KL (DistiLLM)", "logits", "1, alone, for language models [k]"),
  "jensen_shannon": Facts("Generalised JSD (GKD)", "logits", "1, alone, for language models [g]"),
  # features
  "hint": Facts("FitNets hint", "feature maps or embedding; connector where widths or sizes differ", "100 [r, m]"),
  "cosine": Facts(
    "Cosine feature matching", "feature maps, tokens or embedding; connector where widths or sizes differ"
  ),
  "hierarchical_context": Facts("ReviewKD, HCL", "feature maps; fusion of student stages as the connector", "1 [m]"),
  "vid": Facts("VID", "feature maps; connector for the mean, learned variance", "1 [r, m]"),
  "activation_boundary": Facts(
    "AB",
    "feature maps before the ReLU; connector where widths differ",
    "3e-3 for the last layer, halved for each before: 1 with the 3 / 1000 of its code [r]",
  ),
  "ofd": Facts(
    "OFD",
    "feature maps before the ReLU and `ofd_margin` of the teacher's batch normalisation; connector",
    "1e-3 for the last layer, halved for each before [m]",
  ),
  # attention maps
  "attention_transfer": Facts("AT", "feature maps", "1000 [r, m]"),
  "factor_transfer": Facts("FT", "feature maps; paraphraser and translator as connectors", "200 [r]"),
  "class_attention_transfer": Facts(
    "CAT-KD",
    "class activation maps: features times the head",
    "0.7 to 15 within a family of networks, with normalize=False; 15 to 600 between, the larger with size=4 [c]",
  ),
  # Gram matrices of features
  "fsp": Facts("FSP", "feature maps of two layers; connector where widths differ", "50 [r]"),
  "nst": Facts("NST", "feature maps", "50 [r, m]"),
  "inter_channel_correlation": Facts("ICKD", "feature maps; connector where widths differ", "2.5 [i]"),
  "kdsvd": Facts("KDSVD", "feature maps of two layers; connector where widths differ", "1 [r, m]"),
  # relations
  "rkd_distance": Facts("RKD-D", "embedding", "25 [r, m]"),
  "rkd_angle": Facts("RKD-A", "embedding", "50 [r, m]"),
  "similarity_preserving": Facts("SP", "feature maps or embedding", "3000 [r, m]"),
  "pkt": Facts("PKT", "embedding", "30000 [r, m]"),
  "correlation_congruence": Facts("CC, CCKD", "embedding, of unit norm for the Gaussian kernel"),
  # contrastive
  "crd": Facts(
    "CRD",
    "embeddings of unit norm through a learned projection, indices of the examples, memory",
    "0.8 with 16384 negatives [r, m]",
  ),
  "info_nce": Facts("InfoNCE", "embeddings of one width"),
  # sequences
  "top_k_kl": Facts("Top-k KL", "logits, the teacher's k log-probabilities and classes"),
  "fused_linear": Facts("Fused heads", "hidden states and vocabulary heads"),
  "unordered_logits": Facts("ULD", "logits, over any two vocabularies"),
}

# Public, but no method of their own.
TOOLS = {"crd_memory", "masked_mean", "masked_sum", "ofd_margin", "standardized"}

INTRODUCTION = """\
# Methods

Every distillation loss of `kdflax.losses`. This page is generated from the docstrings, which say more: edit those, or
the table in `docs/generate_methods.py`, and run `python -m docs.generate_methods`.

A weight multiplies the mean over the examples, next to a cross-entropy of weight 1 unless it says otherwise. It goes
with the scale of the formula here and was chosen by others for small CIFAR-100 networks: a start for a search, no more.
Sources: [r] RepDistiller's scripts, [m] mdistiller's configurations, [g] TRL's GKD trainer, [s] the scripts of
logit-standardization-KD, and the code of the authors of [c] CAT-KD, [d] DeiT, [f] f-distill, [h] DIST, [i] ICKD, [k]
DistiLLM, [l] MLKD and [n] NKD. "None recorded" says that no weight is known that goes with the formula here;
`experiments.zoo --tune` finds one for your pair.
"""

DEGENERATE = """\
## Degenerate inputs

Value and gradient of every loss are finite, in float32 and bfloat16, for: duplicate rows, zero rows, a collapsed
student, collapsed student and teacher, zeros, constant inputs, a common offset of 1e3, a batch of 1, a batch of 2, and
for losses on logits large logits of 1e4, logits a hundred apart, opposed large logits, a class masked by -inf on both
sides. The contract suite tries each (`degenerate_inputs` in tests/losses/test_contract.py); `crd` has tests of its own.
"""

LEARNABLE = """\
## Learnable parts

Models of `kdflax.models` that are trained with the student, under names of their own, and stay behind when it leaves
(`kdflax.export` writes only the student). The exception is the reused head, which is part of the student.

| part | model | paper |
| --- | --- | --- |
"""

PARTS = {
  "Connector to the teacher's width": "linear_connector",
  "FitNets regressor": "conv_connector",
  "CRD projection onto the sphere": "embedding_connector",
  "VID mean and learned variance": "vid_connector",
  "ReviewKD fusion of stages (ABF)": "review_fusion",
  "FT paraphraser": "paraphraser",
  "FT translator": "translator",
  "SimKD projector and reused classifier": "reused_head",
  "CTKD temperature with gradient reversal": "temperature",
}

SCHEMES = """\
## Schemes without a loss of their own

Mutual learning (DML), online ensembles, mean teacher, born-again generations, teacher assistants, self-distillation
between exits and across augmentations, multi-teacher weights (CA-MKD, AEKD), SimKD and CTKD are configurations of the
losses above: [recipes](recipes.md).
"""


def methods() -> dict[str, Callable]:
  """The public losses by name.

  Raises:
    ValueError: if one has no line in the table of facts.
  """
  public = {name: getattr(losses, name) for name in losses.__all__}
  functions = {name: f for name, f in public.items() if inspect.isfunction(f) and name not in TOOLS}
  if unknown := functions.keys() - FACTS.keys():
    raise ValueError(f"no facts for {', '.join(sorted(unknown))}: add a line to FACTS in docs/generate_methods.py")
  return functions


def formula(loss: Callable) -> list[str]:
  """The indented lines before the arguments."""
  description = (inspect.getdoc(loss) or "").split("\nArgs:")[0]
  lines = [line.strip() for line in description.splitlines() if line.startswith("  ")]
  if not lines:
    raise ValueError(f"the docstring of {loss.__name__} has no formula: indent it, before the arguments")
  return lines


def paper(loss: Callable) -> str:
  """The first reference as a link."""
  text = " ".join((inspect.getdoc(loss) or "").split())
  found = re.search(r'Reference: (.+?), "(.+?)", (.*?\d{4})\b(?:, arXiv (\d{4}\.\d{4,5}))?', text)
  if not found:
    raise ValueError(f'the docstring of {loss.__name__} must say: Reference: AUTHORS, "TITLE", YEAR, arXiv NUMBER')
  authors, title, year, number = found.groups()
  title = f"[{title}](https://arxiv.org/abs/{number})" if number else title
  return f"{authors}, {title}, {year}"


def paper_of_part(name: str) -> str:
  """The reference of a model, "-" without one."""
  text = " ".join((inspect.getdoc(getattr(models, name)) or "").split())
  found = re.search(r"Reference: (.+?, \d{4}(?:, arXiv \d{4}\.\d{4,5})?)", text)
  return found.group(1) if found else "-"


def code(text: str) -> str:
  """A code span inside a table, where a bar would start a new cell."""
  return f"`{text}`".replace("|", "\\|")


def row(name: str, loss: Callable) -> str:
  facts = FACTS[name]
  cells = [
    facts.method,
    code(name),
    paper(loss),
    "<br>".join(map(code, formula(loss))),
    facts.needs,
    facts.weight,
  ]
  return f"| {' | '.join(cells)} |"


def section(module: str, functions: Mapping[str, Callable]) -> str:
  about = (importlib.import_module(module).__doc__ or "").splitlines()[0]
  lines = [
    f"## {module.rsplit('.', 1)[1].replace('_', ' ').capitalize()}",
    "",
    about,
    "",
    "| method | function | paper | formula | needs | weight |",
    "| --- | --- | --- | --- | --- | --- |",
    *(row(name, loss) for name, loss in functions.items() if loss.__module__ == module),
  ]
  return "\n".join(lines) + "\n"


def page() -> str:
  """The whole page; losses are in the order of the table of facts."""
  public = methods()
  functions = {name: public[name] for name in FACTS if name in public}
  modules = dict.fromkeys(loss.__module__ for loss in functions.values())
  parts = "\n".join(f"| {part} | {code(name)} | {paper_of_part(name)} |" for part, name in PARTS.items())
  return "\n".join(
    [INTRODUCTION, *(section(m, functions) for m in modules), DEGENERATE, f"{LEARNABLE}{parts}\n", SCHEMES]
  )


if __name__ == "__main__":
  PAGE.write_text(page())
