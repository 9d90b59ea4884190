"""The kernels for a GPU: run on one where there is one, and in Triton's interpreter where Triton is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_runtime import KINDS as EVERY_KIND
from test_runtime import make

from cospadi.runtime import cospadi_cuda
from cospadi.runtime.cospadi_cuda import (
    KERNEL_ROWS,
    Kernels,
    apply_codes,
    gpu_kernels,
    has_kernels,
    kernels_agree,
    project,
    unpack,
)
from cospadi.runtime.cospadi_linear import PackedLinear
from cospadi.runtime.cospadi_products import compiled_for

MODULE = "cospadi.runtime.cospadi_cuda_kernels"
# plain torch computes with the others
KINDS = [kind for kind in EVERY_KIND if kind[0] in cospadi_cuda.CODECS]
TRELLISES = [kind for kind in KINDS if kind[0].startswith("trellis")]
# Triton reads it when it is imported: the interpreter has a process of its own
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
compiler = pytest.mark.skipif(INTERPRETED, reason="this process interprets")


@triton
@compiler
@pytest.mark.slow
def test_kernels_in_the_interpreter():
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter does not work with this NumPy")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(
    params=[
        pytest.param(
            "interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="this process does not interpret")
        ),
        pytest.param("cuda", marks=[gpu, triton, compiler]),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Device whose kernels compute: the interpreter's tensors are on the CPU."""
    if request.param == "cuda":
        return "cuda"
    from cospadi.runtime import cospadi_cuda_kernels

    kernels = Kernels(*(getattr(cospadi_cuda_kernels, name) for name in Kernels._fields))
    monkeypatch.setattr(cospadi_cuda, "gpu_kernels", lambda: kernels)
    monkeypatch.setattr(cospadi_cuda, "_on", lambda device: contextlib.nullcontext())
    return "cpu"


def arrange(layer: PackedLinear) -> PackedLinear:
    """Lay the dictionary out as on a GPU."""
    if layer.dictionary is not None and layer.dictionary.ndim == 2:
        layer.dictionary.data = layer.dictionary.data.T.contiguous().T
    return layer


def product(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    parts = layer.parts()
    return apply_codes(layer.spec, parts, project(layer.spec, parts, x), x.dtype)


@pytest.mark.parametrize("support", ["bitmask", "dense"])
def test_products_of_many_rows_are_as_wide_as_tensor_cores_like(device, support):
    layer, weight = make((33, 12, 37), codec="bf16", support=support, dictionary="bf16")
    layer = arrange(layer).to(device)
    x = torch.randn(KERNEL_ROWS + 1, 33, device=device).bfloat16()
    z = project(layer.spec, layer.parts(), x)
    assert z.shape == (len(x), 48) and not z[:, 37:].any()
    torch.testing.assert_close(z[:, :37], x @ layer.dictionary, rtol=0.02, atol=0.02)
    exact = x.double().cpu() @ weight.double()
    assert (product(layer, x).double().cpu() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("codec", "support", "dictionary"), KINDS)
def test_product_is_that_of_the_reader(device, codec, support, dictionary):
    # two chunks of atoms, of which the second is ragged; groups that end within a byte of the support, and longer ones
    for (shape, group_size), (rows, arranged) in zip(
        (((33, 12, 300), 16), ((17, 5, 9), None)), ((1, True), (3, False)), strict=True
    ):
        layer, weight = make(shape, codec=codec, support=support, dictionary=dictionary, group_size=group_size)
        layer = (arrange(layer) if arranged else layer).to(device)
        x = torch.randn(rows, weight.shape[0], generator=torch.Generator().manual_seed(rows)).to(device)
        y = product(layer, x)
        expected = x.cpu().double() @ weight.double()
        size = x.cpu().double().abs() @ weight.double().abs() + 1
        assert ((y.cpu().double() - expected).abs() / size).max() < 1e-5
        assert torch.equal(y, product(layer, x)), "equal calls give equal bits"


@pytest.mark.parametrize(
    ("codec", "support"), [("bf16", "bitmask"), ("int4", "bitmask"), ("bf16", "2:4"), ("trellis3", "dense")]
)
def test_bfloat16_error_is_within_twice_that_of_the_dense_product(device, codec, support):
    layer, weight = make((64, 48, 60), codec=codec, support=support)
    layer = arrange(layer).to(device)
    weight = weight.to(device)
    for rows in (2, KERNEL_ROWS, KERNEL_ROWS + 1):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16().to(device)
        exact = x.double() @ weight.double()
        error, dense = ((y.double() - exact).square().mean().sqrt() for y in (product(layer, x), x @ weight.bfloat16()))
        assert error <= 2 * dense


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_trellis_of_several_tiles_is_that_of_the_reader(device, bits):
    # whole groups of 32 rows, in several tiles of which the last is ragged; the last program has three columns
    d_in = 672 if device == "cpu" else 1504  # the interpreter is slow
    layer, weight = make((d_in, 19, 0), codec=f"trellis{bits}", support="dense", dictionary="identity")
    layer = layer.to(device)
    for rows in (1, 2, 4, KERNEL_ROWS) if device == "cuda" else (1, KERNEL_ROWS):
        x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(rows)).to(device)
        y = product(layer, x)
        size = x.cpu().double().abs() @ weight.double().abs() + 1
        assert ((y.cpu().double() - x.cpu().double() @ weight.double()).abs() / size).max() < 1e-6
        assert torch.equal(y, product(layer, x)), "equal calls give equal bits"


@pytest.mark.parametrize(
    ("codec", "support", "dictionary"), [*(kind for kind in KINDS if kind[1] != "dense"), *TRELLISES]
)
def test_codes_unpack_bit_for_bit(device, codec, support, dictionary):
    scaled = (codec, support, dictionary) in TRELLISES
    for shape in ((20, 6, 268), (64, 21, 64)) if scaled else ((20, 6, 268),):
        layer, _ = make(shape, codec=codec, support=support, dictionary=dictionary)
        layer = layer.to(device)
        # the interpreter rounds to bfloat16 in a way of its own, which numbers with a scale show
        exact = device == "cpu" and (scaled or layer.scales is not None)
        for dtype in (torch.float32,) if exact else (torch.float32, torch.bfloat16):
            unpacked = unpack(layer.spec, layer.parts(), dtype)
            assert torch.equal(unpacked[:, : layer.n_atoms], layer.factors(dtype)[1])
            assert not unpacked[:, layer.n_atoms :].any()


def test_empty_and_full_columns(device):
    layer, _ = make((16, 6, 270))
    mask = torch.zeros(6, 272, dtype=torch.bool)
    mask[2, :270], mask[4, [0, 7, 8, 255, 256, 269]] = True, True
    layer.spec["codes"]["n_nonzero"] = int(mask.sum())
    bits = mask.view(6, 34, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    layer.support.data = bits.sum(2).to(torch.uint8)
    layer.values.data = torch.randn(276).bfloat16()
    layer = layer.to(device)
    x = torch.randn(1, 16, device=device)
    y = product(layer, x)
    atoms, codes = layer.factors(torch.float32)
    torch.testing.assert_close(y, x @ atoms @ codes.T, rtol=1e-4, atol=1e-4)
    assert (y[0, [0, 1, 3, 5]] == 0).all() and (y[0, [2, 4]] != 0).all()


def test_a_changed_support_is_noticed_and_a_damaged_one_refused(device):
    layer, _ = make((16, 24, 8))
    layer = layer.to(device)
    x = torch.randn(1, 16, device=device)
    product(layer, x)
    with torch.no_grad():
        layer.support.copy_(layer.support.flip(0))  # other columns now start elsewhere
    atoms, codes = layer.factors(torch.float32)
    torch.testing.assert_close(product(layer, x), x @ atoms @ codes.T, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.support[0, 0] ^= 1
    with pytest.raises(ValueError, match=r"positions for .* values: the file is damaged"):
        product(layer, x)


def test_a_dictionary_by_columns_is_the_same_to_all_others():
    layer, weight = make()
    stored = layer.dictionary.detach().clone()
    arrange(layer)
    assert layer.dictionary.stride() == (1, 48) and torch.equal(layer.state_dict()["dictionary"], stored)
    x = torch.randn(2, 48)
    torch.testing.assert_close(layer(x), x @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(torch.randn(1, 48).expand(20, 48)).var(0).max(), torch.tensor(0.0))
    assert layer.to("cpu").dictionary.is_contiguous()


@pytest.fixture
def undecided(monkeypatch):
    """`gpu_kernels` as in a new process on a machine with a GPU, before and after."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    gpu_kernels.cache_clear()
    yield
    gpu_kernels.cache_clear()


def test_one_log_line_says_why_plain_torch_computes(undecided, monkeypatch, caplog):
    def said(level: str, text: str) -> bool:
        gpu_kernels.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "cospadi.runtime"):
            assert gpu_kernels() is gpu_kernels() is None
        return [(record.levelname, text in record.getMessage()) for record in caplog.records] == [(level, True)]

    with monkeypatch.context() as without:
        without.delitem(sys.modules, MODULE, raising=False)
        without.setitem(sys.modules, "triton", None)
        assert said("WARNING", "plain torch operations, which are slower, because Triton is not installed")
    with monkeypatch.context() as old:
        old.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        assert said("WARNING", "because compute capability 7.5 has no bfloat16")


def test_kernels_that_fail_or_are_wrong_on_a_gpu_are_not_used(monkeypatch, caplog):
    def plain(spec, parts, z, dtype):
        return z @ cospadi_cuda.decode_codes(spec, *parts[2:], dtype).T

    def refuse(*arguments):
        raise RuntimeError("no such instruction")

    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(cospadi_cuda, "gpu_kernels", lambda: "kernels")
    monkeypatch.setattr(cospadi_cuda, "project", lambda spec, parts, x: x @ parts[0])
    monkeypatch.setattr(
        cospadi_cuda, "unpack", lambda spec, parts, dtype: cospadi_cuda.decode_codes(spec, *parts[2:], dtype)
    )
    cases = (
        (plain, True, None),
        (lambda *arguments: 1.5 * plain(*arguments), False, "the kernels are wrong on a GPU: relative error 0."),
        (refuse, False, "the kernels do not run on a GPU: RuntimeError: no such instruction"),
    )
    for codec, (apply, agrees, text) in itertools.product(("bf16", "trellis3"), cases):
        monkeypatch.setattr(cospadi_cuda, "apply_codes", apply)
        kernels_agree.cache_clear()
        caplog.clear()
        assert has_kernels(device, codec) is has_kernels(device, codec) is agrees
        assert [text in record.getMessage() for record in caplog.records] == [True] * (not agrees)
    kernels_agree.cache_clear()


def built_for_hopper(kernel, pointers: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    """What Triton and NVIDIA's assembler make of a kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in kernel.arg_names}
    at = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    built = build(ASTSource(kernel, signature, at), target=GPUTarget("cuda", 90, 32))
    assert built.asm["cubin"]
    return built.asm


POINTERS = {"bf16": "*bf16", "bf14": "*u8", "int8": "*i8", "int4": "*u8"}


@triton
@compiler
@pytest.mark.parametrize(("codec", "support", "early"), [("bf16", "bitmask", True), ("int4", "2:4", False)])
def test_kernels_compile_for_a_gpu_that_need_not_be_there(codec, support, early):
    from cospadi.runtime.cospadi_cuda_kernels import code_products, row_products, unpack_codes

    scaled = codec == "int4"
    given = {"values": POINTERS[codec], "support": "*u8", "offsets": "*i32", "matrix": POINTERS[codec], "x": "*bf16"}
    fixed = {"CODEC": codec, "SCALED": scaled, "PAIRS": support == "2:4", "ASM": True, "LANES": True, "EARLY": early}
    fixed |= {"ROWS": 2, "VALUE_BITS": 16, "BLOCK_OUT": 8, "BLOCK_IN": 128, "UNROLL": 2}
    for kernel, z, out in zip(
        (row_products, code_products, unpack_codes), ("", "*fp32", ""), ("*fp32", "*bf16", "*bf16"), strict=True
    ):
        scales = {"scales": "*bf16", "scale_starts": "*i32"} if scaled else {}
        pointers = given | scales | {"z": z, "out": out}
        absent = {} if scaled else {"scales": None, "scale_starts": None}
        built = built_for_hopper(kernel, pointers, fixed | absent)
        assert ("griddepcontrol" in built["ptx"]) == (early and "EARLY" in kernel.arg_names)


@triton
@compiler
@pytest.mark.parametrize(("bits", "ragged"), [(4, False), (3, False), (2, True)])
def test_kernels_of_a_trellis_compile_for_a_gpu_that_need_not_be_there(bits, ragged):
    from cospadi.runtime.cospadi_cuda_kernels import trellis_products, unpack_trellis

    pointers = {"z": "*bf16", "stored": "*u8", "scales": "*bf16", "out": "*bf16"}
    fixed = {"ROWS": 2, "BITS": bits, "RAGGED": ragged, "ASM": True, "EARLY": True, "BLOCK_IN": 256}
    assert "griddepcontrol" in built_for_hopper(trellis_products, pointers, fixed)["ptx"]
    built_for_hopper(unpack_trellis, pointers, fixed)


@gpu
@triton
@compiler
def test_layer_on_a_gpu_survives_what_a_module_must():
    for (codec, support, dictionary), bias in itertools.product([*KINDS[:4], *TRELLISES], (False, True)):
        layer, weight = make((96, 112, 60), codec=codec, support=support, dictionary=dictionary, bias=bias)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer = layer.to("cuda")
        assert layer.dictionary is None or layer.dictionary.stride() == (1, 96)
        assert compiled_for(torch.empty(1, device="cuda"), layer.spec) is gpu_kernels()
        for rows in (1, KERNEL_ROWS, KERNEL_ROWS + 1, 64):
            x = torch.randn(2, rows, 96, device="cuda")
            expected = x.cpu().double() @ weight.double() + (layer.bias.cpu().double() if bias else 0)
            torch.testing.assert_close(layer(x).cpu().double(), expected, rtol=1e-3, atol=1e-3)
        x = torch.randn(1, 96, device="cuda", requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad.cpu()[0], weight.sum(1), rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            x = torch.randn(1, 96, device="cuda")
            expected = layer(x)
            torch.compiler.reset()  # every spec is compiled anew, and one function is only so often
            torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected)
        back = layer.to("cpu").state_dict()
        assert all(torch.equal(before[name], tensor) and tensor.is_contiguous() for name, tensor in back.items())
