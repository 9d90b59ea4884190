"""What a choice of parts costs: the perplexity of a model whose matrices are those of several variants, on the
calibration windows that were kept out. The text of the evaluation is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cospadi.calibration.activations import first_heldout
from cospadi.calibration.walk import read_windows
from cospadi.choosing import Unit
from cospadi.files import ModelFolder, TensorFile
from cospadi.formats.factorization import read_specs, tensor_names, unpack
from cospadi.runtime.cospadi_registry import CODECS
from cospadi.stage import choose_dtype

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
    """

    def __init__(
        self, folder: Path, windows: Path, heldout_fraction: float, codes: Mapping[str, list[Path]], device: str
    ) -> None:
        dtype = getattr(torch, choose_dtype("auto", device)[0])
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self._dense = ModelFolder(folder)
        found = read_windows(windows, self._model.get_input_embeddings().num_embeddings)
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

    def increase(self, chosen: Mapping[str, str | None]) -> float:
        """Perplexity over that of the dense model, with each matrix of the variant that is named; None: its own."""
        for matrix, name in chosen.items():
            if self._now.get(matrix) != name:
                self._put(matrix, name)
        return math.exp(self._loss() - self._dense_loss)

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
