"""Packed models in other formats, read back with the libraries of those formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from cospadi.checkpoint import assemble, densify, packed_factors
from cospadi.errors import ArtifactError
from cospadi.exports import compressed_tensors
from cospadi.exports import gguf as ggufs
from cospadi.files import ModelFolder, read_json
from cospadi.formats.factorization import Factorization
from cospadi.structure import PROJECTIONS

TOKENS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def integers(tiny_model, tmp_path_factory):
    """Factory ``integers(family, codecs, block_size) -> packed folder``: matrices rounded to these codecs in turn."""

    def make(family: str, codecs: list[str], block_size: int | None, scaled: bool = False, bits: int = 16) -> Path:
        base = ModelFolder(tiny_model(family, hidden_size=64, intermediate_size=96, head_dim=16))
        root = tmp_path_factory.mktemp(family)
        tensors, specs = {}, {}
        names = sorted({name.rpartition(".")[0] for name in base.weight_map if name.split(".")[-2] in PROJECTIONS})
        for index, name in enumerate(names[1:]):  # one stays as it is
            codec = codecs[index % len(codecs)]
            weight = base.read_weight(name)
            exact = Factorization(None, weight, support="dense", value_codec=codec, block_size=block_size)
            if scaled:
                exact = replace(exact, dictionary=np.full(len(weight), 2, np.float32), dictionary_codec="diagonal")
            packed, specs[name] = exact.pack(name)
            tensors |= packed
        header = {"cospadi": json.dumps({"format_version": 1, "matrices": specs})}
        safetensors.numpy.save_file(tensors, root / "codes.safetensors", header)
        how = {"variant": {"method": "rtn"}, "card": {}, "embedding_bits": bits}
        assemble(base.path, [root / "codes.safetensors"], root / "packed", **how)
        return root / "packed"

    return make


def logits(folder: Path, **options) -> np.ndarray:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return model(TOKENS).logits.numpy()


@pytest.mark.parametrize(
    ("family", "codecs", "block_size"),
    [
        ("llama", ["int4"], 32),
        ("qwen3", ["uint4"], 16),
        ("qwen2", ["int8", "int3", "uint2"], None),
        ("llama", ["int6"], 16),
    ],
)
def test_integers_are_read_by_compressed_tensors_as_they_are(integers, tmp_path, family, codecs, block_size):
    packed = integers(family, codecs, block_size)
    compressed_tensors.export(packed, tmp_path / "out", log=lambda line: None)
    model = ModelFolder(packed)
    specs = model.config["quantization_config"]["matrices"]
    schemes = QuantizationConfig(**read_json(tmp_path / "out/config.json")["quantization_config"]).config_groups
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name, spec in specs.items():
        scheme = next(one for one in schemes.values() if name in one.targets or one.targets == ["Linear"])
        own = {part.removeprefix(f"{name}."): array for part, array in tensors.items() if part.startswith(f"{name}.w")}
        weight = PackedQuantizationCompressor.decompress(own, scheme)["weight"].float().numpy()
        # the library multiplies in bfloat16
        np.testing.assert_allclose(weight, packed_factors(model, name, spec).codes.T, rtol=2**-8)
    if not codecs[-1].startswith("u"):  # whose zero points transformers 5.23 takes for as many as there are outputs
        expected, found = logits(packed, trust_remote_code=True), logits(tmp_path / "out")
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    # bits a weight are those of the packed folder, but for words that are filled up
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (packed, tmp_path / "out")]
    assert sizes[1] < 1.2 * sizes[0]


def test_what_compressed_tensors_cannot_hold_is_refused(packed_model, integers, tmp_path):
    unlike = r"codes \(bf16, bitmask\) over a dictionary \(bf16\); compressed-tensors holds integers alone"
    with pytest.raises(ArtifactError, match=unlike):
        compressed_tensors.export(packed_model("llama").packed, tmp_path / "out")
    with pytest.raises(ArtifactError, match="64 inputs in blocks of 48; expected whole blocks"):
        compressed_tensors.export(integers("llama", ["int4"], 48), tmp_path / "out")
    scaled = r"codes \(int4, dense\) over a dictionary \(diagonal\); compressed-tensors holds integers alone"
    with pytest.raises(ArtifactError, match=scaled):
        compressed_tensors.export(integers("llama", ["int4"], 32, scaled=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def read(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a GGUF file as numbers."""
    tensors = gguf.GGUFReader(path).tensors
    return {one.name: gguf.quants.dequantize(one.data, one.tensor_type).reshape(one.shape[::-1]) for one in tensors}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_computes_what_the_dense_folder_does(packed_model, tmp_path, family):
    """Names, the order of queries and keys, biases, norms, sizes: by the model that transformers makes of the file."""
    folders, lines = packed_model(family), []
    ggufs.export(folders.packed, tmp_path / "model.gguf", kind="F32", log=lines.append)
    # of Qwen3's files transformers does not read how wide a head is
    options = {"config": AutoConfig.from_pretrained(folders.dense)} if family == "qwen3" else {}
    found = logits(tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), **options)
    expected = logits(folders.dense)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    assert "multiplied out and stored as F32: 32 bits a weight where the packed folder has" in lines[0]


@pytest.mark.parametrize(
    ("codec", "kind", "block_size"), [("int4", "Q4_0", 32), ("int8", "Q8_0", 64), ("uint4", "Q4_1", 32)]
)
def test_integers_in_blocks_are_the_same_integers_in_a_gguf(integers, tmp_path, codec, kind, block_size):
    packed, lines = integers("llama", [codec], block_size), []
    densify(packed, tmp_path / "dense")
    ggufs.export(packed, tmp_path / "model.gguf", kind=kind, log=lines.append)
    assert lines == [f"all {lines[0].split()[1]} matrices are the integers that they were, in {kind}"]
    found = read(tmp_path / "model.gguf")
    for projection, name in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        spec = json.loads((packed / "config.json").read_text())["quantization_config"]["matrices"]
        module = f"model.layers.1.{projection}"
        factors = packed_factors(ModelFolder(packed), module, spec[module])
        # float16 least values of Q4_1 are rounded once, to eleven bits
        tolerance = 0 if kind != "Q4_1" else 2**-10 * np.abs(factors.codes).max()
        np.testing.assert_allclose(found[f"blk.1.{name}.weight"], factors.codes.T, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_embeddings_in_few_bits_are_written_by_every_export(integers, tmp_path, family):
    packed = integers(family, ["int4"], 32, bits=8)
    densify(packed, tmp_path / "dense")
    dense, expected = ModelFolder(tmp_path / "dense"), logits(packed, trust_remote_code=True)
    names = ["model.embed_tokens.weight", *(["lm_head.weight"] if family == "qwen2" else [])]
    compressed_tensors.export(packed, tmp_path / "out", log=lambda line: None)
    out = ModelFolder(tmp_path / "out")
    assert all(np.array_equal(out.read(name), dense.read(name)) for name in names)
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, atol=0.02 * np.abs(expected).max())  # in bfloat16
    lines: list[str] = []
    ggufs.export(packed, tmp_path / "model.gguf", kind="Q4_0", log=lines.append)
    assert lines == [f"all {lines[0].split()[1]} matrices are the integers that they were, in Q4_0"]
    found = read(tmp_path / "model.gguf")
    model = ModelFolder(packed)
    for name, short in zip(names, ("token_embd.weight", "output.weight"), strict=False):
        module = name.removesuffix(".weight")
        factors = packed_factors(model, module, model.config["quantization_config"]["matrices"][module])
        np.testing.assert_array_equal(found[short], factors.codes.T)  # the same integers, in Q8_0


def test_other_matrices_are_rounded_by_the_rules_of_llama_cpp(packed_model, tmp_path):
    folders = packed_model("qwen2")
    ggufs.export(folders.packed, tmp_path / "model.gguf", kind="Q8_0", log=lambda line: None)
    dense = ModelFolder(folders.dense).read_weight("model.layers.0.mlp.up_proj").T
    found = read(tmp_path / "model.gguf")["blk.0.ffn_up.weight"]
    step = np.abs(dense).max() / 127
    assert np.abs(found - dense).max() <= 0.51 * step
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert (
        fields["tokenizer.ggml.pre"] == "gpt-2" and len(fields["tokenizer.ggml.tokens"]) == fields["qwen2.vocab_size"]
    )


def test_what_no_gguf_describes_is_refused(packed_model, tmp_path):
    with pytest.raises(ArtifactError, match="the family gemma3_text are not written as GGUF; known: llama, mistral"):
        ggufs.export(packed_model("gemma3_text").packed, tmp_path / "model.gguf")
    with pytest.raises(ArtifactError, match=r"attention sees 24 tokens \(sliding_window\)"):
        ggufs.export(packed_model("mistral").packed, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
