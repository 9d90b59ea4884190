"""Magnitude pruning (Han et al. 2015): the largest weights stay as they are. No calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cospadi.arrays import on_device
from cospadi.factorization import Factorization
from cospadi.methods import single_weights
from cospadi.methods.base import Method
from cospadi.methods.single_weights import PATTERN, n_entries
from cospadi.problem import Problem, Target
from cospadi.work import Work


def fit(
    problem: Problem,
    nbytes: int,
    *,
    storage: Mapping[str, Any],
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
    warm: Factorization | None = None,
    pattern: str = PATTERN["default"],
) -> list[Factorization]:
    """The entries of largest magnitude, within `nbytes`."""
    from cospadi.solvers.entries import best_entries

    weight = on_device(problem.weight, device)
    n_kept = n_entries(problem.shape, nbytes, pattern=pattern, **storage)
    mask = best_entries(abs(weight).T, n_kept, pattern).T
    return problem.split(single_weights.kept(weight, mask, pattern, storage, n_nonzero=n_kept))


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: sorting, and the error of the result."""
    return single_weights.work(targets, nbytes)


METHOD = Method(
    name="magnitude",
    summary="The largest weights stay, under a 1-bit mask (magnitude pruning); needs no calibration data.",
    options={"pattern": PATTERN},
    factors="single weights",
    fit=fit,
    work=work,
    modules=lambda options: [__name__, "cospadi.solvers.entries"],
    faults=single_weights.faults,
)
