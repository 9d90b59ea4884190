"""Run the benchmarks (``make bench``): the demo's matrices when its run is there, synthetic ones otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cospadi.stage import has_gpu

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "results" / "benchmarks"
GRAMS = ROOT / "results" / "demo" / "gram"


def main() -> int:
    # one thread, as a learning job of the workflow has; set before NumPy is loaded
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    environment = {**os.environ, **threads}
    command = [sys.executable, str(ROOT / "benchmarks" / "solvers.py")]
    models = sorted((ROOT / "resources" / "models").glob("*/config.json"))
    if (GRAMS / "layer_15.h5").exists() and len(models) == 1:
        command += ["--model", str(models[0].parent), "--gram", str(GRAMS)]
    command += ["--output", str(RECORDS / "solvers.jsonl"), *sys.argv[1:]]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status == 0 and "--gram" in command:
        command = [sys.executable, str(ROOT / "benchmarks" / "learning.py"), "--model", str(models[0].parent)]
        command += ["--run", str(GRAMS.parent), "--output", str(RECORDS / "learning.jsonl")]
        command += ["--plot", str(RECORDS / "learning.png")]
        status = subprocess.run(command, env=environment, check=False).returncode
    if status == 0 and has_gpu():
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(RECORDS / "gpu.jsonl")]
        status = subprocess.run(command, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
