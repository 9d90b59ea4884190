"""How the tensors of a packed matrix become numbers again, in torch (docs/format.md of CoSpaDi Workflow).

What a codec or a support does is said in its own file (`cospadi_registry`); here both factors are put together.
The functions are made of plain tensor operations, so they run on every device and `torch.compile` traces through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .cospadi_format import block_of, in_one_line, spec_faults, stored_tensors
from .cospadi_registry import CODECS, SUPPORTS

_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8}


def tensor_shapes(spec: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor a matrix is stored as.

    Parameters
    ----------
    spec : dict
        One entry of ``quantization_config.matrices``.

    Returns
    -------
    dict
        Those of ``dictionary``, ``dictionary_scales``, ``values``, ``scales`` and ``support`` that the matrix has, to
        ``(shape, dtype)``.

    Raises
    ------
    ValueError
        If the spec is not valid, or names a codec or support that this code does not know.
    """
    faults = spec_faults(spec)
    if faults:
        raise ValueError(in_one_line(faults))
    others = {"support": torch.uint8, "scales": torch.bfloat16, "dictionary_scales": torch.bfloat16}
    return {
        kind: (shape, _DTYPES[codec.dtype] if codec else others[kind])
        for kind, shape, codec in stored_tensors("", spec).values()
    }


def decode_dictionary(
    spec: dict[str, Any], stored: torch.Tensor | None, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Dictionary (d_in, k) in `dtype`; its diagonal (d_in,) where that is all; None where it is the identity."""
    if stored is None:
        return None
    (d_in, _), k, codec = spec["shape"], spec["dictionary"]["n_atoms"], spec["dictionary"]["codec"]
    numbers = decode_numbers(codec, stored, CODECS[codec].numbers_of_dictionary(d_in, k))
    if scales is None:
        return numbers.to(dtype)
    size = block_of(spec["dictionary"], d_in)
    return (numbers.float() * scales.float().repeat_interleave(size, 0)[:d_in]).to(dtype)


def decode_codes(
    spec: dict[str, Any],
    values: torch.Tensor,
    scales: torch.Tensor | None,
    support: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Codes S transposed, (d_out, k) with zeros, in `dtype`: one output neuron is one row."""
    d_out, k = spec["shape"][1], spec["dictionary"]["n_atoms"]
    codec, n, shifted = spec["codes"]["codec"], spec["codes"]["n_nonzero"], CODECS[spec["codes"]["codec"]].shifted
    mask = None
    if CODECS[codec].whole:
        halves = scales is None and dtype == torch.bfloat16
        codes = CODECS[codec].decode(values.to(torch.uint8), (d_out, k), halves=halves)
    elif support is None and not shifted:
        codes = decode_numbers(codec, values, (d_out, k))
    else:
        mask = None if support is None else decode_support(spec, support)
        numbers = decode_numbers(codec, values, (n + len(scales) if shifted else n,))
        codes = numbers[:n].view(d_out, k) if mask is None else _spread(numbers[:n], mask)
    if scales is None or not len(scales):
        return codes.to(dtype)
    codes, size = codes.float(), block_of(spec["codes"], k)
    if mask is None:  # every column has as many blocks
        if shifted:
            codes = codes - of_blocks(numbers[n:], d_out, size, k)
        return (codes * of_blocks(scales, d_out, size, k)).to(dtype)
    block = _block_of(mask, size, len(scales))
    if shifted:  # codes that are not stored stay zero
        codes = (codes - numbers[n:].float()[block]) * mask
    return (codes * scales.float()[block]).to(dtype)


def of_blocks(numbers: torch.Tensor, n_rows: int, size: int, length: int) -> torch.Tensor:
    """A number of each block, row after row, for all of a block: float32 (n_rows, length)."""
    return numbers.float().view(n_rows, -1).repeat_interleave(size, 1)[:, :length]


def _spread(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=numbers.dtype, device=mask.device).masked_scatter(mask, numbers)


def _block_of(mask: torch.Tensor, size: int, n_scales: int) -> torch.Tensor:
    """Which scale each code of a (d_out, k) mask has: a column's stored values have one for each `size`, in order."""
    rank = mask.cumsum(1, dtype=torch.int32)  # from 1 at the first stored value of a column
    blocks = (rank[:, -1:] + (size - 1)) // size
    block = blocks.cumsum(0) - blocks + (rank - 1).clamp(min=0) // size
    # codes that are not stored are zero, whichever scale they get
    return block.clamp(max=n_scales - 1)


def decode_support(spec: dict[str, Any], support: torch.Tensor) -> torch.Tensor:
    """Mask (d_out, k) of the stored codes."""
    return SUPPORTS[spec["codes"]["support"]].mask(support.to(torch.uint8), spec["dictionary"]["n_atoms"])


def decode_numbers(name: str, stored: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Numbers of that shape. A tool may have cast what is stored: integers are in it unchanged, bfloat16 rounded."""
    dtype = _DTYPES[CODECS[name].dtype]
    return CODECS[name].decode(stored if dtype.is_floating_point else stored.to(dtype), shape)


def encode_dictionary(spec: dict[str, Any], dictionary: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Store a dictionary with the codec and the scales it had: inverse of `decode_dictionary`."""
    if scales is not None:
        size = block_of(spec["dictionary"], len(dictionary))
        scales = scales.float().repeat_interleave(size, 0)[: len(dictionary)]
    return _encode(spec["dictionary"]["codec"], dictionary, scales)


def encode_codes(
    spec: dict[str, Any],
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    support: torch.Tensor | None,
    values: torch.Tensor,
) -> torch.Tensor:
    """Store transposed codes (d_out, k) with the support, scales and zero points that `values` have: inverse of
    `decode_codes`.
    """
    mask = torch.ones_like(codes, dtype=torch.bool) if support is None else decode_support(spec, support)
    numbers = codes if support is None else codes[mask]
    if scales is not None:
        block = _block_of(mask, block_of(spec["codes"], mask.shape[1]), len(scales))
        block = block if support is None else block[mask]
        n = spec["codes"]["n_nonzero"]
        if CODECS[spec["codes"]["codec"]].shifted:
            zeros = decode_numbers(spec["codes"]["codec"], values, (n + len(scales),))[n:].float()
            numbers = (numbers.float() / scales.float()[block]).nan_to_num(0, 0, 0) + zeros[block]
            return _encode(spec["codes"]["codec"], torch.cat([numbers.flatten(), zeros]), None)
        scales = scales.float()[block]
    return _encode(spec["codes"]["codec"], numbers, scales)


def _encode(codec: str, numbers: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Stored tensor of `numbers`, rounded to nearest."""
    return CODECS[codec].encode(numbers if scales is None else (numbers.float() / scales).nan_to_num(0, 0, 0))
