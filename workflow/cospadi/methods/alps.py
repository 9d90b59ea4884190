"""ALPS (Meng et al., NeurIPS 2024): the support by ADMM from the dense weight, the values by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cospadi.arrays import on_device, to_numpy
from cospadi.factorization import Factorization
from cospadi.methods import single_weights
from cospadi.methods.base import Method
from cospadi.methods.single_weights import PATTERN, n_entries, scaled
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
    """ADMM with the paper's rising penalty, then ten conjugate gradient steps on the support it settles on.

    Two deviations: the ridge on the scaled Gram is `admm.RIDGE`, and the conjugate gradients have no preconditioner,
    since the Gram has ones on its diagonal already.
    """
    from cospadi.solvers import admm

    metric = scaled(problem.metric, device)
    weight = on_device(problem.weight, device)
    rows = admm.as_dtype((weight * metric.scale[:, None]).T, metric.gram)
    targets = rows @ metric.gram
    n_kept = n_entries(problem.shape, nbytes, pattern=pattern, **storage)
    found = admm.support_by_admm(metric, targets, n_kept, rows, admm.SCHEDULES["adaptive"], pattern)
    found = admm.fit_values(metric.gram, targets, found, 10)
    mask = to_numpy(found).T != 0
    values = (to_numpy(found).T / to_numpy(metric.scale)[:, None]).astype(np.float32)
    diagnostics = {"solver": "admm", "n_nonzero": int(mask.sum())}
    return problem.split(single_weights.kept(values, mask, pattern, storage, **diagnostics))


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: a product with an inverse an iteration, a new inverse every three."""
    return single_weights.work(targets, nbytes, products=80, inversions=25)


METHOD = Method(
    name="alps",
    summary="Support by ADMM from the dense weight, values by conjugate gradients, under a 1-bit mask (ALPS).",
    options={"pattern": PATTERN},
    factors="single weights",
    fit=fit,
    work=work,
    modules=lambda options: [__name__, "cospadi.solvers.admm"],
    faults=single_weights.faults,
)
