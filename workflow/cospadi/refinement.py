"""Refine the factors of a block after they are learned: positions and whole numbers stay, what multiplies is trained.

What counts is what the block gives on the inputs that it will have in the compressed model, against
what the dense block gives in the dense model. The best of all epochs by windows that are not trained on is kept, and
none where none is better than the start.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cospadi.arrays import held_out_of, slices
from cospadi.calibration.walk import Chunk, Tap, Windows
from cospadi.factor_training import TrainedMatrix, finite, train, trainable
from cospadi.formats.factorization import Factorization


class Refined(NamedTuple):
    """Factors by matrix, and what the diagnostics say of the block."""

    factors: dict[str, Factorization]
    report: dict[str, Any]


class Block:
    """A block of a model whose matrices are exchanged.

    Parameters
    ----------
    chunk : Chunk
        With the block alone.
    prefix : str
        What the names of its matrices have before those of their modules.
    windows : Windows
    batch_tokens : int
        Tokens that go through it at a time, where nothing is trained.
    """

    def __init__(self, chunk: Chunk, prefix: str, windows: Windows, batch_tokens: int) -> None:
        self.chunk, self.windows, self.step = chunk, windows, windows.step(batch_tokens)
        self._block, self._prefix = chunk.block(chunk.layers.start), f"{prefix}."

    def bias(self, name: str) -> torch.Tensor | None:
        """What is added to the outputs of matrix `name`."""
        return self._block.get_submodule(name.removeprefix(self._prefix)).bias

    def set_weight(self, name: str, weight: np.ndarray) -> None:
        """Give matrix `name` the values `weight` (d_in, d_out)."""
        module = self._block.get_submodule(name.removeprefix(self._prefix))
        module.weight.data.copy_(torch.from_numpy(np.ascontiguousarray(weight.T)))

    def run(self, batch: slice | np.ndarray, hidden: torch.Tensor | None, **how: Any) -> torch.Tensor:
        """What the block gives for these windows, from what it gets; None: the model's first, from the tokens."""
        return self.chunk.run(self.windows, batch, None if hidden is None else hidden[batch], **how)

    def rows(
        self, batch: slice, hidden: torch.Tensor | None, places: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], torch.Tensor]:
        """What is at these places, a module of the block and a side of it, for these windows, pads left out.

        What is behind them is not computed.
        """
        found: dict[tuple[str, str], torch.Tensor] = {}
        number = self.chunk.layers.start
        taps = [Tap(number, *place, lambda rows, _, place=place: found.update({place: rows})) for place in places]
        self.run(batch, hidden, taps=taps, seen_is_enough=True)
        return found

    def through(self, hidden: torch.Tensor | None) -> torch.Tensor:
        """What the block gives for all windows (samples, length, hidden_size), on the CPU."""
        parts = [self.run(batch, hidden).cpu() for batch in self.batches()]
        return torch.cat(parts).clone()  # a tensor that may take part in training

    def batches(self, stop: int | None = None) -> Iterator[slice]:
        """The windows before `stop` in batches; None: all."""
        return slices(0, len(self.windows.input_ids) if stop is None else stop, self.step)

    @contextlib.contextmanager
    def with_modules(self, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Have matrices computed by these modules."""
        before = {}
        for name, module in modules.items():
            path = name.removeprefix(self._prefix)
            before[path] = self._block.get_submodule(path)
            self._block.set_submodule(path, module)
        try:
            yield
        finally:
            for path, module in before.items():
                self._block.set_submodule(path, module)


def refine(
    block: Block,
    factors: Mapping[str, Factorization],
    hidden: torch.Tensor | None,
    target: torch.Tensor,
    rounded: Callable[[Factorization], np.ndarray],
    *,
    epochs: int,
    learning_rate: float,
    batch_tokens: int,
    samples: int | None,
    seed: int,
    log: Callable[[str], None] = print,
) -> Refined:
    """Train the numbers of a block's factors.

    Parameters
    ----------
    block : Block
    factors : mapping
        Name of each matrix to what was learned of it.
    hidden : tensor (samples, length, hidden_size) or None
        What the block gets in the compressed model; None: the tokens' embeddings.
    target : tensor (samples, length, hidden_size)
        What it gives in the dense model.
    rounded : callable
        ``rounded(factors)``: the matrix as the checkpoint will hold it, float32 (d_in, d_out).
    epochs : int
        Passes through the windows.
    learning_rate : float
        Of Adam, as a share of the root mean square of each tensor; a cosine down to a tenth.
    batch_tokens : int
        Tokens a step; at least one window.
    samples : int or None
        Windows to use, the first ones; None: all. The last eighth of them chooses the epoch.
    seed : int
        Of the order of the windows.

    Raises
    ------
    NumericalError
        If the error is not finite.
    """
    started = time.perf_counter()
    count = min(samples or len(target), len(target))
    held_out = held_out_of(count)
    mask = torch.from_numpy(block.windows.attention_mask).bool()

    def error(batch: slice | np.ndarray, **how: Any) -> torch.Tensor:
        """Squared error over the square of what it should be, the mean over the tokens."""
        kept = mask[batch]
        wanted = target[batch][kept].to(block.chunk.device).float()
        found = block.run(batch, hidden, **how).float()[kept.to(block.chunk.device)]
        return ((found - wanted).square().sum(1) / wanted.square().sum(1).clamp(min=1e-12)).mean()

    def error_held_out() -> float:
        batches = list(slices(held_out.start, held_out.stop, block.step))
        weights = [float(mask[batch].sum()) for batch in batches]
        value = sum(float(error(batch)) * weight for batch, weight in zip(batches, weights, strict=True)) / sum(weights)
        return finite(value, "refine")

    def backward(batch: np.ndarray) -> float:
        loss = error(batch, trained=True)
        loss.backward()
        return loss.item()

    def of_rounded(chosen: Mapping[str, Factorization]) -> float:
        for name, one in chosen.items():
            block.set_weight(name, rounded(one))
        return error_held_out()

    before = of_rounded(factors)
    dictionaries: dict[str, torch.nn.Parameter] = {}
    modules = {
        name: TrainedMatrix(name, one, dictionaries, block.bias(name)).to(block.chunk.device)
        for name, one in factors.items()
    }
    parameters = trainable(modules.values())
    report = {"n_trained": sum(parameter.numel() for parameter in parameters), "error_before": before}
    if not parameters or held_out.start == 0:  # a format whose numbers leave nothing open; one window
        log("nothing to train, or to train on")
        return Refined(dict(factors), {**report, "error": before, "epoch": 0, "history": [], "seconds": 0.0})
    with block.with_modules(modules):
        course = train(
            parameters,
            backward,
            error_held_out,
            n_windows=held_out.start,
            windows_a_step=block.windows.step(batch_tokens),
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            option="refine",
            log=lambda line: log(f"{line} (before {before:.5f})"),
        )
        chosen = {name: module.factors() for name, module in modules.items()}
    best, kept_epoch = of_rounded(chosen), course.epoch
    if best >= before:
        chosen, best, kept_epoch = dict(factors), before, 0
        of_rounded(chosen)
    seconds = time.perf_counter() - started
    report |= {"error": best, "epoch": kept_epoch, "history": course.history, "seconds": seconds}
    return Refined(chosen, report)
