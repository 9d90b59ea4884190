"""Integers, with a scale for every block of them, and a zero point where the codec says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .cospadi_values import Codec, decode_words, encode_words, pack_words, unpack_words

# Bits of those that there are; their code decides what methods learn that choose among them
WIDTHS = (8, 6, 4, 3, 2)


class Integers(Codec):
    """Integers of 2 to 8 bits in two's complement: 8 keep the shape of the numbers, fewer are one stream."""

    scaled = True

    def __init__(self, bits: int) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"integers of {bits} bits; allowed: 2 to 8")
        self.name, self.bits = f"int{bits}", bits
        self.stream = bits < 8
        self.dtype = "U8" if self.stream else "I8"
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def pack(self, numbers: np.ndarray, rounding: str) -> np.ndarray:
        whole = np.rint(numbers) if rounding == "nearest" else np.trunc(numbers)
        integers = np.clip(whole, self.low, self.high).astype(np.int8)
        return pack_words(integers.view(np.uint8), self.bits) if self.stream else integers

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        if not self.stream:
            return np.asarray(stored, np.int8).reshape(n)
        sign = 1 << (self.bits - 1)
        return (unpack_words(stored, self.bits, n) ^ np.uint8(sign)).view(np.int8) - np.int8(sign)

    def encode(self, numbers: Any) -> Any:
        import torch

        integers = numbers.round().clamp(self.low, self.high)
        if not self.stream:
            return integers.to(torch.int8)
        return encode_words(integers.to(torch.int16) & (1 << self.bits) - 1, self.bits)

    def decode(self, stored: Any, shape: Sequence[int]) -> Any:
        import torch

        if not self.stream:
            return stored.view(*shape).to(torch.bfloat16)
        sign = 1 << (self.bits - 1)
        words = decode_words(stored, self.bits, math.prod(shape))
        return ((words ^ sign).to(torch.int8) - sign).to(torch.bfloat16).view(*shape)


class Shifted(Codec):
    """Whole numbers from 0 on, whose blocks have a zero point beside their scale: ``value = (number - zero) scale``.

    Of one stream of 2 to 8 bits: the numbers, then the zero points of the blocks in the order of the scales. A block
    whose values lie on one side of zero, or farther out on one, has finer steps than with `Integers`.
    """

    scaled = shifted = stream = True
    for_dictionaries = in_dictionaries = for_configs = False
    dtype = "U8"

    def __init__(self, bits: int) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"integers of {bits} bits; allowed: 2 to 8")
        self.name, self.bits = f"uint{bits}", bits
        self.low, self.high = 0, 2**bits - 1

    def pack(self, numbers: np.ndarray, rounding: str) -> np.ndarray:
        whole = np.rint(numbers) if rounding == "nearest" else np.trunc(numbers)
        return pack_words(np.clip(whole, self.low, self.high).astype(np.uint8), self.bits)

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        return unpack_words(stored, self.bits, n)

    def encode(self, numbers: Any) -> Any:
        import torch

        return encode_words(numbers.round().clamp(self.low, self.high).to(torch.int16), self.bits)

    def decode(self, stored: Any, shape: Sequence[int]) -> Any:
        import torch

        return decode_words(stored, self.bits, math.prod(shape)).to(torch.bfloat16).view(*shape)
