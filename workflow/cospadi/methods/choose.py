"""Choose: no method that learns, but a variant that is made of the parts of others (`cospadi.choosing`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cospadi.methods import METHODS
from cospadi.problem import GRADIENTS, INDEPENDENT, SEQUENTIAL
from cospadi.registry import Entry, option

# What the losses of variants are measured by, and what parts the model into units: alike in all of them
_ALIKE = ("metric", "column_power", "activation_share", "targets", "group_size")
# By how much a weight that is fitted is another than the model's, which losses are measured against (target sequential)
_MADE_UP = ("drift_share", "residual_share")

INCREASE = "max_perplexity_increase"
SEARCH = "search"

CHOOSE = Entry(
    name="choose",
    summary="Each matrix from the finished variant where its bytes are worth most; nothing is learned again.",
    options={
        "choose_from": option(
            "array",
            "Variants of the same run, of any methods, with metric gradients. Matrices that share a dictionary in one "
            "of them are taken together; any may stay as it is.",
            items={"type": "string"},
            minItems=2,
            uniqueItems=True,
        ),
        INCREASE: option(
            ["number", "null"],
            "In place of a ratio: perplexity over that of the dense model, at most. The fewest bytes that keep to it "
            "are searched for, by up to six choices whose perplexity is measured on the calibration windows that are "
            "kept out (calibration.heldout_fraction); on other text it may be more.",
            minimum=1.0001,
            maximum=1000,
            default=None,
        ),
        SEARCH: option(
            "integer",
            "Swaps of bytes between matrices that are tried, from what is predicted to be best on: one takes a larger "
            "part, others smaller ones. A swap stays where it lowers the divergence from the dense model on the "
            "calibration windows that are kept out (calibration.heldout_fraction). 0: none.",
            minimum=0,
            maximum=100_000,
            default=0,
        ),
    },
)


def choice_faults(variants: Mapping[str, Any], heldout_fraction: float) -> Iterator[str]:
    """What is wrong with variants that choose from others: names that are none, and variants that do not compare."""
    learned = {name: one for name, one in variants.items() if one.get("method") in METHODS}
    comparable = {name: one for name, one in learned.items() if METHODS[one["method"]].scope == "problem"}
    for name, settings in variants.items():
        first = None
        for key in (INCREASE, SEARCH):
            if settings.get(key) and heldout_fraction == 0:
                yield (
                    f"variants.{name}.{key}: is measured on calibration windows that are kept out; set "
                    "calibration.heldout_fraction, to 0.1 say"
                )
        if settings.get(INCREASE) and settings.get(SEARCH):
            yield f"variants.{name}.{SEARCH}: swaps keep to a size; give a ratio in place of {INCREASE}"
        if settings.get(INCREASE) and settings.get("embedding_bits", 16) < 16:
            yield (
                f"variants.{name}.embedding_bits: {settings['embedding_bits']} are not in the perplexity that "
                f"{INCREASE} is of; give a ratio in its place"
            )
        for source in settings.get("choose_from", ()) if settings.get("method") == CHOOSE.name else ():
            where = f"variants.{name}.choose_from: {source}"
            if source not in comparable:
                yield f"{where} is no variant that learns matrix by matrix, in one step; one of {', '.join(comparable)}"
            elif comparable[source]["metric"] != GRADIENTS:
                yield f"{where} does not say what its errors cost; set its metric to {GRADIENTS}"
            elif comparable[source]["target"] == SEQUENTIAL and any(comparable[source][key] > 0 for key in _MADE_UP):
                yield (
                    f"{where} makes up for what its own matrices before each got wrong, and here others are before "
                    f"them; set its {' and '.join(_MADE_UP)} to 0, or its target to {INDEPENDENT}"
                )
            elif comparable[source].get("compensate") is not None:
                yield (
                    f"{where} makes up for what its own matrices before each lost, and here others are before them; "
                    "leave out its compensate"
                )
            elif comparable[source]["distill"] is not None:
                yield f"{where} was trained as a whole, and here others are beside its matrices; leave out its distill"
            else:
                first = first or source
                for key, here, there in _differing(learned[first], learned[source]):
                    yield f"{where} has {key} {there}, {first} has {here}; they have to be alike"


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in _ALIKE:
        here, there = (_of(settings, key) for settings in (one, other))
        if here != there:
            yield key, here, there


def _of(settings: Mapping[str, Any], key: str) -> Any:
    """A setting as the variant's method takes it."""
    if key == "column_power" and not METHODS[settings["method"]].scales_columns:
        return 0.0
    return settings.get(key, 1 if key == "group_size" else None)
