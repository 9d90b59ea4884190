"""The stage: load a model, score it, let it write, and put all of it in one file."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from cospadi.errors import ArtifactError, ConfigError, listed
from cospadi.evaluation.divergence import Comparison, recording
from cospadi.evaluation.generation import generate
from cospadi.evaluation.heldout import read_pieces
from cospadi.evaluation.perplexity import perplexity
from cospadi.evaluation.scoring import ScoringLM, offline
from cospadi.evaluation.tasks import score_tasks
from cospadi.files import ModelFolder, write_json
from cospadi.provenance import fingerprint
from cospadi.runtime.cospadi_linear import pack_, unpack_
from cospadi.stage import choose_dtype, keep_freed_memory
from cospadi.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT_VERSION = 1


def evaluate(
    model_folder: Path,
    evaluation: Mapping[str, Any],
    *,
    heldout: Path | None = None,
    output: Path,
    states: Path | None = None,
    dense: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score a model and write the scores as JSON.

    Parameters
    ----------
    model_folder : Path
        Hugging Face folder, dense or packed.
    evaluation : mapping
        Any of

        - ``perplexity``: ``max_tokens`` (about how many are scored; None: all) and ``window`` (tokens of context);
        - ``tasks``: names of lm-eval tasks, its own or those of YAML files under ``task_path``, with ``num_fewshot``
          (0), ``limit`` (documents a task) and ``task_path``; `HELDOUT_TASKS` are made of the held-out text;
        - ``generate``: ``prompts``, ``max_new_tokens`` (40) and ``chat`` (false): greedy text, through the chat
          template of the tokenizer where there is one;
        - ``batch_size`` (1): windows, or documents of a task, that go through the model together;
        - ``dtype`` (``auto``): what the model computes in, see `stage.choose_dtype`.
    heldout : Path, optional
        JSONL file, one article ``{"title", "text"}`` a line; needed for ``perplexity`` and the tasks
        `HELDOUT_TASKS`.
    output : Path
        JSON file to write.
    states : Path, optional
        HDF5 file of what enters the head of the dense model on the held-out text: written if this is that model.
    dense : Path, optional
        Folder of the dense model, if this is another: `states` are read, and ``perplexity.kl`` is the mean
        Kullback-Leibler divergence of this model from it (`evaluation.divergence`).
    device : str
        ``cpu``, ``cuda``, ``cuda:1`` ...
    threads : int, optional
        Threads of torch.
    log : callable
        Takes one line of progress.

    Returns
    -------
    dict
        What was written. ``perplexity.token`` is ``exp(-sum loglik / tokens)``; ``perplexity.word`` divides by the
        words between white space instead, as lm-eval does, and so compares across tokenizers. ``perplexity.kl`` is in
        nats a token.

    Raises
    ------
    ArtifactError
        If a file is missing or damaged, the held-out text is empty, the tokenizer does not fit the model, or the states
        are of another model or text.
    ConfigError
        If the window is longer than the model's positions, or a task is unknown.
    NumericalError
        If a log-likelihood is not finite: the model is broken.
    CospadiError
        If the data of a task cannot be loaded.
    """
    started = time.perf_counter()
    evaluation = {key: value for key, value in evaluation.items() if value}
    batch_size = evaluation.get("batch_size", 1)
    dtype, reason = choose_dtype(evaluation.get("dtype", "auto"), device)
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about options chosen here on purpose

    with offline():
        pieces = read_pieces(heldout, evaluation["perplexity"]) if "perplexity" in evaluation else []
        window = evaluation.get("perplexity", {}).get("window", 0)
        model, tokenizer = _load(model_folder, device, getattr(torch, dtype), window=window)
    keep_freed_memory()
    seconds = {"loading": time.perf_counter() - started}
    log(f"loaded {model_folder} in {seconds['loading']:.1f} s, as {dtype}: {reason}")

    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": str(model_folder),
        "fingerprint": fingerprint(ModelFolder(model_folder)),
        "dtype": dtype,
        "dtype_reason": reason,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    if pieces:
        options = evaluation["perplexity"]
        with contextlib.ExitStack() as stack, offline(), _timed(seconds, "perplexity"):
            watch = None
            if states is not None and dense is None:
                watch = stack.enter_context(recording(model, model_folder, dtype, states))
            elif states is not None:
                watch = Comparison(model, states, dense)
            lm = ScoringLM(
                *(model, tokenizer),
                folder=model_folder,
                log=log,
                batch_size=batch_size,
                max_length=options["window"],
                watch=watch,
            )
            result["perplexity"] = perplexity(lm, heldout, options, pieces)
            if dense is not None and watch is not None:
                result["perplexity"]["kl"] = watch.mean
                log(f"{watch.mean:.4f} nats a token from the dense model")
        seconds["perplexity_model"] = lm.seconds
        result["perplexity"]["tokens_per_second"] = result["perplexity"]["tokens"] / seconds["perplexity"]
        log("word perplexity {word:.2f}, token perplexity {token:.2f}, {tokens} tokens".format(**result["perplexity"]))
    if "tasks" in evaluation:
        lm = ScoringLM(model, tokenizer, folder=model_folder, log=log, batch_size=batch_size)
        with _timed(seconds, "tasks"):
            result["tasks"] = score_tasks(lm, evaluation, heldout)
        seconds["tasks_model"] = lm.seconds
        for name, scores in result["tasks"].items():
            if "primary" in scores:
                log(f"{name}: {scores['primary']} {scores['metrics'][scores['primary']]:.4f}")
    if "generate" in evaluation:
        with _timed(seconds, "generate"):
            pack_(model)  # a few rows at a time are faster from the packed form
            result["samples"] = generate(model, tokenizer, **evaluation["generate"])
        for sample in result["samples"]:
            log(f"{sample['prompt']!r} -> {sample['text']!r}")

    seconds["total"] = time.perf_counter() - started
    result["seconds"] = seconds
    result["peak_rss_bytes"] = _peak_rss()
    if model.device.type == "cuda":
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated(model.device)
    result["versions"] = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    result["versions"]["python"] = platform.python_version()
    result = json.loads(json.dumps(result, sort_keys=True))
    write_json(output, result)
    return result


def _load(
    model_folder: Path, device: str, dtype: torch.dtype, *, window: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    remedy = "Delete the folder and run again"
    if not (model_folder / "config.json").is_file():
        raise ArtifactError(model_folder / "config.json", "the file does not exist", "Give a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(model_folder)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and window > positions:
            raise ConfigError([f"evaluation.perplexity.window: {window}, but {model_folder} has {positions} positions"])
        model, report = AutoModelForCausalLM.from_pretrained(
            model_folder, config=config, dtype=dtype, output_loading_info=True
        )
        tokenizer = load_tokenizer(model_folder, remedy)
    except (ConfigError, ArtifactError):
        raise
    except Exception as error:  # transformers and safetensors raise what they like
        raise ArtifactError(model_folder, f"cannot be loaded ({type(error).__name__}: {error})", remedy) from error
    if report["missing_keys"]:
        raise ArtifactError(model_folder, f"lacks {listed(sorted(report['missing_keys']))}", remedy)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ArtifactError(
            model_folder,
            "its tokenizer has neither a beginning-of-text nor an end-of-text token to put before the first word",
            "Set bos_token in tokenizer_config.json",
        )
    # a packed model would unpack its matrices in every forward pass
    return unpack_(model.to(device).eval(), dtype), tokenizer


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
