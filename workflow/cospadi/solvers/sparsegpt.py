"""SparseGPT (Frantar and Alistarh 2023): inputs leave one after the other, and the later ones make up for each.

With ``H = X^T X`` and the upper Cholesky factor U of ``H^-1``, setting input i of an output to zero costs
``w_i^2 / U_ii^2``, and is made up for best by ``w_j -= w_i U_ij / U_ii`` for all j > i (Eqs. 3 and 4 of the paper).
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from cospadi.solvers._arrays import Array, array_namespace, device_of, from_numpy, inverse_spd, is_torch_array
from cospadi.solvers._threads import in_pieces, one_blas_thread
from cospadi.solvers.entries import best_entries, kept_of

# Inputs whose mask is chosen together, as in the paper's code
BLOCK = 128
# Ridge on the Gram as a share of its mean diagonal, as in the paper's code
DAMPING = 1e-2


@one_blas_thread
def prune(
    weight: Array, gram: Array, n_nonzero: int, *, pattern: str = "matrix", damping: float = DAMPING
) -> tuple[Array, Array]:
    """Zero all but `n_nonzero` entries of a weight, the others making up for them.

    Parameters
    ----------
    weight : array (d_in, d_out), float
    gram : array (d_in, d_in), float64
        ``X^T X``; an input that is never active (zero diagonal) loses its entries first.
    n_nonzero : int
        Entries that stay.
    pattern : str
        Of `entries.PATTERNS`. ``"matrix"`` is the paper's unstructured form: each block of 128 inputs keeps the same
        share of its entries, wherever they are.
    damping : float

    Returns
    -------
    pruned : array (d_in, d_out)
        In the dtype of the weight; computed in float64.
    mask : array (d_in, d_out), bool
    """
    xp = array_namespace(weight)
    left = xp.astype(weight, xp.float64, copy=True)
    d_in, d_out = left.shape
    upper = inverse_factor(gram, damping)
    costs = xp.linalg.diagonal(upper)
    left = xp.where(xp.linalg.diagonal(gram)[:, None] > 0, left, 0.0)
    quota = kept_of(pattern)
    mask = xp.zeros(left.shape, dtype=xp.bool, **device_of(left))
    kept = 0
    # entries that compete are in one block
    block = BLOCK if quota is None else -(-BLOCK // quota[1]) * quota[1]
    for first in range(0, d_in, block):
        last = min(first + block, d_in)
        due = n_nonzero * last // d_in - kept
        if quota is None:
            scores = (left[first:last] / costs[first:last, None]) ** 2
            mask[first:last] = best_entries(scores.T, due, pattern).T
            kept += due
        errors = xp.zeros((last - first, d_out), dtype=left.dtype, **device_of(left))

        def sweep(columns: slice, first: int = first, last: int = last, errors: Array = errors) -> None:
            here = left[first:last, columns]
            for i in range(last - first):
                at = first + i
                if quota is not None and at % quota[1] == 0:
                    scores = (here[i : i + quota[1]] / costs[at : at + quota[1], None]) ** 2
                    mask[at : at + quota[1], columns] = best_entries(scores.T, 0, pattern).T
                error = xp.where(mask[at, columns], 0.0, here[i]) / costs[at]
                here[i:] -= upper[at, at:last, None] * error
                errors[i, columns] = error

        def carry(columns: slice, first: int = first, last: int = last, errors: Array = errors) -> None:
            left[last:, columns] -= upper[first:last, last:].T @ errors[:, columns]

        in_pieces(d_out, sweep)
        in_pieces(d_out, carry)
    left = xp.where(mask, left, 0.0)
    return xp.astype(left, weight.dtype), mask


def inverse_factor(gram: Array, damping: float, order: np.ndarray | None = None) -> Array:
    """Upper Cholesky factor of ``(G + damping mean(diag G) I)^-1``, float64 (d_in, d_in); of inputs in an `order`."""
    xp = array_namespace(gram)
    diagonal = xp.linalg.diagonal(gram)
    if order is not None:
        diagonal = diagonal[from_numpy(order, gram)]
    mean = float(xp.mean(diagonal)) or 1.0
    inverse = inverse_spd(gram, xp.where(diagonal > 0, damping * mean, mean), order)
    if is_torch_array(inverse):
        return xp.linalg.cholesky(inverse).T
    return scipy.linalg.cholesky(inverse, lower=True, overwrite_a=True, check_finite=False).T  # in its place
