"""Trellis-coded matrices: so many bits a weight, each read with those of the weights before it in its row.

The last 12 bits of a row are the state, and a state is a value: computed (`value_of`), so that no table is stored or
looked up. Weights that follow one another share bits of their states, so the values that a row can take lie as the
paths through a trellis do, and an encoder chooses the best path (`solvers.trellis`). A decoder needs no path: it reads
any weight for itself. docs/format.md has every byte.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .cospadi_values import Codec, from_upper_bits, upper_bits

STATE_BITS = 12
N_STATES = 1 << STATE_BITS
# Rows whose bytes lie side by side: a processor's vector reads one of each at a time
LANES = 32
# Found by search: an odd multiplier and two constants of the least error on Gaussian numbers, at 2, 3 and 4 bits
MULTIPLIER, MIDDLE, SLOPE = 16 * 1077, 4012, 5082


def value_of(state: Any) -> Any:
    """Value of states, both arrays of whole numbers of 32 bits: NumPy's or torch's.

    The multiplier throws the older bits of a state over the whole range; the newest ones stay evenly spaced in it, so
    that from every state the next value may be small or large. The polynomial bends that range towards a Gaussian.
    """
    flat = state * MULTIPLIER & 0xFFFF
    flat = flat - ((flat & 0x8000) << 1)
    bend = (flat * flat >> 16) - MIDDLE
    return flat * ((bend * bend + 0x4000 >> 15) + SLOPE) + 0x4000 >> 15


# of every state; and of every value, from the least on, its state
VALUES = value_of(np.arange(N_STATES, dtype=np.int32)).astype(np.int16)
_LEAST = int(VALUES.min())
_STATES = np.zeros(int(VALUES.max()) - _LEAST + 1, np.int16)
_STATES[VALUES.astype(np.int32) - _LEAST] = np.arange(N_STATES)


class Trellis(Codec):
    """Codes of 2 to 4 bits, with a scale for every row and every column: one tensor of bytes.

    Scales, as `Factorization` has them, are those of the rows and then of the columns: float32 (k + d_out,) of bfloat16
    numbers. A code is its value times the scale of its row, times that of its column.
    """

    dtype, whole = "U8", True
    for_dictionaries = in_dictionaries = for_configs = False

    def __init__(self, bits: int) -> None:
        if not 2 <= bits <= 4:
            raise ValueError(f"a trellis of {bits} bits; allowed: 2 to 4")
        self.name, self.bits = f"trellis{bits}", bits

    def shape_of_codes(self, numbers: Sequence[int], codes: Mapping[str, Any]) -> tuple[int, ...]:
        d_out, k = numbers
        return (self.n_stream_bytes(k, d_out) + 2 * (k + d_out) + 4,)

    def n_stream_bytes(self, k: int, d_out: int) -> int:
        """Bytes of the rows alone, which are whole ones."""
        return k * (-(-self.bits * d_out // 8))

    def pack_codes(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Store codes (k, d_out) that are values times these scales (k + d_out,), along a path from state 0.

        Raises
        ------
        ValueError
            If they are not.
        """
        k = len(codes)
        words = upper_bits(scales, 16, "truncate")
        if not np.array_equal(from_upper_bits(words, 16), scales) or not (np.isfinite(scales) & (scales != 0)).all():
            raise ValueError("scales are no bfloat16 numbers, or some are 0")
        units = scales[:k, None].astype(np.float64) * scales[k:]
        values = np.rint(codes / units).clip(_LEAST, -_LEAST).astype(np.int32)
        states = _STATES[np.minimum(values - _LEAST, len(_STATES) - 1)].astype(np.int32)
        before = np.concatenate([np.zeros((k, 1), np.int32), states[:, :-1]], axis=1)
        left = N_STATES >> self.bits
        if not np.array_equal(_codes(VALUES[states], scales), codes) or (states % left != before >> self.bits).any():
            raise ValueError("codes do not follow the trellis")
        by_bit = states[:, :, None] // left >> np.arange(self.bits, dtype=np.int32) & 1
        rows = np.packbits(by_bit.reshape(k, -1).astype(np.uint8), axis=1, bitorder="little")
        pieces = [rows[i : i + LANES].T.tobytes() for i in range(0, k, LANES)]
        body = b"".join([*pieces, words.astype("<u2").tobytes()])
        return np.frombuffer(body + zlib.crc32(body).to_bytes(4, "little"), np.uint8)

    def unpack_codes(self, stored: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of `pack_codes`: codes (k, d_out), float32, and scales."""
        k, d_out = shape
        stored = np.ascontiguousarray(stored)
        rows = self._by_row(stored, k, d_out)
        padded = np.concatenate([np.zeros((k, 2), np.uint8), rows, np.zeros((k, 2), np.uint8)], axis=1).astype(np.int32)
        first, shift = self._places(d_out)
        wide = padded[:, first] | padded[:, first + 1] << 8 | padded[:, first + 2] << 16
        scales = self._scales(stored, k, d_out)
        return _codes(value_of(wide >> shift & N_STATES - 1), scales), scales

    def decode(self, stored: Any, shape: Sequence[int], *, halves: bool = False) -> Any:
        """`unpack_codes` of a torch tensor, transposed: float32 (d_out, k)."""
        import torch
        import torch.nn.functional as F

        d_out, k = shape
        padded = F.pad(self._by_row(stored, k, d_out, torch.cat), (2, 2)).to(torch.int32).T
        first, shift = (torch.from_numpy(part).to(stored.device) for part in self._places(d_out))
        wide = padded[first] | padded[first + 1] << 8 | padded[first + 2] << 16
        values = value_of(wide >> shift[:, None] & N_STATES - 1).float()
        at = self.n_stream_bytes(k, d_out)
        scales = stored[at : at + 2 * (k + d_out)].view(-1, 2).to(torch.int32)
        scales = ((scales[:, 0] | scales[:, 1] << 8) << 16).view(torch.float32)
        return values * scales[:k] * scales[k:, None]

    def with_columns_times(
        self, codes: np.ndarray, scales: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of the same path, each column times its weight (d_out,) as near as bfloat16 has it."""
        k = len(codes)
        units = scales[:k, None].astype(np.float64) * scales[k:]
        scales = np.concatenate([scales[:k], from_upper_bits(upper_bits(scales[k:] * weights, 16, "nearest"), 16)])
        return _codes(np.rint(codes / units), scales), scales

    def faults_of(self, stored: np.ndarray, shape: tuple[int, int]) -> Iterator[str]:
        """What is wrong inside the stored tensor of codes (k, d_out)."""
        k, d_out = shape
        stored = np.ascontiguousarray(stored)
        if zlib.crc32(stored[:-4]) != int.from_bytes(stored[-4:].tobytes(), "little"):
            yield "is damaged: its checksum is another"
            return
        bad = int(np.count_nonzero(~np.isfinite(self._scales(stored, k, d_out))))
        if bad:
            yield f"holds {bad} scales that are NaN or infinite"
        used = self.bits * d_out % 8
        if used and (self._by_row(stored, k, d_out)[:, -1] >> used).any():
            yield "has bits set behind the last number of a row"

    def _by_row(self, stored: Any, k: int, d_out: int, join: Any = np.concatenate) -> Any:
        """Bytes of the rows, (k, bytes of a row)."""
        whole, n_bytes = k // LANES * LANES, -(-self.bits * d_out // 8)
        full = stored[: whole * n_bytes].reshape(-1, n_bytes, LANES).swapaxes(1, 2).reshape(whole, n_bytes)
        return join([full, stored[whole * n_bytes : k * n_bytes].reshape(n_bytes, k - whole).T])

    def _places(self, d_out: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the state of every column begins, two bytes of zeros before: byte, and bit in it."""
        at = self.bits * (np.arange(d_out) + 1) + 16 - STATE_BITS
        return at >> 3, (at & 7).astype(np.int32)

    def _scales(self, stored: np.ndarray, k: int, d_out: int) -> np.ndarray:
        at = self.n_stream_bytes(k, d_out)
        return from_upper_bits(stored[at : at + 2 * (k + d_out)].view("<u2"), 16)


def _codes(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    k = len(values)
    return values.astype(np.float32) * scales[:k, None] * scales[k:]
