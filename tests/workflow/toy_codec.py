"""Powers of two: a sign and an exponent, five bits a number."""

import math

import numpy as np

from .cospadi_values import Codec, decode_words, encode_words, pack_words, unpack_words


class PowersOfTwo(Codec):
    """``2^(e - 12)`` for an exponent e of 1 to 15 in the lower four bits, 0 for e = 0; the fifth bit is the sign."""

    name, dtype, bits, stream = "pow2", "U8", 5, True

    def pack(self, numbers, rounding):  # NumPy, for learning
        exponents = np.log2(np.maximum(np.abs(numbers), 2.0**-12))
        exponents = (np.rint(exponents) if rounding == "nearest" else np.floor(exponents)).clip(-12, 3)
        return pack_words((exponents + 12).astype(np.uint8) | (numbers < 0) * np.uint8(16), 5)

    def unpack(self, stored, n):
        words = unpack_words(stored, 5, n)
        sizes = np.exp2((words & 15) - np.float32(12)) * (words & 15 > 0)
        return np.where(words & 16, -sizes, sizes)

    def encode(self, numbers):  # torch, for loaded models
        import torch

        exponents = numbers.float().abs().clamp(min=2.0**-12).log2().round().clamp(-12, 3)
        return encode_words((exponents + 12).to(torch.int32) | (numbers < 0).to(torch.int32) << 4, 5)

    def decode(self, stored, shape):
        import torch

        words = decode_words(stored, 5, math.prod(shape))
        sizes = torch.exp2((words & 15).float() - 12) * ((words & 15) > 0)
        return torch.where((words & 16) > 0, -sizes, sizes).to(torch.bfloat16).view(*shape)
