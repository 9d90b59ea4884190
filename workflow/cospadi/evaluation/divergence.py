"""How far a model's predictions are from the dense model's: the Kullback-Leibler divergence of every scored token.

The distributions of the dense model are not stored: one number for each word of the vocabulary and each token would be
gigabytes. What is stored is what enters its last matrix, the head, in the dtype that it computes in: ``hidden_size``
numbers a token. The head makes the logits of them again, a few tokens at a time, so nothing is approximated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import torch
from safetensors import safe_open

from cospadi.calibration.activations import STORED_AS, from_stored, reading, to_stored, writing
from cospadi.errors import ArtifactError, NumericalError
from cospadi.evaluation.placement import input_device
from cospadi.files import ModelFolder
from cospadi.provenance import check_provenance, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
_REMEDY = "Delete it and run again to evaluate the dense model anew"
_AT_ONCE = 64  # tokens whose dense logits are in memory
# Nats that a model may seem to be from itself: what another order of sums makes of logits in bfloat16
_SAME = 1e-2


class Recorder:
    """Writes what enters the head of the dense model, for the tokens that are scored."""

    def __init__(self, model: PreTrainedModel, weight: torch.Tensor, file: h5py.File) -> None:
        self._file = file
        self._head = Head(model, weight)
        self._entering: torch.Tensor | None = None
        self._checked = False

    def entering(self, _module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Hook of the head: what it is about to read, (windows, tokens, hidden_size)."""
        self._entering = arguments[0]

    def __call__(self, row: int, ids: torch.Tensor, log_probabilities: torch.Tensor) -> None:
        n_scored = len(log_probabilities)
        states = self._entering[row, len(ids) - n_scored : len(ids)]
        if not self._checked:
            apart = float(self._head.divergences(states, log_probabilities).mean())
            if not apart < _SAME:
                raise NumericalError(
                    f"the logits of {type(self._head.model).__name__} are not what its last matrix makes of its hidden "
                    f"states ({apart:.3g} nats apart): set evaluation.perplexity.kl to false"
                )
            self._checked = True
        key = _key(ids, n_scored)
        if key not in self._file:
            self._file.create_dataset(key, data=to_stored(states), fletcher32=True)


class Comparison:
    """Adds up the divergence of a model from the dense one, whose states `recording` wrote.

    Parameters
    ----------
    model : PreTrainedModel
    states : Path
    dense : Path
        Folder of the dense model.

    Attributes
    ----------
    n_tokens : int
        Scored so far.

    Raises
    ------
    ArtifactError
        If the states are damaged, or of another model or, once a window comes, another text.
    """

    def __init__(self, model: PreTrainedModel, states: Path, dense: Path) -> None:
        with reading(states, _REMEDY) as file:
            says = dict(file.attrs)
        belongs = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(ModelFolder(dense))}
        check_provenance(states, says, belongs, _REMEDY)
        self._dtype = says.get("dtype")
        if self._dtype not in STORED_AS:
            raise ArtifactError(states, f"dtype is {self._dtype!r}; allowed: {', '.join(STORED_AS)}", _REMEDY)
        self._path = states
        self._head = Head(model, _dense_head(model, dense))
        self.n_tokens, self._total = 0, 0.0

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self._total / self.n_tokens

    def __call__(self, row: int, ids: torch.Tensor, log_probabilities: torch.Tensor) -> None:
        key = _key(ids, len(log_probabilities))
        with reading(self._path, _REMEDY) as file:
            states = file[key][:] if key in file else None
        if states is None:
            raise ArtifactError(self._path, f"has no states of a window of {len(ids)} tokens: of another text", _REMEDY)
        found = self._head.divergences(from_stored(states, self._dtype), log_probabilities)
        self._total += float(found.sum())
        self.n_tokens += len(found)


@contextmanager
def recording(model: PreTrainedModel, folder: Path, dtype: str, path: Path) -> Iterator[Recorder]:
    """A `Recorder` of the model of a folder, which computes in `dtype`; the file is whole, or not there."""
    belongs = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(ModelFolder(folder)), "dtype": dtype}
    with writing(path, belongs) as file:
        recorder = Recorder(model, _dense_head(model, folder), file)
        handle = model.get_output_embeddings().register_forward_pre_hook(recorder.entering)
        try:
            yield recorder
        finally:
            handle.remove()


class Head:
    """Hidden states to distributions, as the model does it, with a weight (vocabulary, hidden_size)."""

    def __init__(self, model: PreTrainedModel, weight: torch.Tensor) -> None:
        self.model = model
        self._weight = weight
        self._cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @torch.inference_mode()
    def divergences(self, states: torch.Tensor, log_probabilities: torch.Tensor) -> torch.Tensor:
        """``sum p (log p - log q)`` of each token, float64 (tokens,).

        Parameters
        ----------
        states : Tensor (tokens, hidden_size)
            That make p.
        log_probabilities : Tensor (tokens, vocabulary)
            ``log q``, float32.
        """
        found = []
        for first in range(0, len(states), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            logits = states[some].to(self._weight.device, self._weight.dtype) @ self._weight.T
            if self._cap is not None:
                logits = torch.tanh(logits / self._cap) * self._cap
            log_p = logits.log_softmax(-1, dtype=torch.float32)
            log_q = log_probabilities[some].to(log_p.device)  # of a spread model, where its inputs are
            found.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(found).double()


def _dense_head(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """The last matrix of the dense model of a folder, its own or the embedding, as `model` would compute with it.

    Most variants have that very one: it is in memory once then. One on the disk or in few bits cannot be asked.
    """
    dense, own = ModelFolder(folder), model.get_output_embeddings()
    name = "lm_head.weight" if "lm_head.weight" in dense.weight_map else "model.embed_tokens.weight"
    there = isinstance(own.weight, torch.nn.Parameter) and not own.weight.is_meta
    with safe_open(dense.file_of(name).path, framework="pt") as file:
        theirs = file.get_tensor(name).to(own.weight.device if there else input_device(model), model.dtype)
    return own.weight if there and torch.equal(own.weight, theirs) else theirs


def _key(ids: torch.Tensor, n_scored: int) -> str:
    digest = hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes())
    return f"{digest.hexdigest()[:32]}-{n_scored}"
