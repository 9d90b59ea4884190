"""Which token windows a model reads for calibration: cut from text, or sampled from the model itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cospadi.calibration.activations import FORMAT_VERSION, writing
from cospadi.errors import ArtifactError, ConfigError, NumericalError
from cospadi.files import ModelFolder
from cospadi.provenance import tokens_digest
from cospadi.sources.models import embedding_rows
from cospadi.sources.texts import read_sources
from cospadi.stage import choose_dtype
from cospadi.tokenizer import load_tokenizer

_GENERATED_TOGETHER = 16  # windows; part of what a seed means, so it is not a setting
_LOG_EVERY = 64  # sampled positions
# How much of the text is looked at to see whether the tokenizer was made for such: characters, of so many documents
_LOOKED_AT, _LOOKED_AT_DOCUMENTS = 2000, 100
# A tokenizer takes text that it was not made for byte by byte, or as one unknown token after the other
_FEW_BYTES, _MANY_UNKNOWN = 1.8, 0.01

Log = Callable[[str], None]


def prepare_windows(
    model_folder: str | Path,
    calibration: Mapping[str, Any],
    text_file: str | Path | None,
    output: str | Path,
    *,
    log: Log = print,
) -> None:
    """Write the calibration windows.

    Equal arguments give equal bytes (for ``source: self``: on the same machine with the same number of threads).

    Parameters
    ----------
    model_folder : path-like
        A Hugging Face folder.
    calibration : mapping
        ``source`` (``text``, or ``self``: sampled from the model), ``samples``, ``length`` (tokens a window), ``seed``,
        ``packing``; for a mixture ``shares``, a number for each source of the text; for ``self`` also ``dtype``, which
        the model computes in (see `stage.choose_dtype`; default
        ``auto``). With ``packed`` documents are joined in random order and windows are cut at random places of the
        whole stream, never overlapping; with ``single`` a window holds the beginning of one document, padded on
        the right.
    text_file : path-like or None
        ``calibration.jsonl``; None for ``source: self``.
    output : path-like
        HDF5: ``input_ids (samples, length) int32``, ``attention_mask (samples, length) uint8``, 0 on padding.
        Attributes: ``format_version``, ``tokens`` (their digest), ``model``, ``seed``, ``source``, ``packing``,
        ``vocabulary_size`` (of the tokenizer), ``n_documents`` (used); for ``source: self`` also ``dtype`` and
        ``dtype_reason``.
    log : callable

    Raises
    ------
    ConfigError
        If the windows are longer than the model's positions, or there is no text file to cut them from.
    ArtifactError
        If there is too little text (saying how much is missing), the tokenizer is missing or damaged, or it gives
        ids without an embedding row.
    NumericalError
        If the model's own predictions are not finite (``source: self``).
    """
    model_folder = Path(model_folder)
    samples, length, seed = calibration["samples"], calibration["length"], calibration["seed"]
    folder = ModelFolder(model_folder)
    positions = folder.config.get("text_config", folder.config).get("max_position_embeddings")
    if positions is not None and length > positions:
        raise ConfigError([f"calibration.length: {length}; the model has {positions} positions"])
    tokenizer = _load_tokenizer(model_folder)

    arithmetic: dict[str, str] = {}
    if calibration["source"] == "self":
        dtype, reason = choose_dtype(calibration.get("dtype", "auto"), "cpu")
        arithmetic = {"dtype": dtype, "dtype_reason": reason}
        log(f"sampling {samples} windows of {length} tokens from the model itself, in {dtype}: {reason}")
        input_ids = _sample_from_model(model_folder, tokenizer, samples, length, seed, dtype, log)
        attention_mask, n_documents = np.ones_like(input_ids), 0
    elif text_file is None:
        raise ConfigError(["calibration.source: 'text' needs a text file"])
    else:
        cut = _cut_packed if calibration.get("packing", "packed") == "packed" else _cut_single
        sources = list(read_sources(text_file).values()) or [[]]
        parts = []
        counts = _apportioned(samples, calibration.get("shares", [1]))
        for number, (documents, count) in enumerate(zip(sources, counts, strict=True)):
            # how many windows one source gives does not move the others': those kept out are known among more samples
            order = np.random.default_rng([seed, number] if number else seed)
            documents = [documents[index] for index in order.permutation(len(documents))]
            _warn_of_far_text(documents, tokenizer, log)
            parts.append(cut(documents, tokenizer, count, length, order, Path(text_file), log))
        input_ids, attention_mask = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        n_documents = sum(part[2] for part in parts)
        if len(parts) > 1:  # the last windows may be held out: they are of every source
            mixed = np.random.default_rng([seed, len(parts)]).permutation(samples)
            input_ids, attention_mask = input_ids[mixed], attention_mask[mixed]

    rows = embedding_rows(folder)
    if input_ids.max() >= rows:
        raise ArtifactError(
            model_folder,
            f"the tokenizer gives id {input_ids.max()}, but the model has {rows} embedding rows (vocabulary mismatch)",
            "Take tokenizer and weights from the same model",
        )
    write_windows(
        output,
        input_ids,
        attention_mask,
        model=model_folder.name,
        seed=seed,
        source=calibration["source"],
        packing=calibration.get("packing", "packed"),
        vocabulary_size=tokenizer.size,
        n_documents=n_documents,
        **arithmetic,
    )
    log(f"{samples} windows of {length} tokens, {int(attention_mask.sum())} tokens in all")


def write_windows(path: str | Path, input_ids: np.ndarray, attention_mask: np.ndarray, **attributes: Any) -> None:
    """Write windows, ids and mask both (samples, length), with the digest that all that is made from them carries."""
    belongs = {"format_version": FORMAT_VERSION, "tokens": tokens_digest(input_ids, attention_mask)}
    with writing(path, {**belongs, **attributes}) as file:
        file.create_dataset("input_ids", data=input_ids.astype(np.int32), chunks=True, fletcher32=True)
        file.create_dataset("attention_mask", data=attention_mask.astype(np.uint8), chunks=True, fletcher32=True)


@dataclass(frozen=True)
class _Tokenizer:
    """What windows need of a tokenizer."""

    encode: Callable[[Sequence[str]], list[list[int]]]  # with the special tokens that the tokenizer adds by itself
    size: int
    bos: int | None
    eos: int | None
    special: frozenset[int]
    unknown: int | None

    def encode_documents(self, documents: Sequence[str]) -> list[list[int]]:
        """Token ids of each document, with what parts it from the next one.

        Tokenizers of the Llama and Gemma kind begin every text with a BOS token, which does that; the others add
        nothing by themselves, so an EOS token ends the document, as in their training.
        """
        ids = self.encode(documents)
        if self.encode([""])[0] or self.eos is None:
            return ids
        # a conversation has its own at the end, perhaps with a line's end behind it
        return [document if self.eos in document[-2:] else [*document, self.eos] for document in ids]


def _load_tokenizer(folder: Path) -> _Tokenizer:
    tokenizer = load_tokenizer(folder)
    return _Tokenizer(
        # a document is longer than the model's window: it is cut later
        encode=lambda texts: tokenizer(list(texts), verbose=False).input_ids,
        size=len(tokenizer),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        special=frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special),
        unknown=tokenizer.unk_token_id,
    )


def _apportioned(samples: int, shares: Sequence[float]) -> list[int]:
    """Windows of each source: as near to its share as whole windows are, at least one."""
    exact = [samples * share / sum(shares) for share in shares]
    counts = [max(1, int(count)) for count in exact]
    while sum(counts) != samples:
        step = 1 if sum(counts) < samples else -1
        able = [index for index, count in enumerate(counts) if count + step >= 1]
        if not able:
            raise ConfigError(
                [f"calibration.samples: {samples}; the text has {len(shares)} sources, each gives a window"]
            )
        counts[max(able, key=lambda index: step * (exact[index] - counts[index]))] += step
    return counts


def _warn_of_far_text(documents: Sequence[str], tokenizer: _Tokenizer, log: Log) -> None:
    """Say so where the tokenizer was not made for such text: what the model computes on it tells little of its use."""
    seen = [document[:_LOOKED_AT] for document in documents[:_LOOKED_AT_DOCUMENTS]]
    ids = [index for document in seen for index in tokenizer.encode([document])[0]]
    nbytes = sum(len(document.encode()) for document in seen)
    unknown = ids.count(tokenizer.unknown) / max(len(ids), 1) if tokenizer.unknown is not None else 0.0
    if nbytes < _FEW_BYTES * len(ids):
        log(
            f"warning: only {nbytes / len(ids):.1f} bytes of the text are a token (4 to 5 of English are): it is far "
            "from what the model's tokenizer was made for. Is it the right text, of a language that the model knows?"
        )
    if unknown > _MANY_UNKNOWN:
        log(
            f"warning: {unknown:.0%} of the text's tokens are unknown to the model's tokenizer. Is it the right text, "
            "and of a language that the model knows?"
        )


def _cut_packed(
    documents: Sequence[str],
    tokenizer: _Tokenizer,
    samples: int,
    length: int,
    order: np.random.Generator,
    text_file: Path,
    log: Log,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Windows drawn from the stream of all documents: ids and mask (samples, length), documents used."""
    parts = [np.array(ids, np.int64) for document in documents for ids in tokenizer.encode_documents([document])]
    stream = np.concatenate([np.empty(0, np.int64), *parts])
    log(f"{len(documents)} documents, {stream.size} tokens")
    if stream.size < samples * length:
        raise ArtifactError(
            text_file,
            f"{stream.size} tokens, but {samples} windows of {length} need {samples * length}: "
            f"{samples * length - stream.size} tokens are missing",
            "Give more text, or lower calibration.samples or calibration.length",
        )
    # the stream is a row of whole windows after a random beginning; some of them are drawn
    whole = stream.size // length
    first = order.integers(stream.size - whole * length + 1)
    windows = stream[first : first + whole * length].reshape(whole, length)
    input_ids = windows[order.choice(whole, samples, replace=False)]
    return input_ids, np.ones_like(input_ids), len(documents)


def _cut_single(
    documents: Sequence[str],
    tokenizer: _Tokenizer,
    samples: int,
    length: int,
    order: np.random.Generator,
    text_file: Path,
    log: Log,
) -> tuple[np.ndarray, np.ndarray, int]:
    """A document a window, padded on the right: ids and mask (samples, length), documents used."""
    encoded = [ids[:length] for ids in tokenizer.encode_documents(documents[:samples])]
    if len(encoded) < samples:
        raise ArtifactError(
            text_file,
            f"{len(encoded)} documents, but {samples} windows of one document each are asked for: "
            f"{samples - len(encoded)} documents, up to {(samples - len(encoded)) * length} tokens, are missing",
            "Give more documents, lower calibration.samples, or set calibration.packing to packed",
        )
    # what pads does not matter, the mask leaves it out; 0 has a row in every embedding
    input_ids = np.zeros((samples, length), np.int64)
    attention_mask = np.zeros((samples, length), np.int64)
    for row, ids in enumerate(encoded):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    log(f"{samples} documents, {int(attention_mask.sum())} tokens")
    return input_ids, attention_mask, samples


def _sample_from_model(
    folder: Path, tokenizer: _Tokenizer, samples: int, length: int, seed: int, dtype: str, log: Log
) -> np.ndarray:
    """Token ids (samples, length) drawn from the model's own distribution at temperature 1.

    A window begins with BOS where the tokenizer begins texts so, otherwise with a random token. It goes on after an
    end of text, as a model trained on packed text does, so every window is full.
    """
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    class Progress(StoppingCriteria):
        """Logs while sampling; never stops it."""

        def __init__(self, first: int) -> None:
            self.first, self.start = first, time.perf_counter()

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = input_ids.shape[1]
            if done % _LOG_EVERY == 0 or done == length:
                last = self.first + len(input_ids)
                seconds = time.perf_counter() - self.start
                log(f"windows {self.first + 1}-{last} of {samples}: token {done}/{length} {seconds:.1f}s")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).eval()
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.bos is not None and tokenizer.bos in tokenizer.encode([""])[0]:
        starts = np.full(samples, tokenizer.bos)
    else:
        plain = [index for index in range(min(tokenizer.size, rows)) if index not in tokenizer.special]
        starts = np.random.default_rng(seed).choice(plain, samples)

    batches = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, samples, _GENERATED_TOGETHER):
            prompt = torch.as_tensor(starts[first : first + _GENERATED_TOGETHER]).unsqueeze(1)  # (n, 1)
            try:
                batch = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    eos_token_id=None,
                    max_length=length,
                    use_cache=True,
                    stopping_criteria=[Progress(first)],
                )
            except RuntimeError as error:
                if "inf" not in str(error):
                    raise
                raise NumericalError(
                    f"{folder}: the model predicts NaN or infinity; its weights are damaged"
                ) from error
            batches.append(batch.numpy())
    return np.concatenate(batches)
