"""What a few matrices alone do to a model's predictions: the Kullback-Leibler divergence from it as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cospadi.arrays import slices
from cospadi.calibration.activations import first_heldout
from cospadi.calibration.walk import Chunk, Windows, divergence_of_logits, read_windows
from cospadi.structure import load_head

if TYPE_CHECKING:
    import torch

# Tokens whose logits are in memory at a time
_TOKENS_AT_ONCE = 256


class Alone:
    """A model in which a few matrices of a unit at a time are exchanged, all others as they are.

    It computes in float32: what single matrices in many bits change is less than other dtypes round. Memory holds the
    blocks from the unit's first to the model's last.

    Parameters
    ----------
    model_folder : path-like
    structure : mapping
        From `structure.inspect_model`.
    windows : path-like
        The calibration windows.
    first : int
        The unit's first layer.
    n_windows : int
        How many windows count, at most: the last ones, of those that are kept out where some are.
    batch_tokens : int
        Tokens a forward pass.
    heldout_fraction : float
        Of the windows, the last ones, that nothing is fitted to.
    device : str
    log : callable
    """

    def __init__(
        self,
        model_folder: str | Path,
        structure: Mapping[str, Any],
        windows: str | Path,
        first: int,
        *,
        n_windows: int,
        batch_tokens: int,
        heldout_fraction: float = 0.0,
        device: str = "cpu",
        log: Callable[[str], None] = print,
    ) -> None:
        import torch

        read = read_windows(windows, structure["vocab_size"])
        kept_out = len(read.input_ids) - first_heldout(len(read.input_ids), heldout_fraction)
        most, which = (kept_out, "kept out") if kept_out else (len(read.input_ids), "there")
        fewer = f", all that are {which}; measured_windows asks for {n_windows}" if n_windows > most else ""
        n_windows = min(n_windows, most)
        self._windows = Windows(read.input_ids[-n_windows:], read.attention_mask[-n_windows:], *read[2:])
        self._mask = torch.from_numpy(self._windows.attention_mask).bool()
        self._prefixes = [layer["prefix"] for layer in structure["layers"]]
        count, step = len(self._windows.input_ids), self._windows.step(batch_tokens)
        self._batches = list(slices(0, count, step))
        how: dict[str, Any] = {"dtype": "float32", "device": device}
        self._entering: list[torch.Tensor | None] = [None] * len(self._batches)
        if first > 0:
            before = Chunk(model_folder, range(first), **how)
            self._entering = [before.run(self._windows, batch, None) for batch in self._batches]
            del before
        self._chunk = Chunk(model_folder, range(first, structure["n_layers"]), **how)
        self._head = load_head(model_folder, structure, **how)
        self._as_it_is = list(self._leaving())
        log(f"measuring on {int(self._mask.sum())} tokens of {count} windows{fewer}")

    def __call__(self, weights: Mapping[str, np.ndarray]) -> float:
        """Mean divergence in nats a token, with matrices (d_in, d_out) by name in the place of the model's own."""
        import torch

        modules = {name: self._module(name) for name in weights}
        own = {name: module.weight.data for name, module in modules.items()}
        try:
            for name, weight in weights.items():
                module = modules[name]
                module.weight.data = torch.from_numpy(np.ascontiguousarray(weight.T)).to(own[name])
            total = sum(
                self._divergence(was[part], now[part])
                for was, now in zip(self._as_it_is, self._leaving(), strict=True)
                for part in (slice(at, at + _TOKENS_AT_ONCE) for at in range(0, len(was), _TOKENS_AT_ONCE))
            )
        finally:
            for name, module in modules.items():
                module.weight.data = own[name]
        return total / int(self._mask.sum())

    def _module(self, name: str) -> torch.nn.Module:
        number = next(index for index, prefix in enumerate(self._prefixes) if name.startswith(f"{prefix}."))
        return self._chunk.block(number).get_submodule(name.removeprefix(f"{self._prefixes[number]}."))

    def _leaving(self) -> Any:
        """What the last block gives for the tokens of each batch (n_tokens, hidden_size)."""
        for batch, entering in zip(self._batches, self._entering, strict=True):
            last = self._chunk.run(self._windows, batch, entering)
            yield last[self._mask[batch].to(last.device)]

    def _divergence(self, was: torch.Tensor, now: torch.Tensor) -> float:
        import torch

        with torch.inference_mode():
            return divergence_of_logits(*(self._chunk.predict(rows, self._head) for rows in (was, now)))
