"""Errors a user of the workflow can meet. Each says what, where, the value, and the remedy."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, and how many there are more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class CospadiError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(CospadiError):
    """Every fault of a configuration in one message.

    Parameters
    ----------
    faults : sequence of str
        One line a fault: config path, value, what is allowed.
    source : str
        The config file(s) the faults were found in.
    complete : mapping, optional
        The config with its defaults, where it is one that the schema allows: then more can be found out about it.
    """

    def __init__(
        self, faults: Sequence[str], source: str = "config", complete: Mapping[str, Any] | None = None
    ) -> None:
        self.faults = list(faults)
        self.complete = complete
        noun = "fault" if len(self.faults) == 1 else "faults"
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{source}: {len(self.faults)} {noun}\n{lines}")


class MissingFile(str):
    """A fault of a configuration: the file or folder at `path` is not there."""

    path: Path

    @classmethod
    def at(cls, path: Path, fault: str) -> MissingFile:
        """The line to show, and what it is about."""
        one = cls(fault)
        one.path = path
        return one


class ArtifactError(CospadiError):
    """A file the workflow reads is missing, damaged, or does not fit the others.

    Parameters
    ----------
    path : path-like
        The file at fault.
    problem : str
        What is wrong with it, with the value found and the one expected.
    remedy : str
        What the user does about it.
    """

    def __init__(self, path: str | Path, problem: str, remedy: str) -> None:
        self.path = Path(path)
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{path}: {problem}. {remedy}")


class UnsupportedModelError(CospadiError):
    """The architecture is not one this package can take apart; lists those that are."""


class NumericalError(CospadiError):
    """Input values make the mathematics meaningless (NaN, empty Gram, all-zero weight)."""


_AGAIN = "and run again; finished files are kept and good"
_MACHINE_FAULTS = {
    errno.ENOSPC: ("the disk is full", f"Free space, or choose another folder, {_AGAIN}"),
    errno.EDQUOT: ("the quota of this user or group is used up", f"Free space, or choose another folder, {_AGAIN}"),
    errno.EFBIG: ("a file may not become that large here", f"Raise the limit (ulimit -f), {_AGAIN}"),
    errno.EACCES: ("permission denied", f"Give this user the right to read and write there, {_AGAIN}"),
    errno.EPERM: ("operation not permitted", f"Give this user the right to read and write there, {_AGAIN}"),
    errno.EROFS: ("the file system is read-only", f"Choose another folder, or mount it writable, {_AGAIN}"),
    errno.EMFILE: ("too many files are open", f"Raise the limit (ulimit -n), {_AGAIN}"),
    errno.ENFILE: ("too many files are open on this machine", f"Run fewer jobs at once, {_AGAIN}"),
    errno.ENOLCK: (
        "the lock is refused: another process has the file open, or the file system knows no locks",
        "Wait until no other run uses it; where the file system knows no locks, export HDF5_USE_FILE_LOCKING=FALSE; "
        "then run again. The file itself may be good",
    ),
    errno.EIO: ("the disk or the network in front of it fails", f"Look after it (dmesg), {_AGAIN}"),
    errno.ESTALE: ("the network's file system has lost the file", f"Look after the mount, {_AGAIN}"),
    errno.ETIMEDOUT: ("the network's file system does not answer", f"Look after the mount, {_AGAIN}"),
    errno.ENOTCONN: ("the network's file system is not connected", f"Look after the mount, {_AGAIN}"),
}
_MACHINE_FAULTS[errno.EAGAIN] = _MACHINE_FAULTS[errno.ENOLCK]


def machine_fault(path: str | Path, error: BaseException) -> ArtifactError | None:
    """The error to show where `error` is the machine's fault and not that of a file's content; otherwise None."""
    number = _errno_of(error)
    if "lock file" in str(error):
        number = errno.ENOLCK
    if number not in _MACHINE_FAULTS:
        return None
    path = Path(path)
    name = getattr(error, "filename", None)
    # of a temporary file the user knows the final name
    where = Path(name) if isinstance(name, str) and f"/.{path.name}." not in name else path
    problem, remedy = _MACHINE_FAULTS[number]
    if number == errno.ENOSPC:
        folder = next((folder for folder in where.absolute().parents if folder.exists()), Path.cwd())
        problem += f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB left)"
    return ArtifactError(where, problem, remedy)


def _errno_of(error: BaseException) -> int | None:
    """Number of the system's error; HDF5 and safetensors pass on no number, but a message that has it."""
    number = getattr(error, "errno", None)
    if number is not None:
        return number
    said = re.search(r"errno = (\d+)|os error (\d+)", str(error))
    if said:
        return int(said[1] or said[2])
    return next((known for known in _MACHINE_FAULTS if f"{os.strerror(known)}" in str(error)), None)
