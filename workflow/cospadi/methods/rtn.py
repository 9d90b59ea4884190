"""Rounding to nearest: every weight to an integer of a few bits under the scale of its block, without data."""

from __future__ import annotations

from dataclasses import replace

from cospadi.formats.factorization import Factorization
from cospadi.methods import few_bits, single_weights
from cospadi.methods.base import Fit, Method
from cospadi.problem import Problem


def fit(problem: Problem, nbytes: int, how: Fit, *, symmetric: bool = True) -> list[Factorization]:
    """The most bits that fit, each block under the scale of least squared error."""
    codec = few_bits.grid(problem.shape, nbytes, symmetric=symmetric, **how.storage)
    exact = Factorization(None, problem.weight, support="dense", **{**how.storage, "value_codec": codec})
    diagnostics = {"solver": "rtn", "codec": codec}
    return [replace(exact.quantized(), settled=True, diagnostics=diagnostics)]


METHOD = Method(
    name="rtn",
    summary="Every weight rounded to an integer of 8, 6, 4, 3 or 2 bits: the most that the ratio leaves.",
    options=few_bits.OPTIONS,
    factors="integers",
    fit=fit,
    work=lambda targets, nbytes, options, storage: single_weights.work(targets, products=1),
    modules=lambda options: [__name__, few_bits.__name__, "cospadi.runtime.cospadi_integers"],
    faults=few_bits.faults,
    own_codec=True,
)
