"""Rounding of factors where it costs least: in the metric of the calibration data, the other numbers making up for it.

With dictionary and support fixed a column's codes s solve ``min ||L (w - D s)||``. Rounded one by one to the values
that the file can hold, each to the best one given all others, they stay close to that minimum; codes rounded each for
itself do not, because atoms are far from orthogonal. What an error E of the dictionary costs depends on the codes that
use it: ``tr(E^T G E S S^T)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numba
import numpy as np
import scipy.linalg

from cospadi.files import BFLOAT16
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import blocks_of_atoms, blocks_of_columns, find_scales
from cospadi.gram import squared_norm
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.solvers._threads import n_threads, one_blas_thread
from cospadi.solvers.sparsegpt import DAMPING, inverse_factor

# Sweeps over the codes of a column at most; most columns stand still after four
MAX_SWEEPS = 8
# How often the scales of a column are fitted to the integers that it has, at most
MAX_REFITS = 2
# How often dictionaries are fitted to rounded codes, at most, and what of the squared error that has to bring
MAX_TURNS, LEAST_GAIN = 3, 0.02
# Ridge of least squares, as a share of what each code counts by itself: codes that the data hardly tell apart stay put
RIDGE = 1e-3

# Columns of a task, and entries that all of their moments may have
_COLUMNS_A_TASK, _ENTRIES_A_TASK = 16, 2**22
_PANEL = 48


@one_blas_thread
def round_together(
    weights: Sequence[np.ndarray],
    grams: Sequence[np.ndarray],
    factors: Sequence[Factorization],
    prices: Sequence[np.ndarray],
) -> list[Factorization]:
    """Factors of matrices that share their dictionaries, or of one, as the file will hold them.

    Dictionaries are rounded first, then the codes of every matrix against them. Dictionaries of codes that are integers
    are then fitted to those and rounded anew, as long as that helps: they make up for much of what the codes lost.

    Parameters
    ----------
    weights : sequence of ndarray (d_in, d_out), float32
    grams : sequence of ndarray (d_in, d_in), float64
        Matrices that share a dictionary have it under the mean of them.
    factors : sequence of Factorization
        With the storage that is wanted, in NumPy; mixtures among their parts are rounded to nearest.
    prices : sequence of ndarray (d_out,), float32
        What errors of each column are multiplied by before they count for a dictionary.
    """
    mixed = [[part.quantized() if part.on.mixes else None for part in one.parts] for one in factors]
    # what is left of each matrix for the parts that are rounded here
    targets = [
        weight - sum(part.reconstruct() for part in one if part is not None)
        for weight, one in zip(weights, mixed, strict=True)
    ]
    parts = [[part for part in one.parts if not part.on.mixes] for one in factors]
    gram = grams[0] if all(one is grams[0] for one in grams) else sum(grams) / len(grams)
    scaled = CODECS[parts[0][0].value_codec].scaled
    parts = _with_dictionaries(parts, prices, gram)
    best: list[list[Factorization]] = []
    least = math.inf
    for turn in range(1 + MAX_TURNS):
        parts = [round_codes(*one) for one in zip(parts, targets, grams, strict=True)]
        left = [target - _sum(one) for target, one in zip(targets, parts, strict=True)]
        error = sum(squared_norm(off * price, one) for off, price, one in zip(left, prices, grams, strict=True))
        before, (least, best) = least, min((least, best), (error, parts), key=lambda pair: pair[0])
        alone = all(part.dictionary is None for part in parts[0])
        if alone or not scaled or turn == MAX_TURNS or error > (1 - LEAST_GAIN) * before:
            break
        for index, part in enumerate(parts[0]):
            if part.dictionary is not None:
                change = _fitted_dictionary([one[index].codes for one in parts], left, prices)
                parts = [
                    [*one[:index], replace(one[index], dictionary=part.dictionary + change), *one[index + 1 :]]
                    for one in parts
                ]
                left = [target - _sum(one) for target, one in zip(targets, parts, strict=True)]
        parts = _with_dictionaries(parts, prices, gram)
    done = []
    for one, others, rounded in zip(factors, mixed, best, strict=True):
        chosen = iter(rounded)
        first, *rest = [next(chosen) if other is None else part for part, other in zip(one.parts, others, strict=True)]
        done.append(replace(first, plus=rest, diagnostics=one.diagnostics))
    return done


def _sum(parts: Sequence[Factorization]) -> np.ndarray:
    return sum(part.reconstruct() for part in parts)


def _fitted_dictionary(
    codes: Sequence[np.ndarray], left: Sequence[np.ndarray], prices: Sequence[np.ndarray]
) -> np.ndarray:
    """What a dictionary changes by, float32, to make up for what is left of the matrices with these codes."""
    usage = _usage(codes, prices)
    wanted = sum(off @ (used * price**2).T for used, off, price in zip(codes, left, prices, strict=True))
    diagonal = np.diagonal(usage)
    ridge = RIDGE * diagonal + np.where(diagonal > 0, 0, 1)
    return scipy.linalg.solve(usage + np.diag(ridge), wanted.T.astype(np.float64), assume_a="pos").T.astype(np.float32)


def _usage(codes: Sequence[np.ndarray], prices: Sequence[np.ndarray]) -> np.ndarray:
    """``S S^T`` of the codes of all matrices side by side, float64 (k, k)."""
    weighted = [(one * price).astype(np.float64) for one, price in zip(codes, prices, strict=True)]
    return sum(one @ one.T for one in weighted)


def _with_dictionaries(
    parts: Sequence[Sequence[Factorization]], prices: Sequence[np.ndarray], gram: np.ndarray
) -> list[list[Factorization]]:
    """Parts of matrices that share dictionaries, with those as the file holds them."""
    done = [list(one) for one in parts]
    for index, part in enumerate(parts[0]):
        if part.dictionary is None:
            continue
        if CODECS[part.dictionary_codec].scaled:
            usage = _usage([one[index].codes for one in parts], prices)
            held, scales = round_dictionary(
                part.dictionary, usage, gram, codec=part.dictionary_codec, block_size=part.block_size
            )
        else:
            held, scales = replace(part, dictionary_scales=None).quantized().dictionary, None
        for one in done:
            one[index] = replace(one[index], dictionary=held, dictionary_scales=scales)
    return done


def round_codes(parts: Sequence[Factorization], weight: np.ndarray, gram: np.ndarray) -> list[Factorization]:
    """Parts with codes that their codec holds exactly, for a small ``||L (W - sum of D S)||_F``, ``L^T L = G``.

    Every column is solved on its support, then rounded code after code, those of large moments first, the others making
    up for each error (GPTQ on any support). From there it descends code by code, and again under the scales that fit
    its integers best.

    Parameters
    ----------
    parts : sequence of Factorization
        Of one matrix: NumPy, with dictionaries as the file holds them; of one codec and block size, none a mixture.
        Codes off their masks stay zero.
    weight : ndarray (d_in, d_out), float32
    gram : ndarray (d_in, d_in), float64

    Raises
    ------
    ValueError
        If the codec leaves nothing to decide.
    """
    codec, block_size = CODECS.get(parts[0].value_codec), parts[0].block_size
    if codec is None or not codec.can_be_rounded:
        known = ", ".join(name for name, one in CODECS.items() if one.can_be_rounded)
        raise ValueError(f"codec {parts[0].value_codec!r} has no rounding to decide; known: {known}")
    masks = [part.stored_mask() for part in parts]
    stored = np.ascontiguousarray(np.concatenate(masks).T)  # a row is a column of the matrix, the parts side by side
    moments, correlations = _normal_equations([part.dictionary for part in parts], weight, gram)
    values = np.concatenate([part.codes for part in parts]).T[stored].astype(np.float64)
    atoms, ends = np.nonzero(stored)[1], np.concatenate([[0], np.cumsum(stored.sum(1))])
    # within a column a part's blocks begin anew: as if each were a column of its own
    counts = np.stack([mask.sum(0) for mask in masks], axis=1).ravel()
    blocks = blocks_of_columns(counts, block_size)
    rounded, scales = np.empty(len(values), np.float32), np.zeros(int(blocks.max(initial=-1)) + 1, BFLOAT16)

    def task(first: int, last: int) -> None:
        columns = [
            _solve(moments, correlations[:, j], atoms, values, slice(ends[j], ends[j + 1]))
            for j in range(first, last)
            if ends[j] < ends[j + 1]
        ]
        if not columns:
            return
        here = slice(ends[first], ends[last])
        own = slice(blocks[here][0], blocks[here][-1] + 1)
        if codec.scaled:
            exact = np.concatenate([column.exact for column in columns]).astype(np.float32)
            scales[own] = find_scales(exact, blocks[here] - own.start, codec.name)
        for column in columns:
            at = blocks[column.here]
            one = slice(at[0], at[-1] + 1)
            turn = column.order
            steps = scales[one].astype(np.float64) if codec.scaled else np.zeros(0)
            found = _round_column(
                *(column.exact[turn], column.target[turn], column.moments, column.factor, at[turn] - at[0], steps),
                *(codec.low, codec.high, codec.significant_bits, MAX_SWEEPS, MAX_REFITS),
            )
            rounded[column.here][turn] = found
            scales[one] = steps.astype(BFLOAT16) if codec.scaled else 0

    widest = int(np.diff(ends).max(initial=1))
    size = max(1, min(_COLUMNS_A_TASK, _ENTRIES_A_TASK // max(1, widest**2)))
    edges = [*range(0, len(stored), size), len(stored)]
    with ThreadPoolExecutor(n_threads()) as pool:
        list(pool.map(task, edges[:-1], edges[1:]))
    codes = np.zeros(stored.shape, np.float32)
    codes[stored] = rounded
    rows = np.cumsum([0, *(len(mask) for mask in masks)])
    owner = np.zeros(len(scales), np.int64)  # the part that each block is of
    owner[blocks] = np.repeat(np.tile(np.arange(len(parts)), len(stored)), counts)
    return [
        replace(
            part,
            codes=np.ascontiguousarray(codes[:, rows[i] : rows[i + 1]].T),
            mask=mask if part.on.is_stored else None,
            scales=scales[owner == i] if codec.scaled else None,
        )
        for i, (part, mask) in enumerate(zip(parts, masks, strict=True))
    ]


def _normal_equations(
    dictionaries: Sequence[np.ndarray | None], weight: np.ndarray, gram: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``D^T G D`` (K, K) and ``D^T G W`` (K, d_out) of the dictionaries side by side, None the identity.

    Moments are in float32: rows of them are what takes the time, and with the ridge they are far from singular.
    """
    images = [gram if one is None else gram @ one for one in dictionaries]
    image = images[0] if len(images) == 1 else np.concatenate(images, axis=1)
    moments = [image if one is None else one.T @ image for one in dictionaries]
    joined = moments[0] if len(moments) == 1 else np.concatenate(moments)
    return np.ascontiguousarray(joined, np.float32), image.T @ weight.astype(np.float64)


class _Column(NamedTuple):
    """A column to be rounded: its place among all values, its solution and correlations there (m,); in `order`, from
    the last code that is rounded to the first, moments (m, m) and the lower Cholesky factor of them with the ridge,
    empty where there is none.
    """

    here: slice
    exact: np.ndarray
    target: np.ndarray
    order: np.ndarray
    moments: np.ndarray
    factor: np.ndarray


def _solve(
    moments: np.ndarray, correlations: np.ndarray, atoms: np.ndarray, values: np.ndarray, here: slice
) -> _Column:
    chosen = atoms[here]
    order = np.argsort(np.diagonal(moments)[chosen], kind="stable")
    turn = chosen[order]
    target, exact = correlations[chosen], values[here].copy()
    own, damped = np.empty((2, len(turn), len(turn)), np.float32)
    _gather(moments, turn, 1 + RIDGE, own, damped)
    factor, info = scipy.linalg.lapack.spotrf(damped.T, lower=0, overwrite_a=1)  # Fortran's order: nothing is copied
    if info != 0:  # an input that is never active: its code stays what it was
        return _Column(here, exact, target, order, own, np.zeros((0, 0), np.float32))
    step, _ = scipy.linalg.lapack.spotrs(factor, target[order] - own @ exact[order], lower=0)
    exact[order] += step
    return _Column(here, exact, target, order, own, factor.T)


@numba.njit(cache=True, nogil=True)
def _gather(moments, chosen, ridge, own, damped):
    """Moments of the chosen into `own`, and with the ridge on their diagonal; NumPy takes a sixth of all time more."""
    for i in range(len(chosen)):
        row = moments[chosen[i]]
        for j in range(len(chosen)):
            own[i, j] = damped[i, j] = row[chosen[j]]
        damped[i, i] *= ridge


@numba.njit(cache=True, nogil=True)
def _snap(value: float, step: float, low: int, high: int, bits: int) -> float:
    """Nearest number that the file can hold."""
    if bits == 0:
        return min(max(np.rint(value / step), low), high) * step
    mantissa, exponent = math.frexp(value)
    return math.ldexp(np.rint(math.ldexp(mantissa, bits)), exponent - bits)


@numba.njit(cache=True, nogil=True)
def _round_column(exact, target, moments, factor, blocks, steps, low, high, bits, max_sweeps, max_refits):
    """Codes of one column, float64; `steps` of its blocks are refitted in place."""
    n, scaled = len(exact), len(steps) > 0
    step = np.zeros(n)
    if scaled:
        for i in range(n):
            step[i] = steps[blocks[i]]
    best, owed = np.empty(n), np.zeros(n)
    for i in range(n - 1, -1, -1):
        wanted = exact[i] + (owed[i] / factor[i, i] if len(factor) else 0.0)
        best[i] = _snap(wanted, step[i], low, high, bits)
        if len(factor):
            off = exact[i] - best[i]
            for j in range(i):
                owed[j] += factor[i, j] * off
    least = _descend(best, target, moments, step, low, high, bits, max_sweeps)
    if not scaled:
        return best
    for _ in range(max_refits):
        fitted = _fitted(best, target, moments, blocks, steps)
        codes = np.empty(n)
        for i in range(n):
            codes[i] = np.rint(best[i] / step[i]) * fitted[blocks[i]]
            step[i] = fitted[blocks[i]]
        error = _descend(codes, target, moments, step, low, high, bits, max_sweeps)
        if not error < least + 1e-6 * least:
            break
        best, least = codes, error
        steps[:] = fitted
    return best


@numba.njit(cache=True, nogil=True)
def _times(moments, codes):
    image = np.zeros(len(codes))
    for i in range(len(codes)):
        image += codes[i] * moments[i]  # symmetric
    return image


@numba.njit(cache=True, nogil=True)
def _descend(codes, target, moments, step, low, high, bits, max_sweeps):
    """Move code after code to its best value given the others; the squared error, less that of zeros."""
    left = target - _times(moments, codes)
    for _ in range(max_sweeps):
        moved = False
        for i in range(len(codes)):
            curvature = moments[i, i]
            if curvature > 0:
                new = _snap(codes[i] + left[i] / curvature, step[i], low, high, bits)
                if new != codes[i]:
                    left -= (new - codes[i]) * moments[i]
                    codes[i] = new
                    moved = True
        if not moved:
            break
    return -(codes * (left + target)).sum()


@numba.njit(cache=True, nogil=True)
def _fitted(codes, target, moments, blocks, steps):
    """Scales of the blocks, in bfloat16, of least error where every code stays the integer that it is."""
    n, m = len(codes), len(steps)
    image = np.zeros((m, n))  # of every block's integers
    for i in range(n):
        image[blocks[i]] += codes[i] / steps[blocks[i]] * moments[i]
    normal, wanted = np.zeros((m, m)), np.zeros(m)
    left = target - _times(moments, codes)
    for i in range(n):
        whole = codes[i] / steps[blocks[i]]
        wanted[blocks[i]] += whole * left[i]
        for block in range(m):
            normal[block, blocks[i]] += whole * image[block, i]
    fitted = steps.copy()
    for block in range(m):
        normal[block, block] *= 1 + 1e-9
        if normal[block, block] <= 0:
            normal[block, block] = 1.0
    change = np.linalg.solve(normal, wanted)
    for block in range(m):
        scale = _snap(steps[block] + change[block], 0.0, 0, 0, 8)
        if np.isfinite(scale) and scale != 0:
            fitted[block] = scale
    return fitted


def round_dictionary(
    dictionary: np.ndarray, usage: np.ndarray, gram: np.ndarray, *, codec: str, block_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """A dictionary that its codec holds, each number making up for the errors of those before it in the metric.

    An error E costs ``tr(E^T G E U)`` with ``U = S S^T``; rows make up for rows by G, atoms for atoms by U, so that
    error feedback goes both ways (GPTQ for a Kronecker product).

    Parameters
    ----------
    dictionary : ndarray (d_in, k), float32
    usage : ndarray (k, k), float64
        ``S S^T`` of all codes that use it.
    gram : ndarray (d_in, d_in), float64
    codec : str
        A scaled one without zero points.
    block_size : int or None

    Returns
    -------
    dictionary : ndarray (d_in, k), float32
    scales : ndarray (n_scales,), bfloat16
        Of `formats.values.blocks_of_atoms`.
    """
    chosen = CODECS[codec]
    blocks = blocks_of_atoms(*dictionary.shape, block_size)
    scales = find_scales(dictionary.ravel(), blocks.ravel(), codec)
    steps = scales.astype(np.float32)[blocks]
    nearest = np.clip(np.rint(dictionary / steps), chosen.low, chosen.high) * steps
    rows = np.argsort(-np.diagonal(gram), kind="stable")
    atoms = np.argsort(-np.diagonal(usage), kind="stable")
    by_row = inverse_factor(gram, DAMPING, rows)
    by_atom = inverse_factor(usage, DAMPING, atoms)
    by_row /= np.diagonal(by_row)[:, None]
    by_atom /= np.diagonal(by_atom)[:, None]
    left = np.ascontiguousarray(dictionary[np.ix_(rows, atoms)], np.float64)
    steps = np.ascontiguousarray(steps[np.ix_(rows, atoms)], np.float64)
    errors = np.empty((_PANEL, len(usage)))
    for first in range(0, len(left), _PANEL):
        last = min(first + _PANEL, len(left))
        _round_rows(left, errors, steps, by_row, by_atom, first, last, chosen.low, chosen.high)
        left[last:] -= by_row[first:last, last:].T @ errors[: last - first]
    rounded = np.empty(dictionary.shape, np.float32)
    rounded[np.ix_(rows, atoms)] = left

    def error(candidate: np.ndarray) -> float:
        off = (candidate - dictionary).astype(np.float64)
        return float(np.vdot(gram @ off, off @ usage))

    return (rounded if error(rounded) < error(nearest) else nearest), scales


@numba.njit(cache=True, nogil=True)
def _round_rows(left, errors, steps, by_row, by_atom, first, last, low, high):
    """Round rows in place; `errors` are what rows behind the last have to make up for."""
    k = left.shape[1]
    for i in range(first, last):
        whole = left[i].copy()
        for a in range(k):
            held = _snap(left[i, a], steps[i, a], low, high, 0)
            off = left[i, a] - held
            left[i, a] = held
            for b in range(a + 1, k):
                left[i, b] -= by_atom[a, b] * off
        for a in range(k):
            errors[i - first, a] = whole[a] - left[i, a]
        for later in range(i + 1, last):
            share = by_row[i, later]
            for a in range(k):
                left[later, a] -= share * errors[i - first, a]
