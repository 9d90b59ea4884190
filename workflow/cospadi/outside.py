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

# What the rules read of a model's folder: its weights and sizes; what makes tokens of text and generates it (all other
# small files that programs read); what travels along beside them into every folder made from it.
WEIGHTS, TOKENIZER, REST = "weights", "tokenizer", "rest"
_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja", "*/*.jinja")
_REST = ("*",)
# neither travels nor is read
_IGNORED = ("README*", ".*", "*.bin", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx")


def untimed(path: str) -> str:
    """An input of a rule whose time does not count."""
    from snakemake.io import ancient  # only rules ask; the library does without Snakemake

    return ancient(path)


def model_digest(folder: str | Path, *parts: str) -> str:
    """Digest of some parts (`WEIGHTS`, `TOKENIZER`, `REST`) of a model's folder."""
    folder = Path(folder)
    files = {part: set[Path]() for part in (WEIGHTS, TOKENIZER, REST)}
    for part, patterns in ((WEIGHTS, _WEIGHTS), (TOKENIZER, _TOKENIZER), (REST, _REST)):
        found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        files[part] = found.difference(*files.values())
    chosen = {path for part in parts for path in files[part]}
    return files_digest((path for path in chosen if not any(map(path.match, _IGNORED))), folder)


def text_files(text: Mapping[str, Any] | None) -> list[str]:
    """The local file that the config's section ``text`` names, as an input; none for a source that is fetched."""
    return [untimed(text["path"])] if text and "path" in text else []
