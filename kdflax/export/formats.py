"""The student in the formats of other runtimes: ONNX, and LiteRT without TensorFlow."""

import hashlib
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdflax.export.stablehlo import checked_size, evaluated
from kdflax.extras import extra
from kdflax.files import write_atomically
from kdflax.model import Model, PyTree
from kdflax.numerics.trees import name_of, nest_names


def export_onnx(
  path: str | os.PathLike[str],
  model: Model,
  variables: tuple[PyTree, PyTree],
  example: Mapping[str, Any],
  *,
  outputs: Sequence[str] = ("logits",),
  batch_size: int | None = None,
) -> str:
  """Write a model in evaluation mode as an ONNX file, with its weights in it.

  Needs `pip install "kdflax[onnx-export]"` and `pip install --no-deps jax2onnx`, whose pin of Orbax is older than what
  kdflax needs.

  Args:
    path: the file, replaced if it is there.
    model: a network; it reads the batch.
    variables: its (params, state).
    example: what the model reads of a batch, and no more: dict of arrays [batch, ...] or of their shapes. Inputs of the
      graph have their names.
    outputs: which outputs to keep, such as `"logits"`, `"features.stage1"`: names of the outputs of the graph.
    batch_size: None leaves it open.

  Returns:
    SHA-256 of the file.

  Raises:
    ImportError: jax2onnx is missing.
    ValueError: if the model lacks an output.
  """
  with extra("onnx-export", "an ONNX export (with pip install --no-deps jax2onnx)"):
    from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]
  size = "batch" if batch_size is None else checked_size(batch_size)
  function, inputs = _positional(model, variables, example, outputs)
  specs = [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in inputs.values()]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of Flax, to jax2onnx
    graph = to_onnx(function, specs, model_name="student", input_names=list(inputs), output_names=list(outputs))
  return _written(path, graph.SerializeToString())


def export_litert(
  path: str | os.PathLike[str],
  model: Model,
  variables: tuple[PyTree, PyTree],
  example: Mapping[str, Any],
  *,
  outputs: Sequence[str] = ("logits",),
  batch_size: int = 1,
) -> str:
  """Write a model in evaluation mode as a LiteRT file (`.tflite`), for phones and small devices, without TensorFlow.

  Needs `pip install "kdflax[litert]"`. The signature `serving_default` has inputs and outputs by name.

  Args:
    path: the file, replaced if it is there.
    model: a network; it reads the batch.
    variables: its (params, state).
    example: as for `export_onnx`.
    outputs: as for `export_onnx`.
    batch_size: the only size that it takes.

  Returns:
    SHA-256 of the file.

  Raises:
    ImportError: litert-converter is missing.
    ValueError: if the model lacks an output.
  """
  with extra("litert", "a LiteRT export"):
    import litert_converter  # noqa: F401  # pyright: ignore[reportMissingImports]
    from litert_converter import converter_api_ext as converter  # pyright: ignore[reportMissingImports]
    from litert_converter.mlir import ir, passmanager  # pyright: ignore[reportMissingImports]
  function, inputs = _positional(model, variables, example, outputs)
  specs = [jax.ShapeDtypeStruct((checked_size(batch_size), *x.shape[1:]), x.dtype) for x in inputs.values()]
  program = jax.jit(function).lower(*specs).as_text()
  context = ir.Context()
  converter.prepare_mlir_context(context)
  with context:
    module = ir.Module.parse(program)
    converter.set_signature(module.operation, "serving_default", list(inputs), list(outputs))
    converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), converter.ConvertToTFLConfig())
    content = converter.export_flatbuffer_to_bytes(module.operation)
  return _written(path, content)


def _positional(
  model: Model, variables: tuple[PyTree, PyTree], example: Mapping[str, Any], outputs: Sequence[str]
) -> tuple[Callable[..., tuple[jax.Array, ...]], dict[str, jax.ShapeDtypeStruct]]:
  """The model as a function of its inputs in order, which are returned by name; the weights are constants of it."""
  forward = evaluated(model, outputs)
  weights = jax.tree.map(jnp.asarray, tuple(variables))
  inputs = {
    name_of(path, "."): jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
    for path, x in jax.tree.leaves_with_path(dict(example))
  }

  def function(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    found = forward(weights, nest_names(dict(zip(inputs, arrays, strict=True)), "."))
    return tuple(found[path] for path in outputs)

  jax.eval_shape(function, *inputs.values())  # a mistake in the model speaks for itself, not for a converter
  return function, inputs


def _written(path: str | os.PathLike[str], content: bytes) -> str:
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(file, content)
  return hashlib.sha256(content).hexdigest()
