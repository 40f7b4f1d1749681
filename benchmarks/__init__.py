"""Speed and memory beside the peers.

OpenBLAS, whose LAPACK JAX uses on a CPU, leaves threads spinning after a call, which take the cores of XLA's own: on
two cores a batch of singular value decompositions is four times faster with one thread. PyTorch has a library of its
own, and two threads.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before anything loads it
