"""Benchmark of the solvers on a GPU: the matrices of Llama-3.2-1B's shapes, all 112 at one ratio.

``python benchmarks/gpu.py`` prints a table and, with ``--output``, writes JSON lines. Weights are random with a
spectrum that decays like a whitened weight's, which is all that time depends on; the first of them are also learned on
the CPU, and one is learned twice on the GPU, so that the table shows how far devices agree and whether seeds reproduce.
``--device cpu --scale 16 --layers 1`` tries the program where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import roofline
import torch
from roofline import htp_gflop, shape_at
from tabulate import tabulate

from cospadi.solvers import SOLVERS
from cospadi.solvers._rounds import as_rows
from cospadi.solvers.omp import encode_rows

Shapes = dict[str, tuple[int, int]]

LAYERS = 16
SHAPES = {
    "q_proj": (2048, 2048),
    "k_proj": (2048, 512),
    "v_proj": (2048, 512),
    "o_proj": (2048, 2048),
    "gate_proj": (2048, 8192),
    "up_proj": (2048, 8192),
    "down_proj": (8192, 2048),
}


def main() -> int:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return 0
    torch.set_default_device(arguments.device)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    print(f"{name}, torch {torch.__version__}")
    shapes = {name: tuple(size // arguments.scale for size in shape) for name, shape in SHAPES.items()}
    gemm = gemm_tflops(8192 // arguments.scale)
    print(f"float32 matrix product {gemm:.1f} TFLOP/s in this process\n")
    records: list[dict[str, Any]] = [{"measure": "gemm", "tflops": gemm}]
    for measure in arguments.measures:
        records += MEASURES[measure](shapes, arguments, gemm)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"written to {arguments.output}")
    return 0


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the whole model that are learned")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides all shapes")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one gate_proj")
    parser.add_argument("--output", type=Path, help="JSON lines")
    return parser.parse_args()


def weight_like(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A (d, n) float32 matrix on the device whose singular values decay as a whitened weight's do."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    d, n = shape
    left = torch.linalg.qr(torch.randn(d, min(d, n), generator=generator))[0]
    decay = torch.arange(1, min(d, n) + 1) ** -0.8
    return (left * decay) @ torch.randn(min(d, n), n, generator=generator)


def sizes(shape: tuple[int, int], ratio: float) -> dict[str, int]:
    """k and s as the solvers take them."""
    return dict(zip(("n_atoms", "n_nonzero_coefs"), shape_at(shape, ratio), strict=True))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result, with the GPU idle before and after."""
    return roofline.timed(run, torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)


def gemm_tflops(size: int) -> float:
    """Speed of the float32 product on random numbers."""
    a = torch.randn(size, size)
    timed(lambda: a @ a)
    return 2 * size**3 / min(timed(lambda: a @ a)[0] for _ in range(3)) / 1e12


def whole_model(shapes: Shapes, arguments: argparse.Namespace, gemm: float) -> list[dict[str, Any]]:
    """Every matrix of the model by the default solver."""
    learn = SOLVERS["htp"]
    for shape in set(shapes.values()):  # compiles, makes handles
        learn(weight_like(shape, 0), **sizes(shape, arguments.ratio), max_iter=1)
    if arguments.profile:
        profile(shapes, arguments.ratio)
    records, total, gflop = [], 0.0, 0.0
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for name, shape in shapes.items():
        size = sizes(shape, arguments.ratio)
        seconds, errors = [], []
        for layer in range(arguments.layers):
            target = weight_like(shape, layer)
            elapsed, solution = timed(lambda target=target, size=size: learn(target, **size))
            seconds.append(elapsed)
            errors.append(solution.history[-1]["relative_error"])
            gflop += htp_gflop(*shape, size["n_atoms"], len(solution.history) - 1)
        total += sum(seconds)
        records.append(
            {
                "measure": "htp",
                "matrix": name,
                "shape": "x".join(map(str, shape)),
                **size,
                "matrices": len(seconds),
                "seconds": float(np.median(seconds)),
                "seconds in all": sum(seconds),
                "error": float(np.mean(errors)),
            }
        )
    print(tabulate(records, headers="keys", floatfmt=".4g"))
    n_matrices = arguments.layers * len(shapes)
    peak = torch.cuda.max_memory_allocated() / 2**20 if arguments.device == "cuda" else float("nan")
    share = gflop / total / 1e3 / gemm
    print(
        f"{n_matrices} matrices at ratio {arguments.ratio:g} in {total:.1f} s, {100 * share:.0f} % of the speed of a "
        f"float32 matrix product; peak GPU memory {peak:.0f} MiB\n"
    )
    whole = {"measure": "htp, whole model", "matrices": n_matrices, "seconds": total, "roofline": share, "MiB": peak}
    return [*records, whole]


def agreement(shapes: Shapes, arguments: argparse.Namespace, _gemm: float) -> list[dict[str, Any]]:
    """Error on the GPU against the CPU, and the same seed twice."""
    records = []
    for name in ("k_proj", "q_proj"):
        size = sizes(shapes[name], arguments.ratio)
        target = weight_like(shapes[name], 0)
        for solver, options in (("htp", {}), ("procrustes", {"max_iter": 5}), ("ksvd", {"max_iter": 2})):
            if solver == "ksvd" and name == "q_proj":
                continue
            seconds, gpu = timed(lambda: SOLVERS[solver](target, **size, **options))  # noqa: B023
            again = SOLVERS[solver](target, **size, **options)
            started = time.perf_counter()
            cpu = SOLVERS[solver](target.cpu().numpy(), **size, **options)
            cpu_seconds = time.perf_counter() - started
            errors = [solution.history[-1]["relative_error"] for solution in (gpu, cpu)]
            records.append(
                {
                    "measure": f"{solver}, GPU against CPU",
                    "matrix": name,
                    "GPU s": seconds,
                    "CPU s": cpu_seconds,
                    "GPU error": errors[0],
                    "CPU error": errors[1],
                    "GPU/CPU": errors[0] / errors[1],
                    "same seed, same bytes": torch.equal(gpu.codes, again.codes)
                    and torch.equal(gpu.dictionary, again.dictionary),
                }
            )
    print(tabulate(records, headers="keys", floatfmt=".5g"), "\n")
    return records


def ksvd(shapes: Shapes, arguments: argparse.Namespace, _gemm: float) -> list[dict[str, Any]]:
    """A round of the paper's K-SVD: its pursuit and its atoms."""
    records = []
    for name in ("k_proj", "q_proj"):
        size = sizes(shapes[name], arguments.ratio)
        target = weight_like(shapes[name], 0)
        rows, _ = as_rows(target, *size.values())
        atoms = SOLVERS["htp"](target, **size, max_iter=2).dictionary.T.contiguous()
        run = lambda rows=rows, atoms=atoms, s=size["n_nonzero_coefs"]: encode_rows(rows, atoms, s)  # noqa: E731
        run()
        records.append({"measure": "OMP", "matrix": name, "seconds": timed(run)[0]})
        for update in ("power", "block", "mod"):
            options = {"max_iter": 1, "tol": 0, "atom_update": update}
            seconds, solution = timed(lambda: SOLVERS["ksvd"](target, **size, **options))  # noqa: B023
            error = solution.history[-1]["relative_error"]
            records.append({"measure": f"K-SVD round, {update}", "matrix": name, "seconds": seconds, "error": error})
    print(tabulate(records, headers="keys", floatfmt=".4g"), "\n")
    return records


def profile(shapes: Shapes, ratio: float) -> None:
    """Kernels of one gate_proj, by time on the GPU."""
    target = weight_like(shapes["gate_proj"], 0)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        timed(lambda: SOLVERS["htp"](target, **sizes(shapes["gate_proj"], ratio)))
    print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=60))


MEASURES: dict[str, Callable[[Shapes, argparse.Namespace, float], list[dict[str, Any]]]] = {
    "whole_model": whole_model,
    "agreement": agreement,
    "ksvd": ksvd,
}

if __name__ == "__main__":
    sys.exit(main())
