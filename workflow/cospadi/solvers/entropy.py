"""Entropy-coded rounding: one step an input, as fine as its errors cost, numbers along a trellis, errors fed forward.

With ``H = X^T X`` and the upper Cholesky factor U of ``H^-1`` an error e of input i, made up for by the later ones,
costs ``(e / U_ii)^2``. At high rate the bits buy most where that is the same for all inputs: steps in proportion to
U_ii. What the numbers then are worth in bits is left to the coder (`runtime.cospadi_entropy`); one factor of all steps
is searched until the bytes are those asked for.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cospadi.errors import ConfigError
from cospadi.runtime.cospadi_entropy import MOST, OCTAVE, Code, Entropy, steps_near
from cospadi.solvers._compiled import compiled
from cospadi.solvers._threads import one_blas_thread
from cospadi.solvers.sparsegpt import DAMPING, inverse_factor

# Inputs whose errors are fed forward at once
PANEL = 48
# How much nearer to zero a number is worth rounding, in squared steps against the variance: found on real matrices, of
# numbers each for itself and of those that follow a code
SHRINK = {False: 0.083, True: 0.267}
# Bits a weight that the search may leave, eight bytes besides, and passes it may take
NEAR = 0.01
MAX_PASSES = 12
# Of the trellis: what the C source is compiled for
_STATES_IN_C = (1, 8, 256)
_GOLDEN = (math.sqrt(5) - 1) / 2
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
        Says which paths numbers may follow.
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

    uneven = np.zeros(d_in)
    if np.ptp(np.log2(pivots)) < 1 / OCTAVE:  # to which steps are stored: not all are to change at once
        uneven = np.arange(d_in) * _GOLDEN % 1 / OCTAVE

    def attempt(factor: float) -> Found:
        steps = steps_near(2.0 ** (factor + uneven) * pivots)
        codes = np.empty_like(weight)
        codes[order] = _rounded(ordered, upper, pivots, steps, columns, codec.code)
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
    weight: np.ndarray, upper: np.ndarray, pivots: np.ndarray, steps: np.ndarray, columns: np.ndarray, code: Code | None
) -> np.ndarray:
    """Weight (d_in, d_out) rounded row after row, what is left to do for later rows added to them."""
    left = weight.copy()
    errors = np.empty((PANEL, weight.shape[1]), np.float32)
    single = (np.ascontiguousarray(part, np.float32) for part in (upper, steps, columns))
    rows = Rows(*single, np.ascontiguousarray(pivots, np.float64), code)
    library = compiled(SOURCE, "entropy-coded rounding")
    in_c = library is not None and rows.n_states in _STATES_IN_C
    round_panel = functools.partial(_round_compiled, library) if in_c else round_with_numpy
    for first in range(0, len(weight), PANEL):
        last = min(first + PANEL, len(weight))
        round_panel(left, errors, first, last, rows)
        left[last:] -= upper[first:last, last:].T @ errors[: last - first]
    return left


class Rows(NamedTuple):
    """What rounding the rows of a weight (d_in, d_out) asks for: the factor of the inverse Gram (d_in, d_in), steps
    (d_in,), and sizes of the columns (d_out,), all float32; the factor's diagonal, float64; the code whose paths
    numbers follow.
    """

    upper: np.ndarray
    steps: np.ndarray
    columns: np.ndarray
    pivots: np.ndarray
    code: Code | None

    @property
    def n_states(self) -> int:
        return 1 if self.code is None else self.code.n_states

    @property
    def shrink(self) -> float:
        return SHRINK[self.code is not None]


def round_with_numpy(left: np.ndarray, errors: np.ndarray, first: int, last: int, rows: Rows) -> None:
    """The rows from `first` to `last` of what is left (d_in, d_out), in place, each making up for those before it; the
    error of each over its pivot into `errors`: the reference of what the C source does.
    """
    for i in range(first, last):
        step, wanted = rows.steps[i], left[i].copy()
        variance = ((wanted / rows.columns) ** 2).mean(dtype=np.float64) / float(step) ** 2 * rows.columns**2
        values = wanted / step * (variance / (variance + rows.shrink)).astype(np.float32)
        each = np.clip(np.rint(values), -MOST, MOST)
        left[i] = step * (each if rows.code is None else path_with_numpy(values, rows.code))
        errors[i - first] = (wanted - left[i]) / np.float32(rows.pivots[i])
        left[i + 1 : last] -= rows.upper[i, i + 1 : last, None] * errors[i - first]


def path_with_numpy(values: np.ndarray, code: Code) -> np.ndarray:
    """Whole numbers nearest to the values (n,) among the paths of a code, from state 0, by Viterbi: the reference.

    A state is said by the last bits that chose the path, the oldest lowest, so those that come to states ``m`` and
    ``m + n_states / 2`` are ``2 m`` and ``2 m + 1``.
    """
    half, kinds = code.n_states // 2, _kinds_of(code)
    costs = np.full(code.n_states, np.inf)
    costs[0] = 0
    remainders, most = np.arange(4)[:, None], 2 * MOST - 2
    values = np.clip(values.astype(np.float64), -most, most)
    nearest = remainders + 4 * np.rint((values - remainders) / 4)
    nearest += 4 * (nearest < -most) - 4 * (nearest > most)
    distances = (values - nearest) ** 2
    back = np.empty((len(values), code.n_states), np.uint8)
    for j, distance in enumerate(distances.T):
        same, other = distance[kinds], distance[kinds ^ 2]
        ways = costs[::2] + np.concatenate([[same], [other]]), costs[1::2] + np.concatenate([[other], [same]])
        back[j] = (ways[1] < ways[0]).ravel()
        costs = np.minimum(*ways).ravel()
    numbers, state = np.empty(len(values), np.int32), int(costs.argmin())
    for j in range(len(values) - 1, -1, -1):
        newest, m = divmod(state, half)
        numbers[j] = nearest[kinds[m] ^ 2 * (int(back[j, state]) ^ newest), j]
        state = 2 * m + int(back[j, state])
    return numbers


@functools.cache
def _kinds_of(code: Code) -> np.ndarray:
    """Kind of the number by which state ``2 m`` goes to ``m``, int32 (n_states / 2,).

    Bits ``u`` choose a path: lower bits of its kinds are their products with the parity check of the upper ones, and
    the other way round, so that both checks together come to nothing. The newest and the oldest bit change the upper
    bit alone.
    """
    size = code.n_states.bit_length() - 1
    # bit i of a state is u of size - i steps ago, which has coefficient size - i
    lower, upper = (
        [
            sum((check >> size - i & 1) * (state >> i & 1) for i in range(size)) & 1
            for state in range(0, code.n_states, 2)
        ]
        for check in (code.upper, code.lower)
    )
    return np.array(lower, np.int32) + 2 * np.array(upper, np.int32)


def _round_compiled(
    library: ctypes.CDLL, left: np.ndarray, errors: np.ndarray, first: int, last: int, rows: Rows
) -> None:
    kinds = np.zeros(1, np.int32) if rows.code is None else _kinds_of(rows.code)
    values, back = np.empty(left.shape[1], np.float32), np.empty((left.shape[1], max(1, rows.n_states // 2)), np.uint8)
    arrays = (rows.pivots, rows.steps, rows.columns, rows.upper, kinds, left, errors, values, back)
    library.round_rows(
        *(ctypes.c_int64(number) for number in (first, last, *left.shape, rows.n_states, MOST)),
        ctypes.c_double(rows.shrink),
        *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
    )


SOURCE = r"""
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

/* The number of a kind, which is its remainder by 4, that is nearest to a value. */
static inline int32_t nearest(float value, int32_t kind, int32_t most) {
    const float quarter = (value - (float)kind) * .25f;
    const int32_t number = kind + 4 * (int32_t)(quarter + (quarter < 0 ? -.5f : .5f));
    return number > 2 * most - 2 ? number - 4 : number < 2 - 2 * most ? number + 4 : number;
}

/* Viterbi: the path from state 0 that is nearest to n values, which its numbers take the places of.
 *
 * States 2 m and 2 m + 1 come to m and m + half, by numbers of two kinds: kinds[m], and the one two steps from it.
 * Costs are floats above 0, which compare as whole numbers do; their last bit says which state was left, so the least
 * one says it, too. */
static inline __attribute__((always_inline)) void follow(const int states, int64_t n, float *values,
                                                         const int32_t *kinds, int32_t most, uint8_t *back) {
    enum { MOST_STATES = 256 };
    const int half = states / 2;
    float even[MOST_STATES / 2] __attribute__((aligned(64))), odd[MOST_STATES / 2] __attribute__((aligned(64)));
    int32_t cost[MOST_STATES] __attribute__((aligned(64)));
    for (int m = 0; m < half; m++) even[m] = odd[m] = 1e30f; /* out of reach */
    even[0] = 0;
    for (int64_t j = 0; j < n; j++) {
        float d[4];
        for (int kind = 0; kind < 4; kind++) {
            const float e = values[j] - (float)nearest(values[j], kind, most);
            d[kind] = e * e;
        }
        const float d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
        for (int m = 0; m < half; m++) {
            const float low = kinds[m] & 1 ? d1 : d0, high = kinds[m] & 1 ? d3 : d2;
            const float same = kinds[m] & 2 ? high : low, other = kinds[m] & 2 ? low : high;
            const float to_low[2] = {even[m] + same, odd[m] + other}, to_high[2] = {even[m] + other, odd[m] + same};
            int32_t low0, low1, high0, high1;
            memcpy(&low0, to_low, 4);
            memcpy(&low1, to_low + 1, 4);
            memcpy(&high0, to_high, 4);
            memcpy(&high1, to_high + 1, 4);
            low0 &= ~1, high0 &= ~1, low1 |= 1, high1 |= 1;
            cost[m] = low0 < low1 ? low0 : low1;
            cost[m + half] = high0 < high1 ? high0 : high1;
        }
        int32_t first = cost[0];
        for (int s = 0; s < states; s++) first = first < cost[s] ? first : cost[s];
        float least;
        memcpy(&least, &first, 4);
        for (int m = 0; m < half; m++) back[j * half + m] = (uint8_t)((cost[m] & 1) | (cost[m + half] & 1) << 1);
        for (int m = 0; m < half; m++) {
            float e, o;
            memcpy(&e, cost + 2 * m, 4);
            memcpy(&o, cost + 2 * m + 1, 4);
            even[m] = e - least;
            odd[m] = o - least;
        }
    }
    int state = 0;
    for (int s = 1; s < states; s++)
        if ((cost[s] & ~1) < (cost[state] & ~1)) state = s;
    for (int64_t j = n - 1; j >= 0; j--) {
        const int newest = state >= half, m = state & (half - 1), left = back[j * half + m] >> newest & 1;
        values[j] = (float)nearest(values[j], kinds[m] ^ (left ^ newest) << 1, most);
        state = 2 * m + left;
    }
}

/* Rows `first` to `last` of what is left of a weight (d_in, n), each rounded to whole numbers of its step, along the
 * paths of a code of so many states (1: each number for itself), and the later ones making up for it. `upper` is the
 * factor of the inverse Gram (d_in, d_in); `errors` (last - first, n) gets the error of each row over its pivot. */
void round_rows(int64_t first, int64_t last, int64_t d_in, int64_t n, int64_t states, int64_t most, double shrink,
                const double *pivots, const float *steps, const float *columns, const float *upper,
                const int32_t *kinds, float *left, float *errors, float *values, uint8_t *back) {
    for (int64_t i = first; i < last; i++) {
        float *row = left + i * n, *error = errors + (i - first) * n;
        double size = 0;
        for (int64_t j = 0; j < n; j++) size += (double)(row[j] / columns[j]) * (row[j] / columns[j]);
        const float scale = (float)(size / (double)n / ((double)steps[i] * steps[i])), inverse = 1 / steps[i];
        for (int64_t j = 0; j < n; j++) {
            const float variance = scale * columns[j] * columns[j];
            const float value = row[j] * inverse * (variance / (variance + (float)shrink));
            const float end = (float)(2 * most - 2);
            values[j] = value < -end ? -end : value > end ? end : value;
        }
        if (states == 8) follow(8, n, values, kinds, (int32_t)most, back);
        else if (states == 256) follow(256, n, values, kinds, (int32_t)most, back);
        else
            for (int64_t j = 0; j < n; j++) {
                const float number = (float)(int32_t)(values[j] + (values[j] < 0 ? -.5f : .5f));
                values[j] = number < (float)-most ? (float)-most : number > (float)most ? (float)most : number;
            }
        const float pivot = (float)(1 / pivots[i]);
        for (int64_t j = 0; j < n; j++) {
            const float held = values[j] * steps[i];
            error[j] = (row[j] - held) * pivot;
            row[j] = held;
        }
        for (int64_t later = i + 1; later < last; later++) {
            float *to = left + later * n;
            const float share = upper[i * d_in + later];
            for (int64_t j = 0; j < n; j++) to[j] -= share * error[j];
        }
    }
}
"""
