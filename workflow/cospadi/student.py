"""A student: a model whose matrices are trained, that is to predict what another one, its teacher, predicts.

The loss is the Kullback-Leibler divergence of every token's distribution (knowledge distillation, Hinton et al., arXiv
1503.02531). Of the teacher there are the hidden states before the head, from which that makes the distributions again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cospadi.arrays import held_out_of, slices
from cospadi.calibration.activations import first_heldout
from cospadi.calibration.walk import Chunk, Windows, divergence_of_logits, logged, read_windows
from cospadi.factor_training import TrainedMatrix, finite, train, trainable
from cospadi.files import ModelFolder
from cospadi.formats.factorization import Factorization
from cospadi.provenance import tokens_digest
from cospadi.structure import load_head

_TOKENS_AT_ONCE = 256  # whose logits are in memory


def teach(
    folder: Path, windows: Windows, n_windows: int, *, dtype: str, device: str, log: Callable[[str], None]
) -> torch.Tensor:
    """What the last block of a model gives for the first `n_windows` (n_windows, length, hidden_size), on the CPU.

    Norm and head behind it are the teacher's in all students here.
    """
    model = Chunk(folder, range(ModelFolder(folder).config["num_hidden_layers"]), dtype=dtype, device=device)
    one_by_one = logged(list(slices(0, n_windows, 1)), windows, log)
    return torch.cat([model.run(windows, batch, None).cpu() for batch in one_by_one])


def to_train_on(path: str | Path, more: str | Path | None, vocab_size: int, heldout_fraction: float) -> Windows:
    """Calibration windows (`path`) that are not kept out, or of `more` those that are not among the ones kept out."""
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


class Student:
    """A model whose matrices can be exchanged and trained.

    Parameters
    ----------
    folder : Path
    structure : mapping
        Of the model in it.
    windows : Windows
    taught : tensor
        From `teach`, for as many of the windows as are used.
    dtype, device : str
    """

    def __init__(
        self,
        folder: Path,
        structure: Mapping[str, Any],
        windows: Windows,
        taught: torch.Tensor,
        *,
        dtype: str,
        device: str,
    ) -> None:
        self._windows, self._taught, self._device = windows, taught, device
        self._prefixes = [f"{layer['prefix']}." for layer in structure["layers"]]
        self._mask = torch.from_numpy(windows.attention_mask).bool()
        self._chunk = Chunk(folder, range(structure["n_layers"]), dtype=dtype, device=device)
        self._head = load_head(folder, structure, dtype=dtype, device=device)

    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Give matrix `name` the values `weight` (d_in, d_out); they are not trained."""
        block, path = self._place(name)
        block.get_submodule(path).weight.data.copy_(weight.T)

    def give(self, factors: Iterable[tuple[str, Factorization]]) -> dict[str, TrainedMatrix]:
        """Have matrices, named, computed by their factors; the modules that do, whose parameters are trained."""
        dictionaries: dict[str, torch.nn.Parameter] = {}
        modules = {}
        for name, one in factors:
            block, path = self._place(name)
            bias = block.get_submodule(path).bias
            modules[name] = TrainedMatrix(name, one, dictionaries, bias).to(self._device)
            block.set_submodule(path, modules[name])
        return modules

    def _place(self, name: str) -> tuple[torch.nn.Module, str]:
        number = next(i for i, prefix in enumerate(self._prefixes) if name.startswith(prefix))
        return self._chunk.block(number), name.removeprefix(self._prefixes[number])

    def learn(
        self,
        modules: Mapping[str, TrainedMatrix],
        n_windows: int,
        options: Mapping[str, Any],
        *,
        option: str,
        what: str,
        seed: int,
        log: Callable[[str], None],
        saved: Path | None = None,
        belongs: str = "",
    ) -> dict[str, Any]:
        """Train what was given (`give`) and leave it as the best epoch had it, by the windows that are kept out.

        Parameters
        ----------
        modules : mapping
        n_windows : int
            Of the windows, the first ones, that are used; the last eighth of them is kept out.
        options : mapping
            ``epochs``, ``learning_rate`` and ``batch_tokens``.
        option : str
            Section of the config that they are.
        what : str
            That is trained, for the log.
        seed, log, saved, belongs
            As of `factor_training.train`.

        Returns
        -------
        dict
            ``kl_before`` and ``kl``, nats a token on the windows that are kept out, ``epoch`` (0: none was better than
            the start, so nothing is to be taken), ``history``, ``seconds``.
        """
        started, held_out, parameters = time.perf_counter(), held_out_of(n_windows), trainable(modules.values())
        before = finite(self.divergence(held_out), option)
        log(f"{what}: {before:.5f} nats a token from the teacher on windows kept out")
        report = {"kl_before": before, "kl": before, "epoch": 0, "history": []}
        seconds = time.perf_counter() - started
        if parameters and held_out.start > 0:
            course = train(
                parameters,
                self.backward,
                lambda: self.divergence(held_out),
                n_windows=held_out.start,
                windows_a_step=self._windows.step(options["batch_tokens"]),
                epochs=options["epochs"],
                learning_rate=options["learning_rate"],
                seed=seed,
                option=option,
                log=log,
                saved=saved,
                belongs=belongs,
            )
            seconds += course.seconds
            report["history"] = course.history
            if course.error < before:
                report |= {"kl": course.error, "epoch": course.epoch}
        return {**report, "seconds": seconds}

    def divergence(self, windows: slice) -> float:
        """Mean nats a token that its predictions on these windows are from the teacher's."""
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
        wanted = self._taught[batch][kept].to(self._device)
        rows = self._chunk.run(self._windows, batch, None, trained=n_tokens is not None)[kept.to(self._device)]
        gradient, total = torch.zeros_like(rows), 0.0
        for part in slices(0, len(rows), _TOKENS_AT_ONCE):
            with torch.no_grad():
                taught = self._chunk.predict(wanted[part], self._head)
            states = rows[part].detach().requires_grad_(n_tokens is not None)
            logits = self._chunk.predict(states, self._head)
            total += divergence_of_logits(taught, logits.detach())
            if n_tokens is not None:
                (gradient[part],) = torch.autograd.grad(logits, states, taught.div_(n_tokens))
        if n_tokens is not None:
            rows.backward(gradient)
        return total
