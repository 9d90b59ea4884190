"""Training from scratch: tokenizer and tokens, what a seed decides, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cospadi.errors import ArtifactError, NumericalError
from cospadi.files import TensorFile, read_json
from cospadi.training import attention_parameters
from cospadi.training.text import END, tokenize, train_tokenizer
from cospadi.training.train import build_language, build_vision, train_language, train_vision

SETTINGS = {
    "length": 16,
    "model": {"hidden_size": 24, "intermediate_size": 32, "layers": 3, "heads": 2, "initializer_range": 0.1},
    "steps": 8,
    "batch_size": 4,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "warmup": 0.25,
    "evaluations": 2,
}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
MASA = {"attention": "masa", "atoms": 1, "projections": QKVO, "coefficients": "mlp"}
SQUARE = 24 * 24


@pytest.fixture(scope="module")
def tokenizer(tiny_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch") / "tokenizer"
    train_tokenizer(tiny_text / "calibration.jsonl", folder, vocabulary=300, log=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def tokens(tokenizer, tiny_text):
    path = tokenizer.parent / "tokens.safetensors"
    parts = (tiny_text / "calibration.jsonl", tiny_text / "heldout.jsonl")
    tokenize(tokenizer, *parts, path, log=lambda line: None)
    return path


def train(tokens, tokenizer, folder, *, variant=MASA, seed=0, **changes):
    torch.set_num_threads(1)
    return train_language(
        tokens,
        tokenizer,
        {**SETTINGS, **changes},
        variant,
        seed=seed,
        model_out=folder / "model",
        history_out=folder / "history.json",
        log=lambda line: None,
    )


def test_tokens_are_the_text(tokenizer, tokens, tiny_text):
    fast = AutoTokenizer.from_pretrained(tokenizer)
    assert len(fast) == 300
    assert fast.eos_token == END
    file = TensorFile(tokens)
    articles = [json.loads(line)["text"] for line in (tiny_text / "heldout.jsonl").read_text().splitlines()]
    assert fast.decode(file.read("heldout")).split(END) == [*articles, ""]
    assert file.metadata["vocabulary"] == 300
    assert file.metadata["heldout_words"] == sum(len(text.split()) for text in articles)
    assert file.read("training").max() < 300
    assert np.count_nonzero(file.read("training") == fast.eos_token_id) == 24


def test_too_little_text_for_the_vocabulary(tiny_text, tmp_path):
    with pytest.raises(ArtifactError, match=r"but training.language.vocabulary is 9000. Give more text"):
        train_tokenizer(tiny_text / "calibration.jsonl", tmp_path / "t", vocabulary=9000, log=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_history(tokens, tokenizer, tmp_path):
    history = train(tokens, tokenizer, tmp_path)
    assert history == read_json(tmp_path / "history.json")
    assert [step for step, _ in history["training"]] == list(range(1, 9))
    assert [step for step, _ in history["heldout"]] == [4, 8]
    assert history["perplexity"] == pytest.approx(np.exp(history["heldout_loss"]))
    assert history["heldout_tokens"] == len(TensorFile(tokens).read("heldout")) // 16 * 16
    # what makes the coefficients is trained, and neither counted nor kept
    assert history["attention_parameters"] == 4 * (SQUARE + 3)
    assert history["parameters"] > history["kept_parameters"]


def test_a_seed_decides_everything(tokens, tokenizer, tmp_path):
    first, again, other = (
        train(tokens, tokenizer, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["training"] == again["training"]
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert first["training"] != other["training"]


@pytest.mark.parametrize(
    ("variant", "kept"),
    [
        ({"attention": "dense"}, 12 * SQUARE),
        ({"attention": "gqa", "kv_heads": 1}, 9 * SQUARE),
        ({"attention": "low_rank", "rank": 4, "projections": QKVO}, 12 * 2 * 4 * 24),
        ({"attention": "sequential", "atoms": 2, "projections": QKVO[:3]}, (3 * 2 + 3) * SQUARE),
        ({"attention": "cyclic", "atoms": 1, "projections": QKVO}, 4 * SQUARE),
        ({**MASA, "atoms": 2, "coefficients": "free"}, 4 * (2 * SQUARE + 6)),
    ],
)
def test_variants_have_the_attention_they_are_named_for(variant, kept):
    torch.manual_seed(0)
    model = build_language(SETTINGS, variant, vocabulary=300)
    assert attention_parameters(model) == kept
    torch.manual_seed(0)
    dense = build_language(SETTINGS, {"attention": "dense"}, vocabulary=300)
    if variant["attention"] != "gqa":  # the rest begins with the same weights
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)
        picture = build_vision({**SETTINGS, "patch": 2}, variant)
        assert attention_parameters(picture) == kept


def test_a_loss_that_is_not_finite_stops_the_job(tokens, tokenizer, tmp_path):
    with pytest.raises(NumericalError, match="lower learning_rate"):
        train(tokens, tokenizer, tmp_path, learning_rate=1e30, steps=20)
    assert list(tmp_path.iterdir()) == []


def test_too_few_tokens_and_damaged_tokens(tokens, tokenizer, tmp_path):
    with pytest.raises(ArtifactError, match=r"training: \d+ tokens, but a window has 1000000"):
        train(tokens, tokenizer, tmp_path, length=1000000)
    half = tmp_path / "half.safetensors"
    half.write_bytes(tokens.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"half.safetensors: not a complete safetensors file"):
        train(half, tokenizer, tmp_path)


def test_digits_are_learned(tmp_path):
    torch.set_num_threads(1)
    history = train_vision(
        {**SETTINGS, "patch": 4, "steps": 150, "batch_size": 32},
        MASA,
        seed=0,
        model_out=tmp_path / "model",
        history_out=tmp_path / "history.json",
        log=lambda line: None,
    )
    assert history["heldout_images"] == 599
    assert history["accuracy"] > 0.6  # by chance: 0.1
