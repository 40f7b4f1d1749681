"""Tests that compile the same program run in one process."""

import os

import pytest


@pytest.mark.xdist_group("groups")
def test_a_group_is_known_to_the_workers(request):
  """xdist sends by the name, so it must hold the group; without that every group compiles in every process."""
  if "PYTEST_XDIST_WORKER" in os.environ:
    assert request.node.nodeid.endswith("@groups")
