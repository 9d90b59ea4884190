"""Rounding to nearest: every weight to an integer of a few bits under the scale of its block, without data.

With ``scale_inputs`` it is AWQ (Lin et al., MLSys 2024), which looks at how active each input is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.formats.factorization import Factorization
from cospadi.methods import few_bits, single_weights
from cospadi.methods.base import Fit, Method
from cospadi.problem import Problem


def fit(
    problem: Problem, nbytes: int, how: Fit, *, symmetric: bool = True, scale_inputs: bool = False
) -> list[Factorization]:
    """The most bits that fit, each block under the scale of least squared error."""
    codec = few_bits.grid(problem.shape, nbytes, symmetric=symmetric, scale_inputs=scale_inputs, **how.storage)

    def rounded(weight: Any, gram: Any = None) -> Factorization:
        exact = np.ascontiguousarray(to_numpy(weight), np.float32)
        exact = Factorization(None, exact, support="dense", **{**how.storage, "value_codec": codec})
        return replace(exact.quantized(), settled=True, diagnostics={"solver": "rtn", "codec": codec})

    return [few_bits.scaled(problem, "cpu", rounded) if scale_inputs else rounded(problem.weight)]


METHOD = Method(
    name="rtn",
    summary="Every weight rounded to an integer of 8, 6, 4, 3 or 2 bits: the most that the ratio leaves.",
    options=few_bits.OPTIONS,
    factors="integers",
    fit=fit,
    work=lambda targets, nbytes, options, storage: single_weights.work(
        targets, products=2 * few_bits.tries(options) - 1
    ),
    modules=lambda options: [__name__, *few_bits.modules(options)],
    faults=few_bits.faults,
    own_codec=True,
)
