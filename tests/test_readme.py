"""The README's code runs as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_losses_serve_another_loop():
  names: dict = {}
  exec(BLOCKS[0], names)
  params, opt_state, first = names["step"](names["params"], names["opt_state"])
  for _ in range(20):
    params, opt_state, last = names["step"](params, opt_state)
  assert last < first / 2


def test_an_objective_trains():
  names: dict = {}
  exec(BLOCKS[1], names)
  batch = {"image": jax.random.normal(jax.random.key(0), (8, 8, 8, 1)), "label": jnp.arange(8) % 10}
  frozen = {"teacher": names["models"].convnet((32, 64)).init(jax.random.key(1), batch)}
  state = names["program"].init(jax.random.key(2), batch, frozen)
  state, metrics = names["step"](state, batch, frozen)
  assert int(state.step) == 1
  assert set(metrics) == {"hard", "soft", "relations"}


@pytest.mark.parametrize("target", ["distill", "test"])
def test_the_two_commands_exist(target):
  makefile = (pathlib.Path(__file__).parent.parent / "Makefile").read_text()
  assert f"make {target} " in README
  assert re.search(rf"^{target}:", makefile, re.MULTILINE)
