"""Checkpoints in and out, against the logits that transformers computed of them (tests/peers/checkpoints.py)."""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from kdflax import models, training
from kdflax.models import pretrained
from kdflax.models.families import read_config, write_config

RECORDED = pathlib.Path(__file__).parent / "checkpoints"
FAMILIES = ("llama2", "llama3", "qwen2", "qwen3", "gemma2", "gemma3")


@functools.cache
def loaded(name, **options):
  return models.load_pretrained(RECORDED / name, **options)


@pytest.fixture
def copied(tmp_path):
  """A checkpoint to be damaged, with what changes its config.json and its tensors."""
  folder = tmp_path / "copied"
  shutil.copytree(RECORDED / "qwen3", folder)

  def change(entries=None, tensors=None, drop=()):
    config = json.loads((folder / "config.json").read_text()) | (entries or {})
    (folder / "config.json").write_text(json.dumps(config))
    arrays = load_file(folder / "model.safetensors") | (tensors or {})
    save_file({name: array for name, array in arrays.items() if name not in drop}, folder / "model.safetensors")
    return folder

  change.folder = folder
  return change


def check_logits(name, read):
  expected = load_file(RECORDED / name / "expected.safetensors")
  call = jax.jit(lambda params, tokens: read.model.apply(params, {}, {"tokens": tokens}, train=False)[0]["logits"])
  np.testing.assert_allclose(call(read.variables[0], expected["tokens"]), expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
  check_logits(name, loaded(name, param_dtype=jnp.float32))


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma3"])
def test_what_is_written_is_what_was_read(name, tmp_path):
  """The same tensors, to the bit and in bfloat16, in one file and in many, and a config that says the same."""
  read = loaded(name)
  assert {leaf.dtype for leaf in jax.tree.leaves(read.variables)} == {jnp.dtype(jnp.bfloat16)}
  original = load_file(RECORDED / name / "model.safetensors")
  for shard_bytes, count in ((10**9, 1), (6_000, 3)):
    folder = tmp_path / str(count)
    models.save_pretrained(folder, read.config, read.variables[0], like=RECORDED / name, shard_bytes=shard_bytes)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) >= count
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert written.keys() == original.keys()
    for tensor, values in original.items():
      np.testing.assert_array_equal(written[tensor], values)
    again = models.load_pretrained(folder)
    assert again.config == read.config
    jax.tree.map(np.testing.assert_array_equal, again.variables, read.variables)
  entries = json.loads((folder / "config.json").read_text())
  assert entries["eos_token_id"] == json.loads((RECORDED / name / "config.json").read_text())["eos_token_id"]
  assert entries["torch_dtype"] == "bfloat16"


def test_a_config_of_before_version_5_says_the_same(copied):
  entries = {"rope_parameters": None, "rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
  config = models.load_pretrained(copied(entries)).config
  assert config.rope == models.Rope(123.0, "linear", 2.0)
  assert models.load_pretrained(copied({"rope_scaling": None})).config.rope == models.Rope(123.0)


def test_params_go_to_where_they_shall_lie(tmp_path):
  """A part of the files to each device; a function of the shapes may say which. They are saved from there as well."""
  mesh = training.make_mesh({"data": 4, "model": 2})
  whole = loaded("qwen3").variables[0]
  layout = training.Layout(mesh, [training.tensor_parallel("model", at_least=100)])
  sharding = lambda params: layout.of_frozen({"teacher": (params, {})})["teacher"][0]
  read = models.load_pretrained(RECORDED / "qwen3", sharding=sharding)
  jax.tree.map(np.testing.assert_array_equal, read.variables[0], whole)
  query = read.variables[0]["layers"]["attention"]["query"]["kernel"]
  assert query.sharding.spec == P(None, None, "model")
  assert query.addressable_shards[0].data.shape == (3, 16, 20)
  spread = models.load_pretrained(RECORDED / "qwen3", sharding=sharding, param_dtype=jnp.float32)
  check_logits("qwen3", spread)
  models.save_pretrained(tmp_path, read.config, read.variables[0])
  jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(tmp_path).variables[0], whole)
  everywhere = models.load_pretrained(RECORDED / "qwen3", sharding=NamedSharding(mesh, P())).variables[0]
  assert everywhere["head"].is_fully_replicated
  jax.tree.map(np.testing.assert_array_equal, everywhere, whole)
  with pytest.raises(ValueError, match="sharding must return a sharding for each of"):
    models.load_pretrained(RECORDED / "qwen3", sharding=lambda shapes: shapes)


def test_each_part_is_read_once(monkeypatch):
  """Whoever else holds it, and no device's part is larger than what it holds."""
  sizes, read = [], pretrained._Tensor.read
  monkeypatch.setattr(pretrained._Tensor, "read", lambda *given: sizes.append(read(*given)) or sizes[-1])
  mesh = training.make_mesh({"data": 4, "model": 2})
  models.load_pretrained(RECORDED / "llama2", sharding=NamedSharding(mesh, P()))
  assert sum(part.size for part in sizes) == models.count_parameters(loaded("llama2").variables)


def test_settings_reach_the_model():
  read = loaded("llama3", head=False, features=True, remat="layer", scan=False, dtype=jnp.float32)
  outputs, _ = read.model.apply(*read.variables, {"tokens": jnp.zeros((1, 2), int)}, train=True)
  assert set(outputs) == {"hidden", "features"} and outputs["hidden"].dtype == jnp.float32
  assert read.config.remat == "layer" and read.config.param_dtype == jnp.bfloat16


def test_a_copy_of_a_tied_embedding_and_what_can_be_computed_are_dropped(tmp_path):
  shutil.copytree(RECORDED / "llama3", tmp_path, dirs_exist_ok=True)
  tensors = load_file(tmp_path / "model.safetensors")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(tmp_path).variables, loaded("llama3").variables)


@pytest.mark.parametrize(
  ("inner", "outer"), [("language_model.model.", "language_model."), ("model.language_model.", "")]
)
def test_a_language_model_is_found_beside_one_of_images(tmp_path, inner, outer):
  shutil.copytree(RECORDED / "qwen3", tmp_path, dirs_exist_ok=True)
  tensors = load_file(tmp_path / "model.safetensors")
  renamed = {
    inner + name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"
  }
  renamed |= {f"{outer}lm_head.weight": tensors["lm_head.weight"], "vision_tower.patches.weight": np.ones(3)}
  save_file(renamed, tmp_path / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(tmp_path).variables, loaded("qwen3").variables)


NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"entries": {"model_type": "mixtral"}}, "model_type 'mixtral' is not one of those known: llama, qwen2, qwen3"),
    ({"entries": {"hidden_size": None}}, "config.json has no hidden_size"),
    ({"entries": {"hidden_act": "relu"}}, "the activation 'relu' is not one of those known"),
    ({"entries": {"quantization_config": {"bits": 4}}}, "quantization_config={'bits': 4}"),
    ({"entries": {"rope_parameters": {"rope_type": "longrope"}}}, "rope_type 'longrope'"),
    ({"entries": {"layer_types": ["linear_attention"] * 3, "use_sliding_window": True}}, "linear_attention"),
    ({"drop": (NAME,)}, rf"tensors missing: {NAME} \[40, 16\]"),
    ({"tensors": {"model.layers.7.x": np.zeros(2)}}, r"tensors left over: model.layers.7.x \[2\]"),
    ({"tensors": {NAME: np.zeros((40, 8))}}, rf"another shape: {NAME} is \[40, 8\], and the config says \[40, 16\]"),
    ({"tensors": {NAME: np.zeros((40, 16), np.int8)}}, f"dtype that is not read: {NAME} I8"),
    ({"entries": {"num_hidden_layers": 2}}, r"left over: .* and 6 more"),
    ({"entries": {"tie_word_embeddings": False}, "drop": ("lm_head.weight",)}, r"missing: lm_head.weight \[29, 16\]"),
  ],
)
def test_what_does_not_fit_is_named(copied, changes, message):
  with pytest.raises(ValueError, match=message):
    models.load_pretrained(copied(**changes))


def test_damaged_directories(copied, tmp_path):
  folder = copied.folder
  with pytest.raises(ValueError, match=r"nowhere is no directory; a checkpoint is a directory with config.json"):
    models.load_pretrained(tmp_path / "nowhere")
  file = folder / "model.safetensors"
  content = file.read_bytes()
  for damaged in (content[:-5], content[:100], b"", b"\x80\x04pickle"):
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file, or is cut short or damaged"):
      models.load_pretrained(folder)
  file.rename(folder / "pytorch_model.bin")
  with pytest.raises(ValueError, match=r"neither model.safetensors nor.*'pytorch_model.bin'.*reads no pickle"):
    models.load_pretrained(folder)
  index = folder / "model.safetensors.index.json"
  for text, message in (
    ("[", "is no index of tensors"),
    ('{"weight_map": {"a": "../model.safetensors"}}', r"names files elsewhere: \['../model.safetensors'\]"),
    ('{"weight_map": {"a": "model-2.safetensors"}}', "names model-2.safetensors, which is not there"),
  ):
    index.write_text(text)
    with pytest.raises(ValueError, match=message):
      models.load_pretrained(folder)
  for text, message in (("{", "is no JSON"), ("[]", "must hold entries by name, got list")):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      models.load_pretrained(folder)
  (folder / "config.json").unlink()
  with pytest.raises(ValueError, match=r"has no config\.json"):
    models.load_pretrained(folder)


def test_what_cannot_be_saved_is_refused(tmp_path):
  read = loaded("qwen3")
  config, params = read.config, read.variables[0]
  save = lambda config, params: models.save_pretrained(tmp_path / "new", config, params)
  with pytest.raises(ValueError, match=r"llama would be nearest, but it cannot have \{'qk_norm': True\}"):
    save(dataclasses.replace(config, mlp_bias=True), params)
  with pytest.raises(ValueError, match=r"missing: head; left over: tail"):
    save(config, {"tail" if name == "head" else name: leaf for name, leaf in params.items()})
  with pytest.raises(ValueError, match=r"another shape: head is \[29, 8\], and the config says \[29, 16\]"):
    save(config, {**params, "head": params["head"][:, :8]})
  with pytest.raises(ValueError, match=r"not written: head int8"):
    save(config, {**params, "head": params["head"].astype(jnp.int8)})
  assert not (tmp_path / "new").exists()
  with pytest.raises(ValueError, match=r"holds a model already \(config.json, model.safetensors\)"):
    models.save_pretrained(RECORDED / "qwen3", config, params)


def test_an_interrupted_save_leaves_no_model(tmp_path, monkeypatch):
  def fail(*given):
    raise OSError("no space left on device")

  read = loaded("qwen3")
  monkeypatch.setattr(pretrained, "save_file", fail)
  with pytest.raises(OSError, match="no space"):
    models.save_pretrained(tmp_path, read.config, read.variables[0])
  assert list(tmp_path.iterdir()) == []


def test_families_are_found_by_what_a_model_has():
  """From sizes alone to all that Gemma adds."""
  plain = models.DecoderConfig(vocabulary=8, width=8, depth=2, heads=2)
  family = lambda config: write_config(config)["model_type"]
  assert family(plain) == "llama"
  assert family(dataclasses.replace(plain, qkv_bias=True)) == "qwen2"
  assert family(dataclasses.replace(plain, qk_norm=True, dtype=jnp.bfloat16, remat="layer")) == "qwen3"
  for name in FAMILIES:
    config = loaded(name).config
    assert read_config(write_config(config)) == dataclasses.replace(config, param_dtype=np.float32)


MEASURED = """
import pathlib, re, sys, jax
from kdflax import models
status = pathlib.Path("/proc/self/status")
resident = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])  # the most so far  # the most so far
models.load_pretrained(sys.argv[1])
before = resident()
read = models.load_pretrained(sys.argv[2])
jax.block_until_ready(read.variables)
print(1024 * (resident() - before) / models.count_bytes(read.variables))
"""


@pytest.mark.slow
def test_there_is_never_a_second_copy_in_memory(tmp_path):
  """The most memory that a process of its own has, above that with everything imported, per byte of the params."""
  config = models.DecoderConfig(vocabulary=4096, width=1024, depth=12, heads=8, qk_norm=True)
  shapes, _ = jax.eval_shape(models.decoder(config).init, jax.random.key(0), {"tokens": np.zeros((1, 1), int)})
  params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, jnp.bfloat16), shapes)
  models.save_pretrained(tmp_path, config, params)
  assert models.count_bytes(params) > 300e6
  command = [sys.executable, "-c", MEASURED, RECORDED / "qwen3", tmp_path]
  done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RECORDED.parents[2])
  assert 0.9 < float(done.stdout) < 1.5, done.stdout
