"""What a choice of parts costs: the perplexity of a model whose matrices are those of several variants, or how far its
predictions are from the dense model's, on the calibration windows that were kept out. The text of the evaluation is not
looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cospadi.calibration.activations import first_heldout
from cospadi.calibration.walk import read_windows
from cospadi.choosing import Unit
from cospadi.evaluation.divergence import Head
from cospadi.files import ModelFolder, TensorFile
from cospadi.formats.factorization import read_specs, tensor_names, unpack
from cospadi.runtime.cospadi_registry import CODECS

_REMEDY = "Delete it and run again to pack this unit anew"


class PartsModel:
    """The dense model, with matrices of variants in the place of its own.

    Parameters
    ----------
    folder : Path
        Of the dense model.
    windows : Path
        Calibration windows.
    heldout_fraction : float
        Of them, that was kept out.
    codes : mapping
        Variant to its files of codes, of all units.
    device : str
    dtype : str
        To compute in; never ``auto``.

    Attributes
    ----------
    seed : int
        That the windows were drawn with.
    """

    def __init__(
        self,
        folder: Path,
        windows: Path,
        heldout_fraction: float,
        codes: Mapping[str, list[Path]],
        device: str,
        dtype: str,
    ) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
        self._dense = ModelFolder(folder)
        found = read_windows(windows, self._model.get_input_embeddings().num_embeddings)
        self.seed = found.seed
        first = first_heldout(len(found.input_ids), heldout_fraction)
        self._ids, self._mask = (torch.from_numpy(part[first:]).to(device) for part in found[:2])
        self._files = {name: [TensorFile(path, _REMEDY) for path in paths] for name, paths in codes.items()}
        self._specs = {
            (name, matrix): (file, spec)
            for name, files in self._files.items()
            for file in files
            for matrix, spec in read_specs(file, CODECS, _REMEDY).items()
        }
        self._now: dict[str, str | None] = {}
        self._dense_loss = self._loss()
        self._dense_states: list[torch.Tensor] = []

    def increase(self, chosen: Mapping[str, str | None]) -> float:
        """Perplexity over that of the dense model, with each matrix of the variant that is named; None: its own."""
        self._take(chosen)
        return math.exp(self._loss() - self._dense_loss)

    @torch.inference_mode()
    def divergence(self, chosen: Mapping[str, str | None]) -> float:
        """Mean divergence of its predictions from the dense model's, in nats a token; matrices as of `increase`."""
        head = Head(self._model, self._model.get_output_embeddings().weight)
        if not self._dense_states:
            self._take(dict.fromkeys(self._now))
            self._dense_states = [states for states, _ in self._predictions()]
        self._take(chosen)
        total, n_tokens = 0.0, 0
        for was, (_, log_probabilities) in zip(self._dense_states, self._predictions(), strict=True):
            total, n_tokens = total + float(head.divergences(was, log_probabilities).sum()), n_tokens + len(was)
        return total / n_tokens

    def _predictions(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What enters the head, and the logarithms of what it predicts, of the tokens of one window after the other."""
        entering: list[torch.Tensor] = []
        handle = self._model.get_output_embeddings().register_forward_pre_hook(
            lambda module, arguments: entering.append(arguments[0])
        )
        try:
            for ids, mask in zip(self._ids.split(1), self._mask.split(1), strict=True):
                logits, kept = self._model(ids, attention_mask=mask).logits[0], mask[0].bool()
                yield entering.pop()[0][kept], logits[kept].log_softmax(-1, dtype=torch.float32)
        finally:
            handle.remove()

    def _take(self, chosen: Mapping[str, str | None]) -> None:
        for matrix, name in chosen.items():
            if self._now.get(matrix) != name:
                self._put(matrix, name)

    def _put(self, matrix: str, name: str | None) -> None:
        weight = self._model.get_parameter(f"{matrix}.weight")
        if (name, matrix) in self._specs:
            file, spec = self._specs[name, matrix]
            tensors = {part: file.read(part) for part in tensor_names(matrix, spec)}
            values = unpack(tensors, spec, matrix, source=file.path, remedy=_REMEDY).reconstruct()
        else:  # its own, also where a variant left it as it is
            values = self._dense.read_weight(matrix)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(values.T.copy()))
        self._now[matrix] = name

    @torch.inference_mode()
    def _loss(self) -> float:
        """Mean nats a token of the windows."""
        total, n_tokens = 0.0, 0
        for ids, mask in zip(self._ids.split(1), self._mask.split(1), strict=True):
            logits = self._model(ids, attention_mask=mask).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:], reduction="none")
            counts = (mask[0, 1:] * mask[0, :-1]).bool()
            total, n_tokens = total + float(losses[counts].double().sum()), n_tokens + int(counts.sum())
        return total / n_tokens


def codes_of(variants: Mapping[str, Path], units: list[str]) -> dict[str, list[Path]]:
    """Files of codes of variants in folders."""
    return {name: [Unit.of(folder, unit).codes for unit in units] for name, folder in variants.items()}
