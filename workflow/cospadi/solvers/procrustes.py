"""COMPOT (arXiv 2602.15200): orthonormal atoms, thresholded codes, both steps in closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cospadi.solvers import Solution
from cospadi.solvers._arrays import Array, leading_rows, orthonormal_rows
from cospadi.solvers._rounds import Rounds, as_rows, finish, initial, total_norm
from cospadi.solvers.starts import nearest_orthonormal, threshold


def learn(
    target: Array,
    *,
    n_atoms: int,
    n_nonzero_coefs: int,
    random_state: int | np.random.Generator = 42,
    dictionary_init: Array | None = None,
    codes_init: Array | None = None,
    max_iter: int = 20,
    tol: float = 0.0,
    log: Callable[[str], None] | None = None,
) -> Solution:
    """Alternate ``S = top-s of D^T target`` and ``D = U V^T`` of the SVD of ``target S^T``.

    Parameters
    ----------
    target : array (d, n), float32 or float64
        Whitened weight.
    n_atoms : int
        At most ``min(d, n)``.
    n_nonzero_coefs : int
    random_state : int or Generator
        Not used: nothing here is random. Part of the signature all solvers share.
    dictionary_init : array (d, n_atoms), optional
        Made orthonormal. Default: leading left singular vectors of the target.
    codes_init : array (n_atoms, n), optional
        Gives the first dictionary (and then `dictionary_init` is not used).
    max_iter : int
        Rounds; the paper's default is 20.
    tol : float
        Stop when a round lowers the relative error by less than this share of it.
    log : callable, optional

    Returns
    -------
    Solution

    Raises
    ------
    ValueError
        If `n_atoms` exceeds ``min(d, n)``: more atoms cannot be orthonormal.
    """
    rows, scale = as_rows(target, n_atoms, n_nonzero_coefs)
    if n_atoms > min(rows.shape):
        raise ValueError(f"orthonormal atoms: n_atoms must be at most min(d, n) = {min(rows.shape)}, got {n_atoms}")
    n, d = rows.shape
    given_dictionary = initial(dictionary_init, rows, (d, n_atoms), "dictionary_init")
    given_codes = initial(codes_init, rows, (n_atoms, n), "codes_init", scale)
    rounds = Rounds(max_iter, tol, log)
    norm = total_norm(rows)

    if given_codes is not None:
        atoms = orthonormal_rows(given_codes.T @ rows)
    elif given_dictionary is not None:
        atoms = orthonormal_rows(given_dictionary)
    else:
        atoms = leading_rows(rows, n_atoms)
    codes = threshold(rows, atoms, n_nonzero_coefs)
    rounds.record(_error(rows, atoms, codes, norm))
    for _ in range(max_iter):
        if rounds.settled:
            break
        new_atoms = nearest_orthonormal(rows, atoms, codes)
        new_codes = threshold(rows, new_atoms, n_nonzero_coefs)
        if rounds.record(_error(rows, new_atoms, new_codes, norm)):
            atoms, codes = new_atoms, new_codes
    return finish(rows, scale, atoms, codes, rounds, polish=False)


def _error(rows: Array, atoms: Array, codes: Array, norm: float) -> float:
    return total_norm(rows - codes @ atoms) / norm if norm else 0.0
