"""Products with packed tensors, ``y = (x D) S``: by compiled code where there is some, by plain torch elsewhere.

Nothing here knows a layer: `cospadi_linear` has those, and calls what is here with their tensors.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .cospadi_codecs import decode_codes, decode_dictionary, tensor_shapes
from .cospadi_cpu import CODECS as CPU_CODECS
from .cospadi_cpu import DTYPES, BoundMatrix, BoundSum, KeptProjection, Kernel, kernel, product_dtype
from .cospadi_cpu import SUPPORTS as CPU_SUPPORTS
from .cospadi_cuda import CODECS as CUDA_CODECS
from .cospadi_cuda import SUPPORTS as CUDA_SUPPORTS
from .cospadi_cuda import Kernels, apply_codes, gpu_kernels, has_kernels, project
from .cospadi_diagonal import Diagonal, is_diagonal, times, times_transposed
from .cospadi_format import IDENTITY

PARTS = ("dictionary", "dictionary_scales", "values", "scales", "support")

# Rows of x from which `D` transposed times x transposed is the faster product, where z is wanted transposed
_TURNED_ROWS = 64

# Dictionaries without numbers to multiply and add up
_OF_KERNELS = (IDENTITY, Diagonal.name)

# Several copies of this module can be loaded in one process, each checkpoint's own; an operator has one name in torch
_NAMESPACE = f"cospadi_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}"

# torch asks `inspect` where an operator is made, which else looks up the file of every module that is loaded
inspect.modulesbyfile[__file__] = __name__


class SharedProjection:
    """``z = x D`` of the last input, for the layers that share ``D``: q, k and v ask for the same one in turn."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None
        self._few: KeptProjection | None = None

    def of_few(self, compiled: Kernel) -> KeptProjection:
        """The same of few rows, which the kernel looks after."""
        if self._few is None:
            self._few = KeptProjection(compiled)
        return self._few

    def of(
        self, x: torch.Tensor, dictionary: int, project: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
    ) -> torch.Tensor:
        """``project(rows)``, or what it gave for this very `x` and the dictionary at this address before."""
        z = self._known(x, dictionary)
        if z is not None:
            return z
        z = project(rows)
        if not x.is_inference():
            state = x._version
        elif x.device.type == "cpu":
            state = x.clone()  # changes of an inference tensor are not counted
        else:
            return z  # comparing would wait for the device
        # for as long as `x` lives, and no longer
        self._last = (weakref.ref(x, self._forget), dictionary, state, z)
        return z

    def _known(self, x: torch.Tensor, dictionary: int) -> torch.Tensor | None:
        last = self._last
        if last is None or last[0]() is not x or last[1] != dictionary:
            return None
        unchanged = torch.equal(last[2], x) if x.is_inference() else last[2] == x._version
        return last[3] if unchanged else None

    def _forget(self, x: Any) -> None:
        if self._last is not None and self._last[0] is x:
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None, "_few": None}


INPUTS = SharedProjection()  # of all layers whose dictionary is the identity: x, turned as the kernel wants it


def compiled_for(x: torch.Tensor, spec: dict[str, Any]) -> Kernel | Kernels | None:
    """The compiled code for products of `x` with a matrix; None where plain torch has to do, which knows all codecs."""
    dictionary, codes = spec["dictionary"]["codec"], spec["codes"]
    codecs, supports = (CPU_CODECS, CPU_SUPPORTS) if x.is_cpu else (CUDA_CODECS, CUDA_SUPPORTS)
    if codes["support"] not in supports or codes["codec"] not in codecs or dictionary not in (*_OF_KERNELS, *codecs):
        return None
    if x.is_cpu:
        return kernel() if x.dtype in DTYPES else None
    on_gpu = x.device.type == "cuda" and x.dtype in (*DTYPES, torch.float16)
    return gpu_kernels() if on_gpu and has_kernels(x.device, codes["codec"]) else None


def compiled_for_dense(x: torch.Tensor, weight: torch.Tensor) -> Kernel | None:
    """The compiled code where it multiplies `x` with a dense weight (d_out, d_in) faster than torch does."""
    compiled = kernel()
    return compiled if compiled is not None and not is_watched(x) and compiled.is_for_dense(x, weight) else None


def is_stored(parts: list[torch.Tensor | None], dtypes: tuple[torch.dtype | None, ...], device: torch.device) -> bool:
    """Whether these packed tensors are what the kernels of a device read: there, and of the dtypes of the file."""
    return all(
        part is None or (part.dtype == dtype and part.device == device)
        for part, dtype in zip(parts, dtypes, strict=True)
    )


def is_watched(x: torch.Tensor) -> bool:
    """Whether torch records or transforms the operations on `x`: it has to be shown some, and no addresses."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not torch.Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, fake tensors, counters of operations
        or is_transformed(x)
    )


def refuse_onnx() -> None:
    """While a model is exported to ONNX, whose operators know no packed tensors: say so, and what to do."""
    if _exports_to_onnx():
        raise ValueError(
            "ONNX has no operator for a product with packed tensors; call unpack_(model) first, or export a dense "
            "folder (cospadi.checkpoint.densify)"
        )


def _exports_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result does, but that imports torch._dynamo for everyone: torch.compile asks
# while it compiles, and puts the answer into what it makes
_exports_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_transformed(x: torch.Tensor) -> bool:
    """Whether torch derives something else from operations on `x`: vmap, grad, jvp of torch.func, dual numbers."""
    if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor):
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or torch.autograd.forward_ad._current_level >= 0


def bind(compiled: Kernel, spec: dict[str, Any], parts: list[torch.Tensor | None]) -> BoundMatrix:
    """What the kernel needs of a matrix whose packed tensors, in the order of `PARTS`, are on the CPU.

    A diagonal is not among it: inputs come scaled.
    """
    if is_diagonal(spec):
        spec, parts = {**spec, "dictionary": {"codec": IDENTITY, "n_atoms": spec["shape"][0]}}, [None, *parts[1:]]
    # detached: whoever gives a parameter other data leaves these where the kernel reads
    tensors = {name: part.detach().contiguous() for name, part in zip(PARTS, parts, strict=True) if part is not None}
    return BoundMatrix(compiled, spec, tensors)


def project_many(
    compiled: Kernel, spec: dict[str, Any], dictionary: Any, scales: Any, rows: torch.Tensor
) -> torch.Tensor:
    """``z = x D`` for many rows (n, d_in) on the CPU, (n, k)."""
    rows = rows.to(product_dtype(rows.dtype))
    atoms = decode_dictionary(spec, dictionary, scales, rows.dtype)
    if atoms is None or atoms.ndim == 1:
        rows = times(rows, atoms)
        return rows.T.contiguous().T if compiled.paths.without_zeros else rows
    if compiled.paths.without_zeros and len(rows) >= _TURNED_ROWS:
        return (atoms.T @ rows.T).T  # which is how `apply_codes_to_many` wants it
    return rows @ atoms


def apply_to_many(compiled: Kernel, total: BoundSum, zs: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """``y = z S``, added up, for z from `_project_many`: (n, d_out) in `dtype`."""
    if compiled.paths.without_zeros and total.has_zeros:
        return compiled.apply_codes_to_many(total, [z.float().T.contiguous() for z in zs], dtype)
    products = [F.linear(z, compiled.unpack(matrix, z.dtype)) for matrix, z in zip(total.matrices, zs, strict=True)]
    return functools.reduce(torch.add, products).to(dtype)


@functools.lru_cache(maxsize=4096)
def _parsed(spec: str) -> dict[str, Any]:
    return json.loads(spec)


@functools.lru_cache(maxsize=4096)
def _stored_dtypes(spec: str) -> tuple[torch.dtype | None, ...]:
    """Dtypes that the file has, in the order of `PARTS`; None for those that the matrix does not have."""
    return dtypes_of(tensor_shapes(_parsed(spec)))


def dtypes_of(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[torch.dtype | None, ...]:
    return tuple(shapes[part][1] if part in shapes else None for part in PARTS)


def factors_of(
    spec: dict[str, Any],
    dtype: torch.dtype,
    dictionary: Any,
    dictionary_scales: Any,
    values: Any,
    scales: Any,
    support: Any,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    atoms = decode_dictionary(spec, dictionary, dictionary_scales, dtype)
    return atoms, decode_codes(spec, values, scales, support, dtype)


@torch.library.custom_op(
    f"{_NAMESPACE}::packed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor? dictionary, Tensor? dictionary_scales, Tensor values, Tensor? scales, "
    "Tensor? support, str spec) -> Tensor",
)
def packed_linear(
    x: torch.Tensor,
    dictionary: torch.Tensor | None,
    dictionary_scales: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    support: torch.Tensor | None,
    spec: str,
) -> torch.Tensor:
    """``y = (x D) S``: inputs (..., d_in) to outputs (..., d_out), differentiable in `x`; `spec` is JSON.

    A few rows go through the kernel of the device, and many through products with unpacked factors. Other devices and
    dtypes always take the latter.
    """
    matrix_spec = _parsed(spec)
    parts = [dictionary, dictionary_scales, values, scales, support]
    rows = x.reshape(-1, matrix_spec["shape"][0])
    # asked for once: another thread may choose other kernels meanwhile
    compiled = compiled_for(x, matrix_spec) if is_stored(parts, _stored_dtypes(spec), x.device) else None
    if compiled is not None and not x.is_cpu:
        y = apply_codes(matrix_spec, parts, project(matrix_spec, parts, rows), x.dtype)
    elif compiled is not None and rows.shape[0] <= compiled.paths.few_rows:
        rows = times(rows, parts[0].float()) if is_diagonal(matrix_spec) else rows
        y = compiled.product(BoundSum([bind(compiled, matrix_spec, parts)]), rows).to(x.dtype)
    elif compiled is not None:
        z = project_many(compiled, matrix_spec, dictionary, dictionary_scales, rows)
        y = apply_to_many(compiled, BoundSum([bind(compiled, matrix_spec, parts)]), [z], x.dtype)
    else:
        dtype = product_dtype(x.dtype) if x.is_cpu else x.dtype
        atoms, codes = factors_of(matrix_spec, dtype, *parts)
        rows = rows.to(dtype)
        y = F.linear(times(rows, atoms), codes).to(x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


@packed_linear.register_fake
def _(x: torch.Tensor, *parts_and_spec: Any) -> torch.Tensor:
    refuse_onnx()  # here, too: where torch.export compiles, it does not see it in the layer
    *parts, spec = parts_and_spec
    device = parts[PARTS.index("values")].device  # a layer without memory gives no numbers, whatever x is
    return x.new_empty(*x.shape[:-1], _parsed(spec)["shape"][1], device=device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *parts, ctx.spec = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    dictionary, codes = factors_of(_parsed(ctx.spec), gradient.dtype, *ctx.saved_tensors)
    gradient = gradient @ codes
    return (times_transposed(gradient, dictionary), *[None] * (len(PARTS) + 1))


packed_linear.register_autograd(_backward, setup_context=_save_for_backward)
