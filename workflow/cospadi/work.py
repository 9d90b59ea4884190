"""Work: what a job takes, and the machine whose rates turn it into seconds.

Memory and operations follow from shapes and settings alone. How many operations a second a machine does is measured on
it (`machine`), or is that of the one that the estimates were fitted on: `REFERENCE`, one of two virtual cores of an AMD
EPYC Milan (AVX2, no bfloat16), in the demo's run and in `benchmarks/`. What the fit leaves open is what `SLACK` and
`SPARE` are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MEBI = 2**20
# A process with NumPy, SciPy and h5py, and what its first products take; with a tokenizer; with torch and transformers:
# measured
NUMPY, TOKENIZER, TORCH = 100 * MEBI, 145 * MEBI, 435 * MEBI
# numba and LLVM, which come with the first compiled loop: measured
COMPILED = 90 * MEBI

# What a job may take above its estimate before it is killed and submitted again with more
SLACK = 4.0  # of time
SPARE = 1.5  # of memory
START_MINUTES = 5
# A SLURM job is two Snakemake processes before it is the stage's own: measured 123 and 135 MB
JOB_MEMORY = 300 * MEBI
# NumPy's elementwise work stays on one core: assumed, eight threads do the work of five
THREAD_EXPONENT = 0.8

# Kinds of operations: forward passes; float32 products of rows into Grams; the solvers' float32 products; eigenvectors,
# triangular solves and K-SVD; compiled loops, in seconds of the reference
FORWARD, GRAM, PRODUCT, FACTOR, LOOP = "forward", "gram", "product", "factor", "loop"
# of a GPU: forward passes in bfloat16, products in float32
GPU_FORWARD, GPU_PRODUCT = "gpu_forward", "gpu_product"
# bytes read and written; starting Python and importing, in seconds of the reference
READ, START = "read", "start"


@dataclass(frozen=True)
class Machine:
    """What one core, one GPU and the disk of a machine do.

    Attributes
    ----------
    rates : mapping
        Kind to operations (or bytes) a second.
    words : str
        What it is, for a reader.
    """

    rates: Mapping[str, float]
    words: str = ""


# Forward passes 53 G in float32, Grams 120 G, products of the solvers 40 to 48 G, eigenvectors and triangular solves 15
# to 18 G, K-SVD 17 to 20 G. Assumed, not measured: 100 MB/s of a shared file system, and of a GPU of a data centre a
# tenth of what an A100 can do in bfloat16 and a quarter of what it can in float32
REFERENCE = Machine(
    {
        FORWARD: 53e9,
        GRAM: 120e9,
        PRODUCT: 70e9,
        FACTOR: 25e9,
        LOOP: 1.0,
        GPU_FORWARD: 30e12,
        GPU_PRODUCT: 5e12,
        READ: 100e6,
        START: 1.0,
    },
    "one of two cores of an AMD EPYC Milan (AVX2, no bfloat16), a shared file system of 100 MB/s; GPUs are assumed",
)


class Cost(dict[str, float]):
    """Operations by kind; they add up and scale."""

    def __add__(self, other: Mapping[str, float]) -> Cost:
        return Cost({kind: self.get(kind, 0.0) + other.get(kind, 0.0) for kind in {**self, **other}})

    def __mul__(self, factor: float) -> Cost:
        return Cost({kind: count * factor for kind, count in self.items()})

    def seconds(self, machine: Machine = REFERENCE) -> float:
        """Of one core, or one GPU."""
        return sum(count / machine.rates[kind] for kind, count in self.items())


@dataclass(frozen=True)
class Work:
    """What one job does.

    Attributes
    ----------
    memory : float
        Bytes at the peak.
    start : float
        Seconds of the reference that neither threads nor a GPU shorten.
    core, gpu : Cost
        All else, where it is done by cores; where a GPU helps.
    disk : float
        Bytes that it writes.
    passing : float
        Of these, bytes that are gone once others have read them, in a stage whose files stay.
    moved : float
        Bytes that it reads and writes.
    """

    memory: float
    start: float
    core: Cost = field(default_factory=Cost)
    gpu: Cost = field(default_factory=Cost)
    disk: float = 0.0
    moved: float = 0.0
    passing: float = 0.0

    def mem_mb(self, attempt: int = 1) -> int:
        """Memory to ask for, in MiB."""
        return attempt * math.ceil((JOB_MEMORY + SPARE * self.memory) / MEBI)

    def runtime(self, attempt: int = 1, threads: int = 1, gpu: bool = False, machine: Machine = REFERENCE) -> int:
        """Time limit to ask for, in minutes."""
        return attempt * (START_MINUTES + math.ceil(SLACK * self.wall(threads, gpu, machine) / 60))

    def wall(self, threads: int = 1, gpu: bool = False, machine: Machine = REFERENCE) -> float:
        """Expected seconds."""
        done = self.gpu.seconds(machine) if gpu else self.core.seconds(machine) / threads**THREAD_EXPONENT
        return Cost({START: self.start, READ: self.moved}).seconds(machine) + done


def in_all(works: Iterable[Work]) -> tuple[Cost, Cost]:
    """Operations of several works: by cores, and where a GPU helps."""
    works = list(works)
    return sum((work.core for work in works), Cost()), sum((work.gpu for work in works), Cost())
