"""The packed linear layer: decoding bit for bit, products against float64, and what a Module must survive."""

from __future__ import annotations

import concurrent.futures
import copy
import ctypes
import errno
import functools
import gc
import itertools
import logging
import mmap
import os
import pickle
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from format_reader import numbers, read_matrix
from format_writer import BFLOAT16, pack14, random_matrix
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from cospadi.formats.factorization import Factorization
from cospadi.runtime import cospadi_compiler, cospadi_cpu, cospadi_cuda, cospadi_linear, cospadi_products
from cospadi.runtime.cospadi_codecs import decode_codes, decode_support, encode_codes, encode_dictionary
from cospadi.runtime.cospadi_cpu import PATHS, BoundSum, Kernel, product_dtype
from cospadi.runtime.cospadi_linear import DenseLinear, PackedLinear, pack_, packed_layers, unpack_
from cospadi.runtime.cospadi_mixture import packed_module
from cospadi.runtime.cospadi_products import PARTS, SharedProjection
from cospadi.runtime.cospadi_registry import CODECS as REGISTERED

FEW = max(paths.few_rows for paths in PATHS.values())  # more rows than these go another way on every machine
SHAPES = [(48, 40, 27), (5, 3, 1), (16, 24, 8), (33, 17, 9), (64, 96, 40)]  # (d_in, d_out, k)
CODECS = ("bf16", "bf14", "int8", "int4")
# every codec of the codes with every support, every codec of the dictionary
KINDS = [(codec, support, "bf16") for codec, support in itertools.product(CODECS, ("bitmask", "dense", "2:4"))]
KINDS += [("bf16", "bitmask", dictionary) for dictionary in ("bf14", "int8", "int4", "identity")]
KINDS += [("int4", "2:4", "identity"), ("int8", "dense", "int8"), ("int4", "dense", "diagonal")]
KINDS += [("bf14", "bitmask", "diagonal")]
KINDS += [
    ("int6", "bitmask", "int3"),
    ("int3", "dense", "int2"),
    ("int2", "2:4", "int6"),
    ("int3", "bitmask", "identity"),
]
KINDS += [(f"int{bits}", "dense", "diagonal" if bits == 3 else "identity") for bits in (2, 3, 6)]
KINDS += [("trellis4", "dense", "identity"), ("trellis3", "dense", "bf16"), ("trellis2", "dense", "identity")]
# without a compiled kernel
OTHERS = [("uint3", "bitmask", "int6"), ("uint8", "2:4", "bf16")]
OTHERS += [(f"uint{bits}", "dense", "diagonal" if bits == 3 else "identity") for bits in (2, 3, 4, 6)]


def make(shape=(48, 40, 27), *, codec="bf16", support="bitmask", dictionary="bf16", bias=False, seed=0, group_size=16):
    """A layer, and its weight (d_in, d_out) by the independent reader."""
    d_in, d_out, k = shape
    if support == "2:4":
        k = -(-k // 4) * 4
        d_in = -(-d_in // 4) * 4 if dictionary in ("identity", "diagonal") else d_in
    tensors, spec = random_matrix(
        np.random.default_rng(seed), d_in, d_out, k, codec, support, dictionary, group_size=group_size
    )
    generator = torch.Generator().manual_seed(seed)
    layer = PackedLinear(spec, torch.nn.Parameter(torch.randn(d_out, generator=generator)) if bias else None)
    for name, array in tensors.items():
        stored = torch.from_numpy(array.view(np.int16) if array.dtype == BFLOAT16 else array.copy())
        part = getattr(layer, name.removeprefix("m."))
        assert part.shape == stored.shape
        part.data = stored.view(part.dtype)
    assert {name.removeprefix("m.") for name in tensors} == {part for part in PARTS if getattr(layer, part) is not None}
    return layer, torch.from_numpy(read_matrix(tensors, "m", spec))


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 8, 11, 15, 17, 1000, 2**31 - 1])
def test_groups_of_every_size_have_their_scales(machine, group_size):
    kinds = [*itertools.product(("int8", "int4"), ("dense", "bitmask", "2:4"), ("identity", "int8", "int4"))]
    kinds += [("int6", "bitmask", "int2"), ("int3", "dense", "int6"), ("int2", "2:4", "int3")]
    for (codec, support, dictionary), shape in itertools.product(kinds, [(8, 1, 8), (40, 19, 37)]):
        layer, weight = make(shape, codec=codec, support=support, dictionary=dictionary, group_size=group_size)
        for rows in (1, 3, FEW + 1):
            x = torch.randn(rows, weight.shape[0], generator=torch.Generator().manual_seed(rows))
            size = x.double().abs() @ weight.double().abs() + 1
            error = ((layer(x).double() - x.double() @ weight.double()).abs() / size).max()
            assert error < 1e-5, (codec, support, dictionary, shape, rows)


def test_a_vector_of_values_can_have_many_scales(machine):
    spec = {
        "shape": [8, 1],
        "dictionary": {"codec": "identity", "n_atoms": 8},
        "codes": {"codec": "int8", "support": "dense", "n_nonzero": 8, "group_size": 2, "n_scales": 4},
    }
    layer = PackedLinear(spec)
    layer.values.data.fill_(1)
    layer.scales.data.copy_(torch.tensor([1, 10, 100, 1000]))
    assert layer(torch.ones(1, 8)).item() == 2222


@functools.cache
def compiled(choice: str) -> Kernel:
    """The kernel for one kind of machine, skipped where this one is not of that kind."""
    if choice == "avx2" and "avx2" not in cospadi_compiler.processor().split():
        pytest.skip("this processor has no AVX2")
    return Kernel(cospadi_cpu._load(choice))


@pytest.fixture(params=["auto", "avx2", "generic", "torch"])
def machine(request, monkeypatch) -> str:
    """Compute as on another kind of machine; ``torch``: as on one without a compiler."""
    found = None if request.param == "torch" else compiled(request.param)
    monkeypatch.setattr(cospadi_products, "kernel", lambda: found)
    return request.param


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 1001])
def test_14_bit_stream_decodes_bit_for_bit(n):
    words = np.random.default_rng(n).integers(0, 2**16, n, dtype=np.uint16)
    stored = pack14(words.view(BFLOAT16))
    decoded = REGISTERED["bf14"].decode(torch.from_numpy(stored.copy()), (n,))
    assert decoded.dtype == torch.bfloat16 and len(stored) == REGISTERED["bf14"].shape((n,))[0]
    assert (decoded.view(torch.int16).numpy().view(np.uint16) == words & 0xFFFC).all()
    if n:
        finite = np.isfinite(numbers(stored, "bf14", n))
        assert (numbers(stored, "bf14", n)[finite] == decoded.float().numpy()[finite]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_reader(machine, shape):
    for (codec, support, dictionary), group_size in itertools.product([*KINDS, *OTHERS], (16, None)):
        layer, weight = make(
            shape, codec=codec, support=support, dictionary=dictionary, group_size=group_size, bias=True
        )
        # a few rows go through the kernel, many through unpacked factors
        for rows in (1, 2, 3, 7, FEW + 1, 64, 101):
            x = torch.randn(1, rows, weight.shape[0], generator=torch.Generator().manual_seed(rows))
            expected = x.double() @ weight.double() + layer.bias.double()
            size = x.double().abs() @ weight.double().abs() + 1
            y = layer(x)
            assert y.shape == expected.shape
            assert ((y.double() - expected).abs() / size).max() < 1e-5, (codec, support, dictionary, rows)
            assert torch.equal(y, layer(x)), "equal calls give equal bits"


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 15, 64, 200])
def test_bfloat16_error_is_within_twice_that_of_the_dense_product(machine, rows):
    for codec, support, dictionary in KINDS:
        layer, weight = make((96, 112, 60), codec=codec, support=support, dictionary=dictionary)
        x = torch.randn(rows, weight.shape[0], generator=torch.Generator().manual_seed(rows)).bfloat16()
        exact = x.double() @ weight.double()

        def error(y, exact=exact):
            return (y.double() - exact).square().mean().sqrt()

        packed = layer(x)
        assert packed.dtype == torch.bfloat16
        assert error(packed) <= 2 * error(x @ weight.bfloat16()), (codec, support, dictionary)
        few = machine != "torch" and rows <= cospadi_products.kernel().paths.few_rows
        if few or product_dtype(x.dtype) == torch.float32:
            # only y is rounded, as the exact product would be, but for the few that lie near the middle
            assert error(packed) <= 1.01 * error(exact.bfloat16()), (codec, support, dictionary)


@pytest.mark.parametrize(
    ("machine", "has", "native"),
    [
        ("x86_64", {"avx2", "avx512_f"}, False),
        ("x86_64", {"avx512_bf16"}, True),
        ("x86_64", {"amx_bf16"}, True),
        ("aarch64", {"neon"}, False),
        ("aarch64", {"bf16"}, True),
    ],
)
@pytest.mark.parametrize("torch_knows", [True, False])
def test_bfloat16_is_multiplied_in_float32_where_the_processor_has_no_instructions(
    monkeypatch, machine, has, native, torch_knows
):
    if torch_knows:
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: {"cpu_name": "bf16", **dict.fromkeys(has, True)}, False
        )
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(cospadi_cpu, "processor", lambda: f"{machine} flags : {' '.join(has)}")
    monkeypatch.setattr(cospadi_cpu.platform, "machine", lambda: machine)
    cospadi_cpu.bfloat16_is_native.cache_clear()
    try:
        assert cospadi_cpu.bfloat16_is_native() == native
        assert product_dtype(torch.bfloat16) == (torch.bfloat16 if native else torch.float32)
        assert product_dtype(torch.float32) == torch.float32
    finally:
        cospadi_cpu.bfloat16_is_native.cache_clear()


@pytest.mark.parametrize("codec", ["int4", "bf16", "trellis3"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_split_the_work_whatever_their_number(threads, codec):
    kernel = compiled("auto")
    if threads > 1 and not kernel.parallel:
        pytest.skip("torch's OpenMP was not found")
    layer, weight = make((96, 700, 60), codec=codec, support="dense" if REGISTERED[codec].whole else "bitmask")
    kernel._threads, threads_of_the_machine = lambda matrix: threads, kernel._threads
    try:
        x = torch.randn(3, 96)
        matrix = cospadi_products.bind(kernel, layer.spec, layer.parts())
        y = kernel.product(BoundSum([matrix]), x)
        torch.testing.assert_close(y, x @ weight, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(y, kernel.product(BoundSum([matrix]), x)) for _ in range(5))
        codes = layer.factors(torch.float32)[1]
        assert torch.equal(kernel.unpack(matrix, torch.float32), codes)
        z = torch.randn(60, 130)
        for dtype in (torch.float32, torch.bfloat16) if matrix.has_zeros else ():
            y = kernel.apply_codes_to_many(BoundSum([matrix]), [z], dtype)
            torch.testing.assert_close(
                y, (z.T @ codes.T).to(dtype), rtol=1e-2 if y.dtype == torch.bfloat16 else 1e-4, atol=1e-4
            )
            assert all(torch.equal(y, kernel.apply_codes_to_many(BoundSum([matrix]), [z], dtype)) for _ in range(5))
    finally:
        kernel._threads = threads_of_the_machine


@pytest.mark.parametrize("codec", ["ec", "ectcq_scaled", "ectcq256"])
def test_steps_of_8_bits_give_what_the_stream_does(machine, codec):
    layer, weight = make((33, 17, 9), codec=codec, support="dense", group_size=None, bias=True)
    layer.unpack_steps()
    for rows in (1, FEW + 1):
        x = torch.randn(rows, 33)
        size = x.double().abs() @ weight.double().abs() + 1
        error = (layer(x).double() - x.double() @ weight.double() - layer.bias.double()).abs()
        assert (error / size).max() < 1e-5
        with_gradient = x.clone().requires_grad_()
        layer(with_gradient).sum().backward()
        torch.testing.assert_close(with_gradient.grad, weight.sum(1).expand(rows, -1), rtol=1e-3, atol=1e-3)


def before_a_wall(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where the process may read no further."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, no_access) == 0
    start = pages * mmap.PAGESIZE - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)


def compute_before_walls(choice: str) -> None:
    """Products of every kind of matrix whose tensors end at a wall; a read behind one ends the process."""
    kernel = compiled(choice)
    cospadi_products.kernel = lambda: kernel
    for shape, (codec, support, dictionary) in itertools.product([*SHAPES, (9, 70, 4), (40, 3, 40), (9, 5, 96)], KINDS):
        layer, weight = make(shape, codec=codec, support=support, dictionary=dictionary, group_size=5)
        parts = [None if part is None else before_a_wall(part.data) for part in layer.parts()]
        matrix = cospadi_products.bind(kernel, layer.spec, parts)
        if matrix.has_zeros:
            codes = layer.factors(torch.float32)[1]
            z = before_a_wall(torch.randn(layer.n_atoms, 19))
            torch.testing.assert_close(
                kernel.apply_codes_to_many(BoundSum([matrix]), [z], torch.float32), z.T @ codes.T, rtol=1e-4, atol=1e-4
            )
        x = torch.randn(2, weight.shape[0])
        scaled = before_a_wall(layer._scaled(x))
        torch.testing.assert_close(kernel.product(BoundSum([matrix]), scaled), x @ weight, rtol=1e-4, atol=1e-4)
        both = BoundSum([matrix, matrix])
        torch.testing.assert_close(kernel.product(both, scaled), 2 * x @ weight, rtol=1e-4, atol=1e-4)
        unpacked = kernel.unpack(matrix, torch.bfloat16)
        assert torch.equal(unpacked, layer.factors(torch.bfloat16)[1]), (shape, codec, support, dictionary)


@pytest.mark.parametrize("choice", ["auto", "avx2"])
def test_the_kernel_reads_nothing_behind_a_tensor(choice):
    compiled(choice)
    done = subprocess.run(
        [sys.executable, "-c", f"import test_runtime; test_runtime.compute_before_walls({choice!r})"],
        cwd=Path(__file__).parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_a_support_that_does_not_fit_the_values_is_an_error():
    compiled("auto")
    layer, _ = make()
    layer(torch.randn(1, 48))
    with torch.no_grad():
        layer.support[0, 0] = 1
    with pytest.raises(ValueError, match=r"positions for .* values: the file is damaged"):
        layer(torch.randn(1, 48))


def damage(layer, change) -> tuple[dict, list[torch.Tensor | None]]:
    """A layer's spec and packed tensors after `change` was made to copies of them."""
    spec = copy.deepcopy(layer.spec)
    tensors = {name: part.detach().clone() for name, part in zip(PARTS, layer.parts(), strict=True) if part is not None}
    change(spec, tensors)
    return spec, [tensors.get(name) for name in PARTS]


def spec_of(part: str, **values):
    return lambda spec, tensors: spec[part].update(values)


def bits(value: int, column: int = -1):
    return lambda spec, tensors: tensors["support"][:, column].fill_(value)


def tensor(name: str, new):
    return lambda spec, tensors: tensors.update({name: new(tensors[name])})


DAMAGED = [
    ({"codec": "int8"}, spec_of("codes", n_scales=1), r"scales is .* where its spec says"),
    ({"codec": "int8"}, tensor("scales", lambda t: t[:-1]), r"scales is .* where its spec says"),
    (
        {"codec": "int8"},
        lambda spec, tensors: (spec["codes"].update(n_scales=1), tensors.update(scales=tensors["scales"][:1])),
        r"groups of 16 values for 1 scales",
    ),
    ({"codec": "int8"}, spec_of("codes", group_size=1), r"groups of 1 values for \d+ scales"),
    *[
        ({"codec": "int4"}, spec_of("codes", group_size=size), r"codes.group_size is .*, not a whole number from 1 on")
        for size in (0, -1, True, 2.0)
    ],
    *[
        (
            {"dictionary": "int8"},
            spec_of("dictionary", group_size=size),
            r"dictionary.group_size is|dictionary_scales is",
        )
        for size in (0, -(2**63), 1, "16")
    ],
    ({}, spec_of("dictionary", n_atoms=4096), r"dictionary is .* where its spec says"),
    ({}, spec_of("dictionary", n_atoms=0), r"n_atoms is 0"),
    ({}, spec_of("codes", n_nonzero=-1), r"n_nonzero is -1"),
    ({"support": "dense"}, spec_of("codes", n_nonzero=3), r"n_nonzero is 3 where all"),
    ({}, tensor("dictionary", lambda t: t.to(torch.float16)), r"dictionary is .*float16.* its spec says .*bfloat16"),
    ({}, tensor("values", lambda t: t.view(torch.int16)), r"values is .*int16.* its spec says"),
    ({}, lambda spec, tensors: tensors.pop("support"), r"support is absent"),
    ({}, bits(0xFF), r"row 0 of the support is no bitmask of 27 atoms"),
    *[
        ({"shape": (20, 8, 20), "support": "2:4", "dictionary": "identity"}, bits(value, column), r"row 0 .* is no 2:4")
        for value, column in ((0x44, -1), (0x54, 0), (0x04, 0), (0x41, 0), (0xAA, 1))
    ],
]


@pytest.mark.parametrize(("kind", "change", "message"), DAMAGED)
def test_the_kernel_binds_nothing_that_it_would_read_behind(kind, change, message):
    kernel = compiled("auto")
    layer, _ = make(**kind)
    cospadi_products.bind(kernel, layer.spec, layer.parts())
    with pytest.raises(ValueError, match=message):
        cospadi_products.bind(kernel, *damage(layer, change))


def test_an_input_of_another_width_is_an_error():
    layer, _ = make()
    kernel = compiled("auto")
    matrix = cospadi_products.bind(kernel, layer.spec, layer.parts())
    with pytest.raises(ValueError, match="does not fit"):
        kernel.product(BoundSum([matrix]), torch.zeros(1, 40))
    other, _ = make((40, 40, 27))
    with pytest.raises(ValueError, match=r"2 matrices of shapes \[\(40, 40\), \(48, 40\)\] are no sum"):
        BoundSum([matrix, cospadi_products.bind(kernel, other.spec, other.parts())])


@pytest.fixture
def undecided():
    """`kernel` as in a new process, before and after."""
    cospadi_cpu._kernel.cache_clear()
    yield
    cospadi_linear.set_kernels(cpu="auto", cuda="auto")
    cospadi_cpu._kernel.cache_clear()


def test_without_a_compiler_plain_torch_computes_and_the_log_says_why(undecided, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler, reason in (("no-such-compiler", "no C compiler was found"), ("false", "/.*false failed: 1")):
        cospadi_cpu._kernel.cache_clear()
        monkeypatch.setenv("CC", compiler)
        caplog.clear()
        with caplog.at_level(logging.INFO, "cospadi.runtime"):
            layer, weight = make()
            x = torch.randn(2, 48)
            torch.testing.assert_close(layer(x), x @ weight, rtol=1e-5, atol=1e-5)
            layer(x)
        assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
        assert re.search(f"plain torch operations, which are slower, because {reason}", caplog.text)


def test_kernels_are_chosen_for_all_layers_also_for_compiled_ones(undecided, monkeypatch):
    used = []
    product = Kernel.product
    monkeypatch.setattr(Kernel, "product", lambda self, *given: used.append(self.kind) or product(self, *given))
    monkeypatch.setattr(Kernel, "layer", lambda *given: None)  # whose calls Python does not see
    layer, weight = make()
    torch._dynamo.reset()
    graphs = []
    compiled_layer = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    x = torch.randn(2, 48)
    best = compiled("auto").kind
    for choice, kind in (("auto", best), ("generic", "generic"), ("torch", None), ("generic", "generic")):
        cospadi_linear.set_kernels(cpu=choice)
        for each in (layer, compiled_layer):
            used.clear()
            torch.testing.assert_close(each(x), x @ weight, rtol=1e-5, atol=1e-5)
            assert used == ([kind] if kind else [])
    assert len(graphs) == 1, "the compiled layer was not compiled again"


def test_a_choice_of_kernels_that_is_not_there_leaves_what_was_chosen(undecided, monkeypatch):
    cospadi_linear.set_kernels(cpu="torch", cuda="torch")
    with pytest.raises(ValueError, match="cpu is 'fast'; allowed: auto, avx2, generic, torch"):
        cospadi_linear.set_kernels(cpu="fast")
    with pytest.raises(ValueError, match="cuda is 'avx2'; allowed: auto, torch"):
        cospadi_linear.set_kernels(cpu="auto", cuda="avx2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX")
    with pytest.raises(ValueError, match="cpu is 'avx2', which this processor does not have"):
        cospadi_linear.set_kernels(cpu="avx2", cuda="auto")
    assert cospadi_cpu.kernel() is None
    assert not cospadi_cuda.has_kernels(torch.device("cuda"))


_STUB = """
const char *cospadi_kind(void) { return "generic"; }
long long cospadi_starts(void) { return 0; }
long long cospadi_bench(void) { return 0; }
void cospadi_product(void) {} void cospadi_many(void) {} void cospadi_unpack(void) {} void cospadi_forget(void) {}
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Empty folder of compiled kernels, which take no time to compile."""
    monkeypatch.setattr(cospadi_cpu, "SOURCE", _STUB)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cospadi"


def compilations(monkeypatch) -> list[list[str]]:
    """Commands that are run from now on."""
    commands, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: commands.append(command) or run(command, **kwargs))
    return commands


def test_the_kernel_is_compiled_once_and_found_again(monkeypatch, cache):
    previous = os.umask(0o002)  # what a group may write is nobody's own
    try:
        Kernel(cospadi_cpu._load("generic"))
    finally:
        os.umask(previous)
    assert sorted(path.suffix for path in cache.iterdir()) == [".sha256", ".so"]
    assert not any(path.stat().st_mode & 0o022 for path in (cache, *cache.iterdir()))
    monkeypatch.setattr(subprocess, "run", None)
    assert Kernel(cospadi_cpu._load("generic")).kind == "generic"


@pytest.mark.parametrize(
    "harm",
    [
        lambda library: os.truncate(library, 0),
        lambda library: os.truncate(library, library.stat().st_size // 2),
        lambda library: library.write_bytes(library.read_bytes()[:-1] + b"!"),
        lambda library: library.with_suffix(".sha256").unlink(),
        lambda library: library.with_suffix(".sha256").write_bytes(b"\xff\xfe"),
        lambda library: library.chmod(0o775),
        lambda library: library.with_suffix(".sha256").chmod(0o666),
        lambda library: (library.rename(library.with_name("other")), library.symlink_to(library.with_name("other"))),
        lambda library: (library.unlink(), library.mkdir()),
    ],
    ids=["empty", "cut", "changed", "no digest", "no text", "group", "digest of all", "link", "folder"],
)
def test_a_damaged_kernel_is_compiled_anew(monkeypatch, cache, harm):
    cospadi_cpu._load("generic")
    (library,) = cache.glob("*.so")
    shutil.copy2(library, cache / "in use")  # the loaded one keeps its own bytes
    os.replace(cache / "in use", library)
    harm(library)
    commands = compilations(monkeypatch)
    assert Kernel(cospadi_cpu._load("generic")).kind == "generic"
    assert len(commands) >= 1
    if library.is_file():
        monkeypatch.setattr(subprocess, "run", None)
        assert Kernel(cospadi_cpu._load("generic")).kind == "generic", "and kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_kernel_of_somebody_else_is_not_loaded(monkeypatch, cache):
    cospadi_cpu._load("generic")
    (library,) = cache.glob("*.so")
    for foreign in (library, library.with_suffix(".sha256")):
        os.chown(foreign, 12345, 12345)
        commands = compilations(monkeypatch)
        cospadi_cpu._load("generic")
        assert len(commands) == 1 and foreign.stat().st_uid == 0
    os.chown(cache, 12345, 12345)
    before = library.stat()
    commands = compilations(monkeypatch)
    assert Kernel(cospadi_cpu._load("generic")).kind == "generic"
    assert len(commands) == 1 and library.stat() == before, "compiled for this process alone"


def test_without_a_home_the_kernel_is_compiled_for_the_process(monkeypatch, cache):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert Kernel(cospadi_cpu._load("generic")).kind == "generic"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(monkeypatch, cache):
    cache.parent.joinpath("cospadi").write_text("a file where the folder would be")
    assert Kernel(cospadi_cpu._load("generic")).kind == "generic"
    cache.unlink()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    assert Kernel(cospadi_cpu._load("generic")).kind == "generic"
    assert list(cache.iterdir()) == []


def test_the_compiler_may_have_flags(monkeypatch, cache):
    default = cospadi_compiler.compiler()
    monkeypatch.setenv("CC", f"{default[0]} -g '-DNAME=a b'")
    commands = compilations(monkeypatch)
    assert Kernel(cospadi_cpu._load("generic")).kind == "generic"
    assert commands[0][:3] == [*default, "-g", "-DNAME=a b"]
    monkeypatch.setenv("CC", "gcc 'unclosed")
    with pytest.raises(OSError, match=r"CC is .* which is no command: No closing quotation"):
        cospadi_cpu._load("generic")


def test_casting_moves_the_bias_and_leaves_the_packed_tensors():
    layer, _ = make(bias=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for cast in (lambda m: m.to(torch.float16), lambda m: m.float(), lambda m: m.double(), lambda m: m.to("cpu")):
        cast(layer)
        for part in ("dictionary", "values", "support"):
            assert getattr(layer, part).dtype == before[part].dtype
            assert torch.equal(getattr(layer, part).view(torch.uint8), before[part].view(torch.uint8))
        assert not layer.dictionary.requires_grad
    assert layer.bias.dtype == torch.float64
    meta = copy.deepcopy(layer).to("meta")
    assert meta.dictionary.is_meta and meta.dictionary.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("rows", [2, 20])
def test_parameters_that_a_tool_cast_in_place_are_read_as_what_they_are(machine, rows, dtype):
    for codec, support, dictionary in [*KINDS, *OTHERS]:
        layer, weight = make(codec=codec, support=support, dictionary=dictionary)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        x = torch.randn(rows, weight.shape[0], generator=torch.Generator().manual_seed(rows))
        expected = x.double() @ weight.double()
        size = x.double().abs() @ weight.double().abs() + 1
        layer(x)  # the kernel has seen the tensors as they were
        for which in (lambda p: p.dtype == torch.bfloat16, lambda p: True):
            for parameter in layer.parameters():
                if which(parameter):
                    parameter.data = parameter.data.to(dtype)
            # float16 rounds what is below its normal numbers, and nothing else of bfloat16
            bound = 1e-3 if dtype == torch.float16 else 1e-5
            assert ((layer(x).double() - expected).abs() / size).max() < bound, (codec, support, dictionary, dtype)
            called = cospadi_products.packed_linear(x, *layer.parts(), layer._spec_text)
            assert ((called.double() - expected).abs() / size).max() < bound
        saved = layer.state_dict()
        assert {name: tensor.dtype for name, tensor in saved.items()} == {n: t.dtype for n, t in before.items()}
        assert all(part is None or part.dtype == kept for part, kept in zip(layer.parts(), layer._dtypes, strict=True))
        if dtype != torch.float16:
            assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_tensors_on_another_device_or_of_another_width_are_an_error():
    layer, _ = make()
    with pytest.raises(RuntimeError):
        copy.deepcopy(layer).to("meta")(torch.randn(1, 48)).sum().item()
    for x in (torch.randn(1, 5), torch.randn(1, 5, requires_grad=True), torch.randn(1, 96, requires_grad=True)):
        with pytest.raises((RuntimeError, ValueError), match="shape"):
            layer(x)


@pytest.mark.parametrize("rows", [3, 20])
def test_recorded_and_transformed_products_are_right(rows):
    layer, weight = make(bias=True)
    example, x = torch.randn(rows, 48), torch.randn(rows, 48)
    layer(x)
    bias = layer.bias.detach()
    recorded = {
        "jit.trace": lambda: torch.jit.trace(layer, (example,)),
        "make_fx": lambda: make_fx(layer)(example),
        "make_fx with fake tensors": lambda: make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(example),
        "symbolic_trace": lambda: torch.fx.symbolic_trace(layer),
        "export": lambda: torch.export.export(layer, (example,)).module(),
        "vmap": lambda: torch.vmap(layer),
    }
    for name, record in recorded.items():
        made = record()
        torch.testing.assert_close(made(x).detach(), x @ weight + bias, rtol=1e-5, atol=1e-5, msg=name)
        graph = getattr(made, "graph", "packed_linear")
        assert "packed_linear" in str(graph), f"{name} recorded something else than the operator"
    gradient = torch.func.grad(lambda t: layer(t).sum())(x)
    torch.testing.assert_close(gradient, torch.ones(rows, 40) @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.func.jvp(layer, (x,), (example,))[1].detach(), example @ weight, rtol=1e-5, atol=1e-5
    )
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, example))).tangent
    torch.testing.assert_close(tangent.detach(), example @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "record", [torch.jit.trace, torch.export.export, functools.partial(torch.export.export, strict=True)]
)
def test_onnx_is_refused_with_what_to_do(record, monkeypatch):
    """However an exporter records the model; unpacked there is nothing to refuse."""
    layer, weight = make()
    model = torch.nn.Sequential(layer)
    x = torch.randn(20, 48)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(Exception, match=r"call unpack_\(model\) first, or export a dense folder \(.*densify\)"):
        record(model, (x,))
    made = record(unpack_(model, torch.float32), (x,))
    made = made if isinstance(made, torch.nn.Module) else made.module()
    torch.testing.assert_close(made(x).detach(), x @ weight, rtol=1e-5, atol=1e-5)


def test_gradient_reaches_the_input_and_the_bias():
    layer, weight = make(bias=True)
    x = torch.randn(4, 48, requires_grad=True)
    layer(x).square().sum().backward()
    reference = x.detach().clone().requires_grad_()
    (reference @ weight + layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-4)
    assert layer.bias.grad is not None and layer.dictionary.grad is None


@pytest.mark.parametrize(("codec", "support", "dictionary"), [*KINDS, *OTHERS[:3]])
def test_compiles_without_a_graph_break(codec, support, dictionary):
    layer, weight = make(codec=codec, support=support, dictionary=dictionary)
    torch._dynamo.reset()
    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (3, FEW + 3):
        x = torch.randn(rows, weight.shape[0])
        torch.testing.assert_close(compiled_layer(x), layer(x), rtol=1e-5, atol=1e-5)


def test_the_operator_passes_the_checks_of_torch():
    for codec, dictionary in (("bf16", "bf16"), ("int8", "int4"), ("int4", "identity")):
        layer, _ = make(codec=codec, dictionary=dictionary)
        x = torch.randn(3, 48, requires_grad=True)
        torch.library.opcheck(cospadi_products.packed_linear, (x, *layer.parts(), layer._spec_text))


def readers():
    """Two layers with one dictionary, and their weights."""
    (first, first_weight), (second, _) = make((48, 40, 27)), make((48, 24, 27), seed=1)
    second.dictionary = first.dictionary
    first.projection = second.projection = SharedProjection()
    return [first, second], [first_weight, second.factors(torch.float32)[0] @ second.factors(torch.float32)[1].T]


def ask(layers, weights, x):
    for layer, weight in zip(layers, weights, strict=True):
        torch.testing.assert_close(layer(x), x @ weight, rtol=1e-5, atol=1e-5)


def test_layers_with_one_dictionary_project_many_rows_once(monkeypatch):
    layers, weights = readers()
    project, calls = cospadi_linear.project_many, []
    monkeypatch.setattr(cospadi_linear, "project_many", lambda *given: calls.append(1) or project(*given))
    x = torch.randn(20, 48)
    ask(layers, weights, x)
    assert len(calls) == 1
    x.mul_(2)  # the same tensor, but no longer the same input
    ask(layers[1:], weights[1:], x)
    assert len(calls) == 2
    del x
    assert layers[0].projection._last is None, "nothing outlives the input"
    with torch.inference_mode():
        x = torch.randn(20, 48)
        ask(layers, weights, x)
        assert len(calls) == 3
        x.mul_(2)
        ask(layers[1:], weights[1:], x)
    copied = pickle.loads(pickle.dumps(torch.nn.ModuleList(layers)))
    assert copied[0].projection is copied[1].projection is not None


def test_layers_of_single_weights_turn_an_input_once(machine, monkeypatch):
    layers, weights = zip(*(make((48, d_out, 0), dictionary="identity", seed=d_out) for d_out in (40, 24)), strict=True)
    project, calls = cospadi_linear.project_many, []
    monkeypatch.setattr(cospadi_linear, "project_many", lambda *given: calls.append(1) or project(*given))
    x = torch.randn(20, 48)
    for n in (1, 2):
        ask(layers, weights, x)
        if machine != "torch":
            assert len(calls) == (n if cospadi_products.kernel().paths.without_zeros else 2 * n)
        x.mul_(2)
    del x
    assert cospadi_products.INPUTS._last is None, "nothing outlives the input"
    ask(layers, weights, torch.randn(20, 48))
    ask(layers, weights, torch.randn(30, 48).bfloat16().float())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("as_function", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_with_one_dictionary_project_a_few_rows_once(monkeypatch, mode, as_function, rows):
    kernel = compiled("auto")
    if as_function and kernel._layer is None:
        pytest.skip("no headers of Python were found")
    kernel = copy.copy(kernel)
    kernel._layer = kernel._layer if as_function else None
    monkeypatch.setattr(cospadi_products, "kernel", lambda: kernel)
    layers, weights = readers()
    with mode():
        for _ in range(3):
            ask(layers, weights, torch.randn(rows, 48))
        assert (layers[0]._call is not None) == as_function
        x = torch.randn(rows, 48)
        kept = layers[0].dictionary.data.clone()
        ask(layers[:1], weights[:1], x)
        layers[0].dictionary.data.zero_()  # which nothing counts, so it shows who reads the dictionary
        ask(layers[1:], weights[1:], x.clone())
        assert not layers[0](x).any(), "a layer is not given the same z twice"
        assert not layers[1](x).any()
        layers[0].dictionary.data.copy_(kept)
        ask(layers, weights, x)
        x.mul_(2)
        ask(layers[1:], weights[1:], x)
        ask(layers, weights, x.clone().reshape(1, rows, 48))


def test_a_changed_dictionary_is_not_mixed_with_what_was_computed_before():
    layers, weights = readers()
    x = torch.randn(2, 48)
    for _ in range(2):
        ask(layers, weights, x)
    ask(layers[:1], weights[:1], x)
    with torch.no_grad():
        layers[0].dictionary.mul_(2)
    ask(layers[1:], [2 * weights[1]], x)
    ask(layers[:1], [2 * weights[0]], x)


def make_sum(kinds, shape=(96, 132, 60), bias=False):
    """A layer that is a sum of matrices of these kinds, and its weight."""
    tensors, specs = {}, []
    for i, (codec, support, dictionary) in enumerate(kinds):
        name = "m" if i == 0 else f"m.plus.{i - 1}"
        more, spec = random_matrix(np.random.default_rng(i), *shape, codec, support, dictionary, name)
        tensors |= more
        specs.append(spec)
    spec = specs[0] | {"plus": specs[1:]}
    layer = packed_module(spec, torch.nn.Parameter(torch.randn(shape[1])) if bias else None)
    for name, array in tensors.items():
        stored = torch.from_numpy(array.view(np.int16) if array.dtype == BFLOAT16 else array.copy())
        part = layer.get_parameter(name.removeprefix("m."))
        part.data = stored.view(part.dtype)
    return layer.requires_grad_(False), torch.from_numpy(read_matrix(tensors, "m", spec))


SUM = [("bf16", "bitmask", "identity"), ("bf16", "bitmask", "bf16"), ("int8", "dense", "int4"), ("bf14", "2:4", "bf14")]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 7, FEW + 1, 70])
@pytest.mark.parametrize("kinds", [SUM, SUM[:2], SUM[1::-1]], ids=["four", "identity first", "identity last"])
def test_a_sum_is_rounded_once(machine, monkeypatch, threads, rows, kinds):
    layer, weight = make_sum(kinds, bias=True)
    if machine != "torch":
        kernel = copy.copy(compiled(machine))
        kernel._threads = lambda total: threads if kernel.parallel else 1
        kernel._layer = None
        monkeypatch.setattr(cospadi_products, "kernel", lambda: kernel)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
    expected = x.double() @ weight.double() + layer.bias.double()
    size = x.double().abs() @ weight.double().abs() + 1
    y = layer(x)
    assert ((y.double() - expected).abs() / size).max() < 1e-5
    assert torch.equal(y, layer(x)), "equal calls give equal bits"
    layer.register_parameter("bias", None)
    exact = x.bfloat16().double() @ weight.double()
    in_float32 = product_dtype(torch.bfloat16) == torch.float32
    if machine != "torch" and (rows <= kernel.paths.few_rows or (in_float32 and kernel.paths.without_zeros)):
        error = (layer(x.bfloat16()).double() - exact).square().mean().sqrt()
        assert error <= 1.01 * (exact.bfloat16().double() - exact).square().mean().sqrt()


def test_parts_of_a_sum_are_computed_alone_where_that_is_seen():
    layer, weight = make_sum(SUM)
    x = torch.randn(2, 96)
    for _ in range(2):
        torch.testing.assert_close(layer(x), x @ weight, rtol=1e-4, atol=1e-4)
    seen = []
    hook = layer.plus[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(layer(x), x @ weight, rtol=1e-4, atol=1e-4)
    hook.remove()
    atoms, codes = layer.plus[1].factors(torch.float32)
    torch.testing.assert_close(seen, [x @ atoms @ codes.T], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.plus[0].values.mul_(2)
    atoms, codes = layer.plus[0].factors(torch.float32)
    torch.testing.assert_close(layer(x), x @ weight + x @ atoms @ codes.T / 2, rtol=1e-4, atol=1e-4)
    layer.plus[0].unpack(torch.float32)
    layer.plus[0].unpacked_codes.data.zero_()
    torch.testing.assert_close(layer(x), x @ weight - x @ atoms @ codes.T / 2, rtol=1e-4, atol=1e-4)


def test_inputs_are_scaled_in_sums_and_where_a_layer_is_a_function(machine):
    scaled = ("int4", "dense", "diagonal")
    for layer, weight in (
        make_sum([scaled, SUM[1]]),
        make_sum([SUM[1], scaled, SUM[0]]),
        make(codec="int4", support="dense", dictionary="diagonal"),
    ):
        for rows in (1, 2, FEW + 1):
            for _ in range(3):  # from the second on by a function in C
                x = torch.randn(rows, len(weight))
                size = x.abs() @ weight.abs() + 1
                assert ((layer(x) - x @ weight).abs() / size).max() < 1e-5
    with pytest.raises((ValueError, RuntimeError), match="48"):
        layer(torch.randn(2, 1))
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(x)
    assert seen[0] is x, "hooks see an input as it is"


@pytest.fixture
def called():
    """A layer that has become a function of its input, and its weight."""
    layer, weight = make()
    x = torch.randn(2, 48)
    layer(x)
    if layer._call is None:
        pytest.skip("no headers of Python were found")
    return layer, weight, lambda given: layer._call(given, vars(layer), True)


def test_the_function_of_a_layer_gives_what_the_kernel_gives(called):
    layer, _, call = called
    kernel = cospadi_products.kernel()
    for lead, dtype in itertools.product([(), (1,), (1, 1), (3,), (2, 2)], (torch.float32, torch.bfloat16)):
        x = torch.randn(*lead, 48, dtype=dtype)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                outputs = [call(x) for _ in range(3)]
                made = x.new_empty(0)
            y = kernel.product(layer._binding.total, x)
            for output in outputs:
                assert torch.equal(output, y) and output.dtype == dtype and output.is_contiguous()
                assert output.is_inference() == made.is_inference() and not output.requires_grad
            assert len({output.data_ptr() for output in outputs}) == len(outputs), "nobody else's memory"
    kept = call(x)
    before = kept.clone()
    for _ in range(3):
        call(torch.randn_like(x)).zero_()
    assert torch.equal(kept, before)


def test_the_function_of_a_layer_leaves_to_torch_what_it_cannot_do(called):
    layer, _, call = called
    x = torch.randn(2, 48)
    few = cospadi_products.kernel().paths.few_rows
    others = [
        torch.randn(few + 1, 48), torch.randn(0, 48), torch.randn(2, 96)[:, ::2], torch.randn(48, 2).T, x.double(),
        x.half(), x.to("meta"), torch.randn(2, 40), torch.tensor(1.0), x.to_sparse(), torch.nn.Parameter(x), None,
        x.detach().requires_grad_(),
    ]  # fmt: skip
    assert [call(other) for other in others] == [None] * len(others)
    with torch.no_grad():
        assert call(others[-1]) is not None, "nobody asks for a gradient"
    answers = []
    torch.vmap(lambda t: answers.append(call(t)) or t)(x)
    torch.func.grad(lambda t: answers.append(call(t)) or t.sum())(x)
    torch.func.jvp(lambda t: answers.append(call(t)) or t, (x,), (x,))
    make_fx(lambda t: answers.append(call(t)) or t)(x)
    torch.jit.trace(lambda t: answers.append(call(t)) or t, (x,), check_trace=False)
    with forward_ad.dual_level():
        answers.append(call(forward_ad.make_dual(x, x)))
    with FlopCounterMode(display=False):
        answers.append(call(x))
    assert len(answers) >= 7 and not any(answer is not None for answer in answers)
    assert layer._call(x, vars(layer) | {"_parameters": {**layer._parameters}}, True) is None, (
        "a copy of the layer has another dictionary"
    )
    cospadi_linear.set_kernels(cpu="generic")
    assert call(x) is None, "other code was chosen"
    cospadi_linear.set_kernels(cpu="".join(["au", "to"]))
    assert call(x) is not None


def test_whoever_watches_the_calls_of_a_layer_sees_them(called):
    layer, weight, _ = called
    x = torch.randn(2, 48)
    seen = []

    def check(n_seen, undo):
        torch.testing.assert_close(layer(x), x @ weight, rtol=1e-5, atol=1e-5)
        assert len(seen) == n_seen
        undo()
        layer(x)
        assert len(seen) == n_seen
        seen.clear()

    def watch(*given, **named):
        seen.append(1)

    check(0, lambda: None)
    everyone = torch.nn.modules.module
    check(1, layer.register_forward_hook(watch).remove)
    check(1, layer.register_forward_pre_hook(watch).remove)
    check(1, layer.register_forward_hook(watch, with_kwargs=True, always_call=True).remove)
    check(1, everyone.register_module_forward_hook(watch).remove)
    check(1, everyone.register_module_forward_pre_hook(watch).remove)
    forward = layer.forward
    layer.forward = lambda given: watch() or forward(given)  # as accelerate does
    check(1, lambda: delattr(layer, "forward"))
    layer._compiled_call_impl = lambda given: watch() or forward(given)
    check(1, lambda: delattr(layer, "_compiled_call_impl"))
    torch.testing.assert_close(layer(x=x), x @ weight, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError):
        layer(x, x)
    hook = layer.register_full_backward_hook(watch)
    given = x.clone().requires_grad_()
    layer(given).sum().backward()
    assert seen == [1]
    hook.remove()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.values, "data", layer.values.data.clone()),
        lambda layer: setattr(layer.support, "data", layer.support.data.view(torch.int8)),
        lambda layer: setattr(layer.dictionary, "data", layer.dictionary.data.float()),
        lambda layer: setattr(layer, "values", torch.nn.Parameter(layer.values.data, requires_grad=False)),
        lambda layer: layer.values.detach().mul_(1),
        lambda layer: setattr(layer, "bias", torch.nn.Parameter(torch.zeros(40))),
        lambda layer: layer.unpack(torch.float32),
        lambda layer: layer.register_parameter("adapted", torch.nn.Parameter(torch.zeros(1))),
        lambda layer: layer._parameters.pop("bias"),
    ],
    ids=["moved", "viewed", "cast", "replaced", "changed", "bias", "unpacked", "more", "fewer"],
)
def test_the_function_of_a_layer_ends_with_a_change_of_its_parameters(called, change):
    layer, weight, call = called
    x = torch.randn(2, 48)
    assert call(x) is not None
    change(layer)
    assert call(x) is None
    layer._parameters.setdefault("bias", None)
    torch.testing.assert_close(layer(x), x @ weight, rtol=1e-5, atol=1e-5)


def test_the_function_of_a_layer_keeps_nothing_alive_and_is_not_copied(called):
    layer, weight, _ = called
    summed, _ = make_sum(SUM)
    summed(torch.randn(2, 96))
    summed.plus[0].register_forward_hook(lambda *given, summed=summed: None)  # a circle through its function
    copied = pickle.loads(pickle.dumps(layer))
    assert copied._call is None and copy.deepcopy(layer)._call is None
    x = torch.randn(2, 48)
    torch.testing.assert_close(copied(x), x @ weight, rtol=1e-5, atol=1e-5)
    gone = [weakref.ref(layer.values), weakref.ref(summed)]
    layer._parameters.clear()
    layer._binding = layer._call = None
    del summed, copied
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_two_threads_compute_with_a_layer_at_a_time(monkeypatch):
    monkeypatch.setattr(cospadi_cpu, "_BYTES_UNSEEN", 0)  # so that they do run at a time
    layers, weights = readers()
    given = [torch.randn(rows, 48) for rows in (1, 2, 3, 1)]

    def compute(x):
        for _ in range(300):
            ask(layers, weights, x)

    with concurrent.futures.ThreadPoolExecutor(len(given)) as pool:
        assert list(pool.map(compute, given)) == [None] * len(given)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("rows", [1, 5, FEW, FEW + 1])
def test_a_dense_layer_of_a_packed_model_is_multiplied_by_the_kernel(monkeypatch, rows, native):
    kernel = copy.copy(compiled("auto"))
    if kernel._layer is None:
        pytest.skip("no headers of Python were found")
    kernel.paths = PATHS["avx512" if native else "avx2"]
    monkeypatch.setattr(cospadi_products, "kernel", lambda: kernel)
    monkeypatch.setattr(cospadi_cpu, "bfloat16_is_native", lambda: native)
    layer = DenseLinear(48, 40, bias=False, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 48).bfloat16()
    by_kernel = rows <= (1 if native else kernel.paths.few_rows)

    def check(taken):
        exact = x.double() @ layer.weight.double().T
        size = x.double().abs() @ layer.weight.double().abs().T
        y = layer(x)
        assert y.dtype == layer.weight.dtype and y.shape == exact.shape
        rounding = 2**-8 * exact.abs() if y.dtype == torch.bfloat16 else 0
        assert ((y.double() - exact).abs() <= 1e-5 * size + rounding).all()
        assert torch.equal(y, layer(x)), "equal calls give equal bits"
        answer = layer._call and layer._call(x, vars(layer), True)
        assert answer is None if not taken else torch.equal(answer, y)

    with torch.no_grad():
        check(by_kernel)
        layer.weight.mul_(2)
        check(by_kernel)
        layer.weight = torch.nn.Parameter(layer.weight.flip(0))
        check(by_kernel)
        copied = pickle.loads(pickle.dumps(layer))
        assert copied._call is None and torch.equal(copied(x), layer(x))
        layer.float()
        assert layer._call is None, "nothing keeps the weight as it was"
        x = x.float()
        check(False)
        layer.bfloat16()
        x = x.bfloat16()
        with torch.autocast("cpu", torch.float16):
            assert layer(x).dtype == torch.float16
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), rtol=1e-2, atol=1e-2
        )


def test_a_decoded_stream_is_multiplied_by_the_kernel_as_a_dense_layer_is(monkeypatch):
    kernel = copy.copy(compiled("auto"))
    if kernel._layer is None:
        pytest.skip("no headers of Python were found")
    kernel.paths = PATHS["avx2"]
    monkeypatch.setattr(cospadi_products, "kernel", lambda: kernel)
    monkeypatch.setattr(cospadi_cpu, "bfloat16_is_native", lambda: False)
    codes = torch.randint(-7, 8, (48, 40)).float()
    exact = Factorization(None, codes.numpy(), support="dense", value_codec="ec", scales=np.full(48, 0.5, np.float32))
    tensors, spec = exact.pack("matrix")
    values = {"values": torch.from_numpy(tensors["matrix.values"].copy())}
    bias = torch.nn.Parameter(torch.randn(40).bfloat16())
    layer, x = PackedLinear(spec, bias, tensors=values), torch.randn(1, 2, 48).bfloat16()
    with torch.no_grad():
        layer.unpack(torch.bfloat16)
        product = x.double() @ codes.double()
        for factor in (1, 1, 2):
            if factor == 2:
                layer.unpacked_codes = torch.nn.Parameter(2 * layer.unpacked_codes)
            y = layer(x)
            expected = (factor * product).bfloat16() + bias
            torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-2)
            assert torch.equal(layer._call(x, vars(layer), True) + bias, y)
        many = torch.randn(FEW + 1, 48).bfloat16()
        torch.testing.assert_close(layer(many), (2 * many.float() @ codes).bfloat16() + bias, rtol=2**-6, atol=0.1)
        layer.float().unpack(torch.float32)
        torch.testing.assert_close(layer(x.float()), x.float() @ codes + bias)


@pytest.mark.parametrize("flags", [[], ["-DWITH_PYTHON", "-I/no/such/folder"]], ids=["none", "wrong"])
def test_without_headers_of_python_there_is_a_kernel(monkeypatch, cache, flags):
    monkeypatch.setattr(cospadi_cpu, "SOURCE", "#ifdef WITH_PYTHON\n#include <no_such_Python.h>\n#endif\n" + _STUB)
    monkeypatch.setattr(cospadi_cpu, "_python_flags", lambda: flags)
    kernel = Kernel(cospadi_cpu._load("generic"))
    assert kernel.kind == "generic" and kernel._layer is None
    assert kernel.layer(None, [], PARTS) is None


def test_changed_tensors_are_noticed():
    layer, weight = make()
    x = torch.randn(2, 48)
    torch.testing.assert_close(layer(x), x @ weight, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.support.copy_(layer.support.flip(0))  # other columns now start elsewhere
    torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=0, atol=0)
    for part in ("dictionary", "values"):
        setattr(layer, part, torch.nn.Parameter(getattr(layer, part).flip(0), requires_grad=False))
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=0, atol=0)
    atoms, codes = layer.factors(torch.float32)
    torch.testing.assert_close(layer(x), x @ atoms @ codes.T, rtol=1e-5, atol=1e-5)


def test_the_weight_that_is_not_there_has_a_shape_and_nothing_else():
    layer, _ = make()
    assert layer.weight.shape == (40, 48) and layer.weight.device == layer.values.device
    for use in (lambda w: w.data, torch.neg, lambda w: w.add_(1), torch.nn.init.zeros_, lambda w: w.clone()):
        with pytest.raises(TypeError, match="a packed linear has no dense weight"):
            use(layer.weight)


@pytest.mark.parametrize(
    ("codec", "support", "dictionary"), [kind for kind in (*KINDS, *OTHERS) if not REGISTERED[kind[0]].whole]
)
def test_storing_unpacked_factors_gives_the_same_bytes(codec, support, dictionary):
    layer, _ = make(codec=codec, support=support, dictionary=dictionary)
    atoms, codes = layer.factors(torch.float32)
    assert torch.equal(encode_codes(layer.spec, codes, layer.scales, layer.support, layer.values), layer.values)
    if atoms is not None:
        assert torch.equal(encode_dictionary(layer.spec, atoms, layer.dictionary_scales), layer.dictionary)


@pytest.mark.parametrize(("codec", "dictionary"), [("bf16", "bf16"), ("int8", "int8"), ("bf14", "identity")])
def test_unpacked_factors_can_be_trained_on_their_support(codec, dictionary):
    layer, weight = make(codec=codec, dictionary=dictionary)
    model = torch.nn.ModuleDict({"layer": layer})
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    target = x @ (weight + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))

    def loss():
        return (layer(x) - target).square().mean()

    before = float(loss())
    outside = ~decode_support(layer.spec, layer.support)
    unpack_(model, torch.float32, trainable=True)
    names = set(model.state_dict())
    assert names == {f"layer.{part}" for part in PARTS if getattr(layer, part) is not None}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert not layer.unpacked_codes[outside].any()
    trained = float(loss().detach())
    assert trained < 0.9 * before
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack_(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert float(loss()) < 0.5 * (trained + before), "what was trained is stored, rounded"
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_unpacked_layers_compute_the_same_and_pack_again():
    """Factors where they multiply less than a dense weight does, else the weight."""
    first, _ = make((48, 40, 12))
    second, _ = make((48, 40, 12), codec="bf14", seed=1)
    second.dictionary = first.dictionary
    second.projection = first.projection = SharedProjection()
    large, _ = make((48, 40, 64))
    model = torch.nn.ModuleDict({"first": first, "second": second, "large": large})
    x = torch.randn(20, 48)
    packed = [layer(x) for layer in model.values()]
    names = set(model.state_dict())
    unpack_(model, torch.float32)
    assert first.unpacked_dictionary is second.unpacked_dictionary
    assert torch.equal(first.unpacked_codes, decode_codes(first.spec, first.values, None, first.support, torch.float32))
    assert large.unpacked_codes is None and large.unpacked_weight.shape == (large.out_features, large.in_features)
    assert set(model.state_dict()) == names
    for inference in (True, False):
        with torch.inference_mode() if inference else torch.no_grad():
            inputs = x.clone()
            with FlopCounterMode(display=False) as counter:
                found = [layer(inputs) for layer in model.values()]
            # a counter watches: nothing is shared, so that it counts what is computed
            d_out = first.out_features
            assert counter.get_total_flops() == 2 * 20 * (2 * (48 * 12 + 12 * d_out) + 48 * d_out)
            assert torch.equal(found[1], model["second"](inputs))
        for layer, y, again in zip(model.values(), packed, found, strict=True):
            torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(layer(inputs), y, rtol=1e-5, atol=1e-5)
    pack_(model)
    assert all(layer.unpacked_codes is layer.unpacked_weight is None for layer in packed_layers(model).values())


def test_unpacked_layers_that_share_a_dictionary_project_once_and_never_with_old_numbers():
    first, _ = make((48, 40, 12))
    second, _ = make((48, 40, 12), seed=1)
    second.dictionary = first.dictionary
    second.projection = first.projection = SharedProjection()
    model = torch.nn.ModuleDict({"first": first, "second": second})
    unpack_(model, torch.float32)
    x = torch.randn(20, 48)
    expected = F.linear(x @ second.unpacked_dictionary, second.unpacked_codes)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            first(x)
            assert torch.equal(second(x), expected)
            asked = []
            second.projection.of(x, first.unpacked_dictionary.data_ptr(), asked.append, x)
            assert not asked, "z of this x is known"
            changed = x.clone()
            first(changed)
            changed.mul_(2)
            torch.testing.assert_close(second(changed), 2 * expected)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        first(leaf)
    second(leaf).sum().backward()
    weight = second.unpacked_codes @ second.unpacked_dictionary.T
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(20, 48))


def test_in_bfloat16_and_to_train_the_factors_stay():
    layer, _ = make((48, 40, 64))
    model = torch.nn.ModuleDict({"layer": layer})
    unpack_(model, torch.bfloat16)
    assert layer.unpacked_weight is None and layer.unpacked_codes.dtype == torch.bfloat16
    pack_(model)
    unpack_(model, torch.float32, trainable=True)
    assert layer.unpacked_weight is None and layer.unpacked_codes.requires_grad


@pytest.mark.parametrize(
    ("part", "key", "value"), [("codes", "codec", "int5"), ("codes", "support", "1:3"), ("dictionary", "codec", "fp8")]
)
def test_an_unknown_codec_is_refused_by_name(part, key, value):
    layer, _ = make()
    spec = copy.deepcopy(layer.spec)
    spec[part][key] = value
    with pytest.raises(ValueError, match=f"{value}.* is not known; this code reads"):
        PackedLinear(spec)


def test_a_codec_or_support_that_only_torch_knows_is_computed_by_torch(machine, monkeypatch):
    """As when a new codec has its decoder and no kernel yet."""
    monkeypatch.setitem(REGISTERED, "new8", REGISTERED["int8"])
    x = torch.randn(2, 48)
    for section in ("codes", "dictionary"):
        layer, weight = make(codec="int8", dictionary="int8")
        layer.spec[section]["codec"] = "new8"
        changed = PackedLinear(layer.spec)
        for part in PARTS:
            setattr(changed, part, getattr(layer, part))
        for rows in (x, torch.randn(40, 48)):
            torch.testing.assert_close(changed(rows), rows @ weight, rtol=1e-5, atol=1e-5)
            with_gradient = rows.clone().requires_grad_()  # by way of the operator
            torch.testing.assert_close(changed(with_gradient), rows @ weight, rtol=1e-5, atol=1e-5)
