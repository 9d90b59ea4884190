"""One dictionary for matrices with a metric each: the exact objective of a group.

The paper learns a group in the metric of its mean Gram. What the model feels is
``sum_l ||X_l (W_l - D S_l)||_F^2``, every matrix under its own inputs. For fixed codes the dictionary solves

    sum_l G_l D S_l S_l^T = sum_l G_l W_l S_l^T,

a linear system without a closed form, found by conjugate gradients; for a fixed dictionary every matrix is a problem of
its own, in its own metric. The rounds start at the solution for the mean metric.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from cospadi.solvers import Solution
from cospadi.solvers._arrays import Array, array_namespace, plus_diagonal, row_dots, spd_solver
from cospadi.solvers._rounds import Rounds, as_rows, generator, initial, redraw, unit_rows
from cospadi.solvers._threads import one_blas_thread
from cospadi.solvers.htp import pursue, steepest_step
from cospadi.solvers.least_squares import conjugate_gradients

# Length of the gradient step in units of steepest descent's; conjugate gradient steps a round, for codes and dictionary
STEP, CG_STEPS, DICTIONARY_STEPS = 1.5, 3, 8


@one_blas_thread
def learn(
    targets: Sequence[Array],
    metrics: Sequence[Array],
    *,
    n_nonzero_coefs: int,
    dictionary_init: Array,
    codes_init: Sequence[Array],
    random_state: int | np.random.Generator = 42,
    max_iter: int = 10,
    tol: float = 1e-4,
    max_seconds: float | None = None,
    log: Callable[[str], None] | None = None,
    support: str = "bitmask",
) -> Solution:
    """Improve a shared dictionary and everyone's codes under ``sum_l ||L_l (W_l - D S_l)||_F^2``.

    Parameters
    ----------
    targets : sequence of array (d, n_l), float32 or float64
        In a space where the mean of the metrics is the identity, or near it: there the start is good, and few
        conjugate gradient steps are enough.
    metrics : sequence of array (d, d)
        ``M_l``, symmetric positive semidefinite, in that space: the error of matrix l is ``tr(E^T M_l E)``.
    n_nonzero_coefs : int
    dictionary_init : array (d, k)
    codes_init : sequence of array (k, n_l)
    random_state, max_iter, tol, max_seconds, log, support
        As of all `cospadi.solvers`; a round is a pursuit step for every matrix, then the dictionary.

    Returns
    -------
    Solution
        ``codes`` is a list, one array (k, n_l) a target.
    """
    rng = generator(random_state)
    rounds = Rounds(max_iter, tol, log, max_seconds)
    n_atoms = dictionary_init.shape[1]
    checked = [as_rows(target, n_atoms, n_nonzero_coefs) for target in targets]
    scale = max(scale for _, scale in checked)
    rows = [part * (own / scale) for part, own in checked]
    xp = array_namespace(rows[0])
    atoms = initial(dictionary_init, rows[0], tuple(dictionary_init.shape), "dictionary_init")
    metrics = [initial(metric, rows[0], tuple(metric.shape), "metrics") for metric in metrics]
    codes = [
        initial(code, part, (n_atoms, part.shape[0]), "codes_init", scale)
        for code, part in zip(codes_init, rows, strict=True)
    ]
    norm = sum(_energy(part, metric) for part, metric in zip(rows, metrics, strict=True)) ** 0.5

    def error_of(atoms: Array, codes: Sequence[Array]) -> float:
        parts = zip(rows, codes, metrics, strict=True)
        return sum(_energy(part - code @ atoms, metric) for part, code, metric in parts) ** 0.5 / norm if norm else 0.0

    rounds.record(error_of(atoms, codes))
    best = atoms, codes
    for _ in range(max_iter):
        if norm == 0 or rounds.settled or rounds.time_spent >= 1:
            break
        residual = xp.concat([part - code @ atoms for part, code in zip(rows, codes, strict=True)])
        edges = np.cumsum([0, *(part.shape[0] for part in rows)]).tolist()
        atoms, joined, n_redrawn = redraw(atoms, xp.concat(codes), residual, rng)
        codes = [joined[first:last] for first, last in itertools.pairwise(edges)]
        for i, (part, metric) in enumerate(zip(rows, metrics, strict=True)):
            seen = metric @ atoms.T
            gram = atoms @ seen
            gradient = (part - codes[i] @ atoms) @ seen
            length = STEP * steepest_step(gram, gradient)
            codes[i] = pursue(gram, codes[i], gradient, n_nonzero_coefs, length, CG_STEPS, support=support)
        atoms = shared_dictionary(rows, codes, metrics, atoms, DICTIONARY_STEPS)
        atoms, norms = unit_rows(atoms)
        codes = [code * norms[None, :] for code in codes]
        if rounds.record(error_of(atoms, codes), n_redrawn=n_redrawn):
            best = atoms, list(codes)
    atoms, codes = best
    for i, (part, metric) in enumerate(zip(rows, metrics, strict=True)):
        seen = metric @ atoms.T
        gradient = (part - codes[i] @ atoms) @ seen
        codes[i] = conjugate_gradients(atoms @ seen, codes[i], gradient, codes[i] != 0, 10)
    rounds.history[-1]["relative_error"] = min(rounds.history[-1]["relative_error"], error_of(atoms, codes))
    return Solution(
        xp.asarray(atoms.T, copy=True), [xp.asarray(code.T * scale, copy=True) for code in codes], rounds.history
    )


def shared_dictionary(
    rows: Sequence[Array], codes: Sequence[Array], metrics: Sequence[Array], atoms: Array, n_steps: int
) -> Array:
    """Dictionary of least total error for fixed codes, by preconditioned conjugate gradients from `atoms`.

    The preconditioner is the inverse of ``sum_l S_l S_l^T``, exact where the metrics are one and the same identity.

    Parameters
    ----------
    rows : sequence of array (n_l, d)
    codes : sequence of array (n_l, k)
    metrics : sequence of array (d, d)
    atoms : array (k, d)
        Start. An atom that no column uses stays as it is.
    n_steps : int

    Returns
    -------
    atoms : array (k, d)
    """
    moments = [code.T @ code for code in codes]
    rhs = [code.T @ (part @ metric) for code, part, metric in zip(codes, rows, metrics, strict=True)]
    return dictionary_of(moments, rhs, metrics, atoms, n_steps)


def dictionary_of(
    moments: Sequence[Array], rhs: Sequence[Array], metrics: Sequence[Array], atoms: Array, n_steps: int
) -> Array:
    """`shared_dictionary` of ``S_l S_l^T`` (k, k) and ``S_l W_l^T M_l`` (k, d), all that it depends on."""
    xp = array_namespace(atoms)
    total = sum(moments[1:], start=moments[0])
    energy = xp.linalg.diagonal(total)
    used = energy > 0
    # units in which every used atom's codes have unit energy, as for the dictionary of a single metric
    scale = xp.where(used, energy, xp.ones_like(energy)) ** -0.5
    ridge = xp.where(used, xp.full_like(energy, 10 * float(xp.finfo(energy.dtype).eps)), xp.ones_like(energy))
    precondition = spd_solver(plus_diagonal(total * scale[:, None] * scale[None, :], ridge))
    unknown = atoms / scale[:, None]

    def apply(values: Array) -> Array:
        scaled = values * scale[:, None]
        parts = [moment @ (scaled @ metric) for moment, metric in zip(moments, metrics, strict=True)]
        return sum(parts[1:], start=parts[0]) * scale[:, None]

    residual = sum(rhs[1:], start=rhs[0]) * scale[:, None] - apply(unknown)
    conditioned = precondition(residual) * used[:, None]
    direction = conditioned
    energy_before = float(xp.sum(residual * conditioned))
    for _ in range(n_steps):
        image = apply(direction)
        curvature = float(xp.sum(direction * image))
        if not (curvature > 0 and energy_before > 0):
            break
        length = energy_before / curvature
        unknown = unknown + length * direction
        residual = residual - length * image
        conditioned = precondition(residual) * used[:, None]
        energy_now = float(xp.sum(residual * conditioned))
        direction = conditioned + (energy_now / energy_before) * direction
        energy_before = energy_now
    return unknown * scale[:, None]


def _energy(rows: Array, metric: Array) -> float:
    """``tr(E M E^T)``, summed in double precision over rows; not negative."""
    xp = array_namespace(rows)
    return max(0.0, float(xp.sum(xp.astype(row_dots(rows, rows @ metric), xp.float64))))
