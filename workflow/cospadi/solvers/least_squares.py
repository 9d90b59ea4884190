"""Restricted least squares: the best values of codes on a given support."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from cospadi.solvers._arrays import Array, array_namespace, is_torch_array, row_dots

# Memory of the local Grams that are solved at once.
_BATCH_BYTES = 256 * 2**20


def conjugate_gradients(gram: Array, codes: Array, gradient: Array, mask: Array, n_steps: int) -> Array:
    """Improve codes on their support by a few conjugate gradient steps, all columns at once.

    Minimises ``||y - D c||`` over the masked entries of every row ``c``; exact after as many steps as the support has
    entries, and close after three when it starts near.

    Parameters
    ----------
    gram : array (k, k)
        ``D^T D``.
    codes : array (n, k)
        Start, zero off the support.
    gradient : array (n, k)
        ``D^T (y - D c)`` at the start; only its masked entries are read.
    mask : bool array (n, k)
        Support.
    n_steps : int

    Returns
    -------
    codes : array (n, k)
    """
    xp = array_namespace(gram)
    info = xp.finfo(gram.dtype)
    eps, tiny = float(info.eps), float(info.smallest_normal)
    residual = gradient * mask
    direction = residual
    energy = row_dots(residual, residual)
    for step in range(n_steps):
        image = (direction @ gram) * mask
        # a direction the atoms on the support cancel in carries rounding errors only: such a row stays where it is
        curvature = row_dots(direction, image)
        curved = curvature > 16 * eps * row_dots(direction, direction)
        length = xp.where(curved, energy, xp.zeros_like(energy)) / xp.clip(curvature, tiny, None)
        codes = codes + length[:, None] * direction
        if step == n_steps - 1:
            break
        residual = residual - length[:, None] * image
        previous, energy = energy, row_dots(residual, residual)
        direction = residual + (energy / xp.clip(previous, tiny, None))[:, None] * direction
    return codes


def restricted(rows: Array, atoms: Array, codes: Array) -> Array:
    """Exact least squares on the support of the codes, in double precision.

    Parameters
    ----------
    rows : array (n, d)
        Target, transposed.
    atoms : array (k, d)
    codes : array (n, k)
        Its nonzeros are the support.

    Returns
    -------
    codes : array (n, k)
        Where the atoms of a column depend on each other its codes are returned as they were.
    """
    xp = array_namespace(rows)
    double = xp.astype(atoms, xp.float64)
    gram = double @ double.T
    correlations = xp.astype(rows, xp.float64) @ double.T
    if not is_torch_array(rows):
        return _restricted_numpy(gram, correlations, codes)
    support = codes != 0
    width = int(support.sum(1).max())
    if width == 0:
        return codes
    result = xp.zeros_like(codes)
    step = max(1, _BATCH_BYTES // (8 * width * width))
    for begin in range(0, codes.shape[0], step):
        part = slice(begin, begin + step)
        # a stable sort of "not in the support" lists the support first, in order
        order = (~support[part]).to(rows.dtype).argsort(dim=1, stable=True)[:, :width]
        chosen = support[part].gather(1, order)
        values = solve_supports(gram, correlations[part], order, chosen)
        result[part] = result[part].scatter_add(1, order, (values * chosen).to(codes.dtype))
    return result


def _restricted_numpy(gram: np.ndarray, correlations: np.ndarray, codes: np.ndarray) -> np.ndarray:
    result = codes.copy()
    for column, code in enumerate(codes):
        support = np.flatnonzero(code)
        if support.size == 0:
            continue
        _, values, info = scipy.linalg.lapack.dposv(gram[support[:, None], support], correlations[column, support])
        if info == 0:
            result[column, support] = values
    return result


def solve_supports(gram: Array, correlations: Array, order: Array, chosen: Array) -> Array:
    """Least squares on given supports of many columns at once, torch, double precision.

    Parameters
    ----------
    gram : tensor (k, k)
    correlations : tensor (n, k)
    order : int tensor (n, m)
        Atoms of every column; where not `chosen`, any.
    chosen : bool tensor (n, m)

    Returns
    -------
    values : tensor (n, m)
        In the order of `order`; least-norm where the atoms depend on each other.
    """
    import torch

    local = gram[order[:, :, None], order[:, None, :]] * (chosen[:, :, None] & chosen[:, None, :])
    local = local + torch.diag_embed((~chosen).double())
    rhs = (correlations.gather(1, order) * chosen)[:, :, None]
    factor, info = torch.linalg.cholesky_ex(local)
    values = torch.cholesky_solve(rhs, factor)
    dependent = info > 0
    if bool(dependent.any()):
        values[dependent] = torch.linalg.pinv(local[dependent], hermitian=True) @ rhs[dependent]
    return values.squeeze(2)
