"""Where a solver starts. All functions work on rows: the target transposed, (n, d), atoms as rows, (k, d)."""

from __future__ import annotations

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.solvers._arrays import (
    Array,
    array_namespace,
    from_numpy,
    leading_rows,
    orthonormal_rows,
    row_dots,
    top_mask,
)
from cospadi.solvers._rounds import total_norm, unit_rows


def random_columns(rows: Array, n_atoms: int, rng: np.random.Generator) -> Array:
    """Distinct random rows of `rows`, scaled to unit norm (the paper's start); Gaussian atoms when there are too few.

    Parameters
    ----------
    rows : array (n, d)
    n_atoms : int
    rng : numpy Generator

    Returns
    -------
    dictionary : array (n_atoms, d)
    """
    xp = array_namespace(rows)
    usable = np.flatnonzero(to_numpy(row_dots(rows, rows)) > 0)
    chosen = rng.permutation(usable)[:n_atoms]
    parts = [rows[from_numpy(chosen, rows)]] if chosen.size else []
    if chosen.size < n_atoms:
        parts.append(from_numpy(rng.standard_normal((n_atoms - chosen.size, rows.shape[1])), rows))
    return unit_rows(xp.concat(parts))[0]


def spectral(rows: Array, n_atoms: int, n_nonzero_coefs: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Leading right singular vectors as atoms, thresholded projections as codes; see :func:`extend` for the rest."""
    dictionary = leading_rows(rows, n_atoms)
    codes = threshold(rows, dictionary, n_nonzero_coefs)
    return extend(rows, dictionary, codes, n_atoms, rng)


def procrustes(
    rows: Array, n_atoms: int, n_nonzero_coefs: int, rng: np.random.Generator, n_rounds: int = 3
) -> tuple[Array, Array]:
    """Orthonormal dictionary by alternating thresholding and Procrustes steps from the spectral start (COMPOT).

    Both steps are exact, so the error falls in every round. Atoms beyond ``min(n, d)`` come from :func:`extend`.

    Returns
    -------
    dictionary : array (n_atoms, d)
    codes : array (n, n_atoms)
        ``n_nonzero_coefs`` nonzeros a row.
    """
    dictionary = leading_rows(rows, n_atoms)
    codes = threshold(rows, dictionary, n_nonzero_coefs)
    for _ in range(n_rounds):
        dictionary = nearest_orthonormal(rows, dictionary, codes)
        codes = threshold(rows, dictionary, n_nonzero_coefs)
    return extend(rows, dictionary, codes, n_atoms, rng)


def nearest_orthonormal(rows: Array, dictionary: Array, codes: Array) -> Array:
    """Orthonormal dictionary that fits fixed codes best (Procrustes).

    The codes leave atoms that no row uses undetermined; a millionth of the old dictionary decides that they stay.
    """
    return orthonormal_rows(codes.T @ rows + 1e-6 * total_norm(rows) * dictionary)


def threshold(rows: Array, dictionary: Array, n_nonzero_coefs: int) -> Array:
    """The largest inner products with the atoms of every row: the exact codes of an orthonormal dictionary."""
    codes = rows @ dictionary.T
    return codes * top_mask(codes, n_nonzero_coefs)


def extend(rows: Array, dictionary: Array, codes: Array, n_atoms: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Add atoms to an undercomplete start: leading directions of its residual, then random residual rows.

    Codes of the new atoms are zero, so the error stays what it is until a coding step uses them.
    """
    missing = n_atoms - dictionary.shape[0]
    if missing == 0:
        return dictionary, codes
    xp = array_namespace(rows)
    residual = rows - codes @ dictionary
    added = leading_rows(residual, missing)
    if added.shape[0] < missing:
        added = xp.concat([added, random_columns(residual, missing - added.shape[0], rng)])
    zeros = xp.zeros((rows.shape[0], missing), dtype=rows.dtype, device=rows.device)
    return xp.concat([dictionary, added]), xp.concat([codes, zeros], axis=1)


def spectral_original(weight: Array, whitening: Array, n_atoms: int) -> Array:
    """Leading left singular vectors of the weight itself, carried into the whitened space (GeoPair).

    Parameters
    ----------
    weight : array (d, n)
        Before whitening.
    whitening : array (d, d)
        ``L`` with ``L^T L`` = Gram.
    n_atoms : int
        At most ``min(d, n)``.

    Returns
    -------
    dictionary : array (d, n_atoms)
        Unit columns, for `dictionary_init` of a solver.
    """
    if n_atoms > min(weight.shape):
        raise ValueError(f"n_atoms must be at most min(d, n) = {min(weight.shape)}, got {n_atoms}")
    return unit_rows(leading_rows(weight.T, n_atoms) @ whitening.T)[0].T


def warm(dictionary: Array, codes: Array, n_atoms: int) -> Array:
    """Start from the dictionary of another ratio of the same matrix: its atoms of greatest energy.

    Parameters
    ----------
    dictionary : array (d, k), unit columns
    codes : array (k, n)
    n_atoms : int
        At most k: start from the lower ratio, which has more atoms.

    Returns
    -------
    dictionary : array (d, n_atoms)
    """
    if n_atoms > dictionary.shape[1]:
        raise ValueError(f"n_atoms must be at most the {dictionary.shape[1]} atoms given, got {n_atoms}")
    energy = to_numpy(row_dots(codes, codes))
    kept = np.sort(np.argsort(-energy, kind="stable")[:n_atoms])
    return dictionary[:, from_numpy(kept, dictionary)]
