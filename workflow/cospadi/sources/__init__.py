"""Where model and text come from: one entry a kind of source, found by its name in the config, with its options.

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
from cospadi.sources import models, rotation, texts
from cospadi.sources.base import Source, called
from cospadi.sources.models import check_model_folder, embedding_rows, structural
from cospadi.sources.texts import needs_template, read_documents

__all__ = [
    "MODEL_SOURCES",
    "TEXT_SOURCES",
    "check_model_folder",
    "embedding_rows",
    "fetch_model",
    "fetch_text",
    "needs_template",
    "planning_config",
    "read_documents",
    "structural",
]

MODEL_SOURCES = {source.name: source for source in models.SOURCES}
TEXT_SOURCES = {source.name: source for source in texts.SOURCES}


def planning_config(
    model: Mapping[str, Any], *, root: str | Path = ".", resources: str | Path = "resources"
) -> dict[str, Any]:
    """Content of the model's ``config.json``, known before the model is fetched.

    The list of layers, and with it the list of jobs, follows from it when the Snakefile is parsed, so nothing heavy is
    imported here.

    Parameters
    ----------
    model : mapping
        The ``model`` section of a complete config.
    root : path-like
        What relative paths in the config are relative to.
    resources : path-like
        Where the ``config.json`` of a hub model is kept, so that it is asked for once.

    Raises
    ------
    ArtifactError
        If the file is missing or is no model configuration, or the hub does not give it.
    """
    path, _, remedy = called(MODEL_SOURCES[model["source"]].plan, model, Path(root), Path(resources))
    return _planned(model, path, remedy)


def _planned(model: Mapping[str, Any], path: Path, remedy: str) -> dict[str, Any]:
    config = models.read_planning_config(path, remedy)
    return config if model.get("rotate") is None else rotation.planned(config)


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
        The ``model`` section of a complete config; ``source`` is a key of `MODEL_SOURCES`.
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
    source = _registered(MODEL_SOURCES, model, "model")
    path, what, remedy = called(source.plan, model, Path(root), Path(resources))
    if source.read is None:
        check_model_folder(path.parent, log=log)
        return path.parent
    planned = _planned(model, path, remedy)
    with _making(Path(output)) as temporary:
        called(source.read, model, temporary, Path(root), log)
        if model.get("rotate") is not None:
            rotation.rotate(temporary, model["rotate"], log=log)
        check_model_folder(temporary, log=log)
        models.check_plan(what, temporary, planned)
    log(f"model ready in {output}")
    return Path(output)


def fetch_text(
    text: Mapping[str, Any],
    output: str | Path,
    *,
    root: str | Path = ".",
    model: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Bring text here and split it: ``calibration.jsonl``, ``heldout.jsonl``, ``ORIGIN.md`` in folder `output`.

    The split is by document, seeded; equal sources and settings give equal bytes.

    Parameters
    ----------
    text : mapping
        The ``text`` section of a complete config; ``source`` is a key of `TEXT_SOURCES`.
    output : path-like
        The folder to write.
    root : path-like
        What relative paths in the config are relative to.
    model : path-like, optional
        Folder of the model whose chat template makes text of conversations.
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
        If the text cannot be had, is damaged or too little to be split, or the model has no chat template. `output` is
        then as before.
    """
    output = Path(output)
    source = _registered(TEXT_SOURCES, text, "text")
    with _making(output) as temporary:
        documents, origin = called(source.read, text, temporary, Path(root), log)
        documents = texts.rendered(documents, model)
        try:
            parts = texts.split_documents(documents, text["heldout_fraction"], text["seed"])
        except ValueError as error:
            remedy = "Give more text: blank lines (file) or lines (jsonl, chat) part documents"
            raise ArtifactError(output, str(error), remedy) from error
        temporary.mkdir()
        for name, part in zip(("calibration", "heldout"), parts, strict=True):
            texts.write_documents(temporary / f"{name}.jsonl", part)
            log(f"{name}: {len(part)} documents, {sum(len(document[1]) for document in part)} characters")
        models.write_origin(temporary, output.name, origin)
    return output


def _registered(sources: Mapping[str, Source], section: Mapping[str, Any], name: str) -> Source:
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
