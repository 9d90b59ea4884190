"""Threads of the CPU solvers.

BLAS adds up in another order when it has more threads; a sum that rounds differently moves a support, and the error of
the result with it. So BLAS keeps to one thread here, and the work is cut into pieces whose size is fixed: threads take
pieces, and the result has the same bytes whatever their number. Pieces also fit into the cache, which makes a single
thread faster.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import threadpoolctl

from cospadi.solvers._arrays import Array, is_torch_array

# Signals, or atoms, a piece has.
PIECE = 256


def n_threads() -> int:
    """Threads the solvers use: ``OMP_NUM_THREADS``, else the cores this process may run on."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0))
    return min(cores, int(limit)) if limit.isdigit() and int(limit) > 0 else cores


def one_blas_thread(solve: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a solver: BLAS has one thread while it runs, because the solver has its own."""

    @functools.wraps(solve)
    def limited(*args: Any, **kwargs: Any) -> Any:
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            return solve(*args, **kwargs)

    return limited


def over_rows(function: Callable[..., Any], *arrays: Array) -> Any:
    """``function(*arrays)`` for a function that treats every row alike, a piece of the rows at a time.

    Parameters
    ----------
    function : callable
        Takes the same rows of every array, returns an array of as many rows, or a tuple of such.
    *arrays : array (n, ...)
        NumPy, cut into pieces; torch tensors are handed over whole.

    Returns
    -------
    array or tuple of array
    """
    if is_torch_array(arrays[0]):
        return function(*arrays)
    parts = in_pieces(len(arrays[0]), lambda piece: function(*(array[piece] for array in arrays)))
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], tuple):
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
    return np.concatenate(parts)


def transposed_product(a: Array, b: Array) -> Array:
    """``a^T b`` of (n, k) and (n, m): (k, m), a piece of the columns of `a` at a time."""
    if is_torch_array(a):
        return a.T @ b
    return np.concatenate(in_pieces(a.shape[1], lambda piece: a[:, piece].T @ b))


def in_pieces(count: int, function: Callable[[slice], Any]) -> list[Any]:
    """Results of `function` for slices that cover ``range(count)``, in order; threads share them."""
    pieces = [slice(begin, begin + PIECE) for begin in range(0, count, PIECE)]
    workers = min(n_threads(), len(pieces))
    if workers < 2:
        return [function(piece) for piece in pieces]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, pieces))
