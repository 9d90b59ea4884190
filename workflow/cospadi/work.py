"""Work: what a job takes of a machine, and the measured rates that estimates are made of.

Rates and constants are fitted to the benchmark files of the demo run (SmolLM2-135M, 64 windows of 512 tokens, one or
two virtual cores of an AMD EPYC with AVX-512) and to `benchmarks/`; what that fit leaves open, other processors and
larger models, is what `SLACK` and `SPARE` are for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEBI = 2**20

# What a job may take above its estimate before it is killed and submitted again with more
SLACK = 4.0  # of time
SPARE = 1.5  # of memory
START_MINUTES = 5
# A SLURM job is two Snakemake processes before it is the stage's own: measured 123 and 135 MB
JOB_MEMORY = 300 * MEBI

# Operations a second of one core. Measured in the demo: forward passes 35 G in bfloat16 on AVX-512, 53 G in float32 on
# AVX2 (AMD EPYC Milan), Grams 120 G, the products of htp 43 to 48 G, eigenvectors and triangular solves of svd_llm 15
# to 18 G; K-SVD 17 to 20 G (benchmarks/README.md).
FORWARD = 30e9
GRAM = 80e9
PRODUCT = 40e9
FACTOR = 15e9
KSVD = 15e9
READ = 100e6  # bytes a second of a slow shared file system
# NumPy's elementwise work stays on one core: assumed, eight threads do the work of five
THREAD_EXPONENT = 0.8
# Operations a second of one GPU of a data centre. Assumed, not measured: a tenth of what an A100 can do in bfloat16,
# and a quarter of what it can in float32
GPU_FORWARD = 30e12
GPU_PRODUCT = 5e12
# documents of a task of lm-eval, with four answers and 120 tokens each: the mean of the paper's
TASK_TOKENS = 4 * 120
TASK_DOCUMENTS = 3500


@dataclass(frozen=True)
class Work:
    """What one job does: bytes at the peak of memory, seconds that neither threads nor a GPU shorten (start, reading,
    writing), seconds of one core for the rest or of one GPU, bytes it writes.
    """

    memory: float
    fixed: float
    core: float = 0.0
    gpu: float = 0.0
    disk: float = 0.0

    def mem_mb(self, attempt: int = 1) -> int:
        """Memory to ask for, in MiB."""
        return attempt * math.ceil((JOB_MEMORY + SPARE * self.memory) / MEBI)

    def runtime(self, attempt: int = 1, threads: int = 1, gpu: bool = False) -> int:
        """Time limit to ask for, in minutes."""
        return attempt * (START_MINUTES + math.ceil(SLACK * self.wall(threads, gpu) / 60))

    def wall(self, threads: int = 1, gpu: bool = False) -> float:
        """Expected seconds."""
        return self.fixed + (self.gpu if gpu else self.core / threads**THREAD_EXPONENT)
