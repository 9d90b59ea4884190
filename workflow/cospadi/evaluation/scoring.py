"""lm-eval as this project runs it: log-likelihoods in float32, no request to a hub, errors that say what to do."""

from __future__ import annotations

import contextlib
import inspect
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub.constants
import torch
from lm_eval.models.huggingface import HFLM

from cospadi.errors import CospadiError, NumericalError
from cospadi.evaluation import contexts
from cospadi.evaluation.placement import input_device
from cospadi.stage import Every

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ScoringLM(HFLM):
    """lm-eval's Hugging Face model, with the same numbers: it logs progress, keeps time and refuses NaN."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: Path,
        log: Callable[[str], None],
        batch_size: int,
        max_length: int | None = None,
        watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        """`watch` is told of every window: its row in the batch, its ids, and the log-probabilities of what is scored
        of it, (tokens, vocabulary).
        """
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            # a bfloat16 log-softmax would round every log-likelihood, and their sum, to 3 digits
            softmax_dtype="float32",
            # the rolling windows begin with one such token anyway; a second one would be scored as text
            add_bos_token=False if max_length else None,
        )
        self._device = input_device(model)  # lm-eval takes where the first weight is, which may be on the disk
        self.folder = folder
        self._log = log
        self._due = Every(5)
        self._n_done = self._n_total = self._n_tokens = 0
        self.seconds = 0.0
        self._watch = watch
        # with more at a time, documents of all lengths go together as lm-eval has it; a window is one of its own
        self._by_context = batch_size == 1 and watch is None and _keeps_logits(model)

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._n_done, self._n_total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        self._n_done, self._n_total = 0, len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        if self._by_context:
            asked = [contexts.Request(*ids) for _, *ids in requests]
            for places in contexts.groups_of(asked, self.max_length):
                found = contexts.score(self._forward, [asked[place] for place in places], self.device)
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
                self._n_done += len(places)
        left = [place for place, answer in enumerate(answers) if answer is None]
        if left:
            rest = [requests[place] for place in left]
            found = super()._loglikelihood_tokens(rest, disable_tqdm=True, override_bs=override_bs)
            for place, answer in zip(left, found, strict=True):
                answers[place] = answer
        bad = sum(not math.isfinite(loglikelihood) for loglikelihood, _ in answers)
        if bad:
            raise NumericalError(
                f"{self.folder}: {bad} of {len(answers)} log-likelihoods are not finite. The model is broken: its "
                "weights hold NaN or infinity, or overflow the dtype; delete its folder and run again"
            )
        return answers

    def _select_cont_toks(
        self, logits: torch.Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> torch.Tensor:
        chosen = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
        if self._watch is not None:
            self._watch(self._row, self._ids[self._row, :inplen], chosen)
            self._row += 1
        return chosen

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        self._ids, self._row = inps, 0
        logits = self._forward(inps).logits
        self._n_done += len(inps)
        return logits

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, **how: Any) -> Any:
        """The model, its seconds counted and told of."""
        started = time.perf_counter()
        found = self.model(ids, **how)
        if found.logits.is_cuda:
            torch.cuda.synchronize(found.logits.device)
        self.seconds += time.perf_counter() - started
        self._n_tokens += ids.numel()
        if self._due():
            share = min(1.0, self._n_done / max(1, self._n_total))
            speed = self._n_tokens / self.seconds
            self._log(f"{self._n_done} of {self._n_total} sequences ({share:.0%}), {speed:.0f} tokens/s")
        return found


def _keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def run_lm_eval(function: Callable[..., Any], lm: ScoringLM, **arguments: Any) -> dict[str, Any]:
    try:
        return function(lm, bootstrap_iters=0, **arguments)
    except OverflowError as error:  # exp of the mean log-likelihood
        raise NumericalError(
            f"{lm.folder}: the perplexity is larger than any float. The model is broken; delete its folder, run again"
        ) from error
    except OSError as error:  # also what the hub's clients raise without a network
        raise CospadiError(
            f"evaluation.tasks: the data of a task cannot be loaded ({error}). Connect to the hub or fill its cache "
            "first; for a task of your own, check data_files"
        ) from error


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No request to any hub inside; data sets are cached in a temporary folder."""
    switches = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    cache = (datasets.config, "HF_DATASETS_CACHE")
    before = [getattr(module, name) for module, name in (*switches, cache)]
    with tempfile.TemporaryDirectory(prefix="cospadi-datasets-") as folder:
        try:
            for module, name in switches:
                setattr(module, name, True)
            datasets.config.HF_DATASETS_CACHE = folder
            yield
        finally:
            for (module, name), value in zip((*switches, cache), before, strict=True):
                setattr(module, name, value)
