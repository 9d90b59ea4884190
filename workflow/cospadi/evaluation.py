"""How good is a model: perplexity on held-out text, zero-shot tasks (both by lm-eval), and text it writes.

The held-out text is one local lm-eval task, ``tasks/heldout.yaml``. Its documents are chosen by bytes, never by a
model's tokenizer, so every model of a run is scored on the same text.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub.constants
import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM

from cospadi.errors import ArtifactError, ConfigError, CospadiError, NumericalError
from cospadi.files import explaining, write_json
from cospadi.runtime.cospadi_linear import unpack_
from cospadi.stage import choose_dtype
from cospadi.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"
_LAST_WORD = "last_word"
FORMAT_VERSION = 1

# English has 4.4 to 4.7 bytes a token under the tokenizers of today, a twentieth of it less than 3.7: a piece of
# 3.5 bytes for each token of the window fits it almost always. A piece that does not costs a second full window.
BYTES_PER_TOKEN = 4.5
PIECE_BYTES_PER_TOKEN = 3.5

# passages of the task last_word: long enough to tell what its last word is
_PASSAGE_CONTEXT = 4  # sentences before the last
_PASSAGE_WORDS = (30, 150)

# what is reported of a task that has several of these
_PRIMARY_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity", "perplexity")


def evaluate(
    model_folder: Path,
    evaluation: Mapping[str, Any],
    *,
    heldout: Path | None = None,
    output: Path,
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
          (0), ``limit`` (documents a task) and ``task_path``; ``last_word`` is made of the held-out text;
        - ``generate``: ``prompts``, ``max_new_tokens`` (40) and ``chat`` (false): greedy text, through the chat
          template of the tokenizer where there is one;
        - ``batch_size`` (1): windows, or documents of a task, that go through the model together;
        - ``dtype`` (``auto``): what the model computes in, see `stage.choose_dtype`.
    heldout : Path, optional
        JSONL file, one article ``{"title", "text"}`` a line; needed for ``perplexity`` and the task ``last_word``.
    output : Path
        JSON file to write.
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
        words between white space instead, as lm-eval does, and so compares across tokenizers.

    Raises
    ------
    ArtifactError
        If a file is missing or damaged, the held-out text is empty, or the tokenizer does not fit the model.
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

    with _offline():
        pieces = _read_pieces(heldout, evaluation["perplexity"]) if "perplexity" in evaluation else []
        window = evaluation.get("perplexity", {}).get("window", 0)
        model, tokenizer = _load(model_folder, device, getattr(torch, dtype), window=window)
    seconds = {"loading": time.perf_counter() - started}
    log(f"loaded {model_folder} in {seconds['loading']:.1f} s, as {dtype}: {reason}")

    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": str(model_folder),
        "dtype": dtype,
        "dtype_reason": reason,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    if pieces:
        options = evaluation["perplexity"]
        lm = _ScoringLM(
            model, tokenizer, folder=model_folder, log=log, batch_size=batch_size, max_length=options["window"]
        )
        with _offline(), _timed(seconds, "perplexity"):
            result["perplexity"] = _perplexity(lm, heldout, options, pieces)
        seconds["perplexity_model"] = lm.seconds
        result["perplexity"]["tokens_per_second"] = result["perplexity"]["tokens"] / seconds["perplexity"]
        log("word perplexity {word:.2f}, token perplexity {token:.2f}, {tokens} tokens".format(**result["perplexity"]))
    if "tasks" in evaluation:
        lm = _ScoringLM(model, tokenizer, folder=model_folder, log=log, batch_size=batch_size)
        with _timed(seconds, "tasks"):
            result["tasks"] = _tasks(lm, evaluation, heldout)
        seconds["tasks_model"] = lm.seconds
        for name, scores in result["tasks"].items():
            if "primary" in scores:
                log(f"{name}: {scores['primary']} {scores['metrics'][scores['primary']]:.4f}")
    if "generate" in evaluation:
        with _timed(seconds, "generate"):
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


def heldout_pieces(articles: Sequence[str], *, max_tokens: int | None, window: int) -> list[str]:
    """Cut articles into pieces of one window and take about `max_tokens` tokens of them, spread over all articles.

    First pieces of the articles come first, then second pieces, and so on; of a round that does not fit the budget,
    evenly spaced ones are taken. A piece ends at white space. Sizes are counted in UTF-8 bytes.

    Parameters
    ----------
    articles : sequence of str
    max_tokens : int or None
        Budget, at 4.5 bytes a token; None: take everything.
    window : int
        Tokens of context; a piece has at most 3.5 bytes for each, so that it fits one window.
    """
    max_tokens = math.inf if max_tokens is None else max_tokens
    size = round(PIECE_BYTES_PER_TOKEN * min(window, max_tokens))
    budget = BYTES_PER_TOKEN * max_tokens
    cut = [_cut(article, size) for article in articles]
    chosen: list[str] = []
    for rank in range(max(map(len, cut), default=0)):
        candidates = [pieces[rank] for pieces in cut if len(pieces) > rank]
        mean = sum(len(piece.encode()) for piece in candidates) / len(candidates)
        left = (budget - sum(len(piece.encode()) for piece in chosen)) / mean
        if left < len(candidates):
            count = round(left)
            if not chosen:
                count = max(1, count)
            chosen += [candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count)]
            break
        chosen += candidates
    return chosen


def heldout_dataset(heldout: str, max_tokens: int | None, window: int, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents of the lm-eval task ``heldout``, made from the task manager's metadata."""
    pieces = _read_pieces(Path(heldout), {"max_tokens": max_tokens, "window": window})
    return {"test": datasets.Dataset.from_dict({"text": pieces})}


def last_word_passages(articles: Sequence[str]) -> list[str]:
    """Passages whose last word can be guessed: it stands in them before, as most answers of LAMBADA do.

    A passage is a sentence and the up to four before it in its paragraph, 30 to 150 words without the end mark; its
    last word is of at least four letters. Unlike LAMBADA's, nobody checked that people guess them.

    Parameters
    ----------
    articles : sequence of str

    Returns
    -------
    list of str
        Every passage is ``"context word"``; the order is by rank in the article, so that a limit takes from all.
    """
    found: list[tuple[int, str]] = []
    for article in articles:
        rank = 0
        for paragraph in article.split("\n"):
            sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph.strip())
            for last in range(1, len(sentences)):
                together = sentences[max(0, last - _PASSAGE_CONTEXT) : last + 1]
                passage = " ".join(" ".join(together).split()).rstrip(".!?")
                context, _, word = passage.rpartition(" ")
                fits = _PASSAGE_WORDS[0] <= len(passage.split()) <= _PASSAGE_WORDS[1]
                if fits and re.fullmatch(r"[A-Za-z]{4,}", word) and re.search(rf"\b{word}\b", context):
                    found.append((rank, passage))
                    rank += 1
    return [passage for _, passage in sorted(found, key=lambda entry: entry[0])]


def last_word_dataset(heldout: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents of the lm-eval task ``last_word``, made from the task manager's metadata."""
    passages = last_word_passages(_read_articles(Path(heldout)))
    if not passages:
        raise ArtifactError(heldout, "holds no passage for the task last_word", "Give more text, or leave the task out")
    return {"test": datasets.Dataset.from_dict({"text": passages})}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[str],
    max_new_tokens: int = 40,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Continue every prompt greedily, all of them in one batch.

    Parameters
    ----------
    model, tokenizer
        As loaded by transformers.
    prompts : sequence of str
    max_new_tokens : int
    chat : bool
        Put the prompt through the chat template, if the tokenizer has one.

    Returns
    -------
    list of dict
        ``prompt``, ``text`` (what the model added), ``n_tokens`` and ``chat`` (whether the template was used).
    """
    chat = chat and tokenizer.chat_template is not None
    texts = list(prompts)
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
    # the chat template writes its own special tokens
    rows = [tokenizer.encode(text, add_special_tokens=not chat) for text in texts]
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops, tokenizer.eos_token_id} - {None}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    length = max(map(len, rows))
    # padded on the left, so that all prompts end where generation begins
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    with torch.inference_mode():
        grown = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=padding,
        )
    samples = []
    for prompt, new in zip(prompts, grown[:, length:].tolist(), strict=True):
        end = next((i for i, token in enumerate(new) if token in stops), len(new))
        text = tokenizer.decode(new[:end], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text, "n_tokens": end, "chat": chat})
    return samples


class _ScoringLM(HFLM):
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
    ) -> None:
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
        self._folder = folder
        self._log = log
        self._logged = time.perf_counter()
        self._n_done = self._n_total = self._n_tokens = 0
        self.seconds = 0.0

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._n_done, self._n_total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        self._n_done, self._n_total = 0, len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        bad = sum(not math.isfinite(loglikelihood) for loglikelihood, _ in answers)
        if bad:
            raise NumericalError(
                f"{self._folder}: {bad} of {len(answers)} log-likelihoods are not finite. The model is broken: its "
                "weights hold NaN or infinity, or overflow the dtype; delete its folder and run again"
            )
        return answers

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        started = time.perf_counter()
        logits = super()._model_call(inps, attn_mask, labels)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        now = time.perf_counter()
        self.seconds += now - started
        self._n_done += len(inps)
        self._n_tokens += inps.numel()
        if now - self._logged > 5:
            self._logged = now
            share = min(1.0, self._n_done / max(1, self._n_total))
            speed = self._n_tokens / self.seconds
            self._log(f"{self._n_done} of {self._n_total} sequences ({share:.0%}), {speed:.0f} tokens/s")
        return logits


def _perplexity(lm: _ScoringLM, heldout: Path, options: Mapping[str, Any], pieces: Sequence[str]) -> dict[str, Any]:
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    tokens = [lm.tok_encode(piece) for piece in pieces]
    highest = max(map(max, tokens))
    if highest >= vocabulary:
        raise ArtifactError(
            lm._folder,
            f"the tokenizer gives token {highest}, the model knows {vocabulary}",
            "Tokenizer and weights are of different models; fetch the model again",
        )
    metadata = {"heldout": str(heldout), "max_tokens": options["max_tokens"], "window": options["window"]}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    # simple_evaluate would add 2 s a call for a list of the machine's software, and nothing to the numbers
    scores = _lm_eval(lm_eval.evaluate, lm, task_dict=manager.load(["heldout"]), log_samples=True)
    n_tokens = sum(map(len, tokens))
    loglikelihood = sum(sample["filtered_resps"][0] for sample in scores["samples"]["heldout"])
    return {
        "word": scores["results"]["heldout"]["word_perplexity,none"],
        "token": math.exp(-loglikelihood / n_tokens),
        "bits_per_byte": scores["results"]["heldout"]["bits_per_byte,none"],
        "tokens": n_tokens,
        "words": sum(len(piece.split()) for piece in pieces),
        "bytes": sum(len(piece.encode()) for piece in pieces),
        "pieces": len(pieces),
        "max_tokens": options["max_tokens"],
        "window": options["window"],
    }


def _tasks(lm: _ScoringLM, evaluation: Mapping[str, Any], heldout: Path | None) -> dict[str, Any]:
    names, folder = evaluation["tasks"], evaluation.get("task_path")
    managers = []
    if folder is not None:
        managers.append(TaskManager(include_path=str(folder), include_defaults=False))
    known = set(managers[0].all_tasks) if managers else set()
    local, public = [name for name in names if name in known], [name for name in names if name not in known]
    scores: dict[str, Any] = {}
    if _LAST_WORD in public:
        if heldout is None:
            raise ConfigError([f"evaluation.tasks: {_LAST_WORD} needs a held-out text"])
        public.remove(_LAST_WORD)
        with _offline():
            metadata = {"heldout": str(heldout)}
            manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
            scores |= _run_tasks(lm, manager, [_LAST_WORD], evaluation)
    if public:
        manager = TaskManager()
        unknown = [name for name in public if name not in manager.all_tasks]
        if unknown:
            raise ConfigError([_unknown_task(name, folder, [*manager.all_tasks, *known]) for name in unknown])
        scores |= _run_tasks(lm, manager, public, evaluation)
    if local:
        with _offline():
            scores |= _run_tasks(lm, managers[0], local, evaluation)
    return scores


def _run_tasks(
    lm: _ScoringLM, manager: TaskManager, names: Sequence[str], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    scores = _lm_eval(
        lm_eval.simple_evaluate,
        lm,
        tasks=list(names),
        task_manager=manager,
        num_fewshot=evaluation.get("num_fewshot", 0),
        limit=evaluation.get("limit"),
        log_samples=False,
    )
    tasks = {}
    for name, values in scores["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, float) and math.isfinite(value) and "_stderr" not in key
        }
        primary = next((metric for metric in _PRIMARY_METRICS if metric in metrics), None)
        tasks[name] = {"metrics": metrics} | ({"primary": primary} if primary else {})
        tasks[name]["num_fewshot"] = scores["n-shot"].get(name)
        tasks[name]["documents"] = scores["n-samples"].get(name, {}).get("effective")
    return tasks


def _lm_eval(function: Callable[..., Any], lm: _ScoringLM, **arguments: Any) -> dict[str, Any]:
    try:
        return function(lm, bootstrap_iters=0, **arguments)
    except OverflowError as error:  # exp of the mean log-likelihood
        raise NumericalError(
            f"{lm._folder}: the perplexity is larger than any float. The model is broken; delete its folder, run again"
        ) from error
    except OSError as error:  # also what the hub's clients raise without a network
        raise CospadiError(
            f"evaluation.tasks: the data of a task cannot be loaded ({error}). Connect to the hub or fill its cache "
            "first; for a task of your own, check data_files"
        ) from error


def _unknown_task(name: str, folder: str | None, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    where = f" or {folder}" if folder else ""
    return f"evaluation.tasks: {name!r} is not a task of lm-eval {version('lm_eval')}{where}{hint}"


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
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ArtifactError(model_folder, f"lacks {len(report['missing_keys'])} tensors ({missing} ...)", remedy)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ArtifactError(
            model_folder,
            "its tokenizer has neither a beginning-of-text nor an end-of-text token to put before the first word",
            "Set bos_token in tokenizer_config.json",
        )
    # a packed model would unpack its matrices in every forward pass
    return unpack_(model.to(device).eval(), dtype), tokenizer


def _read_pieces(heldout: Path | None, options: Mapping[str, Any]) -> list[str]:
    if heldout is None:
        raise ConfigError(["evaluation.perplexity: needs a held-out text"])
    articles = _read_articles(heldout)
    pieces = heldout_pieces(articles, max_tokens=options["max_tokens"], window=options["window"])
    if not pieces:
        raise ArtifactError(heldout, f"holds no text ({len(articles)} articles)", "Fetch the text again")
    return pieces


def _read_articles(heldout: Path) -> list[str]:
    remedy = 'Fetch the text again; one JSON object {"title", "text"} a line is expected'
    articles = []
    try:
        with explaining(heldout), open(heldout, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    articles.append(json.loads(line)["text"].strip())
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ArtifactError(heldout, f"line {number} is not an article ({error!r})", remedy) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(heldout, f"cannot be read ({error})", remedy) from error
    return articles


def _cut(article: str, size: int) -> list[str]:
    """`article` in pieces of at most `size` bytes that end at white space, where there is any."""
    pieces, rest = [], article.strip().encode()
    while len(rest) > size:
        head = rest[: size + 1].decode(errors="ignore")
        end = max(head.rfind(" "), head.rfind("\n"))
        if end <= 0:
            head = rest[:size].decode(errors="ignore")
            end = len(head)
        pieces.append(head[:end].strip())
        rest = rest[len(head[:end].encode()) :].lstrip()
    return [piece for piece in (*pieces, rest.decode()) if piece]


@contextlib.contextmanager
def _offline() -> Iterator[None]:
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


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
