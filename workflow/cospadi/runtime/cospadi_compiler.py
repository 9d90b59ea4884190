"""C compiled on the machine that runs it, once, and kept in a cache that only its user writes; without torch.

Which of several ways of compiling is chosen here, too, for all that is compiled (`cospadi_linear.set_kernels`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("cospadi.runtime")

FLAGS = {"auto": ["-march=native"], "avx2": ["-mavx2", "-mfma", "-mpopcnt"], "generic": []}
CHOICES = (*FLAGS, "torch")
_choice = "auto"


def choose(choice: str) -> None:
    """Compute with this one of `CHOICES` from the next product on."""
    global _choice
    if choice == "avx2":
        import torch

        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            raise ValueError("cpu is 'avx2', which this processor does not have; allowed: auto, generic, torch")
    _choice = CHOICES[CHOICES.index(choice)]  # that very object: layers look whether it is still the same


def chosen() -> str:
    """What `choose` was last told."""
    return _choice


def chosen_in() -> dict[str, Any]:
    """Where that is, under ``_choice``: C looks there before every product."""
    return globals()


def library(source: str, choice: str, more_flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of a C source from the cache, compiled if it is not there or not as it was made.

    Raises
    ------
    OSError, subprocess.SubprocessError
        If there is no compiler, or it fails.
    """
    flags = ["-O3" if choice != "generic" else "-O2", "-shared", "-fPIC", *FLAGS[choice], *more_flags]
    parts = [source, *flags, os.environ.get("CC", ""), processor()]
    name = f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    folder = _cache_folder()
    if folder is not None and _is_as_made(folder / name):
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError as error:  # a file system that forbids to run its files
            logger.info("packed products: %s; compiling for this process alone", error)
            folder = None
    command = compiler()
    # where the cache is of no use, or has no room: compile for this process alone
    for place in (folder, None) if folder is not None else (None,):
        try:
            with tempfile.TemporaryDirectory(dir=place, prefix=".compile-") as work:
                return _compile(source, [*command, *flags], Path(work), None if place is None else place / name)
        except (OSError, subprocess.SubprocessError):
            if place is None:
                raise
    raise AssertionError("unreachable")


def _compile(source: str, command: list[str], work: Path, library: Path | None) -> ctypes.CDLL:
    file, made = work / "kernel.c", work / "kernel.so"
    file.write_text(source)
    command = [*command, "-o", str(made), str(file)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    made.chmod(0o700)
    loaded = ctypes.CDLL(str(made))
    if library is not None:
        digest = work / "digest"
        digest.write_text(_digest(made))
        digest.chmod(0o600)
        # a stop in between leaves a library that its digest does not fit: it is compiled anew
        os.replace(made, library)
        os.replace(digest, _digest_file(library))
    return loaded


def _cache_folder() -> Path | None:
    """Folder that only this user writes into; None where there is none and none can be made."""
    try:
        # a container may run as a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cospadi"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o022:
            folder.chmod(0o700)
        return folder if _is_private(folder, stat.S_ISDIR) else None
    except (OSError, RuntimeError):
        return None


def _is_as_made(library: Path) -> bool:
    """Whether a library of the cache has the bytes that its compiler wrote, and nobody else can have written it."""
    try:
        return (
            _is_private(library, stat.S_ISREG)
            and _is_private(_digest_file(library), stat.S_ISREG)
            and _digest_file(library).read_text() == _digest(library)
        )
    except (OSError, UnicodeDecodeError):
        return False


def _is_private(path: Path, kind: Callable[[int], bool]) -> bool:
    status = path.lstat()
    owners = {0, os.geteuid()} if hasattr(os, "geteuid") else {status.st_uid}
    return kind(status.st_mode) and status.st_uid in owners and not status.st_mode & 0o022


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def compiler() -> list[str]:
    """Command of the C compiler, which may have flags of its own: ``CC='gcc -m64'``."""
    said = os.environ.get("CC")
    try:
        commands = [shlex.split(said)] if said and said.strip() else [["gcc"], ["cc"], ["clang"]]
    except ValueError as error:
        raise FileNotFoundError(f"CC is {said!r}, which is no command: {error}") from error
    for name, *flags in commands:
        if found := shutil.which(name):
            return [found, *flags]
    raise FileNotFoundError(f"no C compiler was found ({', '.join(name for name, *_ in commands)})")


def processor() -> str:
    """What a library for this machine depends on; a home folder may be shared by several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}"
