"""Refine the factors of a block after they are learned: positions and whole numbers stay, what multiplies is trained.

Values on their supports and dictionaries are trained by gradients, or where a method decided whole numbers already, the
scales of those. What counts is what the block gives on the inputs that it will have in the compressed model, against
what the dense block gives in the dense model. The best of all epochs by windows that are not trained on is kept, and
none where none is better than the start.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from cospadi.arrays import slices, to_numpy
from cospadi.calibration.walk import Chunk, Tap, Windows
from cospadi.errors import NumericalError
from cospadi.formats.factorization import Factorization
from cospadi.runtime.cospadi_diagonal import times
from cospadi.runtime.cospadi_registry import FACTOR_CODECS

# Share of the windows, the last ones, that tell which epoch is the best; of the steps, in which the rate grows; of the
# rate, that is left at the end
HELD_OUT, WARM_UP, LEFT = 1 / 8, 1 / 20, 1 / 10
_BETAS = (0.9, 0.95)


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
    rounded: Callable[[str, Factorization], np.ndarray],
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
        ``rounded(name, factors)``: the matrix as the checkpoint will hold it, float32 (d_in, d_out).
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
    held_out = slice(count - max(1, round(HELD_OUT * count)), count)
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
        if not math.isfinite(value):
            raise NumericalError("the error of a block that is refined is not finite; set a lower refine.learning_rate")
        return value

    def of_rounded(chosen: Mapping[str, Factorization]) -> float:
        for name, one in chosen.items():
            block.set_weight(name, rounded(name, one))
        return error_held_out()

    before = of_rounded(factors)
    dictionaries: dict[str, torch.nn.Parameter] = {}
    modules = {
        name: _Matrix(name, one, dictionaries, block.bias(name)).to(block.chunk.device) for name, one in factors.items()
    }
    parameters = [one for module in modules.values() for one in module.parameters() if one.requires_grad]
    parameters = list(dict.fromkeys(parameters))
    report = {"n_trained": sum(parameter.numel() for parameter in parameters), "error_before": before}
    if not parameters or held_out.start == 0:  # a format whose numbers leave nothing open; one window
        log("nothing to train, or to train on")
        return Refined(dict(factors), {**report, "error": before, "epoch": 0, "history": [], "seconds": 0.0})
    kept_epoch, history = 0, []
    with block.with_modules(modules):
        step = block.windows.step(batch_tokens)
        n_steps = epochs * math.ceil(held_out.start / step)
        rates = [learning_rate * float(one.detach()[one.detach() != 0].square().mean().sqrt()) for one in parameters]
        optimizer = torch.optim.Adam(
            [{"params": [one], "lr": rate} for one, rate in zip(parameters, rates, strict=True)], betas=_BETAS
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, n_steps))
        order = np.random.default_rng(seed)
        least, best_state = math.inf, None
        for epoch in range(1, epochs + 1):
            shuffled = order.permutation(held_out.start)
            trained = 0.0
            for start in range(0, len(shuffled), step):
                batch = shuffled[start : start + step]
                loss = error(batch, trained=True)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                trained += loss.item() * len(batch) / len(shuffled)
            found = error_held_out()
            history.append({"iteration": epoch, "error": trained, "error_heldout": found})
            log(f"epoch {epoch}/{epochs} error {trained:.5f} held out {found:.5f} (before {before:.5f})")
            if found < least:
                least, kept_epoch = found, epoch
                best_state = [one.detach().clone() for one in parameters]
        for one, value in zip(parameters, best_state or (), strict=False):
            one.data.copy_(value)
        chosen = {name: module.factors() for name, module in modules.items()}
    best = of_rounded(chosen)
    if best >= before:
        chosen, best, kept_epoch = dict(factors), before, 0
        of_rounded(chosen)
    seconds = time.perf_counter() - started
    return Refined(chosen, {**report, "error": best, "epoch": kept_epoch, "history": history, "seconds": seconds})


def _rate(step: int, n_steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, WARM_UP * n_steps))
    return warm * (LEFT + (1 - LEFT) * (1 + math.cos(math.pi * min(1.0, step / n_steps))) / 2)


class _Matrix(torch.nn.Module):
    """A linear layer by its factors, whose numbers are parameters; one for every dictionary, whoever shares it."""

    def __init__(
        self, name: str, factors: Factorization, dictionaries: dict[str, torch.nn.Parameter], bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self._factors, self._bias = factors, bias
        self.parts = torch.nn.ModuleList()
        for index, part in enumerate(factors.parts):
            own = f"{name}.dictionary" if index == 0 else f"{name}.plus.{index - 1}.dictionary"
            self.parts.append(_Part(part, part.tensor or own, dictionaries))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = sum(part(x) for part in self.parts)
        return y if self._bias is None else y + self._bias

    def factors(self) -> Factorization:
        """The factors as trained."""
        first, *rest = (part.factors() for part in self.parts)
        return replace(first, plus=rest, diagnostics=self._factors.diagnostics)


class _Part(torch.nn.Module):
    """One product of a dictionary and codes."""

    def __init__(self, part: Factorization, tensor: str, dictionaries: dict[str, torch.nn.Parameter]) -> None:
        super().__init__()
        self._part = part
        codec = FACTOR_CODECS[part.value_codec]
        codes = torch.from_numpy(np.array(to_numpy(part.codes), np.float32))
        self.dictionary = None
        if part.dictionary is not None:
            if tensor not in dictionaries:
                values = torch.from_numpy(np.array(to_numpy(part.dictionary), np.float32))
                dictionaries[tensor] = torch.nn.Parameter(values, requires_grad=not part.settled)
            self.dictionary = dictionaries[tensor]
        # whole numbers stay what they are: trained is what their scales are multiplied by
        self._scaled = part.settled and codec.scaled
        self._fixed = part.settled and codec.whole and not codec.scaled
        self.values = None
        if self._scaled:
            self.register_buffer("codes", codes)
            self.register_buffer("block", torch.from_numpy(part.scale_of_codes()))
            self.values = torch.nn.Parameter(torch.ones(int(self.block.max()) + 1))
        elif self._fixed:
            self.register_buffer("codes", codes)
        else:
            mask = part.stored_mask() if part.on.is_stored else None
            self.register_buffer("mask", None if mask is None else torch.from_numpy(mask))
            self.values = torch.nn.Parameter(codes)

    def _codes(self) -> torch.Tensor:
        if self._fixed:
            return self.codes
        if self._scaled:
            return self.codes * self.values[self.block]
        return self.values if self.mask is None else self.values * self.mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        through = x if self.dictionary is None else times(x, self.dictionary.to(x.dtype))
        return through @ self._codes().to(x.dtype)

    def factors(self) -> Factorization:
        part = self._part
        if self.dictionary is not None:
            part = replace(part, dictionary=self.dictionary.detach().cpu().numpy())
        if self._scaled:
            return part.with_scales_times(self.values.detach().cpu().numpy())
        if self._fixed:
            return part
        mask = None if self.mask is None else self.mask.cpu().numpy()
        return replace(part, codes=self._codes().detach().cpu().numpy(), mask=mask)
