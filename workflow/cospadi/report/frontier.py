"""The frontier: which variant is best for how many bytes."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cospadi.embeddings import asked_of
from cospadi.files import replacing
from cospadi.methods import METHODS

COLUMNS = (
    *("class", "method", "variant", "bits", "ratio", "bytes", "perplexity", "kl", "word_perplexity"),
    *("recovery", "accuracy", "mean_relative_error", "seconds_learning", "model_bytes"),
)
# Sizes within a percent of each other are compared as one
SAME_SIZE = 0.01


class Bytes(NamedTuple):
    """Which bytes models are drawn by: key of a variant in the summary, and words for what they are of."""

    key: str
    what: str


def bytes_of(summary: Mapping[str, Any]) -> Bytes:
    """Those of the target matrices; of the whole file where a variant makes the embedding smaller, too."""
    if any(_rounds_embedding(variant["config"]) for name, variant in summary["variants"].items() if name != "dense"):
        return Bytes("model_bytes", "the whole model")
    return Bytes("target_bytes", "the compressed matrices")


def rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a variant with the keys `COLUMNS`, the dense model first, then by class and size.

    ``class`` is ``16-bit`` where every stored value has 16 bits and ``any-bits`` otherwise; ``bits`` are bits in the
    file a weight of the target matrices, masks, scales and dictionaries counted; ``ratio`` is the share of their bytes
    that is gone; ``perplexity`` is a token's, ``kl`` the mean divergence from the dense model in nats a token;
    ``accuracy`` the mean over the tasks; ``model_bytes`` are those of the whole file, embedding and head included.
    """
    variants = summary["variants"]
    weights = variants["dense"]["target_bytes"] / 2
    found = [
        {
            "class": _class(variant["config"], variants),
            "method": variant["method"] if name != "dense" else "dense",
            "variant": name,
            "bits": 8 * variant["target_bytes"] / weights if weights else None,
            "ratio": variant["ratio_true"],
            "bytes": variant["target_bytes"],
            "perplexity": variant["token_perplexity"],
            "accuracy": variant["mean_accuracy"],
            **{key: variant[key] for key in ("kl", "word_perplexity", "recovery", "mean_relative_error")},
            **{key: variant[key] for key in ("seconds_learning", "model_bytes")},
        }
        for name, variant in variants.items()
    ]
    return sorted(found, key=lambda row: (row["variant"] != "dense", row["class"], -row["bytes"]))


def _class(config: Mapping[str, Any], variants: Mapping[str, Any]) -> str:
    if sources := config.get("choose_from"):
        return max((_class(variants[name]["config"], variants) for name in sources), key=lambda of: of != "16-bit")
    if _rounds_embedding(config):
        return "any-bits"
    learned = [step for step in config.get("steps", [config]) if "codes" in step]
    codes = [step["codes"] for step in learned]
    of_16 = all(part["value_bits"] == part["dictionary_bits"] == 16 for part in codes)
    return "16-bit" if of_16 and not any(METHODS[step["method"]].own_codec for step in learned) else "any-bits"


def _rounds_embedding(config: Mapping[str, Any]) -> bool:
    return any(asked_of(step)[0] < 16 for step in config.get("steps", [config]))


def front(points: Mapping[str, tuple[float, float]], *, least: bool = True) -> list[str]:
    """Names of the points (bytes, score) that no other beats which is as small or smaller, in the order of their bytes.

    As small: within `SAME_SIZE`, so that a few bytes less make no point good. `least`: whether a small score is good.
    """
    sign = 1 if least else -1
    best = [
        name
        for name, (nbytes, score) in points.items()
        if not any(
            other <= (1 + SAME_SIZE) * nbytes and sign * theirs < sign * score for other, theirs in points.values()
        )
    ]
    return sorted(best, key=lambda name: points[name])


def sizes(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every size, and class, that two variants or more were measured at: the best one and the next.

    A row has ``class``, ``ratio`` (mean true one), ``best`` and ``next`` (names), and ``perplexity``,
    ``next_perplexity``, ``over_dense`` (perplexities a token, and the best one's over the dense model's).
    """
    key = bytes_of(summary).key.removeprefix("target_")
    measured = [row for row in rows(summary) if row["perplexity"] is not None]
    dense = next((row["perplexity"] for row in measured if row["variant"] == "dense"), None)
    compressed = [row for row in measured if row["variant"] != "dense"]
    table = []
    for name, of_class in itertools.groupby(compressed, key=lambda row: row["class"]):
        alike: list[list[dict[str, Any]]] = []
        for row in sorted(of_class, key=lambda row: -row[key]):
            if alike and alike[-1][0][key] - row[key] <= SAME_SIZE * alike[-1][0][key]:
                alike[-1].append(row)
            else:
                alike.append([row])
        for same in alike:
            first, *others = sorted(same, key=lambda row: row["perplexity"])
            if not others:
                continue
            table.append(
                {
                    "class": name,
                    "ratio": sum(row["ratio"] for row in same) / len(same),
                    "best": first["variant"],
                    "perplexity": first["perplexity"],
                    "over_dense": first["perplexity"] / dense if dense else None,
                    "next": others[0]["variant"],
                    "next_perplexity": others[0]["perplexity"],
                }
            )
    return table


def write_frontier(summary: Mapping[str, Any], path: Path) -> None:
    """``frontier.tsv``: the rows, numbers with six digits, empty where nothing was measured."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for row in rows(summary):
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def family(names: Sequence[str]) -> str:
    """What variants are called that differ only in how much they remove."""
    parts = [name.split("-") for name in names]
    common = [words[0] for words in zip(*parts, strict=False) if len(set(words)) == 1]
    return "-".join(common) or names[0]
