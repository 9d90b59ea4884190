"""Run the benchmarks (``make bench``): the demo's matrices when its run is there, synthetic ones otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRAMS = ROOT / "results" / "demo" / "gram"


def main() -> int:
    # one thread, as a learning job of the workflow has; set before NumPy is loaded
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    environment = {**os.environ, **threads}
    command = [sys.executable, str(ROOT / "benchmarks" / "solvers.py")]
    models = sorted((ROOT / "resources" / "models").glob("*/config.json"))
    if (GRAMS / "layer_15.h5").exists() and len(models) == 1:
        command += ["--model", str(models[0].parent), "--gram", str(GRAMS)]
    command += ["--output", str(ROOT / "results" / "benchmarks" / "solvers.jsonl"), *sys.argv[1:]]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status == 0 and "--gram" in command:
        command = [sys.executable, str(ROOT / "benchmarks" / "ksvd_against_htp.py"), "--model", str(models[0].parent)]
        status = subprocess.run([*command, "--run", str(GRAMS.parent)], env=environment, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
