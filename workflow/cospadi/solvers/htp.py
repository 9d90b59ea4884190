"""Hard-thresholding pursuit with a closed-form dictionary: the default solver.

A round is: one gradient step on all codes, the ``s`` largest entries of every column as its support, a few conjugate
gradient steps on that support, then the best dictionary for these codes. All of it is matrix products.

A plain step, ``1 / ||D^T D||`` or the steepest descent's, hardly ever changes a support once the codes fit it, and the
error stalls 10 to 15 % above what is possible. So the step starts several times longer, which lets atoms compete for
every column, and shrinks from round to round (annealing): the error rises at first and ends far lower. The best pair
is kept throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cospadi.runtime.cospadi_registry import SUPPORTS
from cospadi.solvers import Solution
from cospadi.solvers._arrays import Array, array_namespace, row_dots, support_mask
from cospadi.solvers._rounds import (
    Rounds,
    as_rows,
    check_support,
    finish,
    generator,
    initial,
    redraw,
    ridge_dictionary,
    total_norm,
)
from cospadi.solvers._threads import one_blas_thread, over_rows
from cospadi.solvers.least_squares import conjugate_gradients
from cospadi.solvers.starts import procrustes, spread

# First and last step, in units of steepest descent's: lowest errors over seven real matrices at ratios .2 and .4.
STEPS = (4.0, 1.5)
# Share of the rounds in which the step shrinks, geometrically
ANNEALED = 0.8
# Of conjugate gradients a round
CG_STEPS = 3


@one_blas_thread
def learn(
    target: Array,
    *,
    n_atoms: int,
    n_nonzero_coefs: int,
    random_state: int | np.random.Generator = 42,
    dictionary_init: Array | None = None,
    codes_init: Array | None = None,
    max_iter: int = 25,
    tol: float = 1e-4,
    max_seconds: float | None = None,
    log: Callable[[str], None] | None = None,
    support: str = "bitmask",
    steps: tuple[float, float] = STEPS,
    polish: bool = False,
) -> Solution:
    """Learn a dictionary and codes with ``target ~ D S``, exactly `n_nonzero_coefs` nonzeros a column.

    Atoms that have to be redrawn are random.

    Parameters
    ----------
    target, n_atoms, n_nonzero_coefs, random_state, max_iter, log, support
        As of all `cospadi.solvers`.
    dictionary_init : array (d, n_atoms), optional
        Default: three rounds of :func:`cospadi.solvers.starts.procrustes`.
    codes_init : array (n_atoms, n), optional
        With them the rounds start at the last, short step.
    tol : float
        Looked at after the annealing.
    max_seconds : float, optional
        The annealing ends in time.
    steps : (float, float)
        Length of the gradient step in the first round and after the annealing, in units of the step that lowers the
        error of a column most (:func:`steepest_step`).
    polish : bool
        Solve the codes exactly on their final supports, in double precision; else ten more conjugate gradient steps
        bring them within 0.1 % of that at a tenth of the cost.

    Returns
    -------
    Solution
    """
    rows, scale = as_rows(target, n_atoms, n_nonzero_coefs)
    n, d = rows.shape
    xp = array_namespace(rows)
    rng = generator(random_state)
    rounds = Rounds(max_iter, tol, log, max_seconds)
    norm = total_norm(rows)
    check_support(support, n_atoms, n_nonzero_coefs)
    if min(steps) <= 0:
        raise ValueError(f"steps must be positive, got {steps}")

    atoms = initial(dictionary_init, rows, (d, n_atoms), "dictionary_init")
    codes = initial(codes_init, rows, (n_atoms, n), "codes_init", scale)
    if codes is not None:
        atoms, codes = ridge_dictionary(rows, codes * support_mask(codes, n_nonzero_coefs, support))
        steps = (steps[1], steps[1])
    elif atoms is not None:
        codes = xp.zeros((n, n_atoms), dtype=rows.dtype, device=rows.device)
    else:
        atoms, codes = procrustes(rows, n_atoms, n_nonzero_coefs, rng)
        if SUPPORTS[support].pattern is not None:
            atoms, codes = spread(atoms, codes, SUPPORTS[support].pattern[1])
            codes = codes * support_mask(codes, n_nonzero_coefs, support)

    def left(atoms: Array, codes: Array) -> Array:
        return over_rows(lambda y, c: y - c @ atoms, rows, codes)

    residual = left(atoms, codes)
    rounds.record(total_norm(residual) / norm if norm else 0.0)
    best = atoms, codes
    annealed = max(1, round(ANNEALED * max_iter))
    for iteration in range(max_iter):
        progress = min(1.0, max(iteration / annealed, rounds.time_spent / ANNEALED))
        if norm == 0 or rounds.time_spent >= 1 or (iteration > annealed and rounds.settled):
            break
        gram = atoms @ atoms.T
        atoms, codes, n_redrawn = redraw(atoms, codes, residual, rng, gram)
        if n_redrawn:
            gram = atoms @ atoms.T
            residual = left(atoms, codes)
        step = steps[0] * (steps[1] / steps[0]) ** progress

        def code(residual: Array, codes: Array, atoms: Array = atoms, gram: Array = gram, step: float = step) -> Array:
            gradient = residual @ atoms.T
            lengths = step * steepest_step(gram, gradient)
            return pursue(gram, codes, gradient, n_nonzero_coefs, lengths, CG_STEPS, support=support)

        codes = over_rows(code, residual, codes)
        atoms, codes = ridge_dictionary(rows, codes)
        residual = left(atoms, codes)
        if rounds.record(total_norm(residual) / norm, n_redrawn=n_redrawn):
            best = atoms, codes
    atoms, codes = best
    if norm:
        gram = atoms @ atoms.T
        codes = over_rows(lambda y, c: conjugate_gradients(gram, c, (y - c @ atoms) @ atoms.T, c != 0, 10), rows, codes)
    return finish(rows, scale, atoms, codes, rounds, polish=polish)


def steepest_step(gram: Array, gradient: Array) -> Array:
    """Step along the gradient that lowers a row's error most, ``||g||^2 / ||D g||^2``: (n, 1)."""
    xp = array_namespace(gradient)
    curvature = row_dots(gradient, gradient @ gram)
    tiny = float(xp.finfo(gradient.dtype).smallest_normal)
    return (row_dots(gradient, gradient) / xp.clip(curvature, tiny, None))[:, None]


def pursue(
    gram: Array,
    codes: Array,
    gradient: Array,
    n_nonzero_coefs: int,
    step: float | Array,
    cg_steps: int,
    *,
    support: str = "bitmask",
) -> Array:
    """One hard-thresholding pursuit step (Foucart 2011): new supports, then restricted least squares on them.

    Parameters
    ----------
    gram : array (k, k)
        ``D^T D``.
    codes : array (n, k)
    gradient : array (n, k)
        ``D^T (y - D c)`` of every row.
    n_nonzero_coefs : int
    step : float or array (n, 1)
        Length of the gradient step.
    cg_steps : int
    support : {"bitmask", "2:4"}

    Returns
    -------
    codes : array (n, k)
        `n_nonzero_coefs` nonzeros a row.
    """
    mask = support_mask(codes + step * gradient, n_nonzero_coefs, support)
    dropped = codes * ~mask
    codes = codes - dropped
    # the gradient at the codes that are left follows from the old one, without touching the signals
    return conjugate_gradients(gram, codes, gradient + dropped @ gram, mask, cg_steps)


def largest_eigenvalue(gram: Array) -> float:
    """Largest eigenvalue of a Gram, from below, by power iterations from its longest row, which it cannot annul."""
    xp = array_namespace(gram)
    vector = gram[int(xp.argmax(row_dots(gram, gram)))]
    for _ in range(12):
        length = xp.sqrt(xp.sum(vector**2))
        if not float(length) > 0:
            return 0.0
        vector = gram @ (vector / length)
    return float(xp.sqrt(xp.sum(vector**2)))
