"""What the methods have in common that keep every weight in a few bits: ``W ~ S``, all codes stored.

The dictionary is the identity and takes no bytes, or scales the inputs (`scaled`). A method decides codec and scales
itself, so its factors are settled: nothing is rounded later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cospadi.arrays import on_device, to_numpy
from cospadi.budget import factors_nbytes
from cospadi.errors import ConfigError
from cospadi.files import BFLOAT16
from cospadi.formats.dictionaries import IDENTITY
from cospadi.formats.factorization import Factorization
from cospadi.formats.values import storage_of
from cospadi.methods import single_weights
from cospadi.methods.base import Problems, budget_faults
from cospadi.problem import Problem
from cospadi.registry import option
from cospadi.runtime.cospadi_diagonal import Diagonal
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.runtime.cospadi_values import Codec

OPTIONS: dict[str, dict[str, Any]] = {
    "symmetric": option(
        "boolean", "false: every block has a zero point beside its scale, of as many bits as a weight.", default=True
    ),
    "scale_inputs": option(
        "boolean",
        "Multiply the weights of active inputs by a power of how active they are before they are rounded, and divide "
        "those inputs by it in the model (AWQ, MLSys 2024): the power of ten that errs least, 16 bits an input.",
        default=False,
    ),
}

# Powers of the activity that are tried
POWERS = tuple(i / 10 for i in range(10))
# Inputs that are less active than the most active one by more than this are scaled as if they were not
_RANGE = 1e-4


def grid(
    shape: tuple[int, int],
    nbytes: int,
    *,
    symmetric: bool,
    scale_inputs: bool,
    value_codec: str,
    block_size: int | None,
    dictionary_codec: str = IDENTITY,
) -> str:
    """Codec of the most bits a weight, at most those of `value_codec`, that fits in `nbytes`, all scales counted.

    Raises
    ------
    ConfigError
        If not even the one of the fewest bits does.
    """
    most, scales = CODECS[value_codec].bits, Diagonal.name if scale_inputs else IDENTITY
    grids = [codec for codec in _grids(symmetric) if codec.bits <= most]
    return most_bits(grids, shape, nbytes, lambda codec: stored_nbytes(shape, codec.name, block_size, scales)).name


def _grids(symmetric: bool) -> list[Codec]:
    return [codec for codec in CODECS.values() if codec.scaled and not codec.variable and codec.shifted != symmetric]


def most_bits(codecs: Iterable[Any], shape: tuple[int, int], nbytes: int, taken_by: Callable[[Any], int]) -> Any:
    """The codec of the most bits a weight of which all weights fit in `nbytes`.

    Raises
    ------
    ConfigError
        If not even those of the fewest bits do.
    """
    for codec in sorted(codecs, key=lambda codec: -codec.bits):
        taken = taken_by(codec)
        if taken <= nbytes:
            return codec
    raise ConfigError(
        [
            f"{nbytes} bytes for a {shape[0]}x{shape[1]} matrix: {codec.bits} bits a weight and their scales "
            f"take {taken}, {8 * taken / (shape[0] * shape[1]):.4g} bits a weight"
        ]
    )


def stored_nbytes(shape: tuple[int, int], codec: str, block_size: int | None, dictionary_codec: str = IDENTITY) -> int:
    """Bytes of a weight of which every entry is an integer of a codec."""
    d_in, d_out = shape
    return factors_nbytes(
        d_in,
        d_out,
        d_in,
        d_in * d_out,
        support="dense",
        value_codec=codec,
        dictionary_codec=dictionary_codec,
        block_size=block_size,
    )


def scaled(problem: Problem, device: str, rounded: Callable[[Any, Any], Factorization]) -> Factorization:
    """``W ~ diag(d) Q(W / d)``, with d the power of the inputs' activity at which that errs least on the calibration.

    How active an input is says the diagonal of the Gram, the mean of its square; AWQ takes the mean of its size.

    Parameters
    ----------
    rounded : callable
        ``rounded(weight, gram) -> Factorization`` with an identity dictionary, of arrays on the device.
    """
    weight, gram = single_weights.inputs_of(problem, device)
    activity = np.sqrt(np.diagonal(to_numpy(gram)))
    best, least = None, np.inf
    for power in POWERS:
        scales = input_scales(activity, power)
        if (scales == 1).all():
            found = rounded(weight, gram)
        else:
            here = on_device(scales, device)
            found = rounded(weight / here[:, None], gram * here[:, None] * here)
            found = replace(found, dictionary=scales, dictionary_codec=Diagonal.name)
        error = problem.metric.squared_norm(problem.weight - found.reconstruct())
        if error < least:
            best, least = replace(found, diagnostics={**found.diagnostics, "power": power}), error
    return best


def input_scales(activity: np.ndarray, power: float) -> np.ndarray:
    """What inputs are multiplied by, float32 (d_in,) that bfloat16 holds: activity to a negative power, around 1."""
    most = activity.max(initial=0.0)
    if most == 0:
        return np.ones(len(activity), np.float32)
    scales = np.maximum(activity / most, _RANGE) ** -power
    return (scales / np.sqrt(scales.max() * scales.min())).astype(BFLOAT16).astype(np.float32)


def coded(codes: Any, scales: Any, storage: Mapping[str, Any], codec: str, solver: str) -> Factorization:
    """All weights in a codec, as a solver found them and the file will hold them: nothing is rounded later."""
    codes, storage = np.ascontiguousarray(to_numpy(codes), np.float32), {**storage, "value_codec": codec}
    told = {"solver": solver, "codec": codec}
    return Factorization(None, codes, support="dense", **storage, scales=scales, settled=True, diagnostics=told)


def tries(options: Mapping[str, Any]) -> int:
    """How often a weight is rounded."""
    return len(POWERS) if options["scale_inputs"] else 1


def modules(options: Mapping[str, Any]) -> list[str]:
    """The modules of all such methods whose code decides the result."""
    used = _grids(options["symmetric"]) + [CODECS[Diagonal.name]] * options["scale_inputs"]
    return [__name__, *sorted({type(codec).__module__ for codec in used})]


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Ratios that leave less than the fewest bits take."""
    storage = storage_of(settings.get("codes", {}))
    chosen = {name: settings[name] for name in OPTIONS}
    yield from budget_faults(settings, problems, lambda shape, nbytes: grid(shape, nbytes, **chosen, **storage))
