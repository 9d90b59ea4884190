"""Where a solver starts. All functions work on rows: the target transposed, (n, d), atoms as rows, (k, d)."""

from __future__ import annotations

import numpy as np

from cospadi.arrays import orthonormal_rows, to_numpy
from cospadi.solvers._arrays import Array, array_namespace, from_numpy, leading_rows, row_dots, support_mask
from cospadi.solvers._rounds import total_norm, unit_rows
from cospadi.solvers._threads import over_rows, transposed_product

STARTS = ("random", "spectral", "spectral_original", "procrustes")


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


def procrustes(rows: Array, n_atoms: int, n_nonzero_coefs: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Orthonormal dictionary by three thresholding and Procrustes steps from the spectral start (COMPOT).

    Both steps are exact, so the error falls in every round. Atoms beyond ``min(n, d)`` come from :func:`extend`.

    Returns
    -------
    dictionary : array (n_atoms, d)
    codes : array (n, n_atoms)
        ``n_nonzero_coefs`` nonzeros a row.
    """
    dictionary = leading_rows(rows, n_atoms)
    codes = threshold(rows, dictionary, n_nonzero_coefs)
    for _ in range(3):
        dictionary = nearest_orthonormal(rows, dictionary, codes)
        codes = threshold(rows, dictionary, n_nonzero_coefs)
    return extend(rows, dictionary, codes, n_atoms, rng)


def nearest_orthonormal(rows: Array, dictionary: Array, codes: Array) -> Array:
    """Orthonormal dictionary that fits fixed codes best (Procrustes).

    The codes leave atoms that no row uses undetermined; a millionth of the old dictionary decides that they stay.
    """
    return orthonormal_rows(transposed_product(codes, rows) + 1e-6 * total_norm(rows) * dictionary)


def threshold(rows: Array, dictionary: Array, n_nonzero_coefs: int, support: str = "bitmask") -> Array:
    """The largest inner products with the atoms of every row: the exact codes of an orthonormal dictionary."""

    def largest(piece: Array) -> Array:
        codes = piece @ dictionary.T
        return codes * support_mask(codes, n_nonzero_coefs, support)

    return over_rows(largest, rows)


def spread(atoms: Array, codes: Array, among: int) -> tuple[Array, Array]:
    """Order atoms so that every `among` (four) hold one of each quarter by strength of codes: strong ones should not
    compete.
    """
    energy = to_numpy(row_dots(codes.T, codes.T))
    order = np.argsort(-energy, kind="stable").reshape(among, -1).T.ravel()
    order = from_numpy(order, codes)
    return atoms[order], codes[:, order]


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


def dictionary_start(
    name: str,
    target: Array,
    n_atoms: int,
    n_nonzero_coefs: int,
    *,
    weight: np.ndarray,
    factor: np.ndarray,
    random_state: int | np.random.Generator = 42,
) -> Array:
    """First dictionary by the name of a start, for `dictionary_init` of a solver.

    Parameters
    ----------
    name : {"random", "spectral", "spectral_original", "procrustes"}
    target : array (d, n)
        Whitened weight ``L W``.
    n_atoms, n_nonzero_coefs : int
    weight : ndarray (d, n)
        Before whitening.
    factor : ndarray (d, d)
        ``L``.
    random_state : int or Generator

    Returns
    -------
    dictionary : array (d, n_atoms)
    """
    rng = np.random.default_rng(random_state)
    rows = target.T
    if name == "random":
        return random_columns(rows, n_atoms, rng).T
    if name == "spectral_original":
        n_directions = min(n_atoms, *weight.shape)
        first = from_numpy(spectral_original(weight, factor, n_directions), target).T
        return extend(rows, first, threshold(rows, first, min(n_nonzero_coefs, n_directions)), n_atoms, rng)[0].T
    start = {"spectral": spectral, "procrustes": procrustes}[name]
    return start(rows, n_atoms, n_nonzero_coefs, rng)[0].T


def warm_start(
    target: Array, dictionary: Array, codes: Array, n_atoms: int, *, random_state: int | np.random.Generator = 42
) -> tuple[Array, Array]:
    """Start from factors of the same matrix with more or fewer atoms.

    Too many: those of greatest energy stay. Too few: :func:`extend` adds to them.

    Parameters
    ----------
    target : array (d, n)
    dictionary : array (d, k)
        In the space of the target; of any norm.
    codes : array (k, n)
    n_atoms : int

    Returns
    -------
    dictionary : array (d, n_atoms)
    codes : array (n_atoms, n)
    """
    atoms, norms = unit_rows(dictionary.T)
    rows = codes.T * norms[None, :]
    if n_atoms <= atoms.shape[0]:
        energy = to_numpy(row_dots(rows.T, rows.T))
        kept = from_numpy(np.sort(np.argsort(-energy, kind="stable")[:n_atoms]), atoms)
        return atoms[kept].T, rows[:, kept].T
    atoms, rows = extend(target.T, atoms, rows, n_atoms, np.random.default_rng(random_state))
    return atoms.T, rows.T
