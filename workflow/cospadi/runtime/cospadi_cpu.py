"""The CPU kernel: compiled once on the machine that runs it, then ``y = (x D) S`` straight from the packed tensors.

Where no C compiler is found, nothing is lost but speed: `kernel` says so in one log line and returns None, and
`cospadi_linear` computes with plain torch operations. `cospadi_linear.set_kernels` chooses between them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cospadi_codecs import tensor_shapes
from .cospadi_cpu_source import SOURCE

logger = logging.getLogger("cospadi.runtime")

CODECS = {"bf16": 0, "bf14": 1, "int8": 2, "int4": 3, "identity": 4}
SUPPORTS = {"dense": 0, "bitmask": 1, "2:4": 2}
DTYPES = (torch.bfloat16, torch.float32)

_FLAGS = {"auto": ["-march=native"], "avx2": ["-mavx2", "-mfma", "-mpopcnt"], "generic": []}
CHOICES = (*_FLAGS, "torch")
_choice = "auto"
_DAMAGED = "the file is damaged. Fetch or assemble the folder again"
_BLOCK = 16  # columns between two entries of `starts`, as in the source
_BYTES_PER_THREAD = 2**15  # a thread for less costs more than it gives


@dataclass(frozen=True)
class Paths:
    """How products are computed, by what the processor has (docs/runtime.md has the measurements).

    Attributes
    ----------
    few_rows : int
        Rows of x up to which the kernel computes straight from the packed form; more rows are worth unpacking for.
    without_zeros : bool
        Whether many rows are multiplied with the stored codes alone, instead of with an unpacked ``S``.
    """

    few_rows: int
    without_zeros: bool


# by the kind of the kernel; torch's own products of many rows are best where they use wide registers
PATHS = {"avx512": Paths(8, False), "avx2": Paths(16, True), "generic": Paths(8, False)}


@functools.cache
def bfloat16_is_native() -> bool:
    """Whether this processor multiplies bfloat16; elsewhere float32 products are several times faster.

    True with AVX512-BF16 or AMX (x86) or the bfloat16 instructions of Arm.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        found = {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    else:  # torch before 2.10
        found = set(_processor().split())
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(found & {"avx512_bf16", "amx_bf16"})
    return "bf16" in found


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the CPU multiplies many rows of `dtype`; what comes out is rounded to `dtype` once."""
    return torch.float32 if dtype == torch.bfloat16 and not bfloat16_is_native() else dtype


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("d_in", "d_out", "k", "n_nonzero", "dictionary_codec")),
        *((name, ctypes.c_int64) for name in ("dictionary_group", "codec", "support", "group")),
        *((name, ctypes.c_void_p) for name in ("dictionary", "values", "positions", "dictionary_scales", "scales")),
        ("starts", ctypes.c_void_p),
    ]


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
        self.has_dictionary = dictionary["codec"] != "identity"
        self.has_zeros = codes["support"] != "dense"
        self.most_threads = 1 + sum(tensor.nbytes for tensor in tensors.values()) // _BYTES_PER_THREAD
        self._starts = torch.empty(-(-d_out // _BLOCK) + 1, 2, dtype=torch.int64)
        address = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        self._matrix = _Matrix(
            d_in=d_in,
            d_out=d_out,
            k=self.n_atoms,
            n_nonzero=codes["n_nonzero"],
            dictionary_codec=CODECS[dictionary["codec"]],
            dictionary_group=min(dictionary.get("group_size") or d_in, d_in),
            codec=CODECS[codes["codec"]],
            support=SUPPORTS[codes["support"]],
            group=min(codes.get("group_size") or self.n_atoms, self.n_atoms),
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

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.cospadi_kind.restype = ctypes.c_char_p
        library.cospadi_starts.argtypes = [pointer, pointer]
        library.cospadi_product.argtypes = [pointer, pointer, integer, *[pointer] * 4, integer, integer]
        library.cospadi_many.argtypes = [pointer, pointer, integer, *[pointer] * 3, integer, integer]
        library.cospadi_unpack.argtypes = [pointer, pointer, integer, pointer, integer]
        for function in (library.cospadi_product, library.cospadi_many, library.cospadi_unpack):
            function.restype = None
        library.cospadi_starts.restype = library.cospadi_bench.restype = integer
        self.library = library
        self.kind = library.cospadi_kind().decode()
        self.paths = PATHS[self.kind]
        self._openmp = _torch_openmp()
        self._openmp_address = None if self._openmp is None else ctypes.addressof(self._openmp)
        self._scratch = threading.local()
        self._bench = library.cospadi_bench() // 4  # floats of scratch a thread takes for many rows

    @property
    def parallel(self) -> bool:
        """Whether the kernel works in torch's threads, or in one."""
        return self._openmp is not None

    def product(self, matrix: BoundMatrix, x: torch.Tensor) -> torch.Tensor:
        """``y = (x D) S``: inputs (..., d_in) to outputs (..., d_out), in the dtype of `x`."""
        return self.product_and_projection(matrix, x, keep=False)[0]

    def product_and_projection(
        self, matrix: BoundMatrix, x: torch.Tensor, *, keep: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`product`, and with `keep` also ``z = x D``: float32 (n, stride), zero from n_atoms on."""
        if x.shape[-1] != matrix.d_in:
            raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a matrix of {matrix.d_in} rows")
        rows = x.numel() // matrix.d_in
        if not matrix.has_dictionary:
            z = x.new_zeros((rows, matrix.stride), dtype=torch.float32)
            z[:, : matrix.n_atoms] = x.reshape(rows, matrix.n_atoms)
            return self.apply_codes(matrix, z, x), z
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], matrix.d_out))
        z = x.new_empty((rows, matrix.stride), dtype=torch.float32) if keep else None
        threads, size = self._threads(matrix), rows * matrix.stride
        room = self._room((threads + 1) * size)
        self.library.cospadi_product(
            matrix.address,
            self._openmp_address,
            threads,
            x.data_ptr(),
            room if z is None else z.data_ptr(),
            y.data_ptr(),
            room + 4 * size,
            rows,
            x.dtype == torch.bfloat16,
        )
        return y, z

    def apply_codes(self, matrix: BoundMatrix, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``y = z S`` for z that `product_and_projection` gave for `x`: (..., d_out), in the dtype of `x`."""
        rows = x.numel() // x.shape[-1]
        if z.shape != (rows, matrix.stride) or not z.is_contiguous():
            raise ValueError(f"z of shape {tuple(z.shape)} does not fit {rows} rows and {matrix.n_atoms} atoms")
        y = x.new_empty((*x.shape[:-1], matrix.d_out))
        threads = self._threads(matrix)
        self.library.cospadi_product(
            matrix.address,
            self._openmp_address,
            threads,
            None,
            z.data_ptr(),
            y.data_ptr(),
            self._room(threads * rows * matrix.stride),
            rows,
            x.dtype == torch.bfloat16,
        )
        return y

    def apply_codes_to_many(self, matrix: BoundMatrix, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``y = z S`` without the zeros of ``S``: float32 z transposed, contiguous (k, n), to (n, d_out) in `dtype`."""
        if z.shape[0] != matrix.n_atoms or not z.is_contiguous() or not matrix.has_zeros:
            raise ValueError(f"z of {matrix.n_atoms} atoms by rows, and codes with a support, are needed here")
        rows = z.shape[1]
        y = z.new_empty((rows, matrix.d_out), dtype=dtype)
        threads = self._threads(matrix)
        self.library.cospadi_many(
            matrix.address,
            self._openmp_address,
            threads,
            z.data_ptr(),
            y.data_ptr(),
            self._room(threads * self._bench),
            rows,
            dtype == torch.bfloat16,
        )
        return y

    def unpack(self, matrix: BoundMatrix, dtype: torch.dtype) -> torch.Tensor:
        """Codes transposed, (d_out, k) with zeros, in `dtype`."""
        codes = torch.empty(matrix.d_out, matrix.stride, dtype=dtype)
        self.library.cospadi_unpack(
            matrix.address, self._openmp_address, self._threads(matrix), codes.data_ptr(), dtype == torch.bfloat16
        )
        return codes[:, : matrix.n_atoms]

    def _threads(self, matrix: BoundMatrix) -> int:
        if self._openmp is None:
            return 1
        return min(torch.get_num_threads(), matrix.most_threads)

    def _room(self, floats: int) -> int:
        """Address of so many floats, kept from call to call; each thread of Python has its own."""
        room = getattr(self._scratch, "room", None)
        if room is None or room.numel() < floats:
            room = self._scratch.room = torch.empty(floats)
        return room.data_ptr()


def choose(choice: str) -> None:
    """Compute with this one of `CHOICES` from the next product on."""
    global _choice
    if choice == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise ValueError("cpu is 'avx2', which this processor does not have; allowed: auto, generic, torch")
    _choice = choice


def kernel() -> Kernel | None:
    """The kernel that was chosen; None where plain torch has to do. Compiled at the first call, then cached on disk."""
    return None if (choice := _choice) == "torch" else _kernel(choice)


@functools.cache
def _kernel(choice: str) -> Kernel | None:
    if sys.byteorder != "little":
        logger.warning("packed products: plain torch operations, because the kernel is for little-endian machines")
        return None
    try:
        compiled = Kernel(_load(choice))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("packed products: plain torch operations, which are slower, because %s", _reason(error))
        return None
    threads = "torch's threads" if compiled.parallel else "one thread, because torch's OpenMP was not found"
    logger.info("packed products: compiled %s kernel in %s", compiled.kind, threads)
    return compiled


def _load(choice: str) -> ctypes.CDLL:
    """The library from the cache, compiled if it is not there or not as it was made."""
    flags = ["-O3" if choice != "generic" else "-O2", "-shared", "-fPIC", *_FLAGS[choice]]
    parts = [SOURCE, *flags, os.environ.get("CC", ""), _processor()]
    name = f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    folder = _cache_folder()
    if folder is not None and _is_as_made(folder / name):
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError as error:  # a file system that forbids to run its files
            logger.info("packed products: %s; compiling for this process alone", error)
            folder = None
    command = _compiler()
    # where the cache is of no use, or has no room: compile for this process alone
    for place in (folder, None) if folder is not None else (None,):
        try:
            with tempfile.TemporaryDirectory(dir=place, prefix=".compile-") as work:
                return _compile([*command, *flags], Path(work), None if place is None else place / name)
        except (OSError, subprocess.SubprocessError):
            if place is None:
                raise
    raise AssertionError("unreachable")


def _compile(command: list[str], work: Path, library: Path | None) -> ctypes.CDLL:
    source, made = work / "kernel.c", work / "kernel.so"
    source.write_text(SOURCE)
    command = [*command, "-o", str(made), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    made.chmod(0o700)
    loaded = ctypes.CDLL(str(made))
    if library is not None:
        digest = work / "digest"
        digest.write_text(_digest(made))
        digest.chmod(0o600)
        # a stop in between leaves a library that its digest does not fit: it is compiled anew
        os.replace(made, library)
        os.replace(digest, _digest_file(library))
    return loaded


def _cache_folder() -> Path | None:
    """Folder that only this user writes into; None where there is none and none can be made."""
    try:
        # a container may run as a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cospadi"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o022:
            folder.chmod(0o700)
        return folder if _is_private(folder, stat.S_ISDIR) else None
    except (OSError, RuntimeError):
        return None


def _is_as_made(library: Path) -> bool:
    """Whether a library of the cache has the bytes that its compiler wrote, and nobody else can have written it."""
    try:
        return (
            _is_private(library, stat.S_ISREG)
            and _is_private(_digest_file(library), stat.S_ISREG)
            and _digest_file(library).read_text() == _digest(library)
        )
    except (OSError, UnicodeDecodeError):
        return False


def _is_private(path: Path, kind: Callable[[int], bool]) -> bool:
    status = path.lstat()
    owners = {0, os.geteuid()} if hasattr(os, "geteuid") else {status.st_uid}
    return kind(status.st_mode) and status.st_uid in owners and not status.st_mode & 0o022


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _compiler() -> list[str]:
    """Command of the C compiler, which may have flags of its own: ``CC='gcc -m64'``."""
    said = os.environ.get("CC")
    try:
        commands = [shlex.split(said)] if said and said.strip() else [["gcc"], ["cc"], ["clang"]]
    except ValueError as error:
        raise FileNotFoundError(f"CC is {said!r}, which is no command: {error}") from error
    for name, *flags in commands:
        if found := shutil.which(name):
            return [found, *flags]
    raise FileNotFoundError(f"no C compiler was found ({', '.join(name for name, *_ in commands)})")


def _processor() -> str:
    """What a library for this machine depends on; a home folder may be shared by several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}"


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or "").strip().splitlines()
        return f"{error.cmd[0]} failed: {said[0] if said else error.returncode}"
    return str(error)


def _torch_openmp() -> _OpenMP | None:
    """The OpenMP that torch itself runs on: a second one would have threads that fight with torch's."""
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    for library in (None, *sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))):
        try:
            found = ctypes.CDLL(None if library is None else str(library))
            return _OpenMP(*(ctypes.cast(getattr(found, name), ctypes.c_void_p).value for name in names))
        except (OSError, AttributeError):
            continue
    return None
