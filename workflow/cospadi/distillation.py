"""Distill the dense model into the factors of a compressed one: all of them are trained together, end to end.

Where `refinement` has a block give what the dense block gives, here the whole model is to predict what the dense model
predicts: the loss is the Kullback-Leibler divergence of every token's distribution (knowledge distillation, Hinton et
al., arXiv 1503.02531), on the calibration windows. Positions and whole numbers stay, what multiplies is trained
(`factor_training`). Memory grows with the model: every number of a factor beside its gradient and Adam's two moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cospadi.arrays import slices
from cospadi.calibration.activations import first_heldout
from cospadi.calibration.walk import Chunk, Windows, logged, read_windows
from cospadi.factor_training import TrainedMatrix, finite, held_out_of, train, trainable
from cospadi.files import ModelFolder, TensorFile, replacing, write_json, write_tensors
from cospadi.formats.factorization import Factorization, read_factors, read_specs
from cospadi.learning import FORMAT_VERSION, distilled, provenance
from cospadi.progress import DISTILLED_REPORT
from cospadi.provenance import check_provenance, fingerprint, tokens_digest
from cospadi.runtime.cospadi_registry import FACTOR_CODECS
from cospadi.stage import choose_dtype
from cospadi.structure import load_head

_REMEDY = "Delete it and run again to learn this unit anew"
_TOKENS_AT_ONCE = 256  # whose logits are in memory


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
    read = _windows(windows, more, structure["vocab_size"], heldout_fraction)
    held_out = held_out_of(min(options["samples"] or len(read.input_ids), len(read.input_ids)))
    dtype, reason = choose_dtype(dtype, device)
    log(f"computing in {dtype}: {reason}")
    units = {path: _Unit(path, layers, structure, variant, calibration) for path, layers in factors.items()}
    model = _Model(dense_folder, model_folder, structure, read, held_out.stop, dtype, device, log)
    modules = model.give(pair for unit in units.values() for pair in unit.factors())
    parameters = trainable(modules.values())
    report = {"format_version": FORMAT_VERSION, "device": device, "n_windows": held_out.start}
    report["n_trained"] = sum(one.numel() for one in parameters)
    before = finite(model.divergence(held_out), "distill")
    log(f"{report['n_trained']} numbers; {before:.5f} nats a token from the dense model on windows kept out")
    kept = {"kl": before, "epoch": 0, "history": [], "seconds": time.perf_counter() - started}
    if parameters and held_out.start > 0:
        course = train(
            parameters,
            model.backward,
            lambda: model.divergence(held_out),
            n_windows=held_out.start,
            windows_a_step=read.step(options["batch_tokens"]),
            epochs=options["epochs"],
            learning_rate=options["learning_rate"],
            seed=read.seed % 2**63,
            option="distill",
            log=log,
            saved=saved,
            belongs=f"{read.tokens} {dtype} {fingerprint(ModelFolder(dense_folder))}",
        )
        kept |= {"history": course.history, "seconds": kept["seconds"] + course.seconds}
        if course.error < before:
            kept |= {"kl": course.error, "epoch": course.epoch}
    report |= {"kl_before": before, **kept}
    with replacing(output) as folder:
        folder.mkdir()
        for path, unit in units.items():
            unit.write(folder / path.name, modules if kept["epoch"] else {})
        write_json(folder / DISTILLED_REPORT, report)
    return report


def _windows(path: Path, more: Path | None, vocab_size: int, heldout_fraction: float) -> Windows:
    """What is trained on: calibration windows that are not kept out, or of others those that are not among these."""
    found = read_windows(path, vocab_size)
    first = first_heldout(len(found.input_ids), heldout_fraction)
    if more is None:
        kept = np.arange(len(found.input_ids)) < first
    else:
        kept_out = {ids.tobytes() for ids in found.input_ids[first:]}
        found = read_windows(more, vocab_size)
        kept = np.array([ids.tobytes() not in kept_out for ids in found.input_ids])
    ids, mask = found.input_ids[kept], found.attention_mask[kept]
    return found._replace(input_ids=ids, attention_mask=mask, tokens=tokens_digest(ids, mask))


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


class _Model:
    """A model whose matrices are factors, and what the dense model makes of the same windows."""

    def __init__(
        self,
        dense_folder: Path,
        model_folder: Path,
        structure: Mapping[str, Any],
        windows: Windows,
        n_windows: int,
        dtype: str,
        device: str,
        log: Callable[[str], None],
    ) -> None:
        self._windows, self._device = windows, device
        self._prefixes = [f"{layer['prefix']}." for layer in structure["layers"]]
        self._mask = torch.from_numpy(windows.attention_mask).bool()
        n_blocks = ModelFolder(dense_folder).config["num_hidden_layers"]
        dense = Chunk(dense_folder, range(n_blocks), dtype=dtype, device=device)
        one_by_one = logged(list(slices(0, n_windows, 1)), windows, log)
        # behind the last block: the norm and the head are the dense model's in all models here
        self._wanted = torch.cat([dense.run(windows, batch, None).cpu() for batch in one_by_one])
        del dense
        self._chunk = Chunk(model_folder, range(structure["n_layers"]), dtype=dtype, device=device)
        self._head = load_head(model_folder, structure, dtype=dtype, device=device)

    def give(self, factors: Iterable[tuple[str, Factorization]]) -> dict[str, TrainedMatrix]:
        """Have matrices, named, computed by their factors; the modules that do."""
        dictionaries: dict[str, torch.nn.Parameter] = {}
        modules = {}
        for name, one in factors:
            number = next(i for i, prefix in enumerate(self._prefixes) if name.startswith(prefix))
            block, path = self._chunk.block(number), name.removeprefix(self._prefixes[number])
            bias = block.get_submodule(path).bias
            modules[name] = TrainedMatrix(name, one, dictionaries, bias).to(self._device)
            block.set_submodule(path, modules[name])
        return modules

    def divergence(self, windows: slice) -> float:
        """Mean nats a token that the model's predictions are from the dense model's."""
        total = sum(self._walk(np.arange(start, start + 1), None) for start in range(windows.start, windows.stop))
        return total / int(self._mask[windows].sum())

    def backward(self, batch: np.ndarray) -> float:
        """Add the gradient of the mean divergence of these windows (indices) to the parameters; that divergence."""
        n_tokens = int(self._mask[batch].sum())
        return self._walk(batch, n_tokens) / n_tokens

    def _walk(self, batch: np.ndarray, n_tokens: int | None) -> float:
        """Summed divergence of windows; `n_tokens`: the gradient of that over it goes back. Logits are there for a few
        tokens at a time.
        """
        kept = self._mask[batch]
        wanted = self._wanted[batch][kept].to(self._device)
        rows = self._chunk.run(self._windows, batch, None, trained=n_tokens is not None)[kept.to(self._device)]
        gradient, total = torch.zeros_like(rows), 0.0
        for part in slices(0, len(rows), _TOKENS_AT_ONCE):
            with torch.no_grad():
                log_p = self._chunk.predict(wanted[part], self._head).log_softmax(1)
            states = rows[part].detach().requires_grad_(n_tokens is not None)
            logits = self._chunk.predict(states, self._head)
            log_q = logits.detach().log_softmax(1)
            p = log_p.exp()
            total += float((p * (log_p - log_q)).sum())
            if n_tokens is not None:  # the gradient at the logits: what is predicted less what should be
                (gradient[part],) = torch.autograd.grad(logits, states, (log_q.exp() - p) / n_tokens)
        if n_tokens is not None:
            rows.backward(gradient)
        return total
