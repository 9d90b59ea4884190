"""EntQuant (Putzky et al., ICML 2026): float8 numbers of little entropy under a scale an output, without data.

The paper codes the bytes of float8 by one table; here the tables of `ectcq` code them, which know rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cospadi.formats.factorization import Factorization
from cospadi.methods import ectcq, single_weights
from cospadi.methods.base import Fit, Method, Problems, budget_faults
from cospadi.problem import Problem
from cospadi.runtime.cospadi_registry import CODECS

_CODEC = "ec_scaled"
# Measured on 576 x 576 and 576 x 1536 (2 cores AMD EPYC Milan, AVX2): all scales that are tried, and a search mostly
_SECONDS_A_NUMBER = 6e-7


def fit(problem: Problem, nbytes: int, how: Fit) -> list[Factorization]:
    """Numbers and scales of least cost within the bytes (`solvers.float8`), on the CPU."""
    from cospadi.solvers import float8

    found = float8.quantize(problem.weight, CODECS[_CODEC], room(problem.shape, nbytes), log=how.log)
    return [ectcq.coded(found, {**how.storage, "value_codec": _CODEC, "block_size": None}, "float8")]


def room(shape: tuple[int, int], nbytes: int) -> int:
    """`ectcq.room`, which has no scales of the outputs."""
    scales = 2 * shape[1]
    return ectcq.room(shape, nbytes - scales) + scales


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Ratios that leave less than the least."""
    yield from budget_faults(settings, problems, room)


METHOD = Method(
    name="entquant",
    summary="Float8 under a scale an output, entropy-coded to the bytes that the ratio leaves; no data (EntQuant).",
    options={},
    factors="entropy-coded float8",
    fit=fit,
    work=lambda targets, nbytes, options, storage: single_weights.work(targets, seconds_a_weight=_SECONDS_A_NUMBER),
    modules=lambda options: [
        *(__name__, ectcq.__name__, "cospadi.solvers.float8", "cospadi.solvers.entropy"),
        *("cospadi.runtime.cospadi_entropy", "cospadi.runtime.cospadi_entropy_source"),
    ],
    faults=faults,
    own_codec=True,
    decoded=True,
)
