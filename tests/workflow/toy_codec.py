"""Powers of two: a sign and an exponent, six bits a number."""

import math

import numpy as np

from .cospadi_values import Codec, decode_words, encode_words, pack_words, unpack_words


class PowersOfTwo(Codec):
    """``2^(e - 24)`` for an exponent e of 1 to 31 in the lower five bits, 0 for e = 0; the sixth bit is the sign."""

    name, dtype, bits, stream = "pow2", "U8", 6, True

    def pack(self, numbers, rounding):  # NumPy, for learning
        exponents = np.log2(np.maximum(np.abs(numbers), 2.0**-24))
        exponents = (np.rint(exponents) if rounding == "nearest" else np.floor(exponents)).clip(-24, 7)
        return pack_words((exponents + 24).astype(np.uint8) | (numbers < 0) * np.uint8(32), 6)

    def unpack(self, stored, n):
        words = unpack_words(stored, 6, n)
        sizes = np.exp2((words & 31) - np.float32(24)) * (words & 31 > 0)
        return np.where(words & 32, -sizes, sizes)

    def encode(self, numbers):  # torch, for loaded models
        import torch

        exponents = numbers.float().abs().clamp(min=2.0**-24).log2().round().clamp(-24, 7)
        return encode_words((exponents + 24).to(torch.int32) | (numbers < 0).to(torch.int32) << 5, 6)

    def decode(self, stored, shape):
        import torch

        words = decode_words(stored, 6, math.prod(shape))
        sizes = torch.exp2((words & 31).float() - 24) * ((words & 31) > 0)
        return torch.where((words & 32) > 0, -sizes, sizes).to(torch.bfloat16).view(*shape)
