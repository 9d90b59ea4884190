"""Libraries of solvers in C, compiled on the machine that learns."""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess

from cospadi.runtime.cospadi_compiler import library

logger = logging.getLogger("cospadi.solvers")


@functools.cache
def compiled(source: str, what: str) -> ctypes.CDLL | None:
    """The library of a C source; None, and a warning that says what is slower now, where no compiler works."""
    try:
        return library(source, "auto")
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("%s: NumPy, which is much slower, because no C compiler works (%s)", what, error)
        return None
