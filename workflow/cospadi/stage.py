"""What every script under ``scripts/`` shares: threads, log file, progress on the console, errors.

Nothing heavy is imported here, and a script imports its own needs inside ``main``: thread counts have to be in the
environment before NumPy, numba or torch are loaded, and a job that packs one layer should not pay for torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import itertools
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from cospadi.errors import machine_fault

Log = Callable[[str], None]

# every library that would otherwise start a thread on each core
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
# what Linux calls the instructions that multiply bfloat16, on x86 and on Arm, and what people call them
_BFLOAT16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's bfloat16"}
# what glibc's malloc.h calls its settings
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# the log file has every line; the console warnings, and one line a job in this many seconds
_CONSOLE_SECONDS = 2.0
# the last line of the log of a job that ended well
_END = re.compile(r" done in [\d.]+ s(?:, ([\d.]+) MB of memory at most)?$")
# files whose locks say that a GPU is taken
_held: list[TextIO] = []


class Every:
    """Says whether so many seconds have passed since it last said so, or since it was made."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def __call__(self) -> bool:
        now = time.perf_counter()
        due = now - self._last >= self._seconds
        if due:
            self._last = now
        return due


def script(main: Callable[[Any, Log], None], snakemake: Any) -> None:
    """Run a script's ``main(snakemake, log)`` with its threads and log file.

    Parameters
    ----------
    main : callable
        The stage's adapter. It can be called by itself with any object that has what it reads (`input`, `output`,
        `params`, ...), so tests need no Snakemake.
    snakemake : object
        What Snakemake gives a script.

    Raises
    ------
    SystemExit
        With status 1 if `main` fails. The console shows the message, the rule's log file the whole traceback.
    """
    set_threads(snakemake.threads)
    taken = take_devices(getattr(snakemake, "resources", {}).get("gpu") or 0)
    # a job told to stop leaves through the exits that remove its unfinished files
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    name = " ".join([snakemake.rule, *filter(None, map(str, snakemake.wildcards))])
    with _log_file(snakemake.log) as file:
        log = _logger(name, file)
        if taken is not None:
            log(f"on GPU {taken}")
        started = time.perf_counter()
        try:
            main(snakemake, log)
        except Exception as error:
            print(traceback.format_exc(), file=file)
            where = f"\n  full traceback: {snakemake.log[0]}" if snakemake.log else ""
            shown = (machine_fault("a file", error) if isinstance(error, OSError) else None) or error
            say(f"[{name}] {type(shown).__name__}: {shown}{where}")
            raise SystemExit(1) from None
        seconds, most = time.perf_counter() - started, peak_memory()
        print(f"{time.strftime('%H:%M:%S')} done in {seconds:.1f} s, {most / 1e6:.1f} MB of memory at most", file=file)


def ended(lines: Sequence[str]) -> float | None:
    """Most bytes of memory that a job held at once, by the lines of its log; 0 where a log is too old to say so.

    None for a job that has not ended, or failed.
    """
    found = _END.search(lines[-1]) if lines else None
    return found and 1e6 * float(found[1] or 0)


def peak_memory() -> int:
    """Most bytes of memory that this process has held at once, as the system counts them: the shortest peak is seen."""
    try:
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):  # no Linux; of what a process was before it became this one, this one may tell too
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def set_threads(count: int) -> None:
    """Let every numerical library use `count` threads; call before they are imported."""
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(count)))
    # threads that wait for each other in a busy loop steal the cores of a shared machine: measured 3 to 4 times slower
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def take_devices(count: int = 1) -> str | None:
    """Make `count` GPUs of several the only ones that this process sees, and hold them until the process ends.

    They are such that no other job of this user on this machine holds; where too few are free, the rest are those that
    the fewest share. Call it before CUDA is asked for anything.

    Returns
    -------
    str or None
        What ``CUDA_VISIBLE_DEVICES`` is now; None where there is nothing to choose from.
    """
    devices = _visible_devices()
    count = min(count, len(devices))
    if count == 0 or len(devices) < 2:
        return None
    import fcntl

    folder = Path(tempfile.gettempdir(), f"cospadi-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    taken: list[str] = []
    for turn in itertools.count():  # in turn 1 all devices have a job already
        for device in devices:
            if device in taken:
                continue
            file = open(folder / f"{device.replace(os.sep, '_')}.{turn}", "w")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _held.append(file)  # the system lets go of it when the process ends, however it ends
            taken.append(device)
            if len(taken) == count:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(sorted(taken, key=devices.index))
                return os.environ["CUDA_VISIBLE_DEVICES"]


def _visible_devices() -> list[str]:
    """GPUs as ``CUDA_VISIBLE_DEVICES`` calls them; CUDA itself would keep what it saw first."""
    if (told := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device.strip() for device in told.split(",") if device.strip()]
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    return [str(number) for number in range(count.value)]


def without_torch() -> None:
    """Have transformers do without torch in this process, unless it is imported already.

    For jobs that need nothing of transformers but tokenizers: torch, and what transformers imports beside it, would be
    most of the seconds that such a job takes.
    """
    if "torch" in sys.modules:
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that models are not there
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's way to say that there is none
    from transformers.utils import is_torch_available

    is_torch_available()  # which keeps its answer
    del sys.modules["torch"]


def keep_freed_memory() -> None:
    """Have the process keep the memory of large arrays that are freed for the next ones, where the C library is glibc.

    It would give each array of more than 32 MiB back to the system and take another, page by page: with the logits of
    a whole window that is a tenth of an evaluation's time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def choose_device(device: str) -> str:
    """``cpu`` or ``cuda`` for the config's `device`; torch is imported only where there is an NVIDIA driver."""
    if device != "auto":
        return device
    if not has_gpu():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_gpu() -> bool:
    """Whether the NVIDIA driver sees a device (``CUDA_VISIBLE_DEVICES`` counts)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def choose_dtype(dtype: str, device: str) -> tuple[str, str]:
    """The dtype to compute in, and why.

    Parameters
    ----------
    dtype : {"auto", "bfloat16", "float16", "float32"}
        From the config. ``auto`` is bfloat16 where `device` multiplies it natively, otherwise float32: a processor
        without such instructions converts every product, which takes several times as long.
    device : str
        ``cpu``, ``cuda`` or ``cuda:1``. torch is imported for CUDA alone.

    Returns
    -------
    dtype : str
        Never ``auto``.
    reason : str
        In words, for log and artifact.
    """
    if dtype != "auto":
        return dtype, "the config asks for it"
    if device.startswith("cuda"):
        import torch

        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "the GPU computes in it") if native else ("float32", "the GPU has no bfloat16 instructions")
    flags = _processor_flags()
    found = [words for flag, words in _BFLOAT16_FLAGS.items() if flag in flags]
    if found:
        return "bfloat16", f"the processor has {' and '.join(found)} instructions"
    if not flags:
        return "float32", "whether the processor has bfloat16 instructions is unknown"
    return "float32", f"the processor has no bfloat16 instructions ({', '.join(_BFLOAT16_FLAGS.values())})"


def _processor_flags() -> frozenset[str]:
    """What the operating system says that the processor can do; nothing where it cannot be asked."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
            return frozenset({"bf16"} if answer.strip() == "1" else ())
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), ()))


@contextlib.contextmanager
def _log_file(paths: Any) -> Iterator[TextIO]:
    """Open the rule's log file; what libraries print, warn or draw as progress bars goes there too."""
    path = Path(paths[0] if paths else os.devnull)
    with _open_log(path) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
        faulthandler.enable(file)
        try:
            yield file
        finally:
            faulthandler.disable()
            logging.captureWarnings(False)
            logging.getLogger().removeHandler(handler)


class _Log(io.FileIO):
    """A log file that never stops the job: what a full disk does not take is lost, and the console is told once."""

    _told = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._tell(error)
            return memoryview(data).nbytes

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # where a network's file system says at last that nothing was stored
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            say(f"lines of the log are lost: {machine_fault(self.name, error) or error}")


def _open_log(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _Log(path, "w")
    except OSError as error:
        say(f"there is no log: {machine_fault(path, error) or error}")
        raw = _Log(os.devnull, "w")
    return io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True)


def say(line: str) -> None:
    """A line to the console, which may be a file on a full disk itself."""
    with contextlib.suppress(OSError):
        print(line, file=sys.__stderr__, flush=True)


def _logger(name: str, file: TextIO) -> Log:
    shown = 0.0

    def log(line: str) -> None:
        nonlocal shown
        print(f"{time.strftime('%H:%M:%S')} {line}", file=file)
        if time.monotonic() - shown >= _CONSOLE_SECONDS or line.startswith("warning: "):
            shown = time.monotonic()
            say(f"[{name}] {line}")

    return log
