"""Names of what jobs are about, and patterns of them for Snakemake's wildcards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cospadi.structure import layer_name


def chunk_name(layers: Sequence[int]) -> str:
    """``00-09`` for consecutive layers 0 to 9."""
    return f"{layers[0]:02d}-{layers[-1]:02d}"


def unit_name(layers: Sequence[int]) -> str:
    """``layer_03`` for layer 3 alone, ``layers_02-03`` for layers 2 and 3."""
    return layer_name(layers[0]) if len(layers) == 1 else f"layers_{chunk_name(layers)}"


def layers_of(unit: str) -> list[int]:
    """Layers of a unit: ``layer_03`` is ``[3]``, ``layers_02-03`` is ``[2, 3]``."""
    first, _, last = unit.partition("_")[2].partition("-")
    return list(range(int(first), int(last or first) + 1))


def parts(n_layers: int, size: int) -> list[range]:
    """Layers 0 to `n_layers` - 1 in consecutive parts of `size`, the last of what is left."""
    return [range(first, min(first + size, n_layers)) for first in range(0, n_layers, size)]


def one_of(names: Iterable[str]) -> str:
    """A regular expression for exactly these names; for none of them, one that nothing matches."""
    # never an empty expression: Snakemake takes that for "anything"
    return f"(?:{'|'.join(map(re.escape, names))})" if names else "(?!)"


def at_step(variant: str, settings: Mapping[str, Any], step: int) -> str:
    """Place in the config of a step of a variant; of the variant itself where it has no others."""
    return f"variants.{variant}.steps.{step}" if "steps" in settings else f"variants.{variant}"


def filled(pattern: str, **wildcards: str) -> str:
    """`pattern` with a value for each of its wildcards; what Snakemake notes on it (a module's prefix) is kept."""
    path = pattern
    for name, value in wildcards.items():
        path = path.replace(f"{{{name}}}", value)
    return pattern.new_from(path) if hasattr(pattern, "new_from") else path
