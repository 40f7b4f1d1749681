"""Meshes: the sizes asked for, automatic axes, and batches that split or say why not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kdflax.training import make_mesh, place_batch, replicated


@pytest.mark.parametrize(
  ("axes", "shape"),
  [(None, {"data": 8}), ({"data": 8}, {"data": 8}), ({"data": -1, "model": 2}, {"data": 4, "model": 2})],
)
def test_a_mesh_has_the_sizes_asked_for(axes, shape):
  mesh = make_mesh(axes)
  assert dict(mesh.shape) == shape
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_one_device_is_a_mesh_of_one():
  mesh = make_mesh(devices=jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1}
  assert place_batch({"x": np.ones((3, 2))}, mesh)["x"].shape == (3, 2)


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": -1, "model": 3}, {"data": -1, "model": -1}, {"data": 0}])
def test_sizes_that_do_not_fit_are_refused(axes):
  with pytest.raises(ValueError, match="does not fit 8 devices"):
    make_mesh(axes)


def test_products_of_a_batch_with_itself_are_allowed():
  batch = place_batch(np.arange(16.0, dtype=np.float32).reshape(8, 2), make_mesh())
  np.testing.assert_allclose(jax.jit(lambda x: x @ x.T)(batch), np.asarray(batch) @ np.asarray(batch).T, rtol=1e-5)


def test_a_batch_is_split_and_a_state_is_copied():
  mesh = make_mesh()
  batch = place_batch({"image": np.ones((16, 3)), "label": np.arange(16)}, mesh)
  assert {leaf.addressable_shards[0].data.shape[0] for leaf in jax.tree.leaves(batch)} == {2}
  state = jax.device_put(jnp.ones((16, 3)), replicated(mesh))
  assert state.addressable_shards[0].data.shape == (16, 3)


@pytest.mark.parametrize("shape", [(12, 2), ()])
def test_a_batch_that_does_not_split_is_named_with_its_shape(shape):
  with pytest.raises(ValueError, match=rf"batch\['image'\] of shape \({str(shape)[1:-1]}\) does not split over 8"):
    place_batch({"image": np.ones(shape), "label": np.arange(8)}, make_mesh())
