"""ALPS (Meng et al., NeurIPS 2024): the support by ADMM from the dense weight, the values by conjugate gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from cospadi.arrays import on_device, to_numpy
from cospadi.methods import global_threshold
from cospadi.methods.single_weights import method, scaled
from cospadi.problem import Problem


def keep(problem: Problem, n_kept: int, pattern: str, device: str) -> tuple[Any, Any]:
    """ADMM with the paper's rising penalty, then ten conjugate gradient steps on the support it settles on.

    Two deviations: the ridge on the scaled Gram is `admm.RIDGE`, and the conjugate gradients have no preconditioner,
    since the Gram has ones on its diagonal already.
    """
    from cospadi.solvers import admm

    metric = scaled(problem.metric, device)
    weight = on_device(problem.weight, device)
    rows = admm.as_dtype((weight * metric.scale[:, None]).T, metric.gram)
    targets = rows @ metric.gram
    found = admm.support_by_admm(metric, targets, n_kept, rows, admm.SCHEDULES["adaptive"], pattern)
    found = to_numpy(admm.fit_values(metric.gram, targets, found, 10)).T
    return (found / to_numpy(metric.scale)[:, None]).astype(np.float32), found != 0


METHOD = method(
    name="alps",
    summary="Support by ADMM from the dense weight, values by conjugate gradients, under a 1-bit mask (ALPS).",
    keep=keep,
    solver="admm",
    products=80,  # with an inverse, one an iteration
    inversions=25,  # a new one every three iterations
    squares=3,  # the scaled Gram in both precisions, an inverse in one
    compiled=True,
    allocation=global_threshold,
)
