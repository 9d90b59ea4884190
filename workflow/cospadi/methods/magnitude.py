"""Magnitude pruning (Han et al. 2015): the largest weights stay as they are. No calibration data."""

from __future__ import annotations

from typing import Any

from cospadi.arrays import on_device
from cospadi.methods.single_weights import method
from cospadi.problem import Problem


def keep(problem: Problem, n_kept: int, pattern: str, device: str) -> tuple[Any, Any]:
    """The entries of largest magnitude."""
    from cospadi.solvers.entries import best_entries

    weight = on_device(problem.weight, device)
    return weight, best_entries(abs(weight).T, n_kept, pattern).T


METHOD = method(
    name="magnitude",
    summary="The largest weights stay, under a 1-bit mask (magnitude pruning); needs no calibration data.",
    keep=keep,
    solver="entries",
)
