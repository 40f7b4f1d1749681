"""Many small solvers run once each here: their compile time is all, so the compiler optimises little."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
