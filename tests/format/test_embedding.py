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
from format_writer import BFLOAT16, PACKINGS, write_head
from transformers import AutoModelForCausalLM

from cospadi.calibration.moments import read_head_moments
from cospadi.checkpoint import assemble, densify, target_bytes
from cospadi.embeddings import embedding_nbytes, metric_of
from cospadi.errors import ArtifactError, NumericalError
from cospadi.files import ModelFolder
from cospadi.runtime.cospadi_embedding import PackedEmbedding
from cospadi.runtime.cospadi_linear import PackedLinear, packed_layers, unpack_
from cospadi.runtime.cospadi_products import PARTS

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.randint(3, 390, (2, 20), generator=torch.Generator().manual_seed(0))
APART = {"mistral", "qwen2"}  # families whose tiny models have a head of their own


def folder_of(packed_model, root: Path, family: str, bits: float, method: str = "rtn") -> SimpleNamespace:
    folders = packed_model(family)
    how = {"embedding_bits": bits, "embedding_method": method, "head": write_head(folders.base, root / "head.h5")}
    assemble(folders.base, [folders.codes], root / "packed", variant={"method": "by hand"}, **how)
    return SimpleNamespace(base=folders.base, sixteen=folders.packed, packed=root / "packed", head=root / "head.h5")


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


STREAMS = {"dense": {}, "int8": {"streams": "int8"}, "spread": {"device_map": "cpu"}}


@pytest.mark.parametrize("how", STREAMS)
@pytest.mark.parametrize("family", PACKINGS)
def test_a_stream_is_the_dense_folder_s_matrix_however_it_is_decoded(packed_model, tmp_path, family, how):
    # of numbers of more than 8 bits there are steps once more
    made = folder_of(packed_model, tmp_path, family, 10 if how == "int8" else 3.5, "ectcq")
    densify(made.packed, tmp_path / "dense")
    model, dense = load(made.packed, **STREAMS[how]).eval(), load(tmp_path / "dense").eval()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.is_stream and head.is_stream
    rows = read_checkpoint(made.packed)
    for name in [EMBEDDING, HEAD] if family in APART else [EMBEDDING]:
        np.testing.assert_array_equal(ModelFolder(tmp_path / "dense").read(f"{name}.weight"), rows[name].T)
    decoded = "in_steps" if how == "int8" else "unpacked_codes"
    assert getattr(embedding, decoded) is not None
    assert how != "int8" or embedding.in_steps.rows is not None
    if family not in APART:
        assert all(getattr(head, part) is getattr(embedding, part) for part in ("values", "scales", decoded))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
        found = model.generate(IDS[:, :7], max_new_tokens=6, do_sample=False)
        assert torch.equal(found, dense.generate(IDS[:, :7], max_new_tokens=6, do_sample=False))
        for token in (-1, 400):
            with pytest.raises(IndexError):
                model(torch.tensor([[5, token]]))
        halves = load(made.packed, torch.bfloat16, **STREAMS[how])
        assert halves.dtype == halves(IDS).logits.dtype == torch.bfloat16
        halves.save_pretrained(tmp_path / "saved")
        saved, kept = tensors_of(tmp_path / "saved"), tensors_of(made.packed)
        assert saved.keys() == kept.keys()
        assert all(saved[name] == kept[name] for name in kept if name.startswith((EMBEDDING, HEAD)))
        torch.testing.assert_close(unpack_(model)(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_stream_has_the_bits_that_were_asked_for(packed_model, tmp_path, family):
    made = folder_of(packed_model, tmp_path, family, 4.5, "ectcq")
    after = tensors_of(made.packed)
    vocabulary, hidden_size = ModelFolder(made.base).read(f"{EMBEDDING}.weight").shape
    for name in [EMBEDDING, HEAD] if family in APART else [EMBEDDING]:
        found = sum(len(after[f"{name}.{part}"]) for part in ("values", "scales"))
        asked = embedding_nbytes(vocabulary, hidden_size, 4.5, "ectcq")
        assert asked == 4.5 * vocabulary * hidden_size / 8
        assert asked - 0.05 * vocabulary * hidden_size / 8 <= found <= asked
    assert target_bytes(made.packed) == target_bytes(made.sixteen)
    assert "Embedding and head are `ectcq256_scaled`, entropy-coded." in (made.packed / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_errors_cost_is_less_than_of_rounding_at_the_same_bytes(packed_model, tmp_path, family):
    cost = {}
    for method, bits in (("rtn", 4), ("gptq", 4), ("ectcq", 4.25)):
        made = folder_of(packed_model, tmp_path / method, family, bits, method)
        rows, moments = read_checkpoint(made.packed), read_head_moments(made.head, {})
        size = 0
        for name in [EMBEDDING, HEAD] if family in APART else [EMBEDDING]:
            error = rows[name] - ModelFolder(made.base).read(f"{name}.weight").T
            gram = metric_of(name, moments, is_tied=family not in APART).gram
            # each token counts as it is felt: an error of the loss, to second order
            counted = moments.counts if name == EMBEDDING and family in APART else moments.squares
            cost.setdefault(name, {})[method] = float((error * (gram @ error)).sum(0) @ counted)
            size += sum(len(part) for key, part in tensors_of(made.packed).items() if key.startswith(f"{name}."))
        cost.setdefault("size", {})[method] = size
    size = cost.pop("size")
    assert size["rtn"] == size["gptq"] >= size["ectcq"]
    for name, found in cost.items():
        if name == HEAD or family not in APART:
            assert found["ectcq"] < 0.6 * found["gptq"] < 0.6 * 0.6 * found["rtn"], (name, found)
        else:  # of a table that is only read gptq has nothing to make up for
            assert found["ectcq"] < 0.8 * found["rtn"], (name, found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"fingerprint": "0" * 32}, "fingerprint"), ({"tokens": "other"}, "tokens"), ({"n_tokens": 0}, "no token")],
)
def test_moments_that_belong_elsewhere_are_refused(packed_model, tmp_path, changes, words):
    folders = packed_model("llama")
    how = {"embedding_bits": 3, "embedding_method": "ectcq", "calibration": {"tokens": "these"}}
    head = write_head(folders.base, tmp_path / "head.h5", **{"tokens": "these"} | changes)
    with pytest.raises(ArtifactError, match=words):
        assemble(folders.base, [folders.codes], tmp_path / "packed", variant={}, head=head, **how)
    assert not (tmp_path / "packed").exists()


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
    coded = folder_of(packed_model, tmp_path / "coded", "llama", 4, "ectcq")
    for packed, logits in ((made.packed, expected), (coded.packed, load(coded.packed)(IDS).logits.detach())):
        model = load(packed, device_map=both, offload_folder=tmp_path / "offload" / packed.parent.name)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, logits)


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
