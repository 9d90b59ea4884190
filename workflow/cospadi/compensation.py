"""Learn layers in turn, those behind making up for what the ones before have lost (`compensate`).

Once a few layers are learned, the weights of all behind them are trained until the whole model, the learned layers as
the checkpoint will have them, predicts as nearly as it can what it predicted as it was (`student`). The next layers are
learned from weights trained so, and the others are trained on. QuIP# (arXiv 2402.04396) and QTIP (arXiv 2406.11235) do
so within a block, against what the block gave; here it is the loss of the whole model, and no byte more in the file.
Memory grows with the model: every weight beside its gradient and Adam's two moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cospadi.calibration.activations import (
    COMPRESSED,
    FORMAT_VERSION,
    STORED_AS,
    from_stored,
    reading,
    to_stored,
    writing,
)
from cospadi.calibration.collect import chosen_dtype
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder
from cospadi.formats.factorization import Factorization
from cospadi.problem import Matrix
from cospadi.provenance import check_provenance, digest_of, digest_of_arrays
from cospadi.quantization import as_stored
from cospadi.student import Student, teach, to_train_on

# Datasets of what a unit hands to the next
_TAUGHT, _STORED, _TRAINED = "taught", "stored", "trained"


class Compensation:
    """What is made of a model, layer by layer, and the weights of the layers behind.

    Parameters are those of `sequence.Streams`, and

    more : path-like, optional
        Other windows to train on (`student.to_train_on`).
    saved : Path, optional
        Folder for where training is, while it goes on (`factor_training.train`).
    """

    def __init__(
        self,
        model_folder: str | Path,
        structure: Mapping[str, Any],
        windows: str | Path,
        layers: Sequence[int],
        variant: Mapping[str, Any],
        *,
        before: str | Path | None,
        more: str | Path | None = None,
        saved: Path | None = None,
        dtype: str,
        batch_tokens: int,
        heldout_fraction: float = 0.0,
        device: str = "cpu",
        log: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._structure, self._variant = Path(model_folder), structure, variant
        self._windows = to_train_on(windows, more, structure["vocab_size"], heldout_fraction)
        n_windows = len(self._windows.input_ids)
        self._used = min(variant["compensate"]["samples"] or n_windows, n_windows)
        self._device, self._log, self._last, self._saved = device, log, layers[0] - 1, saved
        self._dtype, reason = chosen_dtype(dtype, device, before, self._last, COMPRESSED)
        log(f"computing in {self._dtype}: {reason}")
        # weights (d_in, d_out) by matrix: of learned ones as the checkpoint will have them, to compute with; of others
        # what training made of them so far, float32
        self._stored: dict[str, torch.Tensor] = {}
        self._trained: dict[str, np.ndarray] = {}
        if before is not None:
            self._read(before)

    def targets(self, layer: int, matrices: Sequence[Matrix]) -> list[Matrix]:
        """The matrices of the next layer, with weights as training left them."""
        found = []
        for matrix in matrices:
            weight = self._trained.get(matrix.name)
            found.append(matrix if weight is None else replace(matrix, read=partial(np.asarray, weight)))
        return found

    def put(self, name: str, factors: Factorization) -> None:
        """Have matrix `name` be what the checkpoint will have."""
        weight = torch.from_numpy(np.ascontiguousarray(as_stored(factors, self._variant["codes"])))
        self._stored[name] = weight.to(getattr(torch, self._dtype))

    def compressed(
        self, layer: int, learned: Mapping[str, Factorization]
    ) -> tuple[dict[str, Factorization], dict[str, dict[str, Any]]]:
        """Train the layers behind, where it is their turn.

        Matrices of the layer that are not among the `learned` are what they were before any training: so the checkpoint
        has them.
        """
        for name in _shapes(self._structure, [layer]):
            self._trained.pop(name, None)
        self._last = layer
        behind = range(layer + 1, self._structure["n_layers"])
        due = behind and (layer + 1) % self._variant["compensate"]["every"] == 0
        return dict(learned), {"compensated": self._train(behind)} if due else {}

    def write(self, path: str | Path) -> None:
        """Leave weights and what the teacher gave to the next unit."""
        with writing(path, self._belongs()) as file:
            whole = {"chunks": True, "fletcher32": True}
            file.create_dataset(_TAUGHT, data=to_stored(self._taught), **whole)
            stored, trained = (file.create_group(group) for group in (_STORED, _TRAINED))
            for name, weight in self._stored.items():
                stored.create_dataset(name, data=to_stored(weight), **whole)
            for name, weight in self._trained.items():
                trained.create_dataset(name, data=weight, **whole)

    def _read(self, path: str | Path) -> None:
        """Take what the unit before left."""
        remedy = COMPRESSED.remedy.format(self._last)
        with reading(path, remedy) as file:
            says = dict(file.attrs)
            taught = file[_TAUGHT][:]
            stored, trained = (
                {name: values[:] for name, values in file[group].items()} for group in (_STORED, _TRAINED)
            )
        check_provenance(path, says, self._belongs(), remedy)
        n_layers = self._structure["n_layers"]
        for weights, layers, kind in (
            (stored, range(self._last + 1), STORED_AS[self._dtype]),
            (trained, range(self._last + 1, n_layers), np.float32),
        ):
            shapes = _shapes(self._structure, layers)
            for name, weight in weights.items():
                if shapes.get(name) != weight.shape or weight.dtype != kind:
                    problem = f"{name} is {weight.dtype} {weight.shape}; expected {np.dtype(kind)} {shapes.get(name)}"
                    raise ArtifactError(path, problem, remedy)
        expected = (self._used, self._windows.input_ids.shape[1], self._structure["hidden_size"])
        if taught.shape != expected:
            raise ArtifactError(path, f"{_TAUGHT} is {taught.shape}; expected {expected}", remedy)
        self._trained, self._taught = trained, from_stored(taught, self._dtype)
        self._stored = {name: from_stored(weight, self._dtype) for name, weight in stored.items()}

    def _belongs(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self._structure["fingerprint"],
            "tokens": self._windows.tokens,
            "settings": digest_of(dict(self._variant)),
            "dtype": self._dtype,
            "last_layer": self._last,
        }

    @cached_property
    def _taught(self) -> torch.Tensor:
        return teach(self._folder, self._windows, self._used, dtype=self._dtype, device=self._device, log=self._log)

    def _train(self, behind: range) -> dict[str, Any]:
        """Train the weights of the layers `behind` those that are learned; what the diagnostics say of it."""
        started, options = time.perf_counter(), self._variant["compensate"]
        student = Student(
            *(self._folder, self._structure, self._windows, self._taught), dtype=self._dtype, device=self._device
        )
        for name, weight in self._stored.items():
            student.set_weight(name, weight)
        modules = student.give(self._dense(behind))
        own = {"option": "compensate", "seed": self._windows.seed % 2**63 + behind.start, "log": self._log}
        if self._saved is not None:
            own["saved"] = self._saved / f"training_{behind.start:02d}.pt"
            own["belongs"] = digest_of([self._belongs(), digest_of_arrays(map(to_stored, self._stored.values()))])
        report = student.learn(modules, self._used, options, what=f"layers from {behind.start} on", **own)
        if report["epoch"]:
            self._trained = {name: module.factors().codes for name, module in modules.items()}
        return {**report, "seconds": time.perf_counter() - started}

    def _dense(self, layers: range) -> Iterator[tuple[str, Factorization]]:
        """Name and weight of every target matrix of layers, as training left it, read one by one."""
        folder = ModelFolder(self._folder)
        for name in _shapes(self._structure, layers):
            weight = self._trained.get(name)
            yield name, Factorization(None, folder.read_weight(name) if weight is None else weight, support="dense")


def _shapes(structure: Mapping[str, Any], layers: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Target matrices of layers, name to (d_in, d_out)."""
    return {
        matrix["name"]: tuple(matrix["shape"])
        for layer in layers
        for site in structure["layers"][layer]["sites"]
        for matrix in site["matrices"]
    }
