"""Benchmarks: ratios to hand-written code in one process, sizes of programs, and rates."""

import os

# Small factorisations are slower on several threads, and far slower on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
