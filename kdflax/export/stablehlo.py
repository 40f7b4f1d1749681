"""The student leaves: a model as StableHLO and its weights as safetensors, to be run without kdflax or its teachers.

A folder holds `model.stablehlo`, a portable StableHLO artifact whose first arguments are the weights; the weights,
`variables.safetensors`; and `manifest.json`, which says in what order and shape arguments go in and results come out,
and ties the other two by their digests. Nothing is pickled. Connectors and teachers stay behind, since only the model
that is given is written. docs/export.md has a loader of a few lines for where there is no kdflax.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from kdflax.files import load_variables, save_variables, write_atomically
from kdflax.model import Model, PyTree, lookup
from kdflax.numerics.trees import name_of

_MODULE, _VARIABLES, _MANIFEST = "model.stablehlo", "variables.safetensors", "manifest.json"
_PARTS = ("params", "state")  # of the variables, as their file names them
_BATCH = "batch"  # name of the symbolic batch size


def export_model(
  directory: str | pathlib.Path,
  model: Model,
  variables: tuple[PyTree, PyTree],
  example: Mapping[str, Any],
  *,
  outputs: Sequence[str] = ("logits",),
  platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
  batch_size: int | None = None,
) -> str:
  """Write a model in evaluation mode, for every batch size or for one, and several platforms.

  Args:
    directory: made if it does not exist; an earlier export in it is replaced.
    model: a network; it reads the batch.
    variables: its (params, state).
    example: what the model reads of a batch, and no more: nested dict of arrays [batch, ...] or of their shapes. The
      first axis of each is left open, the others are fixed.
    outputs: which outputs to keep, such as `"logits"`, `"embedding"`, `"features.stage1"`, all [batch, ...]. What only
      the others need is not computed.
    platforms: where it will run.
    batch_size: leave it None for every size. Compilers that want all shapes, such as IREE, take a program of one size
      and one platform.

  Returns:
    The digest of the variables.

  Raises:
    ValueError: if the model lacks an output, or depends on its batch size.
  """
  forward = evaluated(model, outputs)
  size = export.symbolic_shape(_BATCH) if batch_size is None else (checked_size(batch_size),)
  inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*size, *x.shape[1:]), _canonical(x.dtype)), dict(example))
  weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), _canonical(x.dtype)), tuple(variables))
  exported = export.export(_open_batch(forward, weights, inputs, example), platforms=tuple(platforms))(weights, inputs)
  results = _described(exported.out_tree.unflatten(exported.out_avals))
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / _MANIFEST).unlink(missing_ok=True)  # an export without a manifest is no export
  digest = save_variables(directory / _VARIABLES, variables)
  write_atomically(directory / _MODULE, exported.mlir_module_serialized)
  manifest = {
    "module": hashlib.sha256(exported.mlir_module_serialized).hexdigest(),
    "variables": digest,
    "platforms": list(exported.platforms),
    "arguments": {"variables": _described(weights), "batch": _described(inputs)},
    "results": results,
    "weights": [name_of(path) for path, _ in jax.tree.leaves_with_path(dict(zip(_PARTS, weights, strict=True)))],
    "kept": list(exported.module_kept_var_idx),
    "calling_convention": exported.calling_convention_version,
    "global_constants": exported.uses_global_constants,
  }
  write_atomically(directory / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
  return digest


def load_exported(
  directory: str | pathlib.Path, *, digest: str | None = None
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
  """Read an exported model back as a compiled function.

  Args:
    directory: where `export_model` wrote.
    digest: what it returned, to refuse other weights.

  Returns:
    `batch -> outputs by path`, compiled for each batch size it meets. Entries of the batch that the model does not read
    are ignored. It has no derivatives.

  Raises:
    ValueError: if there is no complete export, a file is not the one that was written, or this version of JAX cannot
      run it; when called, if the batch does not fit or this platform is not among those exported for.
  """
  directory = pathlib.Path(directory)
  if not (directory / _MANIFEST).is_file():
    raise ValueError(f"{directory} holds no complete export ({_MANIFEST} is missing); export the model again")
  manifest = json.loads((directory / _MANIFEST).read_text())
  module = (directory / _MODULE).read_bytes()
  if hashlib.sha256(module).hexdigest() != manifest["module"]:
    raise ValueError(f"{directory / _MODULE} is not what was exported (its SHA-256 differs); export the model again")
  oldest, newest = (
    export.minimum_supported_calling_convention_version,
    export.maximum_supported_calling_convention_version,
  )
  if not oldest <= manifest["calling_convention"] <= newest:
    raise ValueError(
      f"{directory} has calling convention {manifest['calling_convention']}, and JAX {jax.__version__} knows {oldest}"
      f" to {newest}; export the model again"
    )
  load_variables(directory / _VARIABLES, digest=manifest["variables"])
  variables = jax.tree.map(jnp.asarray, load_variables(directory / _VARIABLES, digest=digest))
  exported = _restored(module, manifest)
  call = jax.jit(exported.call)
  entries = manifest["arguments"]["batch"]

  def predict(batch: Mapping[str, Any]) -> dict[str, Any]:
    if set(entries) - set(batch):
      raise ValueError(f"the batch has {sorted(batch)}; the model reads {entries}")
    return call(variables, {name: batch[name] for name in entries})

  return predict


def evaluated(model: Model, outputs: Sequence[str]) -> Callable[[PyTree, PyTree], dict[str, jax.Array]]:
  """The function `(variables, batch) -> outputs by path` of a model in evaluation mode.

  Raises:
    ValueError: if it reads another model's output.
  """
  if model.inputs != "batch":
    raise ValueError(f"only a model that reads the batch can leave; this one reads {model.inputs!r}, another's output")

  def forward(variables: tuple[PyTree, PyTree], batch: PyTree) -> dict[str, jax.Array]:
    found, _ = model.apply(*variables, batch, train=False, key=None)
    return {path: lookup(found, path) for path in outputs}

  return forward


def checked_size(batch_size: int) -> int:
  """Raises a ValueError unless it is a number of examples."""
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1")
  return batch_size


def _open_batch(forward: Callable[[PyTree, PyTree], Any], weights: PyTree, inputs: PyTree, example: PyTree) -> Any:
  """The jitted function, traced for an open batch, or a ValueError if it can only be had for one of known size.

  What a model does with its batch size may fail in many ways: `len` and `range` want an integer (TypeError), a
  comparison has no answer. One that works for the example depends on its size.
  """
  compiled = jax.jit(forward)
  try:
    compiled.trace(weights, inputs)
  except Exception as error:
    of_known_size = jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, spec.dtype), dict(example), inputs)
    jax.eval_shape(forward, weights, of_known_size)  # any other mistake is raised here
    raise ValueError(f"the model depends on its batch size, which is left open: {error}") from error
  return compiled


def _restored(module: bytes, manifest: Mapping[str, Any]) -> export.Exported:
  """An export made anew from its parts: that of a stand-in with the same arguments and results, the module replaced.

  JAX's own serialisation needs a package that it does not depend on, and hides the StableHLO inside.
  """
  size = export.symbolic_shape(_BATCH)[0]
  variables = tuple(_specs(part, size) for part in manifest["arguments"]["variables"])
  inputs, results = _specs(manifest["arguments"]["batch"], size), manifest["results"]

  def stand_in(variables: PyTree, batch: PyTree) -> PyTree:
    del variables
    size = jax.tree.leaves(batch)[0].shape[0]
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), _specs(results, size))

  made = export.export(jax.jit(stand_in), platforms=manifest["platforms"])(variables, inputs)
  return dataclasses.replace(
    made,
    mlir_module_serialized=module,
    module_kept_var_idx=tuple(manifest["kept"]),
    calling_convention_version=manifest["calling_convention"],
    uses_global_constants=manifest["global_constants"],
    _get_vjp=None,  # that of the stand-in would be wrong
  )


def _described(tree: PyTree) -> PyTree:
  """Specs as text, such as `float32[batch,8,8]`."""

  def text(spec: Any) -> str:
    shape = [str(n) for n in spec.shape]
    if any(not n.isdigit() and n != _BATCH for n in shape):
      raise ValueError(f"the model depends on its batch size: it has an array of shape [{', '.join(shape)}]")
    return f"{spec.dtype}[{','.join(shape)}]"

  return jax.tree.map(text, tree)


def _specs(described: PyTree, size: Any) -> PyTree:
  def spec(text: str) -> jax.ShapeDtypeStruct:
    dtype, shape = text.removesuffix("]").split("[")
    return jax.ShapeDtypeStruct([size if n == _BATCH else int(n) for n in shape.split(",") if n], jnp.dtype(dtype))

  return jax.tree.map(spec, described)


def _canonical(dtype: Any) -> Any:
  return jax.dtypes.canonicalize_dtype(dtype)
