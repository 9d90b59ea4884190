"""Speed and memory of packed checkpoints beside dense ones, in the same process, step by step in turn.

``make bench-runtime``, or ``python benchmarks/runtime.py`` (``--help`` says what can be chosen). The packed models have
the demo model's sizes and random factors of the shapes that the budget gives for each ratio: how fast a product is does
not depend on what the numbers are. Of the method `cospadi` dictionaries are shared as in the demo's config (q, k, v;
gate, up), or with ``--kinds own`` every matrix has its own; `hybrid` and `sparse` share the same. Where there is a GPU,
`runtime_gpu` measures on it, too. ``--kinds``, ``--ratios``, ``--threads``, ``--measures`` choose a part of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import runtime_gpu
import torch
import transformers
from tabulate import tabulate
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import cospadi  # noqa: F401 (registers the packed classes)
from cospadi.budget import dense_nbytes, nbytes_left, sparse_shape
from cospadi.checkpoint import assemble, target_bytes
from cospadi.files import ModelFolder, write_tensors
from cospadi.formats.factorization import Factorization
from cospadi.methods.hybrid import atoms_by_rule
from cospadi.methods.single_weights import n_entries
from cospadi.problem import Matrix, Metric, shared, split_codes
from cospadi.runtime.cospadi_cpu import bfloat16_is_native, kernel
from cospadi.runtime.cospadi_linear import PackedLinear

PROJECT = Path(__file__).parents[1]
CONFIG = PROJECT / "config" / "models" / "SmolLM2-135M-Instruct.json"
RATIOS = (0.2, 0.4, 0.5)
SHARED_RHO = {0.2: 2.5, 0.4: 3.0, 0.5: 3.0}  # as in the demo's config
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
KINDS = {"shared": "cospadi", "own": "cospadi, own dictionaries", "hybrid": "hybrid", "sparse": "sparse"}
DECODE_GOALS = {0.2: 1.0, 0.4: 1.25, 0.5: 1.5}
PREFILL_GOALS = {0.2: 0.9, 0.4: 1.0, 0.5: 1.0}
MATRIX = (4096, 11008)
BLOCK = 64  # inputs under one scale, of integers
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PREFILLS = (128, 512)
MEASURES = ("decode", "prefill", "matrix", "bits", "fresh")
HEADERS = ["measure", "threads", "ratio", "kind"]
HEADERS += [f"{which} {dtype}" for which in ("dense", "packed") for dtype in DTYPES]
HEADERS += ["speed-up", "limit by bytes", "goal"]

# Replaced by --cpu-time
clock: Callable[[], float] = time.perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cores = torch.get_num_threads()
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}), help="threads of torch")
    parser.add_argument("--rounds", type=int, default=40, help="how often each step is timed")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["shared", "hybrid", "sparse"], help="packed models to make"
    )
    parser.add_argument("--ratios", type=float, nargs="+", choices=RATIOS, default=RATIOS, help="their ratios")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES, help="what to time")
    parser.add_argument("--output", type=Path, help="the table as JSON lines")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the time that the processor gives to this thread, for a machine that is busy; one thread only",
    )
    parser.add_argument(
        "--crossover", action="store_true", help="time both paths of a product by the rows of its input"
    )
    parser.add_argument(
        "--folders",
        type=Path,
        nargs=2,
        metavar=("DENSE", "PACKED"),
        help="time nothing but how these two are loaded, with the most threads of --threads",
    )
    arguments = parser.parse_args()
    if arguments.folders:
        dense, packed = arguments.folders
        threads = max(arguments.threads)
        rows = fresh_processes({"dense": dense, Packed("", str(packed)): packed}, threads)
        print(table([[row[0], threads, *row[1:]] for row in rows], HEADERS))
        return
    if arguments.cpu_time:
        global clock
        clock, arguments.threads = time.thread_time, [1]
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    compiled = kernel()
    native = "" if bfloat16_is_native() else "no "
    kind = compiled.kind if compiled else "none"
    print(f"torch {torch.__version__}, {cores} cores, {native}bfloat16 instructions, kernel: {kind}\n")
    if arguments.crossover:
        if compiled is None:
            raise SystemExit("there is no kernel here to compare with")
        torch.set_num_threads(arguments.threads[0])
        print(table(crossover(arguments.rounds), ["matrix", "dtype", "rows", "kernel us", "unpacked us", "dense us"]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        names = [Packed(ratio, kind) for kind in arguments.kinds for ratio in arguments.ratios]
        folders = make_models(Path(scratch), names)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            if {"decode", "prefill"} & set(arguments.measures):
                rows += [[row[0], threads, *row[1:]] for row in models(folders, arguments.measures, arguments.rounds)]
            if "bits" in arguments.measures:
                rows += [[row[0], threads, *row[1:]] for row in few_bits(arguments.rounds)]
            if "matrix" in arguments.measures:
                rows += [[row[0], threads, *row[1:]] for row in one_matrix(arguments.rounds)]
        if "fresh" in arguments.measures:
            rows += [[row[0], "", *row[1:]] for row in fresh_processes(folders)]
    print(table(rows, HEADERS))
    print("\nMedians; least times in brackets. A speed-up compares each in the dtype that is faster for it.")
    print("A limit counts the bytes that are read; a speed-up above it means that the dense product does not reach the")
    print("memory's speed. Memory is all that a fresh process holds, Python included.")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dict(zip(HEADERS, row, strict=True))) for row in rows]
        arguments.output.write_text("\n".join(lines) + "\n")
    print()
    runtime_gpu.measure(runtime_gpu.DEFAULT)


def table(rows: list[list], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


class Packed(NamedTuple):
    """A packed model: its ratio, and which of `KINDS` it is."""

    ratio: float | str
    kind: str

    def cells(self) -> list[Any]:
        """Its cells in the table."""
        return [self.ratio, KINDS.get(self.kind, self.kind)]

    def factors(self, d_in: int, d_out: int) -> Factorization:
        """Random factors of matrices that stand side by side."""
        if self.kind in ("hybrid", "sparse"):
            nbytes = nbytes_left([(d_in, d_out)], self.ratio)
            n_atoms = atoms_by_rule(d_in, d_out, nbytes, "matrix") if self.kind == "hybrid" else 0
            return random_single_weights(d_in, d_out, nbytes, n_atoms)
        return random_factors(d_in, d_out, self.ratio, SHARED_RHO[self.ratio] if self.kind == "shared" else 2.0)


Name = Packed | Literal["dense"]


def make_models(scratch: Path, names: list[Packed]) -> dict[Name, Path]:
    """The demo model with random weights, dense and packed in these ways."""
    config = json.loads(CONFIG.read_text())
    model_type = config.pop("model_type")
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.bfloat16)
    folders: dict[Name, Path] = {"dense": scratch / "dense"}
    dense.save_pretrained(folders["dense"])
    del dense
    base = ModelFolder(folders["dense"])
    matrices = []
    for name in [name.removesuffix(".weight") for name in base.weight_map if name.endswith("_proj.weight")]:
        shape = base.read(f"{name}.weight").shape[::-1]
        read = functools.partial(base.read_weight, name)
        matrices.append(Matrix(name, int(name.split(".")[2]), "", shape, Metric.identity(shape[0]), read))
    for made in names:
        tensors, specs = {}, {}
        factors = functools.cache(made.factors)  # a few shapes, often
        for problem in shared(matrices, {"share": [], "share_within": [] if made.kind == "own" else SHARED}):
            widths = [matrix.shape[1] for matrix in problem]
            parts = split_codes(factors(problem[0].shape[0], sum(widths)), widths)
            for matrix, part in zip(problem, parts, strict=True):
                packed, specs[matrix.name] = part.stored_under(problem[0].name).pack(matrix.name)
                tensors |= packed
        codes = scratch / "codes.safetensors"
        write_tensors(codes, tensors, {"format_version": 1, "matrices": specs})
        folders[made] = scratch / f"packed-{made.ratio}-{made.kind}"
        assemble(folders["dense"], [codes], folders[made], variant={"ratio": made.ratio})
        codes.unlink()
    return folders


def random_factors(d_in: int, d_out: int, ratio: float, rho: float = 2.0) -> Factorization:
    """Random dictionary and codes of the shape that the budget gives for `ratio`."""
    draw = np.random.default_rng(0)
    shape = sparse_shape(d_in, d_out, nbytes=nbytes_left([(d_in, d_out)], ratio), rho=rho)
    codes = draw.standard_normal((shape.n_atoms, d_out), np.float32) / shape.n_atoms**0.5
    order = draw.random((shape.n_atoms, d_out), np.float32).argpartition(shape.n_nonzero_coefs, axis=0)
    np.put_along_axis(codes, order[shape.n_nonzero_coefs :], 0, axis=0)
    dictionary = draw.standard_normal((d_in, shape.n_atoms), np.float32) / d_in**0.5
    return Factorization(dictionary, codes)


def random_single_weights(d_in: int, d_out: int, nbytes: int, n_atoms: int) -> Factorization:
    """Random weights under a mask, beside `n_atoms` random atoms, as many as `nbytes` hold."""
    draw = np.random.default_rng(0)
    storage = {"value_codec": "bf16", "block_size": None, "dictionary_codec": "bf16"}
    n_kept = n_entries((d_in, d_out), nbytes, n_atoms=n_atoms, **storage)
    codes = draw.standard_normal((d_in + n_atoms, d_out), np.float32) / d_in**0.5
    mask = np.zeros(codes.size, bool)
    mask[draw.permutation(codes.size)[:n_kept]] = True
    mask = mask.reshape(codes.shape)
    codes *= mask
    plus = []
    if n_atoms:
        atoms = draw.standard_normal((d_in, n_atoms), np.float32) / d_in**0.5
        plus = [Factorization(atoms, codes[d_in:], mask=mask[d_in:])]
    return Factorization(None, codes[:d_in], mask=mask[:d_in], plus=plus)


def interleaved(steps: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, tuple[float, float]]:
    """Median and least seconds of every step; in turn, so that whatever else the machine does hits all alike."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            started = clock()
            step()
            times[name].append(clock() - started)
    return {name: (float(np.median(taken)), min(taken)) for name, taken in times.items()}


def packed_only(folders: dict[Name, Path]) -> list[Packed]:
    return [name for name in folders if isinstance(name, Packed)]


def models(folders: dict[Name, Path], measures: list[str], rounds: int) -> list[list[Any]]:
    """Decoding and prefill of the whole model, in both dtypes that a CPU computes in."""
    loaded = {
        (name, dtype): AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for name, folder in folders.items()
        for dtype in DTYPES.values()
    }
    ids = torch.randint(3, 1000, (1, max(PREFILLS)), generator=torch.Generator().manual_seed(0))
    caches = {key: DynamicCache(config=model.config) for key, model in loaded.items()}
    for key, model in loaded.items():
        model(ids[:, :16], past_key_values=caches[key])
    measured = {}
    if "decode" in measures:
        steps = {
            key: lambda model=model, key=key: model(ids[:, :1], past_key_values=caches[key], logits_to_keep=1)
            for key, model in loaded.items()
        }
        measured["decode, tokens/s"] = (1, interleaved(steps, rounds))
    for tokens in PREFILLS if "prefill" in measures else ():
        steps = {
            key: lambda model=model, tokens=tokens: model(ids[:, :tokens], logits_to_keep=1, use_cache=False)
            for key, model in loaded.items()
        }
        measured[f"prefill of {tokens}, tokens/s"] = (tokens, interleaved(steps, max(3, rounds // 8)))
    rows = []
    all_bytes = sum(file.stat().st_size for file in folders["dense"].glob("*.safetensors"))
    for measure, (tokens, taken) in measured.items():
        for name in packed_only(folders):
            count = target_bytes(folders[name])
            limit = all_bytes / (all_bytes - count["dense_nbytes"] + count["nbytes"])
            goals = DECODE_GOALS if tokens == 1 else PREFILL_GOALS
            rows.append(
                [
                    measure,
                    *name.cells(),
                    *(shown(tokens / t for t in taken[which, d]) for which in ("dense", name) for d in DTYPES.values()),
                    speedup(best(taken, "dense"), best(taken, name)),
                    f"{limit:.2f} with head" if tokens == 1 else "",
                    f"{goals[name.ratio]:.2f}",
                ]
            )
    loaded.clear()
    caches.clear()
    gc.collect()
    return rows


def best(taken: dict[Any, tuple[float, float]], name: Name) -> tuple[float, float]:
    """Median and least seconds of a model in the dtype that is the faster one for it."""
    return min(taken[name, dtype] for dtype in DTYPES.values())


@functools.cache
def large_layer(ratio: float) -> tuple[PackedLinear, int]:
    """A matrix too large for any cache, and its bytes."""
    return packed_layer(random_factors(*MATRIX, ratio))


def packed_layer(factors: Factorization) -> tuple[PackedLinear, int]:
    """A layer with these factors, and the bytes it takes."""
    tensors, spec = factors.pack("m")
    layer = PackedLinear(spec)
    for name, array in tensors.items():
        part = getattr(layer, name.removeprefix("m."))
        part.data = torch.from_numpy(array.view(np.int16) if part.dtype == torch.bfloat16 else array).view(part.dtype)
    return layer, factors.nbytes


def one_matrix(rounds: int) -> list[list[Any]]:
    """One row times one large matrix."""
    d_in, d_out = MATRIX
    weights = {dtype: torch.randn(d_out, d_in).to(dtype) for dtype in DTYPES.values()}
    inputs = {dtype: torch.randn(1, d_in).to(dtype) for dtype in DTYPES.values()}
    rows = []
    for ratio in RATIOS:
        layer, nbytes = large_layer(ratio)
        steps: dict[Any, Callable[[], object]] = {}
        for dtype, x in inputs.items():
            steps["dense", dtype] = lambda x=x, weight=weights[dtype]: torch.nn.functional.linear(x, weight)
            steps["packed", dtype] = lambda x=x, layer=layer: layer(x)
        taken = interleaved(steps, rounds)
        limit = dense_nbytes(d_in, d_out) / nbytes
        rows.append(
            [f"{d_in}x{d_out}, one row, ms", ratio, ""]
            + [shown(1e3 * t for t in taken[name, d]) for name in ("dense", "packed") for d in DTYPES.values()]
            + [speedup(best(taken, "dense"), best(taken, "packed")), f"{limit:.2f}", f"{0.8 * limit:.2f}"]
        )
    return rows


def few_bits(rounds: int) -> list[list[Any]]:
    """One row times the demo's matrices in a few bits a weight, as many in turn as no cache holds."""
    rows = []
    draw = np.random.default_rng(0)
    for d_in, d_out in ((576, 576), (576, 192), (576, 1536), (1536, 576)):
        count = 2**25 // (d_in * d_out)
        weights = {dtype: [torch.randn(d_out, d_in).to(dtype) for _ in range(count)] for dtype in DTYPES.values()}
        steps: dict[Any, Callable[[], object]] = {}
        for dtype, dense in weights.items():
            x = torch.randn(1, d_in).to(dtype)
            steps["dense", dtype] = lambda x=x, dense=dense: [torch.nn.functional.linear(x, weight) for weight in dense]
        limits = {}
        for kind, bits in (*(("trellis", bits) for bits in (4, 3, 2)), *(("int", bits) for bits in (6, 4, 3, 2))):
            codes = {"codec": f"{kind}{bits}", "support": "dense", "n_nonzero": d_in * d_out}
            if kind == "int":
                codes |= {"group_size": BLOCK, "n_scales": d_out * -(-d_in // BLOCK)}
            spec = {"shape": [d_in, d_out], "dictionary": {"codec": "identity", "n_atoms": d_in}, "codes": codes}
            layers = [PackedLinear(spec) for _ in range(count)]
            for layer in layers:  # whose speed does not depend on what they hold
                layer.values.data.copy_(torch.from_numpy(draw.integers(0, 128, len(layer.values), np.uint8)))
            limits[kind, bits] = 2 * d_in * d_out / sum(part.nbytes for part in layer.parts() if part is not None)
            for dtype in DTYPES.values():
                x = torch.randn(1, d_in).to(dtype)
                steps[(kind, bits), dtype] = lambda x=x, layers=layers: [layer(x) for layer in layers]
        taken = interleaved(steps, max(3, rounds // 4))
        for name, limit in limits.items():
            (kind, bits), both = name, ("dense", name)
            cells = [shown(1e6 * t / count for t in taken[which, d]) for which in both for d in DTYPES.values()]
            speed = speedup(*(best(taken, which) for which in both))
            goal = "1.50" if kind == "trellis" and bits > 2 else ""
            rows.append([f"{d_in}x{d_out}, one row, us", f"{bits} bits", kind, *cells, speed, f"{limit:.2f}", goal])
    return rows


def crossover(rounds: int) -> list[list[str]]:
    """Both paths of a product, by the rows of its input and its dtype: where `cospadi_cpu.PATHS` comes from."""
    rows = []
    compiled = kernel()
    for d_in, d_out in ((576, 576), (576, 1536), (1536, 576), MATRIX):
        count = max(1, 2**24 // (d_in * d_out))
        # of each path its own: a layer that has computed keeps to the path that it was bound for
        layers = {n: [packed_layer(random_factors(d_in, d_out, 0.4))[0] for _ in range(count)] for n in (0, 64)}
        for dtype, n in itertools.product(DTYPES.values(), (1, 2, 4, 8, 16, 24, 32, 64)):
            weights = [torch.randn(d_out, d_in).to(dtype) for _ in range(count)]
            x = torch.randn(n, d_in).to(dtype)

            def through(few_rows: int, x: torch.Tensor = x, layers: dict[int, list[PackedLinear]] = layers) -> None:
                kept = compiled.paths
                compiled.paths = dataclasses.replace(kept, few_rows=few_rows)
                for layer in layers[few_rows]:
                    layer(x)
                compiled.paths = kept

            def dense(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                for weight in weights:
                    torch.nn.functional.linear(x, weight)

            taken = interleaved(
                {"kernel": functools.partial(through, 64), "unpacked": functools.partial(through, 0), "dense": dense},
                max(3, rounds // 4),
            )
            rows.append([f"{d_in}x{d_out}", dtype, n] + [shown(1e6 * t / count for t in taken[name]) for name in taken])
    return rows


_FRESH = """
import sys, time
import torch, transformers, cospadi
from transformers import AutoModelForCausalLM
from pathlib import Path
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(sys.argv[2]))
AutoModelForCausalLM.from_config(transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=1, vocab_size=8))
def resident():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in l).split()[1]) * 1024
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
seconds, loaded = time.perf_counter() - started, resident()
with torch.no_grad():
    model(torch.zeros(1, 1, dtype=torch.long))
print(seconds, loaded, resident())
"""


def fresh_processes(folders: dict[Name, Path], threads: int = 1) -> list[list[Any]]:
    """Load time and resident memory, each in a process of its own."""
    found: dict[Name, list[list[float]]] = {name: [] for name in folders}
    for _ in range(3):
        for name, folder in folders.items():
            done = subprocess.run(
                [sys.executable, "-c", _FRESH, folder, str(threads)],
                check=True,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
            found[name].append([float(figure) for figure in done.stdout.split()])
    rows = []
    seconds = {name: sorted(run[0] for run in runs) for name, runs in found.items()}
    for name in packed_only(folders):
        dense, packed = ((float(np.median(seconds[which])), seconds[which][0]) for which in ("dense", name))
        cells = [shown(dense, 2), "", shown(packed, 2), "", speedup(dense, packed)]
        rows.append(["load, s", *name.cells(), *cells, "", "1.00"])
    for name in packed_only(folders):
        size = sum(file.stat().st_size for file in folders[name].glob("*.safetensors"))
        limit = f"at most {(1.25 * size + 3e8) / 1e6:.0f}"
        for what, which, goal in (("after loading", 1, limit), ("after one token", 2, "")):
            dense, packed = (f"{max(run[which] for run in found[key]) / 1e6:.0f}" for key in ("dense", name))
            rows.append(
                [f"resident {what}, MB", *name.cells(), dense, "", packed, "", "", f"file {size / 1e6:.0f}", goal]
            )
    return rows


def shown(median_and_least, digits: int = 1) -> str:
    median, least = median_and_least
    return f"{median:.{digits}f} ({least:.{digits}f})"


def speedup(dense: tuple[float, float], packed: tuple[float, float]) -> str:
    return f"{dense[0] / packed[0]:.2f} ({dense[1] / packed[1]:.2f})"


if __name__ == "__main__":
    main()
