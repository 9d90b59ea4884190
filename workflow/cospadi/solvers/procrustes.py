"""COMPOT (arXiv 2602.15200): orthonormal atoms, thresholded codes, both steps in closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cospadi.arrays import orthonormal_rows
from cospadi.runtime.cospadi_registry import SUPPORTS
from cospadi.solvers import Solution
from cospadi.solvers._arrays import Array, leading_rows
from cospadi.solvers._rounds import Rounds, as_rows, check_support, finish, initial, total_norm
from cospadi.solvers._threads import one_blas_thread, over_rows, transposed_product
from cospadi.solvers.starts import nearest_orthonormal, spread, threshold


@one_blas_thread
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
    max_seconds: float | None = None,
    log: Callable[[str], None] | None = None,
    support: str = "bitmask",
) -> Solution:
    """Alternate ``S = top-s of D^T target`` and ``D = U V^T`` of the SVD of ``target S^T``.

    20 rounds are the paper's default. Nothing here is random.

    Parameters
    ----------
    target, n_atoms, n_nonzero_coefs, random_state, max_iter, tol, max_seconds, log, support
        As of all `cospadi.solvers`; at most ``min(d, n)`` atoms.
    dictionary_init : array (d, n_atoms), optional
        Made orthonormal. Default: leading left singular vectors of the target.
    codes_init : array (n_atoms, n), optional
        Gives the first dictionary (and then `dictionary_init` is not used).

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
    check_support(support, n_atoms, n_nonzero_coefs)
    rounds = Rounds(max_iter, tol, log, max_seconds)
    norm = total_norm(rows)

    if given_codes is not None:
        atoms = orthonormal_rows(transposed_product(given_codes, rows))
    elif given_dictionary is not None:
        atoms = orthonormal_rows(given_dictionary)
    else:
        atoms = leading_rows(rows, n_atoms)
        if SUPPORTS[support].pattern is not None:
            atoms, _ = spread(atoms, rows @ atoms.T, SUPPORTS[support].pattern[1])
    codes = threshold(rows, atoms, n_nonzero_coefs, support)
    rounds.record(_error(rows, atoms, codes, norm))
    for _ in range(max_iter):
        if rounds.settled or rounds.time_spent >= 1:
            break
        new_atoms = nearest_orthonormal(rows, atoms, codes)
        new_codes = threshold(rows, new_atoms, n_nonzero_coefs, support)
        if rounds.record(_error(rows, new_atoms, new_codes, norm)):
            atoms, codes = new_atoms, new_codes
    return finish(rows, scale, atoms, codes, rounds, polish=False)


def _error(rows: Array, atoms: Array, codes: Array, norm: float) -> float:
    return total_norm(over_rows(lambda y, c: y - c @ atoms, rows, codes)) / norm if norm else 0.0
