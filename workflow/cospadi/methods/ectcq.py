"""Entropy-coded trellis-coded quantization (ours): a step an input, numbers along a trellis, as few bits as they need.

``trellis: false`` rounds each number for itself: what is left is one step an input in proportion to the inverse
Hessian's Cholesky diagonal, error feedback and an entropy coder (as WaterSIC, ICML 2026, publishes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization
from cospadi.methods import single_weights, sparsegpt
from cospadi.methods.base import Fit, Method, Problems, budget_faults
from cospadi.problem import Problem, Target, side_by_side
from cospadi.registry import option
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.work import Work

OPTIONS: dict[str, dict[str, Any]] = {
    "trellis": option(
        "boolean",
        "Numbers follow a trellis of 8 states; false: each is rounded for itself, for the same error at a tenth of a "
        "bit more, or two.",
        default=True,
    ),
    "damping": sparsegpt.OPTIONS["damping"],
}

# More bits a weight are left: numbers so large have no place in a table. Fewer say nothing
MOST_BITS, LEAST_BITS = 6.5, 0.5
# Measured on 576 x 576 and 576 x 1536 (2 cores AMD EPYC Milan), a pass of one core, and what a search needs mostly
_SECONDS_A_NUMBER, _PASSES = 1.5e-7, 4


def fit(
    problem: Problem,
    nbytes: int,
    how: Fit,
    *,
    trellis: bool = True,
    damping: float = OPTIONS["damping"]["default"],
) -> list[Factorization]:
    """Numbers and steps of least error within the bytes (`solvers.entropy`), on the CPU."""
    from cospadi.solvers import entropy

    codec = CODECS["ectcq" if trellis else "ec"]
    gram = np.asarray(problem.metric.gram, np.float64)
    found = entropy.quantize(problem.weight, gram, codec, room(problem.shape, nbytes), damping=damping, log=how.log)
    diagnostics = {"solver": codec.name, "n_passes": found.n_passes, "bits": 8 * found.nbytes / found.codes.size}
    return [
        Factorization(
            None,
            found.codes,
            support="dense",
            **{**how.storage, "value_codec": codec.name},
            scales=found.steps,
            settled=True,
            diagnostics=diagnostics,
        )
    ]


def room(shape: tuple[int, int], nbytes: int) -> int:
    """Bytes that will be used of those that there are.

    Raises
    ------
    ConfigError
        If they are too few to say anything.
    """
    n = shape[0] * shape[1]
    least = round(LEAST_BITS * n / 8) + 2 * shape[0] + shape[1]
    if nbytes < least:
        raise ConfigError([f"{nbytes} bytes for a {shape[0]}x{shape[1]} matrix: {least} is the least"])
    return min(nbytes, round(MOST_BITS * n / 8))


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: passes over its numbers, each with a product to feed errors forward."""
    d_in, d_out = side_by_side([target.shape for target in targets])
    found = single_weights.work(targets, products=_PASSES, inversions=2)
    seconds = _PASSES * d_in * d_out * _SECONDS_A_NUMBER
    return replace(found, core=found.core + seconds, gpu=found.gpu + seconds)


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Ratios that leave less than the least."""
    yield from budget_faults(settings, problems, room)


METHOD = Method(
    name="ectcq",
    summary="One step an input, numbers along a trellis, entropy-coded to the bytes that the ratio leaves (ours).",
    options=OPTIONS,
    factors="entropy-coded integers",
    fit=fit,
    work=work,
    modules=lambda options: [
        __name__,
        *("cospadi.solvers.entropy", "cospadi.solvers.sparsegpt"),
        *("cospadi.runtime.cospadi_entropy", "cospadi.runtime.cospadi_entropy_source"),
    ],
    faults=faults,
    own_codec=True,
    scales_columns=False,  # one step serves all columns of an input
)
