"""Trellis-coded rounding: a fixed number of bits a weight, rows along their best paths, errors fed forward.

As in `solvers.gptq` an error of one input is made up for by those that come after. An input is rounded as a whole: the
metric has no terms between outputs, so the numbers of a row are free to follow the path through the trellis that fits
them best (Viterbi). The search is in C; where there is no compiler, NumPy does the same some hundred times slower.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cospadi.runtime.cospadi_trellis import N_STATES, VALUES, Trellis
from cospadi.runtime.cospadi_values import from_upper_bits, upper_bits
from cospadi.solvers._arrays import plus_diagonal
from cospadi.solvers._compiled import compiled
from cospadi.solvers._threads import one_blas_thread
from cospadi.solvers.sparsegpt import DAMPING, inverse_factor

# Inputs whose errors are fed forward at once
PANEL = 48
# Standard deviations that a value of 1 is best: by bits, found on Gaussian numbers
_UNITS = {2: 1.50 / 5573, 3: 1.64 / 5573, 4: 1.76 / 5573}
# Scales are no smaller beside the largest
_SMALLEST = 2.0**-20


class Found(NamedTuple):
    """Codes (d_in, d_out) float32, scales (d_in + d_out,) of rows and columns, as `cospadi_trellis` has them."""

    codes: np.ndarray
    scales: np.ndarray


@one_blas_thread
def quantize(
    weight: np.ndarray,
    gram: np.ndarray,
    codec: Trellis,
    *,
    sweeps: int = 1,
    damping: float = DAMPING,
    log: Callable[[str], None] | None = None,
) -> Found:
    """Codes of a small error in the metric, of as many bits as the codec has.

    Inputs are rounded one after the other, the most active first. Then scales are fitted to the paths, and paths to the
    scales again, each input against what all others leave to it, `sweeps` times.

    Parameters
    ----------
    weight : ndarray (d_in, d_out), float32
    gram : ndarray (d_in, d_in), float64
        ``X^T X``; an input that is never active (zero diagonal) gets numbers next to zero.
    codec : Trellis
    sweeps : int
    damping : float
        Ridge on the Gram, as a share of its mean diagonal.
    """
    diagonal = np.diagonal(gram)
    order = np.argsort(-diagonal, kind="stable")
    metric = gram[np.ix_(order, order)]
    wanted = np.where(diagonal[:, None] > 0, weight, np.float32(0))[order]
    columns = _scales(_spread(wanted))
    upper = inverse_factor(metric, damping)
    follow = _follower(codec.bits)
    rows = np.zeros(len(wanted), np.float32)
    values = _fed_forward(wanted, upper, columns, rows, codec.bits, follow)
    ridge = plus_diagonal(metric, damping * diagonal.mean())
    for sweep in range(sweeps + 1):
        rows, columns = _fitted(wanted, ridge, values, rows, columns)
        if log is not None:
            log(f"iter {sweep} err {_error(wanted, metric, values, rows, columns):.6g}")
        if sweep < sweeps:
            _again(wanted, ridge, values, rows, columns, follow)
    back = np.argsort(order)
    scales = np.concatenate([rows[back], columns])
    return Found(values[back].astype(np.float32) * rows[back, None] * columns, scales)


def _spread(weight: np.ndarray) -> np.ndarray:
    """Size of every column (d_out,) beside rows of very different ones: ``|w_ij|`` is about ``r_i c_j``."""
    squares = weight.astype(np.float64) ** 2
    columns = np.maximum(squares.mean(0), 1e-60)
    for _ in range(3):
        rows = np.maximum((squares / columns).mean(1), 1e-60)
        columns = np.maximum((squares / rows[:, None])[squares.any(1)].mean(0), 1e-60) if squares.any() else columns
    return np.sqrt(columns)


def _scales(sizes: np.ndarray) -> np.ndarray:
    """The bfloat16 numbers next to those (n,), none of them zero."""
    sizes = np.maximum(sizes, _SMALLEST * sizes.max() or 1.0).astype(np.float32)
    return from_upper_bits(upper_bits(sizes, 16, "nearest"), 16)


def _fed_forward(
    wanted: np.ndarray,
    upper: np.ndarray,
    columns: np.ndarray,
    rows: np.ndarray,
    bits: int,
    follow: Callable[..., np.ndarray],
) -> np.ndarray:
    """Values (d_in, d_out), int16, and scales into `rows`: input after input, the later ones making up for each."""
    left, values = wanted.copy(), np.empty(wanted.shape, np.int16)
    pivots, upper = np.diagonal(upper).copy(), upper.astype(np.float32)
    errors = np.empty((PANEL, wanted.shape[1]), np.float32)
    largest = 0.0
    for first in range(0, len(wanted), PANEL):
        last = min(first + PANEL, len(wanted))
        for i in range(first, last):
            size = float(np.sqrt(((left[i].astype(np.float64) / columns) ** 2).mean())) * _UNITS[bits]
            largest = max(largest, size)
            rows[i] = _scales(np.array([size, largest]))[0]
            values[i] = follow(left[i], rows[i] * columns, columns)
            errors[i - first] = (left[i] - values[i] * rows[i] * columns) / np.float32(pivots[i])
            left[i + 1 : last] -= upper[i, i + 1 : last, None] * errors[i - first]
        left[last:] -= upper[first:last, last:].T @ errors[: last - first]
    return values


def _fitted(
    wanted: np.ndarray, metric: np.ndarray, values: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scales of least squares in the metric: of every column for itself, then of all rows together."""
    path = values * rows.astype(np.float64)[:, None]
    image = metric @ path
    along, itself = (wanted * image).sum(0), (path * image).sum(0)
    columns = _scales(np.where(itself > 0, along / np.maximum(itself, 1e-300), 0).clip(0))
    path = values * columns.astype(np.float64)
    product = path @ path.T
    product *= metric
    target = ((metric @ wanted) * path).sum(1)
    dead = np.diagonal(product) <= 0
    product[dead, dead] = 1
    return _scales(np.linalg.solve(product, np.where(dead, 0, target)).clip(0)), columns


def _again(
    wanted: np.ndarray,
    metric: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    follow: Callable[..., np.ndarray],
) -> None:
    """Every row along the path that is best where the others stay as they are, in place."""
    error = wanted - values * rows[:, None] * columns
    metric = (metric / np.diagonal(metric)[:, None]).astype(np.float32)
    for first in range(0, len(wanted), PANEL):
        last = min(first + PANEL, len(wanted))
        pulls = metric[first:last] @ error  # what errors of all others would have each row of the panel be more
        changes = np.zeros((last - first, wanted.shape[1]), np.float32)
        for i in range(first, last):
            pull = pulls[i - first] + metric[i, first:last] @ changes
            before = values[i] * rows[i] * columns
            values[i] = follow(before + pull, rows[i] * columns, columns)
            changes[i - first] = before - values[i] * rows[i] * columns
        error[first:last] += changes


def _error(wanted: np.ndarray, metric: np.ndarray, values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    error = wanted - values * rows.astype(np.float64)[:, None] * columns
    return float(np.sqrt(max(0.0, (error * (metric @ error)).sum() / (wanted * (metric @ wanted)).sum())))


# --- the best path ----------------------------------------------------------------------------------------------------


def _follower(bits: int) -> Callable[..., np.ndarray]:
    """``follow(row, units, weights)``: values (d_out,) of the path whose distance to the row, weighted, is least."""
    library = compiled(SOURCE, "trellis")
    if library is None:
        return functools.partial(follow_with_numpy, bits=bits)
    library.follow.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 5
    library.follow.restype = None
    kinds, halves = 1 << bits, N_STATES >> bits
    # of state ``new << (12 - bits) | middle << bits | low`` at (low, new, middle), as the source has them
    table = np.ascontiguousarray(
        VALUES.astype(np.float32).reshape(kinds, halves >> bits, kinds).transpose(2, 0, 1)
    ).ravel()
    room = np.empty(0, np.uint8)

    def follow(row: np.ndarray, units: np.ndarray, weights: np.ndarray) -> np.ndarray:
        nonlocal room
        if len(room) < len(row) * halves:
            room = np.empty(len(row) * halves, np.uint8)
        row, weights = np.ascontiguousarray(row / units, np.float32), np.ascontiguousarray(weights**2, np.float32)
        states = np.empty(len(row), np.int32)
        library.follow(bits, len(row), *(part.ctypes.data for part in (row, weights, table, room, states)))
        return VALUES[states]

    return follow


def follow_with_numpy(row: np.ndarray, units: np.ndarray, weights: np.ndarray, *, bits: int) -> np.ndarray:
    """The best path, from state 0: the reference of what the C source does."""
    halves = N_STATES >> bits
    costs = np.full(N_STATES, np.inf)
    costs[0] = 0
    back = np.empty((len(row), halves), np.uint8)
    values = VALUES.astype(np.float64)
    for j, (number, weight) in enumerate(zip(row / units, weights.astype(np.float64) ** 2, strict=True)):
        # states that differ in their oldest bits alone come to the same ones
        from_each = costs.reshape(halves, -1)
        back[j] = from_each.argmin(1)
        costs = np.tile(from_each.min(1), 1 << bits) + weight * (number - values) ** 2
    states = np.empty(len(row), np.int64)
    state = int(costs.argmin())
    for j in range(len(row) - 1, -1, -1):
        states[j] = state
        before = state & halves - 1
        state = before << bits | int(back[j, before])
    return VALUES[states]


SOURCE = r"""
#include <stdint.h>
#include <string.h>

enum { STATES = 4096 };

/* Viterbi over a row of n numbers with weights, from state 0: the states of the path of least weighted squares.
 *
 * A state is new << (12 - bits) | middle << bits | low, and the next one has all but `low` of it. Its cost lies at
 * (low, new, middle), so that the least over what is shifted out, `low`, runs along memory, and so do the costs of
 * the states that follow. Costs are floats above 0, which compare as whole numbers do; their last bits say `low`, so
 * the least one says where it is. What that takes from them is a millionth. */
static inline __attribute__((always_inline)) void follow_with(const int bits, int64_t n, const float *row,
                                                              const float *weights, const float *table, uint8_t *back,
                                                              int32_t *states) {
    const int kinds = 1 << bits, halves = STATES >> bits, middles = halves >> bits;
    const int32_t mask = kinds - 1;
    int32_t cost[STATES] __attribute__((aligned(64))), best[STATES / 4] __attribute__((aligned(64)));
    float turned[STATES / 4] __attribute__((aligned(64)));
    for (int s = 0; s < STATES; s++) cost[s] = 0x7e000000; /* out of reach */
    cost[0] = 0;
    for (int64_t j = 0; j < n; j++) {
        memcpy(best, cost, (size_t)halves * sizeof *best);
        for (int low = 1; low < kinds; low++) {
            const int32_t *c = cost + low * halves;
            for (int m = 0; m < halves; m++) best[m] = best[m] < c[m] ? best[m] : c[m];
        }
        int32_t first = best[0];
        float least;
        for (int m = 0; m < halves; m++) first = first < best[m] ? first : best[m];
        for (int m = 0; m < halves; m++) back[j * halves + m] = (uint8_t)(best[m] & mask);
        first &= ~mask;
        memcpy(&least, &first, 4);
        for (int low = 0; low < kinds; low++)
            for (int middle = 0; middle < middles; middle++) {
                const int32_t whole = best[middle << bits | low] & ~mask;
                float f;
                memcpy(&f, &whole, 4);
                turned[low * middles + middle] = f - least;
            }
        const float number = row[j], weight = weights[j];
        for (int low = 0; low < kinds; low++)
            for (int new = 0; new < kinds; new++) {
                const float *v = table + low * halves + new * middles, *t = turned + low * middles;
                int32_t *c = cost + low * halves + new * middles;
                for (int middle = 0; middle < middles; middle++) {
                    const float e = number - v[middle], f = t[middle] + weight * e * e;
                    int32_t whole;
                    memcpy(&whole, &f, 4);
                    c[middle] = (whole & ~mask) | low;
                }
            }
    }
    int at = 0;
    for (int s = 1; s < STATES; s++)
        if (cost[s] < cost[at]) at = s;
    int state = at % halves << bits | at / halves;
    for (int64_t j = n - 1; j >= 0; j--) {
        const int before = state & (halves - 1);
        states[j] = state;
        state = before << bits | back[j * halves + before];
    }
}

void follow(int64_t bits, int64_t n, const float *row, const float *weights, const float *table, uint8_t *back,
            int32_t *states) {
    if (bits == 2) follow_with(2, n, row, weights, table, back, states);
    else if (bits == 3) follow_with(3, n, row, weights, table, back, states);
    else follow_with(4, n, row, weights, table, back, states);
}
"""
