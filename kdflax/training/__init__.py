"""Training: state, step, loop, mesh, checkpoints and metrics. Names no loss and no model."""

from kdflax.files import DiskFull, digest, write_atomically
from kdflax.model import named_key
from kdflax.training import metrics
from kdflax.training.checkpoints import Checkpoints, read_checkpoint
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
from kdflax.training.learner import Learner, learner, make_learner, make_train_step
from kdflax.training.loop import Evaluation, Logging, Saving, fit
from kdflax.training.mesh import make_mesh, place_batch, replicated
from kdflax.training.run import MetricsLog, RunDirectory, RunDirectoryError
from kdflax.training.stages import starting_from, train_stages
from kdflax.training.state import Average, Penalty, TrainState

__all__ = [
  "PREEMPTED",
  "Average",
  "Checkpoints",
  "DiskFull",
  "Diverged",
  "Evaluation",
  "ExitCode",
  "Learner",
  "Logging",
  "MetricsLog",
  "Penalty",
  "Preempted",
  "RunDirectory",
  "RunDirectoryError",
  "Saving",
  "TrainState",
  "apply_models",
  "digest",
  "evaluate_dataset",
  "fit",
  "learner",
  "main_guard",
  "make_eval_step",
  "make_learner",
  "make_mesh",
  "make_train_step",
  "metrics",
  "named_key",
  "place_batch",
  "predict",
  "read_checkpoint",
  "replicated",
  "starting_from",
  "stop_on_signals",
  "stop_on_sigterm",
  "train_stages",
  "use_compile_cache",
  "write_atomically",
]
