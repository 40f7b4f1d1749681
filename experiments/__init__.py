"""One script for each question a user asks."""

import os

# JAX's LAPACK on a CPU is OpenBLAS, whose threads go on spinning after a call and take the cores of XLA's own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before anything loads it
