"""Tiny random models of every supported family, and text for them, made once a session without a network.

Heavy imports stay inside the fixtures, so tests of the light rooms start in a moment.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")

_SIZES = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

# what sets a family apart: tied and untied heads, attention windows, head sizes that are not hidden_size / n_heads
_CHANGES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 24},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
}
_SHARDED = {"qwen3"}

_ARTICLES = ("the", "a", "every", "one", "this")
_ADJECTIVES = ("old", "small", "northern", "famous", "broken", "quiet", "early", "large", "green", "wooden")
_NOUNS = ("river", "village", "engine", "teacher", "library", "mountain", "poem", "market", "theory", "winter", "ship")
_VERBS = ("crosses", "describes", "follows", "was built near", "became", "measures", "replaced", "carries", "remembers")
_LINKS = ("and", "but", "while", "because", "although")


def english_articles(count: int, sentences: int = 40, seed: int = 0) -> list[dict[str, str]]:
    """`count` articles ``{"title", "text"}`` of English-like sentences; equal arguments give equal text."""
    draw = random.Random(seed)

    def phrase() -> str:
        return f"{draw.choice(_ARTICLES)} {draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)}"

    def sentence() -> str:
        text = f"{phrase()} {draw.choice(_VERBS)} {phrase()}"
        if draw.random() < 0.4:
            text += f" {draw.choice(_LINKS)} {phrase()} {draw.choice(_VERBS)} {phrase()} in {draw.randint(1600, 2020)}"
        return text[0].upper() + text[1:] + "."

    return [
        {"title": f"{draw.choice(_NOUNS)} {index}", "text": " ".join(sentence() for _ in range(sentences))}
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def tour_example() -> Callable[[str], str]:
    """Factory ``tour_example(name)``: the code behind a line ``<!-- example: name -->`` of docs/architecture.md."""
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text()

    def example(name: str) -> str:
        (code,) = re.findall(rf"<!-- example: {re.escape(name)} -->\n```python\n(.*?)```", page, flags=re.DOTALL)
        return code

    return example


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``calibration.jsonl`` (24 articles) and ``heldout.jsonl`` (6), one article a line."""
    folder = tmp_path_factory.mktemp("text")
    articles = english_articles(30)
    for name, part in (("calibration", articles[:24]), ("heldout", articles[24:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(article) + "\n" for article in part))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a byte-level BPE tokenizer of 390 entries, trained on `english_articles`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZES["vocab_size"] - 10,  # as in real models, the embedding has rows to spare
        special_tokens=["<|endoftext|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((article["text"] for article in english_articles(30)), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",  # the name Qwen2's tokenizer would otherwise add behind the vocabulary
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=_SIZES["max_position_embeddings"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Callable[..., Path]:
    """Factory ``tiny_model(family, *, dtype="bfloat16", sharded=None, **config_changes) -> Path``.

    A Hugging Face folder with random weights, made once for equal arguments and shared by the whole session:
    never write into it, copy it first. Biases and norms are random too, so that a lost one is noticed.
    """
    made: dict[str, Path] = {}

    def make(family: str, *, dtype: str = "bfloat16", sharded: bool | None = None, **changes) -> Path:
        key = json.dumps([family, dtype, sharded, changes], sort_keys=True)
        if key not in made:
            made[key] = _make_model(
                tmp_path_factory.mktemp(family),
                tiny_tokenizer,
                family,
                dtype,
                family in _SHARDED if sharded is None else sharded,
                changes,
            )
        return made[key]

    return make


def _make_model(folder: Path, tokenizer: Path, family: str, dtype: str, sharded: bool, changes: dict) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**_SIZES, **tokens, **_CHANGES[family], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                scale = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.1
                centre = 1.0 if name.endswith("norm.weight") and family != "gemma3_text" else 0.0
                weight.copy_(centre + scale * torch.randn(weight.shape))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="64KB" if sharded else "1GB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
