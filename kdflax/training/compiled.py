"""Programs of a learner: the state that training starts from, and the step, on one device or under a layout."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from kdflax.model import PyTree, Variables
from kdflax.objectives import Metrics
from kdflax.training.learner import Learner
from kdflax.training.mesh import replicated
from kdflax.training.metrics import added_up
from kdflax.training.sharding import Layout, laid_out, pin_state
from kdflax.training.state import TrainState


def init_state(
  learner: Learner, key: jax.Array, data: PyTree, frozen: Variables | None = None, *, layout: Layout
) -> TrainState:
  """Makes the state that training starts from under a layout: each device draws its own part, and none holds all.

  Args:
    learner: the program.
    key: as of `learner.init`, as are `data` and `frozen`; the values are those that it makes.
    data: a batch, or what the learner samples from.
    frozen: (params, state) of the models that are not trained, see `place_frozen`.
    layout: where everything goes.

  Returns:
    The state, for `make_train_step(learner, layout=layout)`.

  Raises:
    ValueError: as `learner.init` does, or if a rule does not fit.
  """

  def init(key: jax.Array, data: PyTree, *frozen: Variables) -> TrainState:
    return pin_state(learner.init(key, data, *frozen), layout, learner.follows)

  return jax.jit(init)(key, data, *(() if frozen is None else (frozen,)))


def make_train_step(
  learner: Learner, *, mesh: Mesh | None = None, layout: Layout | None = None, steps_per_call: int = 1
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Compiles a learner's step: one jitted function that donates the state it is given.

  Args:
    learner: the program; a vmapped step (several seeds) is welcome.
    mesh: devices to run on. The state comes back replicated; batches keep the sharding they have (`place_batch`).
    layout: what is sharded how, in place of a mesh, for a state of `init_state`. The state comes back as it came, a
      batch is spread over the devices wherever it comes from, and gradients lie where their params do.
    steps_per_call: updates in one dispatch, by `lax.scan` over the same data; needs a learner that samples. Pays on an
      accelerator; on a CPU with convolutions it costs.

  Returns:
    `step(state, data, frozen=None) -> (state, metrics)`, the metrics added up over the updates of the call.

  Raises:
    ValueError: if there are both a mesh and a layout.
  """
  if mesh is not None and layout is not None:
    raise ValueError("a layout has a mesh already; give make_train_step one of mesh and layout")

  def step(state: TrainState, data: PyTree, *frozen: Variables | None) -> tuple[TrainState, Metrics]:
    if layout is None:
      return learner.step(state, data, *frozen)
    with laid_out(layout):
      state, metrics = learner.step(state, data, *frozen)
    return pin_state(state, layout, learner.follows), jax.lax.with_sharding_constraint(metrics, replicated(layout.mesh))

  def call(state: TrainState, data: PyTree, *frozen: Variables | None) -> tuple[TrainState, Metrics]:
    if steps_per_call == 1:
      return step(state, data, *frozen)
    state, metrics = jax.lax.scan(lambda s, _: step(s, data, *frozen), state, length=steps_per_call)
    return state, dict(added_up(metrics))

  return jax.jit(call, donate_argnums=0, out_shardings=None if mesh is None else replicated(mesh))
