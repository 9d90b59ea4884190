"""What a model trained from scratch reads: a tokenizer made from the text, and the text as one stream of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cospadi.errors import ArtifactError
from cospadi.files import replacing, write_tensors
from cospadi.sources.texts import read_documents

FORMAT_VERSION = 1
END = "<|endoftext|>"


def train_tokenizer(
    text: str | Path, output: str | Path, *, vocabulary: int, log: Callable[[str], None] = print
) -> None:
    """Train a byte-level BPE tokenizer and write it as a Hugging Face folder.

    Parameters
    ----------
    text : path-like
        JSONL, one article ``{"title", "text"}`` a line.
    output : path-like
        Folder with ``tokenizer.json`` and ``tokenizer_config.json``.
    vocabulary : int
        Number of tokens, 257 or more: all bytes and the end of text are among them.
    log : callable

    Raises
    ------
    ArtifactError
        If the text is missing, damaged, or too little for that many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((article for _, article in read_documents(text)), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocabulary:
        raise ArtifactError(
            text,
            f"gives {found} tokens, but training.language.vocabulary is {vocabulary}",
            "Give more text, or lower the vocabulary",
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    with replacing(output) as temporary:
        fast.save_pretrained(temporary)
    log(f"{vocabulary} tokens")


def tokenize(
    tokenizer: str | Path,
    training: str | Path,
    heldout: str | Path,
    output: str | Path,
    *,
    log: Callable[[str], None] = print,
) -> None:
    """Write both parts of the text as streams of tokens, an end-of-text token behind every article.

    Parameters
    ----------
    tokenizer : path-like
        Folder from `train_tokenizer`.
    training, heldout : path-like
        JSONL, one article ``{"title", "text"}`` a line.
    output : path-like
        Safetensors: ``training (n,)`` and ``heldout (m,)``, int32. Metadata: ``format_version``, ``vocabulary``,
        ``heldout_bytes`` and ``heldout_words`` (between white space).
    log : callable

    Raises
    ------
    ArtifactError
        If a file is missing or damaged, or has no article.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(Path(tokenizer, "tokenizer.json")))
    end = encoder.token_to_id(END)
    streams, articles = {}, {}
    for name, path in (("training", training), ("heldout", heldout)):
        articles[name] = [text for _, text in read_documents(path)]
        encoded = encoder.encode_batch(articles[name])
        ids = [token for encoding in encoded for token in (*encoding.ids, end)]
        if not ids:
            raise ArtifactError(path, "has no article", "Give more text")
        streams[name] = np.array(ids, np.int32)
        log(f"{name}: {len(encoded)} articles, {len(ids)} tokens")
    write_tensors(
        output,
        streams,
        {
            "format_version": FORMAT_VERSION,
            "vocabulary": encoder.get_vocab_size(),
            "heldout_bytes": sum(len(text.encode()) for text in articles["heldout"]),
            "heldout_words": sum(len(text.split()) for text in articles["heldout"]),
        },
    )
