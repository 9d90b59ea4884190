"""Outside: the files that a run reads where they lie and that no rule makes, and digests of what is in them.

Snakemake knows such a file by its time alone, and a folder by the time at which a file came or went. So rules take
them as inputs whose time does not count (`untimed`), which only have to be there, and carry a digest of the part that
they read as a parameter: a file that is edited in place, or replaced by an older one, is seen, and one that a rule
does not read makes nothing run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cospadi.digests import files_digest
from cospadi.files import read_json, write_json

WEIGHTS, TOKENIZER, ALL = "weights", "tokenizer", "all"
# What the rules read of a model's folder: weights and their sizes; what makes tokens of text and is read when text is
# generated; all that travels into every folder that is made from it
_PARTS = {
    WEIGHTS: ("config.json", "*.safetensors", "*.safetensors.index.json"),
    TOKENIZER: ("*.json", "*.model", "*.txt", "*.jinja", "*/*.jinja"),
    ALL: ("*", "*/*.jinja"),
}
# neither read nor carried on
_IGNORED = (".*", "*.bin", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx")


def untimed(path: str) -> str:
    """An input of a rule whose time does not count, and which a module's prefix does not move."""
    from snakemake.io import ancient, local  # only rules ask; the library does without Snakemake

    return local(ancient(path))


def model_digest(folder: str | Path, part: str) -> str:
    """Digest of a part (`WEIGHTS`, `TOKENIZER`, `ALL`) of a model's folder."""
    folder = Path(folder)
    found = {path for pattern in _PARTS[part] for path in folder.glob(pattern)}
    read = (path for path in found if path.is_file() and not any(map(path.match, _IGNORED)))
    return files_digest(read, folder)


def remember_fetched(folder: str | Path) -> None:
    """Note what a fetched model's folder holds, so that `edited_digest` knows when someone edits it."""
    write_json(_note(Path(folder)), {part: model_digest(folder, part) for part in _PARTS})


def edited_digest(folder: str | Path, part: str) -> str | None:
    """`model_digest` of a part of a fetched model that is not as it was fetched; None if it is, or is not there yet."""
    note = _note(Path(folder))
    if not note.exists() or not Path(folder).exists():
        return None
    digest = model_digest(folder, part)
    return None if read_json(note).get(part) == digest else digest


def _note(folder: Path) -> Path:
    return folder.parent / ".fetched" / f"{folder.name}.json"


def text_files(text: Mapping[str, Any] | None) -> list[str]:
    """The local files that the config's section ``text`` names, as inputs; none for a source that is fetched."""
    parts = [text, *text.get("sources", ())] if text else []
    return [untimed(part["path"]) for part in parts if "path" in part]
