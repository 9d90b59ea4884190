"""What the methods have in common that keep every weight in a few bits: ``W ~ S``, all codes stored.

The dictionary is the identity and takes no bytes. A method decides codec and scales itself, so its factors are settled:
nothing is rounded later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cospadi.budget import factors_nbytes
from cospadi.errors import ConfigError
from cospadi.formats.dictionaries import IDENTITY
from cospadi.formats.values import storage_of
from cospadi.methods.base import Problems, budget_faults
from cospadi.runtime.cospadi_registry import CODECS

OPTIONS: dict[str, dict[str, Any]] = {
    "symmetric": {
        "type": "boolean",
        "default": True,
        "description": "false: every block has a zero point beside its scale, of as many bits as a weight.",
    },
}


def grid(
    shape: tuple[int, int],
    nbytes: int,
    *,
    symmetric: bool,
    value_codec: str,
    block_size: int | None,
    dictionary_codec: str = IDENTITY,
) -> str:
    """Codec of the most bits a weight, at most those of `value_codec`, that fits in `nbytes`, scales counted.

    Raises
    ------
    ConfigError
        If not even the one of the fewest bits does.
    """
    most = CODECS[value_codec].bits
    grids = [codec for codec in CODECS.values() if codec.scaled and not codec.variable]
    grids = [codec for codec in grids if codec.shifted != symmetric and codec.bits <= most]
    for codec in sorted(grids, key=lambda codec: -codec.bits):
        taken = stored_nbytes(shape, codec.name, block_size)
        if taken <= nbytes:
            return codec.name
    raise ConfigError(
        [
            f"{nbytes} bytes for a {shape[0]}x{shape[1]} matrix: {codec.bits} bits a weight and their scales "
            f"take {taken}, {8 * taken / (shape[0] * shape[1]):.4g} bits a weight"
        ]
    )


def stored_nbytes(shape: tuple[int, int], codec: str, block_size: int | None) -> int:
    """Bytes of a weight of which every entry is an integer of a codec."""
    d_in, d_out = shape
    return factors_nbytes(
        d_in,
        d_out,
        d_in,
        d_in * d_out,
        support="dense",
        value_codec=codec,
        dictionary_codec=IDENTITY,
        block_size=block_size,
    )


def faults(settings: Mapping[str, Any], problems: Problems = ()) -> Iterator[str]:
    """Ratios that leave less than the fewest bits take."""
    storage = storage_of(settings.get("codes", {}))
    yield from budget_faults(
        settings, problems, lambda shape, nbytes: grid(shape, nbytes, symmetric=settings["symmetric"], **storage)
    )
