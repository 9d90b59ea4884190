"""What bounds the solvers: the speed of a float32 matrix product, and the operations that are matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cospadi.budget import nbytes_left, sparse_shape


def timed(run: Callable[[], Any], wait: Callable[[], None] = lambda: None) -> tuple[float, Any]:
    """Seconds and result; `wait` is called before and after, until a device is idle."""
    wait()
    started = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - started, result


def shape_at(shape: tuple[int, int], ratio: float) -> tuple[int, int]:
    """k and s at rho = 2 with 16-bit values and a 1-bit mask."""
    found = sparse_shape(*shape, nbytes=nbytes_left([shape], ratio), rho=2.0)
    return found.n_atoms, found.n_nonzero_coefs


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
