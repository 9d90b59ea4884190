"""Depth pruning: what a variant of the config calls ``method`` when it removes whole blocks.

A pruner says which blocks go (`selection`) and whether the block before each gap is fitted to make up for them
(`fitting`). What is left is an ordinary dense model of fewer layers (`folding`), so a factorization may follow it.
Adding one means one line in `PRUNERS`, and a way to choose in `selection.CHOICES`.

This module is light: the config and the plan read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cospadi.registry import Entry, choice, option

_RANDOM_STATE = option("integer", "Seed of every random choice.", minimum=0, default=42)
_BLOCKS = option(
    ["integer", "array"],
    "How many blocks go; or which, as a list of their numbers from 0.",
    minimum=1,
    minItems=1,
    items={"type": "integer", "minimum": 0},
    uniqueItems=True,
)
_COUNT = option("integer", "How many blocks go.", minimum=1)
_METRIC = choice(
    ["angular", "angular_last", "cosine", "cosine_worst", "l2"],
    "Distance between what enters and what leaves a cut; the cut with the smallest goes. angular: angle "
    "over pi, mean over all tokens; angular_last: of the last token of each window alone; cosine: 1 - cosine, mean "
    "over all tokens; cosine_worst: of the worst token of each window alone, which spares the block that makes the "
    "massive activations of a few tokens; l2: norm of the difference over that of what enters.",
)

_ITERATED = {
    "loss": choice(
        ["exact", "practical"],
        "Cosine objective: exact compares M T + Y with the target L; practical M T with L - Y.",
        default="exact",
    ),
    "start": choice(
        ["identity", "least_squares"],
        "Cosine objective: where Adam starts; the paper's is identity, from where its lr and epochs are "
        "too few on a small calibration set.",
        default="least_squares",
    ),
    "epochs": option("integer", "Cosine objective: passes over the tokens.", minimum=1, default=10),
    "lr": option("number", "Cosine objective: step size of Adam.", minimum=0, maximum=1, default=1.0e-4),
    "batch_tokens": option("integer", "Cosine objective: tokens a step.", minimum=1, default=1024),
    "l1": option(
        "number",
        "Cosine objective: weight of the sum of |T| over the rows' number (the paper's 1e-4).",
        minimum=0,
        default=0.0,
    ),
    "l2": option(
        "number",
        "Cosine objective: weight of the sum of T^2 over the rows' number (the paper's 1e-2).",
        minimum=0,
        default=0.0,
    ),
    "random_state": {**_RANDOM_STATE, "description": "Cosine objective: seed of the order of the tokens."},
}
_REPLACEME_OPTIONS: dict[str, dict[str, Any]] = {
    "blocks": _BLOCKS,
    "cuts": option(
        "integer",
        "In how many cuts of about equal length the blocks go; each has a transform of its own.",
        minimum=1,
        default=1,
    ),
    "merge": option(
        "boolean", "Whether cuts may touch and become one; false: a block stays between any two.", default=False
    ),
    "metric": {**_METRIC, "default": "cosine_worst"},
    "objective": choice(
        ["least_squares", "cosine"],
        "What the transform minimises. least_squares: in closed form; cosine: by Adam, rows on disk.",
        default="least_squares",
    ),
    "structure": choice(
        ["full", "diagonal", "orthogonal"], "What the transform may be; the last two are ablations.", default="full"
    ),
    "normalize": option(
        "boolean",
        "Least squares: divide each token by the norm of its target first, so that the few tokens of "
        "massive activations count as the others do.",
        default=False,
    ),
    "ridge": option(
        "number", "Least squares: ridge as a fraction of the mean diagonal of M^T M.", minimum=0, default=1.0e-6
    ),
    "prefix": choice(
        ["pruned", "original"],
        "Activations that later cuts are fitted on: of the model with the earlier cuts made, or of the "
        "original model (as in the paper's code).",
        default="pruned",
    ),
    **_ITERATED,
}


@dataclass(frozen=True, kw_only=True)
class Pruner(Entry):
    """A way to remove blocks; ``blocks`` alone among its options has no default.

    Attributes
    ----------
    fits : bool
        Whether a transform is fitted and folded into the block before each cut.
    """

    fits: bool = False


def _replaceme_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings["objective"] != "cosine":
        for name, option in _ITERATED.items():
            if settings[name] != option["default"]:
                yield f"{name}: {settings[name]} means nothing here; it is an option of objective: cosine"
    if isinstance(settings["blocks"], list):
        for name in ("cuts", "merge", "metric"):
            if settings[name] != _REPLACEME_OPTIONS[name]["default"]:
                yield f"{name}: {settings[name]} means nothing here; blocks lists which ones go"
        if 0 in settings["blocks"]:
            yield "blocks: block 0 has none before it that could be fitted; choose blocks from 1 on"
    elif settings["cuts"] > settings["blocks"]:
        yield f"cuts: {settings['cuts']} cuts need as many blocks; {settings['blocks']} go"


def _uidl_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(settings["blocks"], list) and settings["metric"] != "angular_last":
        yield f"metric: {settings['metric']} means nothing here; blocks lists which ones go"


PRUNERS: dict[str, Pruner] = {
    pruner.name: pruner
    for pruner in (
        Pruner(
            name="replaceme",
            summary="Removes blocks and folds a fitted linear map into the one before (ReplaceMe).",
            options=_REPLACEME_OPTIONS,
            fits=True,
            faults=_replaceme_faults,
        ),
        Pruner(
            name="uidl",
            summary="Removes the consecutive blocks over which the activations turn least (UIDL), and nothing else.",
            options={"blocks": _BLOCKS, "metric": {**_METRIC, "default": "angular_last"}},
            faults=_uidl_faults,
        ),
        Pruner(
            name="shortgpt",
            summary="Removes the blocks of least influence, wherever they are (ShortGPT).",
            options={"blocks": _COUNT},
        ),
        Pruner(
            name="random_cut",
            summary="Removes consecutive blocks at a random place, for comparison.",
            options={"blocks": _COUNT, "random_state": _RANDOM_STATE},
        ),
    )
}


def removed_count(settings: Mapping[str, Any]) -> int:
    """Number of blocks that a pruning step removes."""
    blocks = settings["blocks"]
    return len(blocks) if isinstance(blocks, list) else blocks
