"""The held-out text, and what is made of it: pieces for the perplexity, documents of the tasks `HELDOUT_TASKS`.

All are local tasks of lm-eval (`TASK_FILES`). Their documents are chosen by bytes and words, never by a model's
tokenizer, so every model of a run is scored on the same text. None of it is in the calibration text, which has other
articles.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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

# questions of the other tasks: words a sentence; choices of next_sentence, and how many sentences the wrong ones are
# away from the right one
_SENTENCE_WORDS = (6, 24)
_CHOICES = 4
_AWAY = 8


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
    return _in_turn(map(_passages, articles))


def _passages(article: str) -> list[str]:
    found = []
    for sentences in _paragraphs(article):
        for last in range(1, len(sentences)):
            together = sentences[max(0, last - _PASSAGE_CONTEXT) : last + 1]
            passage = " ".join(together).rstrip(".!?")
            context, _, word = passage.rpartition(" ")
            fits = _PASSAGE_WORDS[0] <= len(passage.split()) <= _PASSAGE_WORDS[1]
            if fits and re.fullmatch(r"[A-Za-z]{4,}", word) and re.search(rf"\b{word}\b", context):
                found.append(passage)
    return found


def next_sentence_questions(articles: Sequence[str]) -> list[dict[str, Any]]:
    """A sentence, and four of the article of which one comes next, as in HellaSwag.

    The wrong ones are those of nearest length that are at least eight sentences away, so that neither length nor the
    topic tells. Every sentence is whole and of 6 to 24 words, and no answer is part of another question.

    Parameters
    ----------
    articles : sequence of str

    Returns
    -------
    list of dict
        ``query``, ``choices`` (four) and ``gold``, the place of the right one, which goes round; the order is by rank
        in the article, so that a limit takes from all.
    """

    def of_article(article: str) -> list[list[str]]:
        everywhere = [sentence for sentences in _paragraphs(article) for sentence in sentences]
        found = []
        for start, (query, right) in _runs(article, 2):
            place = start + 1
            near = {*everywhere[max(0, place - _AWAY + 1) : place + _AWAY]}
            others = [other for other in dict.fromkeys(everywhere) if _is_whole(other) and other not in near]
            others.sort(key=lambda other: abs(len(other) - len(right)))
            if len(others) >= _CHOICES - 1:
                found.append([query, right, *others[: _CHOICES - 1]])
        return found

    return _questions(articles, of_article)


def sentence_order_questions(articles: Sequence[str]) -> list[dict[str, Any]]:
    """A sentence, and the two after it in their order and in the other: the same words, so that only their order tells.

    Parameters
    ----------
    articles : sequence of str

    Returns
    -------
    list of dict
        As of `next_sentence_questions`, with two choices.
    """

    def of_article(article: str) -> list[list[str]]:
        runs = [run for _, run in _runs(article, 3)]
        return [[query, f"{one} {other}", f"{other} {one}"] for query, one, other in runs if one != other]

    return _questions(articles, of_article)


def _questions(articles: Sequence[str], of_article: Callable[[str], list[list[str]]]) -> list[dict[str, Any]]:
    """Of every article's ``[query, right, wrong ...]``; the right one moves a place on from question to question."""
    found = []
    for number, (query, right, *wrong) in enumerate(_in_turn(map(of_article, articles))):
        gold = number % (1 + len(wrong))
        found.append({"query": query, "choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold})
    return found


def _in_turn(found: Iterable[Sequence[Any]]) -> list[Any]:
    """What was found in the articles: the first of each, then the second of each, and so on."""
    return [one for rank in itertools.zip_longest(*found) for one in rank if one is not None]


def _paragraphs(article: str) -> list[list[str]]:
    """Sentences of every paragraph."""
    return [
        [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph.strip())]
        for paragraph in article.split("\n")
    ]


def _runs(article: str, length: int) -> list[tuple[int, list[str]]]:
    """Whole sentences that follow each other in a paragraph, so many at a time, none twice; and where they start."""
    found, start = [], 0
    for sentences in _paragraphs(article):
        first = 0
        while first + length <= len(sentences):
            run = sentences[first : first + length]
            fits = all(map(_is_whole, run))
            if fits:
                found.append((start + first, run))
            first += length if fits else 1
        start += len(sentences)
    return found


def _is_whole(sentence: str) -> bool:
    """Whether it ends like a sentence, and not with an abbreviation or an initial; and has the right length."""
    least, most = _SENTENCE_WORDS
    return least <= len(sentence.split()) <= most and bool(re.search(r"([a-z]{4}|\d\d)[.!?]$", sentence))


def last_word_dataset(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents of the lm-eval task ``last_word``, made from the task manager's metadata."""
    return _dataset(heldout, "last_word", lambda articles: [{"text": text} for text in last_word_passages(articles)])


def next_sentence_dataset(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Those of ``next_sentence``."""
    return _dataset(heldout, "next_sentence", next_sentence_questions)


def sentence_order_dataset(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Those of ``sentence_order``."""
    return _dataset(heldout, "sentence_order", sentence_order_questions)


def _dataset(
    heldout: str, task: str, make: Callable[[Sequence[str]], list[dict[str, Any]]]
) -> dict[str, datasets.Dataset]:
    documents = make(_read_articles(Path(heldout)))
    if not documents:
        raise ArtifactError(heldout, f"holds no passage for the task {task}", "Give more text, or leave the task out")
    return {"test": datasets.Dataset.from_list(documents)}


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
