"""One pass from a basis to sparse codes and their dictionary, without iterations (ROCKET, arXiv 2602.11008).

The basis are the leading eigenvectors of the whitened weight, the codes its products with them. The least important
codes go, and the dictionary is then the ridge solution for those that stay.
"""

from __future__ import annotations

import math

from cospadi.solvers._arrays import Array, array_namespace, leading_rows, plus_diagonal, spd_solver, top_mask
from cospadi.solvers._threads import one_blas_thread, over_rows, transposed_product
from cospadi.solvers.entries import best_entries


@one_blas_thread
def analysis(target: Array, n_atoms: int) -> tuple[Array, Array]:
    """Basis and codes of a whitened weight.

    Parameters
    ----------
    target : array (d, n), float
    n_atoms : int
        At most ``min(d, n)``.

    Returns
    -------
    basis : array (d, n_atoms)
        Orthonormal, the strongest direction first.
    codes : array (n, n_atoms)
        ``target.T @ basis``: a row a column of the weight.
    """
    rows = target.T
    atoms = leading_rows(rows, n_atoms)
    return atoms.T, over_rows(lambda piece: piece @ atoms.T, rows)


def important(importance: Array, n_nonzero_coefs: int, over_sparsify: float) -> Array:
    """Codes that stay: by column, with a share that goes to the most important of the whole matrix instead.

    Parameters
    ----------
    importance : array (n, k)
        Not negative; a row a column of the weight.
    n_nonzero_coefs : int
        s, the mean over columns.
    over_sparsify : float
        Share of s, rounded up, that every column gives away first; at least one code a column stays.

    Returns
    -------
    array (n, k), bool
        ``n s`` in all.
    """
    n, k = importance.shape
    if n_nonzero_coefs >= k:
        return importance >= 0
    own = max(1, n_nonzero_coefs - math.ceil(over_sparsify * n_nonzero_coefs))
    mask = over_rows(lambda piece: top_mask(piece, own), importance)
    return mask | best_entries(importance * ~mask, n * (n_nonzero_coefs - own)) if own < n_nonzero_coefs else mask


@one_blas_thread
def ridge_dictionary(weight: Array, codes: Array, ridge: float) -> tuple[Array, float]:
    """``min ||L (W - D S)||^2 + mu ||L D||^2`` for fixed codes: ``D = W S^T (S S^T + mu I)^{-1}`` in any metric.

    Parameters
    ----------
    weight : array (d, n)
        Not whitened.
    codes : array (n, k)
        ``S^T``.
    ridge : float
        ``mu`` over the mean energy of an atom's codes, ``tr(S S^T) / k``.

    Returns
    -------
    dictionary : array (d, k)
    relative_error : float
        ``||W - D S||_F / ||W||_F``, not whitened.
    """
    xp = array_namespace(codes)
    moments = transposed_product(codes, codes)
    mu = ridge * float(xp.mean(xp.linalg.diagonal(moments)))
    products = transposed_product(codes, weight.T)  # (k, d)
    scaled = plus_diagonal(moments, mu)
    dictionary = spd_solver(scaled)(products)
    # tr(W^T D S) - mu ||D||^2 is what the product takes away from ||W||^2, by the normal equations
    size = float(xp.sum(xp.astype(weight, xp.float64) ** 2))
    taken = float(xp.sum(xp.astype(dictionary, xp.float64) * xp.astype(products, xp.float64)))
    left = size - taken - mu * float(xp.sum(xp.astype(dictionary, xp.float64) ** 2))
    return dictionary.T, math.sqrt(max(0.0, left) / size) if size else 0.0
