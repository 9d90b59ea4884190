"""Sparse weights in the metric of the activations: the support by ADMM, the values by conjugate gradients.

``min ||X W - X S||_F`` with n nonzeros in S is split into a least-squares step and a projection onto the n largest
entries (Boyd et al. 2011; ALPS, Meng et al. 2024, does this for language models). Inputs are scaled so that the Gram
has ones on its diagonal, which makes magnitudes comparable across inputs.
"""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from cospadi.solvers._arrays import Array, array_namespace, inverse_spd, over_outer, plus_diagonal, row_dots
from cospadi.solvers._threads import in_pieces, one_blas_thread, over_rows
from cospadi.solvers.entries import best_entries, kept_of
from cospadi.solvers.exchange import exchanged

# Ridge on the scaled Gram, so that inputs that depend on each other have one answer
RIDGE = 1e-5

# Conjugate gradient steps on the final support, and on the start's: enough to know whether ADMM did harm
CG_STEPS, START_CG_STEPS = 20, 5

# Inverses that are kept: those of the longest schedule, as far as they take no more than a GiB in float32
_INVERSES_KEPT, _INVERSES_BYTES = 20, 2**30

# Yields the penalty of each iteration, and is sent a function that gives the support after it
Schedule = Callable[[int], Generator[float, Callable[[], Array], None]]


def stepwise(*penalties: float, times: int = 5) -> Schedule:
    """Schedule of fixed penalties, each for so many iterations."""

    def schedule(n_nonzero: int) -> Generator[float, Callable[[], Array], None]:
        for rho in penalties:
            for _ in range(times):
                yield rho

    return schedule


def adaptive(n_nonzero: int) -> Generator[float, Callable[[], Array], None]:
    """ALPS' schedule: up by 1.1 to 1.3 every three iterations, the more of the support has changed, until none has."""
    rho, before = 0.1, None
    for _ in range(100):
        for _ in range(3):
            support = yield rho
        mask = support()
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


def inverses_kept(d_in: int) -> int:
    """How many inverses of a Gram are kept for the other matrices that read it, or for the next pass; at least one."""
    return max(1, min(_INVERSES_KEPT, _INVERSES_BYTES // (4 * d_in**2)))


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
        self.scale = xp.sqrt(diagonal + ridge)
        self._double = over_outer(plus_diagonal(gram, ridge), self.scale)
        self._dtype = dtype
        self._inverses: dict[float, Array] = {}
        self.gram = xp.astype(self._double, dtype)

    @property
    def parts(self) -> Parts:
        """Itself, of all rows; see `Stacked`."""
        return [(slice(None), self)]

    @property
    def plain(self) -> Array:
        """The Gram that it was made of, with the ridge, in double precision and over its mean diagonal."""
        xp = array_namespace(self._double)
        return self._double * (self.scale[:, None] * self.scale[None, :]) / xp.mean(self.scale**2)

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
        """``(H + rho I)^-1``, in the dtype of the products: rho keeps it well conditioned, and it guides a support."""
        if rho not in self._inverses:
            while len(self._inverses) >= inverses_kept(self.gram.shape[0]):
                self._inverses.pop(next(iter(self._inverses)))
            self._inverses[rho] = inverse_spd(self.gram, rho)
        return self._inverses[rho]


class Stacked:
    """Metrics of rows that stand below each other: the rows of each have their own, and its scale.

    Parameters
    ----------
    metrics : sequence of Scaled
    counts : sequence of int
        Rows of each.

    Attributes
    ----------
    parts : list of (slice, Scaled)
        Which rows are whose.
    scale : array (d_in,)
        Ones: what all rows share is in the space of the weights.
    """

    def __init__(self, metrics: Sequence[Scaled], counts: Sequence[int]) -> None:
        self.scale = array_namespace(metrics[0].scale).ones_like(metrics[0].scale)
        self.parts, end = [], 0
        for metric, alike in itertools.groupby(zip(metrics, counts, strict=True), key=lambda pair: pair[0]):
            begin, end = end, end + sum(count for _, count in alike)
            self.parts.append((slice(begin, end), metric))


Parts = Sequence[tuple[slice, Any]]


def over_parts(parts: Parts, function: Callable[..., Array], *arrays: Array) -> Array:
    """``function(one, *rows)`` of every part and its rows of the arrays, below each other."""
    found = [function(one, *(array[rows] for array in arrays)) for rows, one in parts]
    return found[0] if len(found) == 1 else array_namespace(found[0]).concat(found)


def inverses(metric: Any, rho: float) -> list[tuple[slice, Array]]:
    """``(H + rho I)^-1`` of every part."""
    return [(rows, one.inverse(rho)) for rows, one in metric.parts]


@one_blas_thread
def sparse_codes(
    metric: Scaled | Stacked,
    targets: Array,
    n_nonzero: int,
    *,
    start: Array,
    schedule: Schedule = SCHEDULES["short"],
    pattern: str = "matrix",
) -> Array:
    """Sparse codes of least error ``tr((S - S*)^T H (S - S*))``, ``H S* = B``, that ADMM finds from `start`.

    Parameters
    ----------
    metric : Scaled or Stacked
    targets : array (d_out, d_in)
        ``B^T = (H W)^T`` in the scaled space, a row an output.
    n_nonzero : int
    start : array (d_out, d_in)
        First codes, sparse or not.
    schedule : callable
        One of `SCHEDULES`.
    pattern : str
        Of `entries.PATTERNS`: where nonzeros may be.

    Returns
    -------
    array (d_out, d_in)
        The better of what ADMM ends with, on the best values, and the start, cut to its largest entries and improved;
        with ``"n:m"`` some entries are then exchanged in their groups (`exchange`).
    """
    found = support_by_admm(metric, targets, n_nonzero, start, schedule, pattern)
    kept = start * best_entries(abs(start), n_nonzero, pattern)
    found = values_of(metric, targets, found, CG_STEPS)
    kept = values_of(metric, targets, kept, START_CG_STEPS)
    best = found if _energy(metric, targets, found) <= _energy(metric, targets, kept) else kept
    quota = kept_of(pattern)
    if quota is None:
        return best
    best = over_parts(metric.parts, lambda one, b, c: exchanged(one.gram, b, c, quota[1], fit_values), targets, best)
    return values_of(metric, targets, best, CG_STEPS)


def support_by_admm(
    metric: Any, targets: Array, n_nonzero: int, start: Array, schedule: Schedule, pattern: str = "matrix"
) -> Array:
    """Codes that ADMM ends with, their values not yet the best; see `sparse_codes`."""
    state = split_state(targets, n_nonzero, start, pattern)
    penalties, support = schedule(n_nonzero), None
    while True:
        try:
            rho = penalties.send(support)
        except StopIteration:
            return state.moved * best_entries(abs(state.moved), n_nonzero, pattern)
        state.step(inverses(metric, rho), rho)
        support = state.support


def split_state(
    targets: Array, n_nonzero: int, start: Array, pattern: str = "matrix", *, relax: float = 1.0
) -> SplitState:
    """ADMM before its first step.

    Parameters
    ----------
    targets, n_nonzero, start, pattern
        As in `sparse_codes`.
    relax : float
        Share of a step's least squares in what is projected (over-relaxation; Boyd et al. 2011, section 3.4.3).
    """
    compiled = pattern == "matrix" and _compiled(targets)
    return (_WholeMatrix if compiled else _AnyPattern)(targets, n_nonzero, start, pattern, relax)


class SplitState(abc.ABC):
    """Where ADMM is: of the split Z and the dual U only their sum V is held; what V keeps is Z, the rest is U.

    Attributes
    ----------
    moved : array (d_out, d_in)
        V.
    """

    def __init__(self, targets: Array, n_nonzero: int, start: Array, pattern: str, relax: float) -> None:
        self._targets, self._n_nonzero, self._pattern, self._relax = targets, n_nonzero, pattern, relax
        self._rho: float | None = None
        self.moved = start

    def step(self, inverses: Parts, rho: float) -> None:
        """One iteration with ``(H + rho I)^-1`` of every part of the rows, see `inverses`."""
        # a new penalty has the dual in other units
        self._step(inverses, rho, 1.0 if self._rho is None else self._rho / rho)
        self._rho = rho

    @abc.abstractmethod
    def support(self) -> Array:
        """Entries of V that are kept; of equal ones at the threshold perhaps some more than there is room for."""

    def follow(self, targets: Array, lengths: Parts) -> None:
        """Go on with other atoms: their targets, and what each atom's codes are multiplied by in every part."""
        self._targets = targets
        self.moved = over_parts(lengths, lambda own, moved: moved * own, self.moved)

    @abc.abstractmethod
    def _step(self, inverses: Parts, rho: float, shrink: float) -> None: ...


class _AnyPattern(SplitState):
    """For all patterns and arrays."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._mask = abs(self.moved) >= 0

    def support(self) -> Array:
        return self._mask

    def _step(self, inverses: Parts, rho: float, shrink: float) -> None:
        xp = array_namespace(self.moved)

        def move(inverse: Array, v: Array, kept: Array, b: Array) -> Array:
            split = xp.where(kept, v, 0.0)
            dual = shrink * (v - split)
            return self._relax * ((b + rho * (split - dual)) @ inverse) + (1 - self._relax) * split + dual

        def moved(inverse: Array, *rows: Array) -> Array:
            return over_rows(functools.partial(move, inverse), *rows)

        self.moved = over_parts(inverses, moved, self.moved, self._mask, self._targets)
        self._mask = best_entries(abs(self.moved), self._n_nonzero, self._pattern)


class _WholeMatrix(SplitState):
    """In float32 on a CPU, where entries of the whole matrix compete: compiled, a piece of the rows at a time."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._targets, self.moved = np.ascontiguousarray(self._targets), np.array(self.moved, order="C")
        self._threshold = np.float32(0)

    def support(self) -> Array:
        return abs(self.moved) >= self._threshold

    def _step(self, inverses: Parts, rho: float, shrink: float) -> None:
        from cospadi.solvers import _kernels

        rho, shrink, relax, threshold = map(np.float32, (rho, shrink, self._relax, self._threshold))

        def move(rows: slice, inverse: Array, piece: slice) -> Array:
            moved = self.moved[rows][piece].ravel()  # a view
            pulled = np.empty_like(self.moved[rows][piece])
            _kernels.admm_pull(moved, self._targets[rows][piece].ravel(), threshold, rho, shrink, pulled.ravel())
            _kernels.admm_move(moved, (pulled @ inverse).ravel(), threshold, shrink, relax)
            counts = np.zeros(_kernels.N_BINS, np.int64)
            _kernels.count_magnitudes(moved.view(np.uint32), counts)
            return counts

        counts = [
            one
            for rows, inverse in inverses
            for one in in_pieces(len(self.moved[rows]), functools.partial(move, rows, inverse))
        ]
        self._threshold = self._nth_largest(sum(counts))

    def _nth_largest(self, counts: Array) -> Any:
        """The magnitude of rank n, from the counts by upper bits."""
        from cospadi.solvers import _kernels

        if self._n_nonzero >= self.moved.size:
            return np.float32(0)
        if self._n_nonzero == 0:
            return np.float32(np.inf)
        from_above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_above, self._n_nonzero))
        which = len(counts) - 1 - place
        rank = self._n_nonzero - (int(from_above[place - 1]) if place else 0)  # within its bin, from above, from 1
        among = np.empty(int(counts[which]), np.uint32)
        _kernels.magnitudes_in_bin(self.moved.ravel().view(np.uint32), np.uint32(which), among)
        return np.partition(among, len(among) - rank)[len(among) - rank].view(np.float32)


def fit_values(gram: Array, targets: Array, codes: Array, n_steps: int) -> Array:
    """Values of codes (d_out, d_in) on their support by conjugate gradients, ``min tr(S^T H S) - 2 tr(S^T B)``."""
    from cospadi.solvers.least_squares import conjugate_gradients

    def fit(b: Array, c: Array) -> Array:
        return conjugate_gradients(gram, c, b - c @ gram, c != 0, n_steps)

    return over_rows(_fit_compiled(gram, n_steps) if _compiled(codes) else fit, targets, codes)


def values_of(metric: Any, targets: Array, codes: Array, n_steps: int) -> Array:
    """`fit_values` of every part."""
    return over_parts(metric.parts, lambda one, b, c: fit_values(one.gram, b, c, n_steps), targets, codes)


def _compiled(codes: Array) -> bool:
    return isinstance(codes, np.ndarray) and codes.dtype == np.float32


def _fit_compiled(gram: Array, n_steps: int) -> Callable[[Array, Array], Array]:
    """`least_squares.conjugate_gradients` for `fit_values`, between its products one pass over rows in the cache."""
    from cospadi.solvers import _kernels

    info = np.finfo(np.float32)
    least, tiny = 16 * info.eps, info.smallest_normal

    def fit(b: Array, c: Array) -> Array:
        codes = np.array(c, order="C")
        residual = np.where(codes != 0, b - codes @ gram, np.float32(0))
        direction, energy = residual.copy(), np.vecdot(residual, residual)
        for _ in range(n_steps):
            _kernels.conjugate_step(codes, residual, direction, direction @ gram, energy, least, tiny)
        return codes

    return fit


def _energy(metric: Any, targets: Array, codes: Array) -> float:
    """Squared error of codes, less that of none."""
    xp = array_namespace(codes)

    def energies(one: Scaled, b: Array, c: Array) -> Array:
        return over_rows(lambda b, c: row_dots(c, c @ one.gram - 2 * b), b, c)

    return float(xp.sum(xp.astype(over_parts(metric.parts, energies, targets, codes), xp.float64)))


def squared_error(gram: Array, rows: Array) -> float:
    """``tr(E^T H E)`` of differences E, a row an output."""
    xp = array_namespace(rows)
    return float(xp.sum(xp.astype(over_rows(lambda e: row_dots(e, e @ gram), rows), xp.float64)))


def error_of(metric: Any, rows: Array) -> float:
    """`squared_error` of all parts together."""
    return sum(squared_error(one.gram, rows[part]) for part, one in metric.parts)


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
