"""What bounds the solvers: the speed of a float32 matrix product, and the operations that are matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def gemm_gflops(size: int = 1024, repeats: int = 5) -> float:
    """Speed of the float32 product on the CPU, with the threads BLAS has, in 1e9 operations a second."""
    a = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    return 2 * size**3 / min(timed(lambda: a @ a)[0] for _ in range(repeats)) / 1e9


def htp_gflop(d: int, n: int, k: int, n_rounds: int, cg_steps: int = 3) -> float:
    """Floating-point operations of the matrix products in the rounds of the default solver, in 1e9."""
    # the step's length, the dropped codes and every conjugate gradient step are products with the Gram
    codes = 2 * k * k * n * (2 + cg_steps) + 2 * d * k * n
    dictionary = 2 * k * k * (d + n) + 4 * d * k * n + k**3 / 3 + 2 * k * k * d
    return n_rounds * (codes + dictionary) / 1e9
