"""Distill the dense model into the factors of a compressed one: all of them are trained together, end to end.

Where `refinement` has a block give what the dense block gives, here the whole model is to predict what the dense model
predicts (`student`), on the calibration windows. Positions and whole numbers stay, what multiplies is trained
(`factor_training`). Memory grows with the model: every number of a factor beside its gradient and Adam's two moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.arrays import held_out_of
from cospadi.factor_training import TrainedMatrix, trainable
from cospadi.files import ModelFolder, TensorFile, replacing, write_json, write_tensors
from cospadi.formats.factorization import Factorization, read_factors, read_specs
from cospadi.learning import FORMAT_VERSION, distilled, provenance
from cospadi.progress import DISTILLED_REPORT
from cospadi.provenance import check_provenance, fingerprint
from cospadi.runtime.cospadi_registry import FACTOR_CODECS
from cospadi.stage import choose_dtype
from cospadi.student import Student, teach, to_train_on

_REMEDY = "Delete it and run again to learn this unit anew"


def distill(
    dense_folder: Path,
    model_folder: Path,
    structure: Mapping[str, Any],
    windows: Path,
    factors: Mapping[Path, Sequence[int]],
    variant: Mapping[str, Any],
    *,
    more: Path | None = None,
    calibration: Mapping[str, Any] | None = None,
    output: Path,
    saved: Path | None = None,
    dtype: str,
    heldout_fraction: float = 0.0,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the factors of all units of a variant together, and write a folder with a file for each.

    Parameters
    ----------
    dense_folder : Path
        The model whose predictions are learned.
    model_folder : Path
        That the factors are of: the same, or what is left of it once blocks were removed.
    structure : mapping
        Of `model_folder`.
    windows : Path
        The calibration windows, to train on as well unless there are others.
    factors : mapping
        ``factors/<unit>.safetensors`` of every unit, as `learning.learn_unit` wrote them, to the layers of the unit.
    variant : mapping
        Complete settings; ``distill`` says how.
    more : Path, optional
        Other windows to train on. Those among them that the calibration keeps out are left out.
    calibration : mapping, optional
        What the factors have to be of.
    output : Path
        Written: a file of the name of each unit's, and ``report.json``.
    saved : Path, optional
        For where training is, while it goes on (`factor_training.train`).
    dtype : {"auto", "bfloat16", "float16", "float32"}
    heldout_fraction : float
        Of the calibration windows, the last ones, that nothing is fitted to.

    Returns
    -------
    dict
        The report: ``kl_before`` and ``kl``, nats a token on the windows that are not trained on, ``epoch`` (0: none
        was better than the start, and the factors are as learned), ``history``, ``n_windows`` (trained on),
        ``n_trained`` (numbers), ``seconds``.

    Raises
    ------
    ArtifactError
        If factors or windows are damaged or of another model, calibration or variant.
    NumericalError
        If training diverges.
    """
    started = time.perf_counter()
    options = variant["distill"]
    read = to_train_on(windows, more, structure["vocab_size"], heldout_fraction)
    held_out = held_out_of(min(options["samples"] or len(read.input_ids), len(read.input_ids)))
    dtype, reason = choose_dtype(dtype, device)
    log(f"computing in {dtype}: {reason}")
    units = {path: _Unit(path, layers, structure, variant, calibration) for path, layers in factors.items()}
    computed = {"dtype": dtype, "device": device}
    taught = teach(dense_folder, read, held_out.stop, **computed, log=log)
    model = Student(model_folder, structure, read, taught, **computed)
    modules = model.give(pair for unit in units.values() for pair in unit.factors())
    report = {"format_version": FORMAT_VERSION, "device": device, "n_windows": held_out.start}
    report["n_trained"] = sum(one.numel() for one in trainable(modules.values()))
    seconds = time.perf_counter() - started
    report |= model.learn(
        modules,
        held_out.stop,
        options,
        option="distill",
        what=f"{report['n_trained']} numbers",
        seed=read.seed % 2**63,
        log=log,
        saved=saved,
        belongs=f"{read.tokens} {dtype} {fingerprint(ModelFolder(dense_folder))}",
    )
    report["seconds"] += seconds
    with replacing(output) as folder:
        folder.mkdir()
        for path, unit in units.items():
            unit.write(folder / path.name, modules if report["epoch"] else {})
        write_json(folder / DISTILLED_REPORT, report)
    return report


class _Unit:
    """A file of learned factors."""

    def __init__(
        self,
        path: Path,
        layers: Sequence[int],
        structure: Mapping[str, Any],
        variant: Mapping[str, Any],
        calibration: Mapping[str, Any] | None,
    ) -> None:
        self._file = TensorFile(path)
        check_provenance(path, self._file.metadata, provenance(structure, layers, variant, calibration), _REMEDY)
        self._specs, self._variant = read_specs(self._file, FACTOR_CODECS, _REMEDY), variant

    def factors(self) -> Iterator[tuple[str, Factorization]]:
        """Name of each matrix and its factors, read one by one."""
        return ((name, read_factors(self._file, name, spec, _REMEDY)) for name, spec in self._specs.items())

    def write(self, path: Path, trained: Mapping[str, TrainedMatrix]) -> None:
        """The same file with the numbers of trained matrices; those not there as they are."""
        tensors: dict[str, np.ndarray] = {}
        specs: dict[str, Any] = {}
        for name, spec in self._specs.items():
            found = trained[name].factors() if name in trained else read_factors(self._file, name, spec, _REMEDY)
            packed, specs[name] = found.before_rounding().pack(name)
            tensors.update(packed)
        header = {**self._file.metadata, "matrices": specs, **distilled(self._variant)}
        write_tensors(path, tensors, header)
