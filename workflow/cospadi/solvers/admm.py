"""Sparse weights in the metric of the activations: the support by ADMM, the values by conjugate gradients.

``min ||X W - X S||_F`` with n nonzeros in S is split into a least-squares step and a projection onto the n largest
entries (Boyd et al. 2011; ALPS, Meng et al. 2024, does this for language models). Inputs are scaled so that the Gram
has ones on its diagonal, which makes magnitudes comparable across inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from cospadi.solvers._arrays import Array, array_namespace, device_of, inverse_spd, row_dots
from cospadi.solvers._threads import one_blas_thread, over_rows
from cospadi.solvers.entries import best_entries

# Ridge on the scaled Gram, so that inputs that depend on each other have one answer
RIDGE = 1e-5

# Inverses that are kept: those of the longest schedule
_INVERSES_KEPT = 20

# Yields the penalty of each iteration, and is sent the support after it
Schedule = Callable[[int], Generator[float, Array, None]]


def stepwise(*penalties: float, times: int = 5) -> Schedule:
    """Schedule of fixed penalties, each for so many iterations."""

    def schedule(n_nonzero: int) -> Generator[float, Array, None]:
        for rho in penalties:
            for _ in range(times):
                yield rho

    return schedule


def adaptive(n_nonzero: int) -> Generator[float, Array, None]:
    """ALPS' schedule: up by 1.1 to 1.3 every three iterations, the more of the support has changed, until none has."""
    rho, before = 0.1, None
    for _ in range(100):
        for _ in range(3):
            mask = yield rho
        if before is not None:
            changed = int((mask ^ before).sum())
            if changed == 0:
                return
            rho *= 1.3 if changed >= 0.1 * n_nonzero else 1.2 if changed >= 0.005 * n_nonzero else 1.1
        before = mask


# Measured on seven matrices at ratios .2 to .6 (docs/learning.md); the long one is within half a percent of what
# exchanging single entries could still gain
SCHEDULES: dict[str, Schedule] = {
    "short": stepwise(0.1, 0.2, 0.5, 1.2, 3.0, 8.0),
    "long": stepwise(*(0.02 * 1.3**i for i in range(20))),
    "adaptive": adaptive,
}


class Scaled:
    """A Gram with ones on its diagonal, and what ADMM asks of it, computed once for all matrices that read it.

    Parameters
    ----------
    gram : array (d_in, d_in), float64
    dtype : dtype
        What products are computed in.

    Attributes
    ----------
    gram : array (d_in, d_in)
        ``H = G / (c c^T)`` plus a ridge, ``c = sqrt(diag G)``.
    scale : array (d_in,)
        c; 1 for inputs that are never active, whose weights are worth nothing.
    """

    def __init__(self, gram: Array, dtype: Any = np.float32) -> None:
        xp = array_namespace(gram)
        diagonal = xp.linalg.diagonal(gram)
        ridge = RIDGE * float(xp.mean(diagonal))
        eye = xp.eye(gram.shape[0], dtype=gram.dtype, **device_of(gram))
        self.scale = xp.sqrt(diagonal + ridge)
        self._double = (gram + ridge * eye) / (self.scale[:, None] * self.scale[None, :])
        self._eye = eye
        self._dtype = dtype
        self._inverses: dict[float, Array] = {}
        self.gram = xp.astype(self._double, dtype)

    @functools.cached_property
    def factor(self) -> Array:
        """Upper triangular L with ``L^T L = H``."""
        xp = array_namespace(self._double)
        return xp.astype(xp.linalg.cholesky(self._double).T, self._dtype)

    def unwhiten(self, rows: Array) -> Array:
        """``L^-1 a`` of every row a."""
        xp = array_namespace(rows)
        return xp.astype(
            xp.linalg.solve(xp.astype(self.factor, xp.float64), xp.astype(rows, xp.float64).T).T, rows.dtype
        )

    def inverse(self, rho: float) -> Array:
        """``(H + rho I)^-1``."""
        if rho not in self._inverses:
            xp = array_namespace(self._double)
            while len(self._inverses) >= _INVERSES_KEPT:
                self._inverses.pop(next(iter(self._inverses)))
            self._inverses[rho] = xp.astype(inverse_spd(self._double + rho * self._eye), self._dtype)
        return self._inverses[rho]


@one_blas_thread
def sparse_codes(
    metric: Scaled,
    targets: Array,
    n_nonzero: int,
    *,
    start: Array,
    schedule: Schedule = SCHEDULES["short"],
    pattern: str = "matrix",
    cg_steps: int = 20,
) -> Array:
    """Sparse codes of least error ``tr((S - S*)^T H (S - S*))``, ``H S* = B``, that ADMM finds from `start`.

    Parameters
    ----------
    metric : Scaled
    targets : array (d_out, d_in)
        ``B^T = (H W)^T`` in the scaled space, a row an output.
    n_nonzero : int
    start : array (d_out, d_in)
        First codes, sparse or not.
    schedule : callable
        One of `SCHEDULES`.
    pattern : str
        Of `entries.PATTERNS`: where nonzeros may be.
    cg_steps : int
        Conjugate gradient steps on the final support.

    Returns
    -------
    array (d_out, d_in)
        The better of the start, cut to its largest entries, and what ADMM ends with, both with the best values.
    """
    found = support_by_admm(metric, targets, n_nonzero, start, schedule, pattern)
    kept = start * best_entries(abs(start), n_nonzero, pattern)
    found, kept = (fit_values(metric.gram, targets, codes, cg_steps) for codes in (found, kept))
    return found if _energy(metric.gram, targets, found) <= _energy(metric.gram, targets, kept) else kept


def support_by_admm(
    metric: Any, targets: Array, n_nonzero: int, start: Array, schedule: Schedule, pattern: str = "matrix"
) -> Array:
    """Codes that ADMM ends with, their values not yet the best; see `sparse_codes`."""
    xp = array_namespace(targets)
    split, dual, before, mask = start, xp.zeros_like(targets), None, None
    penalties = schedule(n_nonzero)
    while True:
        try:
            rho = penalties.send(mask)
        except StopIteration:
            return split
        if rho != before:
            inverse = metric.inverse(rho)
            fixed = over_rows(lambda b, p=inverse: b @ p, targets)
            if before is not None:
                dual *= before / rho
            before = rho
        moved = over_rows(lambda f, z, u, p=inverse, r=rho: f + r * ((z - u) @ p) + u, fixed, split, dual)  # X + U
        mask = best_entries(abs(moved), n_nonzero, pattern)
        split = moved * mask
        dual = moved - split


def fit_values(gram: Array, targets: Array, codes: Array, n_steps: int) -> Array:
    """Values of codes (d_out, d_in) on their support by conjugate gradients, ``min tr(S^T H S) - 2 tr(S^T B)``."""
    from cospadi.solvers.least_squares import conjugate_gradients

    def fit(b: Array, c: Array) -> Array:
        return conjugate_gradients(gram, c, b - c @ gram, c != 0, n_steps)

    return over_rows(fit, targets, codes)


def _energy(gram: Array, targets: Array, codes: Array) -> float:
    """Squared error of codes, less that of none."""
    xp = array_namespace(codes)
    rows = over_rows(lambda b, c: row_dots(c, c @ gram - 2 * b), targets, codes)
    return float(xp.sum(xp.astype(rows, xp.float64)))


def squared_error(gram: Array, rows: Array) -> float:
    """``tr(E^T H E)`` of differences E, a row an output."""
    xp = array_namespace(rows)
    return float(xp.sum(xp.astype(over_rows(lambda e: row_dots(e, e @ gram), rows), xp.float64)))


def single_precision(device: str) -> Any:
    """float32 of NumPy, or of torch on another device."""
    if device == "cpu":
        return np.float32
    import torch

    return torch.float32


def as_dtype(rows: Array, like: Array) -> Array:
    """`rows` in the dtype of `like`, row after row in memory."""
    if isinstance(rows, np.ndarray):
        return np.ascontiguousarray(rows, like.dtype)
    return rows.to(like.dtype).contiguous()
