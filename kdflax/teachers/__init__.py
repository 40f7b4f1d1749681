"""Teachers: several as one, recorded outputs that stand in for a live model, and frozen ones known by their content."""

from kdflax.files import load_variables, save_variables
from kdflax.teachers.ensembles import (
  average_logits,
  average_probabilities,
  confidence_weighted,
  label_map,
  random_teacher,
  subset_teachers,
)
from kdflax.teachers.external import External, from_onnx, from_torch, image_input, live, onnx_inputs
from kdflax.teachers.recording import record_from
from kdflax.teachers.standardization import fusion_weights, phi_s, standardize, teacher_dropping
from kdflax.teachers.store import (
  Record,
  RecordedBatches,
  inspect,
  open_record,
  open_records,
  read_record,
  record,
  recorded,
)

__all__ = [
  "External",
  "Record",
  "RecordedBatches",
  "average_logits",
  "average_probabilities",
  "confidence_weighted",
  "from_onnx",
  "from_torch",
  "fusion_weights",
  "image_input",
  "inspect",
  "label_map",
  "live",
  "load_variables",
  "onnx_inputs",
  "open_record",
  "open_records",
  "phi_s",
  "random_teacher",
  "read_record",
  "record",
  "record_from",
  "recorded",
  "save_variables",
  "standardize",
  "subset_teachers",
  "teacher_dropping",
]
