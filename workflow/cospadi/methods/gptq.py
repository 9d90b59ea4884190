"""GPTQ (Frantar et al., ICLR 2023): weights are rounded input after input, the others make up for them."""

from __future__ import annotations

from typing import Any

from cospadi.formats.factorization import Factorization
from cospadi.methods import few_bits, single_weights, sparsegpt
from cospadi.methods.base import Fit, Method
from cospadi.problem import Problem
from cospadi.registry import option

OPTIONS: dict[str, dict[str, Any]] = {
    **few_bits.OPTIONS,
    "act_order": option(
        "boolean",
        "Round the inputs that are most active first, each block under the scale that it has at the start.",
        default=False,
    ),
    "damping": sparsegpt.OPTIONS["damping"],
}


def fit(
    problem: Problem,
    nbytes: int,
    how: Fit,
    *,
    symmetric: bool = True,
    scale_inputs: bool = False,
    act_order: bool = False,
    damping: float = OPTIONS["damping"]["default"],
) -> list[Factorization]:
    """The most bits that fit, rounded with error feedback (`solvers.gptq`), in float64."""
    from cospadi.solvers import gptq

    codec = few_bits.grid(problem.shape, nbytes, symmetric=symmetric, scale_inputs=scale_inputs, **how.storage)
    options = {"codec": codec, "block_size": how.storage["block_size"], "damping": damping, "act_order": act_order}

    def rounded(weight: Any, gram: Any) -> Factorization:
        codes, scales = gptq.quantize(weight, gram, **options)
        return few_bits.coded(codes, scales, how.storage, codec, "gptq")

    if scale_inputs:
        return [few_bits.scaled(problem, how.device, rounded)]
    return [rounded(*single_weights.inputs_of(problem, how.device))]


METHOD = Method(
    name="gptq",
    summary="Weights rounded to integers input after input, the others making up for them (GPTQ), as many bits as fit.",
    options=OPTIONS,
    factors="integers",
    fit=fit,
    work=lambda targets, nbytes, options, storage: single_weights.work(
        targets, products=3 * few_bits.tries(options) - 1, inversions=2 * few_bits.tries(options)
    ),
    modules=lambda options: [
        __name__,
        *few_bits.modules(options),
        *("cospadi.solvers.gptq", "cospadi.solvers.sparsegpt"),
    ],
    faults=few_bits.faults,
    own_codec=True,
)
