"""Packed models in the formats of other tools, as far as those can hold them.

Integers under scales of blocks go over as they are, where the other format has such blocks. All else it can only hold
dense, or rounded anew: what was saved by supports, dictionaries and entropy coding is lost, and a log line says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cospadi.formats.factorization import Factorization
from cospadi.runtime.cospadi_integers import Integers, Shifted
from cospadi.runtime.cospadi_registry import CODECS

__all__ = ["GGUF_TYPES", "Grid", "bits_of", "grid_of"]

INTEGERS = (Integers, Shifted)
# How a GGUF file may store matrices
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


class Grid(NamedTuple):
    """A weight (d_out, d_in) that is whole numbers under scales: ``(number - zero) * scale``.

    Attributes
    ----------
    bits : int
        Numbers are in two's complement, or from 0 on where there are zero points.
    numbers : ndarray (d_out, d_in), int16
    scales : ndarray (d_out, n_blocks), float32
        Numbers that bfloat16 holds.
    zeros : ndarray (d_out, n_blocks), int16, or None
    block_size : int
        Inputs in a row that share a scale.
    """

    bits: int
    numbers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    block_size: int


def grid_of(factors: Factorization) -> Grid | None:
    """The whole numbers that a matrix is stored as; None where it is something else."""
    codec = CODECS[factors.value_codec]
    if factors.dictionary is not None or factors.plus or factors.on.is_stored or not isinstance(codec, INTEGERS):
        return None
    d_in, d_out = factors.shape
    size = min(factors.block_size or d_in, d_in)
    scales = np.asarray(factors.scales).astype(np.float32).reshape(-1, d_out, -(-d_in // size))
    zeros = scales[1] if codec.shifted else np.zeros_like(scales[0])
    block = np.arange(d_in) // size
    numbers = np.rint(factors.codes.T / scales[0][:, block]) + zeros[:, block]
    kept = zeros.astype(np.int16) if codec.shifted else None
    return Grid(codec.bits, numbers.astype(np.int16), scales[0], kept, size)


def bits_of(specs: Mapping[str, Any], nbytes: float) -> float:
    """Bits a weight, where the matrices of these specs take so many bytes."""
    return 8 * nbytes / sum(spec["shape"][0] * spec["shape"][1] for spec in specs.values())
