"""Folders of entropy-coded matrices: loaded, computed with, saved, cast, damaged."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from format_reader import read_checkpoint
from format_writer import matrices_of, write_codes

from cospadi.checkpoint import assemble, densify
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder
from cospadi.runtime.cospadi_linear import pack_, packed_layers, set_kernels, unpack_
from cospadi.runtime.modeling_cospadi import CospadiForCausalLM

TOKENS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module", params=["ec", "ectcq_scaled", "ectcq256"])
def folder(request, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    base = tiny_model("llama", dtype="float32")
    write_codes(
        root / "all.safetensors", matrices_of(base), codec=request.param, support="dense", dictionary="identity"
    )
    assemble(base, [root / "all.safetensors"], root / "packed", variant={"method": "by hand"})
    densify(root / "packed", root / "dense")
    return root


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_every_reader_sees_the_same_weights(folder):
    expected = read_checkpoint(folder / "packed")
    dense = ModelFolder(folder / "dense")
    model = CospadiForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    layers = packed_layers(model)
    assert layers.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(layers[name].dense().numpy().T, weight)
        np.testing.assert_array_equal(dense.read_weight(name), weight)
        # decoded once, to the numbers themselves
        np.testing.assert_array_equal(layers[name].unpacked_codes.detach().numpy().T, weight)


def test_a_loaded_model_computes_what_the_dense_one_does_with_either_coder(folder):
    from transformers import AutoModelForCausalLM

    expected = logits(AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32))
    found = {}
    for choice in ("auto", "torch"):
        set_kernels(cpu=choice)
        found[choice] = logits(CospadiForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32))
    set_kernels(cpu="auto")
    assert torch.equal(found["auto"], found["torch"])
    torch.testing.assert_close(found["auto"], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_streams_are_the_bytes_of_the_file_which_nothing_that_is_written_to_them_reaches(folder):
    file = folder / "packed" / "model.safetensors"
    before, stored = file.read_bytes(), safetensors.numpy.load_file(file)
    model, info = CospadiForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    for name, layer in packed_layers(model).items():
        assert layer.values.numpy().tobytes() == stored[f"{name}.values"].tobytes() and not layer.values.requires_grad
        layer.values.zero_()
    assert file.read_bytes() == before
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model)) and copied.state_dict().keys() == model.state_dict().keys()


def test_memory_holds_the_rows_in_the_dtype_of_the_model_and_saving_gives_the_same_bytes(folder, tmp_path):
    model = CospadiForCausalLM.from_pretrained(folder / "packed", dtype=torch.bfloat16)
    for layer in packed_layers(model).values():
        assert layer.unpacked_codes.dtype == torch.bfloat16 and layer.values.dtype == torch.uint8
        # rounded once, as torch rounds
        assert torch.equal(layer.unpacked_codes, layer.factors(torch.float32)[1].bfloat16())
    model.float().save_pretrained(tmp_path / "again")
    first, second = (
        safetensors.numpy.load_file(f / "model.safetensors") for f in (folder / "packed", tmp_path / "again")
    )
    packed = [name for name in first if name.endswith("_proj.values")]
    assert packed and all(first[name].tobytes() == second[name].tobytes() for name in packed)
    assert first.keys() == second.keys()


def test_steps_of_8_bits_are_as_exact_and_take_half_the_memory(folder, tmp_path):
    dense = CospadiForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    model = CospadiForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32, streams="int8")
    expected = logits(dense)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for name, layer in packed_layers(model).items():
        if not layer.has_steps_alone:  # several scales a column leave nothing but rows
            assert len(layer.scales) > layer.out_features and layer.unpacked_codes is not None
            continue
        digits = layer.in_steps.digits
        assert layer.unpacked_codes is None and digits.values.dtype == torch.int8
        # some numbers take more than 8 bits
        assert layer.in_features < digits.in_features <= layer.in_features + 3 and layer.in_steps.rows is not None
        weight, x = torch.from_numpy(read_checkpoint_once(folder)[name]).double(), torch.randn(3, layer.in_features)
        size = x.double().abs() @ weight.abs()
        assert ((layer(x).double() - x.double() @ weight).abs() / size).max() < 1e-6
    model.bfloat16().float().save_pretrained(tmp_path / "again")
    first, second = (
        safetensors.numpy.load_file(f / "model.safetensors") for f in (folder / "packed", tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first if name.endswith("_proj.values"))
    unpack_(model)
    assert not any(layer.in_steps and layer.unpacked_codes is not None for layer in packed_layers(model).values())
    with pytest.raises(ValueError, match="streams is 'int4'; allowed: dense, int8"):
        CospadiForCausalLM.from_pretrained(folder / "packed", streams="int4")


@functools.cache
def read_checkpoint_once(folder: Path) -> dict[str, np.ndarray]:
    return read_checkpoint(folder / "packed")


def test_unpacking_and_packing_leave_it_decoded(folder):
    model = CospadiForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    before = logits(model)
    torch.testing.assert_close(logits(unpack_(model)), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(pack_(model)), before)
    assert all(layer.unpacked_codes is not None for layer in packed_layers(model).values())
    with pytest.raises(ValueError, match="cannot be trained"):
        unpack_(model, trainable=True)


def test_a_stream_whose_checksum_was_made_to_fit_is_refused_when_it_is_decoded(folder, tmp_path):
    broken = Path(shutil.copytree(folder / "packed", tmp_path / "broken"))
    tensors = safetensors.numpy.load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    stored = tensors[f"{name}.values"].copy()
    stored[-40] ^= 0xFF
    stored[:4] = np.frombuffer(zlib.crc32(stored[4:].tobytes()).to_bytes(4, "little"), np.uint8)
    # an exponent of the steps is right whatever it is, so that the checksum alone tells
    other_step = {f"{name}.values": np.concatenate([stored[:14], stored[14:15] ^ 1, stored[15:]])}
    for change, fault in (
        ({f"{name}.values": stored}, "has a stream that does not end where it should"),
        (other_step, "is damaged: its checksum is another"),
    ):
        safetensors.numpy.save_file(tensors | change, broken / "model.safetensors", {"format": "pt"})
        for device_map in (None, "cpu"):  # decoded while the model is made, and after that
            with pytest.raises(OSError, match=f"{name}.values {fault}"):
                CospadiForCausalLM.from_pretrained(broken, device_map=device_map)
    tensors[f"{name}.values"] = stored
    safetensors.numpy.save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"the codes of {name} are stored in what has a stream"):
        densify(broken, tmp_path / "dense")
    assert json.loads((broken / "config.json").read_text())["model_type"] == "cospadi"


def test_a_trellis_stays_as_it_is_stored(tiny_model, tmp_path):
    base = tiny_model("llama", dtype="float32")
    write_codes(
        tmp_path / "all.safetensors", matrices_of(base), codec="trellis3", support="dense", dictionary="identity"
    )
    assemble(base, [tmp_path / "all.safetensors"], tmp_path / "packed", variant={"method": "by hand"})
    densify(tmp_path / "packed", tmp_path / "dense")
    model = CospadiForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    layers, dense = packed_layers(model), ModelFolder(tmp_path / "dense")
    for name, weight in read_checkpoint(tmp_path / "packed").items():
        np.testing.assert_array_equal(layers[name].dense().numpy().T, weight)
        np.testing.assert_array_equal(dense.read_weight(name), weight)
        assert layers[name].unpacked_codes is None and layers[name].values.dtype == torch.uint8
    before = logits(model)
    expected = logits(CospadiForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float64))
    torch.testing.assert_close(before.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(logits(unpack_(model)), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert torch.equal(logits(pack_(model)), before)
    with pytest.raises(ValueError, match="cannot be trained"):
        unpack_(model, trainable=True)
    model.save_pretrained(tmp_path / "again")
    first, second = (safetensors.numpy.load_file(tmp_path / f / "model.safetensors") for f in ("packed", "again"))
    assert all(second[name].tobytes() == tensor.tobytes() for name, tensor in first.items())
