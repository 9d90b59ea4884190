"""The held-out text, and what is made of it: pieces for the perplexity, passages for the task ``last_word``.

Both are local tasks of lm-eval (`TASK_FILES`). Their documents are chosen by bytes and words, never by a model's
tokenizer, so every model of a run is scored on the same text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from cospadi.errors import ArtifactError, ConfigError
from cospadi.files import explaining

TASK_FILES = Path(__file__).parent / "task_files"

# English has 4.4 to 4.7 bytes a token under the tokenizers of today, a twentieth of it less than 3.7: a piece of
# 3.5 bytes for each token of the window fits it almost always. A piece that does not costs a second full window.
BYTES_PER_TOKEN = 4.5
PIECE_BYTES_PER_TOKEN = 3.5

# passages of the task last_word: long enough to tell what its last word is
_PASSAGE_CONTEXT = 4  # sentences before the last
_PASSAGE_WORDS = (30, 150)


def heldout_pieces(articles: Sequence[str], *, max_tokens: int | None, window: int) -> list[str]:
    """Cut articles into pieces of one window and take about `max_tokens` tokens of them, spread over all articles.

    First pieces of the articles come first, then second pieces, and so on; of a round that does not fit the budget,
    evenly spaced ones are taken. A piece ends at white space. Sizes are counted in UTF-8 bytes.

    Parameters
    ----------
    articles : sequence of str
    max_tokens : int or None
        Budget, at 4.5 bytes a token; None: take everything.
    window : int
        Tokens of context; a piece has at most 3.5 bytes for each, so that it fits one window.
    """
    max_tokens = math.inf if max_tokens is None else max_tokens
    size = round(PIECE_BYTES_PER_TOKEN * min(window, max_tokens))
    budget = BYTES_PER_TOKEN * max_tokens
    cut = [_cut(article, size) for article in articles]
    chosen: list[str] = []
    for rank in range(max(map(len, cut), default=0)):
        candidates = [pieces[rank] for pieces in cut if len(pieces) > rank]
        mean = sum(len(piece.encode()) for piece in candidates) / len(candidates)
        left = (budget - sum(len(piece.encode()) for piece in chosen)) / mean
        if left < len(candidates):
            count = round(left)
            if not chosen:
                count = max(1, count)
            chosen += [candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count)]
            break
        chosen += candidates
    return chosen


def heldout_dataset(heldout: str, max_tokens: int | None, window: int, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents of the lm-eval task ``heldout``, made from the task manager's metadata."""
    pieces = read_pieces(Path(heldout), {"max_tokens": max_tokens, "window": window})
    return {"test": datasets.Dataset.from_dict({"text": pieces})}


def last_word_passages(articles: Sequence[str]) -> list[str]:
    """Passages whose last word can be guessed: it stands in them before, as most answers of LAMBADA do.

    A passage is a sentence and the up to four before it in its paragraph, 30 to 150 words without the end mark; its
    last word is of at least four letters. Unlike LAMBADA's, nobody checked that people guess them.

    Parameters
    ----------
    articles : sequence of str

    Returns
    -------
    list of str
        Every passage is ``"context word"``; the order is by rank in the article, so that a limit takes from all.
    """
    found: list[tuple[int, str]] = []
    for article in articles:
        rank = 0
        for paragraph in article.split("\n"):
            sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph.strip())
            for last in range(1, len(sentences)):
                together = sentences[max(0, last - _PASSAGE_CONTEXT) : last + 1]
                passage = " ".join(" ".join(together).split()).rstrip(".!?")
                context, _, word = passage.rpartition(" ")
                fits = _PASSAGE_WORDS[0] <= len(passage.split()) <= _PASSAGE_WORDS[1]
                if fits and re.fullmatch(r"[A-Za-z]{4,}", word) and re.search(rf"\b{word}\b", context):
                    found.append((rank, passage))
                    rank += 1
    return [passage for _, passage in sorted(found, key=lambda entry: entry[0])]


def last_word_dataset(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents of the lm-eval task ``last_word``, made from the task manager's metadata."""
    passages = last_word_passages(_read_articles(Path(heldout)))
    if not passages:
        raise ArtifactError(heldout, "holds no passage for the task last_word", "Give more text, or leave the task out")
    return {"test": datasets.Dataset.from_dict({"text": passages})}


def read_pieces(heldout: Path | None, options: Mapping[str, Any]) -> list[str]:
    if heldout is None:
        raise ConfigError(["evaluation.perplexity: needs a held-out text"])
    articles = _read_articles(heldout)
    pieces = heldout_pieces(articles, max_tokens=options["max_tokens"], window=options["window"])
    if not pieces:
        raise ArtifactError(heldout, f"holds no text ({len(articles)} articles)", "Fetch the text again")
    return pieces


def _read_articles(heldout: Path) -> list[str]:
    remedy = 'Fetch the text again; one JSON object {"title", "text"} a line is expected'
    articles = []
    try:
        with explaining(heldout), open(heldout, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    articles.append(json.loads(line)["text"].strip())
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ArtifactError(heldout, f"line {number} is not an article ({error!r})", remedy) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(heldout, f"cannot be read ({error})", remedy) from error
    return articles


def _cut(article: str, size: int) -> list[str]:
    """`article` in pieces of at most `size` bytes that end at white space, where there is any."""
    pieces, rest = [], article.strip().encode()
    while len(rest) > size:
        head = rest[: size + 1].decode(errors="ignore")
        end = max(head.rfind(" "), head.rfind("\n"))
        if end <= 0:
            head = rest[:size].decode(errors="ignore")
            end = len(head)
        pieces.append(head[:end].strip())
        rest = rest[len(head[:end].encode()) :].lstrip()
    return [piece for piece in (*pieces, rest.decode()) if piece]
