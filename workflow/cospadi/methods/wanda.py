"""Wanda (Sun et al., ICLR 2024): the weights stay whose size times that of their input is largest."""

from __future__ import annotations

from typing import Any

import numpy as np

from cospadi.arrays import on_device
from cospadi.methods import global_threshold
from cospadi.methods.single_weights import PATTERN, method
from cospadi.problem import Problem


def keep(problem: Problem, n_kept: int, pattern: str, device: str) -> tuple[Any, Any]:
    """Score ``|w_ij| ||x_i||`` (Eq. 1 of the paper), as many in every output as there; values stay as they are."""
    from cospadi.solvers.entries import best_entries

    norms = np.sqrt(np.maximum(problem.metric.diagonal, 0))[:, None]
    scores = on_device(np.ascontiguousarray((np.abs(problem.weight) * norms).T), device)
    return problem.weight, best_entries(scores, n_kept, pattern).T


METHOD = method(
    name="wanda",
    summary="The weights stay whose size times their input's norm is largest, under a 1-bit mask (Wanda).",
    options={"pattern": {**PATTERN, "default": "column"}},
    keep=keep,
    solver="entries",
    allocation=global_threshold,
)
