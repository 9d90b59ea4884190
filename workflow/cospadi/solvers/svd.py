"""Truncated singular value decomposition of a whitened weight: the factors of SVD-LLM and Basis Sharing."""

from __future__ import annotations

import numpy as np

from cospadi.solvers import Solution
from cospadi.solvers._arrays import Array, array_namespace, leading_rows
from cospadi.solvers._rounds import Rounds, as_rows, total_norm


def squares_left(target: np.ndarray) -> np.ndarray:
    """Squared error of the best approximation of every rank, 0 to full: the squares of the singular values left out.

    Parameters
    ----------
    target : ndarray (d, n), float
        Whitened weight.

    Returns
    -------
    ndarray (min(d, n) + 1,) float64
    """
    tall = target if target.shape[0] >= target.shape[1] else target.T
    tall = tall.astype(np.float64)
    squares = np.maximum(np.linalg.eigvalsh(tall.T @ tall), 0)  # the smallest first
    return np.append(np.cumsum(squares)[::-1], 0.0)


def truncated(target: Array, rank: int) -> Solution:
    """Best approximation of `target` of a given rank, as a dictionary with dense codes.

    Parameters
    ----------
    target : array (d, n), float
        Whitened weight ``L W``.
    rank : int
        1 to ``min(d, n)``.

    Returns
    -------
    Solution
        ``dictionary (d, rank)``, the left singular vectors, orthonormal; ``codes = dictionary.T @ target``, dense.

    Raises
    ------
    ValueError
        If the rank is out of range.
    """
    rows, scale = as_rows(target, rank, 1)
    if rank > min(rows.shape):
        raise ValueError(f"rank must be at most min(d, n) = {min(rows.shape)}, got {rank}")
    rounds = Rounds(0, 0.0, None)
    atoms = leading_rows(rows, rank)
    codes = rows @ atoms.T
    norm = total_norm(rows)
    rounds.record(total_norm(rows - codes @ atoms) / norm if norm else 0.0)
    xp = array_namespace(rows)
    return Solution(xp.asarray(atoms.T, copy=True), xp.asarray(codes.T * scale, copy=True), rounds.history)
