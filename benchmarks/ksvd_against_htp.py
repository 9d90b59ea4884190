"""Benchmark: the paper's K-SVD and the default solver on real matrices of a finished run, at equal bytes.

``python benchmarks/ksvd_against_htp.py`` after ``make run``. One process, one solver after the other; the error is
``||X (W - D S)|| / ||X W||`` on the calibration data, in float32 before packing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tabulate import tabulate

from cospadi.api import factorize
from cospadi.files import ModelFolder, read_json
from cospadi.gram import read_gram

MATRICES = ("0.q_proj", "3.q_proj", "3.k_proj", "15.o_proj", "15.k_proj", "25.v_proj")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default="resources/models/SmolLM2-135M-Instruct", help="dense model folder"
    )
    parser.add_argument("--run", type=Path, default="results/demo", help="a finished run of that model")
    parser.add_argument("--matrices", nargs="+", default=MATRICES, help="layer.projection")
    parser.add_argument("--ratio", type=float, default=0.2)
    arguments = parser.parse_args()
    if not (arguments.run / "structure.json").exists():
        sys.exit(f"{arguments.run}: no finished run; `make run` makes one")
    structure = read_json(arguments.run / "structure.json")
    folder = ModelFolder(arguments.model)
    rows = []
    for wanted in arguments.matrices:
        layer, projection = wanted.split(".")
        layer = structure["layers"][int(layer)]
        site, name = next(
            (site["name"], matrix["name"])
            for site in layer["sites"]
            for matrix in site["matrices"]
            if matrix["name"].endswith(f".{projection}")
        )
        weight, gram = folder.read_weight(name), read_gram(arguments.run / "gram" / f"{layer['name']}.h5", site)
        row = {"matrix": name, "shape": "x".join(map(str, weight.shape))}
        for solver in ("ksvd", "htp"):
            if not rows:  # compile what is compiled outside the measured time
                factorize(weight[:, :32], gram, ratio=arguments.ratio, solver=solver, max_iter=1)
            started = time.perf_counter()
            factorization = factorize(weight, gram, ratio=arguments.ratio, solver=solver)
            row[f"{solver} s"] = time.perf_counter() - started
            row[f"{solver} error"] = factorization.relative_error(weight, gram)
        row["htp/ksvd error"] = row["htp error"] / row["ksvd error"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".4g"))


if __name__ == "__main__":
    main()
