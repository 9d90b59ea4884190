"""What every alternating solver shares: checked arguments, a record of rounds, dead atoms, closed-form dictionary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.errors import NumericalError
from cospadi.runtime.cospadi_registry import SUPPORTS
from cospadi.solvers import Solution
from cospadi.solvers._arrays import (
    Array,
    array_namespace,
    from_numpy,
    is_torch_array,
    plus_diagonal,
    row_dots,
    spd_solver,
)
from cospadi.solvers._threads import transposed_product
from cospadi.solvers.least_squares import restricted

# Two unit atoms this close (|cosine|) are one atom to single precision: the later one is redrawn.
DUPLICATE_COSINE = 0.99999


def as_rows(target: Array, n_atoms: int, n_nonzero_coefs: int) -> tuple[Array, float]:
    """Check a target (d, n) and the sizes asked for; return the target as the solvers work on it.

    Returns
    -------
    rows : array (n, d)
        The target transposed, contiguous, floating, divided by `scale`.
    scale : float
        A power of two, so that dividing is exact, near the largest magnitude: squares neither overflow nor vanish.

    Raises
    ------
    ValueError
        If the target is not a matrix or the sizes do not fit together.
    NumericalError
        If the target holds NaN or infinities.
    """
    if getattr(target, "ndim", None) != 2 or 0 in target.shape:
        raise ValueError(f"target must be a non-empty matrix (d, n), got shape {getattr(target, 'shape', None)}")
    if n_atoms < 1:
        raise ValueError(f"n_atoms must be at least 1, got {n_atoms}")
    if not 1 <= n_nonzero_coefs <= n_atoms:
        raise ValueError(f"n_nonzero_coefs must be between 1 and n_atoms = {n_atoms}, got {n_nonzero_coefs}")
    xp = array_namespace(target)
    if target.dtype not in (xp.float32, xp.float64):
        target = xp.astype(target, xp.float32)
    rows = target.T.contiguous() if is_torch_array(target) else np.ascontiguousarray(target.T)
    if not bool(xp.all(xp.isfinite(rows))):
        raise NumericalError(f"target {tuple(target.shape)} holds NaN or infinite values")
    largest = float(xp.max(abs(rows)))
    scale = 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
    return rows / scale, scale


def check_support(support: str, n_atoms: int, n_nonzero_coefs: int) -> None:
    """Refuse supports that do not exist, and numbers of atoms that a support cannot have.

    Raises
    ------
    ValueError
    """
    known = [name for name, one in SUPPORTS.items() if one.is_stored]
    if support not in known:
        raise ValueError(f"support must be one of {', '.join(known)}, got {support!r}")
    kept, among = SUPPORTS[support].pattern or (0, 1)
    if kept and (n_atoms % among or n_nonzero_coefs * among != kept * n_atoms):
        raise ValueError(
            f"support {support} needs a multiple of {among} atoms and {kept} of every {among} as nonzeros, "
            f"got {n_atoms} and {n_nonzero_coefs}"
        )


def initial(values: Array | None, like: Array, shape: tuple[int, int], name: str, scale: float = 1.0) -> Array | None:
    """A start given by the caller, checked, divided by `scale`, and transposed to the solver's layout and device."""
    if values is None:
        return None
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
    rows = from_numpy(np.array(to_numpy(values).T, dtype=np.float64, order="C") / scale, like)
    xp = array_namespace(rows)
    if not bool(xp.all(xp.isfinite(rows))):
        raise NumericalError(f"{name} holds NaN or infinite values")
    return rows


def generator(random_state: int | np.random.Generator) -> np.random.Generator:
    """The random numbers of a solver; always drawn on the CPU, so that devices agree."""
    return np.random.default_rng(random_state)


def total_norm(rows: Array) -> float:
    """Frobenius norm, summed in double precision over rows."""
    xp = array_namespace(rows)
    return float(xp.sum(xp.astype(row_dots(rows, rows), xp.float64))) ** 0.5


def unit_rows(rows: Array) -> tuple[Array, Array]:
    """Rows scaled to unit norm, and the norms; zero rows stay zero."""
    xp = array_namespace(rows)
    norms = xp.sqrt(row_dots(rows, rows))
    return rows / xp.where(norms > 0, norms, xp.ones_like(norms))[:, None], norms


def ridge_dictionary(rows: Array, codes: Array) -> tuple[Array, Array]:
    """Best dictionary for fixed codes (method of optimal directions), atoms scaled to unit norm, codes inversely.

    Solves ``(S S^T + eps) D^T = S Y`` in units where every used atom's codes have unit energy, so that the tiny
    ``eps`` means the same for strong and for weak atoms; it only matters where codes of atoms are dependent.

    Parameters
    ----------
    rows : array (n, d)
        Target, transposed.
    codes : array (n, k)

    Returns
    -------
    dictionary : array (k, d)
        Unit rows; zero rows for atoms no column uses.
    codes : array (n, k)
    """
    xp = array_namespace(rows)
    gram = transposed_product(codes, codes)
    energy = xp.linalg.diagonal(gram)
    scale = xp.where(energy > 0, energy, xp.ones_like(energy)) ** -0.5
    gram = gram * scale[:, None] * scale[None, :]
    # the row of an unused atom is zero: a one on its diagonal makes the solve return zero for it
    ridge = xp.where(energy > 0, xp.full_like(energy, 10 * float(xp.finfo(rows.dtype).eps)), xp.ones_like(energy))
    gram = plus_diagonal(gram, ridge)
    dictionary = spd_solver(gram)(transposed_product(codes, rows) * scale[:, None]) * scale[:, None]
    dictionary, norms = unit_rows(dictionary)
    return dictionary, codes * norms[None, :]


def redraw(
    dictionary: Array, codes: Array, residual: Array, rng: np.random.Generator, gram: Array | None = None
) -> tuple[Array, Array, int]:
    """Replace unused and duplicate atoms by residuals of the worst-fitted columns.

    The columns are drawn (seeded, without repetition) among the worst ones, twice as many as needed. The codes of a
    redrawn atom are zero: the error does not change until the next coding step uses it. Of two duplicates
    the first takes the codes of both.

    Parameters
    ----------
    dictionary : array (k, d)
        Unit rows, zero rows for unused atoms.
    codes : array (n, k)
    residual : array (n, d)
    rng : numpy Generator
    gram : array (k, k), optional
        ``dictionary @ dictionary.T`` where the caller has it.

    Returns
    -------
    dictionary, codes : array
        Copies where something was replaced, the arguments themselves otherwise.
    n_redrawn : int
    """
    xp = array_namespace(dictionary)
    gram = dictionary @ dictionary.T if gram is None else gram
    unused = xp.linalg.diagonal(gram) < 0.5
    later = xp.triu(abs(gram), k=1)
    duplicate = xp.max(later, axis=0) > DUPLICATE_COSINE
    dead = np.flatnonzero(to_numpy(unused | duplicate))
    if dead.size == 0:
        return dictionary, codes, 0
    errors = to_numpy(row_dots(residual, residual))
    order = np.argsort(-errors, kind="stable")
    order = order[errors[order] > 0][: 2 * dead.size]
    if order.size == 0:
        return dictionary, codes, 0
    dead = dead[: order.size]
    dictionary = xp.asarray(dictionary, copy=True)
    codes = xp.asarray(codes, copy=True)
    # last to first: what a duplicate of a duplicate hands over is handed on
    for atom in np.flatnonzero(to_numpy(duplicate))[::-1].tolist():
        first = int(np.flatnonzero(to_numpy(later[:, atom]) > DUPLICATE_COSINE)[0])
        codes[:, first] += codes[:, atom] * xp.sign(gram[first, atom])
        codes[:, atom] = 0
    chosen = np.sort(rng.choice(order, size=dead.size, replace=False))
    for atom, column in zip(dead.tolist(), chosen.tolist(), strict=True):
        dictionary[atom] = residual[column] / xp.sqrt(xp.sum(residual[column] ** 2))
        codes[:, atom] = 0
    return dictionary, codes, int(dead.size)


def finish(rows: Array, scale: float, atoms: Array, codes: Array, rounds: Rounds, *, polish: bool) -> Solution:
    """The solution of a solver that ends with atoms (k, d) and codes (n, k), made exact on their support by `polish`.

    Codes better than those of the last round lower the error of its entry in the history.
    """
    xp = array_namespace(rows)
    norm = total_norm(rows)
    if norm:
        codes = restricted(rows, atoms, codes) if polish else codes
        error = total_norm(rows - codes @ atoms) / norm
        rounds.history[-1]["relative_error"] = min(rounds.history[-1]["relative_error"], error)
    return Solution(xp.asarray(atoms.T, copy=True), xp.asarray(codes.T * scale, copy=True), rounds.history)


class Rounds:
    """The record of a solver's rounds, and its stopping rule.

    Parameters
    ----------
    max_iter : int
    tol : float
        Stop when a round lowers the error by less than this share of it.
    log : callable, optional
        Called with one line a round.
    max_seconds : float, optional
        No round starts after so many seconds; the result then depends on the machine.
    """

    def __init__(
        self, max_iter: int, tol: float, log: Callable[[str], None] | None, max_seconds: float | None = None
    ) -> None:
        if max_iter < 0:
            raise ValueError(f"max_iter must not be negative, got {max_iter}")
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {max_seconds}")
        self.max_iter = max_iter
        self.max_seconds = max_seconds
        self.tol = tol
        self.history: list[dict[str, Any]] = []
        self._log = log
        self._started = time.perf_counter()

    def record(self, relative_error: float, *, n_redrawn: int = 0, **more: Any) -> bool:
        """Add a round (the first call is the start); return whether its error is the best so far.

        Raises
        ------
        NumericalError
            If the error is not a number, which no finite target should give.
        """
        if not np.isfinite(relative_error):
            raise NumericalError(f"round {len(self.history)} gave the relative error {relative_error}")
        best = min((entry["relative_error"] for entry in self.history[-1:]), default=float("inf"))
        iteration = len(self.history)
        seconds = time.perf_counter() - self._started
        entry = {
            "iteration": iteration,
            "relative_error": min(best, relative_error),
            "round_error": relative_error,
            "seconds": round(seconds, 4),
            "n_redrawn": n_redrawn,
            **more,
        }
        self.history.append(entry)
        if self._log is not None:
            self._log(
                f"iter {iteration}/{self.max_iter} rel_err {relative_error:.5f} redrawn {n_redrawn} {seconds:.1f}s"
            )
        return relative_error <= best

    @property
    def time_spent(self) -> float:
        """Share of the seconds allowed that has passed; 0 where there is no limit."""
        return 0.0 if self.max_seconds is None else (time.perf_counter() - self._started) / self.max_seconds

    @property
    def settled(self) -> bool:
        """Whether the last round changed the error by less than ``tol`` of it, or the error is nil."""
        if len(self.history) < 2:
            return bool(self.history) and self.history[-1]["round_error"] == 0
        before, now = (entry["round_error"] for entry in self.history[-2:])
        return now == 0 or abs(before - now) < self.tol * before
