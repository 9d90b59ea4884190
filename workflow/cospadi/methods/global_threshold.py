"""One threshold for the single weights of a whole model: what stays of each matrix when the least missed weights go.

Weights of all matrices are compared by what their loss costs in nats (`solvers.saliency`, times the price of the
matrix's outputs). That says how many weights each matrix keeps, and not which: methods place them themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cospadi.allocation import Profile
from cospadi.arrays import on_device, to_numpy
from cospadi.budget import as_is_nbytes, dense_nbytes, nbytes_left
from cospadi.methods import single_weights
from cospadi.methods.base import GLOBAL, UNIFORM, Allocator, allocation_option
from cospadi.methods.single_weights import entries_nbytes, gram_on, n_entries
from cospadi.problem import Problem, Target, side_by_side
from cospadi.work import Work

# No matrix's share of weights that stay is further from the mean's
MOST_FROM_MEAN = 0.3
# Saliencies are counted in steps of a sixty-fourth of a factor of two, one percent
_STEPS = 64
_BISECTIONS = 60

OPTION = allocation_option(
    GLOBAL,
    "one threshold for the weights of the whole model, by what losing each costs (metric gradients); no matrix's share "
    f"of weights is more than {MOST_FROM_MEAN} from the mean, and one that would keep nearly all stays as it is",
    default=UNIFORM,
)


def profile(
    problem: Problem, nbytes: int, *, storage: Mapping[str, Any], device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """How many weights have which saliency: ``counts`` in steps from ``lowest`` on, `_STEPS` to a factor of two."""
    from cospadi.solvers.saliency import saliencies

    logarithms = []
    for weight, matrix, price in zip(problem.weights, problem.matrices, problem.prices, strict=True):
        values = to_numpy(saliencies(on_device(weight, device), gram_on(matrix.metric, device)))
        logarithms.append(np.log2(price * values[values > 0], dtype=np.float64))
    steps = np.floor(_STEPS * np.concatenate(logarithms)).astype(np.int64)
    lowest = int(steps.min())
    return {"lowest": lowest, "counts": np.bincount(steps - lowest).tolist()}


def share(
    profiles: Sequence[Profile], nbytes: int, *, storage: Mapping[str, Any], pattern: str, **options: Any
) -> list[int | None]:
    """Bytes by the weights of each problem that are above one threshold."""
    problems = [_Problem(one, storage, pattern) for one in profiles]
    left = nbytes / nbytes_left([shape for one in profiles for shape in one.shapes], 0)
    budgets = [math.floor(left * dense_nbytes(*one.shape)) for one in problems]
    uniform = [
        n_entries(one.shape, own, pattern=pattern, **storage) for one, own in zip(problems, budgets, strict=True)
    ]
    mean = sum(uniform) / sum(one.size for one in problems)

    def at(step: float) -> list[int]:
        return [one.kept(step, mean) for one in problems]

    def taken(kept: Sequence[int]) -> int:
        return sum(one.nbytes(n) for one, n in zip(problems, kept, strict=True))

    low = float(min(one.lowest for one in problems))
    high = float(max(one.lowest + len(one.counts) for one in problems))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if taken(at(middle)) <= nbytes else (middle, high)
    shares = [one.nbytes(n) for one, n in zip(problems, at(high), strict=True)]
    for index, one in enumerate(problems):  # what is left over is less than a step of all of them
        if shares[index] < one.as_is:
            more = min(nbytes - sum(shares), one.as_is - 1 - shares[index])
            shares[index] += more
    return [None if own >= one.as_is else own for own, one in zip(shares, problems, strict=True)]


class _Problem:
    """Counts of a problem's saliencies, and the bytes of what is above a threshold."""

    def __init__(self, profile: Profile, storage: Mapping[str, Any], pattern: str) -> None:
        self.shape = side_by_side(profile.shapes)
        self.size = math.prod(self.shape)
        self.as_is = as_is_nbytes(profile.shapes, storage)
        self.lowest, self.counts = profile.figures["lowest"], np.asarray(profile.figures["counts"])
        self._above = np.concatenate([np.cumsum(self.counts[::-1])[::-1], [0]])  # from each step's beginning on
        self._storage, self._pattern = storage, pattern

    def kept(self, step: float, mean: float) -> int:
        """Weights above a threshold, in steps; those within a step are taken to lie evenly."""
        above = np.interp(step - self.lowest, np.arange(len(self._above)), self._above)
        least, most = (min(1.0, max(0.0, mean + far)) * self.size for far in (-MOST_FROM_MEAN, MOST_FROM_MEAN))
        return max(1, math.floor(min(max(above, least), most)))

    def nbytes(self, n_kept: int) -> int:
        """Bytes of so many weights and their mask, or of all of them where that is not more."""
        return min(self.as_is, entries_nbytes(self.shape, n_kept, pattern=self._pattern, **self._storage))


def modules(options: Mapping[str, Any]) -> list[str]:
    """The modules that decide the allocation, where it is not uniform."""
    return [] if options.get("allocation") != GLOBAL else [__name__, "cospadi.solvers.saliency"]


def _profiling(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    return single_weights.work(targets, inversions=len(targets))


ALLOCATOR = Allocator(profile=profile, share=share, work=_profiling)
