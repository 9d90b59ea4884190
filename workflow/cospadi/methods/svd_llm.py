"""SVD-LLM (ICLR 2025), its whitening step: the best rank-r product in the metric of the activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import low_rank
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import storage_of
from cospadi.gram import EigenWhitening, Whitening
from cospadi.methods.base import (
    SHARING_OPTIONS,
    WHITENING_OPTIONS,
    Fit,
    Method,
    Problems,
    budget_faults,
    sharing_faults,
    work_of,
)
from cospadi.problem import Problem, Target, side_by_side
from cospadi.work import Work


def fit(problem: Problem, nbytes: int, how: Fit, *, whiten: bool = True, eta: float = 0.0) -> list[Factorization]:
    """Truncated SVD ``L W ~ U_r Sigma_r V_r^T``; ``D = L^{-1} U_r``, ``S = U_r^T L W``."""
    rank = low_rank(*problem.shape, nbytes=nbytes, **how.storage)
    whitening = problem.metric.whitening(whiten=whiten, eta=eta)
    return problem.split(truncated(problem.weight, rank, whitening, storage=how.storage, device=how.device))


def truncated(
    weight: Any, rank: int, whitening: Whitening | EigenWhitening, *, storage: Mapping[str, Any], device: str
) -> Factorization:
    """The best product of rank `rank` in a metric."""
    from cospadi.solvers import svd

    solution = svd.truncated(on_device(whitening.whiten(weight), device), rank)
    return Factorization(
        whitening.unwhiten(to_numpy(solution.dictionary)),
        to_numpy(solution.codes),
        support="dense",
        **storage,
        diagnostics={
            "solver": "svd",
            "n_atoms": rank,
            "n_nonzero_coefs": rank,
            "shift": whitening.shift,
            "eta": whitening.eta,
            "history": solution.history,
        },
    )


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: eigenvectors, and the product of the weight with them."""
    d, n = side_by_side([target.shape for target in targets])
    rank = low_rank(d, n, nbytes=nbytes, **storage)
    return work_of(d, n, rank, 10 * min(d, n) ** 3 + 2 * d * n * rank)


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Sharing that cannot be, and ratios that leave no rank."""
    storage = storage_of(settings.get("codes", {}))
    yield from sharing_faults(problems)
    yield from budget_faults(settings, problems, lambda shape, nbytes: low_rank(*shape, nbytes=nbytes, **storage))


METHOD = Method(
    name="svd_llm",
    summary="Truncated SVD in the metric of the activations (SVD-LLM); whiten: false is plain SVD.",
    options={**WHITENING_OPTIONS, **SHARING_OPTIONS},
    factors="low rank",
    fit=fit,
    work=work,
    modules=lambda options: [__name__, "cospadi.solvers.svd"],
    faults=faults,
)
