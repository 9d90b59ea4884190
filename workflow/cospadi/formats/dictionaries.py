"""Dictionaries as the file stores them: as numbers with scales down each atom, or, the identity, as nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cospadi.formats.values import blocks_of_atoms, numbers_nbytes, restore, store
from cospadi.runtime.cospadi_format import IDENTITY
from cospadi.runtime.cospadi_registry import FACTOR_CODECS

__all__ = ["IDENTITY", "dictionary_nbytes", "pack_dictionary", "unpack_dictionary"]


def dictionary_nbytes(d_in: int, k: int, codec: str, block_size: int | None) -> int:
    """Bytes of a dictionary (d_in, k) with its scales; `codec` is `IDENTITY` or one of numbers."""
    if codec == IDENTITY:
        return 0
    n = math.prod(FACTOR_CODECS[codec].numbers_of_dictionary(d_in, k))
    return numbers_nbytes(codec, n, -(-d_in // (block_size or d_in)) * k)


def pack_dictionary(
    dictionary: np.ndarray | None, k: int, tensor: str, *, codec: str, block_size: int | None, scales: Any | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors, by their names, and spec of a dictionary (d_in, k), or its diagonal (d_in,); None is the identity.

    Parameters
    ----------
    tensor : str
        Name of its tensor.
    scales : array, optional
        Default: `values.find_scales`.
    """
    if dictionary is None:
        return {}, {"codec": IDENTITY, "n_atoms": k}
    spec: dict[str, Any] = {"codec": codec, "n_atoms": k, "tensor": tensor}
    tensors = {}
    tensors[tensor], found = store(
        dictionary, codec, lambda: blocks_of_atoms(*dictionary.shape, block_size), scales=scales
    )
    if found is not None:
        tensors[f"{tensor}_scales"] = found.reshape(-1, k)
        spec["group_size"] = block_size
    return tensors, spec


def unpack_dictionary(
    tensors: Mapping[str, np.ndarray], spec: Mapping[str, Any], d_in: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Inverse of `pack_dictionary`: dictionary, and scales where it has some."""
    if spec["codec"] == IDENTITY:
        return None, None
    tensor, k = spec["tensor"], spec["n_atoms"]
    scales = np.asarray(tensors[f"{tensor}_scales"]) if FACTOR_CODECS[spec["codec"]].scaled else None
    blocks = lambda: blocks_of_atoms(d_in, k, spec["group_size"])  # noqa: E731
    shape = FACTOR_CODECS[spec["codec"]].numbers_of_dictionary(d_in, k)
    return restore(tensors[tensor], spec["codec"], blocks, shape, scales=scales)
