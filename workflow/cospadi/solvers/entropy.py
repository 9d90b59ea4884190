"""Entropy-coded rounding: one step an input, as fine as its errors cost, numbers along a trellis, errors fed forward.

With ``H = X^T X`` and the upper Cholesky factor U of ``H^-1`` an error e of input i, made up for by the later ones,
costs ``(e / U_ii)^2``. At high rate the bits buy most where that is the same for all inputs: steps in proportion to
U_ii. What the numbers then are worth in bits is left to the coder (`runtime.cospadi_entropy`); one factor of all steps
is searched until the bytes are those asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

from cospadi.errors import ConfigError
from cospadi.runtime.cospadi_entropy import MOST, Entropy, steps_near
from cospadi.solvers._threads import one_blas_thread
from cospadi.solvers.sparsegpt import DAMPING, inverse_factor

# Inputs whose errors are fed forward at once
PANEL = 48
# How much nearer to zero a number is worth rounding, in squared steps against the variance: found on real matrices
SHRINK = {False: 0.083, True: 0.267}
# Bits a weight that the search may leave, eight bytes besides, and passes it may take
NEAR = 0.01
MAX_PASSES = 12
# Bits that a step twice as long saves: one where there are many of them, fewer where most numbers are zero already.
# Only factors that are far apart say how many
SAVED, FAR_APART = (0.1, 1.0), 0.05


class Found(NamedTuple):
    """Codes (d_in, d_out) float32, whole numbers of the steps (d_in,); their bytes; passes it took."""

    codes: np.ndarray
    steps: np.ndarray
    nbytes: int
    n_passes: int


@one_blas_thread
def quantize(
    weight: np.ndarray,
    gram: np.ndarray,
    codec: Entropy,
    nbytes: int,
    *,
    damping: float = DAMPING,
    log: Callable[[str], None] | None = None,
) -> Found:
    """Codes of least error within `nbytes`, to `NEAR` bits a weight.

    Parameters
    ----------
    weight : ndarray (d_in, d_out), float32
    gram : ndarray (d_in, d_in), float64
        ``X^T X``; an input that is never active (zero diagonal) becomes zero.
    codec : Entropy
        Says whether numbers follow the trellis.
    nbytes : int
        All that is stored, header, tables and scales included.
    damping : float
        Ridge on the Gram, as a share of its mean diagonal.

    Raises
    ------
    ConfigError
        If not even a weight of zeros takes so few bytes.
    """
    d_in = len(weight)
    diagonal = np.diagonal(gram)
    weight = np.where(diagonal[:, None] > 0, weight, np.float32(0))
    order = np.argsort(-diagonal, kind="stable")
    upper = inverse_factor(gram, damping, order)
    pivots = np.diagonal(upper).copy()
    upper = upper.astype(np.float32)
    ordered = np.ascontiguousarray(weight[order])
    columns = _scales_of_columns(ordered)
    bits = 8 * nbytes / weight.size
    logarithms = _logarithms(ordered, pivots, columns)
    live = np.isfinite(logarithms)

    def attempt(factor: float) -> Found:
        steps = steps_near(2.0**factor * pivots)
        codes = np.empty_like(weight)
        codes[order] = _rounded(ordered, upper, pivots, steps, columns, codec.trellis)
        stored = np.empty(d_in, np.float32)
        stored[order] = steps
        return Found(codes, stored, codec.pack_codes(codes, stored).nbytes, 0)

    start = logarithms[live].mean() - bits if live.any() else 0.0
    return search(attempt, weight.shape, nbytes, start, log=log)


def search(
    attempt: Callable[[float], Found],
    shape: tuple[int, int],
    nbytes: int,
    factor: float,
    *,
    log: Callable[[str], None] | None = None,
) -> Found:
    """What takes the most of `nbytes`, to `NEAR` bits a weight, of what ``attempt(factor)`` gives.

    Parameters
    ----------
    attempt : callable
        Whose weights take up to a bit less where the factor, the logarithm of a step, is larger by one.
    shape : (int, int)
        Of the matrix, (d_in, d_out).
    factor : float
        The first one.

    Raises
    ------
    ConfigError
        If nothing that was tried takes so little.
    """
    size = shape[0] * shape[1]
    bits = 8 * nbytes / size
    best, low, high, saved, before = None, -math.inf, math.inf, SAVED[1], None
    for n_passes in range(1, MAX_PASSES + 1):
        found = attempt(factor)
        taken = 8 * found.nbytes / size
        left = bits - taken
        if log is not None:
            log(f"iter {n_passes} bits {taken:.4f} of {bits:.4f}")
        if left >= 0 and (best is None or found.nbytes > best.nbytes):
            best = found
        if 0 <= left <= NEAR + 64 / size:
            break
        # by what the last change saved; between what is too long and what is too short at the latest
        low, high = (low, min(high, factor)) if left > 0 else (max(low, factor), high)
        if before is not None and abs(factor - before[0]) > FAR_APART:
            saved = min(max((before[1] - taken) / (factor - before[0]), SAVED[0]), SAVED[1])
        before = factor, taken
        factor -= (left - NEAR / 3) / saved
        if not low < factor < high:
            factor = (low + high) / 2 if math.isfinite(low + high) else factor
        if high - low < 1e-4:
            break
    if best is None:
        matrix = f"{nbytes} bytes for a {shape[0]}x{shape[1]} matrix"
        raise ConfigError([f"{matrix}: the longest steps of {n_passes} passes take {found.nbytes}"])
    return best._replace(n_passes=n_passes)


def rates(weight: np.ndarray, gram: np.ndarray, *, damping: float = DAMPING) -> np.ndarray:
    """Bits a number of every input (d_in,) where steps are U_ii; steps of ``2^f U_ii`` take f bits less, down to none.

    Of Gaussians of the weight's scales, entropy-coded: what `quantize` starts from. Minus infinity for an input without
    weights.
    """
    diagonal = np.diagonal(gram)
    order = np.argsort(-diagonal, kind="stable")
    pivots = np.diagonal(inverse_factor(gram, damping, order))
    ordered = np.where(diagonal[:, None] > 0, weight, np.float32(0))[order]
    found = np.empty(len(weight))
    found[order] = _logarithms(ordered, pivots, _scales_of_columns(ordered))
    return found


def _scales_of_columns(weight: np.ndarray) -> np.ndarray:
    columns = np.sqrt((weight.astype(np.float64) ** 2).mean(0))
    return np.maximum(columns, 1e-6 * columns.max() or 1.0)


def _logarithms(weight: np.ndarray, pivots: np.ndarray, columns: np.ndarray) -> np.ndarray:
    sizes = np.sqrt(((weight / columns) ** 2).mean(1))
    with np.errstate(divide="ignore"):
        return np.log2(columns).mean() + np.log2(sizes / pivots) + 1.05


def _rounded(
    weight: np.ndarray, upper: np.ndarray, pivots: np.ndarray, steps: np.ndarray, columns: np.ndarray, trellis: bool
) -> np.ndarray:
    """Weight (d_in, d_out) rounded row after row, what is left to do for later rows added to them."""
    left = weight.copy()
    errors = np.empty((PANEL, weight.shape[1]), np.float32)
    columns = columns.astype(np.float32)
    for first in range(0, len(weight), PANEL):
        last = min(first + PANEL, len(weight))
        _round_panel(left, errors, upper, pivots, steps, columns, first, last, trellis, SHRINK[trellis], MOST)
        left[last:] -= upper[first:last, last:].T @ errors[: last - first]
    return left


@numba.njit(cache=True, nogil=True)
def _round_panel(left, errors, upper, pivots, steps, columns, first, last, trellis, shrink, most):
    n = left.shape[1]
    numbers = np.empty(n, np.int32)
    values = np.empty(n, np.float32)
    back = np.empty((n, 8), np.uint8)
    for i in range(first, last):
        size = 0.0
        for j in range(n):
            size += (left[i, j] / columns[j]) ** 2
        scale = size / n / float(steps[i]) ** 2
        inverse = np.float32(1.0 / float(steps[i]))
        for j in range(n):
            variance = scale * columns[j] ** 2
            values[j] = left[i, j] * inverse * np.float32(variance / (variance + shrink)) if variance > 0 else 0.0
        if trellis:
            _follow_trellis(values, numbers, back, most)
        else:
            for j in range(n):
                numbers[j] = min(max(np.rint(values[j]), -most), most)
        pivot = np.float32(1.0 / pivots[i])
        for j in range(n):
            held = numbers[j] * steps[i]
            errors[i - first, j] = (left[i, j] - held) * pivot
            left[i, j] = held
        for later in range(i + 1, last):
            weight = upper[i, later]
            for j in range(n):
                left[later, j] -= weight * errors[i - first, j]


@numba.njit(cache=True, nogil=True)
def _follow_trellis(values, numbers, back, most):
    """Whole numbers nearest to the values (n,) among the paths through the 8 states, from state 0, by Viterbi."""
    n = len(values)
    costs = np.full(8, np.inf, np.float32)
    costs[0] = 0.0
    after = np.empty(8, np.float32)
    nearest = np.empty((n, 4), np.int32)
    distance = np.empty(4, np.float32)
    for j in range(n):
        # the nearest number of every remainder by 4
        for kind in range(4):
            number = kind + 4 * int(np.rint((values[j] - kind) * np.float32(0.25)))
            while number > 2 * most - 2:
                number -= 4
            while number < 2 - 2 * most:
                number += 4
            nearest[j, kind] = number
            distance[kind] = (values[j] - number) ** 2
        for state in range(8):
            # from two states, of one parity, by numbers of different halves
            before = (state & 3) << 1
            odd = before >> 2
            half = (state >> 2) ^ ((before >> 1) & 1)
            even_way = costs[before] + distance[odd + 2 * half]
            odd_way = costs[before + 1] + distance[odd + 2 * (half ^ 1)]
            if odd_way < even_way:
                after[state] = odd_way
                back[j, state] = 1
            else:
                after[state] = even_way
                back[j, state] = 0
        least = after.min()
        for state in range(8):
            costs[state] = after[state] - least
    state = np.argmin(costs)
    for j in range(n - 1, -1, -1):
        before = ((state & 3) << 1) + back[j, state]
        odd = before >> 2
        half = (state >> 2) ^ (before & 1) ^ ((before >> 1) & 1)
        numbers[j] = nearest[j, odd + 2 * half]
        state = before
