"""Training: state, step, loop, mesh, checkpoints and metrics. Names no loss and no model."""

from kdflax.files import digest, write_atomically
from kdflax.model import named_key
from kdflax.training import metrics
from kdflax.training.checkpoints import Checkpoints
from kdflax.training.evaluation import apply_models, make_eval_step
from kdflax.training.finite import Diverged
from kdflax.training.learner import Learner, learner, make_learner, make_train_step
from kdflax.training.loop import Evaluation, Logging, Saving, fit
from kdflax.training.mesh import make_mesh, place_batch, replicated
from kdflax.training.run import (
  PREEMPTED,
  MetricsLog,
  Preempted,
  RunDirectory,
  RunDirectoryError,
  stop_on_sigterm,
)
from kdflax.training.stages import starting_from, train_stages
from kdflax.training.state import Average, Penalty, TrainState

__all__ = [
  "PREEMPTED",
  "Average",
  "Checkpoints",
  "Diverged",
  "Evaluation",
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
  "fit",
  "learner",
  "make_eval_step",
  "make_learner",
  "make_mesh",
  "make_train_step",
  "metrics",
  "named_key",
  "place_batch",
  "replicated",
  "starting_from",
  "stop_on_sigterm",
  "train_stages",
  "write_atomically",
]
