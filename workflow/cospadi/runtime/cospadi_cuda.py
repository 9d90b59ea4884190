"""Products on a GPU: Triton kernels read the packed form for a few rows; for many, S of the one matrix is unpacked.

Without Triton nothing is lost but speed: `gpu_kernels` says so in one log line and returns None, and `cospadi_products`
computes with plain torch operations. `cospadi_linear.set_kernels` chooses between them.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from .cospadi_codecs import decode_codes, decode_dictionary
from .cospadi_diagonal import is_diagonal, times
from .cospadi_format import block_of
from .cospadi_registry import CODECS as ALL_CODECS
from .cospadi_supports import unpack_bits
from .cospadi_trellis import LANES

logger = logging.getLogger("cospadi.runtime")

# Rows of x up to which reading the packed form is faster than unpacking S for a matrix product (docs/runtime.md)
KERNEL_ROWS = 8

# bits a value
CODECS = {name: ALL_CODECS[name].bits for name in ("bf16", "bf14", "int8", "int4", "trellis4", "trellis3", "trellis2")}
SUPPORTS = ("dense", "bitmask", "2:4")
_SCALED = ("int8", "int4")


CHOICES = ("auto", "torch")
_choice = "auto"


def choose(choice: str) -> None:
    """Compute with this one of `CHOICES` from the next product on."""
    global _choice
    _choice = choice


class Kernels(NamedTuple):
    """What `cospadi_cuda_kernels` has."""

    row_products: Any
    code_products: Any
    unpack_codes: Any
    trellis_products: Any
    unpack_trellis: Any


@functools.cache
def gpu_kernels() -> Kernels | None:
    """The Triton kernels of this machine; None where there are none."""
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        logger.warning(
            "packed products on a GPU: plain torch operations, which are slower, because compute capability %d.%d has "
            "no bfloat16",
            *capability,
        )
        return None
    try:
        from .cospadi_cuda_kernels import code_products, row_products, trellis_products, unpack_codes, unpack_trellis
    except ImportError as error:
        logger.warning("packed products on a GPU: plain torch operations, which are slower, because %s", error)
        return None
    logger.info("packed products on a GPU: Triton kernels on %s", torch.cuda.get_device_name())
    return Kernels(row_products, code_products, unpack_codes, trellis_products, unpack_trellis)


def has_kernels(device: torch.device, codec: str = "bf16") -> bool:
    """Whether products with codes in `codec` on `device` are those of the Triton kernels: they were chosen, are there,
    and right.
    """
    return _choice == "auto" and kernels_agree(device, ALL_CODECS[codec].whole)


@functools.cache
def kernels_agree(device: torch.device, trellis: bool = False) -> bool:
    """Whether there are kernels and their product of a small matrix on `device` is that of plain torch operations.

    Tried once a device and kind of kernel, before the first product: a compiler that does not know the GPU, or code it
    makes wrong, costs speed and a log line, and never a wrong number.
    """
    if gpu_kernels() is None:
        return False
    d_in, k, d_out = 96, 512 if trellis else 40, 24
    generator = torch.Generator().manual_seed(0)

    def bytes_of(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)

    def numbers_of(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    x, atoms = numbers_of(2, d_in), numbers_of(d_in, k)
    codec, support, n_nonzero = "trellis4", None, k * d_out
    if trellis:
        stream, scales = bytes_of(ALL_CODECS[codec].n_stream_bytes(k, d_out)), numbers_of(k + d_out)
        values = torch.cat([stream, scales.view(torch.uint8), bytes_of(4)])
    else:
        codec, support = "bf16", bytes_of(d_out, k // 8)
        n_nonzero = int(unpack_bits(support, k).sum())
        values = numbers_of(n_nonzero)
    spec = {
        "shape": [d_in, d_out],
        "dictionary": {"codec": "bf16", "n_atoms": k},
        "codes": {"codec": codec, "support": "dense" if trellis else "bitmask", "n_nonzero": n_nonzero},
    }
    parts = [atoms, None, values, None, support]
    try:
        few = apply_codes(spec, parts, project(spec, parts, x), torch.bfloat16)
        repeated = x.repeat(KERNEL_ROWS, 1)
        many = apply_codes(spec, parts, project(spec, parts, repeated), torch.bfloat16)[: len(x)]
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"the kernels do not run on {torch.cuda.get_device_name(device)}: {type(error).__name__}: {error}"
    else:
        expected = (x.double() @ atoms.double()) @ decode_codes(spec, values, None, support, torch.float64).T
        error = max(float((y.double() - expected).norm() / expected.norm()) for y in (few, many))
        if error < 0.02:  # bfloat16 results differ by .003
            return True
        reason = f"the kernels are wrong on {torch.cuda.get_device_name(device)}: relative error {error:.3g}"
    logger.warning("packed products on a GPU: plain torch operations, which are slower, because %s", reason)
    return False


def project(spec: dict[str, Any], parts: list[torch.Tensor | None], x: torch.Tensor) -> torch.Tensor:
    """``z = x D`` as `apply_codes` takes it: for a few rows float32 in an order of its own, for many like `x`, with
    zeros up to a multiple of 16 atoms: products of other widths keep away from the tensor cores' fast loads.
    """
    dictionary, dictionary_scales, *_ = parts
    if dictionary is None:
        return x
    if is_diagonal(spec):
        return times(x, dictionary.to(torch.float32 if _few(x) else x.dtype))
    (d_in, _), k = spec["shape"], spec["dictionary"]["n_atoms"]
    if not _few(x):
        atoms = decode_dictionary(spec, dictionary, dictionary_scales, x.dtype)
        return F.linear(x, _widened(atoms, _aligned(k)).T)
    in_stride, row_stride = dictionary.stride() if dictionary.ndim == 2 else (k, 1)
    lanes = spec["codes"]["support"] != "dense"
    return _row_products(
        x.contiguous(),
        dictionary,
        dictionary_scales,
        n_out=k,
        out_stride=_padded(k) if lanes else k,
        out_dtype=torch.float32,
        strides=(row_stride, in_stride),
        codec=spec["dictionary"]["codec"],
        group=block_of(spec["dictionary"], d_in),
        scale_strides=(1, k),
        lanes=lanes,
    )


def apply_codes(
    spec: dict[str, Any], parts: list[torch.Tensor | None], z: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``y = z S`` for z from `project`: (n, d_out) in `dtype`."""
    _, _, values, scales, support = parts
    rows, (_, d_out), k, codes = z.shape[0], spec["shape"], spec["dictionary"]["n_atoms"], spec["codes"]
    if not _few(z):
        return F.linear(z, _widened(unpack(spec, parts, dtype), z.shape[1]))
    if ALL_CODECS[codes["codec"]].whole:
        return _trellis_products(spec, values, z.contiguous(), dtype)
    if support is None:
        group = block_of(codes, k)
        return _row_products(
            z.contiguous(),
            values,
            scales,
            n_out=d_out,
            out_stride=d_out,
            out_dtype=dtype,
            strides=(k, 1),
            codec=codes["codec"],
            group=group,
            scale_strides=(-(-k // group), 1),
            lanes=False,
        )
    found = _index_of(spec, support)
    z = z.contiguous()
    y = torch.empty(rows, d_out, dtype=dtype, device=z.device)
    block, unroll, warps = code_tile(d_out, rows)
    early = _early(z.device)
    with _on(z.device):
        gpu_kernels().code_products[(-(-d_out // block),)](
            z,
            values,
            scales,
            support,
            found.offsets,
            found.scale_starts,
            y,
            d_out,
            k,
            support.shape[1],
            found.n_chunks,
            codes["n_nonzero"],
            z.shape[1],
            block_of(codes, k),
            ROWS=rows,
            CODEC=codes["codec"],
            SCALED=codes["codec"] in _SCALED,
            PAIRS=codes["support"] == "2:4",
            ASM=_nvidia(z.device),
            LANES=parts[0] is not None and not is_diagonal(spec),
            EARLY=early,
            VALUE_BITS=CODECS[codes["codec"]],
            BLOCK_OUT=block,
            UNROLL=unroll,
            num_warps=warps,
            **({"launch_pdl": True} if early else {}),
        )
    return y


def unpack(spec: dict[str, Any], parts: list[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
    """Codes transposed with their zeros, in `dtype`: (d_out, k), or with zeros up to a multiple of 16 atoms."""
    _, _, values, scales, support = parts
    (_, d_out), k, codes = spec["shape"], spec["dictionary"]["n_atoms"], spec["codes"]
    stride = _aligned(k)
    if ALL_CODECS[codes["codec"]].whole:
        return _unpack_trellis(spec, values, stride, dtype)
    if support is None:
        return decode_codes(spec, values, scales, support, dtype)
    found = _index_of(spec, support)
    unpacked = torch.empty(d_out, stride, dtype=dtype, device=values.device)
    block, warps = UNPACK_TILE
    with _on(values.device):
        gpu_kernels().unpack_codes[(-(-d_out // block), found.n_chunks)](
            values,
            scales,
            support,
            found.offsets,
            found.scale_starts,
            unpacked,
            d_out,
            k,
            support.shape[1],
            found.n_chunks,
            stride,
            block_of(codes, k),
            CODEC=codes["codec"],
            SCALED=codes["codec"] in _SCALED,
            PAIRS=codes["support"] == "2:4",
            ASM=_nvidia(values.device),
            BLOCK_OUT=block,
            num_warps=warps,
        )
    return unpacked


UNPACK_TILE = (8, 4)  # columns a program takes, its warps


def row_tile(n_in: int, n_out: int, rows: int, across: bool) -> tuple[int, int, int]:
    """Outputs and inputs that a program of `row_products` holds at once, and its warps."""
    if across:
        return 128, 16, 4
    most = max(128, _power(n_in))
    # larger tiles leave some of a GPU's processors without a program where outputs are few
    return (4, min(1024, most), 4) if rows == 1 and n_out >= 1024 else (2, min(4096, most) // rows, 4)


def code_tile(d_out: int, rows: int) -> tuple[int, int, int]:
    """Columns a program of `code_products` takes, how many chunks it reads ahead, and its warps."""
    return 8 if rows > 1 and d_out >= 2048 else 4, 1, 4


def _row_products(
    x: torch.Tensor,
    matrix: torch.Tensor,
    scales: torch.Tensor | None,
    *,
    n_out: int,
    out_stride: int,
    out_dtype: torch.dtype,
    strides: tuple[int, int],
    codec: str,
    group: int,
    scale_strides: tuple[int, int],
    lanes: bool,
) -> torch.Tensor:
    """Rows of `x` times a matrix whose outputs and inputs are `strides` apart."""
    rows, n_in = x.shape
    across = strides[1] != 1 and n_out > 1
    block_out, block_in, warps = row_tile(n_in, n_out, _power(rows), across)
    # outputs that lie side by side make few programs: each sums a part of the inputs only
    n_parts = max(1, min(16, n_in // 128)) if across else 1
    out = torch.empty(n_parts, rows, out_stride, dtype=torch.float32 if n_parts > 1 else out_dtype, device=x.device)
    early = _early(x.device)
    with _on(x.device):
        gpu_kernels().row_products[(-(-(out_stride if lanes else n_out) // block_out), n_parts)](
            x,
            matrix,
            scales,
            out,
            n_in,
            n_out,
            x.shape[1],
            out_stride,
            *strides,
            group,
            *scale_strides,
            -(-n_in // n_parts),
            ROWS=rows,
            CODEC=codec,
            SCALED=codec in _SCALED,
            LANES=lanes,
            EARLY=early,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            num_warps=warps,
            **({"launch_pdl": True} if early else {}),
        )
    return out[0] if n_parts == 1 else out.sum(0).to(out_dtype)


# Of a trellis: inputs that a program holds at once, and the instructions of its loop for each code, of one row
_TRELLIS_TILES = {512: 13, 256: 15, 128: 20}


def trellis_tile(k: int, rows: int) -> tuple[int, int]:
    """Inputs that a program of a trellis holds at once, and its warps."""
    # sums of eight columns, for each input of a thread and each row, have to fit in its registers
    most = 512 if rows <= 2 else 256 if rows <= 4 else 128
    fitting = (block for block in _TRELLIS_TILES if block <= most)
    return min(fitting, key=lambda block: -(-k // block) * block * _TRELLIS_TILES[block]), 4


def _trellis_products(spec: dict[str, Any], values: torch.Tensor, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``y = z S`` for a few rows z (n, k) and S in a trellis."""
    rows, k, d_out = len(z), spec["dictionary"]["n_atoms"], spec["shape"][1]
    y = torch.empty(rows, d_out, dtype=dtype, device=z.device)
    block, warps = trellis_tile(k, rows)
    early = _early(z.device)
    with _on(z.device):
        gpu_kernels().trellis_products[(-(-d_out // 8),)](
            z,
            values,
            _trellis_scales(spec, values),
            y,
            d_out,
            k,
            -(-CODECS[spec["codes"]["codec"]] * d_out // 8),
            z.shape[1],
            ROWS=rows,
            BITS=CODECS[spec["codes"]["codec"]],
            RAGGED=k % LANES != 0,
            ASM=_nvidia(z.device),
            EARLY=early,
            BLOCK_IN=block,
            num_warps=warps,
            **({"launch_pdl": True} if early else {}),
        )
    return y


def _unpack_trellis(spec: dict[str, Any], values: torch.Tensor, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """S of a trellis transposed, (d_out, stride), with zeros from k on."""
    k, d_out = spec["dictionary"]["n_atoms"], spec["shape"][1]
    unpacked = torch.empty(d_out, stride, dtype=dtype, device=values.device)
    block, warps = trellis_tile(stride, 1)
    with _on(values.device):
        gpu_kernels().unpack_trellis[(-(-d_out // 8), -(-stride // block))](
            values,
            _trellis_scales(spec, values),
            unpacked,
            d_out,
            k,
            -(-CODECS[spec["codes"]["codec"]] * d_out // 8),
            stride,
            BITS=CODECS[spec["codes"]["codec"]],
            RAGGED=k % LANES != 0,
            ASM=_nvidia(values.device),
            BLOCK_IN=block,
            num_warps=warps,
        )
    return unpacked


def _trellis_scales(spec: dict[str, Any], values: torch.Tensor) -> torch.Tensor:
    """Scales of the rows and columns of a trellis, bfloat16 (k + d_out,): in place, or a copy at an even address."""
    k, d_out = spec["dictionary"]["n_atoms"], spec["shape"][1]
    scales = values[ALL_CODECS[spec["codes"]["codec"]].n_stream_bytes(k, d_out) : -4]
    return (scales.clone() if scales.storage_offset() % 2 else scales).view(torch.bfloat16)


class _Index:
    """Where in a matrix's values and scales the columns of its support begin."""

    def __init__(self, spec: dict[str, Any], support: torch.Tensor) -> None:
        k, codes = spec["dictionary"]["n_atoms"], spec["codes"]
        self.n_chunks = _padded(k) // 256
        d_out = len(support)
        if codes["support"] == "2:4":
            counts = torch.full((d_out, 1), k // 2, device=support.device)
        else:
            bits = unpack_bits(F.pad(support, (0, 32 * self.n_chunks - support.shape[1])), 256 * self.n_chunks)
            counts = bits.view(d_out, self.n_chunks, 256).sum(2)
        ends = counts.flatten().cumsum(0)
        found = int(ends[-1])
        if found != codes["n_nonzero"]:
            # the kernel would read past the values
            raise ValueError(
                f"the support has {found} positions for {codes['n_nonzero']} values: the file is damaged. Fetch or "
                "assemble the folder again"
            )
        self.offsets = (ends.view_as(counts) - counts).to(torch.int32)
        self.scale_starts = None
        if codes["codec"] in _SCALED:
            groups = -(-counts.sum(1) // block_of(codes, k))
            self.scale_starts = (groups.cumsum(0) - groups).to(torch.int32)


_INDICES: dict[int, tuple[StorageWeakRef, int, _Index]] = {}


def _index_of(spec: dict[str, Any], support: torch.Tensor) -> _Index:
    """Kept as long as the support is the same and unchanged; also where only tensors are known (`torch.compile`)."""
    address, version = support.data_ptr(), 0 if support.is_inference() else support._version
    kept = _INDICES.get(address)
    if kept is not None and not kept[0].expired() and kept[1] == version:
        return kept[2]
    for gone in [key for key, (storage, _, _) in _INDICES.items() if storage.expired()]:
        del _INDICES[gone]
    index = _Index(spec, support)
    _INDICES[address] = StorageWeakRef(support.untyped_storage()), version, index
    return index


def _few(rows: torch.Tensor) -> bool:
    return 0 < len(rows) <= KERNEL_ROWS


def _aligned(k: int) -> int:
    """The next multiple of 16, 32 bytes of bfloat16."""
    return -(-k // 16) * 16


def _widened(matrix: torch.Tensor, n_columns: int) -> torch.Tensor:
    """With zero columns up to `n_columns`, or without those beyond them."""
    missing = n_columns - matrix.shape[1]
    if missing > 0:  # by rows of the transposed matrix: an atom stays contiguous
        return F.pad(matrix.T, (0, 0, 0, missing)).T if matrix.stride(0) == 1 else F.pad(matrix, (0, missing))
    return matrix[:, :n_columns]


def _padded(k: int) -> int:
    return -(-k // 256) * 256


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _early(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one in front of it has ended (Hopper and newer)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device)
