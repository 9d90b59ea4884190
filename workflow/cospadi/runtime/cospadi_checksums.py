"""SHA-256 of every weight file of a packed folder and of every tensor in it, in a file that no loader needs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .cospadi_format import UnreadableError, read_header, read_object

CHECKSUMS = "cospadi_checksums.json"
_ALGORITHM = "sha256"


def write_checksums(folder: str | Path) -> None:
    """Write `CHECKSUMS` of a folder's weight files as they are now."""
    files = {}
    for path in _weight_files(folder):
        tensors = {name: _digest(path, stored.offset, stored.nbytes) for name, stored in read_header(path).items()}
        files[path.name] = {_ALGORITHM: _digest(path), "tensors": dict(sorted(tensors.items()))}
    text = json.dumps({"algorithm": _ALGORITHM, "files": files}, indent=1)
    Path(folder, CHECKSUMS).write_text(text + "\n")


def checksum_faults(folder: str | Path) -> list[str]:
    """Weight files, and the tensors in them, whose bytes are not those that `CHECKSUMS` was written for."""
    try:
        files = read_object(Path(folder, CHECKSUMS)).get("files")
    except UnreadableError as error:
        return [str(error)]
    if not _is_list_of_digests(files):
        return [f"{CHECKSUMS} does not list files and tensors with their {_ALGORITHM}"]
    found = {path.name: path for path in _weight_files(folder)}
    faults = [f"{name}, which {CHECKSUMS} lists, does not exist" for name in sorted(files.keys() - found.keys())]
    faults += [f"{name} is not in {CHECKSUMS}" for name in sorted(found.keys() - files.keys())]
    for name in sorted(files.keys() & found.keys()):
        if _digest(found[name]) != files[name][_ALGORITHM]:
            faults += [f"{name}: {fault}" for fault in _changed(found[name], files[name]["tensors"])]
    return faults


def _changed(path: Path, digests: dict[str, str]) -> list[str]:
    """Which tensors make a file another one."""
    try:
        header = read_header(path)
    except UnreadableError as error:
        return [f"its bytes are not those that were written ({error})"]
    faults = [f"tensor {name} is missing" for name in sorted(digests.keys() - header.keys())]
    faults += [f"tensor {name} was not written with it" for name in sorted(header.keys() - digests.keys())]
    faults += [
        f"the bytes of tensor {name} are not those that were written"
        for name, stored in sorted(header.items())
        if name in digests and _digest(path, stored.offset, stored.nbytes) != digests[name]
    ]
    return faults or ["its header is not the one that was written"]


def _weight_files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def _digest(path: Path, offset: int = 0, nbytes: int | None = None) -> str:
    digest = hashlib.new(_ALGORITHM)
    left = path.stat().st_size - offset if nbytes is None else nbytes
    with open(path, "rb") as file:
        file.seek(offset)
        while left > 0 and (piece := file.read(min(left, 2**22))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _is_list_of_digests(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get(_ALGORITHM), str)
        and isinstance(entry.get("tensors"), dict)
        and all(isinstance(digest, str) for digest in entry["tensors"].values())
        for entry in files.values()
    )
