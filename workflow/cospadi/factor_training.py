"""Factors whose numbers are trained: positions and whole numbers stay, what multiplies is a parameter; and the loop.

Values on their supports and dictionaries are trained by gradients, or where a method decided whole numbers already, the
scales of those. `refinement` trains a block for itself, `distillation` the whole model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cospadi.arrays import to_numpy
from cospadi.errors import NumericalError
from cospadi.files import replacing
from cospadi.formats.factorization import Factorization
from cospadi.provenance import digest_of, digest_of_arrays
from cospadi.runtime.cospadi_diagonal import times
from cospadi.runtime.cospadi_registry import FACTOR_CODECS
from cospadi.stage import Every

# Share of the steps, in which the rate grows; of the rate, that is left at the end
WARM_UP, LEFT = 1 / 20, 1 / 10
_BETAS = (0.9, 0.95)
# Between two lines in the log, and between two savings of where training is
LOG_SECONDS, SAVE_SECONDS = 20, 600


class Course(NamedTuple):
    """What training did: the best epoch, from 1, its error on what was held out, and that of every epoch; seconds it
    took, those of interrupted jobs that it went on from among them.
    """

    epoch: int
    error: float
    history: list[dict[str, Any]]
    seconds: float


def trainable(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Parameters that ask for a gradient, those that several modules share once."""
    every = (one for module in modules for one in module.parameters() if one.requires_grad)
    return list(dict.fromkeys(every))


def train(
    parameters: Sequence[torch.nn.Parameter],
    backward: Callable[[np.ndarray], float],
    error_held_out: Callable[[], float],
    *,
    n_windows: int,
    windows_a_step: int,
    epochs: float,
    learning_rate: float,
    seed: int,
    option: str,
    log: Callable[[str], None],
    saved: Path | None = None,
    belongs: str = "",
) -> Course:
    """Train parameters by Adam and leave them as the best epoch had them.

    Parameters
    ----------
    parameters : sequence of Parameter
    backward : callable
        ``backward(batch)``: adds the gradient of the mean error of these windows (indices) and returns that error.
    error_held_out : callable
        Error on the windows that are not trained on.
    n_windows, windows_a_step : int
        To train on: in all, and between two updates.
    epochs : float
        Passes through them; the last may end before all are seen.
    learning_rate : float
        As a share of the root mean square of each tensor; it grows in the first steps and falls along a cosine.
    seed : int
        Of the order of the windows.
    option : str
        Section of the config that is at fault where training diverges.
    saved : Path, optional
        File for where training is, written now and then and removed at the end: what it holds is gone on from, to the
        same numbers as without an interruption, if it is of the same training.
    belongs : str
        What, beside the other arguments, makes it the same: what the windows are, say.

    Raises
    ------
    NumericalError
        If an error is not finite.
    """
    started = time.perf_counter()
    n_batches = math.ceil(n_windows / windows_a_step)
    n_steps = max(1, round(epochs * n_batches))
    rates = [learning_rate * float(one.detach()[one.detach() != 0].square().mean().sqrt()) for one in parameters]
    optimizer = torch.optim.Adam(
        [{"params": [one], "lr": rate} for one, rate in zip(parameters, rates, strict=True)], betas=_BETAS, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, n_steps))
    same = [belongs, n_windows, windows_a_step, epochs, learning_rate, seed]
    place = _Place(saved, same, parameters, optimizer, schedule)
    at = place.read() or {"step": 0, "errors": [], "best": (0, math.inf), "state": [], "history": [], "seconds": 0.0}
    first, before = at["step"], at["seconds"]
    if first:
        log(f"going on from step {first} of {n_steps}, where an interrupted job was")
    order = np.random.default_rng(seed)
    shuffled = [order.permutation(n_windows) for _ in range(math.ceil(epochs))]
    log_due, save_due, late = Every(LOG_SECONDS), Every(SAVE_SECONDS), []
    for step in range(first, n_steps):
        epoch, number = divmod(step, n_batches)
        batch = shuffled[epoch][number * windows_a_step :][:windows_a_step]
        optimizer.zero_grad()
        error = finite(backward(batch), option)
        at["errors"].append((error, len(batch)))
        optimizer.step()
        schedule.step()
        late.append(error)
        if number + 1 == n_batches or step + 1 == n_steps:
            errors, counts = zip(*at["errors"], strict=True)
            mean = float(np.average(errors, weights=counts))
            found = finite(error_held_out(), option)
            at["history"].append({"iteration": epoch + 1, "error": mean, "error_heldout": found})
            log(f"epoch {epoch + 1}/{len(shuffled)} error {mean:.5f} held out {found:.5f}")
            at["errors"] = []
            if found < at["best"][1]:
                at |= {"best": (epoch + 1, found), "state": [one.detach().clone() for one in parameters]}
        seconds = time.perf_counter() - started
        at |= {"step": step + 1, "seconds": before + seconds}
        if log_due():
            left = seconds / (step + 1 - first) * (n_steps - step - 1)
            log(f"step {step + 1}/{n_steps} error {sum(late) / len(late):.5f} of late, eta {left:.0f} s")
            late = []
        if saved is not None and save_due():
            place.write(at)
    for one, value in zip(parameters, at["state"], strict=False):
        one.data.copy_(value)
    if saved is not None:
        saved.unlink(missing_ok=True)
    return Course(*at["best"], at["history"], at["seconds"])


class _Place:
    """Where training is, in a file: parameters as they are, the state of what updates them, and what `train` knows.

    Parameters
    ----------
    path : Path or None
        None: no file.
    same : list
        What decides the training; the parameters as they are now do, too.
    parameters, optimizer, schedule
        Of the training; `read` sets them.
    """

    def __init__(
        self,
        path: Path | None,
        same: list[Any],
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        self._path, self._parameters, self._parts = path, parameters, {"optimizer": optimizer, "schedule": schedule}
        if path is not None:
            self._digest = digest_of([same, digest_of_arrays(map(to_numpy, parameters))])

    def read(self) -> dict[str, Any] | None:
        """What `write` was given last; None where nothing of this training is there."""
        if self._path is None or not self._path.exists():
            return None
        try:
            found = torch.load(self._path, map_location=self._parameters[0].device, weights_only=True)
        except Exception:  # cut off, or none at all: torch raises what it likes, and training begins anew
            return None
        if not isinstance(found, dict) or found.get("of") != self._digest:
            return None
        for one, value in zip(self._parameters, found["parameters"], strict=True):
            one.data.copy_(value)
        for name, part in self._parts.items():
            part.load_state_dict(found[name])
        return found["at"]

    def write(self, at: Mapping[str, Any]) -> None:
        values = [one.detach() for one in self._parameters]
        states = {name: part.state_dict() for name, part in self._parts.items()}
        with replacing(self._path) as path:
            torch.save({"of": self._digest, "parameters": values, "at": dict(at), **states}, path)


def finite(error: float, option: str) -> float:
    """The error.

    Raises
    ------
    NumericalError
        If it is not finite: `option` is the section of the config whose learning rate is to blame.
    """
    if not math.isfinite(error):
        raise NumericalError(f"the error of what is trained is not finite; set a lower {option}.learning_rate")
    return error


def _rate(step: int, n_steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, WARM_UP * n_steps))
    return warm * (LEFT + (1 - LEFT) * (1 + math.cos(math.pi * min(1.0, step / n_steps))) / 2)


class TrainedMatrix(torch.nn.Module):
    """A linear layer by its factors, whose numbers are parameters; one for every dictionary, whoever shares it."""

    def __init__(
        self, name: str, factors: Factorization, dictionaries: dict[str, torch.nn.Parameter], bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self._diagnostics, self._bias = factors.diagnostics, bias
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
        return replace(first, plus=rest, diagnostics=self._diagnostics)


class _Part(torch.nn.Module):
    """One product of a dictionary and codes."""

    def __init__(self, part: Factorization, tensor: str, dictionaries: dict[str, torch.nn.Parameter]) -> None:
        super().__init__()
        self._part = part
        codec = FACTOR_CODECS[part.value_codec]
        codes = np.asarray(to_numpy(part.codes), np.float32)
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
        if self._scaled or self._fixed:
            self.register_buffer("codes", torch.from_numpy(codes))
        self._of_columns = False
        if self._scaled:
            block = part.scale_of_codes()
            self.values = torch.nn.Parameter(torch.ones(int(block.max()) + 1))
            # then what is multiplied is what comes out, a number a column, and not every code
            self._of_columns = bool((block == block[:1]).all())
            self.register_buffer("block", torch.from_numpy(block[0] if self._of_columns else block))
        elif not self._fixed:
            mask = part.stored_mask() if part.on.is_stored else None
            self.register_buffer("mask", None if mask is None else torch.from_numpy(mask))
            self.values = torch.nn.Parameter(torch.from_numpy(codes.copy()))
            self._part = replace(part, codes=None, mask=None)  # all numbers of a model may be here

    def _codes(self) -> torch.Tensor:
        if self._scaled:
            return self.codes * self.values[self.block]
        return self.values if self.mask is None else self.values * self.mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        through = x if self.dictionary is None else times(x, self.dictionary.to(x.dtype))
        if not (self._of_columns or self._fixed):
            return through @ self._codes().to(x.dtype)
        with torch.inference_mode(False):  # once, as they stay what they are; perhaps before the first training
            self.codes = self.codes.to(x.dtype)
        y = through @ self.codes
        if self._fixed:
            return y
        # by what they are off 1: near 1 a step of bfloat16 is larger than one of training
        return torch.addcmul(y, y, (self.values[self.block] - 1).to(x.dtype))

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
