"""Products with packed matrices on a GPU beside dense bfloat16 ones, at the shapes of Llama-3-8B.

``python benchmarks/runtime_gpu.py [--output FILE] [--measures NAME ...]``; a part of ``make bench-runtime``. First
every kind of matrix is checked against float64. Then decoding is timed as a serving loop runs it: a CUDA graph of
products with so many copies of the matrix that none is in the cache when its turn comes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from cospadi.budget import dense_nbytes, factors_nbytes, nbytes_left, sparse_shape
from cospadi.runtime import cospadi_cuda
from cospadi.runtime.cospadi_codecs import tensor_shapes
from cospadi.runtime.cospadi_linear import PackedLinear

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
RATIOS = (0.2, 0.4, 0.5)
PREFILL = 2048
GOAL = 0.85
ROTATED = 2**29  # bytes of all copies of a matrix, several times the cache
KINDS = [
    (codec, support, "bf16") for codec in ("bf16", "bf14", "int8", "int4") for support in ("bitmask", "2:4", "dense")
]
KINDS += [("bf16", "bitmask", dictionary) for dictionary in ("bf14", "int8", "int4", "identity")]
KINDS += [("trellis4", "dense", "bf16"), *((f"trellis{bits}", "dense", "identity") for bits in (4, 3, 2))]


def main() -> int:
    arguments = parse()
    records = measure(arguments.measures)
    if arguments.output and records:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", nargs="+", default=DEFAULT, choices=MEASURES)
    parser.add_argument("--output", type=Path, help="JSON lines")
    return parser.parse_args()


def measure(measures: Sequence[str]) -> list[dict[str, Any]]:
    """Print the tables of `measures` and return their records; one line where there is no GPU."""
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing of one is measured.")
        return []
    torch.set_grad_enabled(False)
    kind = "Triton" if cospadi_cuda.gpu_kernels() else "plain torch"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, kernels: {kind}\n", flush=True)
    return [record for name in measures for record in MEASURES[name]()]


def random_spec(d_in: int, d_out: int, k: int, s: int, codec: str, support: str, dictionary: str) -> dict[str, Any]:
    """Spec of a matrix with `s` stored codes a column."""
    s = {"dense": k, "2:4": k // 2}.get(support, s)
    codes = {"codec": codec, "support": support, "n_nonzero": s * d_out}
    if codec.startswith("int"):
        codes |= {"group_size": 64, "n_scales": d_out * -(-s // 64)}
    atoms: dict[str, Any] = {"codec": dictionary, "n_atoms": k}
    if dictionary != "identity":
        atoms["tensor"] = "m.dictionary"
    if dictionary.startswith("int"):
        atoms["group_size"] = 64
    return {"shape": [d_in, d_out], "dictionary": atoms, "codes": codes}


def random_layer(spec: dict[str, Any], *, ragged: bool = False, seed: int = 0) -> PackedLinear:
    """A layer on the GPU with random tensors; `ragged`: columns of all lengths, empty and full ones among them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    (d_in, d_out), k, codes = spec["shape"], spec["dictionary"]["n_atoms"], spec["codes"]
    stored: dict[str, torch.Tensor] = {}
    if codes["support"] == "bitmask":
        s = codes["n_nonzero"] // d_out
        lengths = torch.full((d_out, 1), s, device="cuda")
        if ragged:
            lengths = torch.randint(0, k + 1, (d_out, 1), generator=generator, device="cuda")
            lengths[0], lengths[-1] = 0, k
            codes["n_nonzero"] = int(lengths.sum())
            if "n_scales" in codes:
                codes["n_scales"] = int((-(-lengths // codes["group_size"])).sum())
        order = torch.rand(d_out, k, generator=generator, device="cuda").argsort(1).argsort(1)
        bits = F.pad(order < lengths, (0, -k % 8)).view(d_out, -1, 8)
        stored["support"] = (bits << torch.arange(8, device="cuda")).sum(2).to(torch.uint8)
        del order, bits
    elif codes["support"] == "2:4":
        pairs = torch.tensor([1 << 2 | 0, 2 << 2 | 0, 3 << 2 | 0, 2 << 2 | 1, 3 << 2 | 1, 3 << 2 | 2], device="cuda")
        drawn = pairs[torch.randint(0, 6, (d_out, k // 4), generator=generator, device="cuda")]
        drawn = F.pad(drawn, (0, k // 4 % 2))
        stored["support"] = (drawn[:, ::2] | drawn[:, 1::2] << 4).to(torch.uint8)
    for name, (shape, dtype) in tensor_shapes(spec).items():
        if name == "support":
            continue
        if dtype == torch.bfloat16:
            scale = {"dictionary": d_in**-0.5, "values": k**-0.5}.get(name, 2**-7)
            stored[name] = (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)
        elif name == "values" and codes["codec"].startswith("trellis"):
            stored[name] = random_trellis(shape[0], d_out, k, generator)
        elif "bf14" in (codes["codec"] if name == "values" else spec["dictionary"]["codec"]):
            stored[name] = random_bf14(shape[0], generator)
        else:
            stored[name] = torch.randint(
                -128 if dtype == torch.int8 else 0, 128, shape, generator=generator, device="cuda"
            ).to(dtype)
    layer = PackedLinear(spec, device="cuda")
    for name, tensor in stored.items():
        getattr(layer, name).data = tensor
    layer.freeze_packed()
    return layer


def random_bf14(nbytes: int, generator: torch.Generator) -> torch.Tensor:
    """A stream of small 14-bit numbers: neither infinite nor NaN."""
    n = 8 * nbytes // 14
    words = (torch.randn(n, generator=generator, device="cuda") / 8).bfloat16().view(torch.int16).long() >> 2 & 0x3FFF
    bits = (words[:, None] >> torch.arange(14, device="cuda")) & 1
    bits = F.pad(bits.flatten(), (0, 8 * nbytes - 14 * n)).view(-1, 8)
    return (bits << torch.arange(8, device="cuda")).sum(1).to(torch.uint8)


def random_trellis(nbytes: int, d_out: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Random bits, which are codes of a trellis whatever they are, under scales of either sign; no checksum."""
    stored = torch.randint(0, 256, (nbytes,), generator=generator, device="cuda", dtype=torch.uint8)
    scales = torch.randn(k + d_out, generator=generator, device="cuda")
    scales[:k] *= 4e-4 * k**-0.5  # a value is around 2500 large
    stored[-4 - 2 * len(scales) : -4] = scales.bfloat16().view(torch.uint8)
    return stored


def exact_weight(layer: PackedLinear) -> torch.Tensor:
    """The weight (d_in, d_out) in float64, by the plain operations."""
    atoms, codes = layer.factors(torch.float32)
    return codes.double().T if atoms is None else atoms.double() @ codes.double().T


def check() -> list[dict[str, Any]]:
    """Every kind of matrix against float64, and equal calls against each other."""
    worst: dict[str, float] = {}
    cases = [(kind, (576, 1536, 491), rows) for kind in KINDS for rows in (1, 3, 64)]
    cases += [
        (kind, shape, rows)
        for kind in (*KINDS[:2], ("trellis3", "dense", "bf16"))
        for shape in ((48, 40, 27), (1000, 264, 516))
        for rows in (1, 2, 8, 9)
    ]
    cases += [(kind, (2048, 268, 2048), rows) for kind in KINDS if kind[0][:-1] == "trellis" for rows in (1, 4, 8, 9)]
    for (codec, support, dictionary), (d_in, d_out, k), rows in cases:
        k = k // 4 * 4 if support == "2:4" else k
        k = d_in if dictionary == "identity" else k
        spec = random_spec(d_in, d_out, k, k // 2, codec, support, dictionary)
        layer = random_layer(spec, ragged=True)
        weight = exact_weight(layer)
        for dtype in (torch.bfloat16, torch.float32) if rows in (1, 64) else (torch.bfloat16,):
            x = torch.randn(rows, d_in, device="cuda").to(dtype)
            exact = x.double() @ weight
            packed = layer(x)
            error, dense = (float((y.double() - exact).norm() / exact.norm()) for y in (packed, x @ weight.to(dtype)))
            limit = 2 * dense + (1e-6 if dtype == torch.float32 else 0)
            name = f"{codec} {support} {dictionary}"
            worst[name] = max(worst.get(name, 0), error / limit)
            if not error <= limit:
                print(f"FAILED {name} {spec['shape']} rows {rows} {dtype}: error {error:.2e}, dense {dense:.2e}")
            if not all(torch.equal(packed, layer(x)) for _ in range(3)):
                print(f"FAILED {name} {spec['shape']} rows {rows} {dtype}: equal calls differ")
    bad = sum(share > 1 for share in worst.values())
    largest = max(worst.values())
    print(f"checked {len(worst)} kinds against float64: {bad} failed; largest error {largest:.2f} of what is allowed")
    return [{"measure": "check", "share_of_allowed_error": worst}]


def graph_time(steps: list[Callable[[], object]], *, repeats: int = 20) -> float:
    """Microseconds a step, in a captured graph of all of them; the median of some replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(steps))
    return sorted(times[3:])[repeats // 2]


def copies(layer: PackedLinear, n: int) -> list[PackedLinear]:
    """The layer and n - 1 others with the same numbers elsewhere in memory."""
    made = [layer]
    for _ in range(n - 1):
        other = PackedLinear(layer.spec, device="cuda")
        for part, tensor in zip(other.parts(), layer.parts(), strict=True):
            if part is not None:
                part.data = tensor.data.clone()
        made.append(other)
    return made


def sized(d_in: int, d_out: int, ratio: float, support: str) -> tuple[dict[str, Any], int]:
    """Spec of a matrix that meets `ratio`, and its bytes."""
    shape = sparse_shape(d_in, d_out, nbytes=nbytes_left([(d_in, d_out)], ratio), rho=2.0, support=support)
    k, s = shape.n_atoms, shape.n_nonzero_coefs
    nbytes = factors_nbytes(d_in, d_out, k, s * d_out, support=support, value_codec="bf16")
    return random_spec(d_in, d_out, k, s, "bf16", support, "bf16"), nbytes


def products(layers: list[PackedLinear], x: torch.Tensor) -> list[Callable[[], object]]:
    """What a layer computes, of every copy."""
    return [functools.partial(layer, x) for layer in layers]


def first_products(layers: list[PackedLinear], x: torch.Tensor) -> list[Callable[[], object]]:
    """``z = x D`` alone."""
    return [functools.partial(cospadi_cuda.project, layer.spec, layer.parts(), x) for layer in layers]


def second_products(layers: list[PackedLinear], x: torch.Tensor) -> list[Callable[[], object]]:
    """``y = z S`` alone."""
    return [
        functools.partial(cospadi_cuda.apply_codes, layer.spec, layer.parts(), step(), x.dtype)
        for layer, step in zip(layers, first_products(layers, x), strict=True)
    ]


def dense_products(d_in: int, d_out: int, n: int, x: torch.Tensor) -> list[Callable[[], object]]:
    """What a linear layer of n different weights computes."""
    return [functools.partial(F.linear, x, torch.randn(d_out, d_in, device="cuda").bfloat16()) for _ in range(n)]


def cases_of(d_in: int, d_out: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """What tells a matrix of the tables from the others, its spec and its bytes."""
    for ratio, support in itertools.product(RATIOS, ("bitmask", "2:4")):
        spec, nbytes = sized(d_in, d_out, ratio, support)
        n_atoms = spec["dictionary"]["n_atoms"]
        yield {"shape": [d_in, d_out], "ratio": ratio, "support": support, "n_atoms": n_atoms}, spec, nbytes
    for codec in ("trellis4", "trellis3"):
        spec = random_spec(d_in, d_out, d_in, d_in, codec, "dense", "identity")
        (nbytes,) = tensor_shapes(spec)["values"][0]
        ratio = 1 - nbytes / dense_nbytes(d_in, d_out)
        yield {"shape": [d_in, d_out], "ratio": ratio, "support": codec, "n_atoms": d_in}, spec, nbytes


def step_times(layers: list[PackedLinear], x: torch.Tensor, dense: float) -> dict[str, float]:
    """Microseconds of a packed product and of its two steps, beside `dense`."""
    packed = graph_time(products(layers, x))
    return {
        "dense_us": dense,
        "packed_us": packed,
        "first_us": 0.0 if layers[0].dictionary is None else graph_time(first_products(layers, x)),
        "second_us": graph_time(second_products(layers, x)),
        "speedup": dense / packed,
    }


def decode() -> list[dict[str, Any]]:
    """One row: packed beside dense, against the limit that the bytes set."""
    records = []
    for d_in, d_out in SHAPES:
        x = torch.randn(1, d_in, device="cuda").bfloat16()
        dense = graph_time(dense_products(d_in, d_out, max(4, ROTATED // dense_nbytes(d_in, d_out)), x))
        for case, spec, nbytes in cases_of(d_in, d_out):
            layers = copies(random_layer(spec), max(4, ROTATED // nbytes))
            record = {"measure": "decode", **case, **step_times(layers, x, dense)}
            limit = dense_nbytes(d_in, d_out) / nbytes
            records.append(
                {
                    **record,
                    "limit": limit,
                    "share_of_limit": record["speedup"] / limit,
                    "dense_tb_s": dense_nbytes(d_in, d_out) / dense / 1e6,
                    "packed_tb_s": nbytes / record["packed_us"] / 1e6,
                }
            )
    shown = ("shape", "ratio", "support", "n_atoms", "dense_us", "packed_us", "first_us", "second_us", "dense_tb_s")
    print(f"one row; the goal is {GOAL} of the limit by bytes")
    show(records, (*shown, "packed_tb_s", "speedup", "limit", "share_of_limit"))
    return records


def crossover() -> list[dict[str, Any]]:
    """Both paths by the rows of the input: where `KERNEL_ROWS` comes from."""
    records = []
    kept = cospadi_cuda.KERNEL_ROWS
    for (d_in, d_out), codec in itertools.product(((4096, 4096), (4096, 14336)), ("bf16", "trellis4")):
        spec, nbytes = sized(d_in, d_out, 0.4, "bitmask")
        if codec == "trellis4":
            spec = random_spec(d_in, d_out, d_in, d_in, codec, "dense", "identity")
        layers = copies(random_layer(spec), ROTATED // nbytes)
        for rows in (1, 2, 4, 8, 16):
            x = torch.randn(rows, d_in, device="cuda").bfloat16()
            record = {"measure": "crossover", "shape": [d_in, d_out], "codec": codec, "rows": rows}
            for name, few in (("kernel_us", 16), ("unpacked_us", 0)):
                cospadi_cuda.KERNEL_ROWS = few
                record[name] = graph_time(products(layers, x))
            record["dense_us"] = graph_time(dense_products(d_in, d_out, ROTATED // dense_nbytes(d_in, d_out), x))
            records.append(record)
    cospadi_cuda.KERNEL_ROWS = kept
    show(records, ("shape", "codec", "rows", "kernel_us", "unpacked_us", "dense_us"))
    return records


def prefill() -> list[dict[str, Any]]:
    """Many rows; beside them S of 2:4 as torch's own semi-structured kernels take it."""
    records = []
    for d_in, d_out in SHAPES:
        x = torch.randn(PREFILL, d_in, device="cuda").bfloat16()
        dense = graph_time(dense_products(d_in, d_out, 4, x))
        for case, spec, _ in cases_of(d_in, d_out):
            layers = copies(random_layer(spec), 4)
            unpacks = [functools.partial(cospadi_cuda.unpack, spec, layer.parts(), x.dtype) for layer in layers]
            records.append(
                {
                    "measure": "prefill",
                    **case,
                    **step_times(layers, x, dense),
                    "unpack_us": graph_time(unpacks),
                    "semi_structured_us": semi_structured(unpacks[0]()) if case["support"] == "2:4" else None,
                }
            )
    shown = ("shape", "ratio", "support", "n_atoms", "dense_us", "packed_us", "first_us", "unpack_us", "second_us")
    print(f"{PREFILL} rows; the goal is a speed-up of 1")
    show(records, (*shown, "semi_structured_us", "speedup"))
    return records


def semi_structured(codes: torch.Tensor) -> float:
    """Microseconds of ``z S`` by torch's 2:4 kernels for S compressed once; what compressing takes is not counted."""
    compressed = torch.sparse.to_sparse_semi_structured(F.pad(codes, (0, -codes.shape[1] % 64)))
    z = torch.randn(PREFILL, compressed.shape[1], device="cuda").bfloat16()
    return graph_time([functools.partial(F.linear, z, compressed)] * 4)


def tiles() -> list[dict[str, Any]]:
    """Both kernels with every tile: where `row_tile` and `code_tile` come from."""
    records = []
    kept = cospadi_cuda.row_tile, cospadi_cuda.code_tile
    row_tiles = [
        tile
        for tile in itertools.product((1, 2, 4, 8), (1024, 2048, 4096), (4, 8))
        if 4 <= tile[0] * tile[1] / (256 * tile[2]) <= 16
    ]
    code_tiles = [tile for tile in itertools.product((4, 8, 16, 32), (1, 2, 4), (2, 4, 8)) if tile[0] >= tile[2]]
    for d_in, d_out in SHAPES:
        spec, nbytes = sized(d_in, d_out, 0.4, "bitmask")
        layers = copies(random_layer(spec), max(4, ROTATED // nbytes))
        x = torch.randn(1, d_in, device="cuda").bfloat16()
        found: dict[tuple[str, tuple[int, ...]], float] = {}
        for tile in row_tiles:
            cospadi_cuda.row_tile = functools.partial(_always, tile)
            found["row", tile] = graph_time(first_products(layers, x), repeats=9)
        cospadi_cuda.row_tile = kept[0]
        for tile in code_tiles:
            cospadi_cuda.code_tile = functools.partial(_always, tile)
            found["code", tile] = graph_time(second_products(layers, x), repeats=9)
        cospadi_cuda.code_tile = kept[1]
        for which in ("row", "code"):
            best = sorted((t, tile) for (kind, tile), t in found.items() if kind == which)[:6]
            print(f"{d_in}x{d_out} {which}", "; ".join(f"{tile}: {t:.1f}" for t, tile in best), flush=True)
        records += [
            {"measure": "tiles", "shape": [d_in, d_out], "kind": kind, "tile": tile, "us": t}
            for (kind, tile), t in found.items()
        ]
    return records


def _always(tile: tuple[int, ...], *_: object) -> tuple[int, ...]:
    return tile


def show(records: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    rows = [["x".join(map(str, record["shape"])), *(record[name] for name in columns[1:])] for record in records]
    print(tabulate(rows, columns, tablefmt="github", floatfmt=".2f"), "\n")


MEASURES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "check": check,
    "tiles": tiles,
    "decode": decode,
    "crossover": crossover,
    "prefill": prefill,
}

DEFAULT = ("check", "decode", "crossover", "prefill")

if __name__ == "__main__":
    sys.exit(main())
