"""Training: state, step, loop, mesh, checkpoints and metrics. Names no loss and no model."""

from kdflax.files import DiskFull, digest, write_atomically
from kdflax.model import named_key
from kdflax.training import metrics
from kdflax.training.checkpoints import Checkpoints, read_checkpoint
from kdflax.training.compiled import init_state, make_train_step
from kdflax.training.evaluation import apply_models, evaluate_dataset, make_eval_step, predict
from kdflax.training.finite import Diverged
from kdflax.training.guard import (
  PREEMPTED,
  ExitCode,
  Preempted,
  main_guard,
  stop_on_signals,
  stop_on_sigterm,
  use_compile_cache,
)
from kdflax.training.learner import Learner, learner, make_learner
from kdflax.training.loop import Evaluation, Logging, Saving, fit
from kdflax.training.mesh import make_mesh, replicated
from kdflax.training.precision import computing_in
from kdflax.training.run import MetricsLog, RunDirectory, RunDirectoryError
from kdflax.training.sharding import Layout, Rule, Split, fsdp, place_batch, place_frozen, tensor_parallel
from kdflax.training.stages import starting_from, train_stages
from kdflax.training.state import Average, Penalty, TrainState
from kdflax.training.trackers import TRACKERS, TensorBoard, Tracker, Trackio, WandB, tracker

__all__ = [
  "PREEMPTED",
  "TRACKERS",
  "Average",
  "Checkpoints",
  "DiskFull",
  "Diverged",
  "Evaluation",
  "ExitCode",
  "Layout",
  "Learner",
  "Logging",
  "MetricsLog",
  "Penalty",
  "Preempted",
  "Rule",
  "RunDirectory",
  "RunDirectoryError",
  "Saving",
  "Split",
  "TensorBoard",
  "Tracker",
  "Trackio",
  "TrainState",
  "WandB",
  "apply_models",
  "computing_in",
  "digest",
  "evaluate_dataset",
  "fit",
  "fsdp",
  "init_state",
  "learner",
  "main_guard",
  "make_eval_step",
  "make_learner",
  "make_mesh",
  "make_train_step",
  "metrics",
  "named_key",
  "place_batch",
  "place_frozen",
  "predict",
  "read_checkpoint",
  "replicated",
  "starting_from",
  "stop_on_signals",
  "stop_on_sigterm",
  "tensor_parallel",
  "tracker",
  "train_stages",
  "use_compile_cache",
  "write_atomically",
]
