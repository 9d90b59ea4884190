"""SparseGPT (Frantar and Alistarh, ICML 2023): weights leave input after input, the others make up for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cospadi.factorization import Factorization
from cospadi.methods import single_weights
from cospadi.methods.base import Method
from cospadi.methods.single_weights import PATTERN, inputs_of, n_entries
from cospadi.problem import Problem, Target
from cospadi.work import Work

OPTIONS: dict[str, dict[str, Any]] = {
    "pattern": PATTERN,
    "damping": {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0.01,
        "description": "Ridge on the Gram, as a share of its mean diagonal; 0.01 in the paper's code.",
    },
}


def fit(
    problem: Problem,
    nbytes: int,
    *,
    storage: Mapping[str, Any],
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
    warm: Factorization | None = None,
    pattern: str = PATTERN["default"],
    damping: float = OPTIONS["damping"]["default"],
) -> list[Factorization]:
    """The optimal brain surgeon's step for each input in turn (`solvers.sparsegpt`), in float64."""
    from cospadi.solvers import sparsegpt

    weight, gram = inputs_of(problem, device)
    n_kept = n_entries(problem.shape, nbytes, pattern=pattern, **storage)
    pruned, mask = sparsegpt.prune(weight, gram, n_kept, pattern=pattern, damping=damping)
    return problem.split(single_weights.kept(pruned, mask, pattern, storage, solver="sparsegpt", n_nonzero=n_kept))


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: an inverse, and one pass over the inputs."""
    return single_weights.work(targets, nbytes, products=2, inversions=2)


METHOD = Method(
    name="sparsegpt",
    summary="Weights leave input after input and the others make up for them, under a 1-bit mask (SparseGPT).",
    options=OPTIONS,
    factors="single weights",
    fit=fit,
    work=work,
    modules=lambda options: [__name__, "cospadi.solvers.sparsegpt"],
    faults=single_weights.faults,
)
