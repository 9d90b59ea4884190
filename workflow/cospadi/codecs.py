"""Codecs: how values, supports and dictionaries become bytes, and how many.

A *value codec* turns float32 numbers into stored words and back; its registry line is all that a new one
needs. A *support* says where the nonzeros of the codes are. Byte counts are exact: they equal the sizes of
the arrays returned here, which are the tensors written to the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cospadi.files import BFLOAT16

ROUNDINGS = ("nearest", "truncate")


@dataclass(frozen=True)
class ValueCodec:
    """A way to store numbers.

    Attributes
    ----------
    encode : callable
        ``encode(values, rounding) -> array``: float32 (n,) to the stored array.
    decode : callable
        ``decode(stored, n) -> values``: the stored array to float32 (n,).
    nbytes : callable
        ``nbytes(n) -> int``: bytes of the stored array for n numbers.
    bits : int
        Bits a number, without padding.
    """

    encode: Callable[[np.ndarray, str], np.ndarray]
    decode: Callable[[np.ndarray, int], np.ndarray]
    nbytes: Callable[[int], int]
    bits: int


def _to_bfloat16(values: np.ndarray, rounding: str, *, dropped_bits: int = 0) -> np.ndarray:
    """Words of bfloat16 (uint16) whose `dropped_bits` lowest mantissa bits are zero."""
    _check_rounding(rounding)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    shift = np.uint32(16 + dropped_bits)
    if rounding == "nearest":
        # ties to even, as the hardware does; NaN and infinity never get here (checked when codes are made)
        bits = bits + ((np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1)) + ((bits >> shift) & np.uint32(1))
    return ((bits >> shift) << np.uint32(dropped_bits)).astype(np.uint16)


def _from_words(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; allowed: {', '.join(ROUNDINGS)}")


def _encode_bf14(values: np.ndarray, rounding: str) -> np.ndarray:
    words = _to_bfloat16(values.ravel(), rounding, dropped_bits=2) >> np.uint16(2)
    bits = (words[:, None] >> np.arange(14, dtype=np.uint16)) & np.uint16(1)
    return np.packbits(bits.astype(np.uint8).ravel(), bitorder="little")


def _decode_bf14(stored: np.ndarray, n: int) -> np.ndarray:
    bits = np.unpackbits(stored, count=14 * n, bitorder="little").reshape(n, 14)
    words = bits.astype(np.uint16) @ (np.uint16(1) << np.arange(2, 16, dtype=np.uint16))
    return _from_words(words)


VALUE_CODECS: dict[str, ValueCodec] = {
    "float32": ValueCodec(
        encode=lambda values, rounding: np.ascontiguousarray(values, np.float32),
        decode=lambda stored, n: np.asarray(stored, np.float32).reshape(n),
        nbytes=lambda n: 4 * n,
        bits=32,
    ),
    "bf16": ValueCodec(
        encode=lambda values, rounding: _to_bfloat16(values, rounding).view(BFLOAT16),
        decode=lambda stored, n: np.asarray(stored).astype(np.float32).reshape(n),
        nbytes=lambda n: 2 * n,
        bits=16,
    ),
    # The paper's storage: two mantissa bits of bfloat16 dropped, 14 bits a value without padding
    "bf14": ValueCodec(
        encode=_encode_bf14,
        decode=_decode_bf14,
        nbytes=lambda n: (14 * n + 7) // 8,
        bits=14,
    ),
}


# The config's ``codes.value_bits``
CODEC_OF_BITS = {16: "bf16", 14: "bf14"}


def encode_values(values: np.ndarray, codec: str, rounding: str = "nearest") -> np.ndarray:
    """Store float32 numbers (any shape) with `codec`; ``bf16`` keeps the shape, ``bf14`` is a U8 stream."""
    return VALUE_CODECS[codec].encode(values, rounding)


def decode_values(stored: np.ndarray, codec: str, n: int) -> np.ndarray:
    """Inverse of `encode_values` up to the codec's rounding: float32 (n,)."""
    return VALUE_CODECS[codec].decode(stored, n)


def pack_support(mask: np.ndarray) -> np.ndarray:
    """Pack a boolean (k, n) mask of nonzero codes to uint8 (n, ceil(k / 8)), bit i % 8 of byte i // 8 = atom i."""
    return np.packbits(np.asarray(mask, bool).T, axis=1, bitorder="little")


def unpack_support(packed: np.ndarray, k: int) -> np.ndarray:
    """Inverse of `pack_support`: boolean (k, n)."""
    return np.unpackbits(packed, axis=1, count=k, bitorder="little").view(bool).T


def support_nbytes(support: str, k: int, n: int) -> int:
    """Bytes that the positions of (k, n) codes take in the file."""
    return {"bitmask": ((k + 7) // 8) * n, "dense": 0}[support]
