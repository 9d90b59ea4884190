"""Single weights in the metric of the activations, one budget for the whole problem: `hybrid` without learned atoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cospadi.formats.factorization import Factorization
from cospadi.methods import hybrid
from cospadi.methods.base import Fit, Method
from cospadi.problem import Problem, Target
from cospadi.work import Work

OPTIONS = {name: schema for name, schema in hybrid.OPTIONS.items() if name not in ("atoms", "max_iter")}


def fit(problem: Problem, nbytes: int, how: Fit, **options: Any) -> list[Factorization]:
    """Support by ADMM from SparseGPT's, then least squares on it (`hybrid.fit`)."""
    return hybrid.fit(problem, nbytes, how, atoms=0, **options)


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: `hybrid`'s without alternations."""
    return hybrid.work(targets, nbytes, {**options, "atoms": 0, "max_iter": 0}, storage)


METHOD = Method(
    name="sparse",
    summary="Single weights under a 1-bit mask, support by ADMM from SparseGPT's, values by least squares (ours).",
    options=OPTIONS,
    factors="single weights",
    fit=fit,
    work=work,
    modules=lambda options: [__name__, *hybrid.METHOD.modules(options)],
    faults=lambda settings, problems=(): hybrid.faults({**settings, "atoms": 0}, problems),
    allocator=hybrid.METHOD.allocator,
)
