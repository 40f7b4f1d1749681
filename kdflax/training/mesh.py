"""Device meshes: one helper, so that every program runs the same on one device and on many."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(axes: Mapping[str, int] | None = None, devices: list[Any] | None = None) -> Mesh:
  """Builds a mesh with automatic axes.

  JAX's default since 0.9 are explicit axes, which reject the products of a batch with itself that relational losses
  need.

  Args:
    axes: size by axis name, at most one of them -1 for "all that is left"; by default all devices on `"data"`.
    devices: the devices to use, all by default.

  Returns:
    The mesh; one device is a mesh of one.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  axes = dict(axes or {"data": -1})
  devices = list(devices or jax.devices())
  sizes = list(axes.values())
  if sizes.count(-1) == 1:
    sizes[sizes.index(-1)] = len(devices) // -int(np.prod(sizes))
  if any(size < 1 for size in sizes) or np.prod(sizes) != len(devices):
    raise ValueError(f"a mesh {axes} does not fit {len(devices)} devices; make the sizes multiply to that number")
  return jax.make_mesh(tuple(sizes), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """One copy on every device."""
  return NamedSharding(mesh, P())
