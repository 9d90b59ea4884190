"""Budget: which number of atoms and nonzeros (or which rank) so many bytes of the file are enough for.

`ratio` is the fraction of bytes removed from matrices that cost ``2 * d_in * d_out`` bytes each in bfloat16; it becomes
bytes in `nbytes_left` and nowhere else. The count includes dictionary, values, scales and support exactly as `formats`
stores them, so the file keeps the promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cospadi.errors import ConfigError
from cospadi.formats.codes import codes_nbytes
from cospadi.formats.dictionaries import IDENTITY, dictionary_nbytes
from cospadi.formats.values import BLOCK_SIZE
from cospadi.runtime.cospadi_registry import CODECS, SUPPORTS


def dense_nbytes(d_in: int, d_out: int) -> int:
    """Bytes of the dense matrix in bfloat16."""
    return 2 * d_in * d_out


def as_is_nbytes(shapes: Iterable[tuple[int, int]], storage: Mapping[str, Any]) -> int:
    """Bytes of matrices that are stored as they are, as exactly as the codec of the values can.

    Parameters
    ----------
    storage : mapping
        From `formats.values.storage_of`.
    """
    own = {**storage, "dictionary_codec": IDENTITY}
    return sum(factors_nbytes(*shape, shape[0], shape[0] * shape[1], support="dense", **own) for shape in shapes)


def ratio_of(bits: float) -> float:
    """The ratio that leaves so many bits a weight."""
    return 1 - bits / 16


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
    block_size: int | None = BLOCK_SIZE,
    n_scales: int | None = None,
) -> int:
    """Bytes of dictionary (d_in, n_atoms) and codes (n_atoms, d_out) with `n_nonzero` stored values in all.

    Parameters
    ----------
    block_size : int or None
        Numbers a scale covers where a codec has scales: stored values of a column, rows of an atom; None, all of them.
    n_scales : int, optional
        Scales of the values; default: what columns of equal length have.
    """
    if n_scales is None:
        column = -(-n_nonzero // d_out)
        n_scales = d_out * -(-column // (block_size or max(column, 1)))
    codes = codes_nbytes(support, value_codec, n_atoms, d_out, n_nonzero, n_scales)
    return codes + dictionary_nbytes(d_in, n_atoms, dictionary_codec, block_size)


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
    block_size: int | None = BLOCK_SIZE,
    most_atoms: int | None = None,
) -> SparseShape:
    """Largest dictionary with ``n_nonzero_coefs = n_atoms / rho`` within `nbytes`.

    With bfloat16 values and a 1-bit mask this is ``k = nbytes / 2 / (d_in + d_out / rho + d_out / 16)``; with 14-bit
    values and ``rho = 2`` it is the paper's Eq. 11, ``k = nbytes / 2 / (d_in + d_out / rho)``. Rounding to whole atoms
    and bytes is exact: the atoms are maximal, then the nonzeros are raised while a whole one more a column still fits.
    A support with a pattern has a multiple of its atoms and its share of nonzeros, whatever `rho`: of ``"2:4"`` half.
    Where `most_atoms` are reached, what is left goes to nonzeros and lowers rho.

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
            block_size=block_size,
        )

    pattern = SUPPORTS[support].pattern
    step = 1 if pattern is None else pattern[1]
    rho = rho if pattern is None else pattern[1] / pattern[0]

    def coefs(n_atoms: int) -> int:
        return max(1, math.floor(n_atoms / rho))

    value_bytes = CODECS[value_codec].bits / 8
    atom_bytes = CODECS[dictionary_codec].bits / 8
    n_atoms = (math.ceil(nbytes / (atom_bytes * d_in + value_bytes * d_out / rho + d_out / 8)) + 2) // step * step
    if most_atoms is not None:
        n_atoms = min(n_atoms, most_atoms // step * step)
    while n_atoms > 0 and taken(n_atoms, coefs(n_atoms)) > nbytes:
        n_atoms -= step
    if n_atoms <= 0:
        smallest = "one atom fits" if step == 1 else f"{step} atoms fit"
        raise ConfigError([f"{nbytes} bytes for a {d_in}x{d_out} matrix: not {smallest}"])
    n_nonzero_coefs = coefs(n_atoms)
    while pattern is None and n_nonzero_coefs < n_atoms and taken(n_atoms, n_nonzero_coefs + 1) <= nbytes:
        n_nonzero_coefs += 1
    return SparseShape(n_atoms, n_nonzero_coefs)


def low_rank(
    d_in: int,
    d_out: int,
    *,
    nbytes: int,
    value_codec: str = "bf16",
    dictionary_codec: str = "bf16",
    block_size: int | None = BLOCK_SIZE,
) -> int:
    """Largest rank r with ``r (d_in + d_out)`` stored numbers within `nbytes` (SVD-LLM).

    Raises
    ------
    ConfigError
        If not even rank 1 fits.
    """
    bits = CODECS[dictionary_codec].bits * d_in + CODECS[value_codec].bits * d_out  # of rank 1, without scales
    rank = min(d_in, d_out, 8 * nbytes // bits)
    while rank > 0 and nbytes < factors_nbytes(
        d_in,
        d_out,
        rank,
        rank * d_out,
        support="dense",
        value_codec=value_codec,
        dictionary_codec=dictionary_codec,
        block_size=block_size,
    ):
        rank -= 1
    if rank <= 0:
        raise ConfigError([f"{nbytes} bytes for a {d_in}x{d_out} matrix: not even rank 1 fits"])
    return rank
