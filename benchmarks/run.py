"""Run the benchmarks (``make bench``): the demo's matrices when its run is there, synthetic ones otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRAMS = ROOT / "results" / "demo" / "gram"


def main() -> int:
    command = [sys.executable, str(ROOT / "benchmarks" / "solvers.py")]
    models = sorted((ROOT / "resources" / "models").glob("*/config.json"))
    if (GRAMS / "layer_15.h5").exists() and len(models) == 1:
        command += ["--model", str(models[0].parent), "--gram", str(GRAMS)]
    command += ["--output", str(ROOT / "results" / "benchmarks" / "solvers.jsonl"), *sys.argv[1:]]
    # one thread, as a learning job of the workflow has; set before NumPy is loaded
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return subprocess.run(command, env={**os.environ, **threads}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
