"""One distillation step against the same step in eager PyTorch: `python -m benchmarks.step`.

Student, frozen live teacher, batch, losses (hard labels, soft targets, relational distances and similarities) and
optimizer are the same on both sides, the weights are not; the two run in turns. Batches are handed over as NumPy
arrays.
"""

import argparse
import functools

import jax
import numpy as np
import optax

from benchmarks.harness import environment, report, tensor, time_interleaved
from kdflax import losses, models, training
from kdflax.objectives import Term

TEMPERATURE = 4.0
# name: (image, batch, student widths, teacher widths); a network of one width list is convolutional for images.
CASES = {
  "conv net, 8x8": ("convnet", (8, 8, 1), 64, (8, 16), (16, 32)),
  "conv net, 16x16": ("convnet", (16, 16, 3), 64, (8, 16), (16, 32)),
  "conv net, 32x32": ("convnet", (32, 32, 3), 64, (16, 32), (32, 64)),
  "MLP, 64 inputs": ("mlp", (8, 8, 1), 64, (32,), (256, 256)),
  "MLP, 784 inputs": ("mlp", (28, 28, 1), 128, (128, 128), (512, 512)),
}


def kdflax_step(kind, images, labels, student, teacher):
  """A call that makes one update and waits for it."""
  make = getattr(models, kind)
  pair = {"student": "student.embedding", "teacher": "teacher.embedding"}
  logits = {"student_logits": "student.logits", "teacher_logits": "teacher.logits", "temperature": TEMPERATURE}
  terms = {
    "hard": Term(
      optax.softmax_cross_entropy_with_integer_labels, {"logits": "student.logits", "labels": "batch.label"}
    ),
    "soft": Term(losses.kl_soft_targets, logits),
    "distance": Term(losses.rkd_distance, pair),
    "similarity": Term(losses.similarity_preserving, pair),
  }
  network = {"student": make(student, 10), "teacher": make(teacher, 10)}
  batch = {"image": images, "label": labels}
  program = training.make_learner(network, terms, optax.sgd(0.05, momentum=0.9))
  frozen = {"teacher": network["teacher"].init(jax.random.key(1), batch)}
  state = [program.init(jax.random.key(0), batch, frozen)]
  step = training.make_train_step(program)

  def call():
    state[0], metrics = step(state[0], batch, frozen)
    jax.block_until_ready((state[0], metrics))

  return call


def torch_step(torch, kind, images, labels, student, teacher):
  """The same in eager PyTorch."""
  nn, functional = torch.nn, torch.nn.functional

  def network(widths):
    if kind == "mlp":
      sizes = (int(np.prod(images.shape[1:])), *widths)
      layers = [nn.Flatten()]
      for a, b in zip(sizes, widths, strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    else:
      layers = []
      for index, (a, b) in enumerate(zip((images.shape[-1], *widths), widths, strict=False)):
        convolution = nn.Conv2d(a, b, 3, stride=1 if index == 0 else 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(b), nn.ReLU()]
      layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.ModuleDict({"body": nn.Sequential(*layers), "head": nn.Linear(widths[-1], 10)})

  def run(model, x):
    embedding = model["body"](x)
    return model["head"](embedding), embedding

  def distances(x):
    squared = x.square().sum(1)
    d = (squared[:, None] + squared - 2 * x @ x.T).clamp(min=1e-12).sqrt() * (1 - torch.eye(len(x), device=x.device))
    return d / d[d > 0].mean()

  def similarities(x):
    return functional.normalize(x @ x.T, dim=1)

  x, y = tensor(images.transpose(0, 3, 1, 2)), tensor(labels.astype(np.int64))
  small, large = network(student).to(x.device), network(teacher).to(x.device).eval()
  optimizer = torch.optim.SGD(small.parameters(), 0.05, momentum=0.9)

  def call():
    with torch.no_grad():
      teacher_logits, teacher_embedding = run(large, x)
      teacher_distances, teacher_similarities = distances(teacher_embedding), similarities(teacher_embedding)
    logits, embedding = run(small, x)
    log_q = functional.log_softmax(logits / TEMPERATURE, 1)
    soft = functional.kl_div(log_q, functional.softmax(teacher_logits / TEMPERATURE, 1), reduction="batchmean")
    loss = functional.cross_entropy(logits, y) + TEMPERATURE**2 * soft
    loss = loss + functional.smooth_l1_loss(distances(embedding), teacher_distances)
    loss = loss + functional.mse_loss(similarities(embedding), teacher_similarities)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  return call


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=60, help="timed rounds")
  repeats = parser.parse_args().repeats
  try:
    import torch
  except ImportError:
    print("torch is not installed: nothing to compare with (pip install torch==2.13.0)")
    return
  machine, rows = environment("flax", "optax", "torch"), []
  for name, (kind, shape, batch, student, teacher) in CASES.items():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(batch, *shape)).astype(np.float32), rng.integers(0, 10, batch).astype(np.int32)
    eager = torch_step(torch, kind, images, labels, student, teacher)
    sides = {"kdflax": kdflax_step(kind, images, labels, student, teacher)}
    for threads in (1, 2):
      sides[f"torch, {threads} threads"] = functools.partial(with_threads, torch, threads, eager)
    times = time_interleaved(sides, repeats=repeats, warmup=5)
    medians = {side: median for side, (median, _, _) in times.items()}
    fastest = min(median for side, median in medians.items() if side != "kdflax")
    rows.append(
      {"network": name, "batch": batch}
      | {f"{side} (ms)": median for side, median in medians.items()}
      | {"times faster": fastest / medians["kdflax"]}
    )
  report("step", "A distillation step, median", rows, machine, "Ratio against the faster of torch's two settings.")


def with_threads(torch, threads, call):
  torch.set_num_threads(threads)
  call()


if __name__ == "__main__":
  main()
