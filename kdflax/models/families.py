"""How the families of language models write down their sizes and name their tensors, and what that is here.

`config.json` is that of Hugging Face's transformers, whose entries changed with its version 5; both are read, and what
is written is read by both.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeGuard

from kdflax.model import PyTree
from kdflax.models.decoder_config import DecoderConfig, Rope

Entries = Mapping[str, Any]  # of config.json

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_SIZES = {
  "vocabulary": "vocab_size",
  "width": "hidden_size",
  "depth": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_width": "head_dim",
  "mlp_width": "intermediate_size",
  "max_length": "max_position_embeddings",
  "norm_epsilon": "rms_norm_eps",
  "tied": "tie_word_embeddings",
}
_SETTINGS = ("dtype", "param_dtype", "remat", "scan", "attention")  # of the program, not of the model
# What a scaling of rotary positions is called in config.json.
_SCALING = {
  "factor": "factor",
  "original_length": "original_max_position_embeddings",
  "low_frequency_factor": "low_freq_factor",
  "high_frequency_factor": "high_freq_factor",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "attention_factor": "attention_factor",
  "truncate": "truncate",
}
_SCALED_BY = {
  "linear": ("factor",),
  "dynamic": ("factor",),
  "llama3": ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
  "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}


class Family(NamedTuple):
  """A family: the class that runs it in transformers, what its config.json may leave out, and what it adds to a Llama.

  `read(entries)` returns fields of a `DecoderConfig` beside the sizes, `write(config)` the entries for them.
  """

  architecture: str
  defaults: Entries
  read: Callable[[Entries], dict[str, Any]]
  write: Callable[[DecoderConfig], dict[str, Any]]


def read_config(entries: Entries) -> DecoderConfig:
  """Returns the sizes that a config.json names.

  Raises:
    ValueError: for a family or an entry that the decoder does not know.
  """
  name = entries.get("model_type")
  _refuse_unknown(entries)
  if name == "gemma3":  # with images; the language model in it is described apart
    entries, name = {**entries.get("text_config", {}), "model_type": "gemma3_text"}, "gemma3_text"
  if name not in FAMILIES:
    raise ValueError(f"model_type {name!r} is not one of those known: {', '.join(FAMILIES)}")
  family = FAMILIES[name]
  entries = {**family.defaults, **{key: value for key, value in entries.items() if value is not None}}
  _refuse_unknown(entries)
  lacking = sorted({entry for field, entry in _SIZES.items() if field not in ("kv_heads", "head_width")} - set(entries))
  if lacking:
    raise ValueError(f"config.json has no {', '.join(lacking)}")
  sizes = {field: entries[entry] for field, entry in _SIZES.items() if entry in entries}
  activation = entries.get("hidden_activation", entries.get("hidden_act"))
  if activation not in _ACTIVATIONS:
    raise ValueError(f"the activation {activation!r} is not one of those known: {', '.join(_ACTIVATIONS)}")
  fields = {"activation": _ACTIVATIONS[activation], "rope": _rope(entries), **family.read(entries)}
  return DecoderConfig(**(sizes | fields))


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """Returns what a config.json says of a model: of the first family that has all that it has.

  Raises:
    ValueError: if no family has, naming the fields that the nearest lacks.
  """
  differences = {}
  for name, family in FAMILIES.items():
    entries = _written(config, name, family)
    read = _comparable(read_config(entries))
    differing = [key for key, value in _comparable(config).items() if read[key] != value]
    if not differing:
      return entries
    differences[name] = differing
  nearest = min(differences, key=lambda name: len(differences[name]))
  there = {field: getattr(config, field) for field in differences[nearest]}
  raise ValueError(
    f"no family of checkpoints is such a model: {nearest} would be nearest, but it cannot have {there}; the families"
    f" are {', '.join(FAMILIES)}"
  )


def tensor_name(path: str, config: DecoderConfig) -> str:
  """Returns the name in a checkpoint of what lies at a path of the params, with {} for the number of the layer."""
  *parents, leaf = path.split("/")
  if path in ("embedding", "head"):
    return {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}[path]
  if parents == ["norm"]:
    return "model.norm.weight"
  _, *parts = parents  # without "layers"
  norms = _POST_NORMS if config.post_norms else _NORMS
  name = norms[parts[0]] if parts[0] in norms else ".".join([_BLOCKS[parts[0]], _PARTS[parts[1]]])
  return f"model.layers.{{}}.{name}.{'bias' if leaf == 'bias' else 'weight'}"


_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_POST_NORMS = {
  "attention_norm": "input_layernorm",
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_BLOCKS = {"attention": "self_attn", "mlp": "mlp"}
_PARTS = {
  "query": "q_proj",
  "key": "k_proj",
  "value": "v_proj",
  "output": "o_proj",
  "query_norm": "q_norm",
  "key_norm": "k_norm",
  "gate": "gate_proj",
  "up": "up_proj",
  "down": "down_proj",
}


def _written(config: DecoderConfig, name: str, family: Family) -> dict[str, Any]:
  sizes = {entry: getattr(config, field) for field, entry in _SIZES.items()}
  activation = {known: called for called, known in _ACTIVATIONS.items() if called != "swish"}[config.activation]
  return {
    "architectures": [family.architecture],
    "model_type": name,
    "hidden_act": activation,
    **({"hidden_activation": activation} if "gemma" in name else {}),
    **sizes,
    "rope_theta": config.rope.base,
    "rope_scaling": _scaling(config.rope),
    **family.write(config),
  }


def _comparable(config: DecoderConfig) -> dict[str, PyTree]:
  """What two configs of the same model have in common, whatever is left to a default."""
  fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  fields["query_scale"] = config.query_scale or config.head_width**-0.5
  fields["sliding"] = config.slides
  fields["local_rope"] = (config.local_rope or config.rope) if config.window else None
  return {name: value for name, value in fields.items() if name not in _SETTINGS}


def _refuse_unknown(entries: Entries) -> None:
  """Raises a ValueError for what the decoder would compute otherwise than the model that was trained."""
  refused = {
    "quantization_config": "save the model without quantization",
    "use_bidirectional_attention": "only models whose tokens see those before them are known",
  }
  for name, reason in refused.items():
    if entries.get(name):
      raise ValueError(f"config.json has {name}={entries[name]!r}; {reason}")


def _rope(entries: Entries, *, kind: str | None = None) -> Rope:
  """Rotary positions; `kind` is that of the layers, in a family whose layers differ."""
  new = entries.get("rope_parameters")  # of version 5
  if new is not None:
    found = dict(new.get(kind) or {} if kind else new)
  else:
    found = dict(entries.get("rope_scaling") or {}) if kind != "sliding_attention" else {}
  older = "rope_local_base_freq" if kind == "sliding_attention" else "rope_theta"
  base = found.pop("rope_theta", entries.get(older, 10_000.0))
  scaling = found.pop("rope_type", found.pop("type", "default"))
  found.pop("type", None)
  partial = found.pop("partial_rotary_factor", entries.get("partial_rotary_factor", 1.0))
  if scaling == "default" and partial == 1.0:
    return Rope(float(base))
  if not _is_scaling(scaling) or partial != 1.0:
    raise ValueError(
      f"rotary positions of rope_type {scaling!r} and partial_rotary_factor {partial} are not known; the types are"
      f" {', '.join(_SCALED_BY)}"
    )
  fields = {
    field: found.pop(_SCALING[field]) for field in _SCALED_BY[scaling] if found.get(_SCALING[field]) is not None
  }
  left = {name: value for name, value in found.items() if value is not None and name not in _SCALING.values()}
  if left:
    raise ValueError(f"rotary positions of rope_type {scaling!r} have {left}, which is not known")
  if scaling == "yarn":
    fields.setdefault("original_length", entries["max_position_embeddings"])
    fields.setdefault("factor", entries["max_position_embeddings"] / fields["original_length"])
  return Rope(float(base), scaling, **fields)


def _is_scaling(name: str) -> TypeGuard[Literal["linear", "dynamic", "llama3", "yarn"]]:
  return name in _SCALED_BY


def _scaling(rope: Rope) -> dict[str, Any] | None:
  if rope.scaling is None:
    return None
  fields = {_SCALING[field]: getattr(rope, field) for field in _SCALED_BY[rope.scaling]}
  return {"rope_type": rope.scaling, **{name: value for name, value in fields.items() if value is not None}}


def _windows(entries: Entries, otherwise: Callable[[int], bool]) -> dict[str, Any]:
  """Which layers see only a window: as `layer_types` says, or else as a rule of the family does."""
  depth, window = entries["num_hidden_layers"], entries.get("sliding_window")
  kinds = entries.get("layer_types")
  if kinds is None:
    kinds = ["sliding_attention" if otherwise(index) else "full_attention" for index in range(depth)]
  unknown = set(kinds) - {"sliding_attention", "full_attention"}
  if unknown:
    raise ValueError(f"config.json has layer_types {sorted(unknown)}, which are not known")
  sliding = tuple(kind == "sliding_attention" for kind in kinds)
  return {"window": window, "sliding": sliding} if window is not None and any(sliding) else {}


def _kinds(config: DecoderConfig) -> list[str]:
  return ["sliding_attention" if slides else "full_attention" for slides in config.slides]


def _read_llama(entries: Entries) -> dict[str, Any]:
  bias = entries["attention_bias"]
  return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": entries["mlp_bias"]}


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
  return {"attention_bias": config.output_bias, "mlp_bias": config.mlp_bias}


def _read_qwen(entries: Entries) -> dict[str, Any]:
  slides = entries["use_sliding_window"]
  return _windows(entries, lambda index: index >= entries["max_window_layers"]) if slides else {}


def _write_qwen(config: DecoderConfig) -> dict[str, Any]:
  first = (*config.slides, True).index(True)  # what older versions go by
  windows = {"use_sliding_window": True, "sliding_window": config.window, "layer_types": _kinds(config)}
  return {"max_window_layers": first, **(windows if config.window else {"use_sliding_window": False})}


def _read_qwen3(entries: Entries) -> dict[str, Any]:
  bias = entries["attention_bias"]
  return {"qk_norm": True, "qkv_bias": bias, "output_bias": bias, **_read_qwen(entries)}


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
  return {"attention_bias": config.output_bias, **_write_qwen(config)}


def _read_gemma(entries: Entries) -> dict[str, Any]:
  every = entries["sliding_window_pattern"]
  return {
    "unit_offset": True,
    "post_norms": True,
    "embedding_scale": math.sqrt(entries["hidden_size"]),
    "query_scale": entries["query_pre_attn_scalar"] ** -0.5,
    "attention_soft_cap": entries.get("attn_logit_softcapping"),
    "logit_soft_cap": entries.get("final_logit_softcapping"),
    "qkv_bias": entries["attention_bias"],
    "output_bias": entries["attention_bias"],
    **_windows(entries, lambda index: bool((index + 1) % every)),
  }


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
  return {
    "attention_bias": config.output_bias,
    "query_pre_attn_scalar": round((config.query_scale or config.head_width**-0.5) ** -2),
    "attn_logit_softcapping": config.attention_soft_cap,
    "final_logit_softcapping": config.logit_soft_cap,
    "sliding_window": config.window,
    "layer_types": _kinds(config),
  }


def _read_gemma3(entries: Entries) -> dict[str, Any]:
  local, rope = _rope(entries, kind="sliding_attention"), _rope(entries, kind="full_attention")
  fields = _read_gemma(entries)
  return {**fields, "qk_norm": True, "rope": rope, "local_rope": local if "window" in fields else None}


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
  return {**_write_gemma(config), "rope_local_base_freq": (config.local_rope or config.rope).base}


_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_QWEN = _LLAMA | {"max_position_embeddings": 32_768, "use_sliding_window": False, "max_window_layers": 28}
_GEMMA = {
  "hidden_activation": "gelu_pytorch_tanh",
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "query_pre_attn_scalar": 256,
}
_GEMMA2 = {
  "vocab_size": 256_000,
  "max_position_embeddings": 8192,
  "sliding_window": 4096,
  "sliding_window_pattern": 2,
}
_GEMMA3 = {
  "vocab_size": 262_208,
  "max_position_embeddings": 131_072,
  "sliding_window": 4096,
  "sliding_window_pattern": 6,
  "rope_theta": 1_000_000.0,
}

# In the order in which a family is looked for when a model is saved: from few to many additions.
FAMILIES: dict[str, Family] = {
  "llama": Family(
    "LlamaForCausalLM",
    _LLAMA | {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    _read_llama,
    _write_llama,
  ),
  "qwen2": Family("Qwen2ForCausalLM", _QWEN, lambda e: {"qkv_bias": True, **_read_qwen(e)}, _write_qwen),
  "qwen3": Family("Qwen3ForCausalLM", _QWEN | {"attention_bias": False, "head_dim": 128}, _read_qwen3, _write_qwen3),
  "gemma2": Family("Gemma2ForCausalLM", _GEMMA | _GEMMA2, _read_gemma, _write_gemma),
  "gemma3_text": Family("Gemma3ForCausalLM", _GEMMA | _GEMMA3, _read_gemma3, _write_gemma3),
}
