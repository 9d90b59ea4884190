"""Codes as the file stores them: values on a support, with scales along each column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cospadi.arrays import to_numpy
from cospadi.files import BFLOAT16
from cospadi.formats.values import blocks_of_columns, numbers_nbytes, restore, store
from cospadi.runtime.cospadi_registry import FACTOR_CODECS, SUPPORTS


def codes_nbytes(support: str, codec: str, k: int, d_out: int, n_nonzero: int, n_scales: int) -> int:
    """Bytes of codes (k, d_out) with so many stored values and scales."""
    return numbers_nbytes(codec, n_nonzero, n_scales) + SUPPORTS[support].nbytes(k, d_out)


def n_blocks(counts: np.ndarray, block_size: int | None) -> int:
    """Scales that columns with so many stored values have, where the codec has scales."""
    return int((-(-counts // (block_size or max(1, counts.max(initial=1))))).sum())


def pack_codes(
    codes: np.ndarray,
    mask: np.ndarray | None,
    name: str,
    *,
    support: str,
    codec: str,
    block_size: int | None,
    scales: Any | None,
    rounding: str,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors, by their names, and spec of codes (k, d_out) of the matrix or part `name`.

    Parameters
    ----------
    mask : ndarray (k, d_out), bool, or None
        Codes that are stored; None where the support stores no positions.
    scales : array, optional
        Default: `values.find_scales`. A codec of whole matrices needs its own, as `Product` has them.
    """
    on = SUPPORTS[support]
    tensors = {f"{name}.support": on.pack(mask)} if on.is_stored else {}
    values = on.values(codes, mask)
    spec = {"codec": codec, "support": support, "n_nonzero": int(values.size)}
    chosen = FACTOR_CODECS[codec]
    if chosen.whole:
        scales = to_numpy(scales)
        if chosen.scaled:
            scales, columns = np.split(scales, [len(codes)])
            codes = multiples_of_steps(codes, scales, columns, block_size)
            tensors[f"{name}.scales"] = columns.astype(BFLOAT16)
            spec |= {"group_size": block_size, "n_scales": columns.size}
        stored = chosen.pack_codes(codes, scales)
        return {**tensors, f"{name}.values": stored}, spec | ({"n_bytes": stored.nbytes} if chosen.variable else {})
    tensors[f"{name}.values"], found = store(
        values,
        codec,
        lambda: blocks_of_columns(on.counts(codes, mask), block_size).reshape(values.shape),
        scales=scales,
        rounding=rounding,
    )
    if found is not None:
        tensors[f"{name}.scales"] = found
        spec |= {"group_size": block_size, "n_scales": int(found.size)}
    return tensors, spec


def unpack_codes(
    tensors: Mapping[str, np.ndarray], spec: Mapping[str, Any], name: str, k: int, d_out: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Inverse of `pack_codes`: codes, mask and scales."""
    on, codec = SUPPORTS[spec["support"]], spec["codec"]
    mask = on.unpack(tensors[f"{name}.support"], k) if on.is_stored else None
    if FACTOR_CODECS[codec].whole:
        codes, scales = FACTOR_CODECS[codec].unpack_codes(np.asarray(tensors[f"{name}.values"]), (k, d_out))
        if FACTOR_CODECS[codec].scaled:
            columns = np.asarray(tensors[f"{name}.scales"]).astype(np.float32)
            codes = codes * _of_every_code(columns, k, d_out, spec["group_size"])
            scales = np.concatenate([scales, columns])
        return codes, None, scales
    scales = np.asarray(tensors[f"{name}.scales"]) if FACTOR_CODECS[codec].scaled else None

    def blocks() -> np.ndarray:
        counts = np.full(d_out, k) if mask is None else mask.sum(0)
        return blocks_of_columns(counts, spec["group_size"])

    values, scales = restore(tensors[f"{name}.values"], codec, blocks, (spec["n_nonzero"],), scales=scales)
    return on.codes(values, mask, k, d_out), mask, scales


def multiples_of_steps(codes: np.ndarray, steps: np.ndarray, scales: np.ndarray, block_size: int | None) -> np.ndarray:
    """Codes (k, d_out) of an entropy-coded matrix without the scales of its columns: whole numbers times the steps."""
    steps = steps[:, None]
    return np.rint(codes / _of_every_code(scales, *codes.shape, block_size) / steps) * steps


def _of_every_code(scales: np.ndarray, k: int, d_out: int, block_size: int | None) -> np.ndarray:
    """Scale of every code, (k, d_out), where all codes are stored."""
    return scales[blocks_of_columns(np.full(d_out, k), block_size)].reshape(d_out, k).T
