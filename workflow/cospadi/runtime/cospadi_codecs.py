"""How the tensors of a packed matrix become numbers again, in torch (docs/format.md of CoSpaDi Workflow).

A codec is one line of `VALUE_CODECS`: dtype and shape of the stored tensor as `cospadi_format` says, and its decoding.
The functions are made of plain tensor operations, so they run on every device and `torch.compile` traces through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .cospadi_format import CODECS, in_one_line, spec_faults, stored_tensors


@dataclass(frozen=True)
class ValueCodec:
    """A way to store numbers.

    Attributes
    ----------
    dtype : torch.dtype
        Of the stored tensor.
    shape : callable
        ``shape(numbers) -> tuple``: shape of the stored tensor for numbers of that shape.
    decode : callable
        ``decode(stored, shape) -> Tensor``: bfloat16 numbers of that shape, before scaling.
    scaled : bool
        Whether a group of numbers has a scale.
    """

    dtype: torch.dtype
    shape: Callable[[Sequence[int]], tuple[int, ...]]
    decode: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
    scaled: bool = False


def _decode_bf14(stored: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Stream of 14-bit words, least significant bit first: 7 bytes hold 4 values."""
    n = math.prod(shape)
    groups = -(-n // 4)
    b = F.pad(stored, (0, 7 * groups - stored.numel())).view(groups, 7).to(torch.int32).unbind(1)
    words = torch.stack(
        [
            b[0] | (b[1] & 0x3F) << 8,
            b[1] >> 6 | b[2] << 2 | (b[3] & 0x0F) << 10,
            b[3] >> 4 | b[4] << 4 | (b[5] & 0x03) << 12,
            b[5] >> 2 | b[6] << 6,
        ],
        dim=1,
    )  # (groups, 4)
    # a word is the upper 14 bits of a bfloat16; int16 takes the upper half as negative numbers
    bits = words << 2
    bits = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
    return bits.to(torch.int16).view(torch.bfloat16).flatten()[:n].view(*shape)


def _decode_int4(stored: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Two's complement, two a byte, the first in the low half."""
    nibbles = torch.stack([stored & 15, stored >> 4], dim=1).flatten()[: math.prod(shape)]
    return ((nibbles ^ 8).to(torch.int8) - 8).to(torch.bfloat16).view(*shape)


_TORCH_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8}

_DECODERS = {
    "bf16": lambda stored, shape: stored.view(*shape),
    "bf14": _decode_bf14,
    "int8": lambda stored, shape: stored.view(*shape).to(torch.bfloat16),
    "int4": _decode_int4,
}

VALUE_CODECS: dict[str, ValueCodec] = {
    name: ValueCodec(_TORCH_DTYPES[codec.dtype], codec.shape, _DECODERS[name], codec.scaled)
    for name, codec in CODECS.items()
}


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
    faults = spec_faults(spec, VALUE_CODECS)
    if faults:
        raise ValueError(in_one_line(faults))
    others = {"support": torch.uint8, "scales": torch.bfloat16, "dictionary_scales": torch.bfloat16}
    return {
        kind: (shape, codec.dtype if codec else others[kind])
        for kind, shape, codec in stored_tensors("", spec, VALUE_CODECS).values()
    }


def decode_dictionary(
    spec: dict[str, Any], stored: torch.Tensor | None, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Dictionary (d_in, k) in `dtype`; None where it is the identity."""
    if stored is None:
        return None
    (d_in, _), k = spec["shape"], spec["dictionary"]["n_atoms"]
    numbers = _decode(spec["dictionary"]["codec"], stored, (d_in, k))
    if scales is None:
        return numbers.to(dtype)
    size = spec["dictionary"]["group_size"] or d_in
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
    codec = spec["codes"]["codec"]
    if support is None:
        mask = None
        codes = _decode(codec, values, (d_out, k))
    else:
        mask = decode_support(spec, support)
        numbers = _decode(codec, values, (spec["codes"]["n_nonzero"],))
        codes = torch.zeros(d_out, k, dtype=numbers.dtype, device=values.device).masked_scatter(mask, numbers)
    if scales is None or not len(scales):
        return codes.to(dtype)
    if mask is None:
        mask = torch.ones(d_out, k, dtype=torch.bool, device=values.device)
    group = _group_of(mask, spec["codes"]["group_size"], len(scales))
    return (codes.float() * scales.float()[group]).to(dtype)


def _group_of(mask: torch.Tensor, group_size: int | None, n_scales: int) -> torch.Tensor:
    """Which scale each code of a (d_out, k) mask has: a column's stored values have one each `group_size`, in order."""
    size = group_size or mask.shape[1]
    rank = mask.cumsum(1, dtype=torch.int32)  # from 1 at the first stored value of a column
    groups = (rank[:, -1:] + (size - 1)) // size
    group = groups.cumsum(0) - groups + (rank - 1).clamp(min=0) // size
    # codes that are not stored are zero, whichever scale they get
    return group.clamp(max=n_scales - 1)


def decode_support(spec: dict[str, Any], support: torch.Tensor) -> torch.Tensor:
    """Mask (d_out, k) of the stored codes, from either kind of stored support."""
    k = spec["dictionary"]["n_atoms"]
    support = support.to(torch.uint8)
    if spec["codes"]["support"] == "bitmask":
        return unpack_support(support, k)
    pairs = torch.stack([support & 15, support >> 4], dim=2).flatten(1)[:, : k // 4].unsqueeze(2)  # (d_out, k / 4, 1)
    atoms = torch.arange(4, dtype=torch.uint8, device=support.device)
    return ((pairs & 3) == atoms).logical_or((pairs >> 2) == atoms).flatten(1)


def unpack_support(support: torch.Tensor, k: int) -> torch.Tensor:
    """Bits (d_out, ceil(k / 8)) uint8 to a boolean mask (d_out, k); bit i % 8 of byte i // 8 is atom i."""
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=support.device)
    return (support.unsqueeze(-1) & bits).ne(0).flatten(1)[:, :k]


def _decode(name: str, stored: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Numbers of that shape. A tool may have cast what is stored: integers are in it unchanged, bfloat16 rounded."""
    codec = VALUE_CODECS[name]
    return codec.decode(stored if codec.dtype.is_floating_point else stored.to(codec.dtype), shape)


def encode_dictionary(spec: dict[str, Any], dictionary: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Store a dictionary (d_in, k) with the codec and the scales it had: inverse of `decode_dictionary`."""
    if scales is not None:
        size = spec["dictionary"]["group_size"] or len(dictionary)
        scales = scales.float().repeat_interleave(size, 0)[: len(dictionary)]
    return _encode(spec["dictionary"]["codec"], dictionary, scales)


def encode_codes(
    spec: dict[str, Any], codes: torch.Tensor, scales: torch.Tensor | None, support: torch.Tensor | None
) -> torch.Tensor:
    """Store transposed codes (d_out, k) on the support and with the scales they had: inverse of `decode_codes`."""
    mask = torch.ones_like(codes, dtype=torch.bool) if support is None else decode_support(spec, support)
    numbers = codes if support is None else codes[mask]
    if scales is not None:
        scales = scales.float()[_group_of(mask, spec["codes"]["group_size"], len(scales))]
        scales = scales if support is None else scales[mask]
    return _encode(spec["codes"]["codec"], numbers, scales)


def _encode(codec: str, numbers: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Stored tensor of `numbers`, rounded to nearest."""
    if codec == "bf16":
        return numbers.to(torch.bfloat16)
    if codec == "bf14":
        words = numbers.float().flatten().view(torch.int32).long() & 0xFFFFFFFF
        words = (words + 0x1FFFF + (words >> 18 & 1)) >> 18
        bits = words.unsqueeze(1) >> torch.arange(14, device=words.device) & 1
        bits = F.pad(bits.flatten(), (0, -14 * len(words) % 8)).view(-1, 8)
        return (bits << torch.arange(8, device=words.device)).sum(1).to(torch.uint8)
    limit = 128 if codec == "int8" else 8
    integers = (numbers.float() / scales).nan_to_num(0, 0, 0).round().clamp(-limit, limit - 1).to(torch.int16)
    if codec == "int8":
        return integers.to(torch.int8)
    nibbles = F.pad(integers.flatten() & 15, (0, integers.numel() % 2))
    return (nibbles[::2] | nibbles[1::2] << 4).to(torch.uint8)
