"""Fit the transform of every cut on the calibration windows, from front to back."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.calibration.activations import STORED_AS
from cospadi.calibration.walk import Place, Walk
from cospadi.errors import ArtifactError
from cospadi.files import write_json, write_tensors
from cospadi.pruning.edit import Edit
from cospadi.pruning.estimators import Moments, Rows, fit_cosine
from cospadi.pruning.folding import check_foldable
from cospadi.pruning.selection import provenance


def fit_transforms(
    walk: Walk,
    selection: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    output: str | Path,
    diagnostics: str | Path,
) -> None:
    """Fit one transform a cut and write them.

    Parameters
    ----------
    walk : Walk
        Its errors are errors here too, and those of the estimators.
    selection : mapping
        From `selection.choose` or `selection.select`.
    settings : mapping
        The complete options of ``replaceme``.
    output : path-like
        Safetensors: ``layer_03`` (d, d) float64, T to fold into the MLP of block 3.
    diagnostics : path-like
        JSON, ``fits``: for each cut ``error`` (``|M T + Y - L| / |L - Y|`` on the calibration tokens, in the metric
        of the fit), ``error_removal`` (the same with T = 1), tokens, seconds, and of the cosine objective ``history``.

    Raises
    ------
    UnsupportedModelError
        If the family has a norm behind its MLP.
    ArtifactError
        If the disk is too small for the rows of the cosine objective.
    """
    check_foldable(walk.structure["architecture"])
    cuts = [range(first, last + 1) for first, last in selection["cuts"]]
    transforms: dict[int, np.ndarray] = {}
    reports: list[dict[str, Any]] = []
    # with the original prefix all cuts are seen in one walk
    rounds = [cuts] if settings["prefix"] == "original" else [[cut] for cut in cuts]
    done: list[range] = []
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    for together in rounds:
        begun = time.perf_counter()
        edit = Edit(frozenset(block for cut in done for block in cut), dict(transforms))
        with tempfile.TemporaryDirectory(dir=Path(output).parent, prefix=".rows.") as scratch:
            fits = [_Fit(walk, cut, settings, Path(scratch), pruned=bool(done)) for cut in together]
            for group in walk.groups([place for fit in fits for place in fit.places], edit=edit):
                for fit in fits:
                    fit.add([group.rows[place] for place in fit.places])
            for fit in fits:
                transform, report = fit.solve()
                block = fit.cut.start - 1
                transforms[block] = transform
                report["seconds"] = (time.perf_counter() - begun) / len(fits)
                reports.append(report)
                walk.log(
                    f"blocks {fit.cut.start}-{fit.cut.stop - 1}, fitted in block {block}: error {report['error']:.4f}, "
                    f"of removal alone {report['error_removal']:.4f}"
                )
        done += together
    belongs = {**walk.provenance, **provenance(walk.structure, settings), "cuts": selection["cuts"]}
    write_tensors(output, {f"layer_{block:02d}": transform for block, transform in transforms.items()}, belongs)
    write_json(
        diagnostics,
        {
            **belongs,
            "options": dict(settings),
            "device": walk.device,
            "seconds": sum(report["seconds"] for report in reports),
            "fits": reports,
        },
    )


class _Fit:
    """The estimator of one cut: where it looks, what it sums or stores, and what comes of it."""

    def __init__(self, walk: Walk, cut: range, settings: Mapping[str, Any], scratch: Path, *, pruned: bool) -> None:
        self.cut = cut
        self.places: Sequence[Place] = (
            Place("mlp", cut.start - 1, pruned),
            Place("residual", cut.start - 1, pruned),
            Place("output", cut.stop - 1),
        )
        self._walk = walk
        self._settings = settings
        width = walk.structure["hidden_size"]
        self._moments = Moments(width, walk.device, normalize=settings["normalize"])
        self._rows = None
        if settings["objective"] == "cosine":
            self._rows = Rows(scratch / f"layer_{cut.start:02d}.h5", width, walk.dtype)

    def add(self, tensors: Sequence[Any]) -> None:
        self._moments.add(*tensors)
        if self._rows is not None:
            needed = sum(tensor.numel() for tensor in tensors) * np.dtype(STORED_AS[self._rows.dtype]).itemsize
            free = shutil.disk_usage(self._rows.path.parent).free
            if needed > free:
                raise ArtifactError(
                    self._rows.path,
                    f"the rows need {needed / 1e9:.3g} GB more and {free / 1e9:.3g} GB are free",
                    "Free space, take fewer calibration windows, or objective: least_squares, which stores no rows",
                )
            self._rows.add(*tensors)

    def solve(self) -> tuple[np.ndarray, dict[str, Any]]:
        settings, identity = self._settings, np.eye(len(self._moments.gram))
        report: dict[str, Any] = {
            "blocks": [self.cut.start, self.cut.stop - 1],
            "folded_into": self.cut.start - 1,
            "n_tokens": self._moments.n_tokens,
        }
        if self._rows is None:
            transform = self._moments.solve(settings["structure"], ridge=settings["ridge"])
        else:
            least_squares = settings["start"] == "least_squares"
            transform, report["history"] = fit_cosine(
                self._rows,
                self._moments.solve(settings["structure"], ridge=settings["ridge"]) if least_squares else identity,
                loss=settings["loss"],
                structure=settings["structure"],
                epochs=settings["epochs"],
                lr=settings["lr"],
                batch_tokens=settings["batch_tokens"],
                l1=settings["l1"],
                l2=settings["l2"],
                random_state=settings["random_state"],
                device=self._walk.device,
                log=self._walk.log,
            )
        report["error"] = self._moments.error(transform)
        report["error_removal"] = self._moments.error(identity)
        return transform, report
