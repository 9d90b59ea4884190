"""Orthogonal matching pursuit of many columns against one dictionary: compiled on CPU, batched torch on CUDA."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cospadi.solvers._arrays import Array, array_namespace, is_torch_array
from cospadi.solvers._threads import n_threads
from cospadi.solvers.least_squares import solve_supports

# Columns a task of the compiled kernel works on: enough to amortise its buffers, few enough to balance threads.
_COLUMNS_A_TASK = 16
# What the factors of a batch of columns may take on CUDA.
_FACTOR_BYTES = 4 * 2**30
# Largest correlation left with an atom taken, as a share of the largest at the start.
CHECK = 1e-4


def encode_rows(
    rows: Array,
    atoms: Array,
    n_nonzero_coefs: int,
    *,
    gram: Array | None = None,
    codes_init: Array | None = None,
    batch_columns: int | None = None,
) -> Array:
    """Codes of the rows of `rows` (n, d) over the rows of `atoms` (k, d): (n, k).

    At every step each column takes the atom most correlated with its residual, and all its coefficients are the
    least-squares ones. Atoms that depend on those already taken are passed over; a column whose residual is nil
    stops early. So a column has fewer than `n_nonzero_coefs` nonzeros only if its own span of the
    dictionary has a smaller dimension, or fewer atoms represent it exactly.

    Parameters
    ----------
    rows : array (n, d)
    atoms : array (k, d)
        Of any norm; unit norm is what the greedy rule is meant for.
    n_nonzero_coefs : int
    gram : array (k, k), optional
        ``atoms @ atoms.T``.
    codes_init : array (n, k), optional
        Warm start: a column takes the atoms of its nonzeros first, strongest first.
    batch_columns : int, optional
        Columns handled at once: the factor takes ``batch_columns * s * k`` numbers on CUDA. Default: 4 GiB of them.

    Returns
    -------
    codes : array (n, k)
    """
    gram = atoms @ atoms.T if gram is None else gram
    if batch_columns is None:
        batch_columns = max(1, _FACTOR_BYTES // (rows.dtype.itemsize * n_nonzero_coefs * atoms.shape[0]))
    parts = []
    for begin in range(0, rows.shape[0], batch_columns):
        part = slice(begin, begin + batch_columns)
        warm = None if codes_init is None else codes_init[part]
        parts.append(_encode(rows[part], atoms, gram, n_nonzero_coefs, warm))
    return parts[0] if len(parts) == 1 else array_namespace(rows).concat(parts)


def _encode(rows: Array, atoms: Array, gram: Array, n_nonzero_coefs: int, codes_init: Array | None) -> Array:
    """Codes of one batch; in double precision where single precision did not do."""
    run = _run_torch if is_torch_array(rows) else _run_kernel
    correlations = rows @ atoms.T
    codes, doubtful = run(correlations, gram, n_nonzero_coefs, codes_init)
    if rows.dtype.itemsize == 8:
        return codes
    # What is left must be orthogonal to the atoms taken; where single precision did not get there, or found
    # fewer atoms than asked for, double precision decides.
    xp = array_namespace(rows)
    left = abs(correlations - codes @ gram) * (codes != 0)
    doubtful |= ~(xp.max(left, axis=1) <= CHECK * xp.max(abs(correlations), axis=1))
    (again,) = xp.nonzero(doubtful)
    if again.shape[0]:
        double = xp.astype(atoms, xp.float64)
        warm = None if codes_init is None else codes_init[again]
        exact, _ = run(xp.astype(rows[again], xp.float64) @ double.T, double @ double.T, n_nonzero_coefs, warm)
        codes[again] = xp.astype(exact, codes.dtype)
    return codes


def _run_kernel(
    correlations: np.ndarray, gram: np.ndarray, n_nonzero_coefs: int, codes_init: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes by the compiled kernel, and which columns have fewer atoms than asked for."""
    from cospadi.solvers import _kernels

    n, n_atoms = correlations.shape
    codes = np.zeros((n, n_atoms), correlations.dtype)
    short = np.zeros(n, np.bool_)
    if codes_init is None:
        first, n_first = np.zeros((n, 1), np.int64), np.zeros(n, np.int64)
    else:
        first = np.argsort(-abs(codes_init), axis=1, kind="stable")[:, :n_nonzero_coefs].astype(np.int64)
        n_first = np.minimum((codes_init != 0).sum(1), n_nonzero_coefs).astype(np.int64)
    gram = np.ascontiguousarray(gram)
    correlations = np.ascontiguousarray(correlations)
    integers = np.empty(0, f"i{gram.itemsize}")

    def task(begin: int) -> None:
        end = min(begin + _COLUMNS_A_TASK, n)
        _kernels.omp(gram, correlations, integers, n_nonzero_coefs, first, n_first, codes, short, begin, end)

    begins = range(0, n, _COLUMNS_A_TASK)
    workers = min(n_threads(), len(begins))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(task, begins))
    else:
        for begin in begins:
            task(begin)
    return codes, short


def _run_torch(correlations: Array, gram: Array, n_nonzero_coefs: int, codes_init: Array | None) -> tuple[Array, Array]:
    """The same factorisation for all columns of a batch at once; atoms stay in place, chosen ones are masked."""
    import torch

    n, n_atoms = correlations.shape
    eps = torch.finfo(correlations.dtype).eps
    alpha = correlations.clone()
    scale = alpha.abs().amax(1)
    diagonal = gram.diagonal()
    columns = torch.arange(n, device=gram.device)
    factor = gram.new_zeros((n, n_nonzero_coefs, n_atoms))
    projections = gram.new_zeros((n, n_nonzero_coefs))
    order = torch.zeros((n, n_nonzero_coefs), dtype=torch.int64, device=gram.device)
    chosen = torch.zeros((n, n_nonzero_coefs), dtype=torch.bool, device=gram.device)
    remaining = diagonal.expand(n, n_atoms).clone()
    closed = ~(remaining > 64 * eps * diagonal)
    if codes_init is not None:
        strength = codes_init.abs()
        priority = torch.where(strength > 0, 1 + strength / strength.amax(1, keepdim=True).clamp_min(1e-30), strength)
        # a warm atom must beat every correlation, the strongest first
        priority = priority * 4 * scale[:, None].clamp_min(1e-30)
    for step in range(n_nonzero_coefs):
        merit = alpha.abs()
        if codes_init is not None:
            merit = torch.maximum(merit, priority)
        merit = merit.masked_fill(closed, -1)
        best, pick = merit.max(1)
        live = best > 32 * eps * scale
        if not bool(live.any()):
            break
        weights = factor[:, :step].gather(2, pick[:, None, None].expand(n, step, 1)).squeeze(2)
        direction = gram[pick] - torch.bmm(weights[:, None, :], factor[:, :step]).squeeze(1)
        length = remaining[columns, pick].clamp_min(torch.finfo(gram.dtype).tiny).rsqrt() * live
        direction = direction * length[:, None]
        direction = direction.masked_fill(closed, 0)
        value = alpha[columns, pick] * length
        alpha = alpha - value[:, None] * direction
        remaining = remaining - direction**2
        factor[:, step] = direction
        projections[:, step] = value
        order[:, step] = pick
        chosen[:, step] = live
        closed = closed | ~(remaining > 64 * eps * diagonal)
        closed[columns, pick] = True
    double = gram.double()
    values = solve_supports(double, correlations.double(), order, chosen)
    codes = torch.zeros_like(correlations).scatter_add(1, order, (values * chosen).to(correlations.dtype))
    return codes, chosen.sum(1) < n_nonzero_coefs
