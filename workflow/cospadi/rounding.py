"""Rounding of codes where it costs least: in the metric of the calibration data, the other codes making up for it.

With dictionary and support fixed a column's codes s solve ``min ||L (w - D s)||``. Rounded one by one to the values
that the file can hold, each to the best one given all others, they stay close to that minimum; codes rounded each for
itself do not, because atoms are far from orthogonal.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from cospadi.formats.values import blocks_of_columns, find_scales
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.solvers._threads import n_threads

# Sweeps over the codes of a column at most; most columns stand still after four
MAX_SWEEPS = 12

_COLUMNS_A_TASK = 16


def round_codes(
    codes: np.ndarray,
    mask: np.ndarray,
    dictionary: np.ndarray | None,
    weight: np.ndarray,
    gram: np.ndarray,
    *,
    codec: str,
    block_size: int | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes that `codec` holds exactly, chosen by coordinate descent on ``||L (W - D S)||_F``, ``L^T L = G``.

    Every column is descended twice, from its codes as they are and from each rounded for itself, and the better result
    kept: the error is never larger than that of rounding to nearest.

    Parameters
    ----------
    codes : ndarray (k, d_out), float32
        Before rounding.
    mask : ndarray (k, d_out), bool
        Codes that are stored; the others stay zero.
    dictionary : ndarray (d_in, k), float32, or None
        As the file holds it; None is the identity.
    weight : ndarray (d_in, d_out), float32
    gram : ndarray (d_in, d_in)
    codec : str
    block_size : int or None
        Stored values of a column that share a scale, where `codec` has scales.

    Returns
    -------
    codes : ndarray (k, d_out), float32
    scales : ndarray (n_scales,), bfloat16, or None
    """
    metric = gram if dictionary is None else gram @ dictionary
    moments = metric if dictionary is None else dictionary.T @ metric  # (k, k)
    correlations = (metric.T @ weight - moments @ codes).T  # (d_out, k): of what is left with the atoms
    counts = mask.sum(0)
    values = np.ascontiguousarray(codes.T[mask.T], np.float32)
    scales = None
    steps = np.zeros(0, np.float32)
    chosen = CODECS.get(codec)
    if chosen is None or not chosen.can_be_rounded:
        known = ", ".join(name for name, one in CODECS.items() if one.can_be_rounded)
        raise ValueError(f"codec {codec!r} has no rounding to decide; known: {known}")
    if chosen.scaled:
        blocks = blocks_of_columns(counts, block_size)
        scales = find_scales(values, blocks, codec)
        steps = scales.astype(np.float32)[blocks]
    low, high, bits = chosen.low, chosen.high, chosen.significant_bits
    starts = np.concatenate([[0], np.cumsum(counts)])
    atoms = np.nonzero(mask.T)[1]
    moments = np.ascontiguousarray(moments, np.float64)
    correlations = np.ascontiguousarray(correlations, np.float64)

    def descend(first: int) -> None:
        last = min(first + _COLUMNS_A_TASK, codes.shape[1])
        _descend(values, steps, atoms, starts, first, last, moments, correlations, low, high, bits, MAX_SWEEPS)

    with ThreadPoolExecutor(n_threads()) as pool:
        list(pool.map(descend, range(0, codes.shape[1], _COLUMNS_A_TASK)))
    rounded = np.zeros(codes.shape[::-1], np.float32)
    rounded[mask.T] = values
    return np.ascontiguousarray(rounded.T), scales


@numba.njit(cache=True, nogil=True)
def _snap(value: float, step: float, low: int, high: int, bits: int) -> float:
    """Nearest number that the file can hold."""
    if bits == 0:
        return min(max(np.rint(value / step), low), high) * step
    mantissa, exponent = math.frexp(value)
    return math.ldexp(np.rint(math.ldexp(mantissa, bits)), exponent - bits)


@numba.njit(cache=True, nogil=True)
def _sweeps(values, start, steps, atoms, moments, residual, low, high, bits, max_sweeps):
    """Descend one column in place from `start`; its error less that of `values`, which `residual` belongs to."""
    left = residual.copy()
    for i in range(len(values)):
        if start[i] != values[i]:
            left -= (start[i] - values[i]) * moments[atoms[i]]
    for _ in range(max_sweeps):
        moved = False
        for i in range(len(values)):
            atom = atoms[i]
            curvature = moments[atom, atom]
            wanted = start[i] + left[atom] / curvature if curvature > 0 else start[i]
            step = steps[i] if len(steps) else 0.0
            new = np.float32(_snap(wanted, step, low, high, bits))
            if new != start[i]:
                left -= (new - start[i]) * moments[atom]
                start[i] = new
                moved = True
        if not moved:
            break
    error = 0.0
    for i in range(len(values)):
        error -= (start[i] - values[i]) * (residual[atoms[i]] + left[atoms[i]])
    return error


@numba.njit(cache=True, nogil=True)
def _descend(values, steps, atoms, starts, first, last, moments, correlations, low, high, bits, max_sweeps):
    for j in range(first, last):
        here = slice(starts[j], starts[j + 1])
        column = values[here]
        scale = steps[here] if len(steps) else steps
        nearest = column.copy()
        for i in range(len(column)):
            nearest[i] = np.float32(_snap(column[i], scale[i] if len(scale) else 0.0, low, high, bits))
        exact = column.copy()
        from_nearest = _sweeps(
            column, nearest, scale, atoms[here], moments, correlations[j], low, high, bits, max_sweeps
        )
        from_exact = _sweeps(column, exact, scale, atoms[here], moments, correlations[j], low, high, bits, max_sweeps)
        column[:] = exact if from_exact < from_nearest else nearest
