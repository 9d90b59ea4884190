"""Supports: how the file says which codes are stored (docs/format.md).

A support is a class and an entry of `cospadi_registry`: what the stored positions look like, what is wrong with them,
how they are packed, what a product with such codes is, and which codes a solver may keep. Masks are (k, d_out) where
matrices are learned and written, and (d_out, k) in torch, where one output neuron is one row. torch is imported where
it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .cospadi_values import Codec


class Support:
    """A way to store the positions of codes S (k, d_out): unless said otherwise, as `Bitmask` does.

    Attributes
    ----------
    name : str
        The word for it in a spec, and in a config where a solver may choose it.
    is_stored : bool
        Whether there is a tensor ``<matrix>.support``; else all codes are stored.
    pattern : (int, int) or None
        ``(n, m)``: n of every m atoms in a row are stored, in every column. None: any.
    mixes : bool
        Whether atoms are whole matrices that are mixed, one coefficient each.
    """

    name: str
    is_stored = True
    pattern: tuple[int, int] | None = None
    mixes = False

    def shape(self, k: int, d_out: int) -> tuple[int, ...]:
        """Shape of the stored positions, uint8."""
        return (d_out, -(-k // 8))

    def nbytes(self, k: int, d_out: int) -> int:
        """Bytes that the positions take in the file."""
        return math.prod(self.shape(k, d_out)) if self.is_stored else 0

    def shape_of_values(self, k: int, d_out: int, n_nonzero: int) -> tuple[int, ...]:
        """Shape of the stored values before they are packed."""
        return (n_nonzero,)

    def column(self, k: int) -> int | None:
        """Values that every column of k atoms stores; None where each has its own number of them."""
        return None if self.pattern is None else k * self.pattern[0] // self.pattern[1]

    def value_codec(self, codec: str) -> str:
        """Codec that values are stored with where `codec` is asked for."""
        return codec

    # --- what is wrong ------------------------------------------------------------------------------------------------

    def size_faults(self, spec: Mapping[str, Any], codec: Codec) -> list[str]:
        """What does not fit, in a spec whose values are right one by one."""
        (_, d_out), k, codes = spec["shape"], spec["dictionary"]["n_atoms"], spec["codes"]
        if self.pattern is not None and k % self.pattern[1]:
            return [f"support {self.name!r} needs a multiple of {self.pattern[1]} atoms, not {k}"]
        faults, n, column = [], codes["n_nonzero"], self.column(k)
        exact, most = column is not None, d_out * (k if column is None else column)
        at_most = "" if exact else "at most "
        if n > most or (exact and n != most):
            faults.append(
                f"n_nonzero is {n}; support {self.name!r} of {k} atoms and {d_out} columns holds {at_most}{most}"
            )
        if codec.scaled:
            expected = d_out * -(-column // (codes["group_size"] or k)) if exact else n
            if codes["n_scales"] > expected or (exact and codes["n_scales"] != expected):
                faults.append(f"{codes['n_scales']} scales for {n} values, expected {at_most}{expected}")
        return faults

    def content_faults(self, name: str, spec: Mapping[str, Any], stored: np.ndarray, codec: Codec) -> list[str]:
        """What is wrong inside the stored positions of part `name`, whose spec and header are right."""
        codes, k = spec["codes"], spec["dictionary"]["n_atoms"]
        if k % 8 and (np.asarray(stored[:, -1]) >> (k % 8)).any():
            return [f"{name}.support has bits set from atom {k} on"]
        return self.count_faults(name, codes, _ones(stored).sum(1, dtype=np.int64), k, codec)

    def count_faults(self, name: str, codes: Mapping[str, Any], counts: np.ndarray, k: int, codec: Codec) -> list[str]:
        """What is wrong where the columns have so many positions, (d_out,)."""
        found = int(counts.sum())
        if found != codes["n_nonzero"]:
            return [f"{name} has {found} positions for {codes['n_nonzero']} values"]
        if codec.scaled:
            n_scales = int((-(-counts // (codes["group_size"] or k))).sum())
            if n_scales != codes["n_scales"]:
                return [f"{name} has {codes['n_scales']} scales, its support {n_scales}"]
        return []

    # --- NumPy: learning and writing ----------------------------------------------------------------------------------

    def pack(self, mask: np.ndarray) -> np.ndarray:
        """Positions of a `complete` mask (k, d_out) as stored."""
        return np.packbits(np.asarray(mask, bool).T, axis=1, bitorder="little")

    def unpack(self, stored: np.ndarray, k: int) -> np.ndarray:
        """Inverse of `pack`: boolean (k, d_out)."""
        return np.unpackbits(np.asarray(stored), axis=1, count=k, bitorder="little").view(bool).T

    def complete(self, mask: np.ndarray) -> np.ndarray:
        """A mask (k, d_out) with what a pattern stores besides: codes that are zero, the first ones."""
        return mask if self.pattern is None else mask | self.project(mask.T.astype(np.float32)).T

    def sizes(self, dictionary: Any | None, codes: Any) -> tuple[int, int, int]:
        """``(d_in, k, d_out)`` of a matrix with these factors."""
        k, d_out = codes.shape
        return k if dictionary is None else dictionary.shape[0], k, d_out

    def counts(self, codes: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Stored values of every column, (d_out,)."""
        return mask.sum(0)

    def values(self, codes: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Codes that are stored, in the order of the file."""
        return codes.T[mask.T]

    def codes(self, values: np.ndarray, mask: np.ndarray | None, k: int, d_out: int) -> np.ndarray:
        """Inverse of `values`: codes (k, d_out)."""
        codes = np.zeros((d_out, k), np.float32)
        codes[mask.T] = values
        return np.ascontiguousarray(codes.T)

    def product(self, rows: Any, codes: Any) -> Any:
        """``rows S`` of rows (n, k), NumPy or torch: (n, d_out)."""
        return rows @ codes

    def project(self, values: Any) -> Any | None:
        """Mask of the entries that a pattern keeps of (n, k), the largest, first of equal ones; None without a pattern.

        Arrays are NumPy or torch; a row holds the codes of one output neuron.
        """
        if self.pattern is None:
            return None
        kept, among = self.pattern
        blocks = abs(values).reshape(len(values), values.shape[1] // among, among)
        mask = blocks >= 0
        for i in range(among):
            here = blocks[:, :, i : i + 1]
            mask[:, :, i] = (blocks[:, :, :i] >= here).sum(2) + (blocks[:, :, i + 1 :] > here).sum(2) < kept
        return mask.reshape(values.shape)

    # --- torch: a loaded model ----------------------------------------------------------------------------------------

    def mask(self, stored: Any, k: int) -> Any:
        """Boolean mask (d_out, k) of positions as stored, torch."""
        return unpack_bits(stored, k)


class Bitmask(Support):
    """One bit an atom: bit i % 8, the lowest first, of byte i // 8."""

    name = "bitmask"


class Dense(Support):
    """All codes are stored."""

    name, is_stored = "dense", False

    def shape_of_values(self, k: int, d_out: int, n_nonzero: int) -> tuple[int, ...]:
        return (d_out, k)

    def column(self, k: int) -> int:
        return k

    def counts(self, codes: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return np.full(codes.shape[1], codes.shape[0])

    def values(self, codes: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return np.ascontiguousarray(codes.T)

    def codes(self, values: np.ndarray, mask: np.ndarray | None, k: int, d_out: int) -> np.ndarray:
        return np.ascontiguousarray(values.reshape(d_out, k).T)


class Pairs(Support):
    """Two of every four atoms, four bits: the first one's place in the lower two, the second's in the upper two."""

    name, pattern = "2:4", (2, 4)

    def content_faults(self, name: str, spec: Mapping[str, Any], stored: np.ndarray, codec: Codec) -> list[str]:
        k, last = spec["dictionary"]["n_atoms"], np.asarray(stored[:, -1])
        bad = int(np.count_nonzero(~_TWO_PAIRS[stored[:, : k // 8]]))
        if k % 8:
            bad += int(np.count_nonzero((last >> 4 != 0) | ((last & 3) >= (last >> 2))))
        if not bad:
            return []
        return [
            f"{name}.support has {bad} bytes whose pairs are not two atoms in order, or that name atoms from {k} on"
        ]

    def pack(self, mask: np.ndarray) -> np.ndarray:
        k, d_out = mask.shape
        quads = np.asarray(mask, bool).T.reshape(d_out, k // 4, 4) if k % 4 == 0 else None
        if quads is None or (quads.sum(2) != 2).any():
            raise ValueError(f"a mask of {k} atoms has not two of every four: support 2:4 cannot hold it")
        first = quads.argmax(2)
        second = 3 - quads[:, :, ::-1].argmax(2)
        nibbles = (first | second << 2).astype(np.uint8)
        nibbles = np.concatenate([nibbles, np.zeros((d_out, nibbles.shape[1] % 2), np.uint8)], axis=1)
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4

    def unpack(self, stored: np.ndarray, k: int) -> np.ndarray:
        stored = np.asarray(stored)
        nibbles = np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), 2 * stored.shape[1])
        nibbles = nibbles[:, : k // 4, None]
        atoms = np.arange(4, dtype=np.uint8)
        return (((nibbles & 3) == atoms) | ((nibbles >> 2) == atoms)).reshape(len(stored), k).T

    def project(self, values: Any) -> Any:
        # as any pattern's, with half as many comparisons
        quads = abs(values).reshape(len(values), values.shape[1] // 4, 4)
        a, b, c, d = (quads[:, :, i] for i in range(4))
        ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
        kept = quads >= 0
        # an entry stays if at most one of the other three beats it, that is, if it beats two
        kept[:, :, 0] = ab & ac | ab & ad | ac & ad
        kept[:, :, 1] = ~ab & bc | ~ab & bd | bc & bd
        kept[:, :, 2] = ~ac & ~bc | ~ac & cd | ~bc & cd
        kept[:, :, 3] = ~ad & ~bd | ~ad & ~cd | ~bd & ~cd
        return kept.reshape(values.shape)

    def mask(self, stored: Any, k: int) -> Any:
        import torch

        pairs = torch.stack([stored & 15, stored >> 4], dim=2).flatten(1)[:, : k // 4].unsqueeze(2)  # (d_out, k / 4, 1)
        atoms = torch.arange(4, dtype=torch.uint8, device=stored.device)
        return ((pairs & 3) == atoms).logical_or((pairs >> 2) == atoms).flatten(1)


class Mixture(Support):
    """Whole matrices as atoms, ``W = sum_m c_m A_m``: the coefficients alone are stored, codes are (n_atoms,)."""

    name, is_stored, mixes = "mixture", False, True

    def value_codec(self, codec: str) -> str:
        # coefficients are few, and all of the matrix hangs on each: they are never cut
        return codec if codec == "float32" else "bf16"

    def size_faults(self, spec: Mapping[str, Any], codec: Codec) -> list[str]:
        (_, d_out), dictionary, codes = spec["shape"], spec["dictionary"], spec["codes"]
        faults, n, k = [], codes["n_nonzero"], dictionary["n_atoms"]
        if "tensor" not in dictionary or k != n * d_out:
            faults.append(f"{n} coefficients do not fit {k} columns of matrix atoms, {d_out} each")
        if self.value_codec(codec.name) != codec.name:
            faults.append(
                f"the coefficients of a mixture have codec {codec.name!r}, expected {self.value_codec(codec.name)!r}"
            )
        return faults

    def sizes(self, dictionary: Any | None, codes: Any) -> tuple[int, int, int]:
        d_in, k = dictionary.shape
        return d_in, k, k // codes.shape[0]

    def counts(self, codes: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return np.array([len(codes)])

    def values(self, codes: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return codes

    def codes(self, values: np.ndarray, mask: np.ndarray | None, k: int, d_out: int) -> np.ndarray:
        return values

    def product(self, rows: Any, codes: Any) -> Any:
        blocks = rows.reshape(rows.shape[0], codes.shape[0], -1)
        return (blocks * codes[None, :, None]).sum(1)


MIXTURE = Mixture.name

_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def _ones(stored: np.ndarray) -> np.ndarray:
    """Number of ones in every byte."""
    if hasattr(np, "bitwise_count"):  # from NumPy 2 on, with the processor's own instruction
        return np.bitwise_count(stored)
    return _ONES[stored]


_TWO_PAIRS = np.array([(b & 3) < (b >> 2 & 3) and (b >> 4 & 3) < (b >> 6) for b in range(256)])


def unpack_bits(stored: Any, k: int) -> Any:
    """Bits (d_out, ceil(k / 8)) uint8 to a boolean mask (d_out, k), torch; bit i % 8 of byte i // 8 is atom i."""
    import torch

    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=stored.device)
    return (stored.unsqueeze(-1) & bits).ne(0).flatten(1)[:, :k]
