"""Benchmark of the solvers: pursuits and dictionary learning, side by side in one process.

``python benchmarks/solvers.py`` prints a table; ``--output`` writes it as JSON lines too. Matrices are those of a model
folder with the Grams of a finished run (``--model resources/models/<name> --gram results/<run>/gram``); without them,
synthetic ones of the same shapes whose spectrum decays like a whitened weight's, and the table says so. Every time is
the median of ``--repeats`` runs, taken in turn so that a busy minute hits all of them; the 60 rounds of K-SVD run once.
Threads are those of the environment (``OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1``). SPAMS is left out if not installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from roofline import gemm_gflops, htp_gflop, shape_at, timed
from sklearn.linear_model import orthogonal_mp_gram

from cospadi.files import ModelFolder
from cospadi.gram import read_gram, whitening_factor
from cospadi.solvers import SOLVERS
from cospadi.solvers._rounds import as_rows
from cospadi.solvers._threads import n_threads, one_blas_thread
from cospadi.solvers.omp import encode_rows

ATTENTION = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}
SHAPES = {**ATTENTION, "gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}


def main() -> None:
    arguments = parse()
    threads = n_threads()
    records: list[dict[str, Any]] = [{"measure": "gemm", "gflops": round(gemm_gflops(), 1), "threads": threads}]
    print(f"{threads} thread(s); float32 matrix product {records[0]['gflops']} GFLOP/s in this process\n")
    for matrix in arguments.matrices:
        name, target = load(matrix, arguments.model, arguments.gram)
        k, s = shape_at(target.shape, arguments.ratio)
        print(f"{name}: {target.shape[0]} x {target.shape[1]}, k = {k}, s = {s} (ratio {arguments.ratio:g})")
        rows = pursuits(target, k, s, arguments.repeats)
        rows += learning(target, k, s, arguments.repeats, arguments.rounds, records[0]["gflops"])
        for row in rows:
            row.update(matrix=name, d=target.shape[0], n=target.shape[1], k=k, s=s, threads=threads)
            print(f"  {row['measure']:<42}{row['seconds']:>10.3f} s   {row['error']:.5f}   {row.get('note', '')}")
        records += rows
        print()
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"written to {arguments.output}")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder of the dense model")
    parser.add_argument("--gram", type=Path, help="folder with layer_03.h5 ... of a finished run")
    parser.add_argument("--matrices", nargs="+", default=["3.q_proj", "15.gate_proj"], help="layer.projection")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60, help="K-SVD rounds (paper: 60)")
    parser.add_argument("--output", type=Path, help="JSON lines")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.gram is None):
        parser.error("--model and --gram belong together")
    return arguments


def load(matrix: str, model: Path | None, gram: Path | None) -> tuple[str, np.ndarray]:
    """Name and whitened weight (d, n) float32 of a matrix."""
    layer, projection = matrix.split(".")
    if model is None or gram is None:
        d, n = SHAPES[projection]
        rng = np.random.default_rng(0)
        left = np.linalg.qr(rng.standard_normal((d, d)))[0] * np.arange(1, d + 1) ** -0.8
        return f"synthetic {projection}", (left @ rng.standard_normal((d, n))).astype(np.float32)
    name = f"model.layers.{layer}.{'self_attn' if projection in ATTENTION else 'mlp'}.{projection}"
    path = gram / f"layer_{int(layer):02d}.h5"
    with h5py.File(path) as file:
        site = next(site for site in file if any(name.endswith(str(matrix)) for matrix in file[site].attrs["matrices"]))
    whitening = whitening_factor(read_gram(path, site))
    return name, np.asarray(whitening.whiten(ModelFolder(model).read_weight(name)), np.float32)


def error_of(target: np.ndarray, dictionary: np.ndarray, codes: np.ndarray) -> float:
    """Relative Frobenius error, in double precision."""
    residual = target.astype(np.float64) - dictionary.astype(np.float64) @ codes.astype(np.float64)
    return float(np.linalg.norm(residual) / np.linalg.norm(target))


def pursuits(target: np.ndarray, k: int, s: int, repeats: int) -> list[dict[str, Any]]:
    """Coding all columns against one learned dictionary: our OMP, SPAMS, scikit-learn; HTP for comparison."""
    dictionary = SOLVERS["htp"](target, n_atoms=k, n_nonzero_coefs=s, max_iter=5).dictionary.astype(np.float32)
    rows, scale = as_rows(target, k, s)
    atoms = np.ascontiguousarray(dictionary.T)
    # as the solvers call it: threads of BLAS that wait for more work would take the cores
    encode = one_blas_thread(encode_rows)
    encode(rows[:2], atoms, s)  # compiles
    runs: dict[str, Callable[[], np.ndarray]] = {"OMP, ours": lambda: encode(rows, atoms, s).T * scale}
    try:
        import spams
    except ImportError:
        print("  SPAMS is not installed (pip install spams-bin): its row is missing")
    else:
        threads = n_threads()
        x, d = np.asfortranarray(target), np.asfortranarray(dictionary)
        runs["OMP, SPAMS"] = lambda: spams.omp(x, d, L=s, eps=0.0, numThreads=threads).toarray()
    found = side_by_side(runs, repeats)
    columns = min(target.shape[1], 48)
    double = dictionary.astype(np.float64)
    gram, correlations = double.T @ double, double.T @ target[:, :columns]
    seconds, codes = timed(lambda: orthogonal_mp_gram(gram, correlations, n_nonzero_coefs=s))
    ours = found["OMP, ours"]
    rows_out = [
        {"measure": name, "seconds": seconds, "error": error_of(target, dictionary, codes)}
        for name, (seconds, codes) in found.items()
    ]
    rows_out.append(
        {
            "measure": "OMP, scikit-learn",
            "seconds": seconds * target.shape[1] / columns,
            "error": error_of(target[:, :columns], dictionary, codes),
            "note": f"from {columns} of {target.shape[1]} columns, scaled up",
        }
    )
    for row in rows_out[1:]:
        row["note"] = f"ours is {row['seconds'] / ours[0]:.1f} x faster; {row.get('note', '')}".rstrip("; ")
    return rows_out


def learning(target: np.ndarray, k: int, s: int, repeats: int, n_rounds: int, gemm: float) -> list[dict[str, Any]]:
    """K-SVD with the paper's settings; the default solver, and when it reaches K-SVD's error; K-SVD in plain NumPy."""
    shape: dict[str, Any] = {"n_atoms": k, "n_nonzero_coefs": s}
    # once is enough for the long one: its rounds are repeats of each other
    ksvd_seconds, ksvd = timed(lambda: SOLVERS["ksvd"](target, **shape, max_iter=n_rounds, tol=0))
    reached = ksvd.history[-1]["relative_error"]
    seconds, htp = side_by_side({"htp": lambda: SOLVERS["htp"](target, **shape)}, repeats)["htp"]
    roofline = htp_gflop(*target.shape, k, len(htp.history) - 1) / seconds / gemm
    ksvd_note = f"{len(ksvd.history) - 1} rounds, our kernels"
    rows = [
        {"measure": "K-SVD, ours", "seconds": ksvd_seconds, "error": reached, "note": ksvd_note},
        {
            "measure": "default solver (htp), to its end",
            "seconds": seconds,
            "error": htp.history[-1]["relative_error"],
            "note": f"{len(htp.history) - 1} rounds, {100 * roofline:.0f} % of the speed of a matrix product",
        },
    ]
    crossing = next((entry for entry in htp.history if entry["relative_error"] <= reached), None)
    if crossing is None:
        rows[1]["note"] += "; does not reach the error of K-SVD"
    else:
        crossing_note = f"round {crossing['iteration']}; {ksvd_seconds / crossing['seconds']:.0f} x faster than K-SVD"
        rows.append(
            {
                "measure": "default solver, to K-SVD's error",
                "seconds": crossing["seconds"],
                "error": crossing["relative_error"],
                "note": crossing_note,
            }
        )
    columns, atoms = 16, 8
    plain, error = plain_ksvd_seconds(target, ksvd.dictionary, ksvd.codes, s, columns, atoms)
    against = f", {n_rounds * plain / crossing['seconds']:.0f} x the default solver" if crossing else ""
    rows.append(
        {
            "measure": "K-SVD, plain NumPy",
            "seconds": n_rounds * plain,
            "error": error,
            "note": f"estimate: {columns} columns and {atoms} atoms of one round, scaled up{against}",
        }
    )
    return rows


def side_by_side(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, Any]]:
    """Median seconds and last result of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds, results[name] = timed(run)
            times[name].append(seconds)
    return {name: (statistics.median(times[name]), results[name]) for name in runs}


def plain_ksvd_seconds(
    target: np.ndarray, dictionary: np.ndarray, codes: np.ndarray, s: int, n_columns: int, n_timed_atoms: int
) -> tuple[float, float]:
    """Seconds of one K-SVD round as one would write it in NumPy, from a part of its columns and of its atoms.

    OMP a column at a time with a least-squares solve a step; atoms with 8 power iterations on their residual.
    """
    started = time.perf_counter()
    for column in range(n_columns):
        support: list[int] = []
        residual = target[:, column]
        for _ in range(s):
            merit = abs(dictionary.T @ residual)
            merit[support] = -1
            support.append(int(merit.argmax()))
            part = dictionary[:, support]
            residual = target[:, column] - part @ np.linalg.solve(part.T @ part, part.T @ target[:, column])
    coding = (time.perf_counter() - started) * target.shape[1] / n_columns
    dictionary, codes = dictionary.copy(), codes.copy()
    started = time.perf_counter()
    for atom in range(n_timed_atoms):
        users = np.flatnonzero(codes[atom])
        codes[atom] = 0
        own = target[:, users] - dictionary @ codes[:, users]
        u = dictionary[:, atom]
        for _ in range(8):
            u = own @ (own.T @ u)
            u /= np.linalg.norm(u)
        dictionary[:, atom], codes[atom, users] = u, own.T @ u
    sweep = (time.perf_counter() - started) * dictionary.shape[1] / n_timed_atoms
    return coding + sweep, error_of(target, dictionary, codes)


if __name__ == "__main__":
    sys.exit(main())
