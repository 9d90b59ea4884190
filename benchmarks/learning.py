"""Benchmark of learning: a whole model, the memory of one layer, and how cost grows with shape and ratio.

``python benchmarks/learning.py --model resources/models/<name> --run results/demo`` after ``make run`` (it needs the
run's structure and Grams). It prints tables, writes JSON lines (``--output``) and draws ``--plot``: error over time of
the solvers, and cost over size. The whole model is learned by one process a core with one thread each, as the workflow
does it; the speed of a float32 matrix product is measured by as many processes at once, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from roofline import gemm_gflops, htp_gflop, shape_at
from solvers import load
from tabulate import tabulate

from cospadi.files import read_json
from cospadi.learning import learn_unit
from cospadi.solvers import SOLVERS

VARIANT = {"method": "cospadi", "ratio": 0.2, "codes": {}}
GROWTH_ROUNDS = 8
# one varies, the others stay in the middle
GROWTH = {
    "d_in": [(size, 1024, 0.4) for size in (256, 512, 1024, 2048)],
    "d_out": [(1024, size, 0.4) for size in (256, 512, 1024, 2048)],
    "kept bytes (1 - ratio)": [(1024, 1024, ratio) for ratio in (0.2, 0.4, 0.6, 0.8)],
}


def main() -> int:
    arguments = parse()
    if arguments.layer is not None:
        print(json.dumps(one_layer(arguments.model, arguments.run, arguments.layer)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {}
    for measure in arguments.measures:
        found[measure] = MEASURES[measure](arguments)
        sys.stdout.flush()
    records = [record for measured in found.values() for record in measured]
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"written to {arguments.output}")
    if arguments.plot:
        draw(found["convergence"], found["growth"], arguments.plot)
        print(f"drawn to {arguments.plot}")
    return 0


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense model folder")
    parser.add_argument("--run", type=Path, required=True, help="results of a finished run of that model")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layer", type=int, help="only learn this layer, and print its time and memory as JSON")
    parser.add_argument("--output", type=Path, help="JSON lines")
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    arguments = parser.parse_args()
    if arguments.plot and not {"convergence", "growth"} <= set(arguments.measures):
        parser.error("--plot needs convergence and growth")
    return arguments


def learn_layer(model: Path, run: Path, layer: int) -> dict[str, Any]:
    """Learn one layer from a run's files; seconds, and operations of its matrix products in 1e9."""
    structure = read_json(run / "structure.json")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        learn_unit(
            model,
            structure,
            [run / "gram" / f"{structure['layers'][layer]['name']}.h5"],
            [layer],
            VARIANT,
            output=Path(folder, "factors.safetensors"),
            diagnostics=Path(folder, "factors.json"),
            log=lambda line: None,
        )
        seconds = time.perf_counter() - started
        matrices = read_json(Path(folder, "factors.json"))["matrices"].values()
    gflop = sum(htp_gflop(*m["shape"], m["n_atoms"], len(m["history"]) - 1) for m in matrices)
    return {"seconds": seconds, "gflop": gflop, "errors": [m["relative_error"] for m in matrices]}


def whole_model(model: Path, run: Path, processes: int) -> list[dict[str, Any]]:
    """All layers, one process a core, and what share of the speed of a matrix product that is."""
    n_layers = read_json(run / "structure.json")["n_layers"]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        before = sum(pool.map(gemm_gflops, [1024] * processes))
        started = time.perf_counter()
        layers = list(pool.map(learn_layer, [model] * n_layers, [run] * n_layers, range(n_layers)))
        seconds = time.perf_counter() - started
        gemm = (before + sum(pool.map(gemm_gflops, [1024] * processes))) / 2
    gflop = sum(layer["gflop"] for layer in layers)
    record = {
        "measure": "whole model",
        "layers": n_layers,
        "processes": processes,
        "seconds": seconds,
        "core seconds": sum(layer["seconds"] for layer in layers),
        "GFLOP": gflop,
        "GEMM GFLOP/s": gemm,
        "roofline": gflop / seconds / gemm,
        "mean relative error": float(np.mean([error for layer in layers for error in layer["errors"]])),
    }
    print(
        f"whole model at ratio {VARIANT['ratio']}: {n_layers} layers by {processes} processes in {seconds:.1f} s; "
        f"{gflop:.0f} GFLOP in matrix products, {100 * record['roofline']:.0f} % of the {gemm:.0f} GFLOP/s that "
        f"{processes} processes reach in float32 products; mean relative error {record['mean relative error']:.4f}\n"
    )
    return [record]


def one_layer(model: Path, run: Path, layer: int) -> dict[str, Any]:
    """Memory of learning a layer in this process, above what the imports take."""
    SOLVERS["htp"](np.eye(8, dtype=np.float32), n_atoms=4, n_nonzero_coefs=2, max_iter=1)  # imports, BLAS buffers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    learned = learn_layer(model, run, layer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "peak": peak, "seconds": learned["seconds"]}


def layer_memory(model: Path, run: Path) -> list[dict[str, Any]]:
    """Peak memory of learning one layer in a process of its own, against its weights and Grams."""
    layer = read_json(run / "structure.json")["layers"][0]
    weights = sum(4 * np.prod(matrix["shape"]) for site in layer["sites"] for matrix in site["matrices"])
    grams = sum(8 * site["d_in"] ** 2 for site in layer["sites"])
    command = [sys.executable, __file__, "--model", str(model), "--run", str(run), "--layer", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    own = found["peak"] - found["before"]
    record = {
        "measure": "memory of a layer",
        "weights float32 MB": weights / 1e6,
        "Grams float64 MB": grams / 1e6,
        "peak RSS MB": found["peak"] / 1e6,
        "above imports MB": own / 1e6,
        "over weights + Grams": own / (weights + grams),
    }
    print(tabulate([record], headers="keys", floatfmt=".3g"), "\n")
    return [record]


def cost_growth() -> list[dict[str, Any]]:
    """Seconds of the default solver over shape and ratio, and the exponents of a power law fitted to them."""
    records = []
    for axis, points in GROWTH.items():
        for d, n, ratio in points:
            rng = np.random.default_rng(0)
            target = (rng.standard_normal((d, d)) * np.arange(1, d + 1) ** -0.8) @ rng.standard_normal((d, n))
            k, s = shape_at((d, n), ratio)
            started = time.perf_counter()
            SOLVERS["htp"](target.astype(np.float32), n_atoms=k, n_nonzero_coefs=s, max_iter=GROWTH_ROUNDS, tol=0)
            seconds = time.perf_counter() - started
            size = {"d_in": d, "d_out": n}.get(axis, 1 - ratio)
            records.append({"measure": "growth", "axis": axis, "size": size, "k": k, "seconds": seconds})
        ours = [record for record in records if record["axis"] == axis]
        exponent = fitted_exponent([r["size"] for r in ours], [r["seconds"] for r in ours])
        for record in ours:
            record["exponent"] = exponent
    print(f"cost of {GROWTH_ROUNDS} rounds, one thread; middle: 1024 x 1024 at ratio 0.4")
    print(tabulate(records, headers="keys", floatfmt=".3g"), "\n")
    return records


def fitted_exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def convergence(model: Path, run: Path) -> list[dict[str, Any]]:
    """Error over time of the default solver, of K-SVD and of orthonormal atoms on two matrices."""
    records = []
    for projection in ("q_proj", "gate_proj"):
        name, target = load(projection, model, run / "gram")
        k, s = shape_at(target.shape, VARIANT["ratio"])
        for solver, options in (("htp", {}), ("ksvd", {"max_iter": 40}), ("procrustes", {})):
            SOLVERS[solver](target[:, :64], n_atoms=16, n_nonzero_coefs=8, max_iter=1)  # compiles
            history = SOLVERS[solver](target, n_atoms=k, n_nonzero_coefs=s, tol=0, **options).history
            records.append(
                {
                    "measure": "convergence",
                    "matrix": name,
                    "solver": solver,
                    "seconds": [entry["seconds"] for entry in history],
                    "error": [entry["relative_error"] for entry in history],
                }
            )
    return records


def draw(curves: list[dict[str, Any]], growth: list[dict[str, Any]], path: Path) -> None:
    """Error over time, a panel a matrix; cost over size with its power law."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    matrices = list(dict.fromkeys(curve["matrix"] for curve in curves))
    figure, axes = plt.subplots(1, len(matrices) + 1, figsize=(4.2 * (len(matrices) + 1), 3.6), layout="constrained")
    for axis, matrix in zip(axes, matrices, strict=False):
        for curve in curves:
            if curve["matrix"] == matrix:
                first = curve["error"][0] == 1  # K-SVD begins with no codes at all
                axis.plot(curve["seconds"][first:], curve["error"][first:], marker=".", label=curve["solver"])
        axis.set(xscale="log", xlabel="seconds, one thread", ylabel="relative error")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(matrix.removeprefix("model.layers."), fontsize=10)
        axis.legend(title="ratio 0.2")
    for name in dict.fromkeys(record["axis"] for record in growth):
        points = [record for record in growth if record["axis"] == name]
        relative = np.array([record["size"] for record in points])
        relative = relative / relative.max()
        label = f"{name}: exponent {points[0]['exponent']:.2f}"
        axes[-1].plot(relative, [record["seconds"] for record in points], marker="o", label=label)
    axes[-1].set(xscale="log", yscale="log", xlabel="size over the largest", ylabel="seconds")
    axes[-1].set_title(f"{GROWTH_ROUNDS} rounds of htp", fontsize=10)
    axes[-1].xaxis.set_major_locator(ticker.LogLocator(base=2))
    axes[-1].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    for shown in (axes[-1].xaxis, axes[-1].yaxis):
        shown.set_major_formatter("{x:g}")
        shown.set_minor_locator(ticker.NullLocator())
    axes[-1].legend()
    figure.savefig(path, dpi=110)


MEASURES: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "whole_model": lambda arguments: whole_model(arguments.model, arguments.run, arguments.processes),
    "memory": lambda arguments: layer_memory(arguments.model, arguments.run),
    "growth": lambda arguments: cost_growth(),
    "convergence": lambda arguments: convergence(arguments.model, arguments.run),
}

if __name__ == "__main__":
    sys.exit(main())
