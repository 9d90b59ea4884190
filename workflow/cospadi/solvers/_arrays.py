"""Primitives with two implementations: NumPy/SciPy on CPU, torch tensors on CUDA (or on CPU, in tests).

The alternating solvers are written once over the array namespace; what the array API standard does not
name, or names too slowly, is here. All solvers hold their arrays *transposed*, signals and codes as rows,
so that one column of the problem is one contiguous run of memory:
``Y (n, d) = target.T``, ``C (n, k) = codes.T``, ``D (k, d) = dictionary.T``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
from array_api_compat import array_namespace, device, is_torch_array

from cospadi.arrays import orthonormal_rows, row_blocks
from cospadi.runtime.cospadi_registry import SUPPORTS

Array = Any

__all__ = ["Array", "array_namespace", "is_torch_array"]


def from_numpy(values: np.ndarray, like: Array) -> Array:
    """Copy a NumPy array to the namespace, device and (if floating) dtype of `like`."""
    if not is_torch_array(like):
        return values.astype(like.dtype) if values.dtype.kind == "f" else values
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(device(like))
    return tensor.to(like.dtype) if values.dtype.kind == "f" else tensor


def device_of(like: Array) -> dict[str, Any]:
    """Keyword arguments that make a new array where `like` is: NumPy's functions take none."""
    return {"device": like.device} if is_torch_array(like) else {}


def row_dots(a: Array, b: Array) -> Array:
    """Inner products of the rows of two (n, k) arrays: (n,)."""
    if is_torch_array(a):
        return (a * b).sum(dim=1)
    return np.vecdot(a, b)


def plus_diagonal(matrix: Array, values: Array | float) -> Array:
    """``M + diag(values)``, a new matrix and no other beside it: that of a wide site is gigabytes."""
    found = array_namespace(matrix).asarray(matrix, copy=True)
    diagonal = found.diagonal() if is_torch_array(found) else np.einsum("ii->i", found)
    diagonal += values
    return found


def over_outer(matrix: Array, scale: Array) -> Array:
    """``M / (c c^T)`` of a matrix (d, d) and c (d,), in its own place and dtype."""
    for rows in row_blocks(len(matrix)):
        matrix[rows] /= scale[rows, None] * scale[None, :]
    return matrix


def top_mask(values: Array, count: int) -> Array:
    """Mask of the `count` entries of largest magnitude in every row, exactly `count` of them.

    Ties are broken towards the lower index, so that the result does not depend on the machine.
    """
    n_columns = values.shape[1]
    if count >= n_columns:
        return abs(values) >= 0
    magnitude = abs(values)
    if is_torch_array(values):
        threshold = magnitude.kthvalue(n_columns - count + 1, dim=1, keepdim=True).values
    else:
        threshold = np.partition(magnitude, n_columns - count, axis=1)[:, n_columns - count, None]
    mask = magnitude >= threshold
    excess = mask.sum(1) - count
    if not bool((excess > 0).any()):
        return mask
    rows = excess.nonzero()[0] if not is_torch_array(values) else excess.nonzero()[:, 0]
    above = magnitude[rows] > threshold[rows]
    tied = magnitude[rows] == threshold[rows]
    room = count - above.sum(1)
    mask[rows] = above | (tied & (tied.cumsum(1) <= room[:, None]))
    return mask


def support_mask(values: Array, count: int, support: str) -> Array:
    """Support of codes by magnitude: those that a support with a pattern keeps, else the `count` largest of a row."""
    mask = SUPPORTS[support].project(values)
    return top_mask(values, count) if mask is None else mask


def spd_solver(matrix: Array) -> Callable[[Array], Array]:
    """Factor a symmetric positive definite matrix; returns ``rhs -> matrix^-1 rhs``.

    In double precision where single fails.
    """
    if is_torch_array(matrix):
        import torch

        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return lambda rhs: torch.cholesky_solve(rhs, factor)
        return lambda rhs: torch.linalg.solve(matrix.double(), rhs.double()).to(rhs.dtype)
    try:
        factored = scipy.linalg.cho_factor(matrix, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return lambda rhs: np.linalg.solve(matrix.astype(np.float64), rhs.astype(np.float64)).astype(rhs.dtype)
    return lambda rhs: scipy.linalg.cho_solve(factored, rhs, check_finite=False)


def inverse_spd(matrix: Array, added: Array | float = 0.0, order: np.ndarray | None = None) -> Array:
    """``(M + diag(added))^-1``, symmetric positive definite, with no other array of its size beside it.

    With `order` of the rows and columns of M in that order, in which `added` is too.
    """
    if is_torch_array(matrix):
        import torch

        if order is not None:
            turn = from_numpy(order, matrix)
            matrix = matrix[turn][:, turn]
        return torch.cholesky_inverse(torch.linalg.cholesky(plus_diagonal(matrix, added)))

    def whole() -> np.ndarray:
        """In the order of LAPACK, which works in its place."""
        if order is None:
            found = np.array(matrix, order="F")
        else:
            found = np.empty_like(matrix, order="F")
            for rows in row_blocks(len(found)):
                found[rows] = matrix[order[rows]][:, order]
        diagonal = np.einsum("ii->i", found)
        diagonal += added
        return found

    potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
    factor, info = potrf(whole(), lower=False, clean=True, overwrite_a=True)
    if info:
        return np.linalg.inv(whole().astype(np.float64)).astype(matrix.dtype)
    inverse = potri(factor, lower=False, overwrite_c=True)[0]  # the lower triangle stays zero
    for rows in row_blocks(len(inverse)):
        inverse[rows, : rows.start] = inverse[: rows.start, rows].T
        inverse[rows, rows] += np.triu(inverse[rows, rows], 1).T
    return inverse


def leading_rows(matrix: Array, count: int) -> Array:
    """Leading right singular vectors of an (n, d) matrix as orthonormal rows: (min(count, n, d), d).

    They come from the eigenvectors of the smaller Gram in double precision: several times cheaper than an
    SVD, and as good for a start or a truncation, whose leading directions are well separated from the rounding.
    """
    n, d = matrix.shape
    count = min(count, n, d)
    xp = array_namespace(matrix)
    double = xp.astype(matrix, xp.float64)
    if d <= n:
        return xp.astype(_leading_eigenvectors(double.T @ double, count), matrix.dtype)
    left = _leading_eigenvectors(double @ double.T, count)
    return orthonormal_rows(xp.astype(left @ double, matrix.dtype))


def _leading_eigenvectors(gram: Array, count: int) -> Array:
    """Eigenvectors of the `count` largest eigenvalues, as rows, largest first, their sum not negative."""
    if is_torch_array(gram):
        import torch

        rows = torch.linalg.eigh(gram).eigenvectors[:, -count:].T.flip(0)
        return rows * torch.where(rows.sum(1) < 0, -1.0, 1.0).to(rows.dtype)[:, None]
    size = len(gram)
    vectors = scipy.linalg.eigh(gram, subset_by_index=(size - count, size - 1), check_finite=False)[1]
    rows = np.ascontiguousarray(vectors.T[::-1])
    return rows * np.where(rows.sum(1) < 0, -1.0, 1.0)[:, None]
