"""Numbers as the file stores them: the codecs that a config chooses, and blocks of numbers under one scale.

A scale (bfloat16) is shared by a *block* of numbers: ``value = stored number * scale``. Byte counts are exact: they
equal the sizes of the arrays returned here, which are the tensors written to the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.files import BFLOAT16, SAFETENSORS_DTYPES
from cospadi.runtime.cospadi_registry import CODECS, FACTOR_CODECS, SUPPORTS

# The config knows a third, `optimal`: `rounding` decides it where the metric is known, before values come here
ROUNDINGS = ("nearest", "truncate")

# The config's ``codes.value_bits`` and ``codes.dictionary_bits``
_CHOSEN = [codec for codec in CODECS.values() if codec.for_configs]
CODEC_OF_BITS = {codec.bits: codec.name for codec in _CHOSEN}
if len(CODEC_OF_BITS) < len(_CHOSEN):
    _names = ", ".join(codec.name for codec in _CHOSEN)
    raise ValueError(f"of the codecs {_names} two have as many bits: no config could tell them apart")
DICTIONARY_BITS = tuple(codec.bits for codec in _CHOSEN if codec.for_dictionaries)

# The config's ``codes.block_size``, as a default where none is given: numbers of a block
BLOCK_SIZE = 64

# Rounded each for itself to fewer bits, codes of atoms are worse than none
FEWEST_ALONE = 4

# What every run has tensors of, whatever its variants choose
_ALWAYS = ("float32", "bf16")


def storage_of(codes: Mapping[str, Any]) -> dict[str, Any]:
    """How factors are stored, by the config's section ``codes``; what is not said is as by default.

    Returns
    -------
    dict
        ``value_codec``, ``dictionary_codec`` and ``block_size``, as the budget and `Factorization` take them.
    """
    return {
        "value_codec": CODEC_OF_BITS[codes.get("value_bits", 16)],
        "dictionary_codec": CODEC_OF_BITS[codes.get("dictionary_bits", 16)],
        "block_size": codes.get("block_size", BLOCK_SIZE),
    }


def bits_faults(codes: Mapping[str, Any], *, own_codec: bool) -> Iterator[str]:
    """Bits of the config's section ``codes`` that its rounding cannot do with; `own_codec`: values are not rounded."""
    for key in ("dictionary_bits",) if own_codec else ("value_bits", "dictionary_bits"):
        if codes[key] < FEWEST_ALONE and codes["rounding"] != "optimal":
            yield f"{key}: {codes[key]} are too few for numbers that are rounded one by one; set rounding to optimal"


def modules_of(settings: Mapping[str, Any]) -> list[str]:
    """The modules of the codecs and supports that a variant's complete settings name, for rerun triggers.

    Those of supports that no option names (``dense``, ``mixture``) are the module of all built-in ones, which is always
    among them.
    """
    storage = storage_of(settings.get("codes", {}))
    codecs = {*_ALWAYS, storage["value_codec"], storage["dictionary_codec"]}
    supports = {"dense", *(word for word in settings.values() if isinstance(word, str) and word in SUPPORTS)}
    used = [*(FACTOR_CODECS[name] for name in codecs), *(SUPPORTS[name] for name in supports)]
    return sorted({type(entry).__module__ for entry in used})


def blocks_of_columns(counts: np.ndarray, size: int | None) -> np.ndarray:
    """Block of every stored value: within a column each `size` values in order; None, the whole column.

    Parameters
    ----------
    counts : ndarray (d_out,)
        Stored values a column.

    Returns
    -------
    ndarray (sum(counts),)
        Numbers from 0 on, growing along the values; an empty column has no block.
    """
    counts = np.asarray(counts, np.int64)
    size = size or max(1, int(counts.max(initial=1)))
    blocks = -(-counts // size)
    rank = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(np.cumsum(blocks) - blocks, counts) + rank // size


def blocks_of_atoms(d_in: int, k: int, size: int | None) -> np.ndarray:
    """Block of every entry of a dictionary: (d_in, k), each `size` rows of an atom; None, the whole atom."""
    return (np.arange(d_in) // (size or d_in))[:, None] * k + np.arange(k)


def numbers_nbytes(codec: str, n: int, n_blocks: int) -> int:
    """Bytes of n numbers in so many blocks, with their scales and zero points."""
    chosen = FACTOR_CODECS[codec]
    return chosen.nbytes(n + n_blocks * chosen.shifted) + 2 * n_blocks * chosen.scaled


def find_scales(values: np.ndarray, blocks: np.ndarray, codec: str) -> np.ndarray:
    """Scale of every block: the bfloat16 among a few that gives the least squared error.

    Parameters
    ----------
    values : ndarray (n,), float32
    blocks : ndarray (n,), int
        Block of every value, all numbers from 0 on.

    Returns
    -------
    ndarray (n_blocks,), bfloat16
        Also negative ones: then the value farthest from zero is the integer that has no opposite. Of a codec with zero
        points (2, n_blocks), float32: scales, which bfloat16 holds, and zero points.
    """
    scaled = CODECS[codec]
    n_blocks = int(blocks.max(initial=-1)) + 1
    top, bottom = np.zeros(n_blocks, np.float32), np.zeros(n_blocks, np.float32)
    np.maximum.at(top, blocks, values)
    np.minimum.at(bottom, blocks, values)
    extreme = top - bottom if scaled.shifted else np.where(top >= -bottom, top, bottom)
    # a scale below the one that reaches the extreme cuts it off, for finer steps elsewhere; 8 bits have steps enough
    shrinks = (1.0,) if scaled.bits == 8 else np.linspace(0.7, 1.0, 13)
    best, best_zeros = np.ones(n_blocks, BFLOAT16), np.zeros(n_blocks, np.float32)
    least = np.full(n_blocks, np.inf)
    for reach in (scaled.high,) if scaled.shifted else (scaled.low, scaled.high):
        for shrink in shrinks:
            scales = (extreme / reach * shrink).astype(BFLOAT16)
            scales[scales == 0] = 1
            wide = scales.astype(np.float32)
            zeros = np.clip(np.rint(-bottom * shrink / wide), 0, reach) if scaled.shifted else best_zeros
            rounded = np.clip(np.rint(values / wide[blocks]) + zeros[blocks], scaled.low, scaled.high) - zeros[blocks]
            error = np.bincount(blocks, ((values - rounded * wide[blocks]) ** 2).astype(np.float64), n_blocks)
            better = error < least
            best[better], best_zeros[better], least[better] = scales[better], zeros[better], error[better]
    return np.stack([best.astype(np.float32), best_zeros]) if scaled.shifted else best


def store(
    numbers: np.ndarray,
    codec: str,
    blocks: Callable[[], np.ndarray],
    *,
    scales: Any | None = None,
    rounding: str = "nearest",
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tensor that holds float32 numbers (any shape), and that of their scales (n_blocks,), or None.

    Parameters
    ----------
    blocks : callable
        ``blocks() -> ndarray`` of the shape of `numbers`: the block of each; asked where the codec has scales.
    scales : array, optional
        As `find_scales` gives them, which is the default.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; allowed: {', '.join(ROUNDINGS)}")
    chosen = FACTOR_CODECS[codec]
    if chosen.scaled:
        block_of = blocks()
        scales = find_scales(numbers.ravel(), block_of.ravel(), codec) if scales is None else to_numpy(scales)
        scales, zeros = scales if chosen.shifted else (scales.ravel(), None)
        scales = scales.astype(BFLOAT16)
        numbers = numbers / scales.astype(np.float32)[block_of]
        if zeros is not None:
            numbers = np.concatenate([(numbers + zeros[block_of]).ravel(), zeros])
    stored = chosen.pack(numbers, rounding).view(SAFETENSORS_DTYPES[chosen.dtype])
    return stored, scales if chosen.scaled else None


def restore(
    stored: np.ndarray,
    codec: str,
    blocks: Callable[[], np.ndarray],
    shape: Sequence[int],
    *,
    scales: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Inverse of `store` up to rounding: float32 numbers of that shape, and their scales as `find_scales` gives them.

    Parameters
    ----------
    scales : ndarray, optional
        The stored tensor, of any shape.
    """
    chosen, n = FACTOR_CODECS[codec], int(np.prod(shape))
    stored = np.asarray(stored).ravel()
    if scales is None:
        return chosen.unpack(stored, n).reshape(shape), None
    wide, block_of = np.asarray(scales).astype(np.float32).ravel(), blocks()
    if not chosen.shifted:
        return chosen.unpack(stored, n).reshape(shape) * wide[block_of], scales
    numbers = chosen.unpack(stored, n + wide.size).astype(np.float32)
    zeros = numbers[n:]
    return (numbers[:n].reshape(shape) - zeros[block_of]) * wide[block_of], np.stack([wide, zeros])
