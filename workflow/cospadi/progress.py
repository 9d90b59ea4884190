"""Progress: what finished jobs wrote of a variant's matrices, and how much of it is learned, also while others run."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cospadi.errors import ArtifactError
from cospadi.files import read_json
from cospadi.provenance import check_provenance

FORMAT_VERSION = 1
DISTILLED_REPORT = "report.json"


def read_report(path: str | Path, remedy: str = "Delete it and run again") -> dict[str, Any]:
    """What a job wrote of the matrices of a unit, of learning (``factors/*.json``) or of packing (``codes/*.json``).

    Raises
    ------
    ArtifactError
        If the file is missing, is none, or is of another version.
    """
    report = _read(path, remedy)
    matrices = report.get("matrices")
    if not isinstance(matrices, dict) or not all(isinstance(matrix, dict) for matrix in matrices.values()):
        raise ArtifactError(path, "has no object matrices, of a report each", remedy)
    return report


def read_distilled(folder: str | Path, remedy: str = "Delete it and run again") -> dict[str, Any]:
    """What training end to end wrote of a variant, into the folder of its factors.

    Raises
    ------
    ArtifactError
        If the file is missing, is none, or is of another version.
    """
    return _read(Path(folder, DISTILLED_REPORT), remedy)


def _read(path: str | Path, remedy: str) -> dict[str, Any]:
    report = read_json(path, remedy)
    check_provenance(path, report, {"format_version": FORMAT_VERSION}, remedy)
    return report


@dataclass(frozen=True)
class Learned:
    """What is in a folder of diagnostics, of learning (``factors/``) or of packing (``codes/``).

    Attributes
    ----------
    layers : int
        That are done.
    error : float or None
        Mean relative error of their matrices; None where nothing is done.
    seconds : float
        That their jobs took in all; 0 for packing, which does not say.
    """

    layers: int
    error: float | None
    seconds: float


def learned(folder: Path) -> Learned:
    """What the finished jobs of a variant have done."""
    units = list(_diagnostics(folder))
    matrices = {name: matrix for unit in units for name, matrix in unit["matrices"].items()}
    names = [*matrices, *(name for unit in units for name in unit.get("kept_dense", ()))]
    errors = [matrix["relative_error"] for matrix in matrices.values() if "relative_error" in matrix]
    return Learned(
        len({layer for name in names for layer in re.findall(r"\.layers\.(\d+)\.", name)}),
        math.fsum(errors) / len(errors) if errors else None,
        math.fsum(unit.get("seconds", 0.0) for unit in units),
    )


def progress(diagnostics: str | Path, n_layers: int) -> str:
    """A line for the console once a job has written its diagnostics: layers done, error so far, and how long the rest
    would take one after the other.
    """
    done = learned(Path(diagnostics).parent)
    line = f"{done.layers} of {n_layers} layers learned"
    line += "" if done.error is None else f", mean relative error {done.error:.4f} so far"
    left = (n_layers - done.layers) * done.seconds / max(done.layers, 1)
    return line + (f", {left / 60:.1f} minutes of learning left" if left else "")


def _diagnostics(folder: Path) -> Iterator[dict]:
    for file in sorted(folder.glob("layer*.json")):
        with contextlib.suppress(ArtifactError):  # just being written anew
            yield read_report(file)
