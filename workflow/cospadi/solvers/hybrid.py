"""Sparse weights beside a few learned atoms: ``W ~ S_0 + A S_1``, the dictionary ``[I | A]``.

The identity atoms are free (they take no bytes), so most of the budget buys single weights; a few learned atoms say
what many outputs have in common. Codes of both come from one ADMM over ``[I | A]`` (`solvers.admm`), the atoms in
closed form every few of its iterations. Neither waits for the other to settle: a rising penalty freezes both together,
and ADMM's dual, which remembers what was dropped, goes on under the new atoms.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cospadi.solvers._arrays import Array, array_namespace, device_of, leading_rows, spd_solver
from cospadi.solvers._threads import one_blas_thread, over_rows, transposed_product
from cospadi.solvers.admm import Scaled, fit_values, split_state, squared_error
from cospadi.solvers.entries import best_entries

# Penalties of a pass, with how many iterations of the codes each; the atoms follow after every penalty. Passes that
# start low again let the support change once more, with the atoms known (measured in docs/learning.md).
PENALTIES = tuple(0.1 * 1.3**i for i in range(14))
TIMES = 3
PASSES = 3
# Over-relaxation of the codes, and conjugate gradient steps before the atoms follow
RELAX = 1.6
CG_STEPS = 2
RIDGE = 1e-5


class Extended:
    """The Gram of ``[I | A]`` in the scaled space, its inverses by Schur complement from those of the identity part.

    Parameters
    ----------
    metric : Scaled
    atoms : array (k, d_in)
        A in the scaled space, a row an atom of unit length ``a^T H a = 1``.
    """

    def __init__(self, metric: Scaled, atoms: Array) -> None:
        xp = array_namespace(atoms)
        self._metric = metric
        self._atoms = atoms
        self._seen = atoms @ metric.gram  # (k, d_in): A^T H
        inner = self._seen @ atoms.T
        self._inner = inner + RIDGE * _eye(inner)
        self.gram = xp.concat(
            [xp.concat([metric.gram, self._seen.T], axis=1), xp.concat([self._seen, self._inner], axis=1)]
        )

    def targets(self, targets: Array) -> Array:
        """``[I | A]^T H W`` of ``H W``, both a row an output."""
        xp = array_namespace(targets)
        return xp.concat([targets, over_rows(lambda b: b @ self._atoms.T, targets)], axis=1)

    def inverse(self, rho: float) -> Array:
        """``([I | A]^T H [I | A] + rho I)^-1``."""
        xp = array_namespace(self._seen)
        first = self._metric.inverse(rho)
        solved = self._seen @ first  # (k, d_in)
        schur = self._inner + rho * _eye(self._inner) - solved @ self._seen.T
        corner = spd_solver(schur)(_eye(schur))
        side = -(corner @ solved)
        return xp.concat([xp.concat([first - solved.T @ side, side.T], axis=1), xp.concat([side, corner], axis=1)])


@one_blas_thread
def learn(
    metric: Scaled,
    weights: Array,
    n_nonzero: int,
    n_atoms: int,
    *,
    start: Array,
    max_iter: int = PASSES,
    pattern: str = "matrix",
    log: Callable[[str], None] | None = None,
) -> tuple[Array, Array, list[dict[str, Any]]]:
    """One ADMM of the codes over ``[I | A]``, whose atoms A move along with it; the best pair is kept.

    Parameters
    ----------
    metric : Scaled
    weights : array (d_out, d_in)
        In the scaled space, ``c * W^T``; weights of several matrices may stand below each other.
    n_nonzero : int
        Of both parts together.
    n_atoms : int
        Learned atoms, at least 1.
    start : array (d_out, d_in)
        Sparse codes over the identity alone.
    max_iter : int
        Passes through `PENALTIES`.

    Returns
    -------
    codes : array (d_out, d_in + n_atoms)
    atoms : array (n_atoms, d_in)
        In the scaled space; an atom of the weight itself is divided by the scale.
    history : list of dict
        ``iteration``, ``relative_error``, ``seconds``.
    """
    xp = array_namespace(weights)
    began = time.perf_counter()
    d_in = weights.shape[1]
    size = squared_error(metric.gram, weights)
    targets = over_rows(lambda w: w @ metric.gram, weights)
    atoms = _first_atoms(metric, weights - start, n_atoms)
    codes = xp.concat([start, xp.zeros_like(weights[:, :n_atoms])], axis=1)
    best, least, history = (codes, atoms), float("inf"), []
    extended = Extended(metric, atoms)
    wanted = extended.targets(targets)
    state = split_state(wanted, n_nonzero, codes, pattern, relax=RELAX)
    for iteration in range(max_iter):
        for rho in PENALTIES:
            inverse = extended.inverse(rho)
            for _ in range(TIMES):
                state.step(inverse, rho)
            codes = fit_values(extended.gram, wanted, state.moved * state.support(), CG_STEPS)
            atoms, lengths = _update(metric, weights, codes, atoms)
            codes = codes * lengths
            extended = Extended(metric, atoms)
            wanted = extended.targets(targets)
            state.follow(wanted, lengths)
        codes = codes * best_entries(abs(codes), n_nonzero, pattern)
        error = squared_error(metric.gram, weights - codes[:, :d_in] - _product(codes[:, d_in:], atoms))
        if error < least:
            best, least = (codes, atoms), error
        entry = {
            "iteration": iteration,
            "relative_error": float((least / size) ** 0.5) if size else 0.0,
            "seconds": time.perf_counter() - began,
        }
        history.append(entry)
        if log is not None:
            log(f"iter {iteration + 1}/{max_iter} rel_err {entry['relative_error']:.5f} {entry['seconds']:.1f}s")
    codes, atoms = best
    extended = Extended(metric, atoms)
    codes = fit_values(extended.gram, extended.targets(targets), codes, 20)
    return codes, atoms, history


def _first_atoms(metric: Scaled, left: Array, n_atoms: int) -> Array:
    """Leading directions of what the identity part leaves, in the scaled space."""
    factor = metric.factor  # H = L^T L
    whitened = over_rows(lambda r: r @ factor.T, left)
    directions = leading_rows(whitened, n_atoms)  # (n_atoms, d_in), whitened
    return _unit(metric, metric.unwhiten(directions))


def _update(metric: Scaled, weights: Array, codes: Array, atoms: Array) -> tuple[Array, Array]:
    """Atoms of least error for these codes, ``A = (W - S_0) S_1^T (S_1 S_1^T)^-1``, of unit length.

    Codes over ``[I | A]`` have to be multiplied by the lengths (d_in + k,) that are returned with them.
    """
    xp = array_namespace(codes)
    d_in = weights.shape[1]
    shares = codes[:, d_in:]
    moments = transposed_product(shares, shares)
    mean = float(xp.mean(xp.linalg.diagonal(moments)))
    ones = xp.ones_like(codes[0, :])
    if mean == 0:
        return atoms, ones
    right = transposed_product(shares, weights - codes[:, :d_in])  # (k, d_in)
    found = spd_solver(moments + RIDGE * mean * _eye(moments))(right)
    used = (shares != 0).sum(0) > 0
    found = xp.where(used[:, None], found, atoms)
    lengths = _lengths(metric, found)
    lengths = xp.where(lengths > 0, lengths, 1.0)
    return found / lengths[:, None], xp.concat([ones[:d_in], lengths])


def _unit(metric: Scaled, atoms: Array) -> Array:
    xp = array_namespace(atoms)
    lengths = _lengths(metric, atoms)
    return atoms / xp.where(lengths > 0, lengths, 1.0)[:, None]


def _lengths(metric: Scaled, atoms: Array) -> Array:
    xp = array_namespace(atoms)
    return xp.sqrt(xp.clip(((atoms @ metric.gram) * atoms).sum(1), 0.0, None))


def _product(codes: Array, atoms: Array) -> Array:
    return over_rows(lambda c: c @ atoms, codes)


def _eye(like: Array) -> Array:
    xp = array_namespace(like)
    return xp.eye(like.shape[0], dtype=like.dtype, **device_of(like))
