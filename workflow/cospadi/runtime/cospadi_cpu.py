"""The CPU kernel: compiled once on the machine that runs it, then ``y = (x D) S`` straight from the packed tensors.

Where no C compiler is found, nothing is lost but speed: `kernel` says so in one log line and returns None, and
`cospadi_products` computes with plain torch operations. `cospadi_linear.set_kernels` chooses between them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cospadi_codecs import tensor_shapes
from .cospadi_compiler import chosen, chosen_in, library, processor
from .cospadi_cpu_source import SOURCE
from .cospadi_format import block_of
from .cospadi_registry import CODECS as ALL_CODECS

logger = logging.getLogger("cospadi.runtime")

CODECS = {"bf16": 0, "bf14": 1, "int8": 2, "int4": 3, "identity": 4, "trellis2": 5, "trellis3": 5, "trellis4": 5}
CODECS |= {f"int{bits}": 6 + bits for bits in (6, 3, 2)}
SUPPORTS = {"dense": 0, "bitmask": 1, "2:4": 2}
DTYPES = (torch.bfloat16, torch.float32)

_DAMAGED = "the file is damaged. Fetch or assemble the folder again"
_BLOCK = 16  # columns between two entries of `starts`, as in the source
_BYTES_PER_THREAD = 2**15  # a thread for less costs more than it gives
_BYTES_UNSEEN = 2**22  # a product of more lets other threads of Python run meanwhile
MOST_TERMS = 16  # matrices whose products are added up in one call, as in the source


@dataclass(frozen=True)
class Paths:
    """How products are computed, by what the processor has (docs/runtime.md has the measurements).

    Attributes
    ----------
    few_rows : int
        Rows of x up to which the kernel computes straight from the packed form; more rows are worth unpacking for.
    without_zeros : bool
        Whether many rows are multiplied with the stored codes alone, instead of with an unpacked ``S``.
    dense : bool
        Whether rows are multiplied with bfloat16 weights that are not packed, too: one, as torch's product of one reads
        memory at half of its speed, and a few where torch has no instructions for them.
    """

    few_rows: int
    without_zeros: bool
    dense: bool = False


# by the kind of the kernel; torch's own products of many rows are best where they use wide registers
PATHS = {"avx512": Paths(8, False, True), "avx2": Paths(16, True, True), "generic": Paths(8, False)}


@functools.cache
def bfloat16_is_native() -> bool:
    """Whether this processor multiplies bfloat16; elsewhere float32 products are several times faster.

    True with AVX512-BF16 or AMX (x86) or the bfloat16 instructions of Arm.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        found = {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    else:  # torch before 2.10
        found = set(processor().split())
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(found & {"avx512_bf16", "amx_bf16"})
    return "bf16" in found


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the CPU multiplies many rows of `dtype`; what comes out is rounded to `dtype` once."""
    return torch.float32 if dtype == torch.bfloat16 and not bfloat16_is_native() else dtype


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("d_in", "d_out", "k", "n_nonzero", "dictionary_codec")),
        *((name, ctypes.c_int64) for name in ("dictionary_group", "codec", "bits", "support", "group")),
        *((name, ctypes.c_void_p) for name in ("dictionary", "values", "positions", "dictionary_scales", "scales")),
        ("starts", ctypes.c_void_p),
    ]


class _Term(ctypes.Structure):
    _fields_ = [("matrix", ctypes.c_void_p), ("kept", ctypes.c_void_p), ("asker", ctypes.c_uint64)]


class _Sum(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("d_in", "d_out", "most_threads", "n_terms"))]
    _fields_ += [("terms", ctypes.c_void_p)]


class _Kept(ctypes.Structure):
    _fields_ = [("taken", ctypes.c_int64), ("askers", ctypes.c_uint64), ("dictionary", ctypes.c_void_p)]
    _fields_ += [*((name, ctypes.c_int64) for name in ("nbytes", "is_bf16", "room")), ("x", ctypes.c_void_p)]


class _OpenMP(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("parallel", "barrier", "thread", "threads")]


class BoundMatrix:
    """One packed matrix as the kernel sees it: where its tensors are, and where in them each column starts.

    Parameters
    ----------
    spec : dict
        One entry of ``quantization_config.matrices``.
    tensors : dict
        Tensor names of `cospadi_codecs.tensor_shapes` to contiguous CPU tensors; kept alive as long as this.

    Raises
    ------
    ValueError
        If the tensors are not exactly those that the spec implies. The kernel trusts the numbers that it gets here, and
        would read behind a tensor.
    """

    def __init__(self, compiled: Kernel, spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        (d_in, d_out), dictionary, codes = spec["shape"], spec["dictionary"], spec["codes"]
        _check_tensors(spec, tensors)
        self._tensors = tensors
        self.d_in, self.n_atoms, self.d_out = d_in, dictionary["n_atoms"], d_out
        self.stride = -(-self.n_atoms // 32) * 32  # floats a row of z takes
        self.has_zeros = codes["support"] != "dense"
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._starts = torch.empty(-(-d_out // _BLOCK) + 1, 2, dtype=torch.int64)
        address = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        codec = ALL_CODECS[codes["codec"]]
        if codec.whole:  # its scales follow the numbers
            address["scales"] = address["values"] + codec.n_stream_bytes(self.n_atoms, d_out)
        self._matrix = _Matrix(
            d_in=d_in,
            d_out=d_out,
            k=self.n_atoms,
            n_nonzero=codes["n_nonzero"],
            dictionary_codec=CODECS[dictionary["codec"]],
            dictionary_group=block_of(dictionary, d_in),
            codec=CODECS[codes["codec"]],
            bits=codec.bits,
            support=SUPPORTS[codes["support"]],
            group=block_of(codes, self.n_atoms),
            dictionary=address.get("dictionary"),
            values=address["values"],
            positions=address.get("support"),
            dictionary_scales=address.get("dictionary_scales"),
            scales=address.get("scales"),
            starts=self._starts.data_ptr(),
        )
        self.address = ctypes.addressof(self._matrix)
        damaged = compiled.library.cospadi_starts(self.address, self._starts.data_ptr())
        if damaged >= 0:
            raise ValueError(
                f"row {damaged} of the support is no {codes['support']} of {self.n_atoms} atoms: {_DAMAGED}"
            )
        n_values, n_scales = self._starts[-1].tolist()
        if n_values != codes["n_nonzero"]:
            raise ValueError(f"the support has {n_values} positions for {codes['n_nonzero']} values: {_DAMAGED}")
        if "scales" in tensors and n_scales != tensors["scales"].numel():
            raise ValueError(
                f"the columns have {n_scales} groups of {codes['group_size']} values for {tensors['scales'].numel()} "
                f"scales: {_DAMAGED}"
            )


class KeptProjection:
    """``z = x D`` of the last few rows, for the matrices that share ``D``: q, k and v ask for the same one in turn."""

    def __init__(self, compiled: Kernel) -> None:
        kept = _Kept()
        self._kept, self._joined = kept, 0
        self.address = ctypes.addressof(kept)
        weakref.finalize(self, lambda: compiled.library.cospadi_forget(ctypes.addressof(kept)))

    def join(self) -> int:
        """Bit of a further matrix. What was kept is forgotten: it may be of a dictionary as it was."""
        self._kept.askers = 2**64 - 1
        self._joined += 1
        return 1 << self._joined % 64


class BoundSum:
    """Matrices whose products with the same input are added up, in one call; of most layers one.

    Parameters
    ----------
    matrices : sequence of BoundMatrix
        Of one shape; at most `MOST_TERMS`.
    kept : sequence of KeptProjection or None, optional
        Where matrices share their dictionaries with others'.
    """

    def __init__(self, matrices: Sequence[BoundMatrix], kept: Sequence[KeptProjection | None] = ()) -> None:
        shapes = {(matrix.d_in, matrix.d_out) for matrix in matrices}
        if len(shapes) != 1 or len(matrices) > MOST_TERMS:
            found = f"{len(matrices)} matrices of shapes {sorted(shapes)}"
            raise ValueError(f"{found} are no sum: that takes 1 to {MOST_TERMS} of one shape")
        self.matrices, self._kept = list(matrices), list(kept)
        (self.d_in, self.d_out), self.nbytes = shapes.pop(), sum(matrix.nbytes for matrix in matrices)
        self.most_threads = 1 + self.nbytes // _BYTES_PER_THREAD
        self.has_zeros = all(matrix.has_zeros for matrix in matrices)
        self._terms = (_Term * len(matrices))()
        for term, matrix in zip(self._terms, matrices, strict=True):
            term.matrix = matrix.address
        for term, shared in zip(self._terms, kept, strict=False):
            if shared is not None:
                term.kept, term.asker = shared.address, shared.join()
        self._sum = _Sum(self.d_in, self.d_out, self.most_threads, len(matrices), ctypes.addressof(self._terms))
        self.address = ctypes.addressof(self._sum)


def _check_tensors(spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Require numbers that make sense, and tensors of exactly the size and dtype that they imply."""
    (d_in, d_out), dictionary, codes = spec["shape"], spec["dictionary"], spec["codes"]
    least = {"d_in": (d_in, 1), "d_out": (d_out, 1), "n_atoms": (dictionary["n_atoms"], 1)}
    least["n_nonzero"] = (codes["n_nonzero"], 0)
    for name, part in (("dictionary", dictionary), ("codes", codes)):
        if part.get("group_size") is not None:
            least[f"{name}.group_size"] = (part["group_size"], 1)
    for name, (number, smallest) in least.items():
        if type(number) is not int or number < smallest:
            raise ValueError(f"{name} is {number!r}, not a whole number from {smallest} on: {_DAMAGED}")
    if codes["support"] not in SUPPORTS:
        raise ValueError(f"the kernel has no support {codes['support']!r}, only {', '.join(SUPPORTS)}")
    in_all = d_out * dictionary["n_atoms"]
    if codes["support"] == "dense" and codes["n_nonzero"] != in_all:
        raise ValueError(f"n_nonzero is {codes['n_nonzero']} where all {in_all} codes are stored: {_DAMAGED}")
    shapes = tensor_shapes(spec)
    for name in sorted(shapes.keys() | tensors.keys()):
        stored = tensors.get(name)
        found = None if stored is None else (tuple(stored.shape), stored.dtype, stored.device.type)
        expected = (*shapes[name], "cpu") if name in shapes else None
        if found != expected or (stored is not None and not stored.is_contiguous()):
            raise ValueError(f"{name} is {_described(found)} where its spec says {_described(expected)}: {_DAMAGED}")


def _described(tensor: tuple[Any, ...] | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor[0])} {str(tensor[1]).removeprefix('torch.')} ({tensor[2]})"


class Kernel:
    """The compiled library. Products take contiguous CPU tensors of bfloat16 or float32 and sum in float32."""

    def __init__(self, library: ctypes.CDLL, choice: str = "auto") -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.cospadi_kind.restype = ctypes.c_char_p
        library.cospadi_starts.argtypes = [pointer, pointer]
        library.cospadi_product.argtypes = [pointer, pointer, integer, pointer, pointer, integer, integer]
        library.cospadi_many.argtypes = [pointer, pointer, integer, *[pointer] * 3, integer, integer]
        library.cospadi_unpack.argtypes = [pointer, pointer, integer, pointer, integer]
        library.cospadi_forget.argtypes = [pointer]
        for function in (library.cospadi_many, library.cospadi_unpack, library.cospadi_forget):
            function.restype = None
        for function in (library.cospadi_starts, library.cospadi_bench, library.cospadi_product):
            function.restype = integer
        self.library, self._choice = library, choice
        self.kind = library.cospadi_kind().decode()
        self.paths = PATHS[self.kind]
        self._openmp = _torch_openmp()
        self._openmp_address = None if self._openmp is None else ctypes.addressof(self._openmp)
        self._scratch = threading.local()
        self._bench = library.cospadi_bench() // 4  # floats of scratch a thread takes for many rows
        self._layer = _of_python(library)

    @property
    def parallel(self) -> bool:
        """Whether the kernel works in torch's threads, or in one."""
        return self._openmp is not None

    @property
    def is_direct(self) -> bool:
        """Whether layers are functions of Python (`layer`), or go through ctypes."""
        return self._layer is not None

    def product(self, total: BoundSum, x: torch.Tensor) -> torch.Tensor:
        """``y = (x D) S``, added up: inputs (..., d_in) to outputs (..., d_out), in the dtype of `x`."""
        if x.shape[-1] != total.d_in:
            raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a matrix of {total.d_in} rows")
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], total.d_out))
        rows, threads = x.numel() // total.d_in, self._threads(total)
        arguments = (x.data_ptr(), y.data_ptr(), rows, x.dtype == torch.bfloat16)
        if not self.library.cospadi_product(total.address, self._openmp_address, threads, *arguments):
            raise MemoryError(f"no memory for a product of {rows} rows")
        return y

    def is_for_dense(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether a product of `x` with the weight (d_out, d_in) of a layer that is not packed is worth a `layer`."""
        return (
            self.is_direct
            and 0 < x.numel() <= self.dense_rows * weight.shape[1]
            and all(t.is_cpu and t.dtype == torch.bfloat16 and t.is_contiguous() for t in (x, weight))
        )

    @property
    def dense_rows(self) -> int:
        """Most rows of x that are worth the kernel's product with bfloat16 weights that are not packed."""
        return 0 if not self.paths.dense else 1 if bfloat16_is_native() else self.paths.few_rows

    def layer(
        self, total: BoundSum, modules: Sequence[torch.nn.Module], read: Sequence[str], most_rows: int | None = None
    ) -> Callable | None:
        """`product` as one call of C for a layer that runs as it stands; None where there is no such code.

        It takes an input, ``vars()`` of the first module, and whether it is called in the place of the module, so that
        hooks have to be run (False), or in that of its ``forward`` (True). It gives the output, or None where something
        has to be looked at first: hooks, another dtype or device, more than a few rows, a gradient, tracing, parameters
        that are not what they were, another choice of kernels.

        Parameters
        ----------
        modules : sequence of Module
            One for each matrix of `total`, which is bound to their parameters.
        read : sequence of str
            Names of the parameters that the matrix reads.
        most_rows : int, optional
            That it computes; default: the few of `Paths`.
        """
        if self._layer is None:
            return None
        owners = tuple(module._parameters for module in modules)
        kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
        hooks = [[getattr(module, f"_{kind}") for kind in kinds] for module in modules]
        of_all = [getattr(torch.nn.modules.module, f"_global_{kind}") for kind in kinds]
        return self._layer(
            total.address,
            self._openmp_address,
            self.paths.few_rows if most_rows is None else most_rows,
            total.nbytes > _BYTES_UNSEEN,
            owners[0],
            owners,
            tuple(read),
            (*hooks[0], *of_all),
            tuple(part for of_one in hooks[1:] for part in of_one),
            (*_of_torch(), chosen_in(), self._choice),
            total,
        )

    def apply_codes_to_many(self, total: BoundSum, zs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """``y = z S``, added up, without the zeros of ``S``: (n, d_out) in `dtype`.

        Each z is float32 and transposed, contiguous (k, n).
        """
        expected = [(matrix.n_atoms, zs[0].shape[1]) for matrix in total.matrices]
        if [tuple(z.shape) for z in zs] != expected or not total.has_zeros or not all(z.is_contiguous() for z in zs):
            raise ValueError(f"z of {expected} by rows, and codes with a support, are needed here")
        rows = zs[0].shape[1]
        y = zs[0].new_empty((rows, total.d_out), dtype=dtype)
        threads = self._threads(total)
        self.library.cospadi_many(
            total.address,
            self._openmp_address,
            threads,
            (ctypes.c_void_p * len(zs))(*(z.data_ptr() for z in zs)),
            y.data_ptr(),
            self._room(threads * self._bench),
            rows,
            dtype == torch.bfloat16,
        )
        return y

    def unpack(self, matrix: BoundMatrix, dtype: torch.dtype) -> torch.Tensor:
        """Codes transposed, (d_out, k) with zeros, in `dtype`."""
        codes = torch.empty(matrix.d_out, matrix.stride, dtype=dtype)
        threads = self._threads(BoundSum([matrix]))
        self.library.cospadi_unpack(
            matrix.address, self._openmp_address, threads, codes.data_ptr(), dtype == torch.bfloat16
        )
        return codes[:, : matrix.n_atoms]

    def _threads(self, total: BoundSum) -> int:
        if self._openmp is None:
            return 1
        return min(torch.get_num_threads(), total.most_threads)

    def _room(self, floats: int) -> int:
        """Address of so many floats, kept from call to call; each thread of Python has its own."""
        room = getattr(self._scratch, "room", None)
        if room is None or room.numel() < floats:
            room = self._scratch.room = torch.empty(floats)
        return room.data_ptr()


def kernel() -> Kernel | None:
    """The kernel that was chosen; None where plain torch has to do. Compiled at the first call, then cached on disk."""
    return None if (choice := chosen()) == "torch" else _kernel(choice)


@functools.cache
def _kernel(choice: str) -> Kernel | None:
    if sys.byteorder != "little":
        logger.warning("packed products: plain torch operations, because the kernel is for little-endian machines")
        return None
    try:
        compiled = Kernel(_load(choice), choice)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("packed products: plain torch operations, which are slower, because %s", _reason(error))
        return None
    threads = "torch's threads" if compiled.parallel else "one thread, because torch's OpenMP was not found"
    slower = "" if compiled.is_direct else ", called through ctypes: no Python.h, or torch before 2.10"
    logger.info("packed products: compiled %s kernel in %s%s", compiled.kind, threads, slower)
    return compiled


def _load(choice: str) -> ctypes.CDLL:
    of_python = _python_flags()
    if of_python:
        try:
            return library(SOURCE, choice, of_python)
        except (OSError, subprocess.SubprocessError):  # headers that do not fit; calls then go through ctypes
            pass
    return library(SOURCE, choice)


def _python_flags() -> list[str]:
    """Flags that compile layers as functions of Python; none without Python's headers or torch's interface."""
    include, abi = sysconfig.get_path("include"), sysconfig.get_config_var("SOABI")
    usable = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
    if not (usable and abi and _exchange() is not None and Path(include, "Python.h").is_file()):
        return []
    return ["-DWITH_PYTHON", f"-DPYTHON_ABI={abi}", f"-I{include}"]  # the ABI, because a cache serves several Pythons


def _of_python(library: ctypes.CDLL) -> Callable | None:
    """What makes a layer a function of Python, if the library has it."""
    made = getattr(ctypes.PyDLL(library._name, handle=library._handle), "cospadi_layer", None)
    if made is not None:
        made.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, *[ctypes.py_object] * 7]
        made.restype = ctypes.py_object
    return made


def _exchange() -> Any:
    """torch's C interface to tensors, since 2.10."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


@functools.cache
def _of_torch() -> tuple[Any, ...]:
    """What a layer asks torch for, in the order of the source."""
    watching = (torch._C._is_tracing, torch._C._len_torch_dispatch_stack)
    levels = vars(torch.autograd.forward_ad)
    return (
        _exchange(), torch.Tensor, torch.is_grad_enabled, watching, levels, torch.get_num_threads, torch.empty_like
    )  # fmt: skip


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or "").strip().splitlines()
        return f"{error.cmd[0]} failed: {said[0] if said else error.returncode}"
    return str(error)


def _torch_openmp() -> _OpenMP | None:
    """The OpenMP that torch itself runs on: a second one would have threads that fight with torch's."""
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    for path in (None, *sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))):
        try:
            found = ctypes.CDLL(None if path is None else str(path))
            return _OpenMP(*(ctypes.cast(getattr(found, name), ctypes.c_void_p).value for name in names))
        except (OSError, AttributeError):
            continue
    return None
