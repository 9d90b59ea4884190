"""Embedding and head in few bits: what a file holds is what the model looks up and multiplies with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch
from format_reader import Refused, read_checkpoint
from format_writer import BFLOAT16, PACKINGS
from transformers import AutoModelForCausalLM

from cospadi.checkpoint import assemble, densify, target_bytes
from cospadi.embeddings import embedding_nbytes
from cospadi.errors import ArtifactError, NumericalError
from cospadi.files import ModelFolder
from cospadi.runtime.cospadi_embedding import PackedEmbedding
from cospadi.runtime.cospadi_linear import PackedLinear, packed_layers, unpack_
from cospadi.runtime.cospadi_products import PARTS

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.randint(3, 390, (2, 20), generator=torch.Generator().manual_seed(0))
APART = {"mistral", "qwen2"}  # families whose tiny models have a head of their own


def folder_of(packed_model, root: Path, family: str, bits: int) -> SimpleNamespace:
    folders = packed_model(family)
    assemble(folders.base, [folders.codes], root / "packed", variant={"method": "by hand"}, embedding_bits=bits)
    return SimpleNamespace(base=folders.base, sixteen=folders.packed, packed=root / "packed")


def load(folder: Path, dtype: torch.dtype = torch.float32, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)


def tensors_of(folder: Path) -> dict[str, bytes]:
    files = [safetensors.numpy.load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor.tobytes() for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("family", PACKINGS)
def test_the_model_is_that_of_the_dense_folder(packed_model, tmp_path, family, bits):
    made = folder_of(packed_model, tmp_path, family, bits)
    densify(made.packed, tmp_path / "dense")
    names = [EMBEDDING, HEAD] if family in APART else [EMBEDDING]
    before, after = ModelFolder(made.base), ModelFolder(tmp_path / "dense")
    rows = read_checkpoint(made.packed)
    for name in names:
        weight, rounded = (folder.read(f"{name}.weight").astype(np.float32) for folder in (before, after))
        np.testing.assert_array_equal(rounded, rows[name].T)
        # no worse than the largest number of a block makes it, which is the scale that needs no search
        most = 2 ** (bits - 1) - 1
        scales = (np.abs(weight).max(axis=1, keepdims=True) / most).astype(BFLOAT16).astype(np.float32)
        plain = np.clip(np.rint(weight / scales), -most - 1, most) * scales
        assert 0 < np.square(rounded - weight).sum() <= np.square(plain - weight).sum()
    model, dense = load(made.packed).eval(), load(tmp_path / "dense").eval()
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
        for how in ({}, {"use_cache": False}):
            found = model.generate(IDS[:, :7], max_new_tokens=6, do_sample=False, **how)
            assert torch.equal(found, dense.generate(IDS[:, :7], max_new_tokens=6, do_sample=False))
        unpacked = unpack_(model)(IDS).logits
    torch.testing.assert_close(unpacked, dense(IDS).logits.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_file_has_the_bytes_that_the_plan_says(packed_model, tmp_path, family):
    made = folder_of(packed_model, tmp_path, family, 6)
    before, after = tensors_of(made.sixteen), tensors_of(made.packed)
    names = [EMBEDDING, HEAD] if family in APART else [EMBEDDING]
    vocabulary, hidden_size = ModelFolder(made.base).read(f"{EMBEDDING}.weight").shape
    for name in names:
        found = sum(len(after[f"{name}.{part}"]) for part in ("values", "scales"))
        assert found == embedding_nbytes(vocabulary, hidden_size, 6)
    inside = tuple(f"{name}." for name in names)
    assert {name: tensor for name, tensor in after.items() if not name.startswith(inside)} == {
        name: tensor for name, tensor in before.items() if not name.startswith(inside)
    }
    assert target_bytes(made.packed) == target_bytes(made.sixteen), "they are no target matrices"
    assert "Embedding and head are `int6`, under scales." in (made.packed / "README.md").read_text()


@pytest.mark.parametrize("family", PACKINGS)
def test_casting_and_saving_keep_every_byte(packed_model, tmp_path, family):
    made = folder_of(packed_model, tmp_path, family, 8)
    model = load(made.packed, torch.bfloat16)
    assert model.dtype == model(IDS).logits.dtype == torch.bfloat16
    wide = model.to(torch.float32)
    assert wide.dtype == wide(IDS).logits.dtype == torch.float32
    model.half().save_pretrained(tmp_path / "saved")
    kept = tensors_of(made.packed)
    packed = {f"{name}.{part}" for name, layer in packed_layers(model).items() for part in PARTS} & kept.keys()
    saved = tensors_of(tmp_path / "saved")
    assert saved.keys() == kept.keys() and all(saved[name] == kept[name] for name in packed)
    assert f"{HEAD}.values" in saved or family not in APART
    whole = load(made.packed)
    whole.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "whole")(IDS).logits, whole(IDS).logits)


def test_a_tied_head_reads_the_embedding_s_own_tensors(packed_model, tmp_path):
    made = folder_of(packed_model, tmp_path, "llama", 8)
    model = load(made.packed)
    for part in ("values", "scales"):
        assert getattr(model.lm_head, part) is getattr(model.get_input_embeddings(), part)
    assert model.lm_head._is_hf_initialized  # or transformers 5.0 draws random numbers for a weight that is not there
    assert model.all_tied_weights_keys.keys() == {"lm_head.values", "lm_head.scales"}
    model.tie_weights()
    assert model.lm_head.values is model.model.embed_tokens.values
    spread = load(made.packed, device_map="meta")
    assert spread.lm_head.values.is_meta
    size = sum(path.stat().st_size for path in made.packed.glob("*.safetensors"))
    assert model.get_memory_footprint() <= size


@pytest.mark.parametrize("token", [-1, 400])
def test_a_token_that_is_none_is_refused_as_by_any_embedding(packed_model, tmp_path, token):
    model = load(folder_of(packed_model, tmp_path, "llama", 8).packed)
    with pytest.raises(IndexError):
        model(torch.tensor([[5, token]]))


def test_a_head_that_a_file_has_twice_is_kept_once(packed_model, tmp_path):
    folders = packed_model("llama")
    shutil.copytree(folders.base, tmp_path / "base")
    for path in (tmp_path / "base").glob("*.safetensors*"):
        path.unlink()
    weights = {}
    for path in folders.base.glob("*.safetensors"):
        weights |= safetensors.numpy.load_file(path)
    weights[f"{HEAD}.weight"] = weights[f"{EMBEDDING}.weight"].copy()
    safetensors.numpy.save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    assemble(tmp_path / "base", [folders.codes], tmp_path / "packed", variant={}, embedding_bits=8)
    assert not any(name.startswith(HEAD) for name in tensors_of(tmp_path / "packed"))
    with torch.no_grad():
        assert load(tmp_path / "packed")(IDS).logits.isfinite().all()


def test_on_the_disk_both_or_neither(packed_model, tmp_path):
    made = folder_of(packed_model, tmp_path, "llama", 8)
    expected = load(made.packed)(IDS).logits.detach()
    where = dict.fromkeys(["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    with pytest.raises(ValueError, match=r"lm_head on the disk and model\.embed_tokens elsewhere, but .* one matrix"):
        load(made.packed, device_map={**where, "lm_head": "disk"}, offload_folder=tmp_path / "offload")
    both = {**where, "lm_head": "disk", "model.embed_tokens": "disk"}
    model = load(made.packed, device_map=both, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected)


def changed(**codes):
    def change(spec):
        spec["codes"] |= codes

    return change


DENSE = {"support": "dense", "n_nonzero": 400 * 48}
HOSTILE = {
    "another codec": (changed(codec="int4"), "has shape|has dtype|no whole bytes"),
    "too few scales": (changed(n_scales=7), "scales"),
    "smaller blocks": (changed(group_size=16), "400 scales for 19200 values, expected 1200"),
    "no block": (changed(group_size=0), "group_size is 0"),
    "bfloat16": (lambda spec: spec.update(codes={**DENSE, "codec": "bf16"}), "integers"),
    "a mask": (changed(support="bitmask"), "integers under scales|support"),
    "another vocabulary": (lambda spec: spec.update(shape=[48, 2**31 - 1]), "n_nonzero|shape|scales"),
    "another width": (lambda spec: spec.update(shape=[47, 400]), "n_atoms|atoms|shape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_embedding_is_refused(packed_model, tmp_path, name):
    made = folder_of(packed_model, tmp_path, "gemma3_text", 8)
    change, words = HOSTILE[name]
    config = json.loads((made.packed / "config.json").read_text())
    change(config["quantization_config"]["matrices"][EMBEDDING])
    (made.packed / "config.json").write_text(json.dumps(config))
    with pytest.raises((OSError, ValueError), match=words):
        load(made.packed)
    with pytest.raises(ArtifactError, match=words):
        densify(made.packed, tmp_path / "dense")
    with pytest.raises(Refused):
        read_checkpoint(made.packed)


@pytest.mark.parametrize("size", [None, 48, 2**31 - 1])
def test_a_block_may_be_longer_than_a_row(packed_model, tmp_path, size):
    made = folder_of(packed_model, tmp_path, "llama", 8)
    expected = load(made.packed)(IDS).logits.detach()
    config = json.loads((made.packed / "config.json").read_text())
    config["quantization_config"]["matrices"][EMBEDDING]["codes"]["group_size"] = size
    (made.packed / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(load(made.packed)(IDS).logits, expected)


def test_numbers_that_are_none_are_refused_before_anything_is_written(packed_model, tmp_path):
    folders = packed_model("llama", dtype="bfloat16")
    shutil.copytree(folders.base, tmp_path / "base")
    path = ModelFolder(tmp_path / "base").file_of(f"{EMBEDDING}.weight").path
    weights = safetensors.numpy.load_file(path)
    weights[f"{EMBEDDING}.weight"][5, 3] = np.array(np.nan, BFLOAT16)
    safetensors.numpy.save_file(weights, path, {"format": "pt"})
    with pytest.raises(NumericalError, match=r"model\.embed_tokens"):
        assemble(tmp_path / "base", [folders.codes], tmp_path / "packed", variant={}, embedding_bits=8)
    assert not (tmp_path / "packed").exists()
