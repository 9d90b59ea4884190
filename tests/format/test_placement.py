"""Models that memory has no room for: spread over devices, they score as they do on one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from cospadi import factorize
from cospadi.checkpoint import assemble
from cospadi.errors import ArtifactError
from cospadi.evaluation.evaluate import evaluate
from cospadi.evaluation.placement import loading_arguments, room
from cospadi.files import ModelFolder, write_tensors

EVALUATION = {
    "dtype": "float32",
    "perplexity": {"max_tokens": 300, "window": 64, "kl": True},
    "tasks": ["last_word"],
    "limit": 5,
    "generate": {"prompts": ["The old river", "A"], "max_new_tokens": 5},
}
# Share of the bytes of a model that memory may hold; the layer that is multiplied needs room there too
HELD = 0.85


def scores(
    model: Path, text: Path, folder: Path, *, held: float | None = None, lines: list | None = None, **files
) -> dict:
    folder.mkdir(exist_ok=True)
    evaluation = dict(EVALUATION)
    if held is not None:
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        evaluation |= {"device_map": "auto", "max_memory": {"gpu": None, "cpu": f"{int(held * size)}B"}}
    log = (lines if lines is not None else []).append
    result = evaluate(model, evaluation, heldout=text / "heldout.jsonl", output=folder / "eval.json", log=log, **files)
    assert {path.name for path in folder.iterdir()} <= {"eval.json", "states.h5"}  # what was on the disk is gone
    return result


def same(spread: dict, whole: dict) -> None:
    for name in ("token", "word", "bits_per_byte"):
        assert spread["perplexity"][name] == pytest.approx(whole["perplexity"][name], rel=1e-5)
    (one,), (other,) = spread["tasks"].values(), whole["tasks"].values()
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-5)
    assert spread["samples"] == whole["samples"]
    assert whole["placement"].keys() == {"cpu"} and spread["placement"].keys() == {"cpu", "disk"}
    assert spread["placement"]["disk"] > 0.1 * sum(spread["placement"].values())


@pytest.fixture(scope="module")
def llama(tiny_model, tiny_text, tmp_path_factory) -> SimpleNamespace:
    """A dense model, its scores on one device, and the file of its states."""
    folder, model = tmp_path_factory.mktemp("dense"), tiny_model("llama", dtype="float32")
    states = folder / "states.h5"
    return SimpleNamespace(folder=model, states=states, scores=scores(model, tiny_text, folder, states=states))


def test_a_dense_model_on_the_disk_scores_the_same(llama, tiny_text, tmp_path):
    lines: list[str] = []
    states = tmp_path / "spread/states.h5"
    spread = scores(llama.folder, tiny_text, tmp_path / "spread", held=HELD, states=states, lines=lines)
    same(spread, llama.scores)
    assert sum(spread["placement"].values()) == llama.scores["placement"]["cpu"]
    assert any(line.startswith("weights on ") and "disk" in line for line in lines)
    # and its states are those that the others are compared with
    again = scores(llama.folder, tiny_text, tmp_path / "again", states=states, dense=llama.folder)
    assert again["perplexity"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("method", "bits"), [("ectcq", 3.5), ("trellis", 4.9), ("rtn", 4.5)])
def test_codes_of_few_bits_on_the_disk(method, bits, llama, tiny_text, tmp_path):
    weights, tensors, specs = ModelFolder(llama.folder), {}, {}
    for name in ("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj"):
        packed, specs[name] = factorize(weights.read_weight(name), method=method, bits=bits).pack(name)
        tensors |= packed
    write_tensors(tmp_path / "codes.safetensors", tensors, {"format_version": 1, "matrices": specs})
    assemble(llama.folder, [tmp_path / "codes.safetensors"], tmp_path / "packed", variant={"method": method})
    files = {"states": llama.states, "dense": llama.folder}
    whole = scores(tmp_path / "packed", tiny_text, tmp_path / "whole", **files)
    spread = scores(tmp_path / "packed", tiny_text, tmp_path / "spread", held=HELD, **files)
    same(spread, whole)
    assert spread["perplexity"]["kl"] == pytest.approx(whole["perplexity"]["kl"], rel=1e-3) != 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_packed_models_on_the_disk(family, packed_model, tiny_text, tmp_path):
    whole, spread = (
        scores(packed_model(family).packed, tiny_text, tmp_path / str(held), held=held) for held in (None, HELD)
    )
    same(spread, whole)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied, and with a head of its own
def test_embeddings_in_few_bits_on_the_disk(family, packed_model, tiny_text, tmp_path):
    folders = packed_model(family)
    assemble(folders.base, [folders.codes], tmp_path / "packed", variant={}, embedding_bits=8)
    whole, spread = (scores(tmp_path / "packed", tiny_text, tmp_path / str(held), held=held) for held in (None, 0.7))
    same(spread, whole)


def test_a_packed_model_that_fits_stays_packed_too(packed_model, tiny_text, tmp_path):
    packed = packed_model("llama").packed
    whole = scores(packed, tiny_text, tmp_path / "whole")
    fits = scores(packed, tiny_text, tmp_path / "fits", held=1000)
    assert fits["placement"]["cpu"] < whole["placement"]["cpu"] and fits["placement"].keys() == {"cpu"}
    assert fits["perplexity"]["token"] == pytest.approx(whole["perplexity"]["token"], rel=1e-5)


def test_what_cannot_be_loaded_says_that_its_place_may_be_why(llama, tiny_text, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ArtifactError, match="out of memory") as told:
        scores(llama.folder, tiny_text, tmp_path / "spread", held=HELD)
    assert "Give evaluation.max_memory less, or gpus more" in str(told.value)


def test_what_every_device_may_hold(monkeypatch):
    """Devices are pretended: two GPUs with 80 GB, of which one is used by another."""
    free = [80_000_000_000, 30_000_000_000]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], free[0]))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000_000_000))
    assert room({}, "cuda") == {0: 72_000_000_000, 1: 27_000_000_000, "cpu": 90_000_000_000}
    assert room({"gpu": "60GB", "cpu": None}, "cuda") == {0: 60_000_000_000, 1: 30_000_000_000, "cpu": 90_000_000_000}
    assert room({"gpu": "60GB", "cpu": "1.5 GiB"}, "cpu") == {"cpu": 1_610_612_736}
    assert loading_arguments({"max_memory": {"cpu": "1GB"}}, "cuda", Path("offload")) == {}
