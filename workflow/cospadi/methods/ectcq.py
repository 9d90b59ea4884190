"""Entropy-coded trellis-coded quantization (ours): a step an input, numbers along a trellis, as few bits as they need.

``states: 1`` rounds each number for itself: what is left is one step an input in proportion to the inverse
Hessian's Cholesky diagonal, error feedback and an entropy coder (as WaterSIC, ICML 2026, publishes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cospadi.allocation import Profile
from cospadi.errors import ConfigError
from cospadi.formats.factorization import Factorization
from cospadi.methods import single_weights, sparsegpt
from cospadi.methods.base import (
    GLOBAL,
    UNIFORM,
    Allocator,
    Fit,
    Method,
    Problems,
    allocation_option,
    budget_faults,
    trained_by,
)
from cospadi.problem import GRADIENTS, Problem, Target, side_by_side
from cospadi.registry import choice
from cospadi.runtime.cospadi_entropy import Entropy, n_states
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.work import Work

if TYPE_CHECKING:
    from cospadi.solvers import entropy

# More bits a weight are left, as nobody needs them. Fewer say nothing
MOST_BITS, LEAST_BITS = 12.0, 0.5
# Fewer bits are not given to a matrix where others have more: what is left of it says little
LEAST_ALLOTTED = 0.75
_BISECTIONS = 60
_FAR = 60.0
# by states of the trellis
_STREAMS = (codec for codec in CODECS.values() if isinstance(codec, Entropy) and not codec.scaled)
_CODECS = {n_states(codec.code): codec for codec in sorted(_STREAMS, key=lambda codec: -n_states(codec.code))}

OPTIONS: dict[str, dict[str, Any]] = {
    "states": choice(
        [*_CODECS],
        "Of the trellis whose paths numbers follow. 8 take .04 of a bit more a weight than 256 for the same error; 1: "
        "none, each number is rounded for itself, which takes a fifth of a bit more.",
        default=max(_CODECS),
    ),
    "damping": sparsegpt.OPTIONS["damping"],
    **allocation_option(
        GLOBAL,
        "one step for the whole model, by what an error costs (metric gradients), in bits a weight from "
        f"{LEAST_ALLOTTED} to {MOST_BITS}",
        default=UNIFORM,
    ),
}

# Measured on 576 x 1536 (AMD EPYC with AVX-512; paths take a seventh more with AVX2), a pass of one core, and what a
# search needs mostly
_SECONDS_A_NUMBER, _PASSES = 2.0e-7, 4


def fit(
    problem: Problem,
    nbytes: int,
    how: Fit,
    *,
    states: int = OPTIONS["states"]["default"],
    damping: float = OPTIONS["damping"]["default"],
) -> list[Factorization]:
    """Numbers and steps of least error within the bytes (`solvers.entropy`), on the CPU.

    Where columns are weighted, each has a scale in the file by which that is taken back.
    """
    from cospadi.solvers import entropy

    codec = _CODECS[states]
    gram = np.asarray(problem.metric.gram, np.float64)
    nbytes = room(problem.shape, nbytes) - _of_columns(problem)
    found = entropy.quantize(problem.weight, gram, codec, nbytes, damping=damping, log=how.log)
    return [coded(found, {**how.storage, "value_codec": codec.name}, codec.name)]


def _of_columns(problem: Problem) -> int:
    """Bytes of the scales of weighted columns."""
    return sum(2 * one.shape[1] for one in problem.matrices if not one.alike)


def coded(found: entropy.Found, storage: Mapping[str, Any], solver: str) -> Factorization:
    """What a solver found for an entropy coder, as it will be stored."""
    diagnostics = {"solver": solver, "n_passes": found.n_passes, "bits": 8 * found.nbytes / found.codes.size}
    codes, steps = found.codes, found.steps
    return Factorization(None, codes, support="dense", **storage, scales=steps, settled=True, diagnostics=diagnostics)


def room(shape: tuple[int, int], nbytes: int) -> int:
    """Bytes that will be used of those that there are.

    Raises
    ------
    ConfigError
        If they are too few to say anything.
    """
    n, least = shape[0] * shape[1], _least(shape)
    if nbytes < least:
        raise ConfigError([f"{nbytes} bytes for a {shape[0]}x{shape[1]} matrix: {least} is the least"])
    return min(nbytes, round(MOST_BITS * n / 8))


def _least(shape: tuple[int, int]) -> int:
    return round(LEAST_BITS * shape[0] * shape[1] / 8) + 2 * shape[0] + shape[1]


def work(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    """Work of a problem: passes over its numbers, each with a product to feed errors forward."""
    seconds = _PASSES * _SECONDS_A_NUMBER
    return single_weights.work(targets, products=_PASSES, inversions=2, seconds_a_weight=seconds)


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Ratios that leave less than the least, an allocation without prices, and training of what is all decided."""
    scaled = settings.get("metric") == GRADIENTS and settings["column_power"] > 0
    for key in trained_by(settings) if not scaled else ():
        yield (
            f"{key}: numbers and steps are decided together, nothing is left to train; set it to null, or metric to "
            f"{GRADIENTS} and column_power above 0, by which columns have scales"
        )
    yield from budget_faults(settings, problems, lambda shape, nbytes: room(shape, nbytes - 2 * shape[1] * scaled))


def profile(
    problem: Problem, nbytes: int, *, storage: Mapping[str, Any], device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """``bits`` a number of every input, where all matrices have the steps at which an error costs the same; bytes of
    ``scales`` besides."""
    from cospadi.solvers import entropy

    (price,) = problem.prices
    found = entropy.rates(problem.weight, np.asarray(problem.metric.gram, np.float64), damping=options["damping"])
    return {"bits": (np.maximum(found, -_FAR) + math.log2(price) / 2).tolist(), "scales": _of_columns(problem)}


def share(profiles: Sequence[Profile], nbytes: int, *, storage: Mapping[str, Any], **options: Any) -> list[int]:
    """Bytes by one step for the whole model: what each matrix's numbers take there."""
    inputs, scales = [np.array(one.figures["bits"]) for one in profiles], [one.figures["scales"] for one in profiles]
    shapes = [side_by_side(one.shapes) for one in profiles]
    mean = 8 * nbytes / sum(d_in * d_out for d_in, d_out in shapes)
    bounds = [
        (max(_least(shape) + own, min(LEAST_ALLOTTED, mean) * math.prod(shape) / 8), room(shape, 2 * math.prod(shape)))
        for shape, own in zip(shapes, scales, strict=True)
    ]

    def at(longer: float) -> list[int]:
        found = []
        for bits, own, (_, d_out), (least, most) in zip(inputs, scales, shapes, bounds, strict=True):
            # the rate of a Gaussian falls to none where the step is longer than it is wide
            taken = np.log2(1 + 4.0 ** np.clip(bits - longer, -_FAR, _FAR)).sum() / 2 * d_out / 8
            found.append(math.floor(min(max(taken + own, least), most)))
        return found

    low, high = min(one.min() for one in inputs) - MOST_BITS, max(one.max() for one in inputs) + MOST_BITS
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(at(middle)) <= nbytes else (middle, high)
    if sum(at(high)) > nbytes:
        raise ConfigError([f"ratio: {nbytes} bytes are left of the matrices; {sum(at(high))} is the least"])
    return at(high)


def _profiling(targets: Sequence[Target], nbytes: int, options: Mapping[str, Any], storage: Mapping[str, Any]) -> Work:
    return single_weights.work(targets, inversions=2)


METHOD = Method(
    name="ectcq",
    summary="One step an input, numbers along a trellis, entropy-coded to the bytes that the ratio leaves (ours).",
    options=OPTIONS,
    factors="entropy-coded integers",
    fit=fit,
    work=work,
    modules=lambda options: [
        __name__,
        *("cospadi.solvers.entropy", "cospadi.solvers.sparsegpt", "cospadi.solvers._compiled"),
        *("cospadi.runtime.cospadi_entropy", "cospadi.runtime.cospadi_entropy_source"),
    ],
    faults=faults,
    own_codec=True,
    decoded=True,
    allocator=Allocator(profile=profile, share=share, work=_profiling),
)
