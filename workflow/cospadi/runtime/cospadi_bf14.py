"""bf14: the paper's storage of codes, bfloat16 without its two lowest mantissa bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .cospadi_values import Codec, decode_words, encode_words, from_upper_bits, pack_words, unpack_words, upper_bits


class Bf14(Codec):
    """The upper 14 bits of a float32, as one stream."""

    name, dtype, bits, stream, significant_bits = "bf14", "U8", 14, True, 6
    for_dictionaries = False

    def pack(self, numbers: np.ndarray, rounding: str) -> np.ndarray:
        return pack_words(upper_bits(numbers, 14, rounding), 14)

    def unpack(self, stored: np.ndarray, n: int) -> np.ndarray:
        return from_upper_bits(unpack_words(stored, 14, n), 14)

    def encode(self, numbers: Any) -> Any:
        import torch

        words = numbers.float().flatten().view(torch.int32).long() & 0xFFFFFFFF
        return encode_words((words + 0x1FFFF + (words >> 18 & 1)) >> 18, 14)

    def decode(self, stored: Any, shape: Sequence[int]) -> Any:
        import torch

        bits = decode_words(stored, 14, math.prod(shape)) << 2
        # int16 takes the upper half as negative numbers
        bits = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
        return bits.to(torch.int16).view(torch.bfloat16).view(*shape)

    def n_not_finite(self, stored: np.ndarray) -> int:
        # words: sign, 8 of the exponent, 5 of the mantissa; seven bytes hold four
        bad, piece = 0, 7 * 2**18
        for first in range(0, stored.size, piece):
            part = stored[first : first + piece]
            words = np.zeros((-(-part.size // 7), 8), np.uint8)
            words[: part.size // 7, :7] = part[: part.size // 7 * 7].reshape(-1, 7)
            words[part.size // 7 :, : part.size % 7] = part[part.size // 7 * 7 :]
            lanes = words.view("<u8")
            for lane in range(4):
                bad += int(np.count_nonzero(lanes >> np.uint64(14 * lane + 5) & np.uint64(0xFF) == 0xFF))
        return bad
