"""SparseGPT (Frantar and Alistarh, ICML 2023): weights leave input after input, the others make up for them."""

from __future__ import annotations

from typing import Any

from cospadi.methods import global_threshold
from cospadi.methods.single_weights import PATTERN, inputs_of, method
from cospadi.problem import Problem
from cospadi.registry import option

OPTIONS: dict[str, dict[str, Any]] = {
    "pattern": PATTERN,
    "damping": option(
        "number",
        "Ridge on the Gram, as a share of its mean diagonal; 0.01 in the paper's code.",
        minimum=0,
        maximum=1,
        default=0.01,
    ),
}


def keep(problem: Problem, n_kept: int, pattern: str, device: str, *, damping: float) -> tuple[Any, Any]:
    """The optimal brain surgeon's step for each input in turn (`solvers.sparsegpt`), in float64."""
    from cospadi.solvers import sparsegpt

    weight, gram = inputs_of(problem, device)
    return sparsegpt.prune(weight, gram, n_kept, pattern=pattern, damping=damping)


METHOD = method(
    name="sparsegpt",
    summary="Weights leave input after input and the others make up for them, under a 1-bit mask (SparseGPT).",
    options=OPTIONS,
    keep=keep,
    solver="sparsegpt",
    products=2,  # one pass over the inputs
    inversions=2,
    allocation=global_threshold,
)
