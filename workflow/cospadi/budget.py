"""Budget: which number of atoms and nonzeros (or which rank) so many bytes of the file are enough for.

`ratio` is the fraction of bytes removed from matrices that cost ``2 * d_in * d_out`` bytes each in bfloat16; it becomes
bytes in `nbytes_left` and nowhere else. The count includes dictionary, values, scales and support exactly as `codecs`
stores them, so the file keeps the promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cospadi.codecs import GROUP_SIZE, IDENTITY, codec_bits, scales_nbytes, stored_nbytes, support_nbytes
from cospadi.errors import ConfigError


def dense_nbytes(d_in: int, d_out: int) -> int:
    """Bytes of the dense matrix in bfloat16."""
    return 2 * d_in * d_out


def nbytes_left(shapes: Iterable[tuple[int, int]], ratio: float) -> int:
    """Whole bytes that matrices of these shapes may take together once the fraction `ratio` of them is removed."""
    return math.floor((1 - ratio) * sum(dense_nbytes(*shape) for shape in shapes))


def factors_nbytes(
    d_in: int,
    d_out: int,
    n_atoms: int,
    n_nonzero: int,
    *,
    support: str,
    value_codec: str,
    dictionary_codec: str = "bf16",
    group_size: int | None = GROUP_SIZE,
    n_scales: int | None = None,
) -> int:
    """Bytes of dictionary (d_in, n_atoms) and codes (n_atoms, d_out) with `n_nonzero` stored values in all.

    Parameters
    ----------
    group_size : int or None
        Numbers a scale covers where a codec has scales: stored values of a column, rows of an atom; None, all of them.
    n_scales : int, optional
        Scales of the values; default: what columns of equal length have.
    """
    if n_scales is None:
        column = -(-n_nonzero // d_out)
        n_scales = d_out * -(-column // (group_size or max(column, 1)))
    nbytes = stored_nbytes(value_codec, n_nonzero) + scales_nbytes(value_codec, n_scales)
    if dictionary_codec != IDENTITY:
        nbytes += stored_nbytes(dictionary_codec, d_in * n_atoms)
        nbytes += scales_nbytes(dictionary_codec, -(-d_in // (group_size or d_in)) * n_atoms)
    return nbytes + support_nbytes(support, n_atoms, d_out)


@dataclass(frozen=True)
class SparseShape:
    """Shape of a dictionary and its column-sparse codes."""

    n_atoms: int
    n_nonzero_coefs: int


def sparse_shape(
    d_in: int,
    d_out: int,
    *,
    nbytes: int,
    rho: float,
    support: str = "bitmask",
    value_codec: str = "bf16",
    dictionary_codec: str = "bf16",
    group_size: int | None = GROUP_SIZE,
) -> SparseShape:
    """Largest dictionary with ``n_nonzero_coefs = n_atoms / rho`` within `nbytes`.

    With bfloat16 values and a 1-bit mask this is ``k = nbytes / 2 / (d_in + d_out / rho + d_out / 16)``; with 14-bit
    values and ``rho = 2`` it is the paper's Eq. 11, ``k = nbytes / 2 / (d_in + d_out / rho)``. Rounding to whole atoms
    and bytes is exact: the atoms are maximal, then the nonzeros are raised while a whole one more a column still fits.
    Support ``"2:4"`` has a multiple of 4 atoms and half as many nonzeros, whatever `rho`.

    Raises
    ------
    ConfigError
        If not even one atom with one nonzero fits (of ``"2:4"``, four with two).
    """

    def taken(n_atoms: int, n_nonzero_coefs: int) -> int:
        return factors_nbytes(
            d_in,
            d_out,
            n_atoms,
            n_nonzero_coefs * d_out,
            support=support,
            value_codec=value_codec,
            dictionary_codec=dictionary_codec,
            group_size=group_size,
        )

    quads = support == "2:4"
    rho = 2.0 if quads else rho
    step = 4 if quads else 1

    def coefs(n_atoms: int) -> int:
        return max(1, math.floor(n_atoms / rho))

    value_bytes = codec_bits(value_codec) / 8
    atom_bytes = codec_bits(dictionary_codec) / 8
    n_atoms = (math.ceil(nbytes / (atom_bytes * d_in + value_bytes * d_out / rho + d_out / 8)) + 2) // step * step
    while n_atoms > 0 and taken(n_atoms, coefs(n_atoms)) > nbytes:
        n_atoms -= step
    if n_atoms <= 0:
        smallest = "four atoms fit" if quads else "one atom fits"
        raise ConfigError([f"{nbytes} bytes for a {d_in}x{d_out} matrix: not {smallest}"])
    n_nonzero_coefs = coefs(n_atoms)
    while not quads and n_nonzero_coefs < n_atoms and taken(n_atoms, n_nonzero_coefs + 1) <= nbytes:
        n_nonzero_coefs += 1
    return SparseShape(n_atoms, n_nonzero_coefs)


def low_rank(
    d_in: int,
    d_out: int,
    *,
    nbytes: int,
    value_codec: str = "bf16",
    dictionary_codec: str = "bf16",
    group_size: int | None = GROUP_SIZE,
) -> int:
    """Largest rank r with ``r (d_in + d_out)`` stored numbers within `nbytes` (SVD-LLM).

    Raises
    ------
    ConfigError
        If not even rank 1 fits.
    """
    bits = codec_bits(dictionary_codec) * d_in + codec_bits(value_codec) * d_out  # of rank 1, without scales
    rank = min(d_in, d_out, 8 * nbytes // bits)
    while rank > 0 and nbytes < factors_nbytes(
        d_in,
        d_out,
        rank,
        rank * d_out,
        support="dense",
        value_codec=value_codec,
        dictionary_codec=dictionary_codec,
        group_size=group_size,
    ):
        rank -= 1
    if rank <= 0:
        raise ConfigError([f"{nbytes} bytes for a {d_in}x{d_out} matrix: not even rank 1 fits"])
    return rank
