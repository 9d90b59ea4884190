"""GeoPair (2026): a dictionary for two matrices of neighbouring layers, exact in the metrics of both.

The metric of each is regularised, ``G + eta I``; the start are the leading directions of both weights side by side, not
whitened; rho is 2.5.

What differs from the paper: a matrix is paired with the same projection of the next layer, which the paper has as the
variant "consecutive" (with its matching by distance, a dictionary may serve any two matrices with as many inputs, and
accuracy is a point higher in its tables). eta is a share of the mean diagonal; the number of rounds is not known to us.
Where there are more atoms than directions to start from, those of the residual follow. Bytes have the mask counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import sparse_shape
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import storage_of
from cospadi.methods.base import (
    SHARING_OPTIONS,
    TIME_OPTIONS,
    WHITENING_OPTIONS,
    Fit,
    Method,
    Problems,
    budget_faults,
    sharing_faults,
    work_of,
)
from cospadi.problem import GRADIENTS, Metric, Problem, Target, side_by_side
from cospadi.registry import option, with_defaults
from cospadi.solvers.starts import dictionary_start
from cospadi.structure import PROJECTIONS, SITES
from cospadi.work import FACTOR, PRODUCT, Cost, Work

ROUNDS = 20
_DEFAULTS = {"group_size": 2, "share": list(PROJECTIONS), "eta": 1e-3}

OPTIONS: dict[str, dict[str, Any]] = {
    "rho": option("number", "Atoms over nonzeros a column, k / s.", minimum=1, maximum=16, default=2.5),
    **with_defaults({**WHITENING_OPTIONS, **SHARING_OPTIONS}, _DEFAULTS),
    "max_iter": option("integer", "Rounds of codes and dictionary.", minimum=1, maximum=1000, default=ROUNDS),
    **TIME_OPTIONS,
}


def fit(
    problem: Problem,
    nbytes: int,
    how: Fit,
    *,
    rho: float = 2.5,
    whiten: bool = True,
    eta: float = 1e-3,
    max_iter: int = ROUNDS,
    max_seconds: float | None = None,
) -> list[Factorization]:
    """``min sum_l ||L_l (W_l - D S_l)||_F^2``, the dictionary by a Sylvester equation.

    The problem has two metrics at most; matrices with the same inputs stand side by side.
    """
    from cospadi.solvers import sylvester

    shape = sparse_shape(*problem.shape, nbytes=nbytes, rho=rho, **how.storage)
    members: dict[Metric, list[int]] = {}
    for index, metric in enumerate(problem.metrics):
        members.setdefault(metric, []).append(index)
    whitenings = [metric.whitening(whiten=whiten, eta=eta) for metric in members]
    weight = problem.weight
    start = dictionary_start(
        "spectral_original",
        on_device(weight, how.device),
        shape.n_atoms,
        shape.n_nonzero_coefs,
        weight=weight,
        factor=np.eye(len(weight)),
    )
    solution = sylvester.learn(
        [
            on_device(np.concatenate([problem.weights[index] for index in indices], axis=1), how.device)
            for indices in members.values()
        ],
        [whitening.factor.T @ whitening.factor for whitening in whitenings],
        n_nonzero_coefs=shape.n_nonzero_coefs,
        dictionary_init=start,
        max_iter=max_iter,
        max_seconds=max_seconds,
        log=how.log,
    )
    dictionary = to_numpy(solution.dictionary)
    found: dict[int, Factorization] = {}
    for indices, codes, whitening in zip(members.values(), solution.codes, whitenings, strict=True):
        edges = np.cumsum([problem.shapes[index][1] for index in indices])[:-1]
        for index, part in zip(indices, np.split(to_numpy(codes), edges, axis=1), strict=True):
            found[index] = Factorization(
                dictionary,
                np.ascontiguousarray(part),
                support="bitmask",
                **how.storage,
                diagnostics={
                    "solver": "sylvester",
                    "n_atoms": shape.n_atoms,
                    "n_nonzero_coefs": shape.n_nonzero_coefs,
                    "shift": whitening.shift,
                    "eta": whitening.eta,
                    "history": solution.history,
                },
            )
    return problem.sharing([found[index] for index in range(len(problem.matrices))])


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: two pursuits a round with ten steps of conjugate gradients, and eigenvectors for Sylvester."""
    d, n = side_by_side([target.shape for target in targets])
    k = sparse_shape(d, n, nbytes=nbytes, rho=options.get("rho", 2.5), **storage).n_atoms
    a_round = Cost({PRODUCT: 2 * 2 * n * k * k * 12 + 6 * n * k * d, FACTOR: 14 * k**3 + 4 * k * d * (k + d)})
    return work_of(d, n, k, 10 * min(d, n) ** 3 + 14 * d**3, more=a_round * options.get("max_iter", ROUNDS))


def modules(options: Mapping[str, Any]) -> list[str]:
    """This module and the solver."""
    return [__name__, "cospadi.solvers.sylvester"]


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """More than two metrics, sharing that cannot be, and ratios that leave no atom."""
    storage = storage_of(settings.get("codes", {}))
    rho = settings.get("rho", 2.5)
    if settings.get("group_size", 1) > 2:
        yield f"group_size: {settings['group_size']}; a Sylvester equation is for two layers at most"
    alone = settings.get("metric") == GRADIENTS  # a metric each
    for problem in problems:
        inputs = [(projection,) for projection in PROJECTIONS] if alone else SITES
        sites = {(one.layer, site) for one in problem for site in inputs if one.projection in site}
        if len(sites) > 2:
            names = ", ".join(dict.fromkeys(one.projection for one in problem))
            which = f" with metric {GRADIENTS}" if alone else ""
            yield f"share_within: {names} have {len(sites)} metrics{which}; a Sylvester equation is for two at most"
    yield from sharing_faults(problems)
    yield from budget_faults(
        settings, problems, lambda shape, nbytes: sparse_shape(*shape, nbytes=nbytes, rho=rho, **storage)
    )


METHOD = Method(
    name="geopair",
    summary="One dictionary for a projection of two layers, exact in the metrics of both (GeoPair).",
    options=OPTIONS,
    factors="sparse codes",
    fit=fit,
    work=work,
    modules=modules,
    faults=faults,
)
