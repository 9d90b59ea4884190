"""GPTQ (Frantar et al., ICLR 2023): inputs are rounded one after the other, and the later ones make up for each.

With ``H = X^T X`` and the upper Cholesky factor U of ``H^-1``, rounding input i of an output leaves an error of
``(w_i - q_i) / U_ii``, which is made up for best by ``w_j -= U_ij (w_i - q_i) / U_ii`` for all j > i.
"""

from __future__ import annotations

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.formats.values import blocks_of_columns, find_scales
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.solvers._arrays import Array, array_namespace, device_of, from_numpy
from cospadi.solvers._threads import in_pieces, one_blas_thread
from cospadi.solvers.sparsegpt import BLOCK, DAMPING, inverse_factor


@one_blas_thread
def quantize(
    weight: Array, gram: Array, *, codec: str, block_size: int | None, damping: float = DAMPING, act_order: bool = False
) -> tuple[Array, np.ndarray]:
    """Round a weight to the integers of a codec, the inputs that are not rounded yet making up for each error.

    Parameters
    ----------
    weight : array (d_in, d_out), float32
    gram : array (d_in, d_in), float64
        ``X^T X``; an input that is never active (zero diagonal) becomes zero.
    codec : str
        A scaled one of `cospadi_registry.CODECS`.
    block_size : int or None
        Inputs in a row that share a scale, in each output; None, all.
    damping : float
        Ridge on the Gram, as a share of its mean diagonal.
    act_order : bool
        Inputs of large diagonal first. Scales are then found before any is rounded, else when their first input's turn
        comes, of what it was made by the ones before.

    Returns
    -------
    rounded : array (d_in, d_out)
        In the dtype of the weight; computed in float64.
    scales : ndarray
        As `formats.values.find_scales` gives them, of the columns one after the other.
    """
    xp, chosen = array_namespace(weight), CODECS[codec]
    left = xp.astype(weight, xp.float64, copy=True)
    d_in, d_out = left.shape
    diagonal = xp.linalg.diagonal(gram)
    left = xp.where(diagonal[:, None] > 0, left, 0.0)
    size = min(block_size or d_in, d_in)
    order = np.arange(d_in)
    if act_order:
        order = np.argsort(-to_numpy(diagonal), kind="stable")
        left = left[from_numpy(order, left)]
    upper = inverse_factor(gram, damping, order if act_order else None)
    pivots = [float(pivot) for pivot in to_numpy(xp.linalg.diagonal(upper))]

    # of each block: (n_blocks, d_out), rows of scales and of zero points
    steps, zeros = (xp.zeros((-(-d_in // size), d_out), dtype=left.dtype, **device_of(left)) for _ in range(2))

    def settle(block: int, rows: Array) -> None:
        found = _scales_of(rows, codec)
        steps[block], zeros[block] = from_numpy(found[0], left), from_numpy(found[1], left)

    static = act_order or size == d_in
    if static:
        for block in range(len(steps)):
            settle(block, weight[block * size : (block + 1) * size])
    # blocks begin where all rows of theirs have been made up for
    batch = BLOCK if static else max(size, BLOCK // size * size)
    for first in range(0, d_in, batch):
        last = min(first + batch, d_in)
        errors = xp.zeros((last - first, d_out), dtype=left.dtype, **device_of(left))

        def sweep(columns: slice, begin: int, end: int, first: int = first, last: int = last, errors: Array = errors):
            here = left[first:last, columns]
            for i in range(begin - first, end - first):
                at = first + i
                block = order[at] // size
                step, zero = steps[block, columns], zeros[block, columns]
                whole = xp.clip(xp.round(here[i] / step) + zero, chosen.low, chosen.high) - zero
                error = (here[i] - whole * step) / pivots[at]
                here[i] = whole * step
                here[i + 1 :] -= upper[at, at + 1 : last, None] * error
                errors[i, columns] = error

        def carry(columns: slice, first: int = first, last: int = last, errors: Array = errors) -> None:
            left[last:, columns] -= upper[first:last, last:].T @ errors[:, columns]

        for begin in range(first, last, last - first if static else size):
            end = last if static else min(begin + size, last)
            if not static:
                settle(begin // size, left[begin:end])
            in_pieces(d_out, lambda columns, begin=begin, end=end, sweep=sweep: sweep(columns, begin, end))
        in_pieces(d_out, carry)
    if act_order:
        left = left[from_numpy(np.argsort(order), left)]
    scales = np.stack([to_numpy(part).T.ravel() for part in (steps, zeros)]).astype(np.float32)
    return xp.astype(left, weight.dtype), scales if chosen.shifted else scales[0]


def _scales_of(rows: Array, codec: str) -> np.ndarray:
    """Scales and zero points, (2, d_out), of rows (n, d_out) that are one block in every column."""
    values = np.ascontiguousarray(to_numpy(rows).T, np.float32)
    found = find_scales(values.ravel(), blocks_of_columns(np.full(len(values), values.shape[1]), None), codec)
    return np.asarray(found, np.float32) if found.ndim == 2 else np.stack([found.astype(np.float32)] * 2) * [[1], [0]]
