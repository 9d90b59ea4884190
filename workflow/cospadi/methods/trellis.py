"""Trellis-coded quantization of 2, 3 or 4 bits (ours): the sister of `ectcq` that stays compressed in memory.

A bitshift trellis with a computed code, as QTIP has it (Tseng et al., NeurIPS 2024), learned with error feedback in the
metric and scales of rows and columns instead of a random rotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cospadi.formats.factorization import Factorization
from cospadi.methods import few_bits, single_weights, sparsegpt
from cospadi.methods.base import Fit, Method, Problems, budget_faults, trained_by
from cospadi.problem import Problem, Target
from cospadi.registry import option
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.runtime.cospadi_trellis import Trellis
from cospadi.work import Work

OPTIONS: dict[str, dict[str, Any]] = {
    "sweeps": option(
        "integer",
        "How often every input is coded again, against what all others leave to it: each takes as long as the first "
        "time, and lowers the error by up to 3 %.",
        minimum=0,
        maximum=10,
        default=1,
    ),
    "damping": sparsegpt.OPTIONS["damping"],
}

# Measured on 576 x 576 and 576 x 1536 (2 cores AMD EPYC Milan, AVX2), a sweep of one core
_SECONDS_A_NUMBER = 1.3e-6


def fit(
    problem: Problem,
    nbytes: int,
    how: Fit,
    *,
    sweeps: int = OPTIONS["sweeps"]["default"],
    damping: float = OPTIONS["damping"]["default"],
) -> list[Factorization]:
    """The most bits that fit, along the best paths (`solvers.trellis`), on the CPU."""
    from cospadi.solvers import trellis

    codec = most_bits(problem.shape, nbytes)
    gram = np.asarray(problem.metric.gram, np.float64)
    found = trellis.quantize(problem.weight, gram, codec, sweeps=sweeps, damping=damping, log=how.log)
    return [few_bits.coded(found.codes, found.scales, how.storage, codec.name, "trellis")]


def most_bits(shape: tuple[int, int], nbytes: int) -> Trellis:
    """The codec of the most bits a weight that fits in `nbytes`, scales counted."""
    codecs = [codec for codec in CODECS.values() if isinstance(codec, Trellis)]
    return few_bits.most_bits(codecs, shape, nbytes, lambda codec: codec.shape_of_codes(shape[::-1], {})[0])


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: the first time and sweeps, each with two products."""
    times = 1 + options["sweeps"]
    seconds = times * _SECONDS_A_NUMBER
    return single_weights.work(targets, products=3 * times, inversions=2, squares=5, seconds_a_weight=seconds)


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Ratios that leave less than the fewest bits take, and training of what is all decided."""
    for key in trained_by(settings):
        yield f"{key}: paths and scales of a trellis are decided together, nothing is left to train; set it to null"
    yield from budget_faults(settings, problems, most_bits)


METHOD = Method(
    name="trellis",
    summary="2, 3 or 4 bits a weight along a trellis, the most that the ratio leaves, never unpacked (ours).",
    options=OPTIONS,
    factors="trellis-coded values",
    fit=fit,
    work=work,
    modules=lambda options: [
        __name__,
        *("cospadi.solvers.trellis", "cospadi.solvers.sparsegpt", "cospadi.runtime.cospadi_trellis"),
    ],
    faults=faults,
    own_codec=True,
)
