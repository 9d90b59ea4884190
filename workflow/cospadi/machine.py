"""Machine: how fast this one is, by a benchmark of half a minute.

``python -m cospadi.machine`` (`make calibrate`) writes ``resources/machine.json``. From then on plans, the time limits
of SLURM jobs and the minutes that are left are of this machine; before, of the one that `work.REFERENCE` is. On a
cluster it is run on a node that computes: ``srun make calibrate``.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tabulate import tabulate

from cospadi.errors import ArtifactError, CospadiError
from cospadi.files import read_json, write_json
from cospadi.stage import choose_dtype, has_gpu, set_threads
from cospadi.work import FACTOR, FORWARD, GPU_FORWARD, GPU_PRODUCT, GRAM, LOOP, PRODUCT, READ, REFERENCE, START, Machine

FILE = Path("resources/machine.json")
FORMAT_VERSION = 1
_REMEDY = "Delete it, or write it anew with make calibrate"
_SECONDS, _TURNS = 1.5, 3  # a kind is measured at least this long, and so many times
_DISK_BYTES = 2**27
_IMPORTS = "import torch, transformers.modeling_utils"

# What the same measurements give on the reference machine, both of its cores busy: its rates in whole jobs are others
_MEASURED = {FORWARD: 95e9, GRAM: 86e9, PRODUCT: 29e9, FACTOR: 34e9, LOOP: 100.0, START: 0.18}
# and of what a GPU does in one large product, jobs are assumed to reach so much
_GPU_SHARES = {GPU_FORWARD: 0.1, GPU_PRODUCT: 0.25}


def read_machine(path: str | Path = FILE) -> Machine:
    """The machine that `measure` found; `REFERENCE` where none was measured.

    Raises
    ------
    ArtifactError
        If the file is none.
    """
    if not Path(path).exists():
        return REFERENCE
    found = read_json(path, _REMEDY)
    rates = found.get("rates")
    if found.get("format_version") != FORMAT_VERSION or not isinstance(rates, dict):
        raise ArtifactError(path, f"is no measurement of a machine of version {FORMAT_VERSION}", _REMEDY)
    for kind, rate in rates.items():
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if kind not in REFERENCE.rates or not number or not 0 < rate < math.inf:
            raise ArtifactError(path, f"rates.{kind}: {rate!r}; a number above zero of {', '.join(_KINDS)}", _REMEDY)
    return Machine({**REFERENCE.rates, **rates}, str(found.get("words", "")))


_KINDS = tuple(REFERENCE.rates)


def measure(folder: str | Path, log: Callable[[str], None] = print) -> Machine:
    """Measure this machine, one core of it, and its GPU if it has one.

    Parameters
    ----------
    folder : path-like
        On the disk that is measured.
    log : callable
        Gets a line a kind.
    """
    dtype, reason = choose_dtype("auto", "cpu")
    log(f"forward passes in {dtype}: {reason}")
    rates = {READ: _disk(Path(folder))}
    log(f"{READ}: {rates[READ] / 1e6:.0f} MB/s")
    for kind, operations in _operations(dtype).items():
        raw = _rate(operations, _core_seconds)
        rates[kind] = REFERENCE.rates[kind] * raw / _MEASURED[kind]
        log(f"{kind}: {raw:.4g} a second")
    words = f"{_processor()}, {os.cpu_count()} cores, {dtype}"
    if has_gpu():
        found, name = _gpu()
        rates, words = rates | found, f"{words}; {name}"
    return Machine(rates, words)


def _operations(dtype: str) -> dict[str, Callable[[], float]]:
    """Kind to a function that does some of it and says how many operations that were."""
    import numpy as np
    import scipy.linalg
    import torch

    from cospadi.solvers import htp
    from cospadi.solvers._kernels import ksvd_sweep

    draw = np.random.default_rng(0)
    rows = draw.standard_normal((2048, 1024)).astype(np.float32)
    weight = torch.from_numpy(draw.standard_normal((2048, 1024)).astype(np.float32)).to(getattr(torch, dtype))
    tokens = torch.from_numpy(rows).to(weight.dtype)
    square = rows[:512].astype(np.float64) @ rows[:512].T.astype(np.float64)
    d, n, k = 384, 1024, 288
    target = rows[:n, :d].T.copy()
    start = np.linalg.qr(target[:, :k])[0].astype(np.float32)

    def forward() -> float:
        torch.nn.functional.linear(tokens, weight)
        return 2.0 * tokens.numel() * len(weight)

    def gram() -> float:
        rows.T @ rows  # NumPy does half of it
        return 2.0 * rows.size * rows.shape[1]

    def product() -> float:
        rounds = 2
        htp.learn(target, n_atoms=k, n_nonzero_coefs=k // 2, dictionary_init=start, max_iter=rounds, tol=0.0)
        return float(rounds * (10 * n * k * k + 6 * n * k * d + 2 * k * k * d))

    def factor() -> float:
        scipy.linalg.eigh(square)
        return 10.0 * len(square) ** 3

    def loop() -> float:
        codes = np.ascontiguousarray(draw.standard_normal((n, 64)), np.float32)
        ksvd_sweep(target.T.copy(), np.ascontiguousarray(start.T[:64]), codes, 2)
        return 1.0

    def starting() -> float:
        subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
        return 1.0

    return {FORWARD: forward, GRAM: gram, PRODUCT: product, FACTOR: factor, LOOP: loop, START: starting}


def _rate(operations: Callable[[], float], clock: Callable[[], float]) -> float:
    """Operations a second in the fastest of some turns; the first compiles and is not counted."""
    operations()
    best, begun, turns = 0.0, clock(), 0
    while turns < _TURNS or clock() - begun < _SECONDS:
        started = clock()
        count = operations()
        best, turns = max(best, count / (clock() - started)), turns + 1
    return best


def _core_seconds() -> float:
    """Of this process and those it started: others that compute beside it do not count."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _disk(folder: Path) -> float:
    """Bytes a second that are written to the disk, and read from it again."""
    folder.mkdir(parents=True, exist_ok=True)
    block = os.urandom(2**22)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # out of the system's memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        while file.read(len(block)):
            pass
        return 2 * _DISK_BYTES / (time.perf_counter() - started)


def _gpu() -> tuple[dict[str, float], str]:
    import torch

    rates = {}
    for kind, dtype in ((GPU_FORWARD, torch.bfloat16), (GPU_PRODUCT, torch.float32)):
        square = torch.randn(8192, 8192, device="cuda", dtype=dtype)

        def product(square: torch.Tensor = square) -> float:
            square @ square
            torch.cuda.synchronize()
            return 2.0 * len(square) ** 3

        rates[kind] = _GPU_SHARES[kind] * _rate(product, time.perf_counter)
    return rates, torch.cuda.get_device_name()


def _processor() -> str:
    """What Linux calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "a processor")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(prog="python -m cospadi.machine", description=__doc__)
    parser.add_argument("--output", type=Path, default=FILE, help=f"default: {FILE}, which plans read")
    options = parser.parse_args(arguments)
    set_threads(1)
    try:
        machine = measure(options.output.parent)
        rates = dict(machine.rates)
        write_json(options.output, {"format_version": FORMAT_VERSION, "words": machine.words, "rates": rates})
    except CospadiError as error:
        raise SystemExit(str(error)) from None
    rows = [[kind, rate, rate / REFERENCE.rates[kind]] for kind, rate in rates.items()]
    print(f"\n{machine.words}\n")
    print(tabulate(rows, headers=["kind", "a second, in whole jobs", "times the reference"], floatfmt=".3g"))
    print(f"\n{options.output}: plans, time limits and the minutes left are of this machine from now on")


if __name__ == "__main__":
    main()
