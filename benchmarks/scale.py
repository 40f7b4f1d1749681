"""One program on one device and on many, as the compiler plans it: `python -m benchmarks.scale`.

The richest step there is (relations between all examples, CRD's memory, a Gramian of the gradients of all rows, trace
norms, clipping, an average) is compiled for 1 to 8 devices without being run, and the table says what each device
holds and what is sent. Nothing here needs the memory that the table speaks of. Writes docs/scale.md between its marks.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import markdown_table
from kdflax import balancing, coupling, losses, methods, models, training
from kdflax.objectives import Term
from kdflax.training import write_atomically

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "scale.md"
RESULTS = pathlib.Path(__file__).parent / "results" / "scale.json"
MARK, END = "<!-- table: written by `python -m benchmarks.scale` -->", "<!-- end of table -->"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


class Sizes(NamedTuple):
  """Of the program. All are different, so that a shape in it says what it is of."""

  image: int
  hidden: tuple[int, int]
  classes: int
  batch: int
  examples: int


LARGE = Sizes(image=640, hidden=(1024, 768), classes=4096, batch=512, examples=16384)
SMALL = Sizes(image=80, hidden=(64, 48), classes=120, batch=21, examples=64)
ROWS = 6  # of the balancer
# What is asked of each mesh. Heads that are coupled are cut by their longer side, which the trace norm never gathers.
MEMORY = ("crd/", training.Split("data", 0, at_least=1024))
HEADS = ("task/.*kernel", training.Split(("data", "model"), at_least=1024))
FSDP = training.fsdp("data", at_least=1024)
TENSOR = training.tensor_parallel("model", at_least=1024)
CASES: dict[str, tuple[dict[str, int], list[training.Rule]]] = {
  "one device": ({"data": 1}, []),
  "copies": ({"data": 8}, []),
  "FSDP, 2": ({"data": 2}, [MEMORY, FSDP]),
  "FSDP, 4": ({"data": 4}, [MEMORY, FSDP]),
  "FSDP, 8": ({"data": 8}, [MEMORY, FSDP]),
  "FSDP and tensor parallel, 4 x 2": ({"data": 4, "model": 2}, [MEMORY, HEADS, TENSOR, FSDP]),
}


def layout_of(case: str) -> training.Layout:
  """The layout of a case, on as many of the devices as it asks for."""
  axes, rules = CASES[case]
  mesh = training.make_mesh(axes, jax.devices()[: math.prod(axes.values())])
  return training.Layout(mesh, rules, frozen=[rule for rule in rules if rule in (TENSOR, FSDP)])


def learner_of(sizes: Sizes) -> training.Learner:
  """Two tasks on one encoder, distilled from a frozen teacher."""
  encoder = models.mlp(sizes.hidden, None)
  student = models.hard_sharing(encoder, {task: models.task_head(sizes.classes) for task in ("left", "right")})
  pair = methods.pair(student, teacher_of(sizes), shapes_of(sizes))
  crd = methods.crd(pair, num_examples=sizes.examples, width=sizes.hidden[0] // 2, negatives=16)
  where = {"where": "batch.where"}
  hard = lambda task: Term(
    optax.softmax_cross_entropy_with_integer_labels,
    {"logits": f"student.logits.{task}", "labels": f"batch.label.{task}", **where},
  )
  embeddings = {"student": "student.embedding", "teacher": "teacher.embedding", **where}
  logits = {"student_logits": "student.logits.left", **where}
  terms = {
    "left": hard("left"),
    "right": hard("right"),
    "soft": Term(losses.kl_soft_targets, {**logits, "teacher_logits": "teacher.logits"}),
    "mean": Term(losses.kl_soft_targets, {**logits, "teacher_logits": "mean.logits.left"}),
    "relation": Term(losses.rkd_distance, embeddings),
    **crd.terms,
  }

  def couple(params: Mapping[str, Any]) -> jax.Array:
    return coupling.trace_norm_coupling([params["student"]["task"][task] for task in ("left", "right")])

  return training.make_learner(
    {"student": student, "teacher": teacher_of(sizes), "mean": student, **crd.models},
    terms,
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    averages={"mean": training.Average("student", 0.9)},
    penalties={"coupling": training.Penalty(couple, 1e-3)},
    balancer=balancing.from_weighting(balancing.upgrad),
    shared="student/shared",
  )


def teacher_of(sizes: Sizes) -> models.Model:
  """A network with one wide layer."""
  return models.mlp((2 * sizes.hidden[0],), sizes.classes)


def shapes_of(sizes: Sizes) -> Any:
  """Shapes of a batch."""
  return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch_of(sizes, 0)))


def batch_of(sizes: Sizes, seed: int) -> Any:
  """A masked batch."""
  random = np.random.default_rng(seed)
  labels = lambda: random.integers(sizes.classes, size=sizes.batch).astype(np.int32)
  return {
    "image": random.normal(size=(sizes.batch, sizes.image)).astype(np.float32),
    "label": {"left": labels(), "right": labels()},
    "index": random.permutation(sizes.examples)[: sizes.batch].astype(np.int32),
    "where": np.arange(sizes.batch) % 5 != 2,
  }


def compiled(sizes: Sizes, layout: training.Layout) -> Any:
  """The program of a step; nothing is allocated for it."""
  learner, batch = learner_of(sizes), shapes_of(sizes)
  key = jax.eval_shape(lambda: jax.random.key(0))
  frozen = {"teacher": jax.eval_shape(teacher_of(sizes).init, key, batch)}
  state = jax.eval_shape(learner.init, key, batch, frozen)
  place = lambda like, where: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where)
  arguments = [
    jax.tree.map(place, tree, shardings)
    for tree, shardings in (
      (state, layout.of_state(state, learner.follows)),
      (batch, layout.of_batch(batch)),
      (frozen, layout.of_frozen(frozen)),
    )
  ]
  return training.make_train_step(learner, layout=layout).lower(*arguments).compile()


class Sent(NamedTuple):
  """One kind of message in a program, loops counted once."""

  kind: str
  shape: tuple[int, ...]  # of what a device has afterwards
  bytes: int
  times: int


def messages(program: str) -> list[Sent]:
  """The messages between devices in the text of a compiled program."""
  found = re.findall(rf"= (\w+)\[([\d,]*)\]\S* ({'|'.join(COLLECTIVES)})(?:-start)?\(", program)
  counted = collections.Counter(found)
  sent = []
  for (dtype, lengths, kind), times in counted.items():
    shape = tuple(map(int, lengths.split(","))) if lengths else ()
    sent.append(Sent(kind, shape, math.prod(shape) * BYTES[dtype], times))
  return sent


def forbidden(sizes: Sizes) -> dict[tuple[int, ...], str]:
  """Shapes that no device may gather: heads, gradients of the rows over each kernel, the memory of all examples."""
  first, second = sizes.hidden
  kernels = {"first": (sizes.image, first), "second": (first, second), "head": (second, sizes.classes)}
  shapes = {(ROWS, *shape): f"gradients of the {name} kernel" for name, shape in kernels.items()}
  shapes |= {kernels["head"]: "a head", kernels["head"][::-1]: "a head, transposed"}
  return shapes | {(sizes.examples, first // 2): "the memory"}


def gathered(sizes: Sizes, program: str) -> list[str]:
  """What of the forbidden a program gathers."""
  return [
    forbidden(sizes)[m.shape] for m in messages(program) if m.kind == "all-gather" and m.shape in forbidden(sizes)
  ]


def planned(case: str, sizes: Sizes) -> dict[str, Any]:
  """One line of the table."""
  program = compiled(sizes, layout_of(case))
  memory, text = program.memory_analysis(), program.as_text()
  mebi = lambda number: round(number / 2**20, 1)
  sent = messages(text)
  return {
    "layout": case,
    "state, MiB": mebi(memory.argument_size_in_bytes),
    "temporaries, MiB": mebi(memory.temp_size_in_bytes),
    "GFLOP": round(program.cost_analysis()["flops"] / 1e9, 1),
    "messages": sum(m.times for m in sent),
    "MiB of messages": mebi(sum(m.times * m.bytes for m in sent)),
    "heads, gradients, memories gathered": ", ".join(gathered(sizes, text)) or "none",
  }


def trained(case: str, sizes: Sizes, num_steps: int) -> Any:
  """The state after some steps, as NumPy arrays."""
  learner, layout = learner_of(sizes), layout_of(case)
  frozen = {"teacher": teacher_of(sizes).init(jax.random.key(1), batch_of(sizes, 0))}
  frozen = training.place_frozen(frozen, layout)
  state = training.init_state(learner, jax.random.key(0), batch_of(sizes, 0), frozen, layout=layout)
  step = training.make_train_step(learner, layout=layout)
  for seed in range(num_steps):
    state, _ = step(state, training.place_batch(batch_of(sizes, seed), layout), frozen)
  return jax.device_get(state._replace(key=()))


def difference(first: Any, second: Any) -> float:
  """The largest difference between two states, relative to the largest number of each array."""
  relative = lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
  return max(jax.tree.leaves(jax.tree.map(relative, first, second)))


def main() -> None:
  """Compiles and trains the cases that have no result yet, and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=50, help="updates of the small program, to compare results")
  parser.add_argument("--again", action="store_true", help="make all results again")
  options = parser.parse_args()
  rows = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.again else {}
  missing = [case for case in CASES if case not in rows]
  expected = trained("one device", SMALL, options.steps) if missing else None
  for case in missing:
    found = difference(trained(case, SMALL, options.steps), expected)
    rows[case] = planned(case, LARGE) | {f"difference after {options.steps} steps": f"{found:.0e}"}
    print(rows[case], flush=True)
    write_atomically(RESULTS, json.dumps(rows, indent=1) + "\n")
  before, _, after = PAGE.read_text().partition(MARK)
  table = f"{MARK}\n\n{markdown_table([rows[case] for case in CASES])}\n{environment_line()}\n\n{END}"
  write_atomically(PAGE, before + table + after.partition(END)[2])


def environment_line() -> str:
  """What the table was made with."""
  return f"jax {jax.__version__}, eight devices that XLA makes of one CPU; sizes {LARGE._asdict()}."


if __name__ == "__main__":
  main()
