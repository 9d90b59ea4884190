"""Codecs: how values, supports and dictionaries become bytes, and how many.

A *value codec* turns float32 numbers into stored words and back; its registry line is all that a new one
needs. Integer codecs share a scale (bfloat16) among a *group* of numbers: ``value = integer * scale``. A *support* says
where the nonzeros of the codes are. Byte counts are exact: they equal the sizes of the arrays returned here, which are
the tensors written to the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cospadi.files import BFLOAT16

# The config knows a third, `optimal`: `rounding` decides it where the metric is known, before values come here
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


@dataclass(frozen=True)
class IntegerCodec:
    """Integers of `bits` bits in two's complement, with a scale for every group."""

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integers of {self.bits} bits; allowed: 2 to 8")

    @property
    def low(self) -> int:
        """Smallest integer."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest integer."""
        return 2 ** (self.bits - 1) - 1

    def nbytes(self, n: int) -> int:
        """Bytes of n integers, without their scales."""
        return (self.bits * n + 7) // 8

    def pack(self, integers: np.ndarray) -> np.ndarray:
        """Integers as stored: 8 bits keep their shape; fewer are a U8 stream, each from its lowest bit on."""
        if self.bits == 8:
            return integers.astype(np.int8)
        words = integers.astype(np.uint8).ravel()
        bits = np.unpackbits(words[:, None], axis=1, count=self.bits, bitorder="little")
        return np.packbits(bits.ravel(), bitorder="little")

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        """Inverse of `pack`: int8 (n,)."""
        if self.bits == 8:
            return np.asarray(stored, np.int8).reshape(n)
        bits = np.unpackbits(stored, count=self.bits * n, bitorder="little").reshape(n, self.bits)
        words = np.packbits(bits, axis=1, bitorder="little").reshape(n)
        sign = 1 << (self.bits - 1)
        return (words ^ np.uint8(sign)).view(np.int8) - np.int8(sign)


INTEGER_CODECS = {"int8": IntegerCodec(8), "int4": IntegerCodec(4)}

# The dictionary that takes no bytes: the atoms are the inputs
IDENTITY = "identity"

# The support of a mixture of matrix atoms: every atom is a whole matrix, and has one coefficient
MIXTURE = "mixture"

# The config's ``codes.value_bits`` and ``codes.dictionary_bits``
CODEC_OF_BITS = {16: "bf16", 14: "bf14", 8: "int8", 4: "int4"}

# The config's ``codes.group_size``, as a default where none is given
GROUP_SIZE = 64


def storage_of(codes: Mapping[str, Any]) -> dict[str, Any]:
    """How factors are stored, by the config's section ``codes``; what is not said is as by default.

    Returns
    -------
    dict
        ``value_codec``, ``dictionary_codec`` and ``group_size``, as the budget and `Factorization` take them.
    """
    return {
        "value_codec": CODEC_OF_BITS[codes.get("value_bits", 16)],
        "dictionary_codec": CODEC_OF_BITS[codes.get("dictionary_bits", 16)],
        "group_size": codes.get("group_size", GROUP_SIZE),
    }


def codec_bits(codec: str) -> int:
    """Bits a number takes, without scales and padding."""
    return (INTEGER_CODECS.get(codec) or VALUE_CODECS[codec]).bits


def stored_nbytes(codec: str, n: int) -> int:
    """Bytes of n stored numbers, without scales."""
    return (INTEGER_CODECS.get(codec) or VALUE_CODECS[codec]).nbytes(n)


def scales_nbytes(codec: str, n_groups: int) -> int:
    """Bytes of the scales of so many groups; none where the codec has no scales."""
    return 2 * n_groups if codec in INTEGER_CODECS else 0


def groups_of_columns(counts: np.ndarray, group_size: int | None) -> np.ndarray:
    """Group of every stored value: within a column each `group_size` values in order; None, the whole column.

    Parameters
    ----------
    counts : ndarray (d_out,)
        Stored values a column.

    Returns
    -------
    ndarray (sum(counts),)
        Numbers from 0 on, growing along the values; an empty column has no group.
    """
    counts = np.asarray(counts, np.int64)
    size = group_size or max(1, int(counts.max(initial=1)))
    groups = -(-counts // size)
    rank = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(np.cumsum(groups) - groups, counts) + rank // size


def groups_of_atoms(d_in: int, k: int, group_size: int | None) -> np.ndarray:
    """Group of every entry of a dictionary: (d_in, k), each `group_size` rows of an atom; None, the whole atom."""
    return (np.arange(d_in) // (group_size or d_in))[:, None] * k + np.arange(k)


def find_scales(values: np.ndarray, groups: np.ndarray, codec: str) -> np.ndarray:
    """Scale of every group: the bfloat16 among a few that gives the least squared error.

    Parameters
    ----------
    values : ndarray (n,), float32
    groups : ndarray (n,), int
        Group of every value, all numbers from 0 on.

    Returns
    -------
    ndarray (n_groups,), bfloat16
        Also negative ones: then the value farthest from zero is the integer that has no opposite.
    """
    integer = INTEGER_CODECS[codec]
    n_groups = int(groups.max(initial=-1)) + 1
    top, bottom = np.zeros(n_groups, np.float32), np.zeros(n_groups, np.float32)
    np.maximum.at(top, groups, values)
    np.minimum.at(bottom, groups, values)
    extreme = np.where(top >= -bottom, top, bottom)
    # a scale below the one that reaches the extreme cuts it off, for finer steps elsewhere; 8 bits have steps enough
    shrinks = (1.0,) if integer.bits == 8 else np.linspace(0.7, 1.0, 13)
    best = np.ones(n_groups, BFLOAT16)
    least = np.full(n_groups, np.inf)
    for reach in (integer.low, integer.high):
        for shrink in shrinks:
            scales = (extreme / reach * shrink).astype(BFLOAT16)
            scales[scales == 0] = 1
            wide = scales.astype(np.float32)[groups]
            rounded = np.clip(np.rint(values / wide), integer.low, integer.high) * wide
            error = np.bincount(groups, ((values - rounded) ** 2).astype(np.float64), n_groups)
            better = error < least
            best[better], least[better] = scales[better], error[better]
    return best


def encode_grouped(
    values: np.ndarray, groups: np.ndarray, scales: np.ndarray, codec: str, rounding: str = "nearest"
) -> np.ndarray:
    """Store float32 numbers (any shape) as integers times the scale of their group."""
    _check_rounding(rounding)
    integer = INTEGER_CODECS[codec]
    steps = values / np.asarray(scales, np.float32)[groups]
    whole = np.rint(steps) if rounding == "nearest" else np.trunc(steps)
    return integer.pack(np.clip(whole, integer.low, integer.high).astype(np.int16))


def decode_grouped(stored: np.ndarray, groups: np.ndarray, scales: np.ndarray, codec: str) -> np.ndarray:
    """Inverse of `encode_grouped`: float32 of the shape of `groups`."""
    integers = INTEGER_CODECS[codec].unpack(np.asarray(stored), groups.size).reshape(groups.shape)
    return integers * np.asarray(scales).astype(np.float32)[groups]


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


def pack_pairs(mask: np.ndarray) -> np.ndarray:
    """Pack a boolean (k, n) mask with two of every four atoms to uint8 (n, ceil(k / 8)).

    Four bits for every four atoms: the first atom's number (0 to 3) in the lower two, the second's in the upper two;
    the first four atoms in the low half of a byte.

    Raises
    ------
    ValueError
        If k is no multiple of 4, or four atoms in a row have not exactly two ones.
    """
    k, n = mask.shape
    quads = np.asarray(mask, bool).T.reshape(n, k // 4, 4) if k % 4 == 0 else None
    if quads is None or (quads.sum(2) != 2).any():
        raise ValueError(f"a mask of {k} atoms has not two of every four: support 2:4 cannot hold it")
    first = quads.argmax(2)
    second = 3 - quads[:, :, ::-1].argmax(2)
    nibbles = (first | second << 2).astype(np.uint8)
    nibbles = np.concatenate([nibbles, np.zeros((n, nibbles.shape[1] % 2), np.uint8)], axis=1)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_pairs(packed: np.ndarray, k: int) -> np.ndarray:
    """Inverse of `pack_pairs`: boolean (k, n)."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), 2 * packed.shape[1])[:, : k // 4, None]
    atoms = np.arange(4, dtype=np.uint8)
    return (((nibbles & 3) == atoms) | ((nibbles >> 2) == atoms)).reshape(len(packed), k).T


def fill_pairs(mask: np.ndarray) -> np.ndarray:
    """Copy of a (k, n) mask in which four atoms with fewer than two ones have two: the first free ones are added."""
    quads = np.asarray(mask, bool).T.reshape(mask.shape[1], len(mask) // 4, 4).copy()
    for atom in range(4):
        quads[:, :, atom] |= quads.sum(2) < 2
    return quads.reshape(mask.shape[::-1]).T


def support_nbytes(support: str, k: int, n: int) -> int:
    """Bytes that the positions of (k, n) codes take in the file."""
    return {"bitmask": ((k + 7) // 8) * n, "2:4": ((k + 7) // 8) * n, "dense": 0, MIXTURE: 0}[support]
