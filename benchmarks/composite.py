"""What an objective of many terms costs beyond its forward and backward passes: `python -m benchmarks.composite`.

The passes alone: the student forward and backward and the frozen teacher forward, in the step with the soft targets
only. Each other term is added to that step by itself, and then all of them at once; the sum of the parts is that of the
passes and of what each term adds to them. Student and teacher are live, the batch is handed over as NumPy arrays,
compilation is without a cache.
"""

import argparse
import time

import jax
import numpy as np
import optax

from benchmarks.harness import environment, report, time_interleaved
from benchmarks.step import CASES
from kdflax import losses, models, training
from kdflax.objectives import Term


def objective(width: int):
  """Connectors, the Term of the passes alone, and the further Terms."""
  logits = {"student_logits": "student.logits", "teacher_logits": "teacher.logits", "temperature": 4.0}
  pair = {"student": "student.embedding", "teacher": "teacher.embedding"}
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  more = {
    "hard": Term(cross_entropy, {"logits": "student.logits", "labels": "batch.label"}),
    "feature": Term(losses.hint, {**pair, "student": "connector.output"}),
    "distance": Term(losses.rkd_distance, pair),
    "similarity": Term(losses.similarity_preserving, pair),
  }
  connectors = {"connector": models.linear_connector("student.embedding", width)}
  return connectors, {"soft": Term(losses.kl_soft_targets, logits)}, more


def compiled_step(network, terms, batch):
  """(a call that makes one update and waits for it, seconds of tracing and compiling it)."""
  program = training.make_learner(network, terms, optax.sgd(0.05, momentum=0.9))
  frozen = {"teacher": network["teacher"].init(jax.random.key(1), batch)}
  state = program.init(jax.random.key(0), batch, frozen)
  step = training.make_train_step(program)
  start = time.perf_counter()
  state, _ = jax.block_until_ready(step(state, batch, frozen))
  seconds, carried = time.perf_counter() - start, [state]

  def call():
    carried[0], metrics = step(carried[0], batch, frozen)
    jax.block_until_ready((carried[0], metrics))

  return call, seconds


def measure(name: str, repeats: int):
  kind, shape, size, student, teacher = CASES[name]
  rng = np.random.default_rng(0)
  batch = {"image": rng.normal(size=(size, *shape)).astype(np.float32), "label": rng.integers(0, 10, size)}
  make = getattr(models, kind)
  connectors, passes, more = objective(teacher[-1])
  network = {"student": make(student, 10), "teacher": make(teacher, 10)}
  terms = {"passes": passes} | {f"+ {part}": passes | {part: term} for part, term in more.items()}
  terms["composite"] = passes | more
  needs = lambda found: network | (connectors if "feature" in found else {})
  steps = {part: compiled_step(needs(found), found, batch) for part, found in terms.items()}
  times = time_interleaved({part: call for part, (call, _) in steps.items()}, repeats=repeats, warmup=5)
  medians = {part: median for part, (median, _, _) in times.items()}
  seconds = {part: seconds for part, (_, seconds) in steps.items()}
  sum_of_parts = lambda found: found["passes"] + sum(found[f"+ {part}"] - found["passes"] for part in more)
  return (
    {"network": name}
    | {f"{part} (ms)": median for part, median in medians.items()}
    | {"composite / passes": medians["composite"] / medians["passes"]}
    | {"composite / sum of parts": medians["composite"] / sum_of_parts(medians)}
    | {f"compiling {part} (s)": spent for part, spent in seconds.items()}
    | {"compiling composite / sum of parts": seconds["composite"] / sum_of_parts(seconds)}
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=60, help="timed rounds")
  repeats = parser.parse_args().repeats
  jax.config.update("jax_enable_compilation_cache", False)
  machine = environment("flax", "optax")
  rows = [measure(name, repeats) for name in CASES]
  report(
    "composite", "One objective of many terms, median of a step", rows, machine, __doc__.split("\n\n", 1)[1].strip()
  )


if __name__ == "__main__":
  main()
