"""Programs compiled quickly rather than well: for runs of a few steps, which are nearly all compilation."""

import importlib.metadata
import os

import jax


def compile_quickly() -> None:
  """Turns most optimizations of XLA off; to be called before jax starts its backend.

  The environment is changed too, for processes that this one starts.
  """
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  jax.config.update("jax_disable_most_optimizations", True)
  if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the first of these
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
