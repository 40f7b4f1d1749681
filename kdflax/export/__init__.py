"""The student leaves: StableHLO and safetensors, ONNX, LiteRT; its weights in eight bits if it should be small."""

from kdflax.export.formats import export_litert, export_onnx
from kdflax.export.int8 import int8_weights
from kdflax.export.stablehlo import export_model, load_exported

__all__ = [
  "export_litert",
  "export_model",
  "export_onnx",
  "int8_weights",
  "load_exported",
]
