"""Models by name: what one returns is taken for what it was given."""

import jax
import jax.numpy as jnp
import pytest

from kdflax.model import Model
from kdflax.training.forward import run_trained


@pytest.mark.parametrize(
  ("after", "seen"),
  [({"count": 1.0, "more": 0.0}, "more"), ({}, "count"), ({"count": (1.0, 2.0)}, "count"), ({"count": 1}, "int")],
  ids=["more", "less", "shape", "dtype"],
)
def test_a_model_keeps_the_form_of_its_state(after, seen):
  after = {name: jnp.asarray(value) for name, value in after.items()}
  model = Model(
    lambda key, batch: ({}, {}), lambda params, state, batch, *, train, key=None: ({"output": batch}, after)
  )
  states = {"counter": {"count": jnp.zeros(())}}
  with pytest.raises(
    ValueError, match=rf"(?s)^the model 'counter' returns a state unlike the one it was given; .*{seen}"
  ):
    run_trained({"counter": model}, {"counter": {}}, states, {"batch": jnp.ones(2), "params": {}}, jax.random.key(0))
