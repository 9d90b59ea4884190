"""Which blocks go, and what a choice belongs to. Blocks are numbered from 0; a cut is a range of consecutive blocks.

The first block stays in every choice by distance: there is none before it that could make up for the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.errors import ConfigError
from cospadi.files import read_json
from cospadi.provenance import check_provenance, digest_of

FORMAT_VERSION = 1


def cuts_of(blocks: Sequence[int]) -> list[range]:
    """Runs of consecutive numbers in `blocks`, from front to back."""
    cuts: list[range] = []
    for block in sorted(blocks):
        if cuts and cuts[-1].stop == block:
            cuts[-1] = range(cuts[-1].start, block + 1)
        else:
            cuts.append(range(block, block + 1))
    return cuts


def contiguous(distance: Sequence[Sequence[float]], count: int) -> range:
    """The cut of `count` blocks with the smallest distance; the earliest of equals.

    Parameters
    ----------
    distance : sequence of sequences
        ``distance[start][length - 1]``: between what enters block `start` and what leaves `length` blocks on.
    count : int
        Less than the number of blocks.
    """
    return several(distance, count, 1)[0]


def several(distance: Sequence[Sequence[float]], count: int, cuts: int, *, merge: bool = False) -> list[range]:
    """`count` blocks in non-overlapping cuts of about equal length, the one of smallest distance first (greedy).

    Parameters
    ----------
    distance : as in `contiguous`
    count, cuts : int
        Longer cuts are placed before shorter ones where `cuts` does not divide `count`.
    merge : bool
        Whether cuts may touch; those that do become one.

    Returns
    -------
    list of range
        From front to back.

    Raises
    ------
    ConfigError
        If they do not fit between each other.
    """
    n_blocks = len(distance)
    lengths = [count // cuts + (index < count % cuts) for index in range(cuts)]
    gap = 0 if merge else 1
    chosen: list[range] = []
    for length in lengths:
        free = [
            start
            for start in range(1, n_blocks - length + 1)
            if all(start >= cut.stop + gap or start + length + gap <= cut.start for cut in chosen)
        ]
        if not free:
            raise ConfigError(
                [
                    f"blocks, cuts: {cuts} cuts with {count} blocks in all find no place in {n_blocks} blocks; "
                    f"{len(chosen)} did. Take fewer of them, or merge: true"
                ]
            )
        start = min(free, key=lambda start: distance[start][length - 1])
        chosen.append(range(start, start + length))
    return cuts_of([block for cut in chosen for block in cut])


def least_influence(influence: Sequence[float], count: int) -> list[range]:
    """The `count` blocks of least influence (ShortGPT's BI), as cuts; the earlier of equals."""
    order = np.argsort(np.asarray(influence), kind="stable")
    return cuts_of([int(block) for block in order[:count]])


def random_cut(n_blocks: int, count: int, random_state: int) -> range:
    """`count` consecutive blocks at a random place."""
    start = int(np.random.default_rng(random_state).integers(1, n_blocks - count + 1))
    return range(start, start + count)


def _replaceme(settings: Mapping[str, Any], distances: Mapping[str, Any]) -> list[range]:
    metric = distances["metrics"][settings["metric"]]
    return several(metric, settings["blocks"], settings["cuts"], merge=settings["merge"])


CHOICES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], list[range]]] = {
    "replaceme": _replaceme,
    "uidl": lambda settings, distances: [contiguous(distances["metrics"][settings["metric"]], settings["blocks"])],
    "shortgpt": lambda settings, distances: least_influence(distances["block_influence"], settings["blocks"]),
    "random_cut": lambda settings, distances: [
        random_cut(distances["n_layers"], settings["blocks"], settings["random_state"])
    ],
}


def provenance(structure: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the choice of a pruning step, and all that is fitted to it, belongs to: version, model, settings."""
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": structure["fingerprint"],
        "settings": digest_of(dict(settings)),
    }


def read_distances(
    path: str | Path, structure: Mapping[str, Any], *, samples: int | None, calibration: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `distances.measure` found, from its file.

    Parameters
    ----------
    path : path-like
    structure : mapping
        From `structure.inspect_model`.
    samples : int or None
        Windows that the distances have to be of; None: all.
    calibration : mapping, optional
        What else they have to be of (`activations.calibration_of`).

    Raises
    ------
    ArtifactError
        If they are of another model or version, or of other windows.
    """
    remedy = "Delete it and run again to measure the distances anew"
    distances = read_json(path, remedy)
    belongs = {"format_version": FORMAT_VERSION, "fingerprint": structure["fingerprint"], "samples": samples}
    check_provenance(path, distances, {**belongs, **(calibration or {})}, remedy)
    return distances


def choose(
    distances_file: str | Path,
    structure: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    samples: int | None,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The blocks that a pruning step removes, from a file of distances.

    Parameters
    ----------
    distances_file, structure, samples, calibration
        As of `read_distances`.
    settings : mapping
        As in `select`.

    Returns
    -------
    dict
        That of `select`, with what it belongs to.

    Raises
    ------
    ConfigError
        As `select`.
    ArtifactError
        As `read_distances`.
    """
    distances = read_distances(distances_file, structure, samples=samples, calibration=calibration)
    of_windows = {key: distances[key] for key in ("tokens", "dtype", "dtype_reason")}
    return {**select(settings, distances), **provenance(structure, settings), **of_windows}


def read_selection(
    path: str | Path,
    structure: Mapping[str, Any],
    settings: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `choose` found, from its file.

    Raises
    ------
    ArtifactError
        If it is of another model, step or version, or of other windows.
    """
    remedy = "Delete it and run again to choose the blocks anew"
    selection = read_json(path, remedy)
    check_provenance(path, selection, {**provenance(structure, settings), **(calibration or {})}, remedy)
    return selection


def select(settings: Mapping[str, Any], distances: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks that a pruning step removes.

    Parameters
    ----------
    settings : mapping
        ``method``, ``blocks`` and the method's options, complete.
    distances : mapping
        From `distances.measure`.

    Returns
    -------
    dict
        Ready for JSON: ``method``, ``n_layers``, ``removed`` (numbers of the blocks), ``cuts`` (first and last block
        of each, from front to back), ``distances`` (metric to its value for each cut).

    Raises
    ------
    ConfigError
        If the blocks are not there, or the cuts find no place.
    """
    n_layers, blocks = distances["n_layers"], settings["blocks"]
    if isinstance(blocks, list):
        beyond = [block for block in blocks if block >= n_layers]
        if beyond:
            raise ConfigError([f"blocks: {beyond} are not there; the model has blocks 0 to {n_layers - 1}"])
        cuts = cuts_of(blocks)
    else:
        cuts = CHOICES[settings["method"]](settings, distances)
    return {
        "method": settings["method"],
        "n_layers": n_layers,
        "removed": [block for cut in cuts for block in cut],
        "cuts": [[cut.start, cut.stop - 1] for cut in cuts],
        "distances": {
            name: [values[cut.start][len(cut) - 1] for cut in cuts] for name, values in distances["metrics"].items()
        },
    }
