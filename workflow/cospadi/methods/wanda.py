"""Wanda (Sun et al., ICLR 2024): the weights stay whose size times that of their input is largest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cospadi.arrays import on_device
from cospadi.factorization import Factorization
from cospadi.methods import single_weights
from cospadi.methods.base import Method
from cospadi.methods.single_weights import PATTERN, n_entries
from cospadi.problem import Problem, Target
from cospadi.work import Work

OPTIONS: dict[str, dict[str, Any]] = {"pattern": {**PATTERN, "default": "column"}}


def fit(
    problem: Problem,
    nbytes: int,
    *,
    storage: Mapping[str, Any],
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
    warm: Factorization | None = None,
    pattern: str = OPTIONS["pattern"]["default"],
) -> list[Factorization]:
    """Score ``|w_ij| ||x_i||`` (Eq. 1 of the paper), as many in every output as there; values stay as they are."""
    from cospadi.solvers.entries import best_entries

    weight = problem.weight
    norms = np.sqrt(np.maximum(problem.metric.diagonal, 0))[:, None]
    scores = on_device(np.ascontiguousarray((np.abs(weight) * norms).T), device)
    n_kept = n_entries(problem.shape, nbytes, pattern=pattern, **storage)
    mask = best_entries(scores, n_kept, pattern).T
    return problem.split(single_weights.kept(weight, mask, pattern, storage, n_nonzero=n_kept))


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: sorting, and the error of the result."""
    return single_weights.work(targets, nbytes)


METHOD = Method(
    name="wanda",
    summary="The weights stay whose size times their input's norm is largest, under a 1-bit mask (Wanda).",
    options=OPTIONS,
    factors="single weights",
    fit=fit,
    work=work,
    modules=lambda options: [__name__, "cospadi.solvers.entries"],
    faults=single_weights.faults,
)
