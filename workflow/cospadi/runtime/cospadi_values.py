"""Codecs of numbers: how values and dictionaries are stored (docs/format.md).

A codec is a class in a file of its own, and an entry of `cospadi_registry`. It says what the stored tensor looks like
and has two pairs of functions that agree: `pack` and `unpack` in NumPy, for who learns and writes, `encode` and
`decode` in torch, for the layers of a loaded model. torch is imported where it is used: to check a file takes NumPy
alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Bytes of an entry of a stored tensor, by its dtype in safetensors' words
SIZES = {"BF16": 2, "U8": 1, "I8": 1, "F32": 4}


class Codec:
    """A way to store numbers.

    Attributes
    ----------
    name : str
        The word for it in a spec.
    dtype : str
        Of the stored tensor, in safetensors' words.
    bits : int
        A number takes; also the config's word for it.
    stream : bool
        Whether the tensor is one stream of bits; else it has the shape of the numbers.
    scaled : bool
        Whether a block of numbers has a scale: what is stored is the number over its scale. Such a codec holds the
        whole numbers from `low` to `high`.
    shifted : bool
        Whether such a block has a zero point too: the numbers are followed by one more for every scale, and a value is
        ``(number - zero point) * scale``.
    whole : bool
        Whether all codes of a matrix are in one tensor with all that belongs to them, scales too: `pack_codes`,
        `unpack_codes` and `faults_of` take the place of `pack`, `unpack` and `faults`.
    variable : bool
        Whether such codes take as many bytes as they are surprising; a spec says how many, and a loaded model decodes
        them once (`cospadi_entropy`).
    significant_bits : int
        Of a number without a scale, the hidden one included; 0 where numbers are not of that kind.
    for_dictionaries : bool
        Whether a config may choose it for dictionaries too.
    in_dictionaries : bool
        Whether a file may have a dictionary of it.
    in_codes : bool
        Whether a file may have codes of it.
    diagonal : bool
        Whether a dictionary of it is a number for every input, and 0 elsewhere.
    for_configs : bool
        Whether a config may choose it by its bits; else a method does.
    """

    name: str
    dtype: str
    bits: int
    stream = False
    scaled = shifted = whole = variable = diagonal = False
    low = high = 0
    significant_bits = 0
    for_dictionaries = in_dictionaries = in_codes = for_configs = True

    @property
    def can_be_rounded(self) -> bool:
        """Whether what it holds is evenly spaced or of so many significant bits, so that rounding can be decided."""
        return (self.scaled and not self.shifted and not self.variable) or self.significant_bits > 0

    def shape(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Shape of the stored tensor for numbers of that shape."""
        return ((self.bits * math.prod(numbers) + 7) // 8,) if self.stream else tuple(numbers)

    def numbers_of_dictionary(self, d_in: int, k: int) -> tuple[int, ...]:
        """Shape of the numbers that say a dictionary (d_in, k)."""
        return (d_in, k)

    @property
    def keys(self) -> tuple[str, ...]:
        """What a spec says of codes in this codec, besides what it says of all."""
        return ("group_size", "n_scales") if self.scaled else ()

    def shape_of_codes(self, numbers: Sequence[int], codes: Mapping[str, Any]) -> tuple[int, ...]:
        """`shape` of codes with this part of a spec: zero points follow the numbers where there are some."""
        return self.shape((math.prod(numbers) + codes["n_scales"],) if self.shifted else numbers)

    def nbytes(self, n: int) -> int:
        """Bytes of n stored numbers, without scales."""
        return math.prod(self.shape((n,))) * SIZES[self.dtype]

    def pack(self, numbers: np.ndarray, rounding: str) -> np.ndarray:
        """Store float32 numbers (any shape), finite and over their scales; `rounding` is nearest or truncate.

        NumPy has no bfloat16 of its own: its words are uint16 here.
        """
        raise NotImplementedError

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        """Numbers (n,) as stored, before they are multiplied with their scales; float32, or integers."""
        raise NotImplementedError

    def encode(self, numbers: Any) -> Any:
        """`pack` to nearest, of a torch tensor."""
        raise NotImplementedError

    def decode(self, stored: Any, shape: Sequence[int]) -> Any:
        """`unpack` of a torch tensor: bfloat16 numbers of that shape."""
        raise NotImplementedError

    def n_not_finite(self, stored: np.ndarray) -> int:
        """Numbers that are NaN or infinite; bfloat16 comes as any dtype of two bytes."""
        return 0

    def faults(self, stored: np.ndarray, n: int) -> Iterator[str]:
        """What is wrong inside the stored tensor of n numbers."""
        bad = self.n_not_finite(stored)
        if bad:
            yield f"holds {bad} values that are NaN or infinite"
        used = self.bits * n % 8
        if self.stream and used and stored[-1] >> used:
            yield "has bits set behind its last number"


class Float32(Codec):
    """Numbers as they are; only in the files between learning and packing."""

    name, dtype, bits = "float32", "F32", 32

    def pack(self, numbers: np.ndarray, rounding: str) -> np.ndarray:
        return np.ascontiguousarray(numbers, np.float32)

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        return np.asarray(stored, np.float32).reshape(n)

    def n_not_finite(self, stored: np.ndarray) -> int:
        return int(np.count_nonzero(~np.isfinite(stored)))


class Bf16(Codec):
    """The upper half of a float32."""

    name, dtype, bits, significant_bits = "bf16", "BF16", 16, 8

    def pack(self, numbers: np.ndarray, rounding: str) -> np.ndarray:
        return upper_bits(numbers, 16, rounding)

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        words = np.ascontiguousarray(stored).view(np.uint16).reshape(n)
        return from_upper_bits(words, 16)

    def encode(self, numbers: Any) -> Any:
        import torch

        return numbers.to(torch.bfloat16)

    def decode(self, stored: Any, shape: Sequence[int]) -> Any:
        return stored.view(*shape)

    def n_not_finite(self, stored: np.ndarray) -> int:
        sizes = np.ascontiguousarray(stored).view(np.uint16) & np.uint16(0x7FFF)
        return int(np.count_nonzero(sizes >= 0x7F80)) if sizes.max(initial=0) >= 0x7F80 else 0


def upper_bits(numbers: np.ndarray, bits: int, rounding: str) -> np.ndarray:
    """The upper `bits` bits of float32 numbers, rounded, as uint16 words of their shape."""
    words = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    shift = np.uint32(32 - bits)
    if rounding == "nearest":
        # ties to even, as the hardware does; NaN and infinity never get here (checked when codes are made)
        words = words + ((np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1)) + ((words >> shift) & np.uint32(1))
    return (words >> shift).astype(np.uint16)


def from_upper_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `upper_bits`: float32 numbers whose other bits are 0."""
    return (words.astype(np.uint32) << np.uint32(32 - bits)).view(np.float32)


def pack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Words of one or two bytes as a stream, each from its lowest bit on: uint8 (ceil(bits n / 8),)."""
    words = np.ascontiguousarray(words).ravel()
    by_byte = words.astype(words.dtype.newbyteorder("<")).view(np.uint8).reshape(len(words), words.itemsize)
    return np.packbits(np.unpackbits(by_byte, axis=1, count=bits, bitorder="little").ravel(), bitorder="little")


def unpack_words(stored: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Inverse of `pack_words`: uint8 (n,), or uint16 for more than 8 bits."""
    by_bit = np.unpackbits(stored, count=bits * n, bitorder="little").reshape(n, bits)
    if bits <= 8:
        return np.packbits(by_bit, axis=1, bitorder="little").reshape(n)
    return by_bit.astype(np.uint16) @ (np.uint16(1) << np.arange(bits, dtype=np.uint16))


def encode_words(words: Any, bits: int) -> Any:
    """`pack_words` of a torch tensor of integers whose other bits are 0."""
    import torch
    import torch.nn.functional as F

    words = words.flatten()
    if 8 % bits == 0:
        words = F.pad(words, (0, -len(words) % (8 // bits))).view(-1, 8 // bits)
        return (words << bits * torch.arange(8 // bits, device=words.device)).sum(1).to(torch.uint8)
    by_bit = words.unsqueeze(1) >> torch.arange(bits, device=words.device) & 1
    by_byte = F.pad(by_bit.flatten(), (0, -bits * len(words) % 8)).view(-1, 8)
    return (by_byte << torch.arange(8, device=words.device)).sum(1).to(torch.uint8)


def decode_words(stored: Any, bits: int, n: int) -> Any:
    """`unpack_words` of a torch tensor: uint8 (n,) where words lie within bytes, else int32."""
    import torch
    import torch.nn.functional as F

    period = math.lcm(bits, 8)  # bits after which a word begins with a byte again
    n_bytes, n_words = period // 8, period // bits
    rows = -(-n // n_words)
    if rows * n_bytes != stored.numel():
        stored = F.pad(stored, (0, rows * n_bytes - stored.numel()))
    parts = (stored if n_bytes == 1 else stored.to(torch.int32)).view(rows, n_bytes).unbind(1)
    words = []
    for i in range(n_words):
        first, shift = divmod(i * bits, 8)
        word = parts[first] >> shift
        for further in range(1, -(-(shift + bits) // 8)):
            word = word | parts[first + further] << 8 * further - shift
        words.append(word & (1 << bits) - 1)
    return torch.stack(words, dim=1).flatten()[:n]
