"""One dictionary for matrices with two metrics, both steps as GeoPair (2026) has them.

Codes come from hard-thresholding pursuit in each matrix's own metric. For fixed codes the dictionary solves the
generalised Sylvester equation

    G_1 D S_1 S_1^T + G_2 D S_2 S_2^T = G_1 W_1 S_1^T + G_2 W_2 S_2^T,

in closed form by two generalised eigendecompositions, which only two metrics have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.linalg

from cospadi.arrays import to_numpy
from cospadi.solvers import Solution
from cospadi.solvers._arrays import Array, array_namespace, from_numpy, plus_diagonal, row_dots, spd_solver
from cospadi.solvers._rounds import Rounds, as_rows, initial, unit_rows
from cospadi.solvers._threads import one_blas_thread, over_rows, transposed_product
from cospadi.solvers.htp import largest_eigenvalue, pursue

# of the mean diagonal of a Gram of atoms, or of codes in units of their energy
RIDGE = 1e-6
# Gradient steps a round, of length ``1 / ||D^T G D||``, each with so many conjugate gradient steps on its support
PURSUITS, CG_STEPS = 2, 10


@one_blas_thread
def learn(
    targets: Sequence[Array],
    metrics: Sequence[Array],
    *,
    n_nonzero_coefs: int,
    dictionary_init: Array,
    max_iter: int = 20,
    max_seconds: float | None = None,
    log: Callable[[str], None] | None = None,
) -> Solution:
    """Alternate pursuit of everyone's codes and the exact dictionary under ``sum_l ||L_l (W_l - D S_l)||_F^2``.

    Parameters
    ----------
    targets : sequence of array (d, n_l), float32
        One or two, not whitened.
    metrics : sequence of array (d, d), float64
        ``G_l = L_l^T L_l``, positive definite.
    n_nonzero_coefs : int
    dictionary_init : array (d, k)
    max_iter, max_seconds, log
        As of all `cospadi.solvers`.

    Returns
    -------
    Solution
        ``codes`` is a list, one array (k, n_l) a target.

    Raises
    ------
    ValueError
        If there are more than two targets.
    """
    if len(targets) > 2:
        raise ValueError(f"the equation has a closed form for two metrics, got {len(targets)}")
    n_atoms = dictionary_init.shape[1]
    rounds = Rounds(max_iter, 0.0, log, max_seconds)
    checked = [as_rows(target, n_atoms, n_nonzero_coefs) for target in targets]
    scale = max(scale for _, scale in checked)
    rows = [part * (own / scale) for part, own in checked]
    xp = array_namespace(rows[0])
    mean = sum(float(np.trace(metric)) for metric in metrics) / len(metrics) / len(metrics[0])
    doubles = [to_numpy(metric).astype(np.float64) / mean for metric in metrics]
    metrics = [from_numpy(metric, rows[0]) for metric in doubles]
    basis = _together(*doubles) if len(doubles) == 2 else None
    # W_l^T G_l, which both steps need
    seen = [
        over_rows(lambda piece, metric=metric: piece @ metric, part) for part, metric in zip(rows, metrics, strict=True)
    ]
    norms = [float(xp.sum(xp.astype(row_dots(part, view), xp.float64))) for part, view in zip(rows, seen, strict=True)]
    atoms = unit_rows(initial(dictionary_init, rows[0], tuple(dictionary_init.shape), "dictionary_init"))[0]

    codes: list[Array] = []
    best = None
    for turn in range(max_iter + 1):
        if best is not None and (rounds.settled or rounds.time_spent >= 1):
            break
        if turn:
            atoms = _dictionary(rows, seen, codes, basis)
            atoms, lengths = unit_rows(atoms)
            codes = [code * lengths[None, :] for code in codes]
        left = 0.0
        for index, (metric, view) in enumerate(zip(metrics, seen, strict=True)):
            gram = atoms @ metric @ atoms.T
            gram = plus_diagonal(gram, RIDGE * float(xp.mean(xp.linalg.diagonal(gram))))
            start = codes[index] if turn else None
            found, taken = _pursued(gram, view, atoms, start, n_nonzero_coefs)
            codes = [*codes[:index], found, *codes[index + 1 :]]
            left += norms[index] - taken
        error = (max(left, 0.0) / sum(norms)) ** 0.5 if sum(norms) else 0.0
        if rounds.record(error):
            best = atoms, list(codes)
    atoms, codes = best
    return Solution(
        xp.asarray(atoms.T, copy=True), [xp.asarray(code.T * scale, copy=True) for code in codes], rounds.history
    )


def _pursued(gram: Array, view: Array, atoms: Array, codes: Array | None, n_nonzero_coefs: int) -> tuple[Array, float]:
    """Codes of a matrix after some steps of pursuit, and the squared norm that they take away.

    The first start is the dense solution.
    """
    xp = array_namespace(gram)
    step = 1 / max(largest_eigenvalue(gram), float(xp.finfo(gram.dtype).smallest_normal))
    dense = None if codes is not None else spd_solver(gram)

    def code(piece: Array, *start: Array) -> tuple[Array, Array]:
        wanted = piece @ atoms.T  # D^T G w of every row
        found = start[0] if start else dense(wanted.T).T
        for _ in range(PURSUITS):
            found = pursue(gram, found, wanted - found @ gram, n_nonzero_coefs, step, CG_STEPS)
        return found, 2 * row_dots(found, wanted) - row_dots(found, found @ gram)

    found, taken = over_rows(code, view, *([] if codes is None else [codes]))
    return found, float(xp.sum(xp.astype(taken, xp.float64)))


def _together(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``P`` and ``lambda`` with ``P^T G_1 P = diag(lambda)`` and ``P^T (G_1 + G_2) P = I``, so 0 <= lambda <= 1."""
    values, vectors = scipy.linalg.eigh(first, first + second, check_finite=False)
    return vectors, np.clip(values, 0, 1)


def _dictionary(
    rows: Sequence[Array], seen: Sequence[Array], codes: Sequence[Array], basis: tuple[np.ndarray, np.ndarray] | None
) -> Array:
    """Dictionary of least error for fixed codes, (k, d)."""
    moments = [to_numpy(transposed_product(code, code)).astype(np.float64) for code in codes]
    energy = np.diag(sum(moments))
    scale = np.where(energy > 0, energy, 1) ** -0.5
    moments = [moment * scale[:, None] * scale + RIDGE / len(codes) * np.eye(len(scale)) for moment in moments]
    if basis is None:  # the metric cancels
        right = to_numpy(transposed_product(codes[0], rows[0])).astype(np.float64) * scale[:, None]
        return from_numpy(scipy.linalg.solve(moments[0], right, assume_a="pos") * scale[:, None], rows[0])
    right = sum(
        to_numpy(transposed_product(code, view)).astype(np.float64) for code, view in zip(codes, seen, strict=True)
    )
    return from_numpy(solve_sylvester(basis, moments, right * scale[:, None]) * scale[:, None], rows[0])


def solve_sylvester(
    basis: tuple[np.ndarray, np.ndarray], moments: Sequence[np.ndarray], right: np.ndarray
) -> np.ndarray:
    """``D^T`` of ``G_1 D A_1 + G_2 D A_2 = K``.

    Parameters
    ----------
    basis : (P, lambda)
        ``P^T G_1 P = diag(lambda)``, ``P^T (G_1 + G_2) P = I``.
    moments : two of ndarray (k, k)
        ``A_1``, ``A_2``, with a positive definite sum.
    right : ndarray (k, d)
        ``K^T``.

    Returns
    -------
    ndarray (k, d)
        Directions that one metric alone sees, of atoms that only the other's matrix uses, are zero: nothing tells them.
    """
    (p, lambdas), (q, sigmas) = basis, _together(*moments)
    weights = np.outer(sigmas, lambdas) + np.outer(1 - sigmas, 1 - lambdas)
    known = weights > np.finfo(np.float64).eps * len(p)
    projected = np.where(known, q.T @ right @ p, 0) / np.where(known, weights, 1)
    return q @ projected @ p.T
