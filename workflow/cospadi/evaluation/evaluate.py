"""The stage: load a model, score it, let it write, and put all of it in one file."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from cospadi.errors import ArtifactError, ConfigError, listed
from cospadi.evaluation.divergence import Comparison, Recorder, recording
from cospadi.evaluation.generation import generate
from cospadi.evaluation.heldout import read_pieces
from cospadi.evaluation.perplexity import perplexity
from cospadi.evaluation.placement import is_spread, loading_arguments, placement
from cospadi.evaluation.scoring import ScoringLM, offline
from cospadi.evaluation.tasks import score_tasks
from cospadi.files import ModelFolder, write_json
from cospadi.finished import Finished, stamps
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
    code: Any = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score a model and write the scores as JSON.

    Tasks are run one after the other; those that an interrupted job had finished are not run again (`finished`).

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
        - ``device_map`` (None), ``max_memory`` (``gpu``, ``cpu``): how a model is spread that `device` has no room for,
          see `placement.loading_arguments`;
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
    device : {"cpu", "cuda"}
        ``cuda``: the first GPU that is seen, or all of them with a device map.
    threads : int, optional
        Threads of torch.
    code : JSON values
        Digests of what evaluates, and of the user's tasks: of a job that had others nothing is taken.
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
    seconds: dict[str, float] = {}
    with _offload_folder(evaluation, output) as offload:
        with offline(), _timed(seconds, "loading"):
            arguments = loading_arguments(evaluation, device, offload)
            window = evaluation.get("perplexity", {}).get("window", 0)
            model, tokenizer = _load(model_folder, device, getattr(torch, dtype), arguments, window=window)
        if not is_spread(model):  # whose weights come and go
            keep_freed_memory()
        log(f"loaded {model_folder} in {seconds['loading']:.1f} s, as {dtype}: {reason}")
        result: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": str(model_folder),
            "fingerprint": fingerprint(ModelFolder(model_folder)),
            "dtype": dtype,
            "dtype_reason": reason,
            "device": device,
            "placement": placement(model),
            "threads": torch.get_num_threads(),
        }
        if is_spread(model):
            log("weights on " + ", ".join(f"{name}: {size / 1e6:.1f} MB" for name, size in result["placement"].items()))
        score = functools.partial(ScoringLM, model, tokenizer, folder=model_folder, log=log, batch_size=batch_size)
        if pieces:
            options = evaluation["perplexity"]
            with offline(), _timed(seconds, "perplexity"), _watch(model, model_folder, dtype, states, dense) as watch:
                lm = score(max_length=options["window"], watch=watch)
                result["perplexity"] = perplexity(lm, heldout, options, pieces)
            if isinstance(watch, Comparison):
                result["perplexity"]["kl"] = watch.mean
                log(f"{watch.mean:.4f} nats a token from the dense model")
            seconds["perplexity_model"] = lm.seconds
            found = result["perplexity"]
            found["tokens_per_second"] = found["tokens"] / seconds["perplexity"]
            log("word perplexity {word:.2f}, token perplexity {token:.2f}, {tokens} tokens".format(**found))
        if "tasks" in evaluation:
            lm = score()
            belongs = [code, result["fingerprint"], evaluation, dtype, device, stamps([heldout] if heldout else [])]
            with Finished(output, belongs) as finished, _timed(seconds, "tasks"):
                result["tasks"] = score_tasks(lm, evaluation, heldout, finished, log)
            seconds["tasks_model"] = lm.seconds
        if "generate" in evaluation:
            with _timed(seconds, "generate"):
                pack_(model)  # a few rows at a time are faster from the packed form
                result["samples"] = generate(model, tokenizer, **evaluation["generate"])
            for sample in result["samples"]:
                log(f"{sample['prompt']!r} -> {sample['text']!r}")

    seconds["total"] = time.perf_counter() - started
    result["seconds"] = seconds
    result["peak_rss_bytes"] = _peak_rss()
    if device.startswith("cuda"):
        result["peak_device_bytes"] = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    result["versions"] = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    result["versions"]["python"] = platform.python_version()
    result = json.loads(json.dumps(result, sort_keys=True))
    write_json(output, result)
    return result


@contextlib.contextmanager
def _offload_folder(evaluation: Mapping[str, Any], output: Path) -> Iterator[Path]:
    """A folder beside `output` for weights that are moved to the disk, while they are needed."""
    if not evaluation.get("device_map"):
        yield output.parent
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".offload-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _watch(
    model: PreTrainedModel, folder: Path, dtype: str, states: Path | None, dense: Path | None
) -> Iterator[Recorder | Comparison | None]:
    """What follows the windows that are scored: writes the dense model's states, or compares with them."""
    if states is None:
        yield None
    elif dense is not None:
        yield Comparison(model, states, dense)
    else:
        with recording(model, folder, dtype, states) as recorder:
            yield recorder


def _load(
    model_folder: Path, device: str, dtype: torch.dtype, arguments: Mapping[str, Any], *, window: int
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
            model_folder, config=config, dtype=dtype, output_loading_info=True, **arguments
        )
        tokenizer = load_tokenizer(model_folder, remedy)
    except (ConfigError, ArtifactError):
        raise
    except Exception as error:  # transformers and safetensors raise what they like
        if arguments:
            remedy = (
                f"Give evaluation.max_memory less, or gpus more, where memory was full. Otherwise: {remedy.lower()}"
            )
        raise ArtifactError(model_folder, f"cannot be loaded ({type(error).__name__}: {error})", remedy) from error
    if report["missing_keys"]:
        raise ArtifactError(model_folder, f"lacks {listed(sorted(report['missing_keys']))}", remedy)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ArtifactError(
            model_folder,
            "its tokenizer has neither a beginning-of-text nor an end-of-text token to put before the first word",
            "Set bos_token in tokenizer_config.json",
        )
    if arguments:  # it is where it should be, and there may be no room for more
        return model.eval(), tokenizer
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
