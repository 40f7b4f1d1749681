"""Penalties over the parameters of several tasks, and the nuclear norm that they are made of."""

from kdflax.coupling.nuclear_norm import nuclear_norm, singular_value_threshold
from kdflax.coupling.penalties import (
  ProximalTraceNormState,
  compose,
  l2_coupling,
  left_multiply,
  proximal_trace_norm,
  select,
  stacked_trace_norm,
  trace_norm_coupling,
)

__all__ = [
  "ProximalTraceNormState",
  "compose",
  "l2_coupling",
  "left_multiply",
  "nuclear_norm",
  "proximal_trace_norm",
  "select",
  "singular_value_threshold",
  "stacked_trace_norm",
  "trace_norm_coupling",
]
